"""Memory shared by torch and JAX. Nothing outside this package touches DLPack, an address, or a device by its name.

`values` carries values across: a snapshot unless sharing is asked for. A `Device` is for the compiled step: buffers
that a program writes in place and torch sees. A device is one file; `DEVICES` names it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interop.memory.cpu import Cpu
from interop.memory.cuda import cuda_device, share_memory
from interop.memory.device import Buffer, Device, Freed, Staging, Table, number_array
from interop.memory.tensors import check_class, check_dense, check_dtype, elsewhere

__all__ = [
    "DEVICES",
    "HOST",
    "Buffer",
    "Device",
    "Freed",
    "Staging",
    "Table",
    "check",
    "check_parameter",
    "device_of",
    "device_with",
    "number_array",
]

share_memory()

HOST = Cpu()
"""The memory in which values cross between torch and JAX."""

DEVICES: dict[torch.device, Device] = {HOST.torch_device: HOST}
"""What steps the tensors of a device, as far as that is known already."""


def device_of(x: torch.device) -> Device | None:
    """What steps the tensors of a device; None if nothing does."""
    found = DEVICES.get(x)
    if found is None and x.type == "cuda":
        found = cuda_device(x.index)
        if found is not None:
            DEVICES[x] = found
    return found


def device_with(x: Any) -> Device | None:
    """The device, apart from the host, that JAX knows by this; None if torch has none."""
    for found in DEVICES.values():
        if found.asynchronous and found.jax_device == x:
            return found
    if x.platform == "gpu" and torch.cuda.is_available():
        return device_of(torch.device("cuda", x.local_hardware_id))
    return None


def check(name: str, x: Tensor) -> Device:
    """The device that a tensor lies on. TypeError, naming the tensor, unless that can be stepped, dense and plain."""
    check_class(name, x, "take its local tensor (for a DTensor, .to_local())")
    check_dense(name, x)
    if (found := device_of(x.device)) is None:
        raise TypeError(f"{name}: expected a tensor in CPU memory or on a GPU, found {elsewhere(x.device)}")
    return found


def check_parameter(name: str, x: Tensor) -> Device:
    """`check`, and a type that an optimizer steps."""
    check_class(name, x, "keep the parameter whole and plain, as DistributedDataParallel does")
    found = check(name, x)
    check_dtype(name, x)
    found.check()
    return found
