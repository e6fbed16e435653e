"""The numbers of a step, a row a leaf: what the rule's `scalars` makes of hyperparameters and step counts, in float64.

torch counts steps for each parameter, so each leaf has a row. Leaves of one group that have taken as many steps have
equal rows: such a kind of leaves is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from interop.dropin.leaf import EMA, Leaf
from interop.dropin.program import Spec
from interop.memory import Device

Scalars = dict[str, np.ndarray]  # the scalar state by name, an entry a leaf


def scalar_dtype() -> Any:
    """The type of torch's scalar state."""
    return np.float64 if torch.get_default_dtype() is torch.float64 else np.float32


class Coefficients:
    """A bucket's table of coefficients, and its scalar state.

    Attributes:
      scalars: the scalar state by name, an entry a leaf; torch's 0-d tensors are views of its entries.
      new: whose averages begin with the next step's result.
    """

    def __init__(self, spec: Spec, device: Device, leaves: Sequence[Leaf], scalars: Scalars):
        self.spec, self.groups, self.scalars = spec, [leaf.group for leaf in leaves], scalars
        self.table = device.table(len(leaves), len(spec.columns), spec.compute_dtype)
        self.new = np.zeros(len(leaves), bool)
        self._column = {name: self.table.rows[:, j] for j, name in enumerate(spec.columns)}
        self._active = np.zeros(len(leaves), bool)
        self._kind_of, self._kinds = np.zeros(len(leaves), int), [0]  # each leaf's kind; each kind's first leaf
        self._known: list[bytes] = []  # the scalar state for which the kinds were found

    def mark(self, active: np.ndarray) -> None:
        """Note which leaves step from now on."""
        self._column["active"][:] = self._active = active
        self._find_kinds()

    def fill(self, hyperparameters: Sequence[Mapping[str, float]], ema: float | None) -> Scalars:
        """Write the table for a step; returns the next scalar state, for `finish`."""
        if self._known != self._bytes():  # the user wrote to the scalar state
            self._find_kinds()

        def of_kinds(values: list[Any]) -> Any:
            # For one kind, numbers: several times as fast as arrays, and powers are the C library's, as torch's are.
            return np.float64(values[0]) if len(values) == 1 else np.array(values, np.float64)

        rule, groups = self.spec.rule, [hyperparameters[self.groups[i]] for i in self._kinds]
        h = {name: of_kinds([group.get(name, math.nan) for group in groups]) for name in rule.hyperparameters}
        s = {name: of_kinds([x[i] for i in self._kinds]) for name, x in self.scalars.items()}
        with np.errstate(all="ignore"):
            c, scalars = rule.scalars(h, s, np, lambda x: np.asarray(x).astype(scalar_dtype()).astype(np.float64))
        if len(self._kinds) > 1:
            c, scalars = (
                {name: np.broadcast_to(x, len(self._kinds))[self._kind_of] for name, x in numbers.items()}
                for numbers in (c, scalars)
            )
        for name, value in c.items():
            self._column[name][:] = value
        if ema is not None:
            self._column[EMA][:] = np.where(self.new, 1.0, 1 - ema)
        return scalars

    def finish(self, scalars: Scalars) -> None:
        """Make this the scalar state of the leaves that stepped."""
        for name, vector in self.scalars.items():
            np.copyto(vector, scalars[name], where=self._active, casting="same_kind")
        self._known = self._bytes()

    def _find_kinds(self) -> None:
        keys = list(zip(self.groups, self._active, *self.scalars.values(), strict=True))
        numbers: dict[Any, int] = {}
        self._kind_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        self._kinds = np.unique(self._kind_of, return_index=True)[1].tolist()
        self._known = self._bytes()

    def _bytes(self) -> list[bytes]:
        return [x.tobytes() for x in self.scalars.values()]
