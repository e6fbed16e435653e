"""ASGD (torch/optim/asgd.py, `_single_tensor_asgd`; Polyak & Juditsky 1992)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.common import decay, regularize
from jopt.rule import Hyperparameter, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class ASGD(Rule):
    """Gradient descent on a falling rate, and the average of its iterates from step t0 on: see `asgd`."""

    weight_decay: bool
    maximize: bool

    hyperparameters = ("lr", "lambd", "alpha", "t0", "weight_decay")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
    }

    def init(self, h, param):
        return {"ax": t.zeros_like(param)}

    def init_scalars(self, h):
        return {"step": 0.0, "eta": h["lr"], "mu": 1.0}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {
            "decay": decay(self, h),
            "1-lambd*eta": 1 - h["lambd"] * s["eta"],
            "-eta": -s["eta"],
            "mu": s["mu"],
        }
        eta = stored(h["lr"] / (1 + h["lambd"] * h["lr"] * step) ** h["alpha"])
        mu = stored(1 / xp.maximum(1.0, step - h["t0"]))
        return c, {"step": step, "eta": eta, "mu": mu}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        param = t.add(t.mul(param, c["1-lambd*eta"]), grad, alpha=c["-eta"])
        averaged = t.add(state["ax"], t.mul(t.add(param, -state["ax"]), c["mu"]))
        return param, {"ax": t.where(c["mu"] == 1, param, averaged)}


@optimizer
def asgd(
    lr: Hyperparameter = 1e-2,
    lambd: Hyperparameter = 1e-4,
    alpha: Hyperparameter = 0.75,
    t0: Hyperparameter = 1e6,
    weight_decay: Hyperparameter = 0,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Averaged SGD, as `torch.optim.ASGD`; the average is the state `ax`.

    With g = grad + weight_decay * p:  p <- p * (1 - lambd * eta) - eta * g
    ax <- ax + (p - ax) * mu (p while mu is 1)
    eta <- lr / (1 + lambd * lr * t)^alpha;  mu <- 1 / max(1, t - t0)
    A step uses the eta and mu that the one before left (lr and 1 at first): a changed lr acts one step late.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.asgd(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.79999

    State: `step`, `eta`, `mu`, `ax`. Source: torch/optim/asgd.py; Polyak & Juditsky 1992.
    """
    arguments = dict(lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, maximize=maximize)
    return transform(
        ASGD,
        arguments,
        **options,
    )
