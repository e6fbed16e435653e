"""SparseAdam (torch/optim/sparse_adam.py and _functional.py, `sparse_adam`)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Limit, Rule, fraction


@dataclasses.dataclass(frozen=True)
class SparseAdam(Rule):
    r"""Adam on the rows that have a gradient; the others, their moments too, are left as they are.

    m = m + (1 - beta1) * (g - m);  v = v + (1 - beta2) * (g^2 - v)
    p = p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps), t counted by the parameter, not by the row
    """

    maximize: bool

    hyperparameters = ("lr", "beta1", "beta2", "eps")
    tuples = {"betas": ("beta1", "beta2")}
    limits = {
        "lr": Limit(lambda x: x > 0, "Invalid learning rate: {}"),
        "eps": Limit(lambda x: x > 0, "Invalid epsilon value: {}"),
        "beta1": fraction("Invalid beta parameter at index 0: {}"),
        "beta2": fraction("Invalid beta parameter at index 1: {}"),
    }
    scope = "rows"

    def check_param(self, name, shape, dtype):
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"SparseAdam does not support complex parameters: {name} is {jnp.dtype(dtype)}")
        if not shape:
            raise ValueError(f"{name}: expected a parameter with rows, found a scalar; step it with adam")

    def init(self, h, param):
        return {"exp_avg": jnp.zeros_like(param), "exp_avg_sq": jnp.zeros_like(param)}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {
            "1-beta1": 1 - h["beta1"],
            "1-beta2": 1 - h["beta2"],
            "eps": h["eps"],
            "-step_size": -h["lr"] * xp.sqrt(1 - h["beta2"] ** step) / (1 - h["beta1"] ** step),
        }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        if self.maximize:
            grad = -grad

        def average(old, new, weight):
            return t.add(old, t.mul(t.add(new, -old), weight))

        exp_avg = average(state["exp_avg"], grad, c["1-beta1"])
        exp_avg_sq = average(state["exp_avg_sq"], t.mul(grad, grad), c["1-beta2"])
        quotient = t.div(exp_avg, t.add(t.sqrt(exp_avg_sq), c["eps"]))
        return t.add(param, t.mul(quotient, c["-step_size"])), {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
