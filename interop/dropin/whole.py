"""The tensor that a DTensor's local one is a part of, as rules need to know it that look at whole tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from interop.dropin.boxes import own_shape
from interop.dropin.slots import slot_shapes
from jopt.rule import Rule

Axes = tuple[int, ...]  # of a mesh


@dataclasses.dataclass(frozen=True)
class Whole:
    """The tensor that an array is a part of.

    Attributes:
      shape: its shape.
      axes: for each of its axes those of the mesh that divide it.
    """

    shape: tuple[int, ...]
    axes: tuple[Axes, ...]

    @classmethod
    def of(cls, placement: tuple[Any, ...]) -> Whole:
        """What `dtensor.placement` says of a parameter."""
        _, placements, shape = placement
        divided = [getattr(x, "dim", None) for x in placements]  # FSDP's strided ones are no Shard to torch
        return cls(
            tuple(shape), tuple(tuple(i for i, d in enumerate(divided) if d == axis) for axis in range(len(shape)))
        )

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def all_axes(self) -> Axes:
        return tuple(sorted({i for axes in self.axes for i in axes}))

    def reduced(self, axis: int) -> Whole:
        """With one element along an axis, which then is not divided."""
        axis %= len(self.shape)
        shape, axes = (*self.shape[:axis], 1, *self.shape[axis + 1 :]), (*self.axes[:axis], (), *self.axes[axis + 1 :])
        return Whole(shape, axes)


@functools.lru_cache(maxsize=1024)
def reduced_axes(rule: Rule, axes: int) -> dict[str, tuple[int, ...]]:
    """For each slot of a leaf of so many axes, along which of them it has one element."""
    found = slot_shapes(rule, (2,) * axes)
    return {name: tuple(i for i, n in enumerate(shape) if n == 1) for name, shape in found.items()}


def slot_whole(rule: Rule, name: str, whole: Whole) -> Whole:
    """The whole of a slot."""
    return functools.reduce(Whole.reduced, reduced_axes(rule, len(whole.shape)).get(name, ()), whole)


def is_owned(rule: Rule) -> bool:
    """Whether each leaf is stepped by one process that has it whole, with its state: by more than sums."""
    return rule.scope == "tensor" and not rule.by_operations


def slot_placement(rule: Rule, name: str, placement: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """How a slot of a parameter lies over the processes, which lies so itself, as `dtensor.placement` says it.

    A matrix of an axis of the parameter is divided by its rows.
    """
    if placement is None:
        return None
    from torch.distributed.tensor import Replicate, Shard  # not in every build of torch

    mesh, placements, shape = placement
    if is_owned(rule):
        own = slot_shapes(rule, tuple(shape)).get(name, tuple(shape))
        if own == tuple(shape):
            return placement
        return mesh, tuple(Replicate() if x.is_replicate() else Shard(0) for x in placements), type(shape)(own)
    axes = reduced_axes(rule, len(shape)).get(name, ())
    if not axes:
        return placement
    placements = tuple(Replicate() if getattr(x, "dim", None) in axes else x for x in placements)
    return mesh, placements, type(shape)(1 if i in axes else n for i, n in enumerate(shape))


def own_slots(rule: Rule, placement: tuple[Any, ...] | None, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what this process has of a leaf's tensor state, whose own part is of this shape."""
    if placement is None or not is_owned(rule):
        return slot_shapes(rule, shape)
    names = slot_shapes(rule, tuple(placement[2]))
    return {name: own_shape(slot_placement(rule, name, placement)) for name in names}  # type: ignore[arg-type]
