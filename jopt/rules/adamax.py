"""Adamax (torch/optim/adamax.py, `_single_tensor_adamax`; Kingma & Ba 2015, section 7.1)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Rule
from jopt.rules.adam import Adam
from jopt.rules.common import decay, regularize


@dataclasses.dataclass(frozen=True)
class Adamax(Rule):
    r"""Adam with the infinity norm.

    g = grad + weight_decay * p;  m = lerp(m, g, 1 - beta1)
    u = max(beta2 * u, |g| + eps);  p = p - lr / (1 - beta1^t) * m / u
    """

    weight_decay: bool
    maximize: bool

    hyperparameters = Adam.hyperparameters
    tuples = Adam.tuples
    limits = Adam.limits

    def init(self, h, param):
        return {"exp_avg": jnp.zeros_like(param), "exp_inf": jnp.zeros_like(param)}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {"decay": decay(self, h), "beta2": h["beta2"], "eps": h["eps"]}
        return c | {"1-beta1": 1 - h["beta1"], "-clr": -h["lr"] / (1 - h["beta1"] ** step)}, {"step": step}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        exp_avg = t.lerp(state["exp_avg"], grad, c["1-beta1"])
        exp_inf = jnp.maximum(t.mul(state["exp_inf"], c["beta2"]), t.add(t.absolute(grad), c["eps"]))
        return t.addcdiv(param, exp_avg, exp_inf, c["-clr"]), {"exp_avg": exp_avg, "exp_inf": exp_inf}
