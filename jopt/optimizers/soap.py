"""SOAP (Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam")."""

from __future__ import annotations

import dataclasses
from typing import Unpack

import jax.numpy as jnp
from jax import Array, lax

from jopt import numerics as t
from jopt.matrices import outer, product
from jopt.optimizers.adam import Adam
from jopt.rule import PHASE, Hyperparameter, Limit, Rule, at_least_zero
from jopt.transform import Options, Transform, optimizer, transform

Matrices = list[Array | None]  # of each axis; None of one that has none
FORMATS = ("channels_first", "channels_last")
FAN_IN = "fan_in"
KEEP, TURN, BEGIN = 0.0, 1.0, 2.0  # what a step does with the eigenbases


@dataclasses.dataclass(frozen=True)
class SOAP(Rule):
    """Adam in the eigenbases of Shampoo's preconditioners: see `soap`."""

    weight_decay: bool
    max_precond_dim: int
    merge_dims: bool | str
    precondition_1d: bool
    normalize_grads: bool
    data_format: str
    correct_bias: bool
    stagger: bool

    hyperparameters = ("lr", "beta1", "beta2", "shampoo_beta", "eps", "weight_decay", "precondition_frequency")
    tuples = {"betas": ("beta1", "beta2")}
    limits = {name: Adam.limits[name] for name in ("lr", "beta1", "beta2", "eps")} | {
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
        "shampoo_beta": Limit(lambda x: x < 1, "shampoo_beta: expected a number below 1, negative for beta2, found {}"),
        "precondition_frequency": Limit(
            lambda x: x >= 1 and x % 1 == 0, "precondition_frequency: expected a number of steps, at least 1, found {}"
        ),
    }
    scope = "tensor"
    real_only = True
    by_operations = False

    def __post_init__(self):
        if not isinstance(self.max_precond_dim, int) or self.max_precond_dim < 0:
            raise ValueError(f"max_precond_dim: expected a size, found {self.max_precond_dim!r}")
        if self.merge_dims not in (False, True, FAN_IN):
            raise ValueError(f"merge_dims: expected False, True or {FAN_IN!r}, found {self.merge_dims!r}")
        if self.data_format not in FORMATS:
            raise ValueError(f"data_format: expected one of {', '.join(FORMATS)}, found {self.data_format!r}")

    def init(self, h, param):
        state = {name: t.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        sides = {k: n for k, n in enumerate(self.merged(param.shape)) if self.has_basis(n, len(param.shape))}
        return state | {f"{name}_{k}": t.zeros(param, (n, n)) for name in ("GG", "Q") for k, n in sides.items()}

    def init_scalars(self, h):
        return {"step": 0.0} | ({PHASE: 0.0} if self.stagger else {})

    def scalars(self, h, s, xp, stored):
        step, every = s["step"], h["precondition_frequency"]  # the first call is none of Adam's steps
        first = step == 0
        size = h["lr"]
        if self.correct_bias:
            n = xp.maximum(step, 1.0)
            size = size * xp.sqrt(1 - h["beta2"] ** n) / (1 - h["beta1"] ** n)
        beta = xp.where(h["shampoo_beta"] >= 0, h["shampoo_beta"], h["beta2"])
        turns = (step + s.get(PHASE, 0.0)) % every == 0
        c = {
            "1-beta1": 1 - h["beta1"],
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "eps": h["eps"],
            "-step_size": -size,
            "-decay": -h["lr"] * h["weight_decay"],
            "1-shampoo_beta": 1 - beta,
            "bases": xp.where(first, BEGIN, xp.where(turns, TURN, KEEP)),
        }
        return c, {**s, "step": step + 1}

    def update(self, c, grad, state, param):
        shape = self.merged(param.shape)
        bases, grams = ([state.get(f"{name}_{k}") for k in range(len(shape))] for name in ("Q", "GG"))
        begins = c["bases"] == BEGIN  # a gradient never meets a basis that it had part in: so the first moves nothing
        turned = self.restored(project(self.as_merged(grad), bases), grad.shape)
        m = t.lerp(state["exp_avg"], turned, c["1-beta1"])
        v = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), turned, turned, c["1-beta2"])
        m, v = t.where(begins, state["exp_avg"], m), t.where(begins, state["exp_avg_sq"], v)
        update = t.div(m, t.add(t.sqrt(v), c["eps"]))
        update = self.restored(project(self.as_merged(update), bases, back=True), grad.shape)
        if self.normalize_grads:
            update = t.div(update, t.add(t.sqrt(t.mean(t.mul(update, update))), jnp.asarray(1e-30, update.dtype)))
        new = t.add(param, update, alpha=c["-step_size"])
        if self.weight_decay:
            new = t.add(new, new, alpha=c["-decay"])
        x = self.as_merged(grad)
        grams = [
            None if old is None else t.lerp(old, outer(x, axis), c["1-shampoo_beta"]) for axis, old in enumerate(grams)
        ]
        m, v, bases = self.with_bases(c["bases"], grams, bases, m, v)
        matrices = {"GG": grams, "Q": bases}
        state = {"exp_avg": m, "exp_avg_sq": v} | {
            f"{name}_{k}": x for name, xs in matrices.items() for k, x in enumerate(xs) if x is not None
        }
        return t.where(begins, param, new), state

    def with_bases(
        self, choice: Array, grams: Matrices, bases: Matrices, m: Array, v: Array
    ) -> tuple[Array, Array, Matrices]:
        """The moments and bases after the step: as they were, turned by a power iteration, or the first ones."""

        def keep(grams: Matrices, bases: Matrices, m: Array, v: Array) -> tuple[Array, Array, Matrices]:
            return m, v, bases

        def begin(grams: Matrices, bases: Matrices, m: Array, v: Array) -> tuple[Array, Array, Matrices]:
            return m, v, [None if x is None else eigenvectors(x) for x in grams]

        def turn(grams: Matrices, bases: Matrices, m: Array, v: Array) -> tuple[Array, Array, Matrices]:
            second, new = self.as_merged(v), []
            for axis, (gram, basis) in enumerate(zip(grams, bases, strict=True)):
                if gram is None or basis is None:
                    new.append(None)
                    continue
                moved = product(gram, basis)
                order = jnp.argsort(-jnp.sum(basis * moved, axis=0))
                second = jnp.take(second, order, axis=axis)
                new.append(jnp.linalg.qr(jnp.take(moved, order, axis=1))[0])
            first = project(project(self.as_merged(m), bases, back=True), new)
            return self.restored(first, m.shape), self.restored(second, v.shape), new

        if all(x is None for x in bases):
            return m, v, bases
        given = (lax.stop_gradient(grams), lax.stop_gradient(bases), m, v)
        given = t.varying_alike(given, lambda: turn(*given))
        return lax.switch(choice.astype(jnp.int32), [keep, turn, begin], *given)

    # --- axes

    def has_basis(self, size: int, axes: int) -> bool:
        """Whether an axis of a tensor of so many has matrices."""
        return size <= self.max_precond_dim and (axes > 1 or self.precondition_1d)

    def merged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with neighbouring axes in one, as long as that has no more than max_precond_dim elements."""
        if not self.merge_dims:
            return tuple(shape)
        if self.merge_dims == FAN_IN:
            return (*shape[:1], *self._joined(shape[:0:-1])[::-1])
        if self._exchanges(shape):
            shape = (shape[0], shape[3], shape[1], shape[2])
        found = self._joined(shape)
        return tuple(found) if found else (1,)

    def _joined(self, shape: tuple[int, ...]) -> list[int]:
        """Sizes with neighbours in one."""
        found, size = [], 1
        for n in shape:
            if size * n <= self.max_precond_dim:
                size *= n
            elif size > 1:
                found.append(size)
                size = n
            else:
                found.append(n)
        return [*found, size] if size > 1 else found

    def _exchanges(self, shape: tuple[int, ...]) -> bool:
        joined = self.merge_dims and self.merge_dims != FAN_IN
        return bool(joined and self.data_format == "channels_last" and len(shape) == 4)

    def as_merged(self, x: Array) -> Array:
        shape = self.merged(x.shape)
        return (jnp.moveaxis(x, 3, 1) if self._exchanges(x.shape) else x).reshape(shape)

    def restored(self, x: Array, shape: tuple[int, ...]) -> Array:
        """A merged array in the leaf's shape."""
        if self._exchanges(shape):
            return jnp.moveaxis(x.reshape(shape[0], shape[3], shape[1], shape[2]), 1, 3)
        return x.reshape(shape)


def project(x: Array, bases: Matrices, *, back: bool = False) -> Array:
    """x in the bases, an axis each; or back from them."""
    for basis in bases:
        x = jnp.moveaxis(x, 0, -1) if basis is None else product(x, basis, ((0,), (int(back),)))
    return x


def eigenvectors(x: Array) -> Array:
    """Of a symmetric matrix, those of large eigenvalues first."""
    return jnp.flip(jnp.linalg.eigh(x)[1], axis=1)


@optimizer
def soap(
    lr: Hyperparameter = 3e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.95),
    shampoo_beta: Hyperparameter = -1,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.01,
    precondition_frequency: Hyperparameter = 10,
    max_precond_dim: int = 10000,
    merge_dims: bool | str = False,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    data_format: str = "channels_first",
    correct_bias: bool = True,
    stagger: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """SOAP: Adam on the gradient in the eigenbases of its own second moments, which are refreshed now and then.

    For a matrix G of n rows, m columns (other tensors likewise, an axis each), with L, R, Q_L, Q_R of the steps before:
    G' = Q_L^T G Q_R;  M, V: Adam's moments of G';  U = Q_L (M / (sqrt(V) + eps)) Q_R^T
    p <- p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * U;  p <- p - lr * weight_decay * p
    L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G,  b = shampoo_beta, or where that is negative beta2
    Every precondition_frequency steps Q_L <- QR of L Q_L, its columns in the order of their eigenvalues, and M and V
    are turned with it. The first call begins L and R, takes their eigenvectors, and moves no parameter.

    An axis of more than max_precond_dim elements has no basis, and a vector only with precondition_1d. merge_dims puts
    neighbouring axes in one, while that has at most max_precond_dim elements; data_format says where a convolution's
    channels are for it. merge_dims="fan_in" leaves the first axis alone and joins the others, from the last on, as
    heavyball does: a convolution of (64, 32, 3, 3) is a matrix of 64 rows. normalize_grads divides U by its root mean
    square. stagger refreshes each tensor's bases in another step: the k-th's when t + k is a multiple of
    precondition_frequency.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.soap(lr=0.1, weight_decay=0)
    >>> params = jnp.eye(2)
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     params, state = tx.step(jnp.array([[3.0, 0.0], [0.0, 1.0]]), state, params)
    >>> [[round(abs(x), 4) for x in row] for row in params.tolist()]
    [[0.9, 0.0], [0.0, 0.9]]

    Derivatives take the bases as constants, for those of equal eigenvalues have none.

    State: `step`, which counts the first call too, where the authors' does not, `exp_avg` and `exp_avg_sq` in the
    eigenbases, for the k-th axis `GG_k` and `Q_k`, in float32 for bfloat16 and float16 parameters; with stagger
    `phase`. Memory: for an n x m matrix 2 n m + 2 n^2 + 2 m^2 numbers. Source: Vyas et al. 2024, algorithm 3; the
    authors' soap.py, whose arguments these are but for `stagger`.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        shampoo_beta=shampoo_beta,
        eps=eps,
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        normalize_grads=normalize_grads,
        data_format=data_format,
        correct_bias=correct_bias,
        stagger=stagger,
    )
    return transform(SOAP, arguments, **options)
