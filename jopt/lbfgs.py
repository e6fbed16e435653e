"""L-BFGS (torch/optim/lbfgs.py; Nocedal & Wright 2006, algorithm 7.4).

The optimizer that asks for the loss again has a room of its own. `LBFGS.step` is one compiled loop around a pure
function: the vectors' arithmetic is here, the decisions in `jopt.line_search`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jopt import _compat, numerics
from jopt.line_search import (
    DONE,
    START,
    Run,
    Settings,
    begin,
    entry,
    initial_run,
    judge,
)
from jopt.rule import Hyperparameter, at_least_zero, check_hyperparameter
from jopt.transform import P, check_array
from jopt.valued import by_value

Tree = Any
LEAST_CURVATURE = 1e-10  # y . s of a pair that is stored


class LBFGSState(NamedTuple):
    """What L-BFGS keeps between steps, over all n real numbers of the parameters, in torch's names.

    Attributes:
      count: int32, the calls of `step` so far; what a schedule of lr is evaluated at.
      n_iter, func_evals: int32, iterations and evaluations so far.
      d, t: the last direction, (n,), and how far along it the last iteration went.
      old_dirs, old_stps, ro: (history_size + 1, n) differences of gradients y and of parameters s, and 1 / (y . s),
        (history_size + 1,). Rings: row `stored % (history_size + 1)` is where the next pair goes, and no part of it.
      sy: s_i . y_j by row of the rings, (history_size + 1, history_size + 1), where pair j is i or came after it.
      stored: int32, how many pairs were ever stored.
      H_diag: the scale of the first inverse Hessian, (s . y) / (y . y).
      prev_flat_grad, prev_loss: gradient, (n,), and loss where the last iteration began.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a state
    n_iter: Array
    func_evals: Array
    d: Array
    t: Array
    old_dirs: Array
    old_stps: Array
    ro: Array
    sy: Array
    stored: Array
    H_diag: Array
    prev_flat_grad: Array
    prev_loss: Array


def initial_state(settings: Settings, n: int, dtype: Any) -> LBFGSState:
    def integer() -> Array:
        return jnp.zeros((), jnp.int32)

    rows = settings.history_size + 1
    return LBFGSState(
        count=integer(),
        n_iter=integer(),
        func_evals=integer(),
        d=jnp.zeros(n, dtype),
        t=jnp.zeros((), dtype),
        old_dirs=jnp.zeros((rows, n), dtype),
        old_stps=jnp.zeros((rows, n), dtype),
        ro=jnp.zeros(rows, dtype),
        sy=jnp.zeros((rows, rows), dtype),
        stored=integer(),
        H_diag=jnp.ones((), dtype),
        prev_flat_grad=jnp.zeros(n, dtype),
        prev_loss=jnp.zeros((), dtype),
    )


class _Traced:
    """What `judge` and `begin` need, for traced numbers."""

    minimum, maximum, divide = jnp.minimum, jnp.maximum, jnp.divide
    sqrt, logical_not = jnp.sqrt, jnp.logical_not

    @staticmethod
    def where(condition: Array, x: Tree, y: Tree) -> Any:
        return jax.tree.map(functools.partial(jnp.where, condition), x, y)


def _advance(
    settings: Settings, state: LBFGSState, run: Run, bracket_g: tuple[Array, ...], lr: Array, f_new: Array, g_new: Array
) -> tuple[LBFGSState, Run, tuple[Array, ...], Array, Array]:
    """`(state, run, bracket_g, moves, taken)`: `judge`, and `begin` with what both leave to vectors."""
    search, before = settings.line_search_fn is not None, run
    slope = _dot(g_new, state.d) if search else jnp.zeros_like(f_new)
    run, verdict = judge(_Traced, settings, run, f_new, slope, _largest(g_new))
    grad, begins, taken = g_new, verdict.begins, entry(_Traced, run.bracket, run.low)
    if search:
        sources = (*bracket_g, g_new, state.prev_flat_grad)
        bracket_g = tuple(lax.select_n(which.astype(jnp.int32), *sources) for which in verdict.bracket_g)
        grad = entry(_Traced, bracket_g, run.low)

    first = run.fresh
    y, slot = grad - state.prev_flat_grad, state.stored % (settings.history_size + 1)
    state = _remember(state, begins & ~first, first, slot, y, state.d * taken)
    sy, d = lax.cond(begins & ~first, lambda: _direction(settings, state, slot, grad, y), lambda: (state.sy, state.d))
    d = jnp.where(begins & first, -grad, d)
    total = lax.cond(first, lambda: jnp.sum(jnp.abs(grad)), lambda: jnp.ones_like(taken))
    run = _Traced.where(begins, begin(_Traced, settings, run, lr, total, _dot(grad, d), _largest(d)), run)
    run = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), run, before)
    state = state._replace(d=d, sy=sy, prev_flat_grad=jnp.where(begins, grad, state.prev_flat_grad))
    bracket_g = tuple(jnp.where(begins, grad, x) for x in bracket_g)
    return state, run, bracket_g, verdict.moves, taken


def _remember(state: LBFGSState, when: Array, first: Array, slot: Array, y: Array, s: Array) -> LBFGSState:
    ys = _dot(y, s)
    when &= ys > LEAST_CURVATURE

    def write(ring: Array, new: Array) -> Array:
        return lax.dynamic_update_index_in_dim(ring, new, slot, 0)

    # Written in any case, to the row that no stored pair is in: a choice between old and new would copy the ring. That
    # row is multiplied by 0, and must be finite.
    y_row, s_row = (jnp.where(when, x, 0) for x in (y, s))
    rings = lax.optimization_barrier(
        (write(state.old_dirs, y_row), write(state.old_stps, s_row), write(state.ro, 1 / ys))
    )
    old_dirs, old_stps, ro = rings
    return state._replace(
        old_dirs=old_dirs,
        old_stps=old_stps,
        ro=ro,
        stored=jnp.where(first, 0, state.stored + when.astype(jnp.int32)),
        H_diag=jnp.where(when, ys / _dot(y, y), jnp.where(first, jnp.ones_like(ys), state.H_diag)),
    )


def _direction(settings: Settings, state: LBFGSState, slot: Array, grad: Array, y: Array) -> tuple[Array, Array]:
    """`sy` with the products of the pair in `slot`, and -H grad: H the inverse Hessian that the pairs and H_diag make.

    The two loops over the pairs, from the newest i to the oldest and back,

        a_i = ro_i s_i . q,  q -= a_i y_i   and, from r = H_diag q,   c_i = a_i - ro_i y_i . r,  r += c_i s_i

    with q and r taken apart are two triangular systems, U_ij = s_i . y_j for j after i and 1 / ro_i for j = i:

        U a = S (-grad),  q = -grad - Y^T a;    U^T c = a / ro - Y (H_diag q),  r = H_diag q + S^T c

    so that each ring is read twice, as a whole, and q and r are not read and written by the pair.
    """
    size = settings.history_size
    n = jnp.minimum(state.stored, size)
    k = jnp.arange(size, dtype=jnp.int32)
    order, known = (state.stored - n + k) % (size + 1), k < n  # from the oldest
    upper = (k[:, None] < k[None, :]) & known[None, :]
    # Most of the direction's rounding is in these. XLA on CPU adds a product with two vectors in many partial sums,
    # unlike one with a single vector.
    products = _matmul(state.old_stps, jnp.stack([-grad, y], axis=1))
    sy = lax.dynamic_update_slice_in_dim(state.sy, products[:, 1:], slot, 1)
    diagonal = 1 / jnp.where(known, state.ro[order], 1)
    system = jnp.where(upper, sy[order][:, order], jnp.diag(diagonal))

    def solve(b: Array, *, transpose: bool) -> Array:
        return lax.linalg.triangular_solve(
            system, jnp.where(known, b, 0)[:, None], left_side=True, transpose_a=transpose
        )[:, 0]

    def combine(ring: Array, coefficients: Array) -> Array:
        return _matmul(jnp.zeros_like(state.ro).at[order].set(coefficients), ring)

    a = solve(products[order, 0], transpose=False)
    r = (-grad - combine(state.old_dirs, a)) * state.H_diag
    c = solve(a * diagonal - _matmul(state.old_dirs, r)[order], transpose=True)
    return sy, r + combine(state.old_stps, c)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _largest(x: Array) -> Array:
    """max |x|, of no array in between."""
    return jnp.maximum(jnp.max(x, initial=0), -jnp.min(x, initial=0))


def _dot(x: Array, y: Array) -> Array:
    return jnp.sum(x * y)


# --- in JAX ------------------------------------------------------------------------------------------


@by_value
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LBFGS:
    """L-BFGS over a tree of parameters. Made by `jopt.lbfgs`."""

    lr: Hyperparameter
    settings: Settings

    def init(self, params: Tree) -> LBFGSState:
        """The state before the first step: `(2 * history_size + 4) * n` numbers.

        Raises:
          TypeError: a parameter is no floating or complex array.
        """
        _compat.device()
        return initial_state(self.settings, *_numbers(params))

    def step(
        self,
        value_and_grad: Callable[..., tuple[Array, Tree]],
        state: LBFGSState,
        params: P,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[P, LBFGSState, Array]:
        """One step, of up to `max_iter` iterations, in one compiled loop.

        Args:
          value_and_grad: `(params, *args, **kwargs) -> (loss, grads)`, pure, as from `jax.value_and_grad`. Give the
            same function each time, and the data by `args`: it is compiled once for each function. For a complex
            parameter torch's gradient is the conjugate of JAX's; give that.
          state: from `init` or the last step. Donate it in a jit of your own to have the history in place.
          params: the parameters.

        Returns:
          `(params, state, loss)`, the loss at the parameters that came in, as torch's `step` returns it.

        Raises:
          TypeError: a parameter is no floating or complex array.
          ValueError: the state is of other parameters, or what value_and_grad returns does not fit them.
        """
        size, dtype = _numbers(params)
        if not isinstance(state, LBFGSState):
            raise ValueError(f"state: expected an LBFGSState, from init or step, found {type(state).__name__}")
        if state.d.shape != (size,):
            raise ValueError(f"state: expected one of {size} numbers, as params have, found {state.d.size}")
        lr = self.lr
        if callable(schedule := lr):
            lr = numerics.in_double(lambda _, count: schedule(count), (), state.count, dtype=dtype)
        lr = jnp.asarray(lr, dtype)

        def step(lr: Array, state: LBFGSState, params: Tree, args: Any, kwargs: Any) -> Any:
            return _step(self.settings, value_and_grad, lr, state, params, args, kwargs)

        return numerics.laid_out(step, (params, state, lr), lr, state, params, args, kwargs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    settings: Settings, value_and_grad: Any, lr: Array, state: LBFGSState, params: Tree, args: Any, kwargs: Any
) -> tuple[Tree, LBFGSState, Array]:
    x, unflatten = _flatten(params)

    def evaluate(x: Array) -> tuple[Array, Array]:
        loss, grads = value_and_grad(unflatten(x), *args, **kwargs)
        if isinstance(loss, tuple | list | dict):
            raise ValueError(
                f"value_and_grad: expected (loss, grads), found a {type(loss).__name__} in place of the loss"
            )
        if jnp.shape(loss):
            raise ValueError(f"value_and_grad: expected a scalar loss, found shape {jnp.shape(loss)}")
        if jax.tree.map(jnp.shape, grads) != jax.tree.map(jnp.shape, params):
            raise ValueError("value_and_grad: expected gradients of the structure and shapes of params")
        loss, grad = jnp.asarray(loss).astype(x.dtype), _flatten(grads)[0].astype(x.dtype)
        return (-loss, -grad) if settings.maximize else (loss, grad)

    def body(carry: Any) -> Any:
        state, run, bracket_g, x = carry
        loss, grad = evaluate(jnp.where(run.phase == START, x, x + run.t * state.d))
        d = state.d
        state, run, bracket_g, moves, taken = _advance(settings, state, run, bracket_g, lr, loss, grad)
        return state, run, bracket_g, jnp.where(moves, x + taken * d, x)

    run = initial_run(state.n_iter == 0, state.t, state.prev_loss)
    run = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if type(x) is int else None), run)
    bracket_g = (jnp.zeros_like(x),) * 2 if settings.line_search_fn else ()
    # In shard_map the loss may vary over the devices where the parameters do not, and all that comes of it.
    carry = numerics.varying_alike((state, run, bracket_g, x), lambda: evaluate(x))
    state, run, _, x = lax.while_loop(lambda carry: carry[1].phase != DONE, body, carry)
    x = jnp.where(run.unseen, x + run.t * state.d, x)
    state = state._replace(
        count=jnp.asarray(optax.safe_increment(state.count)),
        n_iter=state.n_iter + run.n_iter,
        func_evals=state.func_evals + run.evals,
        t=run.t,
        prev_loss=run.prev_loss,
    )
    return unflatten(x), state, -run.first_loss if settings.maximize else run.first_loss


def _numbers(params: Tree) -> tuple[int, Any]:
    """How many real numbers the parameters have, and the type that they are stepped in."""
    with_path, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in with_path:
        check_array(f"params{jax.tree_util.keystr(path)}", leaf)
    kinds = [(np.size(x), jnp.result_type(x)) for _, x in with_path]
    size = sum(n * (2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1) for n, dtype in kinds)
    return size, numerics.widest(dtype for _, dtype in kinds)


def _flatten(params: Tree) -> tuple[Array, Callable[[Array], Tree]]:
    """All real numbers of the parameters in one vector, of the widest type and at least float32; and back."""
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    dtype = numerics.widest(x.dtype for x in leaves)
    parts = [jnp.stack([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x for x in leaves]
    flat = jnp.concatenate([jnp.zeros(0, dtype), *(x.reshape(-1).astype(dtype) for x in parts)])

    def unflatten(flat: Array) -> Tree:
        ends = itertools.accumulate(x.size for x in parts)
        pieces = [flat[end - x.size : end].reshape(x.shape) for end, x in zip(ends, parts, strict=True)]
        return treedef.unflatten(
            lax.complex(x[..., 0], x[..., 1]).astype(leaf.dtype) if jnp.iscomplexobj(leaf) else x.astype(leaf.dtype)
            for x, leaf in zip(pieces, leaves, strict=True)
        )

    return flat, unflatten


def lbfgs(
    lr: Hyperparameter = 1,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
    *,
    maximize: bool = False,
) -> LBFGS:
    """L-BFGS, as `torch.optim.LBFGS`: its `step` takes a function in place of gradients.

    d = -H g with H from the last history_size pairs (s, y) with y . s > 1e-10, and H_0 = (s . y) / (y . y)
    x <- x + t * d, t = lr (in the very first iteration min(1, 1 / |g|_1) * lr), or, with line_search_fn
    "strong_wolfe", from there the t of torch's cubic search, with c1 = 1e-4 and c2 = 0.9
    A step ends after max_iter iterations, max_eval evaluations (max_iter * 5 // 4 if None), where |g|_inf <=
    tolerance_grad, or where |t d|_inf <= tolerance_change, |loss - loss before| < tolerance_change or
    g . d > -tolerance_change. With maximize, all this of -loss.

    It is no `optax.GradientTransformation`, since it decides itself where the loss is wanted. The parameters' numbers
    are stepped in their widest type, at least float32. Not differentiable in reverse.

    >>> import jax, jax.numpy as jnp, jopt
    >>> def rosenbrock(x):
    ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> value_and_grad = jax.value_and_grad(rosenbrock)  # one function for all steps: each is compiled once
    >>> solver = jopt.lbfgs(line_search_fn="strong_wolfe", max_iter=100)
    >>> params = jnp.array([-1.2, 1.0])
    >>> params, state, loss = solver.step(value_and_grad, solver.init(params), params)
    >>> [round(x, 3) for x in params.tolist()]
    [1.0, 1.0]

    State: `LBFGSState`. Raises torch's errors for its arguments, TypeError for what is no number.
    Source: torch/optim/lbfgs.py; Liu & Nocedal 1989; Nocedal & Wright 2006, chapters 3 and 7.
    """
    check_hyperparameter("lr", lr, at_least_zero("Invalid learning rate: {}"))
    settings = Settings(
        max_iter=max_iter,
        max_eval=max_iter * 5 // 4 if max_eval is None else max_eval,
        tolerance_grad=tolerance_grad,
        tolerance_change=tolerance_change,
        history_size=history_size,
        line_search_fn=line_search_fn,
        maximize=maximize,
    )
    return LBFGS(lr, settings)


# --- the line search ---------------------------------------------------------------------------------
