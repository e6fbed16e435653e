"""Gradient clipping as torch.nn.utils does it.

Source: torch/nn/utils/clip_grad.py.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jax.experimental import checkify

from jopt import numerics
from jopt.arena import is_packed
from jopt.rule import Hyperparameter, at_count
from jopt.valued import Valued

Tree = Any


def vector_norm(x: Array, p: float) -> Array:
    """torch.linalg.vector_norm over all elements, in the type of x."""
    if p == 2:
        return numerics.norm(x)
    magnitude = (jnp.abs if jnp.iscomplexobj(x) else numerics.absolute)(x).astype(numerics.compute_dtype(x.dtype))
    if math.isinf(p):
        norm = jnp.max(magnitude, initial=0) if p > 0 else jnp.min(magnitude, initial=math.inf)
    elif p == 0:
        norm = jnp.sum(magnitude != 0, dtype=magnitude.dtype)
    elif p == 1:
        norm = jnp.sum(magnitude)
    else:
        norm = _power(jnp.sum(_power(magnitude, p)), 1 / p)
    return numerics.cast(norm, jnp.zeros((), jnp.real(x).dtype))


def _power(x: Array, p: float) -> Array:
    """x**p of an x that is not negative; a 0 that stays 0 has no derivative, which may be infinite."""
    zero = (x == 0) & (p > 0)
    return jnp.where(zero, jnp.zeros_like(x), jnp.where(zero, jnp.ones_like(x), x) ** p)


def total_norm(norms: Sequence[Array], p: float = 2.0) -> Array:
    """The norm of all tensors from the norm of each, in their widest type."""
    dtype = _widest([x.dtype for x in norms])
    return vector_norm(jnp.concatenate([jnp.ravel(x).astype(dtype) for x in norms]), p)


def _widest(dtypes: Sequence[Any]) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def clip_factor(norm: Array, max_norm: Any) -> Array:
    """min(1, max_norm / (norm + 1e-6)), rounded where torch rounds: what `clip_grad_norm_` multiplies by."""
    compute = numerics.compute_dtype(norm.dtype)
    denominator = numerics.add(norm, jnp.full((), 1e-6, compute))
    factor = numerics.mul(numerics.reciprocal(denominator), jnp.asarray(max_norm, compute))
    return jnp.minimum(factor, jnp.ones((), norm.dtype))


class ClipState(NamedTuple):
    """The norm of the last gradients before clipping, 0 before the first; int32, the calls so far."""

    total_norm: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a state


class ClipValueState(NamedTuple):
    """int32, the calls so far."""

    count: Array  # type: ignore[assignment]


def clip_grad_norm(max_norm: Hyperparameter, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> ClipGradNorm:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`.

    norm is the `norm_type`-norm over the norms of the tensors: over all that the transformation sees, so in a chain
    around `jopt.param_groups` over all groups, in a group's own chain over that group.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.chain(jopt.clip_grad_norm(1.0), jopt.sgd(lr=1.0))
    >>> params = {"w": jnp.zeros(2)}
    >>> params, state = tx.step({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
    >>> print(params["w"].round(3), state[0].total_norm)
    [-0.6 -0.8] 5.0

    Args:
      max_norm: a number of at least 0, a 0-d array or a schedule.
      norm_type: any p of a vector norm, `math.inf` included.
      error_if_nonfinite: raise if the norm is nan or infinite. Inside jit it is a check of
        `jax.experimental.checkify`, which the jitted function must be wrapped in.

    Returns:
      A transformation whose state has the norm before clipping, as torch returns it: `state.total_norm`.

    Raises:
      RuntimeError: torch's, with `error_if_nonfinite`.
      TypeError: a sparse gradient.
    """
    if not callable(max_norm):
        _check_number("max_norm", max_norm)
    _check_number("norm_type", norm_type, at_least=-math.inf)
    return ClipGradNorm(max_norm, float(norm_type), error_if_nonfinite)


class ClipGradNorm(Valued):
    """What `clip_grad_norm` makes. A `jopt.chain` asks it for the factor alone, which the step then multiplies by."""

    _arguments: tuple[Hyperparameter, float, bool]

    def __new__(cls, max_norm: Hyperparameter, p: float, error_if_nonfinite: bool) -> Self:
        def init(params: Tree) -> ClipState:
            dtypes = [jnp.finfo(jnp.result_type(x)).dtype for x in _floating(params)]
            return ClipState(jnp.zeros((), _widest(dtypes) if dtypes else None), jnp.zeros((), jnp.int32))

        def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
            del params, extra
            factor, state = self.factor(updates, (), state)
            return scaled(updates, (factor,)), state

        self = super().__new__(cls, init, update)
        self._arguments = (max_norm, p, error_if_nonfinite)
        return self

    def factor(self, updates: Tree, factors: Sequence[Array], state: ClipState) -> tuple[Array, ClipState]:
        """The factor for gradients that are multiplied by the positive `factors` first."""
        max_norm, p, error_if_nonfinite = self._arguments
        if not isinstance(state, ClipState):
            raise ValueError(
                f"state: expected clip_grad_norm's own, found a {type(state).__name__}; make it by the chain's "
                "init(params)"
            )
        _dense("clip_grad_norm", updates)
        leaves, count = _floating(updates), jnp.asarray(optax.safe_increment(state.count))
        if not leaves:
            return jnp.ones_like(state.total_norm), ClipState(jnp.zeros_like(state.total_norm), count)
        if p < 0 and any(is_packed(x) for x in jax.tree.leaves(updates, is_leaf=is_packed)):
            raise ValueError(f"norm_type: {p} would see the zeros that fill a packed buffer; unpack first")
        norms = [vector_norm(jnp.asarray(x), p) for x in leaves]
        if p != 0:
            # The norm of the products is the product, rounding aside. The products would be arrays of their own.
            norms = scaled(norms, factors)
        norm = total_norm(norms, p)
        if error_if_nonfinite:
            _check_finite(norm, p)
        bound = _at("max_norm", max_norm, state.count, numerics.compute_dtype(norm.dtype))
        return clip_factor(norm, bound), ClipState(norm.astype(state.total_norm.dtype), count)


def scaled(grads: Tree, factors: Sequence[Array]) -> Tree:
    """The gradients times each factor, rounded after each."""

    return jax.tree.map(lambda g: numerics.scale(jnp.asarray(g), factors), grads)


def _check_finite(norm: Array, p: float) -> None:
    text = (
        f"The total norm of order {p} for gradients from `parameters` is non-finite, so it cannot be clipped. To "
        "disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
    )
    if isinstance(norm, Tracer):
        checkify.check(jnp.isfinite(norm), text)
    elif not jnp.isfinite(norm):
        raise RuntimeError(text)


def _at(name: str, value: Hyperparameter, count: Array, dtype: Any) -> Any:
    if not callable(schedule := value):
        return value
    return numerics.in_double(lambda _, count: at_count(name, schedule, count), (), count, dtype=dtype)


def clip_grad_value(clip_value: Hyperparameter) -> ClipGradValue:
    """Clamp each element to [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_`; nan stays.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.clip_grad_value(0.5)
    >>> tx.update(jnp.array([-2.0, 0.25, 1.0]), tx.init(None))[0].tolist()
    [-0.5, 0.25, 0.5]
    """
    if not callable(clip_value):
        _check_number("clip_value", clip_value)
    return ClipGradValue(clip_value)


class ClipGradValue(Valued):
    """What `clip_grad_value` makes."""

    def __new__(cls, clip_value: Hyperparameter) -> Self:
        def init(params: Tree) -> ClipValueState:
            del params
            return ClipValueState(jnp.zeros((), jnp.int32))

        def update(updates: Tree, state: ClipValueState, params: Tree | None = None, **extra: Any) -> Any:
            del params, extra
            _dense("clip_grad_value", updates)
            bound = _at(
                "clip_value", clip_value, state.count, numerics.widest(map(jnp.result_type, _floating(updates)))
            )

            def clamp(g: Array) -> Array:
                g = jnp.asarray(g)
                return jnp.clip(g, -jnp.asarray(bound, g.dtype), jnp.asarray(bound, g.dtype))

            return jax.tree.map(clamp, updates), ClipValueState(jnp.asarray(optax.safe_increment(state.count)))

        self = super().__new__(cls, init, update)  # type: ignore[arg-type]
        self._arguments = (clip_value,)
        return self


def _floating(tree: Tree) -> list[Any]:
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, float | complex) or hasattr(x, "dtype")]
    return [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def _check_number(name: str, value: Any, at_least: float = 0.0) -> None:
    if isinstance(value, Array) and not value.ndim:
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not float(value) >= at_least:
        raise ValueError(f"{name}: expected a number of at least {at_least}, found {value!r}")


def _dense(function: str, updates: Tree) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(updates, is_leaf=numerics.is_sparse):
        if numerics.is_sparse(x):
            raise TypeError(f"{function}: expected dense gradients, found BCOO at {jax.tree_util.keystr(path)}")
