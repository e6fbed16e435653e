"""Memory that torch owns, for a device on which programs write in place what they did not allocate.

torch allocates all: parameters, gradients, state. JAX sees each through DLPack, imported once, as an array that owns
nothing. A step donates those arrays, and the program's results are arrays over the same memory. So parameters need not
move, memory is whole after any error, and there is one allocator.

Neither side waits on the host. A launch takes a small array along, imported when torch has written everything: the
device runs the program after what torch's current stream holds by then. After a launch torch's current stream waits
for the program. What is between, and by which streams, a subclass says: `order`, `wait`.

Three traps decide the rest. A capsule of torch's own must not reach XLA's threads: its end takes the interpreter's
lock, which the thread that waits for them may hold. An array of which a capsule is alive cannot be donated. And memory
that JAX frees its next program may write, though torch has yet to read it: so what torch reads of it is copied at once,
and the array is kept until a launch that comes after the copy.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import Tensor

from interop.memory import device, tensors
from jopt._compat import enable_x64


class Buffer(device.Buffer):
    """Bytes of torch's, and the array over them that programs take.

    Attributes:
      memory: a tensor in whose memory the buffer is; for zeros its bytes, else the tensor that was adopted.
    """

    __slots__ = ("_owner", "address", "array", "dtype", "memory", "shape")

    def __init__(self, owner: TorchOwned, memory: Tensor, shape: tuple[int, ...], dtype: np.dtype):
        self._owner, self.memory, self.shape, self.dtype = owner, memory, shape, dtype
        self.address = memory.data_ptr()
        self.take_back()

    def take_back(self) -> None:
        """Look at the memory by a new array, in the place of one that a program took and did not give back."""
        self.array: Array = self._owner.alias(self.address, self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
        return self._owner.view(self.memory, dtype, shape, offset)


class Staging(device.Staging):
    def __init__(self, owner: TorchOwned, size: int, dtype: np.dtype):
        self._owner, self._dtype = owner, dtype
        self._memory = owner.zero_bytes(size * dtype.itemsize)
        self._arrays: dict[tuple[int, ...], Array] = {}

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
        return self._owner.view(self._memory, dtype, shape, offset)

    def array(self, shape: tuple[int, ...]) -> Any:
        if shape not in self._arrays:
            self._arrays[shape] = self._owner.alias(self._memory.data_ptr(), shape, self._dtype)
        return self._arrays[shape]


class Table(device.Table):
    """Numbers of the host's, copied to the device at each launch, behind what torch has there to do."""

    def __init__(self, owner: TorchOwned, rows: int, columns: int, dtype: np.dtype):
        self._owner, self.rows = owner, np.zeros((rows, columns), dtype)
        self._memory = owner.zero_bytes(self.rows.nbytes)
        self._array = owner.alias(self._memory.data_ptr(), self.rows.shape, dtype)

    def array(self) -> Any:
        if self.rows.nbytes:
            self._memory.copy_(self._owner.staged(self.rows), non_blocking=True)
        return self._array


class Zeros:
    """As many zeros as are asked for; their memory is made when some are."""

    def __init__(self, owner: TorchOwned, size: int, dtype: np.dtype):
        self._owner, self._size, self._dtype = owner, size, dtype

    @functools.cached_property
    def _memory(self) -> Tensor:
        return self._owner.zero_bytes(self._size * self._dtype.itemsize)

    def __getitem__(self, part: slice) -> Array:
        size = len(range(self._size)[part])
        return self._owner.aliases(self._memory.data_ptr(), size, self._dtype)


class TorchOwned(device.Device):
    """Memory of torch's.

    Args:
      torch_device: where torch has it.
      jax_device: where JAX has it.
    """

    asynchronous = True
    measures_by_torch = True
    moves = False  # what was captured in a CUDA graph reads it where it was
    reads_addresses = False

    alignment = 16
    """XLA takes memory from a multiple of so many bytes on; other memory is copied first."""

    def __init__(self, torch_device: torch.device, jax_device: Any):
        self.torch_device, self._jax_device = torch_device, jax_device
        self.aliases = functools.lru_cache(maxsize=4096)(self._alias_flat)
        self._fence = self.zero_bytes(4)
        self._read: list[Array] = []  # of which torch made copies since the last launch
        self._ordered: list[Array] = []  # the same, of which the launch that is under way comes after the copies
        self._moved = False

    # --- what a subclass says

    @property
    @abstractmethod
    def dlpack_device(self) -> tuple[int, int]:
        """The device in DLPack's numbers: of its type, and of itself."""

    @abstractmethod
    def order(self, stream: int | None) -> None:
        """Let a stream of JAX's wait for all that torch's current stream holds."""

    @abstractmethod
    def wait(self, array: Array) -> None:
        """Let torch's current stream wait for an array."""

    @abstractmethod
    def finish(self) -> None:
        """Wait, on the host, for torch's current stream."""

    @abstractmethod
    def bytes_at(self, address: int, nbytes: int, owner: Any) -> Tensor:
        """Memory as a tensor of bytes, with a storage of its own extent, that keeps `owner` alive."""

    @abstractmethod
    def staged(self, x: np.ndarray) -> Tensor:
        """An array's bytes, to be copied from without waiting, whatever becomes of the array."""

    # --- programs

    @property
    def jax_device(self) -> Any:
        return self._jax_device

    @property
    def fuses_outputs(self) -> bool:
        return False

    @property
    def along(self) -> Any:
        return jax.ShapeDtypeStruct((1,), np.float32, sharding=self.sharding)

    def before(self) -> Any:
        self._ordered += self._read
        self._read.clear()
        return self.alias(self._fence.data_ptr(), (1,), np.dtype(np.float32), ordered=True)

    def after(self, results: Any) -> None:
        leaves = jax.tree.leaves(results)
        if leaves:  # what a program returns is there all at once
            self.wait(leaves[-1])
        self._ordered.clear()

    def recover(self, buffers: Sequence[Any]) -> None:
        for buffer in buffers:
            if buffer.array.is_deleted():
                buffer.take_back()

    def begin(self) -> None:
        """A step begins."""

    # --- memory

    def alias(self, address: int, shape: tuple[int, ...], dtype: np.dtype, *, ordered: bool = False) -> Array:
        """An array over memory, which owns nothing.

        Args:
          ordered: what takes it comes after all that torch has been asked for on its current stream.
        """
        if not math.prod(shape):
            return self.put(np.zeros(shape, dtype))
        with enable_x64(True):
            return jax.dlpack.from_dlpack(_Memory(self, address, shape, dtype, ordered))

    def _alias_flat(self, address: int, size: int, dtype: np.dtype) -> Array:
        return self.alias(address, (size,), dtype)

    def zero_bytes(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.torch_device)

    def view(self, memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
        """A contiguous tensor `offset` bytes into a tensor's memory, with a storage of its own extent."""
        size = math.prod(shape)
        if not size:
            return torch.empty(shape, dtype=dtype, device=self.torch_device)
        raw = self.bytes_at(memory.data_ptr() + offset, size * dtype.itemsize, memory)
        return torch.empty(0, dtype=dtype, device=self.torch_device).set_(raw.untyped_storage(), 0, shape)  # type: ignore[call-overload]

    def buffer(self, shape: int | tuple[int, ...], dtype: np.dtype) -> Buffer:
        shape = (shape,) if isinstance(shape, int) else shape
        return Buffer(self, self.zero_bytes(math.prod(shape) * dtype.itemsize), shape, dtype)

    def adopt(self, x: Tensor, shape: tuple[int, ...], dtype: np.dtype) -> Buffer | None:
        if not x.is_contiguous() or not x.numel() or x.is_conj() or x.is_neg() or x.data_ptr() % self.alignment:
            return None
        return Buffer(self, x.detach(), shape, dtype)

    def replace(self, buffers: Sequence[Any], results: Sequence[Array]) -> None:
        for buffer, array in zip(buffers, results, strict=True):
            address = array.unsafe_buffer_pointer()
            if address == buffer.address or not buffer.nbytes:
                buffer.array = array
            else:
                self._bring_back(buffer, array, address)

    def _bring_back(self, buffer: Buffer, array: Array, address: int) -> None:
        """Copy what a program wrote elsewhere: somebody else held the array, so that it was not given away."""
        self.wait(array)
        place = self.bytes_at(buffer.address, buffer.nbytes, buffer.memory)
        place.copy_(self.bytes_at(address, buffer.nbytes, array))
        self._read.append(array)
        buffer.take_back()
        if not self._moved and self.warns_of_copies:
            self._moved = True
            warnings.warn(
                f"interop: on {self.torch_device} a program's result came to lie elsewhere than its memory, and was "
                "copied back, which costs a pass over it; this is said once",
                RuntimeWarning,
                stacklevel=2,
            )

    warns_of_copies = True

    def staging(self, size: int, dtype: np.dtype) -> Staging:
        return Staging(self, size, dtype)

    def table(self, rows: int, columns: int, dtype: np.dtype) -> Table:
        return Table(self, rows, columns, dtype)

    def put(self, x: np.ndarray) -> Array:
        with enable_x64(True), jax.transfer_guard("allow"):
            return jax.device_put(x, self._jax_device)

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        return Zeros(self, size, dtype)

    # --- torch's tensors

    def elements(self, tensors: Sequence[Tensor | None], dtype: np.dtype) -> list[Any]:
        return [None if x is None else self._elements(x, dtype) for x in tensors]

    def _elements(self, x: Tensor, dtype: np.dtype) -> Array:
        tensors.check_values(x.data_ptr(), x.numel())
        if x.data_ptr() % self.alignment:
            return self.array(x.clone().view(-1), dtype)
        return self.aliases(x.data_ptr(), x.nbytes // dtype.itemsize, dtype)

    def elements_at(self, places: Sequence[tuple[int, int] | None], dtype: np.dtype) -> list[Any]:
        raise NotImplementedError("the reader in C++ reads the host's memory")

    def array(self, x: Tensor, dtype: np.dtype | None = None, *, ordered: bool = False) -> Array:
        dtype = tensors.numpy_dtype(x.dtype) if dtype is None else dtype
        shape = tuple(x.shape) if dtype == tensors.numpy_dtype(x.dtype) else (x.nbytes // dtype.itemsize,)
        x = x.detach().resolve_conj().resolve_neg().contiguous()
        if x.data_ptr() % self.alignment:
            x = x.clone()
        found = self.alias(x.data_ptr(), shape, dtype, ordered=ordered)
        weakref.finalize(found, _forget, x)
        return found

    def shown(self, x: Array) -> Tensor:
        dtype = tensors.torch_dtype(x.dtype)
        if not x.size:
            return torch.empty(x.shape, dtype=dtype, device=self.torch_device)
        return self.bytes_at(x.unsafe_buffer_pointer(), x.nbytes, None).view(dtype).view(x.shape)

    def sent(self, x: Tensor) -> Array:
        self.check()
        with enable_x64(True), jax.transfer_guard("allow"):
            given = self.array(x, ordered=True)
            copy = jnp.array(given, copy=True)
        self.wait(copy)
        return copy

    def received(self, x: Array) -> Tensor:
        self.check()
        self.wait(x)
        found = self.shown(x).clone()
        self.finish()  # JAX may free what was read, at any time
        return found

    def tensor(self, x: Array) -> Tensor:
        self._read.append(x)
        return self.shown(x).clone()


def _forget(x: Tensor) -> None:
    """What keeps a tensor alive until an array over its memory ends."""


# --- DLPack ------------------------------------------------------------------------------------------


# DLManagedTensor, as DLPack's header (0.8) has it: data, device (its type and number), axes, type (its code, bits and
# lanes), shape, strides (none where it is contiguous), offset; and behind that tensor a context and what ends it.
_MANAGED = struct.Struct("@PiiiBBHPPQPP")
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_BFLOAT16 = 4


@functools.cache
def _libc() -> tuple[Any, int, Any]:
    """malloc; the address of free; and what makes a capsule."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    free = ctypes.cast(libc.free, ctypes.c_void_p).value
    assert free is not None
    return libc.malloc, free, capsule


class _Memory:
    """Memory at an address, as `jax.dlpack.from_dlpack` takes it.

    The array owns no more than the block that describes the memory. libc's `free` ends that, in whatever thread: it
    takes no lock of Python's.
    """

    def __init__(self, owner: TorchOwned, address: int, shape: tuple[int, ...], dtype: np.dtype, ordered: bool):
        self._owner, self._address, self._shape, self._dtype = owner, address, shape, dtype
        self._ordered = ordered

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._owner.dlpack_device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        if self._ordered:
            self._owner.order(stream)
        malloc, free, capsule = _libc()
        ndim, bits = len(self._shape), 8 * self._dtype.itemsize
        code = _BFLOAT16 if self._dtype.name == "bfloat16" else _CODES[self._dtype.kind]
        block = malloc(_MANAGED.size + 8 * ndim)
        shape = block + _MANAGED.size
        fields = self._address, *self._owner.dlpack_device, ndim, code, bits, 1, shape, 0, 0, 0, free
        described = _MANAGED.pack(*fields) + struct.pack(f"@{ndim}q", *self._shape)
        ctypes.memmove(block, described, len(described))
        return capsule(block, b"dltensor", None)
