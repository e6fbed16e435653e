"""Which elements of a tensor each process of a mesh has."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Box:
    """Those of one process: for each axis their indices."""

    def __init__(self, axes: list[Tensor]):
        self.shape = tuple(map(len, axes))
        self.size = math.prod(self.shape)
        self._axes = [_as_slice(x) for x in axes]

    def read(self, whole: Tensor) -> Tensor:
        for axis, index in enumerate(self._axes):
            whole = whole[(slice(None),) * axis + (index,)]
        return whole

    def write(self, whole: Tensor, part: Tensor) -> None:
        fancy = [axis for axis, x in enumerate(self._axes) if not isinstance(x, slice)]
        for axis in set(range(len(self._axes))) - set(fancy):  # views, so that one assignment is left
            whole = whole[(slice(None),) * axis + (self._axes[axis],)]
        part = part.view(self.shape)
        if not fancy:
            whole.copy_(part)
        else:
            grid = [self._axes[a] if a in fancy else torch.arange(n) for a, n in enumerate(self.shape)]
            whole[tuple(torch.meshgrid(*grid, indexing="ij"))] = part


def _as_slice(index: Tensor) -> Any:
    """A slice, if the elements follow each other."""
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == len(index) - 1 else index


@functools.lru_cache(maxsize=1024)
def boxes(sizes: tuple[int, ...], placements: tuple[Any, ...], shape: tuple[int, ...]) -> list[Box]:
    """What each process of a mesh of these sizes has of a tensor, by its place."""

    def part(axis: int, place: int) -> Tensor:
        found = torch.arange(shape[axis])
        divided = [i for i, x in enumerate(placements) if getattr(x, "dim", None) == axis]
        # FSDP's strided placement, before tensor parallelism's in the mesh, divides what that leaves.
        for i in sorted(divided, key=lambda i: hasattr(placements[i], "split_factor")):
            chunks = found.chunk(sizes[i])
            k = np.unravel_index(place, sizes)[i]
            found = chunks[k] if k < len(chunks) else found[:0]
        return found

    return [Box([part(axis, place) for axis in range(len(shape))]) for place in range(math.prod(sizes))]


def own_place(mesh: Any) -> int:
    """The place of this process in a mesh, counted through."""
    return int(np.ravel_multi_index(tuple(mesh.get_coordinate()), tuple(mesh.shape)))


def own_shape(placement: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of this process's part of what lies so, as `dtensor.placement` says it."""
    mesh, placements, shape = placement
    return boxes(tuple(mesh.shape), tuple(placements), tuple(shape))[own_place(mesh)].shape
