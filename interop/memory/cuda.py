"""Memory of a GPU, where XLA's programs write in place what torch's CUDA allocator owns.

Order is by streams, both ways, and the host waits for neither. JAX names the stream on which its clients' events are:
before a launch that stream waits for torch's current one. After a launch torch's current stream waits for the results.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from jax import Array
from torch import Tensor

from interop import _compat
from interop.memory.owned import TorchOwned

_CUDA = 2  # DLPack's number


class Cuda(TorchOwned):
    """The memory of one GPU."""

    @property
    def dlpack_device(self) -> tuple[int, int]:
        return _CUDA, self.torch_device.index

    def check(self) -> None:
        """Raise RuntimeError where a step cannot be taken now."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() while a CUDA graph is captured: XLA launches its programs on a stream of its own, which the "
                "graph would not hold; capture forward and backward, and call step() after the graph's replay()"
            )

    def begin(self) -> None:
        self.check()

    def put(self, x: np.ndarray) -> Array:
        try:
            return super().put(x)
        except RuntimeError as error:
            if not self.make_room(error):
                raise
            return super().put(x)

    def make_room(self, error: Exception) -> bool:
        found = "RESOURCE_EXHAUSTED" in str(error)
        if found:  # torch keeps what it has freed, and gives it back as its own allocations fail
            torch.cuda.empty_cache()
        return found

    def order(self, stream: int | None) -> None:
        if stream is None:
            torch.cuda.current_stream(self.torch_device).synchronize()
        else:
            outside = torch.cuda.ExternalStream(stream, self.torch_device)
            outside.wait_stream(torch.cuda.current_stream(self.torch_device))

    def wait(self, array: Array) -> None:
        # The default stream's handle is 0, which DLPack does not take: it has 1 for it.
        with torch.cuda.device(self.torch_device):
            array.__dlpack__(stream=torch.cuda.current_stream().cuda_stream or 1)  # type: ignore[call-arg]

    def finish(self) -> None:
        torch.cuda.current_stream(self.torch_device).synchronize()

    def later(self, flag: Tensor) -> Callable[[], bool]:
        told = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        told.copy_(flag, non_blocking=True)
        there = torch.cuda.current_stream(self.torch_device).record_event()

        def found() -> bool:
            there.synchronize()
            return bool(told)

        return found

    def bytes_at(self, address: int, nbytes: int, owner: Any) -> Tensor:
        return torch.as_tensor(_Bytes(address, nbytes, owner), device=self.torch_device)

    def staged(self, x: np.ndarray) -> Tensor:
        # torch's allocator of pinned memory does not give a block out again before the copies from it are done.
        pinned = torch.empty(x.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        pinned.numpy()[:] = x.reshape(-1).view(np.uint8)
        return pinned


class _Bytes:
    """Memory of the GPU, in the words of CUDA's array interface."""

    def __init__(self, address: int, nbytes: int, owner: Any):
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


@functools.cache
def cuda_device(index: int) -> Cuda | None:
    """The GPU that torch counts by this number; None if JAX does not have it."""
    _alone_under_torchrun(index)
    for found in jax_devices():
        if found.local_hardware_id == index:
            return Cuda(torch.device("cuda", index), found)
    return None


def jax_devices() -> list[Any]:
    """JAX's GPUs of this process."""
    try:
        return [x for x in jax.local_devices(backend="cuda") if x.local_hardware_id is not None]
    except RuntimeError:
        return []


def _alone_under_torchrun(index: int) -> None:
    """Let JAX see the process's own GPU alone: else each process would take memory of every one."""
    chosen = jax.config.read("jax_cuda_visible_devices") != "all"
    if "LOCAL_RANK" in os.environ and not chosen and not _compat.jax_has_started():
        jax.config.update("jax_cuda_visible_devices", str(index))


def share_memory() -> None:
    """Keep JAX from taking three quarters of each GPU's memory as it starts, which torch has to have."""
    chosen = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if not any(name in os.environ for name in (*chosen, "XLA_CLIENT_MEM_FRACTION")):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
