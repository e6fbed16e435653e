"""RMSprop (torch/optim/rmsprop.py, `_single_tensor_rmsprop`; Hinton 2012, centered: Graves 2013)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.common import decay, regularize
from jopt.rule import Hyperparameter, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop: eps outside the root, the learning rate outside the momentum buffer: see `rmsprop`."""

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
        return {name: t.zeros_like(param) for name in names}

    def signs(self):
        # The variance is the difference of the other two: rounded, it could be negative.
        return {"momentum_buffer": True} | ({} if self.centered else {"square_avg": False})

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


@optimizer
def rmsprop(
    lr: Hyperparameter = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    momentum: Hyperparameter = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """RMSprop, as `torch.optim.RMSprop`: eps outside the root, lr outside the momentum buffer.

    With g = grad + weight_decay * p:  v <- alpha v + (1 - alpha) g^2;  centered: a <- a + (1 - alpha) (g - a)
    d = sqrt(v, or centered: v - a^2) + eps;  p <- p - lr * g / d
    or with momentum:  b <- momentum * b + g / d;  p <- p - lr * b

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.rmsprop(lr=0.01)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 6)
    0.9

    State: `step`, `square_avg`, with momentum `momentum_buffer`, centered `grad_avg`.
    Source: torch/optim/rmsprop.py; Hinton 2012; Graves 2013.
    """
    arguments = dict(
        lr=lr,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        momentum=momentum,
        centered=centered,
        maximize=maximize,
    )
    return transform(
        RMSprop,
        arguments,
        **options,
    )
