"""A checkpoint as flat tensors and one JSON text: what safetensors, orbax and DCP hold."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interop.memory.tensors import address
from interop.runs.files.errors import CheckpointError
from interop.runs.files.run import Checkpoint, OptimizerState

VERSION = 1


def flatten(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], str]:
    """All tensors under `params.`, `buffers.`, `state.` and `extra.`, and the rest as JSON.

    Raises:
      CheckpointError: something in `extra` or the options that is no tensor, number, string, list, tuple or dictionary.
    """
    tensors = checkpoint.tensors()
    extra: dict[str, Tensor] = {}
    optimizer = checkpoint.optimizer
    document = {
        "version": VERSION,
        "step": checkpoint.step,
        "params": list(checkpoint.params),
        "buffers": list(checkpoint.buffers),
        "optimizer": None
        if optimizer is None
        else {
            "name": optimizer.name,
            "groups": _encode(optimizer.groups, ("param_groups",), extra),
            "state": {
                name: {k: None if isinstance(x, Tensor) else _encode(x, (name, k), extra) for k, x in values.items()}
                for name, values in optimizer.state.items()
            },
        },
        "extra": _encode(checkpoint.extra, (), extra),
    }
    return tensors | extra, json.dumps(document, separators=(",", ":"), allow_nan=False)


def unflatten(tensors: Mapping[str, Tensor], document: str) -> Checkpoint:
    """The checkpoint of `flatten`.

    Raises:
      CheckpointError: JSON of another form, or tensors missing or more than it names.
    """
    taken: set[str] = set()

    def take(key: str) -> Tensor:
        if key not in tensors:
            raise CheckpointError(f"tensor {key!r} is missing")
        taken.add(key)
        return tensors[key]

    try:
        d = json.loads(document)
        if d["version"] != VERSION:
            raise CheckpointError(f"expected version {VERSION} of the convention, found {d['version']!r}")
        params, buffers = ({n: take(f"{kind}.{n}") for n in d[kind]} for kind in ("params", "buffers"))
        optimizer = None
        if d["optimizer"] is not None:
            o = d["optimizer"]
            state = {
                name: {
                    k: take(f"state.{name}.{k}") if f"state.{name}.{k}" in tensors else _decode(x, take)
                    for k, x in values.items()
                }
                for name, values in o["state"].items()
            }
            optimizer = OptimizerState(o["name"], _decode(o["groups"], take), state)
        result = Checkpoint(params, buffers, optimizer, d["step"], _decode(d["extra"], take))
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise CheckpointError(f"its JSON is not of the convention ({type(error).__name__}: {error})") from error
    if unknown := set(tensors) - taken:
        raise CheckpointError(f"tensor {min(unknown)!r} is named by nothing in the JSON")
    return result


def encode(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """A tree as JSON, and its tensors by the names that the JSON has for them."""
    tensors: dict[str, Tensor] = {}
    document = _encode(tree, (), tensors)
    return json.dumps(document, separators=(",", ":"), allow_nan=False), tensors


def decode(document: str, tensors: Mapping[str, Tensor]) -> Any:
    """The tree of `encode`.

    Raises:
      CheckpointError: JSON of another form, or a tensor that is not there.
    """
    try:
        return _decode(json.loads(document), tensors.__getitem__)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its JSON is not of the convention ({type(error).__name__}: {error})") from error


def _encode(x: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """JSON of a tree; what JSON lacks is an object of one key that begins with `$`."""
    if len(path) > 100:
        raise CheckpointError(f"{'.'.join(path[:5])}: expected a tree of at most 100 levels")
    if x is None or isinstance(x, bool | str) or type(x) is int:
        return x
    if isinstance(x, Tensor):
        key = ".".join(("extra", *path))
        while key in tensors:
            key += "#"
        tensors[key] = x
        return {"$tensor": key}
    if isinstance(x, float):
        return float(x) if math.isfinite(x) else {"$float": repr(float(x))}
    if isinstance(x, list):
        return [_encode(v, (*path, str(i)), tensors) for i, v in enumerate(x)]
    if isinstance(x, tuple):
        return {"$tuple": [_encode(v, (*path, str(i)), tensors) for i, v in enumerate(x)]}
    if isinstance(x, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in x) and not isinstance(x, collections.Counter):
            return {k: _encode(v, (*path, k), tensors) for k, v in x.items()}
        pairs = [[_encode(k, (*path, "key"), tensors), _encode(v, (*path, str(k)), tensors)] for k, v in x.items()]
        return {"$counter" if isinstance(x, collections.Counter) else "$dict": pairs}
    raise CheckpointError(
        f"{'.'.join(path)!r}: expected tensors, numbers, strings, lists, tuples and dictionaries, found "
        f"{type(x).__module__}.{type(x).__qualname__}; delete it from `extra`, or write a .pt file"
    )


def _decode(x: Any, take: Any) -> Any:
    if isinstance(x, list):
        return [_decode(v, take) for v in x]
    if not isinstance(x, dict):
        return x
    if len(x) == 1 and (key := next(iter(x))).startswith("$"):
        value = x[key]
        if key == "$tensor":
            return take(value)
        if key == "$float":
            return float(value)
        if key == "$tuple":
            return tuple(_decode(v, take) for v in value)
        if key in ("$dict", "$counter"):
            pairs = {_decode(k, take): _decode(v, take) for k, v in value}
            return collections.Counter(pairs) if key == "$counter" else pairs
        raise CheckpointError(f"its JSON has an unknown form {key!r}")
    return {k: _decode(v, take) for k, v in x.items()}


def without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the other names of those that come again, as tied weights do."""
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, x in tensors.items():
        place = (x.device, address(x), x.is_conj(), x.is_neg(), x.dtype, tuple(x.shape), x.stride())
        if x.layout is torch.strided and address(x) and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return {name: x for name, x in tensors.items() if name not in aliases}, aliases
