"""Adadelta (torch/optim/adadelta.py; Zeiler 2012)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.common import decay, regularize
from jopt.rule import Hyperparameter, Limit, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Adadelta(Rule):
    """Steps in the parameter's own units; eps inside both roots: see `adadelta`."""

    weight_decay: bool
    maximize: bool

    hyperparameters = ("lr", "rho", "eps", "weight_decay")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "rho": Limit(lambda x: 0.0 <= x <= 1.0, "Invalid rho value: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
    }

    def init(self, h, param):
        return {"square_avg": t.zeros_like(param), "acc_delta": t.zeros_like(param)}

    def signs(self):
        return {"square_avg": False, "acc_delta": False}

    def scalars(self, h, s, xp, stored):
        c = {"decay": decay(self, h), "rho": h["rho"], "eps": h["eps"]}
        return c | {"1-rho": 1 - h["rho"], "-lr": -h["lr"]}, {"step": s["step"] + 1}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        square_avg = t.addcmul(t.mul(state["square_avg"], c["rho"]), grad, grad, c["1-rho"])
        std = t.sqrt(t.add(square_avg, c["eps"]))
        delta = t.mul(t.div(t.sqrt(t.add(state["acc_delta"], c["eps"])), std), grad)
        acc_delta = t.addcmul(t.mul(state["acc_delta"], c["rho"]), delta, delta, c["1-rho"])
        param, square_avg, acc_delta = t.tied(t.add(param, delta, alpha=c["-lr"]), square_avg, acc_delta)
        return param, {"square_avg": square_avg, "acc_delta": acc_delta}


@optimizer
def adadelta(
    lr: Hyperparameter = 1.0,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Adadelta, as `torch.optim.Adadelta`: steps in the parameter's own units.

    With g = grad + weight_decay * p:  v <- rho * v + (1 - rho) * g^2
    delta = sqrt(u + eps) / sqrt(v + eps) * g;  u <- rho * u + (1 - rho) * delta^2;  p <- p - lr * delta

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adadelta()
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.99684

    State: `step`, `square_avg`, `acc_delta`. Source: torch/optim/adadelta.py; Zeiler 2012.
    """
    arguments = dict(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize)
    return transform(
        Adadelta,
        arguments,
        **options,
    )
