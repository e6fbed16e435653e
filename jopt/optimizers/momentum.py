"""Momentum as a running average, for which torch has no name."""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

from jopt import numerics as t
from jopt.rule import Hyperparameter, Rule, at_least_zero, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Momentum(Rule):
    """The gradient's running average, on request over the root of its square's: see `momentum`."""

    scaled: bool

    hyperparameters = ("lr", "beta", "beta2", "eps")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "beta": fraction("Invalid beta value: {}"),
        "beta2": fraction("Invalid beta2 value: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
    }

    def init(self, h, param):
        return {name: t.zeros_like(param) for name in ["exp_avg"] + ["exp_avg_sq"] * self.scaled}

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False}

    def init_scalars(self, h):
        return {}

    def scalars(self, h, s, xp, stored):
        c = {"-lr": -h["lr"], "beta": h["beta"], "1-beta": 1 - h["beta"]}
        if self.scaled:
            c |= {"beta2": h["beta2"], "1-beta2": 1 - h["beta2"], "eps": h["eps"]}
        return c, s

    def update(self, c, grad, state, param):
        exp_avg = t.add(t.mul(state["exp_avg"], c["beta"]), grad, alpha=c["1-beta"])
        if not self.scaled:
            return t.add(param, exp_avg, alpha=c["-lr"]), {"exp_avg": exp_avg}
        exp_avg_sq = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), grad, grad, c["1-beta2"])
        denom = t.add(t.sqrt(exp_avg_sq), c["eps"])
        return t.addcdiv(param, exp_avg, denom, c["-lr"]), {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@optimizer
def momentum(
    lr: Hyperparameter,
    beta: Hyperparameter = 0.9,
    beta2: Hyperparameter | None = None,
    eps: Hyperparameter = 1e-8,
    **options: Unpack[Options],
) -> Transform:
    """Momentum as a running average, without bias correction; torch has no name for it.

    m <- beta * m + (1 - beta) * grad;  p <- p - lr * m
    or with beta2:  v <- beta2 * v + (1 - beta2) * grad^2;  p <- p - lr * m / (sqrt(v) + eps)

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.momentum(lr=1.0, beta=0.5)
    >>> params = jnp.array([1.0])
    >>> tx.step(jnp.array([1.0]), tx.init(params), params)[0].item()
    0.5

    State: `exp_avg`, with beta2 `exp_avg_sq`.
    """
    arguments: dict[str, Any] = dict(lr=lr, beta=beta, scaled=beta2 is not None)
    if beta2 is not None:
        arguments |= dict(beta2=beta2, eps=eps)
    return transform(
        Momentum,
        arguments,
        **options,
    )
