"""RMSprop (torch/optim/rmsprop.py, `_single_tensor_rmsprop`; Hinton 2012, centered: Graves 2013)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Rule, at_least_zero
from jopt.rules.common import decay, regularize


@dataclasses.dataclass(frozen=True)
class RMSprop(Rule):
    r"""RMSprop: eps outside the root, the learning rate outside the momentum buffer.

    g = grad + weight_decay * p
    v = alpha * v + (1 - alpha) * g^2;  centered: a = lerp(a, g, 1 - alpha)
    d = sqrt(v - a^2  if centered else  v) + eps
    p = p - lr * g / d, or with momentum  b = momentum * b + g / d;  p = p - lr * b
    """

    momentum: bool
    weight_decay: bool
    centered: bool
    maximize: bool

    hyperparameters = ("lr", "alpha", "eps", "weight_decay", "momentum")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
        "momentum": at_least_zero("Invalid momentum value: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
        "alpha": at_least_zero("Invalid alpha value: {}"),
    }

    def init(self, h, param):
        names = ["square_avg"] + ["momentum_buffer"] * self.momentum + ["grad_avg"] * self.centered
        return {name: jnp.zeros_like(param) for name in names}

    def scalars(self, h, s, xp, stored):
        c = {name: h[name] for name in ("alpha", "eps", "momentum")}
        return c | {"decay": decay(self, h), "-lr": -h["lr"], "1-alpha": 1 - h["alpha"]}, {"step": s["step"] + 1}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        square_avg = t.addcmul(t.mul(state["square_avg"], c["alpha"]), grad, grad, c["1-alpha"])
        new = {"square_avg": square_avg}
        if self.centered:
            new["grad_avg"] = grad_avg = t.lerp(state["grad_avg"], grad, c["1-alpha"])
            square_avg = t.addcmul(square_avg, grad_avg, grad_avg, -1.0)
        avg = t.add(t.sqrt(square_avg), c["eps"])
        if self.momentum:
            new["momentum_buffer"] = buf = t.addcdiv(t.mul(state["momentum_buffer"], c["momentum"]), grad, avg)
            return t.add(param, buf, alpha=c["-lr"]), new
        return t.addcdiv(param, grad, avg, c["-lr"]), new
