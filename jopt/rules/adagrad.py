"""Adagrad and Adadelta (torch/optim/adagrad.py, adadelta.py; Duchi et al. 2011, Zeiler 2012)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Limit, Rule, at_least_zero
from jopt.rules.common import decay, regularize


@dataclasses.dataclass(frozen=True)
class Adagrad(Rule):
    r"""Each element's rate falls with the sum of its squared gradients.

    g = grad + weight_decay * p;  sum = sum + g^2, from initial_accumulator_value
    p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)
    """

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
        return {"sum": jnp.full_like(param, h["initial_accumulator_value"])}

    def scalars(self, h, s, xp, stored):
        clr = h["lr"] / (1 + s["step"] * h["lr_decay"])
        return {"decay": decay(self, h), "eps": h["eps"], "-clr": -clr}, {"step": s["step"] + 1}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        total = t.addcmul(state["sum"], grad, grad)
        return t.addcdiv(param, grad, t.add(t.sqrt(total), c["eps"]), c["-clr"]), {"sum": total}


@dataclasses.dataclass(frozen=True)
class Adadelta(Rule):
    r"""Steps in the parameter's own units; eps inside both roots.

    g = grad + weight_decay * p;  v = rho * v + (1 - rho) * g^2
    delta = sqrt(u + eps) / sqrt(v + eps) * g;  u = rho * u + (1 - rho) * delta^2;  p = p - lr * delta
    """

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
        return {"square_avg": jnp.zeros_like(param), "acc_delta": jnp.zeros_like(param)}

    def scalars(self, h, s, xp, stored):
        c = {"decay": decay(self, h), "rho": h["rho"], "eps": h["eps"]}
        return c | {"1-rho": 1 - h["rho"], "-lr": -h["lr"]}, {"step": s["step"] + 1}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        square_avg = t.addcmul(t.mul(state["square_avg"], c["rho"]), grad, grad, c["1-rho"])
        std = t.sqrt(t.add(square_avg, c["eps"]))
        delta = t.mul(t.div(t.sqrt(t.add(state["acc_delta"], c["eps"])), std), grad)
        acc_delta = t.addcmul(t.mul(state["acc_delta"], c["rho"]), delta, delta, c["1-rho"])
        param, square_avg, acc_delta = t.at_once(t.add(param, delta, alpha=c["-lr"]), square_avg, acc_delta)
        return param, {"square_avg": square_avg, "acc_delta": acc_delta}
