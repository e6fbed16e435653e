"""A learning rate that falls when a metric has stopped improving, as torch's ReduceLROnPlateau.

Source: torch/optim/lr_scheduler.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jopt import numerics
from jopt.valued import by_value

NAMES = ("lr", "learning_rate")  # jopt's and optax's name of it in a state's hyperparameters


class PlateauState(NamedTuple):
    """torch's attributes: `best`, float32; `num_bad_epochs` and `cooldown_counter`, int32."""

    best: Array
    num_bad_epochs: Array
    cooldown_counter: Array


@by_value
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plateau:
    """What `jopt.reduce_lr_on_plateau` makes: pure, jittable `init` and `step`."""

    mode: str
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    cooldown: int
    min_lr: float | tuple[float, ...]
    eps: float

    def init(self) -> PlateauState:
        zero = jnp.zeros((), jnp.int32)
        return PlateauState(jnp.asarray(math.inf if self.mode == "min" else -math.inf, jnp.zeros(()).dtype), zero, zero)

    def step(self, metric: Any, plateau: PlateauState, state: Any) -> tuple[PlateauState, Any]:
        """`scheduler.step(metric)`: the next counters, and the optimizer's state with its new learning rates.

        Raises:
          ValueError: no learning rate in the state, one that a schedule sets, or not one min_lr for each.
        """
        if scheduled := [x for x in jax.tree.leaves(state, is_leaf=_schedules_lr) if _schedules_lr(x)]:
            raise ValueError(
                f"state: found a learning rate that a schedule sets in {type(scheduled[0]).__name__}, which would undo "
                "each reduction; give a number as lr, and for a warm-up set state.hyperparams['lr']"
            )
        nodes = [x for x in jax.tree.leaves(state, is_leaf=_keeps_lr) if _keeps_lr(x)]
        if not nodes:
            raise ValueError(
                "state: expected a learning rate among its hyperparameters, found none; make the optimizer with "
                "hyperparams_in_state=True (optax's with optax.inject_hyperparams)"
            )
        floors = self.min_lr if isinstance(self.min_lr, tuple) else (self.min_lr,) * len(nodes)
        if len(floors) != len(nodes):
            raise ValueError(f"expected {len(nodes)} min_lrs, got {len(floors)}")

        def judge(_: Any, numbers: Any) -> tuple[Array, list[Array]]:
            metric, best, lrs = numbers
            sign = -1.0 if self.mode == "min" else 1.0
            if self.threshold_mode == "rel":
                bound = best * (1.0 + sign * self.threshold)
            else:
                bound = best + sign * self.threshold
            better = metric < bound if self.mode == "min" else metric > bound
            lower = [jnp.maximum(lr * self.factor, floor) for lr, floor in zip(lrs, floors, strict=True)]
            return better, [jnp.where(lr - new > self.eps, new, lr) for lr, new in zip(lrs, lower, strict=True)]

        metric = jnp.asarray(metric, plateau.best.dtype)
        lrs = [_lr(node) for node in nodes]
        better, lower = numerics.in_double(judge, (), (metric, plateau.best, lrs), dtype=plateau.best.dtype)
        better = better != 0
        cooling = plateau.cooldown_counter > 0
        bad = jnp.where(better | cooling, 0, plateau.num_bad_epochs + 1)
        reduces = bad > self.patience
        new = PlateauState(
            jnp.where(better, metric, plateau.best),
            jnp.where(reduces, 0, bad),
            jnp.where(reduces, self.cooldown, plateau.cooldown_counter - cooling.astype(jnp.int32)),
        )
        values = iter([jnp.where(reduces, y.astype(x.dtype), x) for x, y in zip(lrs, lower, strict=True)])
        put = lambda x: _with_lr(x, next(values)) if _keeps_lr(x) else x  # noqa: E731
        return new, jax.tree.map(put, state, is_leaf=_keeps_lr)


def _keeps_lr(x: Any) -> bool:
    return hasattr(x, "hyperparams") and any(name in x.hyperparams for name in NAMES)


def _schedules_lr(x: Any) -> bool:
    """Of jopt's states and of `optax.inject_hyperparams`."""
    return any(name in getattr(x, field, ()) for name in NAMES for field in ("scheduled", "hyperparams_states"))


def _lr(node: Any) -> Array:
    return next(node.hyperparams[name] for name in NAMES if name in node.hyperparams)


def _with_lr(node: Any, lr: Array) -> Any:
    name = next(name for name in NAMES if name in node.hyperparams)
    return node._replace(hyperparams={**node.hyperparams, name: lr})


def reduce_lr_on_plateau(
    mode: str = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: float | Sequence[float] = 0,
    eps: float = 1e-8,
) -> Plateau:
    """max(lr * factor, min_lr) after more than `patience` steps without improvement, as `ReduceLROnPlateau`.

    The arguments, defaults and counting are torch's. The learning rate lies in the optimizer's state; with
    `jopt.param_groups` there is one a group, and `min_lr` may be a sequence with one for each.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.sgd(lr=1.0, hyperparams_in_state=True)
    >>> state = tx.init(jnp.zeros(2))
    >>> scheduler = jopt.reduce_lr_on_plateau(factor=0.5, patience=1)
    >>> plateau = scheduler.init()
    >>> for validation_loss in (1.0, 0.9, 0.95, 0.95):
    ...     plateau, state = scheduler.step(validation_loss, plateau, state)
    >>> state.hyperparams["lr"].item()
    0.5

    Raises:
      ValueError: a factor of 1 or more, an unknown mode or threshold_mode.
    """
    if factor >= 1.0:
        raise ValueError("Factor should be < 1.0.")
    if mode not in ("min", "max"):
        raise ValueError(f"mode {mode} is unknown!")
    if threshold_mode not in ("rel", "abs"):
        raise ValueError(f"threshold mode {threshold_mode} is unknown!")
    floors = float(min_lr) if isinstance(min_lr, int | float) else tuple(map(float, min_lr))
    return Plateau(mode, factor, patience, threshold, threshold_mode, cooldown, floors, eps)
