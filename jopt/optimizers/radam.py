"""RAdam (torch/optim/radam.py, `_single_tensor_radam`; Liu et al. 2020)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.optimizers.common import decay, moments, regularize
from jopt.rule import Hyperparameter, Rule
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class RAdam(Rule):
    """Adam whose second moment sets in once its variance is known; eps beside the raw sqrt(v): see `radam`."""

    weight_decay: bool
    maximize: bool
    decoupled_weight_decay: bool

    hyperparameters = Adam.hyperparameters
    tuples = Adam.tuples
    limits = Adam.limits

    def init(self, h, param):
        return {"exp_avg": t.zeros_like(param), "exp_avg_sq": t.zeros_like(param)}

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        bias_correction2 = 1 - h["beta2"] ** step
        rho_inf = 2 / (1 - h["beta2"]) - 1
        rho = rho_inf - 2 * step * h["beta2"] ** step / bias_correction2
        rectified = rho > 5
        # Elsewhere the root has no real value, nor its derivative: put a harmless 6 under it.
        r, r_inf = xp.where(rectified, rho, 6.0), xp.where(rectified, rho_inf, 6.0)
        c = {
            "decay": decay(self, h),
            "1-beta1": 1 - h["beta1"],
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "1/bias_correction1": 1 / (1 - h["beta1"] ** step),
            "sqrt(bias_correction2)": xp.sqrt(bias_correction2),
            "eps": h["eps"],
            "lr": h["lr"],
            "rect": xp.sqrt((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r)),
            "rectified": xp.where(rectified, 1.0, 0.0),
        }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        exp_avg, exp_avg_sq = moments(c, grad, state)
        plain = t.mul(t.mul(exp_avg, c["1/bias_correction1"]), c["lr"])
        denom = t.add(t.sqrt(exp_avg_sq), c["eps"])
        denom = t.where(c["rectified"] != 0, denom, t.ones_like(denom))  # 0 with an eps of 0: its derivative is nan
        adaptive = t.mul(t.reciprocal(denom), c["sqrt(bias_correction2)"])
        rectified = t.mul(t.mul(plain, adaptive), c["rect"])
        param = t.add(param, -t.where(c["rectified"] != 0, rectified, plain))
        return param, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@optimizer
def radam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """RAdam, as `torch.optim.RAdam`: Adam without its second moment until that has enough samples.

    rho_inf = 2 / (1 - beta2) - 1;  rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
    With g, m and v as in `adam`, m' = m / (1 - beta1^t):
    rho_t > 5:  p <- p - lr * m' * r_t * sqrt(1 - beta2^t) / (sqrt(v) + eps), eps beside the raw root,
                r_t = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))
    else:       p <- p - lr * m'

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.radam(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.8

    State: `step`, `exp_avg`, `exp_avg_sq`. Source: torch/optim/radam.py; Liu et al. 2020.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    return transform(
        RAdam,
        arguments,
        **options,
    )
