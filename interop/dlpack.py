"""Memory shared by torch and JAX: the only module that touches DLPack or an address.

Two ways across. `to_jax` and `to_torch` carry values: a snapshot unless sharing is asked for. `Buffer` is
for the compiled step: a JAX array that torch sees at one address while donated steps write it in place.

What makes that hard, each handled or refused below: JAX on CPU reads an imported tensor after the call that
used it has returned; a tensor made by DLPack over a JAX array keeps the array from being donated, silently;
64-bit types are narrowed while x64 is off, silently; memory that is not aligned to 64 bytes is copied,
silently; a tensor subclass without storage (DTensor) is imported as a null pointer.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import mmap
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.core import Tracer
from torch import Tensor

from jopt._compat import device, enable_x64

ALIGNMENT = 64  # bytes; what XLA on CPU needs to use memory without copying it

DTYPES = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(jnp.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
}
"""The types that an optimizer steps."""

_WIDE = (torch.int64, torch.uint64, torch.float64, torch.complex128)


def check_tensor(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a dense tensor in CPU memory of its own class's making.

    A subclass is refused: DTensor and other wrappers have no memory behind their `data_ptr()`.
    """
    _check_class(name, x, "take its local tensor (for a DTensor, .to_local())")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, found layout {x.layout}; use .to_dense()")
    if x.is_quantized:
        raise TypeError(f"{name}: expected a plain tensor, found a quantized one; use .dequantize()")
    if x.device.type != "cpu":
        raise TypeError(f"{name}: expected a tensor in CPU memory, found {_where(x.device)}")


def is_plain(x: Tensor) -> bool:
    """Whether its memory is its own and torch's operations are: of torch.Tensor, or a subclass that leaves both be."""
    return type(x) in (Tensor, torch.nn.Parameter) or _leaves_torch_be(type(x))


@functools.cache
def _leaves_torch_be(cls: type) -> bool:
    return all(
        inspect.getattr_static(cls, name)
        in [inspect.getattr_static(base, name) for base in (Tensor, torch.nn.Parameter)]
        for name in ("__torch_dispatch__", "__torch_function__")
    )


def _check_class(name: str, x: Tensor, remedy: str) -> None:
    if not is_plain(x):
        raise TypeError(f"{name}: expected a plain tensor, found {type(x).__module__}.{type(x).__qualname__}; {remedy}")


def check_parameter(name: str, x: Tensor) -> None:
    """check_tensor, and a type that an optimizer steps."""
    _check_class(name, x, "keep the parameter whole and plain, as DistributedDataParallel does")
    check_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, found {x.dtype}")


def in_type_of(name: str, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in its parameter's type; TypeError where that would round it (`grad_dtype`)."""
    if torch.promote_types(grad.dtype, dtype) is not dtype:
        raise TypeError(
            f"{name}: expected the parameter's type {dtype} or a narrower one, found {grad.dtype}; convert the "
            "gradient, or keep the parameter in that type"
        )
    return grad.to(dtype)


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        if not any(d.platform == "gpu" for d in jax.devices()):
            return (
                f"{device}, and JAX has no CUDA here (its devices: {jax.devices()}); install jax[cuda], or use .cpu()"
            )
        return f"{device}; tensors on CUDA are not taken yet; use .cpu()"
    return f"{device}; use .cpu()" if device.type != "meta" else "the meta device, which holds no values"


# --- values ------------------------------------------------------------------------------------------


def to_jax(x: Any, *, copy: bool | None = True) -> Any:
    """Every tensor of a tree as a JAX array on JAX's CPU device: `interop.to_jax` without modules."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _tensor_to_jax("x" + jax.tree_util.keystr(path), leaf, copy), x
    )


def _tensor_to_jax(name: str, x: Any, copy: bool | None) -> Array:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, found {type(x).__name__}")
    check_tensor(name, x)
    if x.dtype in _WIDE and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{name}: {x.dtype} would be narrowed to 32 bits while jax_enable_x64 is off; set it with "
            "jax.config.update('jax_enable_x64', True), or convert the tensor first"
        )
    x = x.detach().resolve_conj().resolve_neg()
    if not copy:
        reason = _cannot_share(x)
        if reason is None:
            try:
                return jax.dlpack.from_dlpack(x, copy=False)
            except (BufferError, RuntimeError) as error:  # a layout or type that these versions do not share
                reason = str(error)
        if copy is False:
            raise ValueError(f"{name}: cannot share its memory with JAX: {reason}; use copy=None or copy=True")
    x = x.clone(memory_format=torch.contiguous_format)
    try:
        return jax.dlpack.from_dlpack(x)
    except BufferError:
        return put(x.view(torch.uint8).numpy().view(_float8(x.dtype)))


def _float8(dtype: torch.dtype) -> np.dtype:
    """JAX's type of the same name: DLPack did not carry these before torch 2.10 and jax 0.8."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


def _cannot_share(x: Tensor) -> str | None:
    if x.data_ptr() % ALIGNMENT:
        return f"it begins {x.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}"
    if x.numel() and sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) != x.numel() - 1:
        return f"its strides {x.stride()} leave gaps or overlap in shape {tuple(x.shape)}"
    return None


def to_torch(x: Any, *, copy: bool | None = True) -> Any:
    """Every JAX array of a tree as a tensor on the CPU: `interop.to_torch` without modules."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: array_to_torch("x" + jax.tree_util.keystr(path), leaf, copy), x
    )


def array_to_torch(name: str, x: Any, copy: bool | None) -> Tensor:
    if not isinstance(x, Array) or isinstance(x, Tracer):
        raise TypeError(f"{name}: expected a JAX array, found {type(x).__name__}")
    devices = x.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        if copy is False:
            raise ValueError(f"{name}: cannot share memory on {devices} with torch; use copy=None or copy=True")
        x, copy = jax.device_put(x, device("cpu")), None
    try:
        tensor = torch.from_dlpack(x)
    except Exception as error:
        dtype = getattr(torch, x.dtype.name, None)
        if not isinstance(dtype, torch.dtype) or x.dtype.itemsize != 1:
            raise TypeError(f"{name}: torch has no type for {x.dtype}: {error}") from None
        if copy is False:
            raise ValueError(
                f"{name}: cannot share its memory with torch: {error}; use copy=None or copy=True"
            ) from None
        return torch.from_numpy(np.array(x).view(np.uint8)).view(dtype)
    return tensor.clone() if copy else tensor


# --- the compiled step's memory ----------------------------------------------------------------------


class Buffer:
    """A JAX array, zero at first, that torch sees at one address across donated steps.

    torch's views are made over the address, so JAX knows of none and donates the array in place. Each view keeps
    this object alive, and it keeps the current array: the memory lives as long as any view of it, and
    no view outlives it.
    """

    __slots__ = ("__weakref__", "_memory", "address", "array")

    def __init__(self, shape: int | tuple[int, ...], dtype: np.dtype):
        # Not jnp.zeros, which compiles a program a shape: 25 ms and 1.6 MB that stay. XLA takes no such array as it is.
        zeros = np.broadcast_to(aligned_zeros(2, dtype)[1:], shape)
        self.array: Array = put(zeros)
        self.address: int = self.array.unsafe_buffer_pointer()
        self._memory: Callable[[], Any] = lambda: None  # what the views keep, and it this; one for all is smaller

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
        """A contiguous tensor `offset` bytes into the buffer, whose storage is just its own extent."""
        if (memory := self._memory()) is None:
            memory = _memory_type(self.array.nbytes).from_address(self.address)
            memory.owner = self
            self._memory = weakref.ref(memory)
        return view(memory, dtype, shape, offset)


def replace(buffers: Sequence[Buffer], arrays: Sequence[Array]) -> None:
    """Put a step's outputs into the buffers; they have to be where the views look."""
    for buffer, array, address in zip(buffers, arrays, map(_address_of, arrays), strict=True):
        if address == buffer.address:
            buffer.array = array
        else:
            # Something else held the array, so that XLA did not donate it: the old one still is what the views see.
            array.block_until_ready()
            ctypes.memmove(buffer.address, address, array.nbytes)


_address_of = operator.methodcaller("unsafe_buffer_pointer")


def view(memory: Any, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """A contiguous tensor `offset` bytes into an object that has a buffer, with a storage of its own extent.

    It keeps the object alive, and no other tensor, as a view of a tensor would.
    """
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).resize_(shape)


@functools.cache
def _memory_type(nbytes: int) -> Any:
    """Raw memory that can carry an attribute, which a plain ctypes array cannot."""
    return type("Memory", (ctypes.c_char * nbytes,), {})


def host_array(x: Tensor, dtype: np.dtype) -> np.ndarray:
    """A dense tensor's elements as a flat NumPy array, without a reference to it.

    JAX takes such an array without copying where it is aligned, but keeps it until its next call; owning nothing,
    it does not keep a gradient alive past zero_grad. Use it only while the tensor lives.
    """
    return array_at(x.data_ptr(), x.numel() * x.element_size() // dtype.itemsize, dtype)


@functools.lru_cache(maxsize=4096)  # torch's allocator gives a backward pass the addresses of the one before
def array_at(address: int, count: int, dtype: np.dtype) -> np.ndarray:
    """`host_array` of a tensor whose address is known."""
    if count and not address:
        raise RuntimeError(
            "expected a gradient with its values in memory, found one without: its storage was freed by resize_(0), or "
            "never there; assign one that has values, or None"
        )
    memory: Any = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype, count)


def alias(x: np.ndarray) -> Any:
    """A JAX array over NumPy's aligned memory, to be written to only while no program runs that takes it.

    It costs a program less than a NumPy array, which JAX puts on the device at each call and waits for. If JAX will
    not take the memory as it is, this is `x` itself.
    """
    array = put(x)
    return array if not x.size or array.unsafe_buffer_pointer() == x.ctypes.data else x


def put(x: np.ndarray) -> Array:
    """Values as a JAX array on the CPU, ready for programs; aligned ones where they are, not to be written to again."""
    with enable_x64(True), jax.transfer_guard("allow"):
        return jax.device_put(x, device("cpu")).block_until_ready()


def aligned_zeros(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that JAX takes without copying, in pages of their own: untouched ones cost no memory, as malloc's may."""
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize), access=mmap.ACCESS_COPY)
    return np.frombuffer(memory, np.uint8, size * dtype.itemsize).view(dtype)


_OWNER = "_jopt_owner"  # an attribute of a storage, which torch keeps with it


def owned(x: Tensor, owner: Any) -> Tensor:
    """A view of a `Buffer`, marked as stepped in place by the owner, for as long as that lives."""
    setattr(x.untyped_storage(), _OWNER, weakref.ref(owner))
    return x


def may_move(x: Tensor, owner: Any) -> bool:
    """Whether nothing but `x` refers to its memory and `x` covers it, so that it may live elsewhere.

    Memory that is not torch's own (NumPy's, a file's, a shared block) has other owners, which no count shows; its
    storage cannot be resized. Neither can a `Buffer`'s: what lives in one may move if its owner is this one, or gone.
    """
    if not x.is_contiguous() or x.storage_offset() or x.is_shared():
        return False
    storage = x.untyped_storage()
    if not storage.resizable():
        before = getattr(storage, _OWNER, None)
        if before is None or before() not in (None, owner):
            return False
    return storage.nbytes() == x.numel() * x.element_size() and is_alone(x)


def is_alone(x: Tensor) -> bool:
    """Whether no other tensor, array or view looks at its storage."""
    # One use is the tensor's, one the storage object's that was just made.
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata) == 2


def leave(view: Tensor) -> Tensor:
    """A tensor in a view's place; the view, which others may hold, gets memory of its own, with its values."""
    other = view.detach()
    view.data = view.clone()
    return other
