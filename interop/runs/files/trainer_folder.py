"""The folders of transformers' Trainer: read only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interop.runs.files import safetensors_file, torch_file
from interop.runs.files.disk import check_folder, check_inside
from interop.runs.files.errors import CheckpointError, reading
from interop.runs.files.run import Checkpoint
from interop.runs.files.wrapped import unwrap

MODELS = ("model.safetensors", "pytorch_model.bin")
OPTIMIZER, STATE = "optimizer.pt", "trainer_state.json"
OTHERS = {"scheduler.pt": "lr_scheduler", "scaler.pt": "scaler"}


def is_trainer(names: Any) -> bool:
    return any(name in names for name in (OPTIMIZER, STATE, *MODELS, *(f"{m}.index.json" for m in MODELS)))


def read(path: Path, progress: bool | None = None, **arguments: Any) -> Checkpoint:
    """The model's tensors, whole or in shards, the optimizer, scheduler and scaler, and the step of trainer_state.json.

    rng_state.pth and training_args.bin hold pickled objects and are not read.
    """
    sizes = check_folder(path)
    raw: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for file in _model_files(path, sizes):
        if file.suffix == ".safetensors":
            part = safetensors_file.tensors_of(file, progress)[0]
        else:
            part = torch_file.read(file, progress)
        if not isinstance(part, dict) or set(part) & set(tensors):
            raise CheckpointError(f"{file}: expected tensors by name that no other shard has")
        tensors |= part
    if tensors:
        raw["model"] = tensors
    if OPTIMIZER in sizes:
        raw["optimizer"] = torch_file.read(path / OPTIMIZER, progress)
    for name, key in OTHERS.items():
        if name in sizes:
            raw[key] = torch_file.read(path / name, progress)
    if STATE in sizes:
        with reading(path / STATE, "the file"):
            state = json.loads((path / STATE).read_text())
            raw |= {key: state[key] for key in ("global_step", "epoch") if key in state}
    with reading(path, "the folder"):
        return unwrap(raw, **arguments)


def _model_files(path: Path, sizes: dict[str, int]) -> list[Path]:
    for name in MODELS:
        if name in sizes:
            return [path / name]
        index = path / f"{name}.index.json"
        if index.name in sizes:
            with reading(index, "the file"):
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                return [check_inside(path, shard, sizes) for shard in shards]
    return []
