"""NorMuon (Li et al. 2025, "NorMuon: Making Muon more efficient and scalable")."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Unpack

from jopt import numerics as t
from jopt.optimizers.muon import Orthogonal
from jopt.rule import Hyperparameter, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class NorMuon(Orthogonal):
    """Muon whose rows are divided by the root of their second moments: see `nor_muon`."""

    hyperparameters = ("lr", "weight_decay", "momentum", "beta2")
    limits = {**Orthogonal.limits, "beta2": fraction("beta2: expected a number in [0, 1), found {}")}
    nesterov, ns_steps, adjust_lr_fn, fused = True, 5, None, False
    moves = "tensor"
    constants: ClassVar[dict[str, float]] = {"a": 3.4445, "b": -4.7750, "c": 2.0315, "eps": 1e-7, "tiny": 1e-10}

    def init(self, h, param):
        rows = t.zeros_like(param, shape=(*param.shape[:-1], 1))
        return super().init(h, param) | {"second_momentum_buffer": rows}

    def scalars(self, h, s, xp, stored):
        c, s = super().scalars(h, s, xp, stored)
        return c | {"1-beta2": 1 - h["beta2"]} | self.constants, s

    def move(self, c, param, x, state):
        x = x.astype(param.dtype)
        length = t.norm(x)
        second = t.lerp(state["second_momentum_buffer"], t.mean(t.mul(x, x), -1), c["1-beta2"])
        x = t.mul(x, t.reciprocal(t.add(t.sqrt(second), c["tiny"])))
        x = t.mul(x, t.div(length, t.add(t.norm(x), c["tiny"])))
        x = t.mul(x, t.full_like(c["-lr"], self.adjustment(param.shape)))
        param = t.add(t.mul(param, c["decay"]), x, alpha=c["-lr"])
        return param, state | {"second_momentum_buffer": second}


@optimizer
def nor_muon(
    lr: Hyperparameter = 0.02,
    weight_decay: Hyperparameter = 0,
    momentum: Hyperparameter = 0.95,
    beta2: Hyperparameter = 0.95,
    **options: Unpack[Options],
) -> Transform:
    """NorMuon: Muon's step with rows of like size, which is what its own have not. For matrices alone.

    b, and O of u = g + momentum (b - g), as `jopt.muon`'s, with X = u / (|u| + 1e-7)
    v <- v + (1 - beta2) (mean of O^2 over a row - v);  N = O / (sqrt(v) + 1e-10)
    p <- p * (1 - lr * weight_decay) - lr * s * |O| / (|N| + 1e-10) * N,  s = sqrt(max(1, rows / columns))

    A row is what makes one output of a layer, where weights are (out, in) as torch's: transpose flax's kernels.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.nor_muon(lr=0.1)
    >>> params = jnp.zeros((2, 2))
    >>> params, state = tx.step(jnp.array([[2.0, 0.0], [0.0, 0.5]]), tx.init(params), params)
    >>> [round(x, 2) for x in jnp.diag(params).tolist()]
    [-0.08, -0.08]

    State: `momentum_buffer`, and `second_momentum_buffer` (rows, 1). Raises ValueError for a parameter that is no
    matrix, RuntimeError for a complex one. Source: Li et al. 2025; zichongli5/NorMuon, normuon.py, SingleDeviceNorMuon.
    """
    return transform(NorMuon, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2), **options)
