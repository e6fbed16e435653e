"""Gradient health: what each layer's gradients and updates look like, measured inside the compiled step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jopt import numerics
from jopt.arena import param_name
from jopt.around import chaining
from jopt.around.clip import scaled
from jopt.transform import P, check_params, difference, keep

Tree = Any


class Health(NamedTuple):
    """One step's figures, float32 vectors over the leaves in the order of `jax.tree.leaves`.

    Attributes:
      grad_norm, update_norm, param_norm: Euclidean norms of the gradient, of what the step added, of the parameter
        before it.
      zeros, nans, infs: shares of the gradient's elements, 0 to 1.
    """

    grad_norm: Array
    update_norm: Array
    param_norm: Array
    zeros: Array
    nans: Array
    infs: Array


class MonitorState(NamedTuple):
    """The transformation's own state, and the last step's `Health`; zeros before the first."""

    inner: Any
    health: Health


class Monitor(chaining.Around[MonitorState]):
    """What `jopt.monitor` makes."""

    def __new__(cls, tx: optax.GradientTransformation) -> Self:
        def init(params: Tree) -> MonitorState:
            zeros = jnp.zeros(len(jax.tree.leaves(params)), jnp.float32)
            return MonitorState(tx.init(params), Health(*(jnp.array(zeros) for _ in Health._fields)))

        def update(updates: Tree, state: MonitorState, params: Tree | None = None, **extra: Any) -> Any:
            check_params(params)
            new, inner = optax.with_extra_args_support(tx).update(updates, state.inner, params, **extra)
            return new, MonitorState(inner, _health(updates, new, params))

        self = super().__new__(cls, init, update)  # type: ignore[arg-type]
        self._tx, self._arguments = tx, (tx,)
        return self

    def step(
        self,
        grads: Tree,
        state: MonitorState,
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
        **extra_args: Any,
    ) -> tuple[P, MonitorState]:
        """One step of the transformation, measured: as `Transform.step`.

        A leaf without gradient, or that is not active, counts as zeros. What is frozen is measured as it comes.
        """
        new, inner = chaining.step(
            self._tx, grads, state.inner, params, active=active, factors=factors, skip=skip, **extra_args
        )
        seen = chaining.of_active(active, scaled(grads, factors), params)
        health = _health(seen, difference(new, params), params)
        return new, MonitorState(inner, keep(skip, state.health, health))


def monitor(tx: optax.GradientTransformation) -> Monitor:
    """`tx`, with each step's norms and shares of zeros, nans and infinities in the state.

    >>> import jax, jax.numpy as jnp, jopt
    >>> tx = jopt.monitor(jopt.sgd(lr=0.1))
    >>> params = {"dense": jnp.ones(4)}
    >>> params, state = jax.jit(tx.step)({"dense": jnp.full(4, 0.5)}, tx.init(params), params)
    >>> state.health.grad_norm.item(), round(state.health.update_norm.item(), 3)
    (1.0, 0.1)
    >>> print(jopt.health_report(state.health, params))  # doctest: +ELLIPSIS
    layer  gradient rms  ...

    Put it around everything else (`jopt.monitor(jopt.chain(...))`): it then sees the gradients as they come. The sums
    are part of the compiled step. Of a packed tree it sees the buffers.

    Raises:
      TypeError: `tx` is no gradient transformation.
    """
    if not chaining.is_transformation(tx):
        raise TypeError(f"tx: expected a gradient transformation, found {type(tx).__name__}")
    return Monitor(tx)


def _health(grads: Tree, updates: Tree, params: Tree) -> Health:
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        return Health(*(jnp.zeros(0, jnp.float32) for _ in Health._fields))
    grads, updates, leaves = (
        [_measured(x, p) for x, p in zip(xs, leaves, strict=True)]
        for xs in (treedef.flatten_up_to(grads), treedef.flatten_up_to(updates), leaves)
    )
    return _figures(grads, updates, leaves)


@functools.partial(jax.jit, inline=True)  # else an eager step would compile its branches anew each time
def _figures(grads: list[Array], updates: list[Array], leaves: list[Array]) -> Health:
    norms = [jnp.stack([_norm(x) for x in xs]) for xs in (grads, updates, leaves)]
    sizes = jnp.asarray([max(x.size, 1) for x in leaves], jnp.float32)

    # XLA on CPU vectorizes sums of signs, not of integers or comparisons. They are enough unless something is not
    # finite.
    def finite(grads: list[Array]) -> list[Array]:
        nonzero = jnp.stack([jnp.sum(jnp.abs(jnp.sign(g)).astype(jnp.float32)) for g in grads])
        return [(sizes - nonzero) / sizes, 0 * nonzero, 0 * nonzero]

    def not_finite(grads: list[Array]) -> list[Array]:
        questions = (lambda g: g == 0, jnp.isnan, jnp.isinf)
        return [jnp.stack([jnp.sum(q(g), dtype=jnp.float32) for g in grads]) / sizes for q in questions]

    return Health(*norms, *lax.cond(jnp.isfinite(norms[0]).all(), finite, not_finite, grads))


def _measured(x: Any, param: Any) -> Array:
    """What is measured: zeros for what has no gradient, one 0 for a parameter that has no norm (integers, keys)."""
    if not jnp.issubdtype(jnp.result_type(param), jnp.inexact):
        return jnp.zeros(())
    return jnp.zeros_like(param) if chaining.absent(x) else jnp.asarray(x)


def _norm(x: Array) -> Array:
    """In float32 at least: a bfloat16 norm would say little."""
    wide = jnp.abs(x).astype(numerics.compute_dtype(x.dtype))
    return jnp.sqrt(jnp.sum(wide * wide)).astype(jnp.float32)


# --- reading it --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """A leaf's figures. `grad_rms` is the gradient's norm over the root of its size; `update_ratio` the update's
    norm over the parameter's."""

    name: str
    size: int
    grad_rms: float
    update_ratio: float
    zeros: float
    nans: float
    infs: float


@dataclasses.dataclass(frozen=True)
class HealthReport:
    """Every layer's figures, and the names of those that stand out."""

    layers: tuple[Layer, ...]
    vanishing: tuple[str, ...]
    exploding: tuple[str, ...]

    def __str__(self) -> str:
        head = ("layer", "gradient rms", "update / param", "zeros", "nan", "inf", "")
        rows = [
            (
                x.name,
                f"{x.grad_rms:.2e}",
                f"{x.update_ratio:.2e}",
                *(f"{share:.1%}" for share in (x.zeros, x.nans, x.infs)),
                "vanishing" if x.name in self.vanishing else "exploding" if x.name in self.exploding else "",
            )
            for x in self.layers
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        )


def health_report(health: Health, params: Tree, *, vanishing: float = 1e-4, exploding: float = 1.0) -> HealthReport:
    """What `jopt.monitor` measured, by layer, on the host.

    A layer's gradient vanishes if its root mean square is below `vanishing` times the largest one of any layer, or 0. A
    layer explodes if its gradient has a nan or an infinity, or the step moved it by more than `exploding` times its own
    norm. Look after some steps: what began at 0, such as a bias, moves by more than its norm at first. Gradients that
    are tiny everywhere are not told from a small loss.

    Args:
      health: `state.health`.
      params: the tree that it was measured on; gives names and sizes.

    Raises:
      ValueError: `health` is of another number of leaves.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    columns = [np.asarray(x, np.float64) for x in health]
    if len(leaves) != len(columns[0]):
        raise ValueError(
            f"params: expected the tree that was measured, of {len(columns[0])} leaves, found {len(leaves)}"
        )
    layers = []
    for (path, leaf), grad, update, param, zeros, nans, infs in zip(leaves, *columns, strict=True):
        layers.append(
            Layer(
                param_name(path) or "params",
                leaf.size,
                float(grad / math.sqrt(max(leaf.size, 1))),
                float(update / param) if param else math.inf if update else 0.0,
                float(zeros),
                float(nans),
                float(infs),
            )
        )
    largest = max((x.grad_rms for x in layers if math.isfinite(x.grad_rms)), default=0.0)
    return HealthReport(
        tuple(layers),
        tuple(x.name for x in layers if x.grad_rms < vanishing * largest or x.grad_rms == 0),
        tuple(x.name for x in layers if x.nans or x.infs or exploding < x.update_ratio < math.inf),
    )
