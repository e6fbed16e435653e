"""safetensors files: a JSON header, the tensors' bytes, and checksums of both where the file was written here."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interop.runs.files.disk import CHUNK, Bar, crc, library, replacing_file
from interop.runs.files.errors import CheckpointError, reading
from interop.runs.files.flat import flatten, unflatten, without_aliases
from interop.runs.files.run import Checkpoint, bits
from interop.runs.files.wrapped import unwrap

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LIMIT = 100_000_000  # bytes of a header: the library's own limit
OWN, SUMS, OF_HEADER = "jopt", "jopt.crc32", "jopt.header_crc32"  # keys of the metadata
ALIASES = "jopt.aliases"


def read(path: Path, progress: bool | None = None, **arguments: Any) -> Checkpoint:
    """The checkpoint of a file: of the convention of `flat`, or a model's tensors under their names.

    Raises:
      CheckpointError: damaged, or sizes that the file does not have.
    """
    tensors, metadata = tensors_of(path, progress)
    with reading(path, "the file"):
        if OWN in metadata:
            checkpoint = unflatten(tensors, metadata[OWN])
            patterns = arguments.get("patterns")
            return checkpoint.renamed(patterns) if patterns else checkpoint
        return unwrap(tensors, **arguments)


def tensors_of(path: Path, progress: bool | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, mapped, and its metadata."""
    library("safetensors", "safetensors")
    from safetensors import safe_open  # pyright: ignore[reportMissingImports]

    with reading(path, "the file"):
        metadata = _check(path, progress)
        tensors = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
        for alias, name in json.loads(metadata.get(ALIASES, "{}")).items():
            tensors[alias] = tensors[name]
        return tensors, metadata


def _check(path: Path, progress: bool | None) -> dict[str, str]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LIMIT, size - 8):
            raise CheckpointError(f"its header declares {length} bytes, the file has {size}")
        text = file.read(length)
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(x, str) for x in metadata.values()):
            raise CheckpointError("__metadata__: expected strings")
        if OF_HEADER in metadata:
            _check_header(text, metadata[OF_HEADER])
        end = 0
        places = {name: _place(name, entry) for name, entry in header.items()}
        for name, (begin, stop) in sorted(places.items(), key=lambda item: item[1]):
            if begin != end:
                raise CheckpointError(f"tensor {name!r:.120}: begins at byte {begin}, the one before it ends at {end}")
            end = stop
        if 8 + length + end != size:
            raise CheckpointError(f"its tensors declare {end} bytes, the file has {size - 8 - length} for them")
        sums = json.loads(metadata.get(SUMS, "{}"))
        if SUMS in metadata and set(sums) != set(header):
            raise CheckpointError("its checksums are of other tensors")
        with Bar(f"checking {path.name}", end, progress) as bar:
            for name, expected in sums.items():
                begin, stop = places[name]
                file.seek(8 + length + begin)
                found = f"{crc(file, stop - begin, bar):08x}"
                if found != expected:
                    raise CheckpointError(f"tensor {name!r}: is damaged: its checksum is {found}, not {expected}")
    return metadata


def _check_header(text: bytes, expected: str) -> None:
    plain = text.replace(_header_sum(expected), _header_sum("0" * 8))
    found = f"{zlib.crc32(plain):08x}"
    if text.count(_header_sum(expected)) != 1 or found != expected:
        raise CheckpointError(f"its header is damaged: its checksum is {found}, not {expected:.20}")


def _header_sum(value: str) -> bytes:
    return f'"{OF_HEADER}":"{value}"'.encode()


def _place(name: str, entry: Any) -> tuple[int, int]:
    begin, stop = entry["data_offsets"]
    shape = entry["shape"]
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"tensor {name!r:.120}: unknown type {entry['dtype']!r:.40}")
    if not all(isinstance(n, int) and n >= 0 for n in [begin, stop, *shape]):
        raise CheckpointError(f"tensor {name!r:.120}: expected sizes and offsets that are not negative")
    needed = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    if stop - begin != needed:
        raise CheckpointError(f"tensor {name!r:.120}: shape {shape} needs {needed} bytes, its place has {stop - begin}")
    return begin, stop


def write(checkpoint: Checkpoint, path: Path, progress: bool | None = None) -> None:
    """The convention of `flat`: the JSON under the metadata's key "jopt"; tensors that are one are written once.

    Written here and not by the library, which makes all tensors' bytes before it writes the first.
    """
    tensors, document = flatten(checkpoint)
    for name, x in tensors.items():
        check_plain(name, x)
        if x.dtype not in NAMES:
            raise CheckpointError(f"tensor {name!r}: safetensors has no {x.dtype}; write a .pt file")
    tensors, aliases = without_aliases(tensors)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # alignment, as the library
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        x = tensors[name]
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    sums = dict.fromkeys(order, "0" * 8)

    def encoded(of_header: str) -> bytes:
        metadata = {"format": "pt", OWN: document, SUMS: json.dumps(sums), ALIASES: json.dumps(aliases)}
        text = json.dumps({"__metadata__": metadata | {OF_HEADER: of_header}, **header}, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    length = len(encoded("0" * 8))
    if length > LIMIT:
        raise CheckpointError(f"its header would be {length} bytes, safetensors reads {LIMIT}; write a .pt file")
    with replacing_file(path) as file, Bar(f"writing {path.name}", end, progress) as bar:
        file.seek(8 + length)
        for name in order:
            sums[name] = f"{_write(file, tensors[name], bar):08x}"
        text = encoded(f"{zlib.crc32(encoded('0' * 8)):08x}")
        file.seek(0)
        file.write(struct.pack("<Q", length) + text)


def _write(file: Any, x: Tensor, bar: Bar) -> int:
    data = memoryview(bits(x).numpy())  # type: ignore[arg-type]
    value = 0
    for i in range(0, len(data), CHUNK):
        piece = data[i : i + CHUNK]
        file.write(piece)
        value = zlib.crc32(piece, value)
        bar(len(piece))
    return value


def check_plain(name: str, x: Tensor) -> None:
    """That a tensor's bytes are all there is to it."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and not x.is_quantized
    if not plain or x.device.type == "meta":
        raise CheckpointError(
            f"tensor {name!r}: expected a dense tensor with its values, found {type(x).__name__}, {x.layout}, on "
            f"{x.device}; gather and densify it first"
        )
