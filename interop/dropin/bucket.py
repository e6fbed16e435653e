"""The leaves that one program steps: their buffers, and a step of them.

Leaves of `Device.big` elements and more have buffers of their own. The rest share some, since dispatch costs by the
buffer. A leaf lives in its place in the buffers if nothing else refers to its memory. Every other one has a home there:
it is copied in before the step and out after it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interop.dropin import dtensor, program
from interop.dropin.arranging import leaf_of_row
from interop.dropin.coefficients import Coefficients, Scalars, scalar_dtype
from interop.dropin.groups import Numbers
from interop.dropin.leaf import EMA, Leaf, is_big, is_lazy
from interop.dropin.reader import Gradients
from interop.dropin.slots import first_slots
from interop.dropin.state import is_shared
from interop.dropin.whole import is_owned, slot_placement
from interop.memory import Buffer, Device, Freed, Staging
from interop.memory.tensors import DTYPES, STATE_DTYPES, address, entry, leave, may_move, owned
from jopt.arena import Layout
from jopt.rule import PHASE, Rule


@dataclasses.dataclass
class Work:
    """What a step does with a bucket: which leaves step, and what is copied for them. Kept until something changes.

    Attributes:
      bucket: whose leaves these are.
      active: whether each leaf steps.
      leaf_places: for each leaf, the place of its gradient among those of all parameters; None if it has none.
      places: the same of the big leaves.
      small_places, small_views: for each small leaf with a gradient, that place, and the view to gather it in.
      copied_in, copied_out: leaves that do not live in the buffers, before and after the step.
      shared_slots, shared_scalars: state that does not live in the buffers: pairs (its place there, the state).
      resident: parameters that the program writes in place.
      counted: for each small leaf, where it ends in its buffer; 0 if it has no gradient.
    """

    bucket: Bucket
    active: np.ndarray
    leaf_places: list[int | None]
    places: list[int | None]
    small_places: list[int]
    small_views: list[Tensor]
    copied_in: list[Leaf]
    copied_out: list[Leaf]
    shared_slots: list[tuple[Tensor, Tensor]]
    shared_scalars: list[tuple[Tensor, Tensor]]
    resident: list[Tensor]
    counted: Any

    @functools.cached_property
    def is_active(self) -> bool:
        return bool(self.active.any())


class Bucket:
    """The leaves of one rule, one set of types and one device."""

    def __init__(
        self,
        index: int,
        device: Device,
        rule: Rule,
        dtype: torch.dtype,
        slots: Mapping[str, torch.dtype],
        leaves: Sequence[Leaf],
    ):
        self.index = index  # among the plan's
        self.device, self.rule = device, rule
        self.big = [leaf for leaf in leaves if is_big(device, rule, leaf)]
        self.small = [leaf for leaf in leaves if not is_big(device, rule, leaf)]
        self.leaves = self.big + self.small
        self.dtypes = {"param": DTYPES[dtype]} | {slot: STATE_DTYPES[d] for slot, d in slots.items()}
        self.dtype = self.dtypes["param"]
        self.layout = Layout(tuple((leaf.size,) for leaf in self.small), device.row)
        self.leaf_of_row = leaf_of_row(device, self.layout)
        self.spec = program.Spec(
            device,
            rule,
            tuple(self.dtypes.items()),
            tuple(map(self._shape, self.big)),
            len(self.small),
            len(self.leaf_of_row),
            tuple(leaf.whole for leaf in self.big if leaf.whole is not None),
        )

    def _shape(self, leaf: Leaf) -> tuple[int, ...]:
        """A big leaf's, as the rule sees it."""
        by_axes = self.rule.scope == "tensor" and (self.rule.axes or leaf.whole is not None)
        return tuple(leaf.shape) if by_axes else (leaf.size,)

    # --- memory

    @property
    def _shelves(self) -> list[tuple[list[Leaf], list[int]]]:
        """The leaves that share buffers, and where each begins there."""
        shared = [(self.small, list(self.layout.offsets))] * bool(self.small)
        return [([leaf], [0]) for leaf in self.big] + shared

    @property
    def state_bytes(self) -> int:
        """What the state takes at most."""
        sizes = (dtype.itemsize for name, dtype in self.dtypes.items() if name != "param")
        return sum(leaf.size for leaf in self.leaves) * sum(sizes)

    def state_buffers(self) -> Iterator[dict[str, Buffer]]:
        """Make the buffers of the state, shelf by shelf."""
        for leaves, _ in self._shelves:
            yield {slot: self._buffer(slot, leaves) for slot in self.spec.names[1:]}

    def take(
        self,
        optimizer: Any,
        numbers: Numbers,
        staging: Staging,
        begun: bool,
        shared: Mapping[str, float],
        freed: Freed,
        state_buffers: Iterable[dict[str, Buffer]],
    ) -> None:
        """Make the buffers, and move parameters and state into them.

        Args:
          optimizer: whose leaves these are.
          numbers: the hyperparameters of each group.
          staging: where the gradients of small leaves are gathered.
          begun: other parameters have averages already; then a new average begins with the parameter as it is.
          shared: the scalar state that all parameters have, if one has any.
          freed: takes note of what torch frees.
          state_buffers: `state_buffers()`, or what it gives.
        """
        layout, device = self.layout, self.device
        self.missing = device.zeros(max((leaf.size for leaf in self.big), default=0), self.dtype)
        self.staging, self.gathered = staging, staging.array((layout.size // device.row, device.row))
        self.coefficients = Coefficients(self.spec, device, self.leaves, self._first_scalars(optimizer, numbers))
        # Parameters move first: the memory that they leave is given back before the state takes as much, or more.
        owned_by: list[dict[str, Buffer]] = []
        for leaves, offsets in self._shelves:
            if (adopted := self._adopt(leaves)) is not None:
                owned_by.append({"param": adopted})
                continue
            owned_by.append({"param": self._buffer("param", leaves)})
            for leaf, offset in zip(leaves, offsets, strict=True):
                self._take_param(leaf, owned_by[-1]["param"], offset, optimizer._around)
                freed.add(0 if leaf.home is not None else leaf.local.nbytes)
        rows = iter(range(len(self.leaves)))
        for own, of_state, (leaves, offsets) in zip(owned_by, state_buffers, self._shelves, strict=True):
            own |= of_state
            for leaf, offset in zip(leaves, offsets, strict=True):
                loaded = optimizer.state.get(leaf.param)
                self._take_slots(next(rows), leaf, own, offset, optimizer, numbers[leaf.group], begun, shared)
                freed.add(leaf.local.nbytes * len(leaf.state_dtypes) if loaded else 0)
        self.buffers = [buffer for own in owned_by for buffer in own.values()]
        self.grad_views = [  # where the small leaves' gradients are gathered
            staging.view(leaf.dtype, tuple(leaf.shape), offset * self.dtype.itemsize)
            for leaf, offset in zip(self.small, layout.offsets, strict=True)
        ]

    def _buffer(self, name: str, leaves: list[Leaf]) -> Buffer:
        """For the parameter or a slot of a big leaf, or of all small ones."""
        shape: tuple[int, ...] = (self.spec.rows, self.device.row)
        if leaves is not self.small:
            [leaf] = leaves
            reals = 2 if leaf.dtype.is_complex else 1
            shape = self._shape(leaf)
            if name != "param":
                own = leaf.state_shapes[name]
                shape = own if shape == tuple(leaf.shape) else (math.prod(own) * reals,)
        return self.device.buffer(shape, self.dtypes[name])

    def _adopt(self, leaves: list[Leaf]) -> Buffer | None:
        """A big leaf's own memory as its buffer, if the device has that, and its user does not exchange it for ever."""
        leaf = leaves[0]
        if leaves is self.small or leaf.exchanged > 1:
            return None
        found = self.device.adopt(leaf.local, self._shape(leaf), self.dtype)
        if found is not None:
            leaf.home, leaf.address = None, address(leaf.local)
        return found

    def _take_param(self, leaf: Leaf, buffer: Buffer, offset: int, owner: Any) -> None:
        """Move a parameter to its place `offset` elements into a buffer, if nothing else refers to its storage."""
        leaf.home = buffer.view(leaf.dtype, tuple(leaf.shape), offset * self.dtype.itemsize)
        if self.device.moves and leaf.size and not leaf.stays and may_move(leaf.param, owner):
            leaf.param.data = owned(leaf.home.copy_(leaf.param), owner)
            leaf.home = None
        leaf.address = address(leaf.local)

    def _take_slots(
        self,
        i: int,
        leaf: Leaf,
        buffers: Mapping[str, Buffer],
        offset: int,
        optimizer: Any,
        h: dict[str, float],
        begun: bool,
        shared: Mapping[str, float],
    ) -> None:
        """Move a leaf's state to its places."""
        leaf.views = {
            name: entry(vector, i)
            for name, vector in self.coefficients.scalars.items()
            if name not in optimizer.hidden_scalars
        }
        for slot, dtype in leaf.state_dtypes.items():
            view = buffers[slot].view(dtype, leaf.state_shapes[slot], offset * self.dtypes[slot].itemsize)
            leaf.views[slot] = dtensor.placed_by(view, slot_placement(self.rule, slot, leaf.placement))
        if leaf.views:
            state = optimizer.state[leaf.param]
            for name, value in state.items():
                if name in leaf.views and is_shared(value):
                    leaf.homes[name], leaf.views[name] = leaf.views[name], value
            self._take_state(i, leaf, state, dict(state), h, begun, shared)

    def _first_scalars(self, optimizer: Any, numbers: Numbers) -> Scalars:
        """The scalar state, a vector over the leaves; torch's 0-d tensors are views of its entries."""
        vectors = {}
        for name in self.rule.init_scalars(numbers[0]):
            values = [self.rule.init_scalars(numbers[leaf.group])[name] for leaf in self.leaves]
            for i, leaf in enumerate(self.leaves):
                state = optimizer.state.get(leaf.param)
                if (
                    name in optimizer.hidden_scalars
                    and state
                    and any(state.get(s) is not None for s in leaf.state_dtypes if s != EMA)
                ):
                    values[i] = 1.0  # torch keeps no count here: all that matters is whether there was a step
            vectors[name] = np.array(values, scalar_dtype())
        return vectors

    def _take_state(
        self,
        i: int,
        leaf: Leaf,
        state: dict[str, Any],
        values: dict[str, Any],
        h: dict[str, float],
        begun: bool,
        shared: Mapping[str, float],
    ) -> None:
        """Make torch's state of a leaf views of the buffers: of the values given, or else of the rule's first ones."""
        first: dict[str, Any] = {}
        if any(values.get(name) is None for name in leaf.views):
            scalars = {**self.rule.init_scalars(h), **shared}
            if PHASE in scalars:
                scalars[PHASE] = leaf.number
            shape = leaf.whole.shape if leaf.whole is not None and is_owned(self.rule) else tuple(leaf.shape)
            found = first_slots(self.rule, shape, leaf.dtype, tuple(h.items()))  # in each all elements are equal
            slots = {slot: x[(0,) * x.dim()] for slot, x in found.items() if slot in leaf.state_shapes and x.numel()}
            first = scalars | slots | {EMA: leaf.local}
            for name in scalars.keys() - leaf.views.keys():
                self.coefficients.scalars[name][i] = scalars[name]
        self.coefficients.new[i] = EMA in leaf.views and values.get(EMA) is None and not begun
        for name, view in leaf.views.items():
            value = first.get(name, 0.0) if values.get(name) is None else values[name]
            value, place = dtensor.local(value), dtensor.local(leaf.homes.get(name, view))
            if isinstance(value, Tensor):
                value = value.to_dense() if value.is_sparse else value
                place.copy_(value if place.dim() and value.dim() else value.reshape(()))
            else:
                place.fill_(float(value))
            state[name] = view

    # --- the step

    def begin(
        self,
        states: Any,
        numbers: Numbers,
        grads: Mapping[Tensor, Tensor],
        places: Mapping[Tensor, int],
        begun: bool,
        shared: Mapping[str, float],
        averages: bool,
    ) -> Work:
        """Find which leaves have a gradient, and take in state that the user replaced."""
        active = np.array([leaf.param in grads for leaf in self.leaves], bool)
        stepped = [leaf for leaf in self.leaves if leaf.param in grads]
        foreign = []  # read all before writing any: the user may have exchanged the states of two parameters
        for i, leaf in enumerate(self.leaves):
            if (active[i] or ((averages or self.rule.shared) and states.get(leaf.param))) and leaf.views:
                state = states[leaf.param]
                if any(state.get(name) is not view for name, view in leaf.views.items()):
                    values = {name: x.clone() if isinstance(x, Tensor) else x for name, x in state.items()}
                    foreign.append((i, leaf, state, values))
        for i, leaf, state, values in foreign:
            for name, view in leaf.views.items():
                if state.get(name) is not view:
                    leaf.views[name] = leave(view)  # the user may have kept it
            self._take_state(i, leaf, state, values, numbers[leaf.group], begun, shared)
        outside = [
            (name in self.coefficients.scalars, leaf.homes[name], leaf.views[name].view(leaf.homes[name].shape))
            for leaf in self.leaves
            for name in leaf.homes
            if leaf.param in grads or (averages and name == EMA) or name in self.rule.shared
        ]
        small = [i for i, leaf in enumerate(self.small) if leaf.param in grads]
        ends = np.array(self.layout.offsets, np.int32) + np.array(self.layout.sizes, np.int32)
        self.coefficients.mark(active)
        leaf_places = [places[leaf.param] if leaf.param in grads else None for leaf in self.leaves]
        return Work(
            bucket=self,
            active=active,
            leaf_places=leaf_places,
            places=leaf_places[: len(self.big)],
            small_places=[places[self.small[i].param] for i in small],
            small_views=[self.grad_views[i] for i in small],
            copied_in=[leaf for leaf in (self.leaves if averages else stepped) if leaf.home is not None],
            copied_out=[leaf for leaf in stepped if leaf.home is not None],
            shared_slots=[(place, value) for is_scalar, place, value in outside if not is_scalar],
            shared_scalars=[(place, value) for is_scalar, place, value in outside if is_scalar],
            # A DTensor counts its own writes, not those to its local tensor.
            resident=[leaf.param for leaf in stepped if leaf.home is None or leaf.placement is not None],
            counted=self.device.put(np.where(active[len(self.big) :], ends, 0).astype(np.int32)),
        )

    def sums(
        self, summing: Any, work: Work, numbers: Numbers, grads: Gradients, found: Mapping[str, Any]
    ) -> np.ndarray:
        """What each leaf adds to the sums that the rule asks for: a row a sum, a column a leaf."""
        self._copy_in(work)
        self.coefficients.fill(numbers, None)
        arrays = grads.arrays(work)
        buffers = [buffer.array for buffer in self.buffers]
        out = summing(work.counted, buffers, arrays, self.coefficients.table, self.leaf_of_row, found)
        self.device.after(out)
        return np.asarray(out, np.float64)

    def _copy_in(self, work: Work) -> None:
        """Copy in what does not live in the buffers."""
        _copy((leaf.home, leaf.local) for leaf in work.copied_in)
        for place, value in (*work.shared_slots, *work.shared_scalars):
            place.copy_(value)

    def step(
        self,
        update: Any,
        work: Work,
        numbers: Numbers,
        grads: Gradients,
        found: Mapping[str, Any],
        ema: float | None,
        sums: Mapping[str, float] | None,
    ) -> tuple[list[Any], Scalars]:
        """Step the leaves. Returns what the program found, and for `finish`, if that is to come, the scalar state."""
        self._copy_in(work)
        scalars = self.coefficients.fill(numbers, ema, sums)
        arrays = grads.arrays(work)
        table = self.coefficients.table
        out = program.launch(self.device, update, self.buffers, arrays, table, self.leaf_of_row, found)
        try:
            if not found:  # such a step is never skipped; the host does this while the program runs
                self.finish(work, scalars)
        finally:
            self.device.after(out)
        _copy((leaf.local, leaf.home) for leaf in work.copied_out)
        for place, value in work.shared_slots:
            value.copy_(place)
        if ema is not None:
            self.coefficients.new[:] = False
        return out[len(self.buffers) :], scalars

    def finish(self, work: Work, scalars: Scalars) -> None:
        """After a step that was not skipped: the scalar state and torch's version counters."""
        self.coefficients.finish(scalars)
        for place, value in work.shared_scalars:
            value.copy_(place)
        # As torch's own in-place operations do, so that a backward through old values raises.
        torch.autograd.graph.increment_version(work.resident)


def _copy(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Copy the second of each pair into the first, in few launches where a copy is one."""
    together: list[tuple[Any, Any]] = []
    for place, value in pairs:
        if is_lazy(place):  # which foreach's operations do not write to
            place.copy_(value)
        else:
            together.append((place, value))
    if together:
        torch._foreach_copy_(*map(list, zip(*together, strict=True)))  # type: ignore[attr-defined]
