"""Rprop (torch/optim/rprop.py, `_single_tensor_rprop`; Riedmiller & Braun 1993)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.rule import Hyperparameter, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Rprop(Rule):
    """Steps by the gradient's sign alone; a step size for each element grows while the sign stays: see `rprop`."""

    maximize: bool

    hyperparameters = ("lr", "etaminus", "etaplus", "step_size_min", "step_size_max")
    tuples = {"etas": ("etaminus", "etaplus"), "step_sizes": ("step_size_min", "step_size_max")}
    limits = {"lr": at_least_zero("Invalid learning rate: {}")}

    @classmethod
    def check(cls, h):
        super().check(h)
        low, high = h["etaminus"], h["etaplus"]
        if isinstance(low, int | float) and isinstance(high, int | float) and not 0.0 < low < 1.0 < high:
            raise ValueError(f"Invalid eta values: {low}, {high}")

    def init(self, h, param):
        return {"prev": t.zeros_like(param), "step_size": t.full_like(param, h["lr"])}

    def signs(self):
        return {"prev": True, "step_size": False}

    def scalars(self, h, s, xp, stored):
        return {name: h[name] for name in self.hyperparameters if name != "lr"}, {"step": s["step"] + 1}

    def update(self, c, grad, state, param):
        if self.maximize:
            grad = -grad
        product = t.mul(grad, state["prev"])
        factor = t.where(product == 0, t.ones_like(product), product)  # nan stays nan, as torch's sign does
        factor = t.where(product > 0, t.cast(c["etaplus"], grad), factor)
        factor = t.where(product < 0, t.cast(c["etaminus"], grad), factor)
        step_size = t.mul(state["step_size"], factor)
        step_size = t.maximum(step_size, t.cast(c["step_size_min"], grad))
        step_size = t.minimum(step_size, t.cast(c["step_size_max"], grad))
        grad = t.where(product < 0, t.zeros_like(grad), grad)
        return t.addcmul(param, t.sign(grad), step_size, -1.0), {"prev": grad, "step_size": step_size}


@optimizer
def rprop(
    lr: Hyperparameter = 1e-2,
    etas: tuple[Hyperparameter, Hyperparameter] = (0.5, 1.2),
    step_sizes: tuple[Hyperparameter, Hyperparameter] = (1e-6, 50),
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Rprop, as `torch.optim.Rprop`: by the gradient's sign, with a step size for each element.

    s <- clip(s * f, *step_sizes) with f = etas[1] where grad * grad_before > 0, etas[0] where < 0, else 1; s begins
    at lr, which has no other use.  grad <- 0 where the sign changed;  p <- p - sign(grad) * s

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.rprop(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `prev`, `step_size`. Source: torch/optim/rprop.py; Riedmiller & Braun 1993.
    """
    arguments = dict(lr=lr, etas=etas, step_sizes=step_sizes, maximize=maximize)
    return transform(
        Rprop,
        arguments,
        **options,
    )
