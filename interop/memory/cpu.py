"""Memory of the host, where XLA on CPU and torch work on the same arrays.

Three of its traps decide how this is written. XLA donates an array only if no tensor was made over it by DLPack, and
else copies it silently: so torch's views are made over the address. Memory that is not aligned to 64 bytes is copied
silently: so all that programs read is aligned. Programs run after their call has returned: so `after` waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import mmap
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax import Array
from torch import Tensor

import jopt._compat
from interop import _compat
from interop.memory import device, tensors, values
from jopt._compat import enable_x64
from jopt.fusion import fuses_outputs, multi_output_fusion

PARALLEL = 2**21  # elements: from so many on two threads are quicker than one, torch's threads being started anew
OFTEN = 50


class Buffer(device.Buffer):
    """A JAX array over whose address torch's views are made, so that JAX knows of none and donates it in place.

    Each view keeps this object alive, and it keeps the current array: the memory lives as long as any view of it, and
    no view outlives it.
    """

    __slots__ = ("_memory", "address")

    def __init__(self, program_device: Any, shape: int | tuple[int, ...], dtype: np.dtype):
        # Not jnp.zeros, which compiles a program a shape: 25 ms and 1.6 MB that stay. XLA takes no such array as it is.
        zeros = np.broadcast_to(aligned_zeros(2, dtype)[1:].reshape(()), shape)
        self.array: Array = put(zeros, program_device)
        self.address: int = self.array.unsafe_buffer_pointer()
        self._memory: Callable[[], Any] = lambda: None  # what the views keep, and it this; one for all is smaller

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
        if (memory := self._memory()) is None:
            memory = _memory_type(self.array.nbytes).from_address(self.address)
            memory.owner = self
            self._memory = weakref.ref(memory)
        return tensors.view(memory, dtype, shape, offset)


@functools.cache
def _memory_type(nbytes: int) -> Any:
    """Raw memory that can carry an attribute, which a plain ctypes array cannot."""
    return type("Memory", (ctypes.c_char * nbytes,), {})


class Staging(device.Staging):
    def __init__(self, owner: Cpu, size: int, dtype: np.dtype):
        self._owner, self._memory = owner, aligned_zeros(size, dtype)

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
        return tensors.view(self._memory.view(np.uint8), dtype, shape, offset)

    def array(self, shape: tuple[int, ...]) -> Any:
        return self._owner.alias(self._memory[: math.prod(shape)].reshape(shape))


class Table(device.Table):
    def __init__(self, owner: Cpu, rows: int, columns: int, dtype: np.dtype):
        self.rows = aligned_zeros(rows * columns, dtype).reshape(rows, columns)
        self._array = owner.alias(self.rows)

    def array(self) -> Any:
        return self._array


class Freed(device.Freed):
    """Gives memory that is freed back to the system, which glibc else keeps: a model would be in memory twice.

    A part at a time, for it looks through all that is free.
    """

    def __init__(self, total: int):
        self._part, self._held = max(2**24, total // 64), 0
        if total >= self._part:
            self._give_back()  # what compiling left

    def add(self, nbytes: int) -> None:
        self._held += nbytes
        if self._held >= self._part:
            self._give_back()

    def _give_back(self) -> None:
        self._held = 0
        if (trim := _malloc_trim()) is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """glibc's malloc_trim, if the process runs on that."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


class Cpu(device.Device):
    """The host's memory.

    Args:
      serial: its programs use one thread.
    """

    torch_device = torch.device("cpu")

    def __init__(self, *, serial: bool = False):
        self._serial = serial
        self.steps_by = "a program of one thread" if serial else "a program"

    @property
    def jax_device(self) -> Any:
        return jopt._compat.device("cpu")

    @property
    def program_device(self) -> Any:
        return _compat.own_cpu_device(serial=self._serial) or self.jax_device

    def of_size(self, size: int) -> Cpu:
        return _SERIAL if size < PARALLEL else self

    @property
    def by_torch(self) -> Cpu:
        from interop.memory.eager import EAGER

        return EAGER

    def check(self) -> None:
        """A step can be taken at any time."""

    def recover(self, buffers: Sequence[Any]) -> None:
        """Programs of the host do not raise after they have taken their buffers."""

    def begin(self) -> None:
        """End the threads of torch's OpenMP: after a parallel loop they spin, on the processors that XLA needs.

        They start again with the next parallel loop, which takes time: so small steps use one thread.
        """
        if not self._serial and (pause := _omp_pause()) is not None:
            pause(1)  # omp_pause_soft

    @property
    def fuses_outputs(self) -> bool:
        found = fuses_outputs(own=True, device=_compat.own_cpu_device(serial=True))
        if not found:
            _warn_slow()
        return found

    def compiling(self) -> contextlib.AbstractContextManager[Any]:
        return multi_output_fusion()

    def before(self) -> tuple[()]:
        """torch's operations are over when their call returns."""
        return ()

    def after(self, results: Any) -> None:
        jax.block_until_ready(results)

    def buffer(self, shape: int | tuple[int, ...], dtype: np.dtype) -> Buffer:
        return Buffer(self.program_device, shape, dtype)

    def replace(self, buffers: Sequence[Any], results: Sequence[Array]) -> None:
        for buffer, array, address in zip(buffers, results, map(_address_of, results), strict=True):
            if address == buffer.address:
                buffer.array = array
            else:
                # Something else held the array, so that XLA did not donate it: the views still see the old one.
                array.block_until_ready()
                ctypes.memmove(buffer.address, address, array.nbytes)

    def staging(self, size: int, dtype: np.dtype) -> Staging:
        return Staging(self, size, dtype)

    def table(self, rows: int, columns: int, dtype: np.dtype) -> Table:
        return Table(self, rows, columns, dtype)

    def put(self, x: np.ndarray) -> Array:
        return put(x, self.program_device)

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray:
        return aligned_zeros(size, dtype)

    def elements(self, tensors: Sequence[Tensor | None], dtype: np.dtype) -> list[Any]:
        size = dtype.itemsize
        places = [None if x is None else (x.data_ptr(), x.numel() * x.element_size() // size) for x in tensors]
        return self.elements_at(places, dtype)

    def elements_at(self, places: Sequence[tuple[int, int] | None], dtype: np.dtype) -> list[Any]:
        """As NumPy arrays without a reference to the tensors, or all as JAX's over their memory, if seen `OFTEN`.

        JAX takes NumPy's without copying where they are aligned, but keeps them until its next call; owning nothing,
        they do not keep a gradient alive past zero_grad. Of both kinds mixed it dispatches each new mixture slowly.
        """
        found = [None if place is None else _elements_at(*place, dtype) for place in places]
        often = True
        for x in found:
            if x is not None:
                x.seen += 1
                often = often and x.seen >= OFTEN
        if not often:
            return [x and x.numpy for x in found]
        return [x and self._array(x) for x in found]

    def _array(self, x: _Elements) -> Any:
        if self._serial not in x.arrays:
            x.arrays[self._serial] = self.alias(x.numpy)
        return x.arrays[self._serial]

    def alias(self, x: np.ndarray) -> Any:
        """A JAX array over NumPy's aligned memory, to be written to only while no program runs that takes it.

        It costs a program less than a NumPy array, which JAX puts on the device at each call and waits for. If JAX will
        not take the memory as it is, this is `x` itself.
        """
        array = self.put(x)
        return array if not x.size or array.unsafe_buffer_pointer() == x.ctypes.data else x

    def shown(self, x: Array) -> Tensor:
        return self.tensor(x)

    def sent(self, x: Tensor) -> Array:
        return values.to_jax(x)

    def received(self, x: Array) -> Tensor:
        return values.to_torch(x)

    def array(self, x: Tensor) -> Array:
        x = x.detach().contiguous()
        return self.put(x.view(-1).view(torch.uint8).numpy().view(tensors.numpy_dtype(x.dtype)).reshape(x.shape))

    def tensor(self, x: Array) -> Tensor:
        return values.array_to_torch("x", x, copy=None)

    def freeing(self, total: int) -> Freed:
        return Freed(total)


_address_of = operator.methodcaller("unsafe_buffer_pointer")


@dataclasses.dataclass(slots=True)
class _Elements:
    """Memory at an address, which torch's allocator gives to one backward pass after the other.

    Attributes:
      seen: how often it was asked for.
      arrays: JAX's arrays over it, serial and not. One takes as long to make as 50 launches with NumPy's array: so they
        are made for what is seen `OFTEN`.
    """

    numpy: np.ndarray
    seen: int = 0
    arrays: dict[bool, Any] = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=4096)
def _elements_at(address: int, size: int, dtype: np.dtype) -> _Elements:
    return _Elements(np.frombuffer(memory_at(address, size, dtype), dtype, size))


@functools.cache
def _warn_slow() -> None:
    warnings.warn(
        "interop.optim: this JAX does not take the option that lets XLA on CPU compute several outputs in one loop, "
        "which costs a step half its speed; call jopt.enable_multi_output_fusion() before the first use of JAX",
        RuntimeWarning,
        stacklevel=2,
    )


def memory_at(address: int, size: int, dtype: np.dtype) -> Any:
    """A gradient's memory; RuntimeError if it has none."""
    tensors.check_values(address, size)
    return (ctypes.c_char * (size * dtype.itemsize)).from_address(address)


def put(x: np.ndarray, where: Any) -> Array:
    """Values as a JAX array on a CPU device, ready for programs; aligned ones where they are, not to be written to."""
    with enable_x64(True), jax.transfer_guard("allow"):
        return jax.device_put(x, where).block_until_ready()


def aligned_zeros(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that JAX takes without copying, in pages of their own: untouched ones cost no memory, as malloc's may."""
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize), access=mmap.ACCESS_COPY)
    return np.frombuffer(memory, np.uint8, size * dtype.itemsize).view(dtype)


@functools.cache
def _omp_pause() -> Any:
    """GNU OpenMP's omp_pause_resource_all, if torch runs on that; it ends the calling thread's pool alone."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return None
    for line in maps.read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libgomp" in path:
            return getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
    return None


_SERIAL = Cpu(serial=True)
