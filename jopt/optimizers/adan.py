"""Adan (Xie et al. 2022, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models")."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.rule import Hyperparameter, Rule, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Adan(Rule):
    """Nesterov's momentum from the change of the gradient, over a second moment of both: see `adan`."""

    weight_decay: bool
    no_prox: bool

    hyperparameters = ("lr", "beta1", "beta2", "beta3", "eps", "weight_decay")
    tuples = {"betas": ("beta1", "beta2", "beta3")}
    limits = {
        **Adam.limits,
        "beta3": fraction("Invalid beta parameter at index 2: {}"),
    }
    real_only = True

    def init(self, h, param):
        return {name: t.zeros_like(param) for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")}

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False, "exp_avg_diff": True, "neg_pre_grad": True}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {"eps": h["eps"], "has_previous": xp.where(s["step"] > 0, 1.0, 0.0)}
        for name in ("beta1", "beta2", "beta3"):
            c |= {name: h[name], f"1-{name}": 1 - h[name]}
        c |= {
            "1/sqrt(bias_correction3)": 1 / xp.sqrt(1 - h["beta3"] ** step),
            "-step_size": -h["lr"] / (1 - h["beta1"] ** step),
            "-step_size_diff": -h["lr"] * h["beta2"] / (1 - h["beta2"] ** step),
            "decay": 1 - h["lr"] * h["weight_decay"],
            "1/proximal": 1 / (1 + h["lr"] * h["weight_decay"]),
        }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        diff = t.mul(t.add(state["neg_pre_grad"], grad), c["has_previous"])  # of the first gradient there is none
        m = t.add(t.mul(state["exp_avg"], c["beta1"]), grad, alpha=c["1-beta1"])
        d = t.add(t.mul(state["exp_avg_diff"], c["beta2"]), diff, alpha=c["1-beta2"])
        ahead = t.add(t.mul(diff, c["beta2"]), grad)
        v = t.addcmul(t.mul(state["exp_avg_sq"], c["beta3"]), ahead, ahead, c["1-beta3"])
        denom = t.add(t.mul(t.sqrt(v), c["1/sqrt(bias_correction3)"]), c["eps"])
        if self.weight_decay and self.no_prox:
            param = t.mul(param, c["decay"])
        param = t.addcdiv(param, m, denom, c["-step_size"])
        param = t.addcdiv(param, d, denom, c["-step_size_diff"])
        if self.weight_decay and not self.no_prox:
            param = t.mul(param, c["1/proximal"])
        # Never the old one; but XLA for GPUs writes in place only what is made from what it replaces.
        neg_pre_grad = t.where(c["has_previous"] > -1, -grad, state["neg_pre_grad"])
        return param, {"exp_avg": m, "exp_avg_sq": v, "exp_avg_diff": d, "neg_pre_grad": neg_pre_grad}


@optimizer
def adan(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.98, 0.92, 0.99),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    no_prox: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Adan: Adam with Nesterov's momentum, which it estimates by the change of the gradient.

    d = g - g_before (0 at the first);  u = g + beta2 d
    m <- beta1 m + (1 - beta1) g;  n <- beta2 n + (1 - beta2) d;  v <- beta3 v + (1 - beta3) u^2
    p <- (p - lr (m / (1 - beta1^t) + beta2 n / (1 - beta2^t)) / (sqrt(v) / sqrt(1 - beta3^t) + eps))
         / (1 + lr * weight_decay), or with no_prox p * (1 - lr * weight_decay) first.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adan(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    The betas are decays, as in the authors' code; the paper writes 1 minus them. The authors' `max_grad_norm` is
    `jopt.clip_grad_norm` in front.

    State: `step`, `exp_avg`, `exp_avg_sq`, `exp_avg_diff`, `neg_pre_grad`. Source: Xie et al. 2022; the authors'
    adan.py (sail-sg/Adan).
    """
    return transform(
        Adan,
        dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox),
        **options,
    )
