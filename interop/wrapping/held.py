"""A group's parameters and state in buffers that its program writes in place, and that torch sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from interop.dropin.host import SignalsWait, settings
from interop.dropin.leaf import is_lazy
from interop.dropin.program import launch
from interop.memory import Buffer
from interop.memory.tensors import address, leave, may_move, owned
from interop.wrapping.layout import Layout
from interop.wrapping.program import Program


class Place:
    """One array of a program: its buffer, and the tensor that torch sees there."""

    def __init__(
        self,
        layout: Layout,
        shape: tuple[int, ...],
        dtype: np.dtype,
        torch_dtype: torch.dtype,
        buffer: Buffer | None = None,
    ):
        self.buffer = layout.device.buffer(shape, dtype) if buffer is None else buffer
        self.view = self.buffer.view(torch_dtype, shape)
        self.address = address(self.view)

    def has(self, x: Tensor) -> bool:
        """Whether the tensor is the one here, in its memory still."""
        return x is self.view and address(x) == self.address

    def put(self, x: Tensor) -> None:
        """Copy a value in, and show it as a new tensor."""
        self.renew()
        self.view.copy_(x)

    def renew(self) -> None:
        """Show a new tensor: who holds the one before keeps the values that it had."""
        if address(self.view) == self.address:
            self.view = leave(self.view)
        else:
            self.view = self.buffer.view(self.view.dtype, tuple(self.view.shape))


class Held:
    """The places of a group's parameters, and of the arrays of its state.

    A parameter lives in its place if nothing else refers to its memory. Every other one is copied there before a step
    and back after it.
    """

    def __init__(self, layout: Layout, params: Sequence[Tensor]):
        self.layout, self.device = layout, layout.device
        freed = self.device.freeing(sum(x.nbytes for x in params))
        self.params: list[Place] = []
        self.addresses: list[int | None] = []  # of the parameters that live in their places
        for x, spec in zip(params, layout.specs, strict=True):
            place, lives = self._place(x, spec)
            self.params.append(place)
            self.addresses.append(address(x) if lives else None)
            if not lives and self.device.moves and x.numel() and may_move(x, self):
                x.data = owned(self.params[-1].view.copy_(x), self)
                self.addresses[-1] = address(x)
                freed.add(x.nbytes)
        self.state = [Place(layout, leaf.shape, leaf.dtype, leaf.torch_dtype) for leaf in layout.arrays]
        self._zeros: dict[np.dtype, np.ndarray] = {}

    def _place(self, x: Tensor, spec: Any) -> tuple[Place, bool]:
        """A parameter's place, and whether that is the memory where it lies."""
        adopted = self.device.adopt(x, spec.shape, spec.dtype)
        return Place(self.layout, spec.shape, spec.dtype, x.dtype, adopted), adopted is not None

    # --- before a step

    def take_params(self, params: Sequence[Tensor]) -> list[int]:
        """Copy in the parameters that live elsewhere; returns which, for they are to be copied out after the step."""
        if list(map(address, params)) == self.addresses and all(map(_is_plain, params)):
            return []
        found = []
        for i, (x, spec) in enumerate(zip(params, self.layout.specs, strict=True)):
            if self.addresses[i] == address(x) and _is_plain(x):
                continue
            if self.addresses[i] is not None:  # it has left; others may hold the memory that was its place
                self.params[i], lives = self._place(x, spec)
                self.addresses[i] = address(x) if lives else None
                if lives:
                    continue
            self.params[i].view.copy_(x)
            found.append(i)
        return found

    def has_state(self) -> bool:
        """Whether the tensors that torch was shown lie where they were."""
        return all(place.has(place.view) for place in self.state)

    def take_state(self, tensors: Sequence[Tensor]) -> None:
        """Copy in the state that lives elsewhere."""
        places = zip(self.state, tensors, strict=True)
        # All are read before one is written: they may be each other's.
        for place, x in [(place, x.clone()) for place, x in places if not place.has(x)]:
            place.put(x)

    def begin_state(self, begin: Any, params: Sequence[Tensor], shown: bool) -> None:
        """Set the state by the program `begin`; `shown`: what was there before, torch was shown."""
        self.take_params(params)
        if shown:
            for place in self.state:
                place.renew()
        buffers = [place.buffer for place in self.state]
        with SignalsWait(), settings():
            self.device.after(launch(self.device, begin, buffers, [place.buffer.array for place in self.params]))

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Any]:
        """As programs take them: flat, zeros for those that are missing. Their tensors have to outlive the step."""
        found: list[Any] = [None] * len(grads)
        for dtype, members in self.layout.by_dtype.items():
            for i, x in zip(members, self.device.elements([grads[i] for i in members], dtype), strict=True):
                found[i] = x
        return [self._missing(i) if x is None else x for i, x in enumerate(found)]

    def _missing(self, i: int) -> np.ndarray:
        dtype = self.layout.specs[i].dtype
        if dtype not in self._zeros:
            self._zeros[dtype] = self.device.zeros(max(place.view.numel() for place in self.params), dtype)
        return self._zeros[dtype][: self.params[i].view.numel()]

    # --- the step

    def step(self, program: Program, finish: Callable[[list[Any]], None], *arguments: Any) -> None:
        """Run a program over the places, and let `finish` have its other results before a signal is handled.

        A program that calls back into Python, which may change the parameters, or raise, gets a copy of the parameters,
        and what it returns is copied.
        """
        buffers = [place.buffer for place in (*self.params, *self.state)]
        self.device.begin()
        if not program.calls_back:
            with SignalsWait():
                with settings():
                    out = launch(self.device, program.run, buffers, *arguments)
                    self.device.after(out)
                finish(out[len(buffers) :])
            return
        copies = [self.device.array(place.view.clone()) for place in self.params]
        results = program.run([*copies, *(place.buffer.array for place in self.state)], *arguments)
        jax.block_until_ready(results)
        with SignalsWait():
            with settings():
                self.device.replace(buffers, results[: len(buffers)])
                self.device.after(results)
            finish(results[len(buffers) :])


def _is_plain(x: Tensor) -> bool:
    return x.is_contiguous() and not is_lazy(x)
