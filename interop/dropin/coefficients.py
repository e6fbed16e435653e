"""The numbers of a step, a row a leaf: what the rule's `scalars` makes of hyperparameters and step counts, in float64.

torch counts steps for each parameter, so each leaf has a row. Leaves of groups with equal numbers that have taken as
many steps have equal rows: such a kind of leaves is computed once.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interop.dropin.leaf import EMA, Leaf
from interop.memory import Device
from jopt.rule import Rule

if TYPE_CHECKING:
    from interop.dropin.program import Spec


@functools.lru_cache(maxsize=1024)
def _names(rule: Rule) -> tuple[str, ...]:
    with np.errstate(all="ignore"):
        h = dict.fromkeys(rule.hyperparameters, np.float64(0.5))
        s = {name: np.full(1, x) for name, x in rule.init_scalars(h).items()}
        return tuple(rule.coefficients(h, s, np, np.asarray, dict.fromkeys(rule.sums, 0.5))[0])


def columns(rule: Rule, slots: Iterable[str]) -> tuple[str, ...]:
    """The names of a leaf's coefficients: the rule's, the parameter's weight in its average, whether it steps."""
    return (*_names(rule), *((EMA,) if EMA in slots else ()), "active")


Scalars = dict[str, np.ndarray]  # the scalar state by name, an entry a leaf


def scalar_dtype() -> Any:
    """The type of torch's scalar state."""
    return np.float64 if torch.get_default_dtype() is torch.float64 else np.float32


def _stored(x: Any) -> Any:
    """A number as torch's scalar state keeps it."""
    return np.asarray(x).astype(scalar_dtype()).astype(np.float64)


class _Numbers:
    """What rules ask of NumPy, for Python's numbers. It raises where NumPy's result is infinite or none."""

    sqrt, log = staticmethod(math.sqrt), staticmethod(math.log)
    exp, ceil = staticmethod(math.exp), staticmethod(math.ceil)

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        return x if condition else y

    @staticmethod
    def maximum(x: float, y: float) -> float:
        return y if y > x or y != y else x

    @staticmethod
    def minimum(x: float, y: float) -> float:
        return y if y < x or y != y else x

    @staticmethod
    def stored(x: float) -> float:
        return x if scalar_dtype() is np.float64 else struct.unpack("f", struct.pack("f", x))[0]


_BIGGEST = float(np.finfo(np.float32).max)
_FEW = 8  # kinds: so many are quicker one after the other than in NumPy's arrays


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
        names = spec.columns
        self._of_rule = self.table.rows[:, : len(names) - (2 if EMA in names else 1)]
        self._column = {name: self.table.rows[:, names.index(name)] for name in (EMA, "active") if name in names}
        self._active = np.zeros(len(leaves), bool)
        self._which: Any = False  # as NumPy takes it: True where all are active, which is quicker
        self._read: tuple[Any, list[dict[str, float]]] | None = None  # the groups' numbers; those of each kind
        self._alike: Any = range(1 + max(self.groups, default=0))  # for each group the first with equal numbers
        self._kind_of, self._kinds = np.zeros(len(leaves), int), [0]  # each leaf's kind; each kind's first leaf
        self._known: list[bytes] = []  # the scalar state for which the kinds were found
        self._filled: Any = None  # the numbers in the table, if those of a step follow from them alone

    def mark(self, active: np.ndarray) -> None:
        """Note which leaves step from now on."""
        self._column["active"][:] = self._active = active
        self._which = True if active.all() else active
        self._find_kinds()

    def fill(
        self, hyperparameters: Sequence[Mapping[str, float]], ema: float | None, sums: Mapping[str, float] | None = None
    ) -> Scalars:
        """Write the table for a step; returns the next scalar state, for `finish`.

        `sums` are those that the rule asks for. Before they are known, what depends on them stays as it is.
        """
        if self._filled is hyperparameters and ema is None:
            return {}
        if self._known != self._bytes():  # the user wrote to the scalar state
            self._find_kinds()
        if self._read is None or self._read[0] is not hyperparameters:
            names, first = self.spec.rule.hyperparameters, {}
            alike = [first.setdefault(tuple(map(x.get, names)), i) for i, x in enumerate(hyperparameters)]
            if alike != self._alike:
                self._alike = alike
                self._find_kinds()
            groups = [hyperparameters[self.groups[i]] for i in self._kinds]
            self._read = hyperparameters, [{name: group.get(name, math.nan) for name in names} for group in groups]
        scalars = self._of_numbers(self._read[1], sums) if len(self._kinds) <= _FEW else None
        if scalars is None:
            scalars = self._of_arrays(self._read[1], sums)
        if ema is not None:
            self._column[EMA][:] = np.where(self.new, 1.0, 1 - ema)
            if self.new.any():
                self.table.runs = [(i, i + 1) for i in range(len(self.new))]
                self._known = []  # so that the next step finds the kinds again
        self._filled = hyperparameters if not self.scalars and ema is None else None
        return scalars

    def _of_numbers(self, h: Sequence[dict[str, float]], sums: Any) -> Scalars | None:
        """`fill`, kind by kind; None where numbers are not finite.

        Python's numbers are several times as fast as NumPy's, and powers are the C library's, as torch's are.
        """
        numbers, found = _Numbers, []
        try:
            for first, of_kind in zip(self._kinds, h, strict=True):
                s = {name: x.item(first) for name, x in self.scalars.items()}
                found.append(self.spec.rule.coefficients(of_kind, s, numbers, numbers.stored, sums))  # type: ignore[arg-type]
                if not sum(map(abs, found[-1][0].values())) < _BIGGEST:
                    return None
        except (ArithmeticError, ValueError, TypeError):  # a root of a negative number may be a complex one
            return None
        c, scalars = found[0]
        if len(found) == 1:
            self._of_rule[:, : len(c)] = list(c.values())
            return scalars
        self._of_rule[:, : len(c)] = np.array([list(c.values()) for c, _ in found])[self._kind_of]
        return {name: np.array([s[name] for _, s in found])[self._kind_of] for name in scalars}

    def _of_arrays(self, h: Sequence[dict[str, float]], sums: Any) -> Scalars:
        s = {name: x[self._kinds].astype(np.float64) for name, x in self.scalars.items()}
        with np.errstate(all="ignore"):
            numbers = {name: np.array([x[name] for x in h], np.float64) for name in h[0]}
            found = self.spec.rule.coefficients(numbers, s, np, _stored, sums)
            c, scalars = (
                {name: np.broadcast_to(x, len(self._kinds))[self._kind_of] for name, x in numbers.items()}
                for numbers in found
            )
            self._of_rule[:, : len(c)] = np.stack(list(c.values()), axis=1)
        return scalars

    def finish(self, scalars: Scalars) -> None:
        """Make this the scalar state of the leaves that stepped; what all leaves share is that of the others too."""
        for name, vector in self.scalars.items():
            which = True if name in self.spec.rule.shared else self._which
            np.copyto(vector, scalars[name], where=which, casting="same_kind")
        self._known = self._bytes()

    def _find_kinds(self) -> None:
        groups = [self._alike[group] for group in self.groups]
        keys = list(zip(groups, self._active, *self.scalars.values(), strict=True))
        numbers: dict[Any, int] = {}
        self._kind_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        self._kinds = np.unique(self._kind_of, return_index=True)[1].tolist()
        starts = [0, *(np.flatnonzero(np.diff(self._kind_of)) + 1).tolist(), len(keys)]
        self.table.runs = list(itertools.pairwise(starts))
        self._known, self._read, self._filled = self._bytes(), None, None

    def _bytes(self) -> list[bytes]:
        return [x.tobytes() for x in self.scalars.values()]
