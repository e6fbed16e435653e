"""SparseAdam (torch/optim/sparse_adam.py and _functional.py, `sparse_adam`)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Hyperparameter, Limit, Rule, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class SparseAdam(Rule):
    """Adam on the rows that have a gradient; the others, their moments too, are left as they are: see `sparse_adam`."""

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
        return {"exp_avg": t.zeros_like(param), "exp_avg_sq": t.zeros_like(param)}

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


@optimizer
def sparse_adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """SparseAdam, as `torch.optim.SparseAdam`: Adam on the rows that have a gradient, at the cost of those rows.

    m <- m + (1 - beta1) (g - m);  v <- v + (1 - beta2) (g^2 - v);  rows without gradient keep both
    p <- p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps), t counted by the parameter

    A gradient is a `jax.experimental.sparse.BCOO`, JAX's type of sparse arrays: rows and their indices, of a fixed
    number under jit. As in torch a row may come several times (its entries are summed) or not at all; an index outside
    of the parameter is padding. Donate state and parameters, or they are copied whole.

    >>> import jax.numpy as jnp, jopt
    >>> from jax.experimental.sparse import BCOO
    >>> tx = jopt.sparse_adam(lr=0.1)
    >>> table = jnp.zeros((4, 2))
    >>> indices, rows = jnp.array([2, 0, 2]), jnp.ones((3, 2))
    >>> grad = BCOO((rows, indices[:, None]), shape=table.shape)
    >>> table, state = tx.step(grad, tx.init(table), table)
    >>> [round(x, 5) for x in table[:, 0].tolist()]
    [-0.1, 0.0, -0.1, 0.0]

    State: `step`, `exp_avg`, `exp_avg_sq`. Raises RuntimeError for a dense gradient, ValueError for a complex
    parameter. Source: torch/optim/sparse_adam.py.
    """
    return transform(
        SparseAdam,
        dict(lr=lr, betas=betas, eps=eps, maximize=maximize),
        **options,
    )
