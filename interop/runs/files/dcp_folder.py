"""Folders of torch.distributed.checkpoint: written by it, and read without running what their pickle names."""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from interop.runs.files import flat, torch_file
from interop.runs.files.disk import Bar, check_folder, check_inside, check_manifest, replacing_folder
from interop.runs.files.errors import CheckpointError, reading
from interop.runs.files.run import Checkpoint
from interop.runs.files.safetensors_file import check_plain
from interop.runs.files.wrapped import OWN, unwrap

METADATA = ".metadata"
# All that the pickle of a DCP folder's metadata may name.
CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # what Python 3.13 calls them
}


def read(path: Path, progress: bool | None = None, **arguments: Any) -> Checkpoint:
    """The checkpoint of a folder, its shards put together.

    Raises:
      CheckpointError: damaged, links or files outside of it, sizes that it does not have, code in its pickles.
    """
    with reading(path, "the folder"):
        sizes = check_folder(path)
        check_manifest(path, sizes, progress)
        raw = _tree(path, sizes, progress)
        own = raw.get(OWN)
        if own is not None:
            raw[OWN] = json.loads(own)
            extra = raw.pop("extra", {})
            raw |= flat.decode(raw[OWN].pop("extra"), extra)
        return unwrap(raw, **arguments)


def _tree(path: Path, sizes: dict[str, int], progress: bool | None) -> dict[str, Any]:
    data = (path / METADATA).read_bytes()
    torch_file.check_operations(data)
    metadata = _Metadata(io.BytesIO(data)).load()
    places: dict[str, list[tuple[Any, Any]]] = {}
    for index, place in metadata.storage_data.items():
        places.setdefault(index.fqn, []).append((index, place))
    tree: dict[Any, Any] = {}
    total = sum(sizes.values())
    with Bar(f"reading {path.name}", total, progress) as bar:
        for name, entry in metadata.state_dict_metadata.items():
            at = (metadata.planner_data or {}).get(name, (name,))
            value = _value(path, name, entry, places.get(name, []), sizes, total, bar)
            _put(tree, at, value)
    return tree


def _put(tree: Any, at: tuple[Any, ...], value: Any) -> None:
    """The value at a path of keys; of positions, where a list was taken apart."""
    for key, following in itertools.pairwise(at):
        fresh: Any = [] if isinstance(following, int) else {}
        if isinstance(tree, list):
            if key == len(tree):
                tree.append(fresh)
            tree = tree[key]
        else:
            tree = tree.setdefault(key, fresh)
    if isinstance(tree, list):
        if at[-1] != len(tree):
            raise CheckpointError(f"{'.'.join(map(str, at))}: expected position {len(tree)} of the list")
        tree.append(value)
    else:
        tree[at[-1]] = value


def _value(
    path: Path, name: str, entry: Any, places: list[tuple[Any, Any]], sizes: dict[str, int], total: int, bar: Bar
) -> Any:
    if not hasattr(entry, "size"):
        if len(places) != 1:
            raise CheckpointError(f"{name!r}: expected one place in the files, found {len(places)}")
        return _piece(path, name, places[0][1], sizes, bar)
    shape, dtype = tuple(entry.size), entry.properties.dtype
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > total:
        raise CheckpointError(f"{name!r}: shape {shape} of {dtype}, more than the folder's {total} bytes")
    by_offset = {tuple(index.offset or (0,) * len(shape)): place for index, place in places}
    result, filled = None, 0
    for chunk in entry.chunks:
        offset, part = tuple(chunk.offsets), tuple(chunk.sizes)
        if offset not in by_offset or any(
            o < 0 or n < 0 or o + n > end for o, n, end in zip(offset, part, shape, strict=True)
        ):
            raise CheckpointError(f"{name!r}: the piece at {offset} of shape {part} is not in the files or in {shape}")
        piece = _piece(path, name, by_offset[offset], sizes, bar)
        if not isinstance(piece, torch.Tensor) or tuple(piece.shape) != part or piece.dtype != dtype:
            raise CheckpointError(f"{name!r}: expected a piece of shape {part} and {dtype} at {offset}")
        if part == shape:
            return piece
        result = torch.empty(shape, dtype=dtype) if result is None else result
        result[tuple(slice(o, o + n) for o, n in zip(offset, part, strict=True))] = piece
        filled += piece.numel()
    if result is None or filled != result.numel():
        raise CheckpointError(f"{name!r}: its pieces hold {filled} of {math.prod(shape)} numbers")
    return result


def _piece(path: Path, name: str, place: Any, sizes: dict[str, int], bar: Bar) -> Any:
    file = check_inside(path, place.relative_path, sizes)
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(f"{name!r}: is written through an extension ({place.transform_descriptors})")
    if not 0 <= place.offset <= place.offset + place.length <= sizes[place.relative_path]:
        raise CheckpointError(
            f"{name!r}: bytes {place.offset} to {place.offset + place.length} of {file.name}, which has "
            f"{sizes[place.relative_path]}"
        )
    with open(file, "rb") as stream:
        stream.seek(place.offset)
        data = stream.read(place.length)
    with reading(f"{file}: {name!r}", "the piece"):
        return torch_file.read_bytes(data, bar)


class _Metadata(pickle.Unpickler):
    """Unpickles the classes of DCP's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(f"{METADATA}: its pickle names {module}.{name}, which DCP's does not, and is not run")


def write(checkpoint: Checkpoint, path: Path, progress: bool | None = None) -> None:
    """ "model" and "optimizer", by names as torch's `get_optimizer_state_dict` has them, and the rest under "jopt"."""
    from torch.distributed.checkpoint.state_dict_saver import save

    tree = torch_file.state_dicts(checkpoint)
    for name, x in checkpoint.tensors().items():
        check_plain(name, x)
    document, tensors = flat.encode({k: v for k, v in tree.items() if k not in ("model", "optimizer", OWN)})
    own = {k: tree[k] for k in ("model", "optimizer") if k in tree}
    if checkpoint.optimizer is not None:
        state = {name: values for name, values in checkpoint.optimizer.state.items() if values}
        own["optimizer"] = {"state": state, "param_groups": checkpoint.optimizer.groups}
    if tensors:
        own["extra"] = tensors
    own[OWN] = json.dumps(tree[OWN] | {"extra": document})
    with replacing_folder(path) as folder, warnings.catch_warnings(), Bar(f"writing {path.name}", 0, progress):
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save(own, checkpoint_id=folder, no_dist=True)
