"""torch.save's files: checked, then mapped by `torch.load(weights_only=True, mmap=True)`."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from interop.memory import HOST
from interop.runs.files.disk import CHUNK, Bar, Counted, replacing_file
from interop.runs.files.errors import CheckpointError, reading
from interop.runs.files.run import EXTRA_STATE, Checkpoint
from interop.runs.files.wrapped import OWN

# Tensors may share memory (tied weights, a flat buffer and its pieces); a file that says it holds more than so many
# times its own size is made to fill the memory of whoever copies it.
SHARED = 8
# What pickles of torch.save are of, the opcodes that `torch.load(weights_only=True)` runs: among the others are some
# that allocate what a number in the file says.
OPCODES = frozenset(
    """
    APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD EMPTY_DICT EMPTY_LIST
    EMPTY_SET EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM
    SETITEMS SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3
    """.split()  # noqa: SIM905
)
# Bytes of a number in torch's storages; the types that they lack are written in untyped ones.
WIDTHS = {
    "Untyped": 1,
    "Bool": 1,
    "Byte": 1,
    "Char": 1,
    "Short": 2,
    "Half": 2,
    "BFloat16": 2,
    "Int": 4,
    "Float": 4,
    "Long": 8,
    "Double": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}


def read(path: Path, progress: bool | None = None) -> Any:
    """The tree of a file, its tensors mapped into memory.

    Raises:
      CheckpointError: no file of torch.save's present format; damaged; with code; with sizes that it does not have.
    """
    with reading(path, "the file"):
        size = path.stat().st_size
        with open(path, "rb") as file, Bar(f"checking {path.name}", size, progress) as bar:
            check(file, size, bar)
        return _load(path, mmap=True)


def read_bytes(data: bytes, bar: Bar) -> Any:
    """The tree of a file that is in memory."""
    check(io.BytesIO(data), len(data), bar)
    return _load(io.BytesIO(data), mmap=False)


def _load(file: Any, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location=HOST.torch_device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"its pickle holds more than tensors and numbers, and is not run: {_refused(error)}. If you trust the "
            "file, load it with torch.load(weights_only=False) and save its state_dicts alone; or allow a class "
            "with torch.serialization.add_safe_globals"
        ) from error


def _refused(error: Exception) -> str:
    """What torch's message says that it does not run."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    return name[1] if name else str(error).strip().splitlines()[-1][:200]


def check(file: IO[bytes], size: int, bar: Bar) -> None:
    """Sizes before anything is allocated, then every checksum, then the pickle's tensors."""
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError(
            "is no zip file as torch.save writes since torch 1.6; an older one: load it with "
            "torch.load(weights_only=True) and save it again"
        )
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise CheckpointError("an entry of the zip file comes twice")
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise CheckpointError(f"entry {name!r:.120} is compressed, which torch.save never does")
        declared = sum(entry.file_size for entry in entries.values())
        if declared > size:
            raise CheckpointError(f"its entries declare {declared} bytes, the file has {size}")
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError("expected one entry data.pkl, as torch.save writes it")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in entries:
            raise CheckpointError("is a TorchScript program, whose code is not run; save its state_dict()")
        for name, entry in entries.items():
            _check_crc(archive, name, entry, bar)
        storages = {name.removeprefix(f"{prefix}data/"): e.file_size for name, e in entries.items()}
        _check_pickle(archive.read(pickles[0]), storages, size)


def _check_crc(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo, bar: Bar) -> None:
    try:
        with archive.open(entry) as file:  # which compares the CRC-32 at the end
            count = 0
            while piece := file.read(CHUNK):
                count += len(piece)
                bar(len(piece))
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"entry {name!r:.120} is damaged: {error}") from error
    if count != entry.file_size:
        raise CheckpointError(f"entry {name!r:.120} is cut off: {count} bytes of {entry.file_size}")


def check_operations(data: bytes, allowed: frozenset[str] | None = None) -> None:
    """That a pickle has only these operations, and none that allocates what a number in it says."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "BYTEARRAY8" or (allowed is not None and opcode.name not in allowed):
            raise CheckpointError(f"its pickle has the operation {opcode.name}, which torch does not write")
        if opcode.name == "LONG_BINPUT" and int(argument) > len(data):  # type: ignore[arg-type]
            raise CheckpointError("its pickle numbers more objects than it has")


def _check_pickle(data: bytes, storages: dict[str, int], size: int) -> None:
    check_operations(data, OPCODES)
    scan = _Scan(io.BytesIO(data), storages)
    scan.load()
    if scan.total > SHARED * size:
        raise CheckpointError(f"its tensors are {scan.total} bytes, more than {SHARED} times the file's {size}")


class _Scan(pickle.Unpickler):
    """Reads a pickle without making or calling anything that it names, and sums its tensors' sizes."""

    def __init__(self, file: Any, storages: dict[str, int]):
        super().__init__(file)
        self.storages, self.total = storages, 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch._utils" and name == "_rebuild_tensor_v3":
            return self._typed_tensor
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _StorageType(name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return _Uncalled if name.endswith(("Tensor", "Parameter", "bytearray", "_rebuild_qtensor")) else _Inert

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key, _, numel = pid
        width = storage_type.width if isinstance(storage_type, _StorageType) else 0
        if kind != "storage" or key not in self.storages or not isinstance(numel, int) or not width:
            raise CheckpointError(f"its pickle names the storage {key!r:.80}, which the file does not have")
        if not 0 <= numel * width <= self.storages[key]:
            raise CheckpointError(f"storage {key}: {numel} numbers of {width} bytes in {self.storages[key]} bytes")
        return numel, width

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
        numel, width = storage
        self._fits(numel, width, offset, shape, stride)
        return _Inert()

    def _typed_tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
    ) -> Any:
        numel, width = storage
        self._fits(numel * width // dtype.itemsize, dtype.itemsize, offset, shape, stride)
        return _Inert()

    def _fits(self, numel: int, width: int, offset: int, shape: Any, stride: Any) -> None:
        count, last = 1, offset
        for length, step in zip(shape, stride, strict=True):
            if length < 0 or step < 0:
                raise CheckpointError(f"a tensor has shape {shape!r:.80} and strides {stride!r:.80}")
            count, last = count * length, last + (length - 1) * step
        if count and not 0 <= offset <= last < numel:
            raise CheckpointError(f"a tensor of shape {shape!r:.80} reaches beyond its storage of {numel} numbers")
        self.total += count * width


class _StorageType:
    def __init__(self, name: str):
        self.width = WIDTHS.get(name.removesuffix("Storage"), 0)


class _Inert:
    """Stands for anything that a pickle makes."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass


class _Uncalled(_Inert):
    """Stands for a class whose calls allocate as many bytes as their arguments say."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        raise CheckpointError("its pickle makes a tensor or an array of bytes from a size alone")


def state_dicts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `torch.save` writes: "model" and "optimizer" as load_state_dict takes them, "step", and the others."""
    others = dict(checkpoint.extra)
    if taken := {"model", "optimizer", "step", OWN} & set(others):
        raise CheckpointError(f"extra: the key {min(taken)!r} is the run's own; give it another name")
    tree: dict[str, Any] = {}
    extra_state = others.pop(EXTRA_STATE, {})
    own: dict[str, Any] = {"buffers": list(checkpoint.buffers)}
    if checkpoint.params or checkpoint.buffers or extra_state:
        tree["model"] = {**checkpoint.params, **checkpoint.buffers, **extra_state}
    if checkpoint.optimizer is not None:
        optimizer = checkpoint.optimizer
        own["optimizer"] = optimizer.name
        numbers = {name: i for i, name in enumerate(optimizer.names)}
        tree["optimizer"] = {
            "state": {numbers[name]: values for name, values in optimizer.state.items()},
            "param_groups": [
                {k: v for k, v in group.items() if k != "params"}
                | {"params": [numbers[n] for n in group["params"]], "param_names": list(group["params"])}
                for group in optimizer.groups
            ],
        }
    if checkpoint.step is not None:
        tree["step"] = checkpoint.step
    return {**others, **tree, OWN: own}


def write(checkpoint: Checkpoint, path: Path, progress: bool | None = None) -> None:
    """One dictionary of state_dicts, that `torch.load` reads."""
    total = sum(x.numel() * x.element_size() for x in checkpoint.tensors().values())
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with replacing_file(path) as file, Bar(f"writing {path.name}", total, progress) as bar:
            torch.save(state_dicts(checkpoint), Counted(file, bar))  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(before)
