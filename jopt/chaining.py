"""Transformations one after the other, with the exact step of the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jopt.clip import ClipGradNorm, scaled
from jopt.transform import Exact, P, Transform

Tree = Any


def is_transformation(x: Any) -> bool:
    return isinstance(x, tuple) and callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))


class Chain(Exact[tuple[Any, ...]]):
    """`jopt.chain`'s transformation: optax's chain, and a `step` whose last link takes its exact one."""

    transforms: tuple[optax.GradientTransformation, ...]

    def __new__(cls, *transforms: optax.GradientTransformation) -> Self:
        whole = optax.chain(*transforms)
        self = super().__new__(cls, whole.init, optax.with_extra_args_support(whole).update)
        self.transforms = transforms
        return self

    def __reduce__(self) -> Any:
        return Chain, self.transforms

    def step(
        self,
        grads: Tree,
        state: tuple[Any, ...],
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        **extra: Any,
    ) -> tuple[P, tuple[Any, ...]]:
        """One step: the new parameters and state. `active`, `factors` and, for optax's links, `extra` go to the links.

        Raises:
          What the links raise; ValueError if the state is not of this chain.
        """
        if not isinstance(state, tuple) or len(state) != len(self.transforms):
            raise ValueError(f"state: expected the {len(self.transforms)} states of this chain, found {state!r:.80}")
        new = []
        for tx, s in zip(self.transforms[:-1], state, strict=False):
            if isinstance(tx, ClipGradNorm):
                # Multiplied by in the pass of the step: the clipped gradients would be arrays of their own.
                factor, s = tx.factor(grads, factors, s)
                factors = (*factors, factor)
            else:
                grads, factors = scaled(grads, factors), ()
                grads, s = optax.with_extra_args_support(tx).update(grads, s, cast(Any, params), **extra)
            new.append(s)
        params, last = step(self.transforms[-1], grads, state[-1], params, active=active, factors=factors, **extra)
        return params, (*new, last)


def chain(*transforms: optax.GradientTransformation) -> Chain:
    """Transformations one after the other, as `optax.chain`, with an exact `step`.

    `tx.step(grads, state, params)` takes the gradients through all but the last, which steps: exactly if it is jopt's.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.chain(jopt.clip_grad_value(0.1), jopt.adamw(lr=1e-2))
    >>> params, state = tx.step(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2))

    Raises:
      ValueError: no transformation.
      TypeError: something that is none.
    """
    if not transforms:
        raise ValueError("chain: expected at least one transformation, found none")
    for i, tx in enumerate(transforms):
        if not is_transformation(tx):
            raise TypeError(f"chain: expected gradient transformations, found {tx!r:.80} at position {i}")
    return Chain(*transforms)


def takes_extra_args(tx: Any) -> bool:
    """Whether a step's further arguments are for it."""
    return isinstance(tx, optax.GradientTransformationExtraArgs) and not isinstance(tx, Transform)


def step(
    tx: optax.GradientTransformation,
    grads: Tree,
    state: Any,
    params: Tree,
    *,
    active: Tree | None = None,
    factors: Sequence[Array] = (),
    **extra: Any,
) -> tuple[Tree, Any]:
    """A transformation's exact `step` if it has one, else its update, applied; what is not `active` is kept."""
    if isinstance(tx, Exact):
        return tx.step(grads, state, params, active=active, factors=factors, **(extra if takes_extra_args(tx) else {}))
    updates, new_state = optax.with_extra_args_support(tx).update(scaled(grads, factors), state, params, **extra)
    new = optax.apply_updates(params, updates)
    if active is not None:
        new = jax.tree.map(jnp.where, active, new, params)
    return new, new_state
