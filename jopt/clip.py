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
from jax.experimental.sparse import BCOO

from jopt import numerics
from jopt.arena import is_packed

Tree = Any


def vector_norm(x: Array, p: float) -> Array:
    """torch.linalg.vector_norm over all elements, in the type of x."""
    if p == 2:
        return numerics.norm(x)
    magnitude = jnp.abs(x).astype(numerics.compute_dtype(x.dtype))
    if math.isinf(p):
        norm = jnp.max(magnitude, initial=0) if p > 0 else jnp.min(magnitude, initial=math.inf)
    elif p == 0:
        norm = jnp.sum(magnitude != 0, dtype=magnitude.dtype)
    elif p == 1:
        norm = jnp.sum(magnitude)
    else:
        norm = jnp.sum(magnitude**p) ** (1 / p)
    return numerics.cast(norm, jnp.zeros((), jnp.real(x).dtype))


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
    """The norm of the last gradients before clipping; 0 before the first."""

    total_norm: Array


def clip_grad_norm(max_norm: float | Array, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> ClipGradNorm:
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
      max_norm: a number of at least 0.
      norm_type: any p of a vector norm, `math.inf` included.
      error_if_nonfinite: raise if the norm is nan or infinite. Inside jit it is a check of
        `jax.experimental.checkify`, which the jitted function must be wrapped in.

    Returns:
      A transformation whose state has the norm before clipping, as torch returns it: `state.total_norm`.

    Raises:
      RuntimeError: torch's, with `error_if_nonfinite`.
      TypeError: a sparse gradient.
    """
    _check_number("max_norm", max_norm)
    _check_number("norm_type", norm_type, at_least=-math.inf)
    return ClipGradNorm(max_norm, float(norm_type), error_if_nonfinite)


class ClipGradNorm(optax.GradientTransformationExtraArgs):
    """What `clip_grad_norm` makes. A `jopt.chain` asks it for the factor alone, which the step then multiplies by."""

    _arguments: tuple[Any, float, bool]

    def __new__(cls, max_norm: float | Array, p: float, error_if_nonfinite: bool) -> Self:
        def init(params: Tree) -> ClipState:
            dtypes = [jnp.finfo(x.dtype).dtype for x in jax.tree.leaves(params)]
            return ClipState(jnp.zeros((), _widest(dtypes) if dtypes else None))

        def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
            del params, extra
            factor, state = self.factor(updates, (), state)
            return scaled(updates, (factor,)), state

        self = super().__new__(cls, init, update)
        self._arguments = (max_norm, p, error_if_nonfinite)
        return self

    def __reduce__(self) -> Any:
        return ClipGradNorm, self._arguments

    def factor(self, updates: Tree, factors: Sequence[Array], state: ClipState) -> tuple[Array, ClipState]:
        """What gradients, that are still to be multiplied by the positive `factors`, are to be multiplied by then."""
        max_norm, p, error_if_nonfinite = self._arguments
        leaves = _dense("clip_grad_norm", updates)
        if not leaves:
            return jnp.ones_like(state.total_norm), ClipState(jnp.zeros_like(state.total_norm))
        if p < 0 and any(is_packed(x) for x in jax.tree.leaves(updates, is_leaf=is_packed)):
            raise ValueError(f"norm_type: {p} would see the zeros that fill a packed buffer; unpack first")
        norms = [vector_norm(x, p) for x in leaves]
        if p != 0:
            # The norm of the products is the product, rounding aside. The products would be arrays of their own.
            norms = scaled(norms, factors)
        norm = total_norm(norms, p)
        if error_if_nonfinite:
            _check_finite(norm, p)
        return clip_factor(norm, max_norm), ClipState(norm.astype(state.total_norm.dtype))


def scaled(grads: Tree, factors: Sequence[Array]) -> Tree:
    """The gradients times each factor, rounded after each."""

    return jax.tree.map(lambda g: numerics.scale(g, factors), grads)


def _check_finite(norm: Array, p: float) -> None:
    text = (
        f"The total norm of order {p} for gradients from `parameters` is non-finite, so it cannot be clipped. To "
        "disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
    )
    if isinstance(norm, Tracer):
        checkify.check(jnp.isfinite(norm), text)
    elif not jnp.isfinite(norm):
        raise RuntimeError(text)


def clip_grad_value(clip_value: float | Array) -> optax.GradientTransformationExtraArgs:
    """Clamp each element to [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_`; nan stays.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.clip_grad_value(0.5)
    >>> tx.update(jnp.array([-2.0, 0.25, 1.0]), tx.init(None))[0].tolist()
    [-0.5, 0.25, 0.5]
    """
    _check_number("clip_value", clip_value)

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
        del params, extra
        _dense("clip_grad_value", updates)
        clamp = lambda g: jnp.clip(g, -jnp.asarray(clip_value, g.dtype), jnp.asarray(clip_value, g.dtype))  # noqa: E731
        return jax.tree.map(clamp, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _check_number(name: str, value: Any, at_least: float = 0.0) -> None:
    if isinstance(value, Array):
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not float(value) >= at_least:
        raise ValueError(f"{name}: expected a number of at least {at_least}, found {value!r}")


def _dense(function: str, updates: Tree) -> list[Array]:
    for path, x in jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda x: isinstance(x, BCOO)):
        if isinstance(x, BCOO):
            raise TypeError(f"{function}: expected dense gradients, found BCOO at {jax.tree_util.keystr(path)}")
    return jax.tree.leaves(updates)
