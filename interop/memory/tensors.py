"""What the compiled step asks of torch's tensors, whatever device they lie on."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

DTYPES = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(jnp.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
}
"""The types that an optimizer steps."""

STATE_DTYPES = DTYPES | {torch.uint8: np.dtype(np.uint8)}
"""The types of its state: numbers, and codes of numbers."""

TORCH_DTYPES = {dtype: found for found, dtype in DTYPES.items()}


@functools.cache
def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """JAX's type of the same name."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


@functools.cache
def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """torch's type of the same name."""
    return getattr(torch, dtype.name)


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


def check_class(name: str, x: Tensor, remedy: str) -> None:
    """Raise TypeError for a subclass: DTensor and other wrappers have no memory behind their `data_ptr()`."""
    if not is_plain(x):
        raise TypeError(f"{name}: expected a plain tensor, found {type(x).__module__}.{type(x).__qualname__}; {remedy}")


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError unless a tensor's elements are its memory."""
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, found layout {x.layout}; use .to_dense()")
    if x.is_quantized:
        raise TypeError(f"{name}: expected a plain tensor, found a quantized one; use .dequantize()")


def check_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError for a type that no optimizer steps."""
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


def elsewhere(device: torch.device) -> str:
    """How messages call a device that is not stepped, with what to do."""
    if device.type == "cuda":
        found = jax.devices()
        if any(x.platform == "gpu" for x in found):
            return (
                f"{device}, and JAX has {found} in this process; let both see the same GPUs, by CUDA_VISIBLE_DEVICES "
                "or jax_cuda_visible_devices, before JAX's first use"
            )
        major = (torch.version.cuda or "12").partition(".")[0]
        return (
            f"{device}, and JAX has no CUDA here (its devices: {found}); pip install 'jax[cuda{major}]', of torch's "
            f"CUDA {torch.version.cuda}, or use .cpu()"
        )
    return f"{device}; use .cpu()" if device.type != "meta" else "the meta device, which holds no values"


def check_values(address: int, size: int) -> None:
    """Raise RuntimeError for a gradient of so many elements without values."""
    if size and not address:
        raise RuntimeError(
            "expected a gradient with its values in memory, found one without: its storage was freed by resize_(0), or "
            "never there; assign one that has values, or None"
        )


# --- where they lie ----------------------------------------------------------------------------------

address = Tensor.data_ptr
"""Where a tensor's values are; another address than before means that its storage was exchanged."""


def extent(x: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie; (0, 0) for one without memory of its own."""
    if not is_plain(x):
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def is_alone(x: Tensor) -> bool:
    """Whether no other tensor, array or view looks at its storage."""
    # One use is the tensor's, one the storage object's that was just made.
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata) == 2


_OWNER = "_jopt_owner"  # an attribute of a storage, which torch keeps with it


def owned(x: Tensor, owner: Any) -> Tensor:
    """A view of a buffer, marked as stepped in place by the owner, for as long as that lives."""
    setattr(x.untyped_storage(), _OWNER, weakref.ref(owner))
    return x


def is_of_processes(x: Tensor) -> bool:
    """Whether other processes may see its memory. torch says so of all tensors on a GPU, of which it cannot tell."""
    return not x.is_cuda and x.is_shared()


def may_move(x: Tensor, owner: Any) -> bool:
    """Whether nothing but `x` refers to its memory and `x` covers it, so that it may live elsewhere.

    Memory that is not torch's own (NumPy's, a file's, a shared block) has other owners, which no count shows; its
    storage cannot be resized. Neither can a buffer's: what lives in one may move if its owner is this one, or gone.
    """
    if not x.is_contiguous() or x.storage_offset() or is_of_processes(x):
        return False
    storage = x.untyped_storage()
    before = getattr(storage, _OWNER, None)
    if before is None and not storage.resizable():
        return False
    if before is not None and before() not in (None, owner):
        return False
    return storage.nbytes() == x.numel() * x.element_size() and is_alone(x)


def leave(view: Tensor) -> Tensor:
    """A tensor in a view's place; the view, which others may hold, gets memory of its own, with its values."""
    other = view.detach()
    view.data = view.clone()
    return other


def view(memory: Any, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """A contiguous tensor `offset` bytes into an object that has a buffer, with a storage of its own extent.

    It keeps the object alive, and no other tensor, as a view of a tensor would.
    """
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).resize_(shape)


def entry(vector: np.ndarray, i: int) -> Tensor:
    """An entry of a vector of NumPy's as a 0-d tensor over it."""
    return view(vector, torch.from_numpy(vector).dtype, (), i * vector.itemsize)
