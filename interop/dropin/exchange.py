"""Tensors of which processes have parts, each put together in one of them, its owner, and handed back.

Muon's iteration needs whole matrices, and SOAP and Kron whole parameters with all their state. Each has one owner among
the processes of its mesh, so that it is computed once. All are brought together by one exchange, `all_to_all`, and go
back by another: each element is sent once to the owner, and once to each process that has it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from interop.dropin import dtensor
from interop.dropin.boxes import boxes, own_place
from jopt.leaf import stack_size

Iterate = Callable[[Tensor], Tensor]  # of a batch of matrices


class Exchange:
    """Tensors of one mesh.

    Args:
      placements: how each lies, as `dtensor.placement` says it.
      owners: for each the place of its owner in the mesh, counted through.
      shapes: of this process's parts.

    Raises:
      TypeError: a tensor lies in a way that is not known.
    """

    def __init__(
        self,
        placements: Sequence[tuple[Any, ...]],
        owners: Sequence[int],
        shapes: Sequence[tuple[int, ...]],
    ):
        self.mesh = mesh = placements[0][0]
        self._group = group_of(mesh)
        places = {rank: i for i, rank in enumerate(mesh.mesh.flatten().tolist())}
        # Processes in the order of the group, by their places in the mesh.
        self._members = [places[rank] for rank in dist.get_process_group_ranks(self._group)]
        self._me = own_place(mesh)
        self._shapes = [tuple(shape) for _, _, shape in placements]
        self._owned = {k: [j for j, owner in enumerate(owners) if owner == k] for k in self._members}
        self.mine = self._owned[self._me]
        sizes = tuple(mesh.shape)
        self._boxes = [boxes(sizes, tuple(x), tuple(shape)) for _, x, shape in placements]
        self._sources = [_alike(sizes, x, owner) for (_, x, _), owner in zip(placements, owners, strict=True)]
        for placement, found, of_each in zip(placements, shapes, self._boxes, strict=True):
            if tuple(found) != of_each[self._me].shape:
                raise TypeError(
                    f"expected the part of {dtensor.say(placement)} in this process to be of shape "
                    f"{of_each[self._me].shape}, found {tuple(found)}; distribute it by torch's functions"
                )

    def __call__(self, parts: Sequence[Tensor], iterate: Iterate) -> list[Tensor]:
        """What `iterate` makes of the whole matrices: of each the part of this process, flat as what is given."""
        return self.scatter(_iterate_alike(self.gather(parts), iterate), parts)

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that this process owns, from the parts of all, flat."""
        if len(self._members) == 1:
            return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        sent = [[parts[j] for j in self._owned[k] if self._me in self._sources[j]] for k in self._members]
        got = [[j for j in self.mine if k in self._sources[j]] for k in self._members]
        sizes = [[self._boxes[j][k].size for j in of_member] for k, of_member in zip(self._members, got, strict=True)]
        wholes = {j: parts[0].new_empty(self._shapes[j]) for j in self.mine}
        received = self._exchange(sent, sizes, parts[0])
        for k, of_member, pieces in zip(self._members, got, received, strict=True):
            for j, piece in zip(of_member, pieces, strict=True):
                self._boxes[j][k].write(wholes[j], piece)
        return list(wholes.values())

    def scatter(self, wholes: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of all tensors, flat, as long as these; each owner gives what it owns."""
        if len(self._members) == 1:
            return [x.reshape(-1) for x in wholes]
        sent = [
            [self._boxes[j][k].read(x).reshape(-1) for j, x in zip(self.mine, wholes, strict=True)]
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
