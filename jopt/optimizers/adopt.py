"""ADOPT (Taniguchi et al. 2024, "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate")."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.rule import Hyperparameter, Rule
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class ADOPT(Rule):
    """Adam that divides by the second moment before this gradient, and averages after that: see `adopt`."""

    clip_lambda: Callable[[Any], Any] | float | None
    weight_decay: bool
    decouple: bool
    maximize: bool

    hyperparameters = ("lr", "beta1", "beta2", "eps", "weight_decay")
    tuples = {"betas": ("beta1", "beta2")}
    limits = Adam.limits

    def init(self, h, param):
        return {name: t.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False}

    def scalars(self, h, s, xp, stored):
        step = s["step"]
        first = step == 0  # which sets the second moment and moves nothing

        def after(x):
            return xp.where(first, 0.0, x)

        c = {
            "-lr": after(-h["lr"]),
            "decay": after(-h["lr"] * h["weight_decay"]) if self.decouple else h["weight_decay"],
            "1-beta1": after(1 - h["beta1"]),
            "beta2": h["beta2"],
            "1-beta2": xp.where(first, 1.0, 1 - h["beta2"]),
            "eps": h["eps"],
        }
        if self.clip_lambda is not None:
            c["clip"] = self.clip_lambda(step) if callable(self.clip_lambda) else step**self.clip_lambda
        return c, {"step": step + 1}

    def update(self, c, grad, state, param):
        if self.maximize:
            grad = -grad
        if self.weight_decay and not self.decouple:
            grad = t.add(grad, param, alpha=c["decay"])
        if self.weight_decay and self.decouple:
            param = t.add(param, param, alpha=c["decay"])
        v = state["exp_avg_sq"]
        normed = t.div(grad, t.maximum(t.sqrt(v), t.cast(c["eps"], v)))
        if self.clip_lambda is not None:
            clip = t.cast(c["clip"], v)
            normed = t.minimum(t.maximum(normed, -clip), clip)
        m = t.lerp(state["exp_avg"], normed, c["1-beta1"])
        v = t.addcmul(t.mul(v, c["beta2"]), grad, grad, c["1-beta2"])
        return t.add(param, m, alpha=c["-lr"]), {"exp_avg": m, "exp_avg_sq": v}


@optimizer
def adopt(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.9999),
    eps: Hyperparameter = 1e-6,
    clip_lambda: Callable[[Any], Any] | float | None = 0.25,
    weight_decay: Hyperparameter = 0.0,
    decouple: bool = False,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """ADOPT: Adam whose gradient is divided by the second moment of those before it, which makes any beta2 converge.

    With g = grad + weight_decay * p, or with decouple p <- p - lr * weight_decay * p:
    n = g / max(sqrt(v), eps), between -t^clip_lambda and t^clip_lambda, t the steps before
    m <- m + (1 - beta1) (n - m);  p <- p - lr * m;  v <- beta2 v + (1 - beta2) g^2
    The first step only sets v = g^2.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adopt(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     params, state = tx.step(jnp.array([2.0]), state, params)
    >>> round(params.item(), 5)
    0.99

    clip_lambda may also be a function of t, which may be an array, as the authors' is; None: no bound.

    State: `step`, `exp_avg`, `exp_avg_sq`. Source: Taniguchi et al. 2024; the authors' src/adopt/adopt.py
    (iShohei220/adopt).
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        clip_lambda=clip_lambda,
        weight_decay=weight_decay,
        decouple=decouple,
        maximize=maximize,
    )
    return transform(ADOPT, arguments, **options)
