"""The host's memory where torch's own operations take the place of programs: arrays are tensors, and nothing waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jax import Array
from torch import Tensor

from interop.memory import cpu, device, tensors
from interop.memory.tensors import check_values


class Buffer(device.Buffer):
    def __init__(self, shape: int | tuple[int, ...], dtype: np.dtype):
        shape = (shape,) if isinstance(shape, int) else shape
        self._memory = cpu.aligned_zeros(math.prod(shape), dtype).view(np.uint8)
        self.array: Any = self.view(tensors.TORCH_DTYPES[dtype], shape)

    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
        return tensors.view(self._memory, dtype, shape, offset)


class Staging(cpu.Staging):
    def array(self, shape: tuple[int, ...]) -> Tensor:
        return self.view(tensors.TORCH_DTYPES[self._memory.dtype], shape, 0)


class Table(device.Table):
    def __init__(self, rows: int, columns: int):
        self.rows = np.zeros((rows, columns))

    def array(self) -> Any:
        raise AssertionError("torch's operations take the rows")


class Eager(cpu.Cpu):
    """The host's memory, stepped by torch's operations."""

    row = 16  # one line of the cache
    big = 2**13  # to copy as many takes as long as some operations' calls
    uses_torch = True

    def __init__(self) -> None:
        super().__init__()
        self.steps_by = "torch's operations"

    def begin(self) -> None:
        """torch's threads may spin: they are the ones that work."""

    def after(self, results: Any) -> None:
        """What torch has called is done."""

    def buffer(self, shape: int | tuple[int, ...], dtype: np.dtype) -> Any:
        return Buffer(shape, dtype)

    def replace(self, buffers: Sequence[Any], results: Sequence[Any]) -> None:
        """They were written in place."""

    def staging(self, size: int, dtype: np.dtype) -> Any:
        return Staging(self, size, dtype)

    def table(self, rows: int, columns: int, dtype: np.dtype) -> Any:
        return Table(rows, columns)

    def put(self, x: np.ndarray) -> Any:
        return x

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        return Staging(self, size, dtype).array((size,))

    def elements(self, tensors: Sequence[Tensor | None], dtype: np.dtype) -> list[Any]:
        for x in tensors:
            if x is not None:
                check_values(x.data_ptr(), x.numel())
        return list(tensors)

    def tensor(self, x: Array) -> Tensor:
        raise AssertionError("nothing is computed but the step")


EAGER = Eager()
