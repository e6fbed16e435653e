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
that leaf's coefficients in its compute type, uses the operations of `jopt.numerics` alone, and is pure.

`Rule.scope` says what `update` may look at:
    element   every element on its own: leaves may be flattened and packed into one buffer
    tensor    a whole tensor at a time (a norm, a matrix): never a packed buffer, nor a shard of a tensor
    rows      as element, and its gradients are sparse: it sees the rows that have one, gathered
A complex leaf reaches a rule as pairs of reals, as torch steps it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.experimental.sparse import BCOO

from jopt import numerics
from jopt._compat import own_inputs, varying

Schedule = Callable[[Array], Array]
Hyperparameter = float | Array | Schedule  # a number, a 0-d array or tracer, or step -> value
Scalars = dict[str, Any]  # name -> float64 scalar, or one for each leaf
LeafState = dict[str, Array]


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
    scope: ClassVar[Literal["element", "tensor", "rows"]] = "element"
    real_only: ClassVar[bool] = False  # no complex leaves
    batched: ClassVar[bool] = False  # leaves of equal shapes are stacked and stepped at once

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
        for name, is_bool in _flags(cls):
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
        flags = {name for name, _ in _flags(cls)}
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
def _flags(cls: type[Rule]) -> list[tuple[str, bool]]:
    """A rule's flags, and whether each is true or false."""
    return [(field.name, field.type == "bool") for field in dataclasses.fields(cls)]


# --- one leaf ----------------------------------------------------------------------------------------


MASTER = "master"  # the slot of a leaf's float32 copy
STACKED = 2**20  # elements that CPU steps at once: with more, each operation would find none of the last in a cache
FACTOR = "gradient factor "  # among a leaf's coefficients, with a number: what its gradient is multiplied by first


def init_leaf(rule: Rule, h: Scalars, param: Array, state_dtype: Any = None, *, master_copy: bool = False) -> LeafState:
    """rule.init for a leaf of any type; a complex leaf's state is complex too, as in torch."""
    real = _as_real(param)
    if state_dtype is not None and not jnp.iscomplexobj(param):
        real = real.astype(_state_dtype(param.dtype, state_dtype))
    state = rule.init(h, real)
    if jnp.iscomplexobj(param):
        state = {name: _as_complex(x) if x.shape == real.shape else x for name, x in state.items()}
    if master_copy and param.dtype in numerics.LOW_PRECISION:
        state[MASTER] = param.astype(jnp.float32)
    return state


def step_leaf(
    rule: Rule,
    c: Scalars,
    grad: Array,
    state: LeafState,
    param: Array,
    active: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, LeafState]:
    """rule.update for a leaf of any type.

    The leaf is stepped in its state's type where that is wider (`state_dtype`), rounded once at the end, with a `key`
    and in bfloat16 at random: up or down with the probability that keeps the mean. A master copy in the state is what
    is stepped in the leaf's place. Coefficients called `FACTOR` and a number multiply the gradient, in its own type,
    one after the other. `active` (a bool array that broadcasts against the leaf) keeps the leaf and its
    state where False.
    """
    if not param.size:
        return param, state
    old_state, old_param = state, param
    at_random = key is not None and param.dtype == jnp.bfloat16
    param, state = rule.update(*as_rules_see(c, grad, state, param, wide=at_random))

    if jnp.iscomplexobj(old_param):
        param = _as_complex(param)
        state = {name: _as_complex(x) if jnp.iscomplexobj(old_state[name]) else x for name, x in state.items()}
    if MASTER in old_state:
        state[MASTER] = param
    state = {name: state[name].astype(old_state[name].dtype) for name in old_state}
    if at_random:
        assert key is not None
        param = numerics.round_at_random(key, param)
    param = param.astype(old_param.dtype)
    if active is not None:
        param = jnp.where(active, param, old_param)
        state = {name: jnp.where(active, state[name], old_state[name]) for name in old_state}
    return param, state


def as_rules_see(
    c: Scalars, grad: Array, state: LeafState, param: Array, *, wide: bool = False
) -> tuple[Scalars, Array, LeafState, Array]:
    """A leaf as the arguments of `rule.update`: real, in one type, with `wide` at least float32."""
    c = dict(c)
    grad = numerics.scale(grad, [c.pop(name) for name in sorted(c) if name.startswith(FACTOR)])
    dtypes = {x.dtype for x in state.values()} | {param.dtype} | ({jnp.dtype(jnp.float32)} if wide else set())
    dtype = max(dtypes, key=lambda d: jnp.finfo(d).bits)
    grad, param = (_as_real(x.astype(dtype)) for x in (grad, state.get(MASTER, param)))
    state = {name: _as_real(x.astype(dtype)) for name, x in state.items() if name != MASTER}
    c = {name: lax.convert_element_type(x, numerics.compute_dtype(dtype)) for name, x in c.items()}
    return c, grad, state, param


def apart(f: Callable[..., Sequence[Array]], n: int, *inputs: Any) -> list[Array]:
    """`f(*inputs)`, n arrays, on CPU in a form that XLA makes one loop of where it fuses outputs at all.

    There a subexpression that two outputs share gets a loop and an array of its own. Each output computed from its own
    copy of the inputs, which are none in memory, shares none. Without `jopt.fusion.FLAG` the copies are real: slow. On
    other platforms there are no copies, and XLA merges the n computations into one again.
    """

    def repeat(inputs: Any) -> tuple[Any, ...]:
        return (inputs,) * n

    copies = lax.platform_dependent(inputs, cpu=lambda x: own_inputs(x, n), default=repeat)
    return [f(*copy)[k] for k, copy in enumerate(copies)]


def step_rows(
    rule: Rule,
    c: Scalars,
    grad: BCOO,
    state: LeafState,
    param: Array,
    active: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, LeafState]:
    """step_leaf on the rows that `grad` has, in as many operations as it has entries.

    Entries of one row are summed, in their order, as torch's `coalesce` does; those outside of the parameter are
    padding.
    """
    lead = param.shape[: grad.n_sparse]
    n = math.prod(lead)
    if not param.size:
        return param, state
    indices = grad.indices if grad.indices.dtype.itemsize >= 4 else grad.indices.astype(jnp.int32)
    if n > jnp.iinfo(indices.dtype).max:
        raise ValueError(
            f"grads: expected indices of a type that counts {n} rows, found {grad.indices.dtype}; use int64"
        )
    ids = jnp.zeros(grad.nse, indices.dtype)
    inside = jnp.ones(grad.nse, bool)
    for axis, size in enumerate(lead):
        index = indices[:, axis]
        ids = ids * size + index
        inside &= (index >= 0) & (index < size)
    ids = jnp.where(inside, ids, n)
    order = jnp.argsort(ids, stable=True)
    ids = ids[order]
    first = jnp.concatenate([jnp.ones(min(1, grad.nse), bool), ids[1:] != ids[:-1]])
    turn = jnp.cumsum(first) - 1
    rows = jax.ops.segment_sum(grad.data[order], turn, grad.nse, indices_are_sorted=True)
    ids = jnp.full_like(ids, n).at[turn].set(ids)
    if active is not None:
        ids = jnp.where(active, ids, n)

    def gather(x: Array) -> Array:
        return x.reshape(n, *param.shape[grad.n_sparse :]).at[ids].get(mode="fill", fill_value=0)

    def scatter(x: Array, rows: Array, ids: Array) -> Array:
        flat = x.reshape(n, *param.shape[grad.n_sparse :])
        return flat.at[ids].set(rows, mode="drop").reshape(param.shape)

    new, new_state = step_leaf(rule, c, rows, {k: gather(x) for k, x in state.items()}, gather(param), key=key)
    result = scatter(param, new, ids)
    for name, x in state.items():
        # One after the other: XLA on CPU aborts where it fuses three scatters into one loop.
        result, ids = lax.optimization_barrier((result, ids))
        new_state[name] = scatter(x, new_state[name], ids)
    return result, new_state


@functools.partial(jax.jit, static_argnums=0, static_argnames="separate")
def _step_element(
    rule: Rule,
    c: Scalars,
    grad: Array,
    state: LeafState,
    param: Array,
    active: Array | None = None,
    key: Array | None = None,
    *,
    separate: bool,
) -> tuple[Array, LeafState]:
    """step_leaf, traced once for all leaves of one shape; `separate`: in the form of `apart`."""

    def outputs(grad: Array, state: LeafState, param: Array) -> list[Array]:
        param, new = step_leaf(rule, c, grad, state, param, active, key)
        return [param, *(new[name] for name in state)]

    if separate and state:
        param, *slots = apart(outputs, 1 + len(state), grad, state, param)
    else:
        param, *slots = outputs(grad, state, param)
    return param, dict(zip(state, slots, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _step_whole(rule: Rule, *leaf: Any) -> tuple[Array, LeafState]:
    """step_rows or step_leaf, traced once for all leaves of one shape, and outside of a trace compiled once."""
    return (step_rows if rule.scope == "rows" else step_leaf)(rule, *leaf)


def step_leaves(
    rule: Rule, leaves: Sequence[tuple[Any, ...]], *, separate: bool = False
) -> list[tuple[Array, LeafState]]:
    """`step_leaf(rule, *leaf)`, or `step_rows`, for each; leaves of equal shapes at once where the rule says so.

    `separate`: where elements are independent, in the form of `apart`.
    """
    if rule.scope == "element":
        return [_step_element(rule, *leaf, separate=separate) for leaf in leaves]
    if not rule.batched:
        return [_step_whole(rule, *leaf) for leaf in leaves]
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        flat, treedef = jax.tree.flatten(leaf)
        groups.setdefault((treedef, tuple((x.shape, x.dtype, varying(x)) for x in flat)), []).append(i)
    results: dict[int, tuple[Array, LeafState]] = {}
    for members in groups.values():
        alike = [leaves[i] for i in members]
        few = at_once(alike[0][3].size)
        out = _step_stacked(rule, alike, few if few < len(alike) else None)
        results.update(zip(members, out, strict=True))
    return [results[i] for i in range(len(leaves))]


def at_once(size: int) -> int:
    """How many leaves of so many elements CPU steps at once."""
    return max(1, STACKED // max(1, size))


def _step_alike(
    rule: Rule, leaves: Sequence[tuple[Any, ...]], at_once: int | None = None
) -> list[tuple[Array, LeafState]]:
    """`step_leaf` for leaves of equal shapes, stacked: all at once, or on CPU so many."""
    if at_once is not None:

        def in_turn(leaves: Any) -> Any:
            return [x for i in range(0, len(leaves), at_once) for x in _step_alike(rule, leaves[i : i + at_once])]

        return lax.platform_dependent(leaves, cpu=in_turn, default=functools.partial(_step_alike, rule))
    if len(leaves) == 1:
        return [step_leaf(rule, *leaves[0])]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)
    out = jax.vmap(functools.partial(step_leaf, rule))(*stacked)
    return [jax.tree.map(operator.itemgetter(k), out) for k in range(len(leaves))]


_step_stacked = jax.jit(_step_alike, static_argnums=(0, 2))


def _state_dtype(param_dtype: Any, state_dtype: Any) -> Any:
    """The wider of the two: a float64 leaf keeps float64 state."""
    return max(jnp.dtype(param_dtype), jnp.dtype(state_dtype), key=lambda d: jnp.finfo(d).bits)


def _as_real(x: Array) -> Array:
    return jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x


def _as_complex(x: Array) -> Array:
    return lax.complex(x[..., 0], x[..., 1])
