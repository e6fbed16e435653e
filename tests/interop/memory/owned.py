"""The way of a GPU on the host's memory: torch owns it, programs are given it, and what they write is copied back.

XLA on CPU takes no donation of memory that it did not allocate, so every result lies elsewhere: the branch that a GPU
should never take is the one that is taken here. `recorded` keeps what was asked for, in its order.
"""

import ctypes
import functools

import jax
import numpy as np
import torch

from interop import memory
from interop.memory.owned import TorchOwned


class OnCpu(TorchOwned):
    alignment = 64
    warns_of_copies = False
    dlpack_device = (1, 0)
    steps_by = "a program over torch's memory"

    def __init__(self):
        self.recorded = []
        super().__init__(torch.device("cpu"), memory.HOST.jax_device)

    fuses_outputs = property(lambda self: memory.HOST.fuses_outputs)
    compiling = staticmethod(memory.HOST.compiling)

    def check(self):
        self.recorded.append("check")

    def begin(self):
        self.recorded.append("begin")

    def order(self, stream):
        assert stream is None  # as the client of the CPU says it
        self.recorded.append("order")

    def wait(self, array):
        self.recorded.append("wait")
        jax.block_until_ready(array)

    def finish(self):
        self.recorded.append("finish")

    def bytes_at(self, address, nbytes, owner):
        at = _memory_type(nbytes).from_address(address)
        at.owner = owner
        return torch.frombuffer(at, dtype=torch.uint8)

    def staged(self, x):
        return torch.from_numpy(x.reshape(-1).view(np.uint8).copy())


@functools.cache
def _memory_type(nbytes):
    """Raw memory that can carry an attribute."""
    return type("Memory", (ctypes.c_char * nbytes,), {})
