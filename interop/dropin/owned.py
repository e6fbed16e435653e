"""Rules that turn a leaf by matrices of its axes, where processes have parts: each leaf is stepped by one of them.

SOAP and Kron take eigenvectors, triangular solves and products, of which a process cannot do its share. So a leaf has
an owner among the processes of its mesh, which gets the parameter, the gradient and the state, steps them, and hands
all back. Between steps each process has its part of the parameter and of the state, so that memory, checkpoints and a
change of the number of processes are as with any other optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from torch import Tensor

from interop.dropin import host
from interop.dropin.boxes import own_place
from interop.dropin.exchange import Exchange, owners
from interop.dropin.leaf import Leaf
from interop.dropin.program import Norms, Spec, Update, compile_on
from interop.dropin.slots import slot_shapes
from interop.dropin.whole import slot_placement
from interop.memory import Table
from jopt.rule import Rule


def work(rule: Rule, shape: tuple[int, ...]) -> int:
    """About the multiplications of a step with matrices: those of the leaf by each, and each by itself."""
    sides = [x[0] for x in slot_shapes(rule, shape).values() if len(x) == 2 and x[0] == x[1]]
    return sum(n * (math.prod(shape) + n * n) for n in sides) + math.prod(shape)


@functools.lru_cache(maxsize=256)
def compile_whole(spec: Spec, clip: bool, unscale: bool, norms: Norms) -> Any:
    """The program that steps whole leaves. It gives nothing away: what it takes was made by torch."""
    update = Update(spec, clip, unscale, norms)
    with host.own_settings():
        return compile_on(spec.device, update, *update.arguments())


def compile_update(spec: Spec, leaves: Sequence[Leaf], clip: bool, unscale: bool, norms: Norms) -> Owning:
    """What steps a bucket of these leaves, which are parts."""
    lies: Any = [[slot_placement(spec.rule, name, leaf.placement) for name in spec.names] for leaf in leaves]
    mesh = leaves[0].placement[0]
    owned_by = owners([work(spec.rule, tuple(leaf.param.shape)) for leaf in leaves], mesh.size())
    mine = [i for i, owner in enumerate(owned_by) if owner == own_place(mesh)]
    whole = dataclasses.replace(spec, big=tuple(tuple(leaves[i].param.shape) for i in mine), wholes=())
    program = compile_whole(whole, clip, unscale, norms)
    items = [
        _Item(placement, owner, tuple(leaf.state_shapes.get(name, leaf.shape)), dtype)
        for leaf, owner, of_leaf in zip(leaves, owned_by, lies, strict=True)
        for placement, (name, dtype) in zip(of_leaf, spec.dtypes, strict=True)
    ]
    grads = [
        _Item(leaf.placement, owner, tuple(leaf.shape), spec.dtype)
        for leaf, owner in zip(leaves, owned_by, strict=True)
    ]
    return Owning(spec, program, mine, Transfer(items + grads), Transfer(items))


@dataclasses.dataclass(frozen=True)
class _Item:
    """One of the tensors of a leaf.

    Attributes:
      placement: how it lies, as `dtensor.placement` says it.
      owner: the place in the mesh of the process that gets it.
      shape: of this process's part.
      dtype: its elements'.
    """

    placement: tuple[Any, ...]
    owner: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Transfer:
    """Tensors of several types to their owners, and back: an exchange a type."""

    def __init__(self, items: Sequence[_Item]):
        self._items = items
        self._exchanges = []
        for dtype in dict.fromkeys(x.dtype for x in items):
            places = [j for j, x in enumerate(items) if x.dtype == dtype]
            own = [items[j] for j in places]
            exchange = Exchange([x.placement for x in own], [x.owner for x in own], [x.shape for x in own])
            self._exchanges.append((places, exchange))

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What this process owns, whole, in the order of all."""
        found: dict[int, Tensor] = {}
        for places, exchange in self._exchanges:
            wholes = exchange.gather([parts[j] for j in places])
            found |= zip((places[k] for k in exchange.mine), wholes, strict=True)
        return [found[j] for j in sorted(found)]

    def scatter(self, wholes: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Write this process's parts of all; `wholes` are what it owns, as `gather` gives it."""
        mine = sorted(places[k] for places, exchange in self._exchanges for k in exchange.mine)
        of_place = dict(zip(mine, wholes, strict=True))
        for places, exchange in self._exchanges:
            own = [parts[j] for j in places]
            found = exchange.scatter([of_place[places[k]] for k in exchange.mine], own)
            for part, x in zip(own, found, strict=True):
                part.copy_(x)


@dataclasses.dataclass(frozen=True)
class Owning:
    """A step: all to the owners, a program there, and all back."""

    spec: Spec
    program: Any
    mine: list[int]
    there: Transfer
    back: Transfer

    def __call__(
        self, buffers: list[Array], grads: list[Any], table: Table, leaf_of_row: Array, found: dict[str, Any]
    ) -> list[Array]:
        device = self.spec.device
        held = [device.shown(x).view(-1) for x in buffers]
        given = [device.shown(x if isinstance(x, jax.Array) else device.put(x)) for x in grads]
        wholes = self.there.gather([*held, *given])
        own = len(self.mine)
        n = len(self.spec.dtypes) * own
        arrays = [device.array(x) for x in wholes[:n]]
        grads = device.elements(wholes[n:], self.spec.dtype)
        device.begin()  # torch's copies have started its threads again
        rows = table.rows[self.mine]
        out = self.program(arrays, grads, rows, leaf_of_row, found)
        device.after(out)
        shapes = [x.shape for x in wholes]
        stepped = [device.tensor(x).view(shape) for x, shape in zip(out[:n], shapes, strict=False)]
        self.back.scatter(stepped, held)
        return [*buffers, *out[n:]]
