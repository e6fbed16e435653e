"""Loss scaling as torch.amp.GradScaler does it, and steps that are skipped where a gradient is not finite.

Source: torch/amp/grad_scaler.py, aten/src/ATen/native/cpu/AmpGradScalerKernels.cpp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jopt import numerics
from jopt.around import chaining
from jopt.around.clip import ClipState, ClipValueState, scaled
from jopt.around.groups import GroupsState
from jopt.around.monitor import MonitorState
from jopt.transform import P, S, State, keep
from jopt.valued import by_value

Tree = Any


def all_finite(tree: Tree) -> Array:
    """Whether every element of every array is finite; in one pass, which XLA merges with others."""
    # x - x is 0 for what is finite, else nan: a sum, unlike a reduction by `and`, is vectorized on CPU.
    inexact = [x for x in map(jnp.asarray, jax.tree.leaves(tree)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    checks = [jnp.isfinite(jnp.sum(x - x)) for x in inexact]
    return functools.reduce(jnp.logical_and, checks, jnp.asarray(True))


class ScaleState(NamedTuple):
    """`scale`, float32; `growth_tracker`, int32: the steps since the last change; `found_inf`: whether the last
    step was skipped."""

    scale: Array
    growth_tracker: Array
    found_inf: Array


@by_value
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LossScale:
    """What `jopt.loss_scale` makes: pure functions of a `ScaleState`."""

    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int

    def init(self) -> ScaleState:
        return ScaleState(jnp.asarray(self.init_scale, jnp.float32), jnp.zeros((), jnp.int32), jnp.asarray(False))

    def scale(self, loss: Array, state: ScaleState) -> Array:
        """The loss to differentiate: loss * scale, in float32 or wider."""
        dtype = numerics.compute_dtype(loss.dtype)
        return loss.astype(dtype) * state.scale.astype(dtype)

    def unscale(self, grads: Tree, state: ScaleState) -> tuple[Tree, Array]:
        """(grads / scale, whether one of them is not finite). Gradients of float16 lose digits, as in torch, which
        refuses them: keep the parameters in float32 and cast them in the loss."""
        return scaled(grads, (self._inverse(state),)), jnp.logical_not(all_finite(grads))

    def _inverse(self, state: ScaleState) -> Array:
        return numerics.in_double(lambda _, scale: 1 / scale, (), state.scale, dtype=jnp.float32)

    def update(self, found_inf: Array, state: ScaleState) -> ScaleState:
        """The next scale: backed off if something was not finite, grown after `growth_interval` good steps."""
        successful = state.growth_tracker + 1
        grows = successful == self.growth_interval
        grown = state.scale * jnp.float32(self.growth_factor)
        good = jnp.where(grows & jnp.isfinite(grown), grown, state.scale)
        return ScaleState(
            jnp.where(found_inf, state.scale * jnp.float32(self.backoff_factor), good),
            jnp.where(found_inf | grows, 0, successful),
            found_inf,
        )

    def step(
        self,
        tx: optax.GradientTransformation,
        grads: Tree,
        state: S,
        params: P,
        scale: ScaleState,
        **extra_args: Any,
    ) -> tuple[P, S, ScaleState]:
        """`scaler.step(optimizer); scaler.update()`: unscale, step or skip, and adapt the scale.

        A skipped step keeps parameters and optimizer state; the count that drives schedules goes on, as a scheduler
        does in torch's usual loop, which steps it after `scaler.update()` in any case (in what optax's transformations
        wrap it does not: they count themselves). Clip inside `tx`
        (`jopt.chain(jopt.clip_grad_norm(1.0), ...)`): it sees unscaled gradients.

        Returns:
          `(params, state, scale)`.
        """
        grads = chaining.without(chaining.frozen(tx, params), params, grads)
        found_inf = jnp.logical_not(all_finite(grads))
        factors = (self._inverse(scale),)
        params, state = chaining.step(tx, grads, state, params, factors=factors, skip=found_inf, **extra_args)
        return params, _counted(state, found_inf), self.update(found_inf, scale)


def loss_scale(
    init_scale: float = 2.0**16, growth_factor: float = 2.0, backoff_factor: float = 0.5, growth_interval: int = 2000
) -> LossScale:
    """A loss scale that adapts, as `torch.amp.GradScaler` with the same arguments and defaults.

    >>> import jax, jax.numpy as jnp, jopt
    >>> scaler, tx = jopt.loss_scale(init_scale=4.0), jopt.sgd(lr=0.5)
    >>> params = jnp.ones(2)
    >>> state, scale = tx.init(params), scaler.init()
    >>> @jax.jit
    ... def train_step(params, state, scale, x):
    ...     loss = lambda p: jnp.sum(p.astype(jnp.float16) * x)
    ...     grads = jax.grad(lambda p: scaler.scale(loss(p), scale))(params)
    ...     return scaler.step(tx, grads, state, params, scale)
    >>> params, state, scale = train_step(params, state, scale, jnp.ones(2, jnp.float16))
    >>> params, state, scale = train_step(params, state, scale, jnp.full(2, jnp.inf, jnp.float16))
    >>> params.tolist(), scale.scale.item(), scale.found_inf.item()
    ([0.5, 0.5], 2.0, True)

    Raises:
      ValueError: a growth_factor of at most 1, a backoff_factor of at least 1, or growth_interval below 1.
    """
    if not growth_factor > 1.0:
        raise ValueError("The growth factor must be > 1.0.")
    if not backoff_factor < 1.0:
        raise ValueError("The backoff factor must be < 1.0.")
    if growth_interval < 1:
        raise ValueError(f"growth_interval: expected at least 1, found {growth_interval!r}")
    if not init_scale > 0:
        raise ValueError(f"init_scale: expected a number greater than 0, found {init_scale!r}")
    return LossScale(float(init_scale), float(growth_factor), float(backoff_factor), int(growth_interval))


def _counted(state: Any, skipped: Array) -> Any:
    """A state in which the counts that drive schedules went on, though the step was skipped."""
    if isinstance(state, State | ClipState | ClipValueState):
        return state._replace(count=jnp.where(skipped, optax.safe_increment(state.count), state.count))
    if isinstance(state, GroupsState | MonitorState | SkipState):
        return type(state)(*(_counted(x, skipped) for x in state))
    return tuple(_counted(x, skipped) for x in state) if type(state) is tuple else state


class SkipState(NamedTuple):
    """The transformation's own state, and how many steps were skipped, int32."""

    inner: Any
    skipped: Array


class Skipping(chaining.Around[SkipState]):
    """What `jopt.skip_nonfinite` makes."""

    def __new__(cls, tx: optax.GradientTransformation) -> Self:
        def init(params: Tree) -> SkipState:
            return SkipState(tx.init(params), jnp.zeros((), jnp.int32))

        def update(updates: Tree, state: SkipState, params: Tree | None = None, **extra: Any) -> Any:
            seen = updates if params is None else chaining.without(self.frozen(params), params, updates)
            bad = jnp.logical_not(all_finite(seen))
            new, inner = optax.with_extra_args_support(tx).update(updates, state.inner, params, **extra)
            new = keep(bad, jax.tree.map(jnp.zeros_like, new), new)
            return new, SkipState(keep(bad, state.inner, inner), state.skipped + bad.astype(jnp.int32))

        self = super().__new__(cls, init, update)  # type: ignore[arg-type]
        self._tx, self._arguments = tx, (tx,)
        return self

    def step(
        self,
        grads: Tree,
        state: SkipState,
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
        **extra_args: Any,
    ) -> tuple[P, SkipState]:
        """One step, or none: as `Transform.step`. What is frozen or not `active` is not looked at."""
        grads = chaining.without(self.frozen(params), params, grads)
        bad = jnp.logical_not(all_finite(chaining.of_active(active, grads, params)))
        params, inner = chaining.step(
            self._tx,
            grads,
            state.inner,
            params,
            active=active,
            factors=factors,
            skip=bad if skip is None else bad | skip,
            **extra_args,
        )
        return params, SkipState(inner, keep(skip, state.skipped, state.skipped + bad.astype(jnp.int32)))


def skip_nonfinite(tx: optax.GradientTransformation) -> Skipping:
    """`tx`, but where a gradient has a nan or an infinity the step changes nothing, and is counted.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.skip_nonfinite(jopt.adamw(lr=0.1))
    >>> params = jnp.ones(2)
    >>> params, state = tx.step(jnp.array([jnp.nan, 1.0]), tx.init(params), params)
    >>> params.tolist(), state.skipped.item(), state.inner.count.item()
    ([1.0, 1.0], 1, 0)

    Raises:
      TypeError: `tx` is no gradient transformation.
    """
    if not chaining.is_transformation(tx):
        raise TypeError(f"tx: expected a gradient transformation, found {type(tx).__name__}")
    return Skipping(tx)
