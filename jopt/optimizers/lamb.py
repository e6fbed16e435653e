"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes")."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.optimizers.common import trust
from jopt.rule import Hyperparameter, Rule
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class LAMB(Rule):
    """Adam whose step is as long as a share of the tensor: see `lamb`."""

    bias_correction: bool
    weight_decay: bool
    grad_averaging: bool
    trust_clip: bool
    always_adapt: bool

    hyperparameters = ("lr", "beta1", "beta2", "eps", "weight_decay")
    tuples = {"betas": ("beta1", "beta2")}
    limits = Adam.limits
    scope = "tensor"
    axes = False
    real_only = True

    def init(self, h, param):
        return {name: t.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        corrections = [1 - h[name] ** step if self.bias_correction else 1.0 for name in ("beta1", "beta2")]
        c = {
            "beta1": h["beta1"],
            "1-beta1": 1 - h["beta1"],
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "1/bias_correction1": 1 / corrections[0],
            "1/sqrt(bias_correction2)": 1 / xp.sqrt(corrections[1]),
            "eps": h["eps"],
            "weight_decay": h["weight_decay"],
            "-lr": -h["lr"],
        }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        m = state["exp_avg"]
        m = t.lerp(m, grad, c["1-beta1"]) if self.grad_averaging else t.add(t.mul(m, c["beta1"]), grad)
        v = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), grad, grad, c["1-beta2"])
        denom = t.add(t.mul(t.sqrt(v), c["1/sqrt(bias_correction2)"]), c["eps"])
        update = t.div(t.mul(m, c["1/bias_correction1"]), denom)
        if self.weight_decay:
            update = t.add(update, param, alpha=c["weight_decay"])
        if self.weight_decay or self.always_adapt:
            length, step = t.norm(param), t.norm(update)
            ratio = trust(t.div(length, step), length, step)
            update = t.mul(update, t.minimum(ratio, t.ones_like(ratio)) if self.trust_clip else ratio)
        return t.add(param, update, alpha=c["-lr"]), {"exp_avg": m, "exp_avg_sq": v}


@optimizer
def lamb(
    lr: Hyperparameter = 1e-3,
    bias_correction: bool = True,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.01,
    grad_averaging: bool = True,
    trust_clip: bool = False,
    always_adapt: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """LAMB: Adam's step of each tensor, made as long as lr times the tensor's norm.

    m, v as Adam's;  u = m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay * p
    p <- p - lr * |p| / |u| * u, the ratio 1 where a norm is 0, with trust_clip at most 1. A tensor without weight decay
    is stepped by lr alone, unless always_adapt: as the authors do with biases and normalizations.
    grad_averaging=False: m <- beta1 m + g. bias_correction=False: as in the authors' code for BERT.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.lamb(lr=0.1)
    >>> params = jnp.array([3.0, 4.0])
    >>> params, state = tx.step(jnp.array([2.0, -2.0]), tx.init(params), params)
    >>> [round(x, 4) for x in params.tolist()]
    [2.6342, 4.3409]

    State: `step`, `exp_avg`, `exp_avg_sq`. Source: You et al. 2020, algorithm 2; timm/optim/lamb.py, whose arguments
    these are, but for `max_grad_norm`: that is `jopt.clip_grad_norm` in front.
    """
    arguments = dict(
        lr=lr,
        bias_correction=bias_correction,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        grad_averaging=grad_averaging,
        trust_clip=trust_clip,
        always_adapt=always_adapt,
    )
    return transform(LAMB, arguments, **options)
