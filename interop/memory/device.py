"""What the drop-in asks of a device: a device is a subclass in one file.

The memory is written by two sides. Programs that XLA compiled write their buffers in place; torch sees those buffers at
fixed addresses, as parameters and state. Each side may work after its call has returned. So every launch follows these
rules, and `Device.before` and `Device.after` are where a device keeps them:

    torch writes, `before`, the launch, `after`, torch reads or writes

Every launch begins with `before` (program.py), so only `after` can be forgotten.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
import torch
from jax import Array
from torch import Tensor

from jopt.arena import ROW


class Buffer(ABC):
    """Zeros that programs write in place, and that torch sees at one address for as long as any of its views lives.

    Attributes:
      array: what programs take and are given to keep (donated); `Device.replace` puts their result here.
    """

    array: Array

    @abstractmethod
    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
        """A contiguous tensor `offset` bytes into the buffer, whose storage is just its own extent."""


class Staging(ABC):
    """Memory that torch writes before a launch and programs read: gradients of small tensors, gathered."""

    @abstractmethod
    def view(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
        """A contiguous tensor `offset` bytes from the beginning."""

    @abstractmethod
    def array(self, shape: tuple[int, ...]) -> Any:
        """Its beginning, in that shape, as programs take it. It shows what torch has written when they are launched."""


class Table(ABC):
    """Numbers that the host writes before a launch and programs read.

    Attributes:
      rows: of NumPy, to be written to.
      runs: where rows that are equal follow each other: the first, and the one after the last.
    """

    rows: np.ndarray
    runs: Sequence[tuple[int, int]] = ()

    @abstractmethod
    def array(self) -> Any:
        """The table as programs take it: as it is now."""


class Freed:
    """Takes note of memory that torch frees, which a device may give back to the system."""

    def add(self, nbytes: int) -> None:
        """So many bytes were freed."""


class Device(ABC):
    """The memory of a kind of device, and the order of what is done to it."""

    torch_device: torch.device
    """Where torch has its tensors."""

    row: ClassVar[int] = ROW
    """Small tensors share buffers, each from a multiple of so many elements on."""

    big: ClassVar[int] = 2**15
    """Tensors of so many elements have buffers of their own."""

    steps_by: str = "a program"
    """How `interop.explain` calls what steps here."""

    uses_torch: ClassVar[bool] = False
    """Whether torch's operations take the place of programs: arrays then are tensors."""

    asynchronous: ClassVar[bool] = False
    """Whether programs and torch's operations are still to run when their calls return: the host does not wait."""

    measures_by_torch: ClassVar[bool] = False
    """Whether torch's operations take the norms of gradients."""

    moves: ClassVar[bool] = True
    """Whether a parameter may be given other memory, where nothing else refers to its own."""

    reads_addresses: ClassVar[bool] = True
    """Whether `elements_at` is there, so that the reader in C++ can serve."""

    # --- programs

    @property
    @abstractmethod
    def jax_device(self) -> Any:
        """JAX's device, on which values that cross to JAX lie."""

    @property
    def program_device(self) -> Any:
        """The device on which the programs run, which may be of another client of XLA."""
        return self.jax_device

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Where the arrays of its programs lie."""
        return jax.sharding.SingleDeviceSharding(self.program_device)

    @property
    @abstractmethod
    def fuses_outputs(self) -> bool:
        """Whether XLA needs each output computed from its own inputs to make one loop of several outputs."""

    def compiling(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which its programs are compiled."""
        return contextlib.nullcontext()

    @property
    def along(self) -> Any:
        """The shape and type of what `before` gives: a tree, empty if that is nothing."""
        return ()

    @abstractmethod
    def before(self) -> Any:
        """Let the program that is launched next see all that torch has written; it takes this along for that."""

    @abstractmethod
    def after(self, results: Any) -> None:
        """Let what torch does next see what programs wrote, of whose results this is a tree."""

    def of_size(self, size: int) -> Device:
        """What steps an optimizer's parameters of so many elements in all: this, or one of its kind for small steps."""
        return self

    @property
    def by_torch(self) -> Device | None:
        """The same memory stepped by torch's operations, if that is quicker for little work."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raise RuntimeError where nothing can be launched now."""

    @abstractmethod
    def begin(self) -> None:
        """A step begins. Raises as `check`."""

    # --- memory for programs

    @abstractmethod
    def buffer(self, shape: int | tuple[int, ...], dtype: np.dtype) -> Buffer:
        """Zeros that programs write in place."""

    def adopt(self, x: Tensor, shape: tuple[int, ...], dtype: np.dtype) -> Buffer | None:
        """A buffer in the memory of a tensor; None if programs cannot write there."""
        return None

    @abstractmethod
    def replace(self, buffers: Sequence[Buffer], results: Sequence[Array]) -> None:
        """Put what a program returned for the buffers into them, so that their views show it."""

    @abstractmethod
    def recover(self, buffers: Sequence[Buffer]) -> None:
        """After a launch that raised: let programs take the buffers again."""

    def make_room(self, error: Exception) -> bool:
        """After an error for want of memory: whether there may be more now."""
        return False

    @abstractmethod
    def staging(self, size: int, dtype: np.dtype) -> Staging:
        """Memory for so many elements; untouched parts should cost none."""

    @abstractmethod
    def table(self, rows: int, columns: int, dtype: np.dtype) -> Table:
        """A table of numbers, zero at first."""

    @abstractmethod
    def put(self, x: np.ndarray) -> Array:
        """Values that do not change, ready for programs."""

    @abstractmethod
    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """What programs take for so many elements that do not count; sliced, for fewer."""

    # --- torch's tensors

    @abstractmethod
    def elements(self, tensors: Sequence[Tensor | None], dtype: np.dtype) -> list[Any]:
        """Dense tensors' elements, flat, as programs take them. None stays None.

        The tensors and what this returns have to live until `after` the launches that take it.
        """

    @abstractmethod
    def elements_at(self, places: Sequence[tuple[int, int] | None], dtype: np.dtype) -> list[Any]:
        """`elements` of tensors of which the addresses and sizes are known."""

    def later(self, flag: Tensor) -> Callable[[], bool]:
        """What a flag will be: for the host, which waits for it only as it asks."""
        return lambda: bool(flag)

    @abstractmethod
    def shown(self, x: Array) -> Tensor:
        """The memory of a buffer's array."""

    @abstractmethod
    def sent(self, x: Tensor) -> Array:
        """A copy of a tensor that JAX owns, on `jax_device`."""

    @abstractmethod
    def received(self, x: Array) -> Tensor:
        """A copy of JAX's array that torch owns."""

    @abstractmethod
    def array(self, x: Tensor) -> Array:
        """A tensor's values as an array, which may share its memory, and keeps that; never to be donated.

        It has to live until `after` the launches that take it, as the tensors of `elements` do.
        """

    @abstractmethod
    def tensor(self, x: Array) -> Tensor:
        """A program's result as a tensor, which may share its memory, after `after`."""

    def freeing(self, total: int) -> Freed:
        """To be told of each part of so many bytes that torch frees."""
        return Freed()


@functools.lru_cache(maxsize=64)
def number_array(device: Device, x: float, dtype: np.dtype) -> Array:
    """A number as programs take it."""
    return device.put(np.asarray(x, dtype))
