"""Momentum as a running average, for which torch has no name."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Rule, at_least_zero, fraction


@dataclasses.dataclass(frozen=True)
class Momentum(Rule):
    r"""The gradient's running average, on request divided by the root of its square's; no bias correction.

    m = beta * m + (1 - beta) * g;  p = p - lr * m
    with beta2:  v = beta2 * v + (1 - beta2) * g^2;  p = p - lr * m / (sqrt(v) + eps)
    """

    scaled: bool

    hyperparameters = ("lr", "beta", "beta2", "eps")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "beta": fraction("Invalid beta value: {}"),
        "beta2": fraction("Invalid beta2 value: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
    }

    def init(self, h, param):
        return {name: jnp.zeros_like(param) for name in ["exp_avg"] + ["exp_avg_sq"] * self.scaled}

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
