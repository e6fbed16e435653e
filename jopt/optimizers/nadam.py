"""NAdam (torch/optim/nadam.py, `_single_tensor_nadam`; Dozat 2016)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.optimizers.common import decay, moments, regularize
from jopt.rule import Hyperparameter, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class NAdam(Rule):
    """Adam with Nesterov momentum on a schedule of its own: see `nadam`."""

    weight_decay: bool
    maximize: bool
    decoupled_weight_decay: bool

    hyperparameters = (*Adam.hyperparameters, "momentum_decay")
    tuples = Adam.tuples
    limits = {**Adam.limits, "momentum_decay": at_least_zero("Invalid momentum_decay value: {}")}

    def init(self, h, param):
        return {"exp_avg": t.zeros_like(param), "exp_avg_sq": t.zeros_like(param)}

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False}

    def init_scalars(self, h):
        return {"step": 0.0, "mu_product": 1.0}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        mu = h["beta1"] * (1 - 0.5 * 0.96 ** (step * h["momentum_decay"]))
        mu_next = h["beta1"] * (1 - 0.5 * 0.96 ** ((step + 1) * h["momentum_decay"]))
        mu_product = stored(s["mu_product"] * stored(mu))
        c = {
            "decay": decay(self, h),
            "1-beta1": 1 - h["beta1"],
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "1/bias_correction2": 1 / (1 - h["beta2"] ** step),
            "eps": h["eps"],
            "grad weight": -h["lr"] * (1 - mu) / (1 - mu_product),
            "exp_avg weight": -h["lr"] * mu_next / (1 - mu_product * mu_next),
        }
        return c, {"step": step, "mu_product": mu_product}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        exp_avg, exp_avg_sq = moments(c, grad, state)
        denom = t.add(t.sqrt(t.mul(exp_avg_sq, c["1/bias_correction2"])), c["eps"])
        param = t.addcdiv(param, grad, denom, c["grad weight"])
        param = t.addcdiv(param, exp_avg, denom, c["exp_avg weight"])
        return param, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@optimizer
def nadam(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    momentum_decay: Hyperparameter = 4e-3,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """NAdam, as `torch.optim.NAdam`: Nesterov momentum on the schedule mu_t, which optax's nadam has not.

    mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2);  M_t = mu_1 ... mu_t, in float32 as torch keeps it
    With g = grad + weight_decay * p (or decoupled as in `adamw`), m and v as in `adam`,
    d = sqrt(v / (1 - beta2^t)) + eps:
    p <- p - lr * (1 - mu_t) / (1 - M_t) * g / d - lr * mu_{t+1} / (1 - M_t * mu_{t+1}) * m / d

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.nadam(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.89435

    State: `step`, `mu_product`, `exp_avg`, `exp_avg_sq`. Source: torch/optim/nadam.py; Dozat 2016.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        momentum_decay=momentum_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    return transform(
        NAdam,
        arguments,
        **options,
    )
