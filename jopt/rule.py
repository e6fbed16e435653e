"""The contract: an optimizer is one rule over one leaf, and everything else is lifted from it.

    rule.init(h, param)                 -> state       arrays under torch's names: exp_avg, ...
    rule.scalars(h, s, xp, stored)      -> c, s        once a step, in float64: this step's coefficients and
                                                       the next scalar state (step, mu_product, ...)
    rule.update(c, grad, state, param)  -> param, state

`h` holds the step's hyperparameters by name and `s` the scalar state, both as float64. `scalars` is written
once against an array namespace `xp`: NumPy on the host (the drop-in torch optimizer), jax.numpy inside
`numerics.in_double` (everything in JAX). `stored` rounds to the type in which scalar state is kept (torch: float32,
or float64 where that is its default type), for what torch computes in it. A scalar has no axis or one entry for each
leaf, since torch counts steps by the parameter; `scalars` must therefore be elementwise. `update` sees one leaf, with
that leaf's coefficients in its compute type, uses the operations of `jopt.numerics` alone (but for
`Rule.by_operations`), and is pure.

`Rule.scope` says what `update` may look at:
    element   every element on its own: leaves may be flattened and packed into one buffer
    tensor    a whole tensor at a time (a norm, a matrix): never a packed buffer, nor a shard of a tensor
    rows      as element, and its gradients are sparse: it sees the rows that have one, gathered
A complex leaf reaches a rule as pairs of reals, as torch steps it.

A `Summed` rule's coefficients depend on sums over all elements of all leaves: Prodigy's step size. It has three parts:

    rule.before(h, s, xp)                -> c          what is known without the sums
    rule.terms(c, grad, state, param)    -> arrays     what is summed, by name
    rule.scalars(h, s, xp, stored)       -> c, s       as above; `h` also holds the sums

and `update` gets both parts' coefficients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

Schedule = Callable[[Array], Array]
Hyperparameter = float | Array | Schedule  # a number, a 0-d array or tracer, or step -> value
Scalars = dict[str, Any]  # name -> float64 scalar, or one for each leaf
LeafState = dict[str, Array]
PHASE = "phase"  # scalar state that begins with the leaf's number, so that leaves can take turns


@dataclasses.dataclass(frozen=True)
class Limit:
    """The values that torch accepts for a hyperparameter, and the text of its ValueError otherwise."""

    accepts: Callable[[float], bool]
    message: str


def at_least_zero(message: str) -> Limit:
    return Limit(lambda x: x >= 0.0, message)


def fraction(message: str) -> Limit:
    return Limit(lambda x: 0.0 <= x < 1.0, message)


@dataclasses.dataclass(frozen=True)
class Rule(ABC):
    """An optimizer's mathematics. Fields are flags that shape the computation; numbers come in as `h`.

    A flag with the name of a hyperparameter says whether its term exists at all: torch leaves weight decay
    and momentum out when they are 0. Other fields are torch's arguments of their names: booleans, and what else
    chooses among programs (Muon's number of iterations).
    """

    hyperparameters: ClassVar[tuple[str, ...]]
    tuples: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # torch's argument -> its members' names here
    limits: ClassVar[Mapping[str, Limit]] = {}
    sums: ClassVar[tuple[str, ...]] = ()  # see `Summed`
    shared: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[Literal["element", "tensor", "rows"]] = "element"
    axes: ClassVar[bool] = True  # of scope "tensor": it looks at axes; else a leaf may be given flat
    real_only: ClassVar[bool] = False  # no complex leaves
    by_operations: ClassVar[bool] = True  # `update` uses the operations of numerics alone; else branches, eigenvectors

    @abstractmethod
    def init(self, h: Scalars, param: Array) -> LeafState:
        """The state of a leaf before its first step, in arrays of their own: in each all elements are equal."""

    def init_scalars(self, h: Scalars) -> Scalars:
        """The scalar state of a leaf before its first step."""
        return {"step": 0.0}

    @abstractmethod
    def scalars(self, h: Scalars, s: Scalars, xp: ModuleType, stored: Callable[[Any], Any]) -> tuple[Scalars, Scalars]:
        """This step's coefficients, and the next scalar state."""

    @abstractmethod
    def update(self, c: Scalars, grad: Array, state: LeafState, param: Array) -> tuple[Array, LeafState]:
        """The leaf and its state after the step. `state` comes and goes with the same names."""

    def signs(self) -> dict[str, bool]:
        """The slots that may be kept in few bits (`state_dtype`), and whether their elements can be negative.

        Not those of a parameter's kind: a step is less than what is lost there.
        """
        return {}

    def coefficients(
        self, h: Scalars, s: Scalars, xp: ModuleType, stored: Callable[[Any], Any], sums: Scalars | None = None
    ) -> tuple[Scalars, Scalars]:
        """All of this step's coefficients, and the next scalar state.

        `sums` are those that the rule asks for; while they are not known yet, what depends on them is left out.
        """
        return self.scalars(h, s, xp, stored)

    def elements(self, param: Array) -> int:
        """How many elements the leaf has; none of an empty one's arrays change."""
        return param.size

    @classmethod
    def members(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters among torch's arguments, its tuples (betas) taken apart.

        `arguments` may hold more than the rule knows, as a torch parameter group does.
        """
        h: dict[str, Any] = {}
        for name, value in arguments.items():
            if name in cls.tuples:
                h.update(zip(cls.tuples[name], _members(name, value, cls.tuples[name]), strict=True))
            elif name in cls.hyperparameters:
                h[name] = value
        return h

    @classmethod
    def shaped_by(cls, arguments: Mapping[str, Any], h: Mapping[str, Any], *, dynamic: bool = False) -> Self:
        """The rule with the flags that torch's arguments and the hyperparameters `h` give it.

        `dynamic` says that any of `h` may change from step to step, so that no term is left out for being 0.
        """
        flags = []
        for name, is_bool in flags_of(cls):
            if name in h:
                flags.append(dynamic or not is_number(h[name]) or h[name] != 0)
            else:
                value = single(name, arguments[name])
                if is_bool and value not in (None, False, True):
                    raise ValueError(f"{name}: expected True or False, found {value!r}")
                flags.append(bool(value) if is_bool else value)
        return cls(*flags)

    @classmethod
    def options(cls) -> frozenset[str]:
        """The names of torch's arguments that the rule knows."""
        members = {name for names in cls.tuples.values() for name in names}
        flags = {name for name, _ in flags_of(cls)}
        return frozenset({*cls.tuples, *flags, *cls.hyperparameters} - members)

    @classmethod
    def check(cls, h: Mapping[str, Any]) -> None:
        """Raise TypeError for what is no hyperparameter, torch's ValueError for a number out of its range."""
        for name, value in h.items():
            check_hyperparameter(name, value, cls.limits.get(name))

    def check_param(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise torch's error for a parameter that this optimizer does not step."""
        if self.real_only and jnp.issubdtype(dtype, jnp.complexfloating):
            raise RuntimeError(
                f"{type(self).__name__} does not support complex parameters: {name} is {jnp.dtype(dtype)}"
            )


class Batched(Rule):
    """A rule in three parts. The second takes whole arrays, and is computed for all leaves of one shape at once.

    `moves` says what the third looks at, as `scope` does: single elements, or norms and means of the whole leaf too.
    """

    moves: ClassVar[Literal["element", "tensor"]] = "element"

    @abstractmethod
    def direct(self, c: Scalars, grad: Array, state: LeafState) -> tuple[Array, LeafState]:
        """What `whole` takes, and the state for `move`; by elements."""

    @abstractmethod
    def whole(self, c: Scalars, x: Array) -> Array:
        """What `move` takes, an array of the leaf's shape."""

    @abstractmethod
    def move(self, c: Scalars, param: Array, x: Array, state: LeafState) -> tuple[Array, LeafState]:
        """The leaf and its state after the step, from the state that `direct` gave."""

    def update(self, c: Scalars, grad: Array, state: LeafState, param: Array) -> tuple[Array, LeafState]:
        x, state = self.direct(c, grad, state)
        return self.move(c, param, self.whole(c, x), state)


class Summed(Rule):
    """A rule whose coefficients depend on sums over all elements of all leaves that step: of all groups together.

    Attributes:
      sums: their names.
      shared: the scalar state that all leaves share, those that do not step too. It depends on no leaf.
      alike: hyperparameters and flags that such state depends on: they are the same in all groups.
    """

    alike: ClassVar[frozenset[str]]

    @abstractmethod
    def before(self, h: Scalars, s: Scalars, xp: ModuleType) -> Scalars:
        """The coefficients that are known without the sums; for `terms` and `update`."""

    @abstractmethod
    def terms(self, c: Scalars, grad: Array, state: LeafState, param: Array) -> dict[str, Array]:
        """What is summed, by the name of the sum: arrays of the leaf's shape; by elements."""

    def coefficients(self, h, s, xp, stored, sums=None):
        c = self.before(h, s, xp)
        if sums is None:
            return c, {}
        more, s = self.scalars({**h, **sums}, s, xp, stored)
        return c | more, s

    @classmethod
    def check_groups(cls, rules: Sequence[Rule], numbers: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for groups whose numbers do not go together. What is no number is not looked at."""
        groups = [{**vars(rule), **h} for rule, h in zip(rules, numbers, strict=True)]
        for index, group in enumerate(groups[1:], 1):
            for name in sorted(cls.alike):
                one, other = groups[0].get(name), group.get(name)
                if one != other and all(x is None or isinstance(x, int | float) for x in (one, other)):
                    raise ValueError(
                        f"param_groups[{index}][{name!r}]: expected {one!r} as in the first group, for {cls.__name__} "
                        f"has one step size for all, found {other!r}; make it one optimizer a group"
                    )


def _members(name: str, value: Any, members: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list) or len(value) != len(members):
        raise TypeError(f"{name}: expected {len(members)} values ({', '.join(members)}), found {value!r}")
    return tuple(value)


def single(name: str, value: Any) -> Any:
    """An argument that is given as an array or a tensor of one value, as that value."""
    if isinstance(value, Tracer) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError) as error:  # NumPy's, JAX's and torch's, none of which names it
        raise ValueError(f"{name}: expected one value, found {value!r}") from error


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def check_hyperparameter(name: str, value: Any, limit: Limit | None) -> None:
    if callable(value):
        return
    if not is_number(value):
        if not (isinstance(value, np.ndarray | Array) and jnp.issubdtype(value.dtype, jnp.number)):
            raise TypeError(
                f"{name}: expected a number, a 0-d array or a schedule (step -> value), "
                f"found {type(value).__name__} {value!r}"
            )
        if value.ndim:
            raise TypeError(f"{name}: expected a 0-d array, found shape {value.shape}")
        if isinstance(value, Tracer):
            return
        value = value.item()
    if limit is not None and not limit.accepts(value):
        raise ValueError(limit.message.format(value))
    if math.isnan(value):
        raise ValueError(f"{name}: expected a number, found nan")


def at_count(name: str, schedule: Callable[[Array], Any], count: Array) -> Any:
    """A schedule's value, checked."""
    try:
        value = schedule(count)
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            f"{name}: its schedule branches on the step, which is not known while the step is compiled; choose with "
            "jnp.where(step < n, a, b), jax.lax.cond, or a schedule of jopt.schedules"
        ) from error
    if not isinstance(value, Array | np.ndarray | np.generic | int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected its schedule to return a number, found {type(value).__name__} {value!r}")
    if jnp.shape(value) != () or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise ValueError(
            f"{name}: expected its schedule to return one real number, found {jnp.result_type(value)} of shape "
            f"{jnp.shape(value)}"
        )
    return value


@functools.cache
def flags_of(cls: type[Rule]) -> list[tuple[str, bool]]:
    """A rule's flags, and whether each is true or false."""
    return [(field.name, field.type == "bool") for field in dataclasses.fields(cls)]
