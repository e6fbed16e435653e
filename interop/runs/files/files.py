"""Checkpoints from and into files of every format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from interop.runs.files import dcp_folder, disk, orbax_folder, safetensors_file, torch_file, trainer_folder
from interop.runs.files.difference import differences
from interop.runs.files.errors import CheckpointError, reading
from interop.runs.files.run import Checkpoint
from interop.runs.files.wrapped import unwrap
from interop.runs.formats import FORMATS, SUFFIXES


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    names: Sequence[str] | Literal["numbers"] | None = None,
    map: Mapping[str, str] | None = None,
    format: str | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    """The run in a file or folder. Nothing in it is run; sizes are checked before memory is taken, checksums after.

    >>> import tempfile, torch, interop
    >>> model = torch.nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model_state_dict": model.state_dict(), "epoch": 3}, f"{folder}/old.pt")
    ...     checkpoint = interop.load_checkpoint(f"{folder}/old.pt")
    >>> sorted(checkpoint.params), checkpoint.extra
    (['bias', 'weight'], {'epoch': 3})

    Args:
      path: of torch.save, safetensors, orbax, torch.distributed.checkpoint, Lightning or transformers' Trainer;
        docs/files.md has the wrappings that are known.
      model: tells parameters from buffers; its order names an optimizer state that has numbers instead of names.
      names: those of the optimizer's parameters, in its order; instead of `model`. "numbers": where nothing names
        them, #0, #1, ...; to look into a file.
      map: names in the file -> the model's: whole names, prefixes that end in a dot, or patterns with `*`.
      format: one of `interop.runs.files.FORMATS`, if the file's own signs are not to decide.
      progress: a bar; None: on a terminal.

    Returns:
      Tensors of .pt and .safetensors files are mapped into memory: read when they are used.

    Raises:
      CheckpointError: names the file, the key, what was expected and found, and the remedy.
      ModuleNotFoundError: the format's library is not installed.
    """
    if map is not None and not isinstance(map, Mapping):
        raise TypeError(f"map: expected a dictionary, as {{'module.*': '*'}}, found {map!r}")
    path = Path(path)
    arguments: dict[str, Any] = {"model": model, "names": names, "patterns": map}
    match format or format_of(path):
        case "torch":
            raw = torch_file.read(path, progress)
            with reading(path, "the file"):
                return unwrap(raw, **arguments)
        case "safetensors":
            return safetensors_file.read(path, progress, **arguments)
        case "orbax":
            return orbax_folder.read(path, progress, **arguments)
        case "dcp":
            return dcp_folder.read(path, progress, **arguments)
        case "trainer":
            return trainer_folder.read(path, progress, **arguments)
        case other:
            raise CheckpointError(f"format: expected one of {', '.join(FORMATS)}, found {other!r}")


def save_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    verify: bool = False,
    progress: bool | None = None,
) -> None:
    """Write a run. What was at `path` is replaced in one step at the end: a save that is killed leaves it as it was.

    Args:
      checkpoint: its tensors must not change meanwhile; they are written one by one, and not copied for .pt and
        .safetensors.
      path: .pt, .pth, .bin, .ckpt: torch.save; .safetensors; .orbax and .dcp: folders.
      format: "torch", "safetensors", "orbax" or "dcp", if the suffix is not to decide.
      verify: read it back and compare it, bit by bit, before it takes its place.
      progress: a bar; None: on a terminal.

    Raises:
      CheckpointError: what the format does not hold; a path without a known suffix.
      ModuleNotFoundError: the format's library is not installed.
    """
    path = Path(path)
    writers = {
        "torch": torch_file.write,
        "safetensors": safetensors_file.write,
        "orbax": orbax_folder.write,
        "dcp": dcp_folder.write,
    }
    chosen = format or SUFFIXES.get(path.suffix)
    if chosen not in writers:
        raise CheckpointError(
            f"{path}: expected a suffix of {', '.join(SUFFIXES)}, or a format of {', '.join(writers)}, found {chosen!r}"
        )
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: its folder is not there")
    path = path.absolute()
    if not verify:
        writers[chosen](checkpoint, path, progress)
        return
    with disk.aside(path) as temporary:
        writers[chosen](checkpoint, temporary, progress)
        back = load_checkpoint(temporary, format=chosen, progress=progress)
        if found := differences(checkpoint, back):
            raise CheckpointError(f"{path}: what was read back differs: {found[0]}; nothing was written")


def format_of(path: Path) -> str:
    """The format by a folder's files, a file's first bytes or its suffix.

    Raises:
      CheckpointError: nothing there, or a folder of none of the formats.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: is not there")
    if not path.is_dir():
        with open(path, "rb") as file:
            start = file.read(9)
        if start[:4] == b"PK\x03\x04":
            return "torch"
        return "safetensors" if start[8:] == b"{" else SUFFIXES.get(path.suffix, "torch")
    names = set(os.listdir(path))
    if dcp_folder.METADATA in names:
        return "dcp"
    if names & set(orbax_folder.MARKS):
        return "orbax"
    if trainer_folder.is_trainer(names):
        return "trainer"
    raise CheckpointError(
        f"{path}: expected a folder of torch.distributed.checkpoint ({dcp_folder.METADATA}), orbax "
        f"({orbax_folder.MARKS[0]}) or transformers' Trainer ({trainer_folder.OPTIMIZER}), found none of these"
    )
