"""Adam and AdamW (torch/optim/adam.py, `_single_tensor_adam`; Kingma & Ba 2015, Loshchilov & Hutter 2019)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Rule, at_least_zero, fraction
from jopt.rules.common import decay, moments, regularize


@dataclasses.dataclass(frozen=True)
class Adam(Rule):
    r"""Adam, with L2 or decoupled weight decay, and AMSGrad.

    g = grad + weight_decay * p, or, decoupled, p = p * (1 - lr * weight_decay)
    m = lerp(m, g, 1 - beta1);  v = beta2 * v + (1 - beta2) * g^2;  amsgrad: v_max = max(v_max, v)
    p = p - lr / (1 - beta1^t) * m / (sqrt(v or v_max) / sqrt(1 - beta2^t) + eps)
    """

    weight_decay: bool
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool

    hyperparameters = ("lr", "beta1", "beta2", "eps", "weight_decay")
    tuples = {"betas": ("beta1", "beta2")}
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
        "beta1": fraction("Invalid beta parameter at index 0: {}"),
        "beta2": fraction("Invalid beta parameter at index 1: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
    }

    def init(self, h, param):
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.amsgrad
        return {name: jnp.zeros_like(param) for name in names}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {
            "decay": decay(self, h),
            "1-beta1": 1 - h["beta1"],
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "1/sqrt(bias_correction2)": 1 / xp.sqrt(1 - h["beta2"] ** step),
            "eps": h["eps"],
            "-step_size": -h["lr"] / (1 - h["beta1"] ** step),
        }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        exp_avg, exp_avg_sq = moments(c, grad, state)
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if self.amsgrad:
            new["max_exp_avg_sq"] = exp_avg_sq = jnp.maximum(state["max_exp_avg_sq"], exp_avg_sq)
        denom = t.add(t.mul(t.sqrt(exp_avg_sq), c["1/sqrt(bias_correction2)"]), c["eps"])
        return t.addcdiv(param, exp_avg, denom, c["-step_size"]), new
