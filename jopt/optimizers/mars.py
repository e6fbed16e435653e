"""MARS-AdamW (Yuan et al. 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large Models")."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.rule import Hyperparameter, Rule, at_least_zero, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Mars(Rule):
    """AdamW on a gradient that is corrected by its change from the last step: see `mars`."""

    amsgrad: bool
    optimize_1d: bool

    hyperparameters = (
        *("lr", "beta1", "beta2", "eps", "weight_decay", "gamma"),
        *("lr_1d", "beta1_1d", "beta2_1d", "weight_decay_1d"),
    )
    tuples = {"betas": ("beta1", "beta2"), "betas_1d": ("beta1_1d", "beta2_1d")}
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
        "beta1": fraction("Invalid beta parameter at index 0: {}"),
        "beta2": fraction("Invalid beta parameter at index 1: {}"),
        "beta1_1d": fraction("Invalid beta_1d parameter at index 0: {}"),
        "beta2_1d": fraction("Invalid beta_1d parameter at index 1: {}"),
    }
    scope = "tensor"
    real_only = True

    def init(self, h, param):
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.amsgrad
        return {name: t.zeros_like(param) for name in names + ["last_grad"] * self._corrects(param)}

    def _corrects(self, param):
        return self.optimize_1d or param.ndim == 2

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False, "last_grad": True}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {"correction": h["gamma"] * h["beta1"] / (1 - h["beta1"]), "eps": h["eps"]}
        for suffix in ("", "_1d"):
            lr, beta1, beta2, weight_decay = (h[name + suffix] for name in ("lr", "beta1", "beta2", "weight_decay"))
            c |= {
                "-lr" + suffix: -lr,
                "weight_decay" + suffix: weight_decay,
                "beta1" + suffix: beta1,
                "1-beta1" + suffix: 1 - beta1,
                "beta2" + suffix: beta2,
                "1-beta2" + suffix: 1 - beta2,
                "bias_correction1" + suffix: 1 - beta1**step,
                "1/sqrt(bias_correction2)" + suffix: 1 / xp.sqrt(1 - beta2**step),
            }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        new = {}
        if "last_grad" in state:
            new["last_grad"] = grad
            grad = t.add(t.mul(t.add(grad, -state["last_grad"]), c["correction"]), grad)
            grad = t.div(grad, t.maximum(t.norm(grad), 1).astype(grad.dtype))
        else:
            c = {name: c.get(name + "_1d", x) for name, x in c.items()}
        new["exp_avg"] = t.add(t.mul(state["exp_avg"], c["beta1"]), grad, alpha=c["1-beta1"])
        new["exp_avg_sq"] = v = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), grad, grad, c["1-beta2"])
        if self.amsgrad:
            new["max_exp_avg_sq"] = v = t.maximum(state["max_exp_avg_sq"], v)
        denom = t.mul(t.add(t.mul(t.sqrt(v), c["1/sqrt(bias_correction2)"]), c["eps"]), c["bias_correction1"])
        direction = t.add(t.mul(param, c["weight_decay"]), t.div(new["exp_avg"], denom))
        return t.add(param, t.mul(direction, c["-lr"])), new


@optimizer
def mars(
    lr: Hyperparameter = 3e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.99),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    amsgrad: bool = False,
    gamma: Hyperparameter = 0.025,
    optimize_1d: bool = False,
    lr_1d: Hyperparameter = 3e-3,
    betas_1d: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.95),
    weight_decay_1d: Hyperparameter = 0.1,
    **options: Unpack[Options],
) -> Transform:
    """MARS-AdamW, which torch has not: AdamW on gradients corrected by their change from the last step.

    c = g + gamma * beta1 / (1 - beta1) * (g - g_before);  c <- c / max(1, |c|)
    m <- beta1 m + (1 - beta1) c;  v <- beta2 v + (1 - beta2) c^2
    p <- p - lr * (weight_decay * p + m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps))
    Parameters that are no matrices take c = g with lr_1d, betas_1d and weight_decay_1d, unless optimize_1d. The
    authors' code scales lr_1d with a scheduled lr; here each has a schedule of its own.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.mars(lr=0.1, optimize_1d=True)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `exp_avg`, `exp_avg_sq`, `last_grad`, with amsgrad `max_exp_avg_sq`.
    Source: Yuan et al. 2024, algorithm 2 with the approximate gradient; the authors' `mars.py` ("mars-adamw").
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        gamma=gamma,
        optimize_1d=optimize_1d,
        lr_1d=lr_1d,
        betas_1d=betas_1d,
        weight_decay_1d=weight_decay_1d,
    )
    return transform(
        Mars,
        arguments,
        **options,
    )
