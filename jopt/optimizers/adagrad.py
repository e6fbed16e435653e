"""Adagrad (torch/optim/adagrad.py; Duchi et al. 2011)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.common import decay, regularize
from jopt.rule import Hyperparameter, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Adagrad(Rule):
    """Each element's rate falls with the sum of its squared gradients: see `adagrad`."""

    weight_decay: bool
    maximize: bool

    hyperparameters = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "lr_decay": at_least_zero("Invalid lr_decay value: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
        "initial_accumulator_value": at_least_zero("Invalid initial_accumulator_value value: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
    }

    def init(self, h, param):
        return {"sum": t.full_like(param, h["initial_accumulator_value"])}

    def signs(self):
        return {"sum": False}

    def scalars(self, h, s, xp, stored):
        clr = h["lr"] / (1 + s["step"] * h["lr_decay"])
        return {"decay": decay(self, h), "eps": h["eps"], "-clr": -clr}, {"step": s["step"] + 1}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        total = t.addcmul(state["sum"], grad, grad)
        return t.addcdiv(param, grad, t.add(t.sqrt(total), c["eps"]), c["-clr"]), {"sum": total}


@optimizer
def adagrad(
    lr: Hyperparameter = 1e-2,
    lr_decay: Hyperparameter = 0,
    weight_decay: Hyperparameter = 0,
    initial_accumulator_value: Hyperparameter = 0,
    eps: Hyperparameter = 1e-10,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Adagrad, as `torch.optim.Adagrad`: eps outside the root, unlike optax.

    With g = grad + weight_decay * p:  sum <- sum + g^2, from initial_accumulator_value
    p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adagrad(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `sum`. Source: torch/optim/adagrad.py; Duchi et al. 2011.
    """
    arguments = dict(
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        maximize=maximize,
    )
    return transform(
        Adagrad,
        arguments,
        **options,
    )
