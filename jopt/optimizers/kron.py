"""PSGD Kron (Li 2015, "Preconditioned Stochastic Gradient Descent"), as kron_torch has it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt import numerics as t
from jopt.matrices import along, outer
from jopt.optimizers.adam import Adam
from jopt.rule import PHASE, Hyperparameter, Limit, Rule, at_least_zero, fraction
from jopt.transform import Options, Transform, optimizer, transform

Probability = Callable[[Any], Any] | float | None
MODES = (None, "smart_one_diag", "one_diag", "all_diag")
KEEP, BEGIN, REFRESH = 0.0, 1.0, 2.0  # what a step does with the factors
BALANCED_EVERY = 100  # refreshes
DAMPING = math.sqrt(float(jnp.finfo(jnp.float32).eps))


@dataclasses.dataclass(frozen=True)
class Kron(Rule):
    """A preconditioner of one triangular factor an axis, fitted to the gradients: see `kron`."""

    weight_decay: bool
    preconditioner_update_probability: Probability
    max_size_triangular: int
    min_ndim_triangular: int
    memory_save_mode: str | None
    momentum_into_precond_update: bool
    merge_dims: bool
    stagger: bool
    seed: int

    hyperparameters = ("lr", "b1", "weight_decay", "precond_lr", "precond_init_scale")
    limits = {
        "lr": Adam.limits["lr"],
        "b1": fraction("b1: expected a number in [0, 1), found {}"),
        "weight_decay": at_least_zero("weight_decay: expected a number of at least 0, found {}"),
        "precond_lr": at_least_zero("precond_lr: expected a number of at least 0, found {}"),
        "precond_init_scale": Limit(lambda x: x > 0, "precond_init_scale: expected a number above 0, found {}"),
    }
    scope = "tensor"
    real_only = True
    by_operations = False

    def __post_init__(self):
        p = self.preconditioner_update_probability
        if p is not None and not callable(p) and not 0 < p <= 1:
            raise ValueError(f"preconditioner_update_probability: expected a number in (0, 1], found {p}")
        if self.memory_save_mode not in MODES:
            raise ValueError(
                f"Invalid memory_save_mode: {self.memory_save_mode}, must be one of "
                "[None, 'smart_one_diag', 'one_diag', 'all_diag']"
            )
        for name in ("max_size_triangular", "min_ndim_triangular", "seed"):
            if not isinstance(x := getattr(self, name), int) or x < 0:
                raise ValueError(f"{name}: expected an integer of at least 0, found {x!r}")

    def init(self, h, param):
        sides = zip(self.merged(param.shape), self.diagonal(param.shape), strict=True)
        factors = {f"Q_{k}": t.zeros(param, (n,) if diagonal else (n, n)) for k, (n, diagonal) in enumerate(sides)}
        return {"momentum_buffer": t.zeros_like(param)} | factors

    def init_scalars(self, h):
        return {"step": 0.0, "waited": 0.0, "refreshes": 0.0, PHASE: 0.0}

    def scalars(self, h, s, xp, stored):
        step, waited = s["step"] + 1, s["waited"] + 1
        p = self.preconditioner_update_probability
        every = 1 / (anneal(s["step"], xp) if p is None else p(s["step"]) if callable(p) else p)
        refreshed = (step + s[PHASE]) % xp.ceil(every) == 0 if self.stagger else waited >= every
        refreshes = s["refreshes"] + refreshed
        c = {
            "b1": h["b1"],
            "1-b1": 1 - h["b1"],
            "1-b1^t": 1 - h["b1"] ** step,
            "-lr": -h["lr"],
            "weight_decay": h["weight_decay"],
            "precond_lr": h["precond_lr"],
            "scale": h["precond_init_scale"],
            "step": step,
            "number": s[PHASE],
            "factors": xp.where(refreshed, REFRESH, xp.where(step == 1, BEGIN, KEEP)),
            "balances": refreshed * (refreshes % BALANCED_EVERY == 0) * 1.0,
        }
        waited = xp.where(refreshed, 0.0, waited)
        return c, {**s, "step": step, "waited": waited, "refreshes": refreshes}

    def update(self, c, grad, state, param):
        shape = self.merged(param.shape)
        factors = [state[f"Q_{k}"] for k in range(len(shape))]
        m = t.add(t.mul(state["momentum_buffer"], c["b1"]), grad, alpha=c["1-b1"])
        x = t.div(m, c["1-b1^t"]).reshape(shape)
        factors = self.with_factors(c, x if self.momentum_into_precond_update else grad.reshape(shape), factors)
        for axis, q in enumerate(factors):
            x = times(times(x, q, axis), q, axis, transposed=True)
        root = t.sqrt(t.mean(t.mul(x, x)))
        x = x * (1.1 / jnp.maximum(root + 1e-12, 1.1))
        update = x.reshape(param.shape)
        if self.weight_decay and len(param.shape) >= 2:
            update = t.add(update, param, alpha=c["weight_decay"])
        state = {"momentum_buffer": m} | {f"Q_{k}": q for k, q in enumerate(factors)}
        return t.add(param, update, alpha=c["-lr"]), state

    def with_factors(self, c: dict[str, Any], x: Array, factors: list[Array]) -> list[Array]:
        """The factors after the step: as they were, the first ones, or fitted to x and a draw of noise."""

        def first() -> list[Array]:
            scale = c["scale"] ** (1 / len(factors))
            return [scale * (jnp.eye(*q.shape, dtype=q.dtype) if q.ndim > 1 else jnp.ones_like(q)) for q in factors]

        def keep(x: Array, factors: list[Array]) -> list[Array]:
            return factors

        def begin(x: Array, factors: list[Array]) -> list[Array]:
            return t.varying_alike(first(), lambda: factors)

        def refresh(x: Array, factors: list[Array]) -> list[Array]:
            factors = [jnp.where(c["step"] == 1, new, q) for new, q in zip(first(), factors, strict=True)]
            if x.ndim > 1:
                factors = balanced(factors, c["balances"])
            return fitted(factors, x, self.noise(c, x), c["precond_lr"])

        given = t.varying_alike((x, factors), lambda: refresh(x, factors))
        return lax.switch(c["factors"].astype(jnp.int32), [keep, begin, refresh], *given)

    def noise(self, c: dict[str, Any], x: Array) -> Array:
        """The standard normal numbers of this step and leaf."""
        key = jax.random.key(self.seed, impl="threefry2x32")
        for part in ("step", "number"):
            key = jax.random.fold_in(key, c[part].astype(jnp.uint32))
        return jax.random.normal(key, x.shape, x.dtype)

    # --- axes

    def merged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that has the factors: with merge_dims at most two axes."""
        if not shape:
            return (1,)
        if len(shape) <= 2 or not self.merge_dims:
            return tuple(shape)
        by_last, by_first = (math.prod(shape[:-1]), shape[-1]), (shape[0], math.prod(shape[1:]))
        return by_last if by_last[1] - by_last[0] <= by_first[1] - by_first[0] else by_first

    def diagonal(self, shape: tuple[int, ...]) -> list[bool]:
        """Of each axis that has a factor whether that is diagonal."""
        shape = self.merged(shape)
        # As NumPy's sort has it: the last of equal ones, for small numbers of axes.
        longest = max(range(len(shape)), key=lambda k: (shape[k], k))
        alone = len(shape) > 1 and shape.count(shape[longest]) == 1
        one = self.memory_save_mode == "one_diag" or (self.memory_save_mode == "smart_one_diag" and alone)
        return [
            n == 1
            or n > self.max_size_triangular
            or len(shape) < self.min_ndim_triangular
            or self.memory_save_mode == "all_diag"
            or (one and k == longest)
            for k, n in enumerate(shape)
        ]


def anneal(step: Any, xp: Any) -> Any:
    """The share of steps that refresh: all of the first 500, then fewer, down to 0.03 from the 4000th."""
    return xp.minimum(1.0, xp.maximum(0.03, xp.exp(-0.001 * (step - 500))))


def times(x: Array, q: Array, axis: int, *, transposed: bool = False) -> Array:
    """x's vectors along an axis times a factor, a diagonal one given by its diagonal."""
    if q.ndim == 1:
        return x * along_axis(q, x, axis)
    return along(x, q.T if transposed else q, axis)


def divided(x: Array, q: Array, axis: int) -> Array:
    """x's vectors along an axis times the inverse of the transposed factor."""
    if q.ndim == 1:
        return x / along_axis(q, x, axis)
    rows = jnp.moveaxis(x, axis, 0)
    solved = jax.scipy.linalg.solve_triangular(q, rows.reshape(len(q), -1), trans=1)
    return jnp.moveaxis(solved.reshape(rows.shape), 0, axis)


def along_axis(q: Array, x: Array, axis: int) -> Array:
    return q.reshape([-1 if k == axis else 1 for k in range(x.ndim)])


def largest(x: Array) -> Array:
    """The largest absolute value.

    By its place: the derivative of `jnp.max` looks for the elements that are equal to it, and may find none where XLA
    computes them twice in two ways.
    """
    x = t.absolute(x).ravel()
    return jnp.take(x, jnp.argmax(x)) if x.size else jnp.zeros((), x.dtype)


def balanced(factors: list[Array], balances: Array) -> list[Array]:
    """Factors of equal largest elements, whose product is as it was."""
    norms = jnp.stack([largest(q) for q in factors])
    scales = jnp.where(balances == 1, jnp.exp(jnp.mean(jnp.log(norms))) / norms, 1)
    return [q * scale for q, scale in zip(factors, scales, strict=True)]


def fitted(factors: list[Array], x: Array, noise: Array, lr: Array) -> list[Array]:
    """The factors after a step of gradient descent, in the group of triangular matrices, on x and a draw of noise."""
    tiny = jnp.finfo(x.dtype).tiny
    a, b = x + DAMPING * t.mean(t.absolute(x)) * noise, noise
    for axis, q in enumerate(factors):
        a, b = times(a, q, axis), divided(b, q, axis)
    new = []
    for axis, q in enumerate(factors):
        if q.ndim == 1:
            others = tuple(k for k in range(x.ndim) if k != axis)
            first, second = jnp.sum(a * a, others), jnp.sum(b * b, others)
            size = jnp.maximum(largest(first + second), tiny)
            new.append(q - lr * (first - second) * (q / size))
        else:
            first, second = outer(a, axis), outer(b, axis)
            size = jnp.maximum(spectral_bound(first + second), tiny)
            new.append(q - along(q, jnp.triu(lr * (first - second)) / size, 0))
    return new


def spectral_bound(x: Array) -> Array:
    """A lower bound of a symmetric matrix's spectral norm, from its longest column."""
    size = largest(x)
    x = x / jnp.where(size > 0, size, 1)
    column = jnp.take(x, jnp.argmax(jnp.sum(x * x, axis=0)), axis=1)
    column = along(column, x.T, 0)
    length = t.norm(column)
    return t.norm(along(column / jnp.where(length > 0, length, 1), x, 0)) * size


@optimizer
def kron(
    lr: Hyperparameter = 0.0003,
    b1: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    preconditioner_update_probability: Probability = None,
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    precond_lr: Hyperparameter = 0.1,
    precond_init_scale: Hyperparameter = 1.0,
    merge_dims: bool = True,
    stagger: bool = False,
    seed: int = 0,
    **options: Unpack[Options],
) -> Transform:
    """PSGD Kron: momentum, preconditioned by a Kronecker product of triangular matrices that is fitted to gradients.

    For a matrix G of n rows and m columns (other tensors likewise, an axis each), t the step, V standard normal noise:
    M <- b1 M + (1 - b1) G;  X = M / (1 - b1^t)
    where the factors are refreshed: A = Q_0 (X + d V) Q_1^T, B = Q_0^-T V Q_1^-1, d = mean |X| / 2896
    Q_0 <- Q_0 - precond_lr * triu(A A^T - B B^T) / |A A^T + B B^T| * Q_0; Q_1 likewise, of A^T A and B^T B
    U = Q_0^T Q_0 X Q_1^T Q_1, scaled down to a root mean square of 1.1;  p <- p - lr * (U + weight_decay * p)
    |.| is a lower bound of the spectral norm, and a diagonal Q is kept as its diagonal. A vector does not decay.

    preconditioner_update_probability says how often: every 1 / probability steps. None: every step of the first 500,
    then exponentially fewer, to every 34th from step 4000. It may be a function of the steps before, which may be an
    array. An axis's factor is diagonal if its size is 1 or above max_size_triangular, if the tensor has fewer than
    min_ndim_triangular axes, and as memory_save_mode has it: of the largest axis ("one_diag"), of one that is the
    largest alone ("smart_one_diag"), of each ("all_diag"). merge_dims makes a matrix of what has more axes: the first
    axes in one, or the last, whichever has the smaller last size less first size. momentum_into_precond_update=False
    fits to G instead of X. stagger refreshes the k-th tensor's factors when t + k is a multiple of the interval.
    seed is that of the noise.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.kron(lr=0.1)
    >>> params = jnp.ones((2, 2))
    >>> params, state = tx.step(jnp.eye(2), tx.init(params), params)
    >>> params.shape, sorted(state.slots)
    ((2, 2), ['Q_0', 'Q_1', 'momentum_buffer'])

    State: `step`, `momentum_buffer`, for the k-th axis `Q_k`, in float32 for bfloat16 and float16 parameters; `waited`
    and `refreshes`, the steps since the last refresh and how many there were; `phase`, the number of the tensor, which
    its noise depends on. Memory: for an n x m matrix n m + n^2 + m^2 numbers. Source: Li 2015 and lixilinx/psgd_torch;
    kron_torch 0.3.3, kron.py, whose arguments these are but for `stagger` and `seed`.
    """
    arguments = dict(
        lr=lr,
        b1=b1,
        weight_decay=weight_decay,
        preconditioner_update_probability=preconditioner_update_probability,
        max_size_triangular=max_size_triangular,
        min_ndim_triangular=min_ndim_triangular,
        memory_save_mode=memory_save_mode,
        momentum_into_precond_update=momentum_into_precond_update,
        precond_lr=precond_lr,
        precond_init_scale=precond_init_scale,
        merge_dims=merge_dims,
        stagger=stagger,
        seed=seed,
    )
    return transform(Kron, arguments, **options)
