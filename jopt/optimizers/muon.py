"""Muon (torch/optim/_muon.py, `_single_tensor_muon`; Jordan 2024, Liu et al. 2025)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Unpack

import jax.numpy as jnp
from jax import Array, lax

from jopt import numerics as t
from jopt.rule import Batched, Hyperparameter, Scalars, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform

ADJUSTMENTS = {
    None: lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),  # since torch 2.14
}


class Orthogonal(Batched):
    """Momentum, made orthogonal by a Newton-Schulz iteration in bfloat16. Matrices only.

    The momentum buffer is as stated also for bfloat16 gradients without nesterov; torch normalizes it in place there
    (`ortho_grad = grad.bfloat16()` is the buffer itself, then `ortho_grad.div_`).
    """

    nesterov: bool
    ns_steps: int
    adjust_lr_fn: str | None
    fused: ClassVar[bool]  # see `orthogonalize`

    limits = {
        "lr": at_least_zero("Learning rate should be >= 0 but is: {}"),
        "momentum": at_least_zero("momentum should be >= 0 but is: {}"),
        "weight_decay": at_least_zero("weight decay should be >= 0 but is: {}"),
    }
    scope = "tensor"
    real_only = True

    def check_param(self, name, shape, dtype):
        super().check_param(name, shape, dtype)
        if len(shape) != 2:
            raise ValueError(
                f"{type(self).__name__} only supports 2D parameters whereas we found a parameter with size: "
                f"{tuple(shape)} ({name}); step the others with another optimizer, as with optax.partition"
            )

    def init(self, h, param):
        return {"momentum_buffer": t.zeros_like(param)}

    def init_scalars(self, h):
        return {}

    def scalars(self, h, s, xp, stored):
        c = {
            "decay": 1 - h["lr"] * h["weight_decay"],
            "momentum": h["momentum"],
            "1-momentum": 1 - h["momentum"],
            "-lr": -h["lr"],
        }
        return c, {}

    def direct(self, c, grad, state):
        buffer = t.lerp(state["momentum_buffer"], grad, c["1-momentum"])
        direction = t.lerp(grad, buffer, c["momentum"]) if self.nesterov else buffer
        return direction.astype(jnp.bfloat16), state | {"momentum_buffer": buffer}

    def whole(self, c, x):
        return t.operation(orthogonalize)(c, x, self.ns_steps, self.fused)

    def adjustment(self, shape):
        """What the learning rate is multiplied by."""
        return ADJUSTMENTS[self.adjust_lr_fn](*shape)

    def adjusted(self, c, param):
        """`adjustment`, which is given as a coefficient where `param` is flat."""
        return c["adjustment"] if "adjustment" in c else self.adjustment(param.shape)


@dataclasses.dataclass(frozen=True)
class Muon(Orthogonal):
    """See `muon`."""

    nesterov: bool
    ns_steps: int
    adjust_lr_fn: str | None

    hyperparameters = ("lr", "weight_decay", "momentum", "a", "b", "c", "eps")
    tuples = {"ns_coefficients": ("a", "b", "c")}
    fused = True

    def __post_init__(self):
        if not isinstance(self.ns_steps, int):
            raise TypeError(f"ns_steps: expected an integer, found {self.ns_steps!r}")
        if self.ns_steps >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        if self.adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"Adjust learning rate function {self.adjust_lr_fn} is not supported")

    @classmethod
    def members(cls, arguments):
        if len(arguments["ns_coefficients"]) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        return super().members(arguments)

    def scalars(self, h, s, xp, stored):
        c, s = super().scalars(h, s, xp, stored)
        return c | {name: h[name] for name in ("a", "b", "c", "eps")}, s

    def move(self, c, param, x, state):
        alpha = c["-lr"] * self.adjusted(c, param)
        return t.add(t.mul(param, c["decay"]), x.astype(param.dtype), alpha=alpha), state


def orthogonalize(c: Scalars, matrix: Array, steps: int, fused: bool) -> Array:
    """A bfloat16 matrix of the same singular vectors, with singular values near 1.

    `fused`: as torch.optim.Muon computes it, which rounds each sum with a product once, and takes eps for the least
    norm. Else as Jordan's code, which rounds each operation, and adds eps to the norm.
    """
    c = {name: x.astype(jnp.float32) for name, x in c.items()}
    return t.each_once(functools.partial(_iterated, steps, fused), matrix, c)


def _iterated(steps: int, fused: bool, x: Array, c: Scalars) -> Array:
    rows, columns = x.shape
    if rows > columns:
        x = x.T
    length = t.norm(x)
    x = t.div(x, t.maximum(length, t.cast(c["eps"], x)) if fused else t.add(length, c["eps"]))
    addmm = t.addmm if fused else _rounded_addmm

    def iterate(_, pair):
        x, transpose = pair
        gram = t.matmul(x, x.T if transpose is None else transpose)
        x = addmm(x, addmm(gram, gram, gram, beta=c["b"], alpha=c["c"]), x, beta=c["a"])
        return x, None if transpose is None else x.T

    def iterations(*pair):
        return lax.fori_loop(0, steps, iterate, pair)[0]

    # XLA on CPU multiplies bfloat16 as such only where no factor is a transpose that it knows as one; else in float32.
    x = lax.platform_dependent(x, cpu=lambda x: iterations(x, x.T), default=lambda x: iterations(x, None))
    return x.T if rows > columns else x


def _rounded_addmm(x: Array, t1: Array, t2: Array, beta: Array, alpha: Array | None = None) -> Array:
    """beta * x + (alpha * t1) @ t2, each operation rounded."""
    return t.add(t.mul(x, beta), t.matmul(t1 if alpha is None else t.mul(t1, alpha), t2))


@optimizer
def muon(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (3.4445, -4.7750, 2.0315),
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    **options: Unpack[Options],
) -> Transform:
    """Muon, as `torch.optim.Muon`: momentum made orthogonal, for matrices alone; the others need another optimizer.

    b <- b + (1 - momentum) (g - b);  u = nesterov: g + momentum (b - g), else b
    O = u's singular vectors, with singular values near 1: ns_steps of Newton-Schulz in bfloat16, with X = u / |u|,
    X <- a X + (b A + c A^2) X, A = X X^T.  Matrices of one shape are iterated together.
    p <- p * (1 - lr * weight_decay) - lr * s * O,  s = sqrt(max(1, rows / columns)), or for adjust_lr_fn
    "match_rms_adamw" 0.2 * sqrt(max(rows, columns)), or for "spectral_unclamped" (torch 2.14) sqrt(rows / columns)

    >>> import jax, jax.numpy as jnp, optax, jopt
    >>> params = {"w": jnp.eye(2), "b": jnp.zeros(2)}
    >>> labels = jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adamw", params)
    >>> tx = optax.partition({"muon": jopt.muon(lr=0.02), "adamw": jopt.adamw(lr=1e-3)}, labels)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].shape
    (2, 2)

    State: `momentum_buffer`. Raises ValueError for a parameter that is no matrix, RuntimeError for a complex one.
    Source: torch/optim/_muon.py; Jordan et al. 2024; Liu et al. 2025 (match_rms_adamw); Bernstein 2025 (unclamped).
    """
    arguments = dict(
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        eps=eps,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
    )
    return transform(
        Muon,
        arguments,
        **options,
    )
