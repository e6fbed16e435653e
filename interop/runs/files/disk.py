"""Files that are whole or not there, checks of paths and sizes, and the bar."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

from interop.runs.files.errors import CheckpointError

CHUNK = 1 << 22
MANIFEST = "jopt-manifest.json"
RENAME_EXCHANGE = 2


class Bar:
    """tqdm's bar over bytes; nothing where it is off, not installed, or no terminal looks on."""

    def __init__(self, what: str, total: int, show: bool | None):
        self._bar: Any = None
        if show is None:
            show = sys.stderr.isatty()
        if show:
            with contextlib.suppress(ModuleNotFoundError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False)

    def __call__(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Counted:
    """A file to write to that moves a bar."""

    def __init__(self, file: IO[bytes], bar: Bar):
        self._file, self._bar = file, bar

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self._bar(count)
        return count

    def flush(self) -> None:
        self._file.flush()


def crc(file: IO[bytes], size: int, bar: Bar) -> int:
    """CRC-32 of the next bytes of a file, by pieces."""
    value = 0
    while size:
        piece = file.read(min(size, CHUNK))
        if not piece:
            raise CheckpointError(f"the file ends {size} bytes too early")
        value, size = zlib.crc32(piece, value), size - len(piece)
        bar(len(piece))
    return value


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put(temporary: Path, path: Path) -> None:
    """Give a file or folder its name, in one step; what had it is gone."""
    if path.is_dir():
        _exchange(temporary, path)
    else:
        os.replace(temporary, path)
    _sync(path.parent)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside another, for a file or folder that at the end takes its place; at an exception it goes."""
    temporary = _temporary(path)
    try:
        yield temporary
        if path.exists() and path.is_dir() != temporary.is_dir():
            raise CheckpointError(f"{path}: expected a {'folder' if temporary.is_dir() else 'file'}")
        _put(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[IO[bytes]]:
    """A file under another name, which at the end becomes `path`, in one step; at an exception it goes."""
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a file, found a folder")
    with aside(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder under another name, which at the end becomes `path`; with checksums of all its files."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: expected a folder, found a file")
    with aside(path) as temporary:
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders' names, in one step where the system can (Linux's renameat2)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is not None and rename(-100, os.fsencode(new), -100, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return
    aside = _temporary(old)
    os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside)


def check_folder(path: Path) -> dict[str, int]:
    """The sizes of a folder's files by relative name.

    Raises:
      CheckpointError: a link in it, or what is neither file nor folder.
    """
    sizes = {}
    for folder, folders, names in os.walk(path):
        for name in [*folders, *names]:
            entry = Path(folder, name)
            mode = entry.lstat().st_mode
            if stat.S_ISREG(mode):
                sizes[entry.relative_to(path).as_posix()] = entry.lstat().st_size
            elif not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
                raise CheckpointError(f"{entry}: expected files and folders, found {kind}; copy what it stands for")
    return sizes


def check_inside(path: Path, name: str, sizes: dict[str, int]) -> Path:
    """The file of a folder that a name in another of its files stands for."""
    if not isinstance(name, str) or name not in sizes:
        raise CheckpointError(f"{path}: names the file {name!r:.120}, which is not in the folder")
    return path / name


def _write_manifest(path: Path) -> None:
    files = {}
    with Bar("", 0, False) as bar:
        for name, size in sorted(check_folder(path).items()):
            with open(path / name, "rb") as file:
                files[name] = [size, crc(file, size, bar)]
    text = json.dumps(files, sort_keys=True)
    (path / MANIFEST).write_text(json.dumps({"files": files, "crc32": zlib.crc32(text.encode())}))


def check_manifest(path: Path, sizes: dict[str, int], progress: bool | None) -> None:
    """That a folder written here is as it was written; others say nothing.

    Raises:
      CheckpointError: a file that is missing, of another size or of another checksum.
    """
    if MANIFEST not in sizes:
        return
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, checksum = manifest["files"], manifest["crc32"]
        entries = {str(name): (int(size), int(value)) for name, (size, value) in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: is damaged ({type(error).__name__})") from error
    if zlib.crc32(json.dumps(files, sort_keys=True).encode()) != checksum:
        raise CheckpointError(f"{path / MANIFEST}: is damaged: its checksum differs")
    if different := set(entries) ^ (set(sizes) - {MANIFEST}):
        name = min(different)
        raise CheckpointError(f"{path / name}: {'is missing' if name in entries else 'was not written with the rest'}")
    with Bar(f"checking {path.name}", sum(sizes.values()), progress) as bar:
        for name, (size, expected) in entries.items():
            if sizes[name] != size:
                raise CheckpointError(f"{path / name}: expected {size} bytes, found {sizes[name]}")
            with open(path / name, "rb") as file:
                found = crc(file, size, bar)
            if found != expected:
                raise CheckpointError(f"{path / name}: is damaged: its checksum is {found:08x}, not {expected:08x}")


def library(module: str, distribution: str) -> None:
    """That an optional library is there."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise ModuleNotFoundError(
            f"this format needs {distribution}: pip install {distribution} (or pip install 'jopt[files]')"
        )
