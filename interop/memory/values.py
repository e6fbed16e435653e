"""Values carried between torch and JAX: `to_jax` and `to_torch`, a snapshot unless sharing is asked for.

What makes that hard, each handled or refused here: JAX on CPU reads an imported tensor after the call that used it has
returned; 64-bit types are narrowed while x64 is off, silently; memory that is not aligned to 64 bytes is copied,
silently; a tensor subclass without storage (DTensor) is imported as a null pointer.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from jax import Array
from jax.core import Tracer
from torch import Tensor

import jopt._compat
from interop import memory
from interop.memory.tensors import numpy_dtype

ALIGNMENT = 64  # bytes; what XLA on CPU needs to use memory without copying it

_WIDE = (torch.int64, torch.uint64, torch.float64, torch.complex128)


def to_jax(x: Any, *, copy: bool | None = True) -> Any:
    """Every tensor of a tree as a JAX array on its device: `interop.to_jax` without modules."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _tensor_to_jax("x" + jax.tree_util.keystr(path), leaf, copy), x
    )


def _tensor_to_jax(name: str, x: Any, copy: bool | None) -> Array:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, found {type(x).__name__}")
    device = memory.check(name, x)
    if x.dtype in _WIDE and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{name}: {x.dtype} would be narrowed to 32 bits while jax_enable_x64 is off; convert it first, "
            "labels by .int(), or turn that on: jax.config.update('jax_enable_x64', True)"
        )
    x = x.detach().resolve_conj().resolve_neg()
    if device.asynchronous:
        if copy is False:
            raise ValueError(f"{name}: cannot share its memory with JAX: {_APART}; use copy=None or copy=True")
        return device.sent(x)
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
    except BufferError:  # DLPack did not carry types of eight bits before torch 2.10 and jax 0.8
        with jax.transfer_guard("allow"):
            return jax.device_put(x.view(torch.uint8).numpy().view(numpy_dtype(x.dtype)), cpu_device())


def cpu_device() -> Any:
    return jopt._compat.device("cpu")


_APART = "on a GPU each frees its own memory without waiting for the other"


def _cannot_share(x: Tensor) -> str | None:
    if torch.cuda.is_available() and x.is_pinned():
        return "it is pinned, which JAX takes for memory of a GPU"
    if x.data_ptr() % ALIGNMENT:
        return f"it begins {x.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}"
    if x.numel() and sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) != x.numel() - 1:
        return f"its strides {x.stride()} leave gaps or overlap in shape {tuple(x.shape)}"
    return None


def to_torch(x: Any, *, copy: bool | None = True) -> Any:
    """Every JAX array of a tree as a tensor: `interop.to_torch` without modules."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: array_to_torch("x" + jax.tree_util.keystr(path), leaf, copy), x
    )


def array_to_torch(name: str, x: Any, copy: bool | None) -> Tensor:
    if not isinstance(x, Array) or isinstance(x, Tracer):
        raise TypeError(f"{name}: expected a JAX array, found {type(x).__name__}")
    devices = x.devices()
    if len(devices) == 1 and (device := memory.device_with(next(iter(devices)))) is not None:
        if copy is False:
            raise ValueError(f"{name}: cannot share its memory with torch: {_APART}; use copy=None or copy=True")
        return device.received(x)
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        if copy is False:
            raise ValueError(f"{name}: cannot share memory on {devices} with torch; use copy=None or copy=True")
        x, copy = jax.device_put(x, cpu_device()), None
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
