"""Adamax (torch/optim/adamax.py, `_single_tensor_adamax`; Kingma & Ba 2015, section 7.1)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.optimizers.common import decay, regularize
from jopt.rule import Hyperparameter, Rule
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Adamax(Rule):
    """Adam with the infinity norm: see `adamax`."""

    weight_decay: bool
    maximize: bool

    hyperparameters = Adam.hyperparameters
    tuples = Adam.tuples
    limits = Adam.limits

    def init(self, h, param):
        return {"exp_avg": t.zeros_like(param), "exp_inf": t.zeros_like(param)}

    def signs(self):
        return {"exp_avg": True, "exp_inf": False}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {"decay": decay(self, h), "beta2": h["beta2"], "eps": h["eps"]}
        return c | {"1-beta1": 1 - h["beta1"], "-clr": -h["lr"] / (1 - h["beta1"] ** step)}, {"step": step}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        exp_avg = t.lerp(state["exp_avg"], grad, c["1-beta1"])
        exp_inf = t.maximum(t.mul(state["exp_inf"], c["beta2"]), t.add(t.absolute(grad), c["eps"]))
        return t.addcdiv(param, exp_avg, exp_inf, c["-clr"]), {"exp_avg": exp_avg, "exp_inf": exp_inf}


@optimizer
def adamax(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Adamax, as `torch.optim.Adamax`: Adam with the infinity norm; eps beside |g|, none in the denominator.

    With g = grad + weight_decay * p:  m <- m + (1 - beta1) (g - m);  u <- max(beta2 * u, |g| + eps)
    p <- p - lr / (1 - beta1^t) * m / u

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adamax(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `exp_avg`, `exp_inf`. Source: torch/optim/adamax.py; Kingma & Ba 2015, section 7.1.
    """
    arguments = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    return transform(
        Adamax,
        arguments,
        **options,
    )
