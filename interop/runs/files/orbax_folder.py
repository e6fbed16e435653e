"""orbax folders: JAX's own tree, `params`, `buffers` and the `State` of `tx.init`, and JSON beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import torch

from interop.dropin.leaf import EMA
from interop.memory import HOST
from interop.memory.values import to_jax
from interop.modules import JaxLeaf
from interop.runs.bridge import OptimizerState, run_to_torch
from interop.runs.files import flat
from interop.runs.files.disk import Bar, check_folder, check_manifest, library, replacing_folder
from interop.runs.files.errors import CheckpointError, reading
from interop.runs.files.run import Checkpoint, tensor
from interop.runs.files.safetensors_file import check_plain
from interop.runs.files.wrapped import unwrap
from jopt._compat import enable_x64

MARKS = ("_CHECKPOINT_METADATA", "_METADATA")
TREE, JSON = "tree", "jopt"  # the folder's items
RATIO = 100_000  # a folder of zeros is so much smaller than its arrays, and no other is


def write(checkpoint: Checkpoint, path: Path, progress: bool | None = None) -> None:
    """The item "tree" is `{"params": ..., "state": ...}`, with "buffers" and "extra" where there are some.

    Raises:
      CheckpointError: an optimizer that `jopt` does not have, or types and shapes that orbax does not.
    """
    library("orbax.checkpoint", "orbax-checkpoint")
    import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports]

    optimizer = checkpoint.optimizer
    with enable_x64(True):
        tensors, aliases = flat.without_aliases(checkpoint.tensors())
        arrays = {name: _array(name, x) for name, x in tensors.items() if not name.startswith("state.")}
        tree: dict[str, Any] = {
            kind: {name.removeprefix(f"{kind}."): x for name, x in arrays.items() if name.startswith(f"{kind}.")}
            for kind in ("params", "buffers")
        }
        averages: dict[str, Any] = {}
        if optimizer is not None:
            tree["state"] = checkpoint.to_jax()[2]
            averages = {name: values[EMA] for name, values in optimizer.state.items() if EMA in values}
        document, extra = flat.encode(
            {
                "version": flat.VERSION,
                "step": checkpoint.step,
                "optimizer": None if optimizer is None else {"name": optimizer.name, "groups": optimizer.groups},
                "aliases": aliases,
                "averages": averages,
                "extra": checkpoint.extra,
            }
        )
        tree["extra"] = {name: _array(name, x) for name, x in extra.items()}
        args = ocp.args.Composite(
            **{
                TREE: ocp.args.StandardSave({k: x for k, x in tree.items() if k == "params" or x}),
                JSON: ocp.args.JsonSave({"document": document}),
            }
        )
        with (
            replacing_folder(path) as folder,
            Bar(f"writing {path.name}", 0, progress),
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
        ):
            checkpointer.save(folder.absolute() / "orbax", args=args)
            for entry in (folder / "orbax").iterdir():
                entry.rename(folder / entry.name)
            (folder / "orbax").rmdir()


def _array(name: str, x: torch.Tensor) -> jax.Array:
    check_plain(name, x)
    if not x.numel():
        raise CheckpointError(f"tensor {name!r}: orbax has no arrays of no elements; write a .pt or .safetensors file")
    try:
        return to_jax(x.detach(), copy=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"tensor {name!r}: {error}") from error


def read(path: Path, progress: bool | None = None, **arguments: Any) -> Checkpoint:
    """The checkpoint of a folder; of one written elsewhere the parameters, its other arrays under `extra`.

    Raises:
      CheckpointError: damaged, links, or sizes that it does not have.
    """
    library("orbax.checkpoint", "orbax-checkpoint")
    with reading(path, "the folder"), enable_x64(True):
        sizes = check_folder(path)
        check_manifest(path, sizes, progress)
        if any(name.startswith(f"{JSON}/") for name in sizes):
            checkpoint = _own(path, sum(sizes.values()))
            patterns = arguments.get("patterns")
            return checkpoint.renamed(patterns) if patterns else checkpoint
        tree = _restore(path, sum(sizes.values()))
        if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
            rest = {key: _torch(x, (key,)) for key, x in tree.items() if key != "params"}
            return unwrap({"model": _flat(tree["params"])} | rest, **arguments)
        return unwrap({"model": _flat(tree)}, **arguments)


def _own(path: Path, size: int) -> Checkpoint:
    import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports]

    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        document = checkpointer.restore(path.absolute() / JSON)["document"]
    tree = _restore(path / TREE, size)
    d = flat.decode(document, {name: tensor(name, x) for name, x in tree.get("extra", {}).items()})
    if d["version"] != flat.VERSION:
        raise CheckpointError(f"expected version {flat.VERSION} of the convention, found {d['version']!r}")
    params, buffers = ({n: tensor(n, x) for n, x in tree.get(kind, {}).items()} for kind in ("params", "buffers"))
    for alias, name in d["aliases"].items():
        kind, _, short = alias.partition(".")
        source = {"params": params, "buffers": buffers}[name.partition(".")[0]]
        {"params": params, "buffers": buffers}[kind][short] = source[name.partition(".")[2]]
    result = Checkpoint(params, buffers, None, d["step"], d["extra"])
    if d["optimizer"] is not None:
        result.optimizer = OptimizerState(d["optimizer"]["name"], d["optimizer"]["groups"], {})
        result.optimizer.state = _torch_state(result, tree["state"])
        for name, x in d["averages"].items():
            result.optimizer.state[name][EMA] = x
    return result


def _torch_state(checkpoint: Checkpoint, raw: Any) -> dict[str, dict[str, Any]]:
    """The optimizer's state by names, of the restored `State`, whose NamedTuples are dictionaries."""
    assert checkpoint.optimizer is not None
    run = checkpoint.optimizer
    tx, params, _ = checkpoint.to_jax()
    state = _like(jax.eval_shape(tx.init, params), raw)
    members = [group["params"] for group in run.groups]
    leaves = {name: JaxLeaf(name) for name in run.names}
    found = run_to_torch(str(run.name), tx, params, state, members, checkpoint.params, leaves)
    return {name: values for name, values in found.items() if values}


def _like(target: Any, raw: Any) -> Any:
    """Dictionaries and lists as the NamedTuples and tuples of the target."""
    fields = getattr(target, "_fields", None)
    if fields is not None:
        return type(target)(*(_like(getattr(target, field), raw[field]) for field in fields))
    if isinstance(target, tuple):
        return tuple(_like(t, x) for t, x in zip(target, raw, strict=True))
    return {key: _like(t, raw[key]) for key, t in target.items()} if isinstance(target, Mapping) else raw


def _restore(path: Path, size: int) -> Any:
    """A tree of arrays on this machine's CPU, whatever held them before."""
    import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports]
    from etils import epath  # pyright: ignore[reportMissingImports]

    handler = ocp.StandardCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        saved = handler.metadata(epath.Path(path.absolute()))
        saved = getattr(saved, "tree", saved)
        leaves = [x for x in jax.tree.leaves(saved) if hasattr(x, "shape")]
        declared = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        if declared > RATIO * size:
            raise CheckpointError(f"its arrays declare {declared} bytes, the folder has {size}")
        sharding = jax.sharding.SingleDeviceSharding(HOST.jax_device)
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if hasattr(x, "shape") else x, saved
        )
        return checkpointer.restore(path.absolute(), args=ocp.args.StandardRestore(target))


def _flat(tree: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors under the joined keys of nested dictionaries and lists."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    result: dict[str, torch.Tensor] = {}
    for key, x in items:
        name = f"{prefix}{key}"
        result |= _flat(x, f"{name}.") if isinstance(x, Mapping | list | tuple) else {name: tensor(name, x)}
    return result


def _torch(tree: Any, path: tuple[str, ...]) -> Any:
    if isinstance(tree, Mapping):
        return {k: _torch(x, (*path, str(k))) for k, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [_torch(x, (*path, str(i))) for i, x in enumerate(tree)]
    return tensor(".".join(path), tree) if isinstance(tree, jax.Array) else tree
