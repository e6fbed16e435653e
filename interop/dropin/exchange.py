"""Matrices of which processes have parts, each put together in one of them, its owner, and handed back.

Muon's iteration needs whole matrices. Each has one owner among the processes of its mesh, so that it is iterated once.
All are brought together by one exchange, `all_to_all`, and go back by another, in bfloat16: each element is sent once
to the owner, and once to each process that has it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from interop.dropin import dtensor
from interop.dropin.leaf import Leaf
from jopt.leaf import stack_size
from jopt.rule import Batched

if TYPE_CHECKING:
    from interop.dropin.bucket import Bucket

Iterate = Callable[[Tensor], Tensor]  # of a batch of matrices


class Exchange:
    """The matrices of a bucket.

    Args:
      leaves: whose local parts are exchanged.
      owners: for each the place of its owner in the mesh, counted through.

    Raises:
      TypeError: a matrix lies in a way that is not known.
    """

    def __init__(self, leaves: Sequence[Leaf], owners: Sequence[int]):
        self.mesh = mesh = leaves[0].placement[0]
        self._group = group_of(mesh)
        places = {rank: i for i, rank in enumerate(mesh.mesh.flatten().tolist())}
        # Processes in the order of the group, by their places in the mesh.
        self._members = [places[rank] for rank in dist.get_process_group_ranks(self._group)]
        self._me = places[dist.get_rank()]
        self._shapes = [tuple(leaf.param.shape) for leaf in leaves]
        self._owned = {k: [j for j, owner in enumerate(owners) if owner == k] for k in self._members}
        self._mine = self._owned[self._me]
        sizes = tuple(mesh.shape)
        self._boxes = [
            _boxes(sizes, leaf.placement[1], shape) for leaf, shape in zip(leaves, self._shapes, strict=True)
        ]
        self._sources = [_alike(sizes, leaf.placement[1], owner) for leaf, owner in zip(leaves, owners, strict=True)]
        for leaf, boxes in zip(leaves, self._boxes, strict=True):
            if tuple(leaf.shape) != boxes[self._me].shape:
                raise TypeError(
                    f"expected the part of {dtensor.say(leaf.placement)} in this process to be of shape "
                    f"{boxes[self._me].shape}, found {tuple(leaf.shape)}; distribute it by torch's functions"
                )

    def __call__(self, parts: Sequence[Tensor], iterate: Iterate) -> list[Tensor]:
        """What `iterate` makes of the whole matrices: of each the part of this process, flat as what is given."""
        if len(self._members) == 1:
            wholes = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
            return [x.reshape(-1) for x in _iterate_alike(wholes, iterate)]
        return self._scatter(_iterate_alike(self._gather(parts), iterate), parts)

    def _gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The matrices that this process owns."""
        sent = [[parts[j] for j in self._owned[k] if self._me in self._sources[j]] for k in self._members]
        got = [[j for j in self._mine if k in self._sources[j]] for k in self._members]
        sizes = [[self._boxes[j][k].size for j in of_member] for k, of_member in zip(self._members, got, strict=True)]
        wholes = {j: parts[0].new_empty(self._shapes[j]) for j in self._mine}
        received = self._exchange(sent, sizes, parts[0])
        for k, of_member, pieces in zip(self._members, got, received, strict=True):
            for j, piece in zip(of_member, pieces, strict=True):
                self._boxes[j][k].write(wholes[j], piece)
        return list(wholes.values())

    def _scatter(self, wholes: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Their parts in this process."""
        sent = [
            [self._boxes[j][k].read(x).reshape(-1) for j, x in zip(self._mine, wholes, strict=True)]
            for k in self._members
        ]
        got = [self._owned[k] for k in self._members]
        received = self._exchange(sent, [[parts[j].numel() for j in of_member] for of_member in got], parts[0])
        found: list[Any] = [None] * len(parts)
        for of_member, pieces in zip(got, received, strict=True):
            for j, piece in zip(of_member, pieces, strict=True):
                found[j] = piece
        return found

    def _exchange(self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], like: Tensor) -> list[Any]:
        """For each member what it sends to this process, in pieces of the sizes."""
        flat = [x for pieces in sent for x in pieces]
        out = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            out,
            torch.cat(flat) if flat else like.new_empty(0),
            list(map(sum, sizes)),
            [sum(x.numel() for x in pieces) for pieces in sent],
            group=self._group,
        )
        pieces = iter(out.split([n for of_member in sizes for n in of_member]))
        return [[next(pieces) for _ in of_member] for of_member in sizes]


class Box:
    """Which elements of a matrix a process has."""

    def __init__(self, rows: Tensor, columns: Tensor):
        self.shape = len(rows), len(columns)
        self.size = math.prod(self.shape)
        self._rows, self._columns = _as_slice(rows), _as_slice(columns)

    def read(self, whole: Tensor) -> Tensor:
        return whole[self._rows][:, self._columns]

    def write(self, whole: Tensor, part: Tensor) -> None:
        if isinstance(self._rows, slice):
            whole[self._rows][:, self._columns] = part.view(self.shape)
        else:
            whole[self._rows, self._columns] = part.view(self.shape)


def _as_slice(index: Tensor) -> Any:
    """A slice, if the elements follow each other."""
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first == len(index) - 1 else index


@functools.lru_cache(maxsize=1024)
def _boxes(sizes: tuple[int, ...], placements: tuple[Any, ...], shape: tuple[int, ...]) -> list[Box]:
    """What each process of a mesh of these sizes has of a matrix, by its place."""

    def part(axis: int, place: int) -> Tensor:
        found = torch.arange(shape[axis])
        divided = [i for i, x in enumerate(placements) if getattr(x, "dim", None) == axis]
        # FSDP's strided placement, before tensor parallelism's in the mesh, divides what that leaves.
        for i in sorted(divided, key=lambda i: hasattr(placements[i], "split_factor")):
            chunks = found.chunk(sizes[i])
            k = np.unravel_index(place, sizes)[i]
            found = chunks[k] if k < len(chunks) else found[:0]
        return found

    return [Box(part(0, place), part(1, place)) for place in range(math.prod(sizes))]


def _alike(sizes: tuple[int, ...], placements: tuple[Any, ...], owner: int) -> set[int]:
    """The processes whose parts make the matrix that the owner gets: of the copies the nearest one."""
    copied = [i for i, x in enumerate(placements) if x.is_replicate()]
    of_owner = np.unravel_index(owner, sizes)
    coordinates = map(np.unravel_index, range(math.prod(sizes)), itertools.repeat(sizes))
    return {place for place, at in enumerate(coordinates) if all(at[i] == of_owner[i] for i in copied)}


def _iterate_alike(matrices: Sequence[Tensor], iterate: Iterate) -> list[Tensor]:
    """The matrices iterated, those of one shape together, as many as caches hold."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(matrices):
        alike.setdefault(tuple(x.shape), []).append(i)
    found: list[Any] = [None] * len(matrices)
    for shape, places in alike.items():
        few = stack_size(math.prod(shape))
        for begin in range(0, len(places), few):
            some = places[begin : begin + few]
            for i, x in zip(some, iterate(torch.stack([matrices[i] for i in some])), strict=True):
                found[i] = x
    return found


@functools.lru_cache(maxsize=64)
def _flat_group(_: Any, ranks: tuple[int, ...]) -> Any:
    """A group of so many processes, for as long as the group of all is this one."""
    return dist.new_group(list(ranks), use_local_synchronization=True)


def group_of(mesh: Any) -> Any:
    """A process group of all processes of a mesh; of one with several axes it is made at the first call, by all."""
    return mesh.get_group(0) if mesh.ndim == 1 else _flat_group(dist.group.WORLD, tuple(mesh.mesh.flatten().tolist()))


def owners(costs: Sequence[int], processes: int) -> list[int]:
    """For each cost a process: the largest first, each to the one that has least so far.

    So none has more than the mean and the largest.
    """
    loads, found = [0] * processes, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = loads.index(min(loads))
        loads[found[i]] += costs[i]
    return found


def products(shape: Sequence[int]) -> int:
    """The multiplications of one turn of the iteration, of which each matrix takes as many."""
    few, many = sorted(shape)
    return few * few * (2 * many + few)


def between_processes(buckets: Sequence[Bucket]) -> list[Any]:
    """For each bucket what brings processes together, if it is of parts: the mesh of its sums, or an `Exchange`."""
    found: list[Any] = []
    for bucket in buckets:
        if not bucket.spec.wholes:
            found.append(None)
        elif not isinstance(bucket.rule, Batched):
            found.append(bucket.leaves[0].placement[0])
        else:
            mesh = bucket.leaves[0].placement[0]
            costs = [products(leaf.param.shape) for leaf in bucket.leaves]
            found.append(Exchange(bucket.leaves, owners(costs, mesh.size())))
    return found
