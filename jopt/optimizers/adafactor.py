"""Adafactor (torch/optim/_adafactor.py, `_single_tensor_adafactor`; Shazeer & Stern 2018)."""

from __future__ import annotations

import dataclasses
import math
from typing import Unpack

import jax.numpy as jnp

from jopt import numerics as t
from jopt.rule import Hyperparameter, Limit, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Adafactor(Rule):
    """Adam's second moment, of a matrix kept as its row and column means; no first moment: see `adafactor`.

    Without an eps1 it is the machine epsilon of the type that the leaf is stepped in. torch takes that of the first
    parameter of the group for all that follow (`eps1 = torch.finfo(param.dtype).eps` inside its loop).
    """

    weight_decay: bool
    maximize: bool
    eps1_given: bool

    hyperparameters = ("lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay")
    tuples = {"eps": ("eps1", "eps2")}
    limits = {
        "lr": at_least_zero("Learning rate should be >= 0 but is: {}"),
        "beta2_decay": Limit(lambda x: x <= 0, "beta2_decay should be <= 0 but is: {}"),
        "eps1": at_least_zero("epsilon1 should be >= 0 but is: {}"),
        "eps2": at_least_zero("epsilon2 should be >= 0 but is: {}"),
        "d": Limit(lambda x: x >= 1, "Clipping threshold d should be >= 1 but is: {}"),
        "weight_decay": at_least_zero("weight_decay should be >= 0 but is: {}"),
    }
    scope = "tensor"
    real_only = True

    @classmethod
    def members(cls, arguments):
        return {name: x for name, x in super().members(arguments).items() if name != "eps1" or x is not None}

    @classmethod
    def shaped_by(cls, arguments, h, *, dynamic=False):
        return super().shaped_by({**arguments, "eps1_given": "eps1" in h}, h, dynamic=dynamic)

    def init(self, h, param):
        if param.ndim < 2:
            return {"variance": t.zeros_like(param)}
        return {
            "row_var": t.zeros_like(param, shape=(*param.shape[:-1], 1)),
            "col_var": t.zeros_like(param, shape=(*param.shape[:-2], 1, param.shape[-1])),
        }

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {
            "decay": 1 - h["lr"] * h["weight_decay"],
            "1-beta2": step ** h["beta2_decay"],
            "rho": xp.minimum(h["lr"], 1 / xp.sqrt(step)),
            "eps2": h["eps2"],
            "d": h["d"],
        }
        if self.eps1_given:
            c |= {"eps1": h["eps1"], "eps1^2": h["eps1"] * h["eps1"]}
        return c, {"step": step}

    def update(self, c, grad, state, param):
        if not self.eps1_given:
            eps = float(jnp.finfo(param.dtype).eps)
            c = c | {"eps1": t.full_like(c["d"], eps), "eps1^2": t.full_like(c["d"], eps * eps)}
        root_size = math.sqrt(param.size)
        if self.maximize:
            grad = -grad
        alpha = largest(c["eps2"], t.norm(param).astype(c["eps2"].dtype) / root_size) * c["rho"]
        if self.weight_decay:
            param = t.mul(param, c["decay"])

        def mean_square(axis):
            norm = t.norm(grad, axis)
            return t.div(t.mul(norm, norm), t.full_like(c["d"], grad.shape[axis]))

        if "variance" in state:
            new = {"variance": t.lerp(state["variance"], t.mul(grad, grad), c["1-beta2"])}
            v = new["variance"]
        else:
            row_var = t.lerp(state["row_var"], mean_square(-1), c["1-beta2"])
            col_var = t.lerp(state["col_var"], mean_square(-2), c["1-beta2"])
            new = {"row_var": row_var, "col_var": col_var}
            v = t.div(t.mul(row_var, col_var), t.maximum(t.mean(row_var, -2), t.cast(c["eps1"], param)))
        u = t.mul(t.rsqrt(t.maximum(v, t.cast(c["eps1^2"], v))), grad)
        clip = largest(1, t.norm(u).astype(c["d"].dtype) / (root_size * c["d"]))
        return t.add(param, u, alpha=-alpha / clip), new


def largest(floor, x):
    """Python's max(floor, x), which torch takes of numbers: a nan is the floor, and stays where it is in the tensor."""
    return t.where(x > floor, x, floor)


@optimizer
def adafactor(
    lr: Hyperparameter = 1e-2,
    beta2_decay: Hyperparameter = -0.8,
    eps: tuple[Hyperparameter | None, Hyperparameter] = (None, 1e-3),
    d: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Adafactor, as `torch.optim.Adafactor`: the second moment of a matrix from its row and column means.

    rho = min(lr, 1 / sqrt(t));  alpha = max(eps[1], RMS(p)) * rho, p before its decay
    p <- p * (1 - lr * weight_decay);  w = t^beta2_decay
    R <- R + w (mean of g^2 over the last axis - R);  C likewise over the last but one
    V = R C / max(mean of R, eps[0])
    or of a vector  V <- V + w (g^2 - V)
    U = g / sqrt(max(V, eps[0]^2));  p <- p - alpha / max(1, RMS(U) / d) * U

    eps[0] None is the machine epsilon of each parameter's own type; torch takes that of the first parameter of a group
    for all of them.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adafactor(lr=0.1)
    >>> params = jnp.array([[1.0, 1.0]])
    >>> params, state = tx.step(jnp.array([[2.0, 2.0]]), tx.init(params), params)
    >>> [round(x, 5) for x in params[0].tolist()]
    [0.9, 0.9]

    State: `step`, and `row_var` (..., n, 1) and `col_var` (..., 1, m), or for a vector `variance`.
    Raises RuntimeError for a complex parameter. Source: torch/optim/_adafactor.py; Shazeer & Stern 2018.
    """
    arguments = dict(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, maximize=maximize)
    return transform(
        Adafactor,
        arguments,
        **options,
    )
