"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.optimizers.common import caution
from jopt.rule import Hyperparameter, Rule
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Lion(Rule):
    """The sign of a momentum that looks ahead: see `lion`."""

    weight_decay: bool

    hyperparameters = ("lr", "beta1", "beta2", "weight_decay")
    tuples = {"betas": ("beta1", "beta2")}
    limits = Adam.limits
    real_only = True

    def init(self, h, param):
        return {"exp_avg": t.zeros_like(param)}

    def signs(self):
        return {"exp_avg": True}

    def init_scalars(self, h):
        return {}

    def scalars(self, h, s, xp, stored):
        c = {"decay": 1 - h["lr"] * h["weight_decay"], "-lr": -h["lr"]}
        for name in ("beta1", "beta2"):
            c |= {name: h[name], f"1-{name}": 1 - h[name]}
        return c, s

    def update(self, c, grad, state, param):
        m = state["exp_avg"]
        if self.weight_decay:
            param = t.mul(param, c["decay"])
        direction = t.sign(t.add(t.mul(m, c["beta1"]), t.mul(grad, c["1-beta1"])))
        param = t.add(param, self.chosen(direction, grad), alpha=c["-lr"])
        return param, {"exp_avg": t.add(t.mul(m, c["beta2"]), grad, alpha=c["1-beta2"])}

    def chosen(self, direction, grad):
        """What of the direction is taken."""
        return direction


class CautiousLion(Lion):
    """Lion that takes only what points against the gradient."""

    scope = "tensor"
    axes = False

    def chosen(self, direction, grad):
        return t.mul(direction, caution(direction, grad))


@optimizer
def lion(
    lr: Hyperparameter = 1e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99),
    weight_decay: Hyperparameter = 0.0,
    *,
    cautious: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Lion: every element moves by lr, whichever way a momentum points that looks one gradient ahead.

    p <- p * (1 - lr * weight_decay) - lr * sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g
    cautious: of the sign those elements alone that have the gradient's, over the mean number of them: see `adamw`.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.lion(lr=0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> params, state = tx.step(jnp.array([3.0, -0.5]), tx.init(params), params)
    >>> [round(x, 5) for x in params.tolist()]
    [0.9, 2.1]

    State: `exp_avg`. Source: Chen et al. 2023; the authors' lion/lion_pytorch.py (google/automl).
    """
    return transform(
        CautiousLion if cautious else Lion,
        dict(lr=lr, betas=betas, weight_decay=weight_decay),
        **options,
    )
