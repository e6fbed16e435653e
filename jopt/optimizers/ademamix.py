"""AdEMAMix (Pagliardini et al. 2024, "The AdEMAMix Optimizer: Better, Faster, Older")."""

from __future__ import annotations

import dataclasses
import math
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.rule import Hyperparameter, Rule, at_least_zero, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class AdEMAMix(Rule):
    """AdamW with a second, slow momentum: see `ademamix`."""

    beta1: bool
    weight_decay: bool
    beta3_warmup: int | None
    alpha_warmup: int | None

    hyperparameters = ("lr", "beta1", "beta2", "beta3", "alpha", "eps", "weight_decay")
    tuples = {"betas": ("beta1", "beta2", "beta3")}
    limits = {
        **Adam.limits,
        "beta3": fraction("Invalid beta parameter at index 2: {}"),
        "alpha": at_least_zero("Invalid alpha value: {}"),
    }
    real_only = True

    def __post_init__(self):
        for name in ("beta3_warmup", "alpha_warmup"):
            steps = getattr(self, name)
            if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
                raise ValueError(f"{name}: expected a number of steps of at least 1, or None; found {steps!r}")

    def init(self, h, param):
        names = ["exp_avg_fast"] * self.beta1 + ["exp_avg_slow", "exp_avg_sq"]
        return {name: t.zeros_like(param) for name in names}

    def signs(self):
        return {"exp_avg_fast": True, "exp_avg_slow": True, "exp_avg_sq": False}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        alpha, beta3 = h["alpha"], h["beta3"]
        if self.alpha_warmup is not None:
            done = step / self.alpha_warmup
            alpha = xp.where(done < 1, done * alpha, alpha)
        if self.beta3_warmup is not None:
            done = step / self.beta3_warmup

            def half_life(beta):
                return math.log(0.5) / xp.log(beta + 1e-8) - 1

            mixed = (1 - done) * half_life(h["beta1"]) + done * half_life(beta3)
            beta3 = xp.where(done < 1, 0.5 ** (1 / (xp.where(done < 1, mixed, 0.0) + 1)), beta3)
        c = {
            "beta1": h["beta1"],
            "1-beta1": 1 - h["beta1"],
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "beta3": beta3,
            "1-beta3": 1 - beta3,
            "alpha": alpha,
            "1/bias_correction1": 1 / (1 - h["beta1"] ** step),
            "1/sqrt(bias_correction2)": 1 / xp.sqrt(1 - h["beta2"] ** step),
            "eps": h["eps"],
            "weight_decay": h["weight_decay"],
            "-lr": -h["lr"],
        }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        fast = t.add(t.mul(state["exp_avg_fast"], c["beta1"]), grad, alpha=c["1-beta1"]) if self.beta1 else grad
        slow = t.add(t.mul(state["exp_avg_slow"], c["beta3"]), grad, alpha=c["1-beta3"])
        v = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), grad, grad, c["1-beta2"])
        denom = t.add(t.mul(t.sqrt(v), c["1/sqrt(bias_correction2)"]), c["eps"])
        update = t.div(t.add(t.mul(fast, c["1/bias_correction1"]), t.mul(slow, c["alpha"])), denom)
        if self.weight_decay:
            update = t.add(update, param, alpha=c["weight_decay"])
        new = {"exp_avg_fast": fast} if self.beta1 else {}
        return t.add(param, t.mul(update, c["-lr"])), new | {"exp_avg_slow": slow, "exp_avg_sq": v}


@optimizer
def ademamix(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.9, 0.999, 0.9999),
    alpha: Hyperparameter = 2.0,
    beta3_warmup: int | None = None,
    alpha_warmup: int | None = None,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    **options: Unpack[Options],
) -> Transform:
    """AdEMAMix: AdamW whose momentum is mixed with a slow one, of tens of thousands of gradients.

    m1 <- beta1 m1 + (1 - beta1) g;  m2 <- beta3 m2 + (1 - beta3) g;  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr ((m1 / (1 - beta1^t) + alpha m2) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * p)
    alpha_warmup: alpha grows from 0 over so many steps; beta3_warmup: beta3 from beta1, its half-life linearly.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.ademamix(lr=0.1, betas=(0.9, 0.999, 0.99), alpha=5.0)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.895

    State: `step`, `exp_avg_fast` (not with beta1=0), `exp_avg_slow`, `exp_avg_sq`. Source: Pagliardini et al. 2024; the
    authors' pytorch/ademamix.py (apple/ml-ademamix).
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        alpha=alpha,
        beta3_warmup=beta3_warmup,
        alpha_warmup=alpha_warmup,
        eps=eps,
        weight_decay=weight_decay,
    )
    return transform(AdEMAMix, arguments, **options)
