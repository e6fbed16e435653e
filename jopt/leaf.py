"""A rule lifted to one leaf of any type, and to many.

A leaf may be complex, of low precision, with a master copy, with state in few bits, with sparse rows.

`init_leaf` and `step_leaf` are `Rule.init` and `Rule.update` for such a leaf. `step_leaves` steps many: it traces
leaves of one shape once, and stacks those that a rule takes together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt import numerics, quantized
from jopt._compat import varying
from jopt.loops import one_loop, separately
from jopt.rule import Batched, LeafState, Rule, Scalars, Summed

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

MASTER = "master"  # the slot of a leaf's float32 copy
STACKED = 2**20  # elements that CPU steps at once; with more, no operation would find the result of the last in a cache
NARROW = 64  # elements of an innermost axis, below which sums take long


def init_leaf(rule: Rule, h: Scalars, param: Array, state_dtype: Any = None, *, master_copy: bool = False) -> LeafState:
    """rule.init for a leaf of any type; a complex leaf's state is complex too, as in torch."""
    real = _as_real(param)
    if state_dtype is not None and not jnp.iscomplexobj(param):
        real = real.astype(_state_dtype(param.dtype, state_dtype))
    state = rule.init(h, real)
    if jnp.iscomplexobj(param):
        state = {name: _as_complex(x) if x.shape == real.shape else x for name, x in state.items()}
    elif state_dtype is not None and state_dtype in quantized.NARROW:
        state = quantized.narrowed(state, rule.signs(), state_dtype)
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
    factors: Sequence[Array] = (),
    update: Callable[..., tuple[Array, LeafState]] | None = None,
) -> tuple[Array, LeafState]:
    """rule.update for a leaf of any type.

    Args:
      rule, c, grad, state, param: as `Rule.update` takes them, but of any type. Where the state's type is wider
        (`state_dtype`) the leaf is stepped in that and rounded once; where it is narrower the state is rounded. A
        master copy in the state is stepped in the leaf's place.
      active: a bool array that broadcasts against the leaf, a scalar for one with state in codes; where False, the leaf
        and its state are kept.
      key: a bfloat16 leaf, and state that is narrower than what the leaf is stepped in, are rounded at random: up or
        down with the probability that keeps the mean.
      factors: what the gradient is multiplied by first, in its own type, one after the other.
      update: what is called in the place of rule.update.
    """
    if not rule.elements(param):
        return param, state
    if quantized.holds_codes(state):
        return _step_codes(rule, c, grad, state, param, active, key, factors, update)
    old_state, old_param = state, param
    at_random = _rounds_at_random(param, key)
    update = rule.update if update is None else update
    param, state = update(*_arguments(c, grad, state, param, active, key, factors))

    if jnp.iscomplexobj(old_param):
        param = _as_complex(param)
        state = {name: _as_complex(x) if jnp.iscomplexobj(old_state[name]) else x for name, x in state.items()}
    if MASTER in old_state:
        state[MASTER] = param
    for i, (name, old) in enumerate(old_state.items()):
        if key is not None and old.dtype == jnp.bfloat16 and state[name].dtype == jnp.float32:
            state[name] = numerics.round_at_random(jax.random.fold_in(key, i), state[name])
    state = {name: state[name].astype(old.dtype) for name, old in old_state.items()}
    if at_random:
        assert key is not None
        param = numerics.round_at_random(key, param)
    param = param.astype(old_param.dtype)
    if active is not None:
        param = jnp.where(active, param, old_param)
        state = {name: jnp.where(active, state[name], old_state[name]) for name in old_state}
    return param, state


def _step_codes(
    rule: Rule,
    c: Scalars,
    grad: Array,
    state: LeafState,
    param: Array,
    active: Array | None,
    key: Array | None,
    factors: Sequence[Array],
    update: Callable[..., tuple[Array, LeafState]] | None,
) -> tuple[Array, LeafState]:
    """step_leaf for a leaf with state in codes."""
    signs = rule.signs()

    def step(grad: Array, state: LeafState, param: Array, key: Array | None) -> tuple[Array, LeafState]:
        wide = quantized.widened(state, signs)
        new, wide = step_leaf(rule, c, grad, wide, param, None, key, factors, update)
        found = quantized.encoded_like(state, wide, signs, key)
        if active is None:
            return new, found
        # The codes themselves are kept: those of a block's numbers need not be the ones that it was decoded from.
        return jnp.where(active, new, param), {name: jnp.where(active, x, state[name]) for name, x in found.items()}

    if rule.scope == "element":
        return quantized.in_pieces(step, grad, state, param, key)
    return step(grad, state, param, key)


def _rounds_at_random(param: Array, key: Array | None) -> bool:
    return key is not None and param.dtype == jnp.bfloat16


def _arguments(
    c: Scalars,
    grad: Array,
    state: LeafState,
    param: Array,
    active: Array | None = None,
    key: Array | None = None,
    factors: Sequence[Array] = (),
) -> tuple[Scalars, Array, LeafState, Array]:
    """What `Rule.update` takes of a leaf."""
    return in_step_type(c, numerics.scale(grad, factors), state, param, wide=_rounds_at_random(param, key))


@functools.partial(jax.jit, static_argnums=0)
def leaf_sums(rule: Summed, *leaf: Any) -> dict[str, Array]:
    """What a leaf as `step_leaf` takes it adds to the rule's sums, in its compute type; 0 if it is not active."""
    c, grad, state, param, active, *rest = leaf

    def in_turn(arrays: tuple[Array, LeafState, Array]) -> dict[str, Array]:
        grad, state, param = arrays
        sums: dict[str, Array] = {}
        for name in rule.sums:  # on CPU XLA would keep a conversion of the gradient that they share
            grad, sums = lax.optimization_barrier((grad, sums))
            sums = sums | {name: numerics.summed(leaf_terms(rule, c, grad, state, param, active, *rest)[name], None)}
        return sums

    def joined(arrays: tuple[Array, LeafState, Array]) -> dict[str, Array]:
        return in_turn(jax.tree.map(_joined, arrays))

    arrays = grad, state, param
    sums = lax.platform_dependent(arrays, cpu=joined, default=in_turn) if _is_narrow(param) else in_turn(arrays)
    return sums if active is None else {name: jnp.where(active, x, jnp.zeros_like(x)) for name, x in sums.items()}


def _is_narrow(x: Array) -> bool:
    """Whether XLA on CPU takes ten times as long for a sum of several arrays like x, whose innermost loop is too short.

    So there the last axes are joined. On other platforms another shape would be a copy.
    """
    return x.ndim > 1 and x.shape[-1] < NARROW


def _joined(x: Array) -> Array:
    """x, its last axes joined until they have NARROW elements: no more, for one before may be divided on a mesh."""
    axes = x.ndim - 1
    while axes and math.prod(x.shape[axes:]) < NARROW:
        axes -= 1
    return x.reshape(*x.shape[:axes], math.prod(x.shape[axes:]))


def leaf_terms(rule: Summed, c: Scalars, *leaf: Any) -> dict[str, Array]:
    """rule.terms of a leaf as `step_leaf` takes it, active or not; in its compute type, of which nothing is rounded.

    The barrier keeps XLA on CPU from computing numbers where it repeats them along the leaf, in an array of its size.
    """
    c, grad, state, param = _arguments(lax.optimization_barrier(c), *leaf)
    dtype = numerics.compute_dtype(param.dtype)
    return rule.terms(c, grad.astype(dtype), {name: x.astype(dtype) for name, x in state.items()}, param.astype(dtype))


def in_step_type(
    c: Scalars, grad: Array, state: LeafState, param: Array, *, wide: bool = False
) -> tuple[Scalars, Array, LeafState, Array]:
    """A leaf as the arguments of `Rule.update`: real, and in the one type that it is stepped in.

    That is the widest of its parameter and state, with `wide` at least float32.
    """
    dtypes = {x.dtype for x in state.values()} | {param.dtype} | ({jnp.dtype(jnp.float32)} if wide else set())
    if dtypes == set(numerics.LOW_PRECISION):
        dtypes = {jnp.dtype(jnp.float32)}  # neither of the two has the other's numbers
    dtype = max(dtypes, key=lambda d: jnp.finfo(d).bits)
    grad, param = (_as_real(x.astype(dtype)) for x in (grad, state.get(MASTER, param)))
    state = {name: _as_real(x.astype(dtype)) for name, x in state.items() if name != MASTER}
    c = {name: lax.convert_element_type(x, numerics.compute_dtype(dtype)) for name, x in c.items()}
    return c, grad, state, param


def step_rows(
    rule: Rule,
    c: Scalars,
    grad: BCOO,
    state: LeafState,
    param: Array,
    active: Array | None = None,
    key: Array | None = None,
    factors: Sequence[Array] = (),
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

    new, new_state = step_leaf(
        rule, c, rows, {k: gather(x) for k, x in state.items()}, gather(param), key=key, factors=factors
    )
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
    *rest: Any,
    separate: bool,
) -> tuple[Array, LeafState]:
    """step_leaf, traced once for all leaves of one shape; `separate`: in the form of `separately`."""

    def outputs(grad: Array, state: LeafState, param: Array) -> list[Array]:
        param, new = step_leaf(rule, c, grad, state, param, *rest)
        return [param, *(new[name] for name in state)]

    if separate and state and not quantized.holds_codes(state):
        param, *slots = separately(outputs, 1 + len(state), grad, state, param)
    else:
        param, *slots = outputs(grad, state, param)
    return param, dict(zip(state, slots, strict=True))


@functools.partial(jax.jit, static_argnums=0, static_argnames="separate")
def _step_whole(rule: Rule, *leaf: Any, separate: bool) -> tuple[Array, LeafState]:
    """step_rows or step_leaf, traced once for all leaves of one shape, and outside of a trace compiled once.

    `separate`: what there is by elements in the form of `one_loop`.
    """
    if rule.scope == "rows":
        return step_rows(rule, *leaf)
    if not separate or not rule.by_operations:
        return step_leaf(rule, *leaf)
    flat, treedef = jax.tree.flatten(leaf)
    closed, out = jax.make_jaxpr(lambda *flat: step_leaf(rule, *treedef.unflatten(flat)), return_shape=True)(*flat)
    return jax.tree.unflatten(jax.tree.structure(out), one_loop(closed)(*flat))


def step_leaves(
    rule: Rule, leaves: Sequence[tuple[Any, ...]], *, separate: bool = False
) -> list[tuple[Array, LeafState]]:
    """`step_leaf(rule, *leaf)`, or `step_rows`, for each; leaves of equal shapes at once where the rule says so.

    `separate`: where elements are independent, in the form of `separately`; what else is by elements, of `one_loop`.
    """
    if rule.scope == "element":
        return [_step_element(rule, *leaf, separate=separate) for leaf in leaves]
    if not isinstance(rule, Batched):
        return [_step_whole(rule, *leaf, separate=separate) for leaf in leaves]
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        flat, treedef = jax.tree.flatten(leaf)
        groups.setdefault((treedef, tuple((x.shape, x.dtype, varying(x)) for x in flat)), []).append(i)
    results: dict[int, tuple[Array, LeafState]] = {}
    for members in groups.values():
        alike = [leaves[i] for i in members]
        few = stack_size(alike[0][3].size)
        out = _step_stacked(rule, alike, few if few < len(alike) and not numerics.on_mesh() else None)
        results.update(zip(members, out, strict=True))
    return [results[i] for i in range(len(leaves))]


def stack_size(size: int) -> int:
    """How many leaves of so many elements CPU steps together."""
    return max(1, STACKED // max(1, size))


def _step_alike(
    rule: Batched, leaves: Sequence[tuple[Any, ...]], few: int | None = None
) -> list[tuple[Array, LeafState]]:
    """`step_leaf` for leaves of equal shapes; what takes whole matrices for all together, or on CPU a few together."""
    if len(leaves) == 1 or not rule.elements(leaves[0][3]):
        return [step_leaf(rule, *leaf) for leaf in leaves]
    prepared = [_directed(rule, *leaf) for leaf in leaves]

    def together(prepared: Any, few: int) -> list[Array]:
        found: list[Array] = []
        for i in range(0, len(prepared), few):
            found += list(jax.vmap(rule.whole)(*jax.tree.map(lambda *xs: jnp.stack(xs), *prepared[i : i + few])))
        return found

    if few is None:
        whole = together(prepared, len(leaves))
    else:
        some, every = (functools.partial(together, few=n) for n in (few, len(leaves)))
        whole = lax.platform_dependent(prepared, cpu=some, default=every)
    return [_moved(rule, x, *leaf) for x, leaf in zip(whole, leaves, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _directed(rule: Batched, *leaf: Any) -> tuple[Scalars, Array]:
    """What `rule.whole` takes of a leaf."""
    c, grad, state, _ = _arguments(*leaf)
    return c, rule.direct(c, grad, state)[0]


@functools.partial(jax.jit, static_argnums=0)
def _moved(rule: Batched, whole: Array, *leaf: Any) -> tuple[Array, LeafState]:
    """step_leaf with what `rule.whole` gave for it."""

    def update(c: Scalars, grad: Array, state: LeafState, param: Array) -> tuple[Array, LeafState]:
        return rule.move(c, param, whole, rule.direct(c, grad, state)[1])

    return step_leaf(rule, *leaf, update=update)


_step_stacked = jax.jit(_step_alike, static_argnums=(0, 2))


def _state_dtype(param_dtype: Any, state_dtype: Any) -> Any:
    """The type of what is not narrowed: the wider of the two, so that a float64 leaf keeps float64 state.

    Beside codes that is float32 at least.
    """
    dtypes = jnp.dtype(param_dtype), jnp.dtype(jnp.float32) if state_dtype == quantized.INT8 else jnp.dtype(state_dtype)
    return max(dtypes, key=lambda d: jnp.finfo(d).bits)


def _as_real(x: Array) -> Array:
    return jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x


def _as_complex(x: Array) -> Array:
    return lax.complex(x[..., 0], x[..., 1])
