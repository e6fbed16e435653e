"""Batches of a torch DataLoader, or of any iterable, as JAX arrays that are ready before they are asked for."""

from __future__ import annotations

import math
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from interop.memory.values import ALIGNMENT, to_jax
from jopt._compat import enable_x64

_NARROW = {np.dtype(np.int64): np.dtype(np.int32), np.dtype(np.uint64): np.dtype(np.uint32)}
_WIDE = (np.dtype(np.float64), np.dtype(np.complex128))


def prefetch(
    loader: Iterable[Any],
    sharding: Any = None,
    size: int = 2,
    *,
    last: Literal["keep", "drop", "pad"] = "keep",
    copy: bool | None = True,
) -> Prefetch:
    """`loader`'s batches in their order as JAX arrays, made by a background thread ahead of their use.

    Args:
      loader: an iterable of trees (dicts, tuples, named tuples, lists). Torch tensors and NumPy and JAX arrays become
        arrays; other leaves (strings, numbers, NumPy arrays of text) are passed as they are.
      sharding: a `jax.sharding.Sharding` for every array, or a tree of the batch's structure with one (or None) for
        each leaf. None is JAX's default device.
      size: batches held ready besides the one in use.
      last: of a batch that is smaller than the pass's first: "keep" it, "drop" it, or "pad" it with zeros. With "pad"
        every item is `(batch, mask)`, where `mask` is bool[rows], true for rows of the loader.
      copy: as in `to_jax`. True, a snapshot. None, share memory where JAX can: safe if the loader writes to no batch
        it has given, as a DataLoader that collates does (with workers too). False, share or raise ValueError.

    Returns:
      An iterable; each `iter()` is a pass of its own over `loader`, with its own thread, and `len()` is the number of
      items where the loader has a length ("drop" may give one less). A pass has `close()`, and closes once dropped.

    While `jax_enable_x64` is off, int64 becomes int32 and uint64 uint32, after a check that every value fits.

    Raises:
      ValueError: `size` below 1, an unknown `last`; in a pass, a batch that `sharding` does not divide, that `last`
        cannot even out, or whose memory `copy=False` cannot share.
      OverflowError: in a pass, an integer that does not fit 32 bits.
      TypeError: in a pass, float64 or complex128 while x64 is off, and what else `to_jax` refuses.

    Whatever the loader raises is raised where the batch would have come.

    >>> import torch, interop
    >>> for x in interop.prefetch(torch.arange(4.0).split(2)):
    ...     print(x * 2)
    [0. 2.]
    [4. 6.]
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, found {size}")
    if last not in ("keep", "drop", "pad"):
        raise ValueError(f"last: expected 'keep', 'drop' or 'pad', found {last!r}")
    return Prefetch(loader, sharding, size, last, copy)


class Prefetch:
    """What `prefetch` returns."""

    def __init__(self, loader: Iterable[Any], sharding: Any, size: int, last: str, copy: bool | None):
        self.loader, self.sharding, self.size, self.last, self.copy = loader, sharding, size, last, copy

    def __iter__(self) -> Pass:
        # The loader's iterator is made here: it draws its seed, and forks, in the caller's thread.
        convert = _Convert(self.sharding, self.last, self.copy)
        return Pass(iter(self.loader), convert, self.size)

    def __len__(self) -> int:
        return len(self.loader)  # pyright: ignore[reportArgumentType]


class Pass:
    """One pass: an iterator whose thread ends with the loader, with an error, by `close()`, or with this object."""

    def __init__(self, batches: Iterator[Any], convert: _Convert, size: int):
        self._ready: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._room = threading.Semaphore(size)
        stop = threading.Event()
        # The thread refers to none of this object, so that dropping it ends the thread.
        arguments = (batches, convert, self._ready, self._room, stop)
        thread = threading.Thread(target=_produce, args=arguments, name="interop.prefetch", daemon=True)
        # Also at exit, before the interpreter takes JAX down under the thread.
        self._finalizer = weakref.finalize(self, _stop, stop, self._room, thread)
        thread.start()

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Any:
        if not self._finalizer.alive:
            raise StopIteration
        kind, value = self._ready.get()
        self._room.release()
        if kind == "batch":
            return value
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the pass: its thread ends once the loader has returned the batch it is at."""
        self._finalizer()


def _stop(stop: threading.Event, room: threading.Semaphore, thread: threading.Thread) -> None:
    stop.set()
    room.release()
    if thread is not threading.current_thread():
        thread.join(timeout=1)  # not forever: the loader may be waiting for data


def _produce(
    batches: Iterator[Any],
    convert: _Convert,
    ready: queue.SimpleQueue,
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        with enable_x64(convert.x64):
            while True:
                room.acquire()
                if stop.is_set():
                    break
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                items = convert(batch)
                if not items:
                    room.release()
                for item in items:
                    ready.put(("batch", item))
                del batch, items  # not held while waiting for room
        if hasattr(batches, "close"):
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
        ready.put(("end", None))
    except BaseException as error:
        ready.put(("error", error))


class _Convert:
    """A pass's conversion of a batch to the items it gives: one, or none if it is dropped."""

    def __init__(self, sharding: Any, last: str, copy: bool | None):
        self.sharding, self.last, self.copy = sharding, last, copy
        # JAX keeps both by the thread: these are the caller's, for the thread that converts.
        self.x64: bool = jax.config.read("jax_enable_x64")
        self.device: Any = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
        self.rows = 0  # of the first batch, once it is there

    def __call__(self, batch: Any) -> list[Any]:
        paths, tree = jax.tree_util.tree_flatten_with_path(batch)
        names = ["batch" + jax.tree_util.keystr(path) for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        one = self.sharding is None or isinstance(self.sharding, Sharding)
        shardings = [self.sharding] * len(leaves) if one else tree.flatten_up_to(self.sharding)
        arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

        rows = 0
        if self.last != "keep":
            rows = _rows([(names[i], leaves[i]) for i in arrays])
            self.rows = self.rows or rows
            if rows > self.rows:
                raise ValueError(f"batch: expected at most the first batch's {self.rows} rows, found {rows}")
            if self.last == "drop" and rows < self.rows:
                return []
        for i in arrays:
            x = _array(names[i], leaves[i], self.copy, self.x64)
            if self.last == "pad" and x.ndim:
                x = _pad(x, self.rows)
            leaves[i] = self._put(names[i], x, shardings[i])
        batch = tree.unflatten(leaves)
        if self.last != "pad":
            return [batch]
        first = next(s for s, leaf in zip(shardings, leaves, strict=True) if isinstance(leaf, jax.Array) and leaf.ndim)
        if isinstance(first, NamedSharding):
            first = NamedSharding(first.mesh, PartitionSpec(*first.spec[:1]))
        return [(batch, self._put("mask", np.arange(self.rows) < rows, first))]

    def _put(self, name: str, x: Any, sharding: Sharding | None) -> jax.Array:
        if isinstance(sharding, NamedSharding):
            _check_divides(name, x.shape, sharding)
        return jax.device_put(x, sharding or self.device)


def _is_array(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return jnp.issubdtype(x.dtype, np.number) or x.dtype == np.bool_
    return isinstance(x, (torch.Tensor, jax.Array))


def _rows(arrays: list[tuple[str, Any]]) -> int:
    """The batch's rows: the size of axis 0, the same in every array but scalars."""
    sizes = {name: x.shape[0] for name, x in arrays if x.ndim}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"batch: expected arrays of one size along axis 0, found {sizes}; use last='keep'")
    return next(iter(sizes.values()))


def _array(name: str, x: Any, copy: bool | None, x64: bool) -> Any:
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, torch.Tensor):
        if x64 or x.dtype not in (torch.int64, torch.uint64):
            try:
                return to_jax(x, copy=copy)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}{str(error).removeprefix('x')}") from None
        x = x.detach().cpu().numpy()
    reason = None
    if not x64:
        if x.dtype in _WIDE:
            raise TypeError(
                f"{name}: {x.dtype} would be narrowed to 32 bits while jax_enable_x64 is off; set it with "
                "jax.config.update('jax_enable_x64', True), or convert the array in the dataset"
            )
        if x.dtype in _NARROW:
            reason = f"{x.dtype} is converted to {_NARROW[x.dtype]}"
    if reason is None and (x.ctypes.data % ALIGNMENT or not x.flags.c_contiguous):
        reason = f"it is not contiguous and aligned to {ALIGNMENT} bytes"
    if copy is False and reason:
        raise ValueError(f"{name}: cannot share its memory with JAX: {reason}; use copy=None or copy=True")
    if not x64 and x.dtype in _NARROW:
        return _narrow(name, x)
    return np.array(x) if copy else x  # device_put takes aligned memory as it is


def _narrow(name: str, x: np.ndarray) -> np.ndarray:
    """64-bit integers in 32 bits, whose values all fit."""
    narrow = _NARROW[x.dtype]
    limits = np.iinfo(narrow)
    if x.size and (x.min() < limits.min or x.max() > limits.max):
        raise OverflowError(
            f"{name}: {x.dtype} values from {x.min()} to {x.max()} do not fit {narrow}, to which they are converted "
            "while jax_enable_x64 is off; set it with jax.config.update('jax_enable_x64', True)"
        )
    return x.astype(narrow)


def _pad(x: Any, rows: int) -> Any:
    if x.shape[0] == rows:
        return x
    padded = np.zeros((rows, *x.shape[1:]), x.dtype)
    padded[: x.shape[0]] = np.asarray(x)
    return padded


def _check_divides(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    if len(sharding.spec) > len(shape):
        raise ValueError(f"{name}: shape {shape} has fewer axes than its sharding's {sharding.spec}")
    for axis, (n, names) in enumerate(zip(shape, sharding.spec, strict=False)):
        axes = names if isinstance(names, tuple) else (names,) if isinstance(names, str) else ()
        parts = math.prod(sharding.mesh.shape[a] for a in axes)
        if n % parts:
            raise ValueError(
                f"{name}: axis {axis} of size {n} is not divided by the mesh's {', '.join(map(repr, axes))} of size "
                f"{parts}; change the batch size, or use last='drop' or last='pad'"
            )
