"""L-BFGS (torch/optim/lbfgs.py; Nocedal & Wright 2006, algorithms 3.5, 3.6 and 7.4).

The optimizer that asks for the loss again has a room of its own. The algorithm is one pure function, `advance`, which
takes the loss and the gradient that were asked for and says where they are wanted next. In JAX `LBFGS.step` runs it in
a compiled loop around a pure function; the drop-in torch optimizer calls it between the calls of torch's closure.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.core import Tracer

from jopt import numerics
from jopt.rule import Hyperparameter, at_least_zero, check_hyperparameter
from jopt.transform import check_array

Tree = Any
Pair = tuple[Array, Array]  # no array of two rows, which XLA on CPU would write in branches, number by number
ARMIJO, CURVATURE = 1e-4, 0.9  # c1 and c2 of the strong Wolfe conditions
START, SEARCH, ZOOM, DONE = range(4)


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


class Run(NamedTuple):
    """One step under way: where `advance` is in it. The next evaluation is wanted at `x + t * d`, `x` at the start.

    Attributes:
      phase: START, SEARCH (for a bracket; without line search the one evaluation), ZOOM or DONE.
      n_iter, evals: iterations and evaluations in this step.
      gtd: the gradient where the iteration began . d
      bracket, bracket_f, bracket_gtd, bracket_g: pairs of numbers and of gradients, (n,), without line search (0,).
        Before there is a bracket the first is the trial before this one.
      low: which of the two has the lower loss.
      stuck: the last trial of the zoom was close to the bracket's end.
      ls_iter, max_ls: iterations of the line search, and how many there may be.
      first_loss: of the step's first evaluation.
      unseen: the step ends with a move to a point that is not evaluated.
    """

    phase: Array
    n_iter: Array
    evals: Array
    gtd: Array
    bracket: Pair
    bracket_f: Pair
    bracket_gtd: Pair
    bracket_g: Pair
    low: Array
    stuck: Array
    ls_iter: Array
    max_ls: Array
    first_loss: Array
    unseen: Array


@dataclasses.dataclass(frozen=True)
class Settings:
    """torch's arguments without lr."""

    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: str | None

    def __post_init__(self) -> None:
        for name in ("max_iter", "max_eval", "history_size"):
            object.__setattr__(self, name, _number(name, getattr(self, name), int))
        for name in ("tolerance_grad", "tolerance_change"):
            object.__setattr__(self, name, _number(name, getattr(self, name), float))
        if self.line_search_fn not in (None, "strong_wolfe"):
            raise RuntimeError("only 'strong_wolfe' is supported")
        if self.history_size < 1:
            raise ValueError(f"history_size: expected at least 1, found {self.history_size}")


def _number(name: str, value: Any, kind: type) -> Any:
    value = value.item() if hasattr(value, "item") and not isinstance(value, Tracer) else value
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        expected = "an integer" if kind is int else "a number"
        raise TypeError(f"{name}: expected {expected}, found {value!r}; it is part of the compiled program")
    return kind(value)


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


def initial_run(settings: Settings, n: int, dtype: Any) -> Run:
    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, dtype)

    def integer() -> Array:
        return jnp.zeros((), jnp.int32)

    kept = n if settings.line_search_fn else 0
    return Run(
        phase=integer(),
        n_iter=integer(),
        evals=integer(),
        gtd=zeros(),
        bracket=(zeros(), zeros()),
        bracket_f=(zeros(), zeros()),
        bracket_gtd=(zeros(), zeros()),
        bracket_g=(zeros(kept), zeros(kept)),
        low=integer(),
        stuck=jnp.zeros((), bool),
        ls_iter=integer(),
        max_ls=integer(),
        first_loss=zeros(),
        unseen=jnp.zeros((), bool),
    )


def advance(
    settings: Settings, state: LBFGSState, run: Run, lr: Array, f_new: Array, g_new: Array
) -> tuple[LBFGSState, Run, Array, Array]:
    """Take in the loss and gradient that were asked for.

    Returns:
      `(state, run, taken, moves)`: if `moves`, the parameters go from x to `x + taken * d` with the d before this call.
      Then, unless `run.phase` is DONE, the next evaluation is wanted at `x + state.t * state.d`; if `run.unseen`, the
      parameters go there without one.
    """
    starting = run.phase == START
    state = state._replace(func_evals=state.func_evals + 1)
    run = run._replace(evals=run.evals + 1, first_loss=jnp.where(starting, f_new, run.first_loss))
    if settings.line_search_fn is None:
        accepted, taken, loss, grad, next_t = jnp.array(True), state.t, f_new, g_new, state.t
    else:
        run, found, next_t = _search(settings, state, run, f_new, g_new)
        accepted = starting | found
        taken = jnp.where(starting, state.t, _at(run.bracket, run.low))
        loss = jnp.where(starting, f_new, _at(run.bracket_f, run.low))
        grad = jnp.where(starting, g_new, _at(run.bracket_g, run.low))

    small = settings.tolerance_change
    stops = _largest(grad) <= settings.tolerance_grad
    stops |= ~starting & (
        (run.n_iter == settings.max_iter)
        | (run.evals >= settings.max_eval)
        | (_largest(state.d) * jnp.abs(taken) <= small)
        | (jnp.abs(loss - state.prev_loss) < small)
    )

    # The next iteration: remember this one's pair, choose a direction.
    begins = accepted & ~stops & (run.n_iter < settings.max_iter)
    first = state.n_iter == 0
    y, slot = grad - state.prev_flat_grad, state.stored % (settings.history_size + 1)
    state = _remember(state, begins & ~first, slot, y, state.d * taken)
    sy, d = lax.cond(begins & ~first, lambda: _direction(settings, state, slot, grad, y), lambda: (state.sy, state.d))
    d = jnp.where(begins & first, -grad, d)
    gtd = jnp.where(begins, _dot(grad, d), run.gtd)
    one = begins.astype(jnp.int32)
    n_iter = run.n_iter + one
    inverse = 1 / lax.cond(first, lambda: jnp.sum(jnp.abs(grad)), lambda: jnp.ones_like(gtd))
    begin_t = jnp.where(first & (inverse < 1), inverse, 1) * lr
    state = state._replace(
        n_iter=state.n_iter + one,
        d=d,
        sy=sy,
        t=jnp.where(begins, begin_t, jnp.where(accepted, taken, next_t)),
        prev_flat_grad=jnp.where(begins, grad, state.prev_flat_grad),
        prev_loss=jnp.where(begins, loss, state.prev_loss),
    )
    climbs = begins & (gtd > -small)
    # Without line search the last point is not evaluated: in a stochastic setting there is no use for it.
    unseen = begins & ~climbs & (n_iter == settings.max_iter) & (settings.line_search_fn is None)
    phase = jnp.where(accepted, SEARCH, run.phase)
    phase = jnp.where((accepted & ~begins) | climbs | unseen, DONE, phase)

    def at_begin(new: Array, old: Pair) -> Pair:
        return jnp.where(begins, new, old[0]), jnp.where(begins, new, old[1])

    run = run._replace(
        phase=phase.astype(jnp.int32),
        n_iter=n_iter,
        gtd=gtd,
        bracket=at_begin(jnp.zeros_like(loss), run.bracket),
        bracket_f=at_begin(loss, run.bracket_f),
        bracket_gtd=at_begin(gtd, run.bracket_gtd),
        bracket_g=at_begin(grad, run.bracket_g) if settings.line_search_fn else run.bracket_g,
        stuck=run.stuck & ~begins,
        ls_iter=jnp.where(begins, 0, run.ls_iter),
        unseen=unseen,
        max_ls=jnp.where(begins, settings.max_eval - run.evals, run.max_ls),
    )
    return state, run, taken, accepted & ~starting


def _remember(state: LBFGSState, when: Array, slot: Array, y: Array, s: Array) -> LBFGSState:
    ys = _dot(y, s)
    when &= ys > 1e-10

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
        stored=jnp.where(state.n_iter == 0, 0, state.stored + when.astype(jnp.int32)),
        H_diag=jnp.where(when, ys / _dot(y, y), jnp.where(state.n_iter == 0, jnp.ones_like(ys), state.H_diag)),
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


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """L-BFGS over a tree of parameters. Made by `jopt.lbfgs`."""

    lr: Hyperparameter
    settings: Settings

    def init(self, params: Tree) -> LBFGSState:
        """The state before the first step: `(2 * history_size + 4) * n` numbers.

        Raises:
          TypeError: a parameter is no floating or complex array.
        """
        flat, _ = _flatten(params)
        return initial_state(self.settings, flat.size, flat.dtype)

    def step(
        self,
        value_and_grad: Callable[..., tuple[Array, Tree]],
        state: LBFGSState,
        params: Tree,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tree, LBFGSState, Array]:
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
        flat, _ = _flatten(params)
        if state.d.shape != flat.shape:
            raise ValueError(f"state: expected one of {flat.size} numbers, as params have, found {state.d.size}")
        lr = self.lr
        if callable(schedule := lr):
            lr = numerics.in_double(lambda _, count: schedule(count), (), state.count, dtype=flat.dtype)
        lr = jnp.asarray(lr, flat.dtype)
        return _step(self.settings, value_and_grad, lr, state, params, args, kwargs)


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
        return jnp.asarray(loss).astype(x.dtype), _flatten(grads)[0].astype(x.dtype)

    def body(carry: tuple[LBFGSState, Run, Array]) -> tuple[LBFGSState, Run, Array]:
        state, run, x = carry
        loss, grad = evaluate(jnp.where(run.phase == START, x, x + state.t * state.d))
        d = state.d
        state, run, taken, moves = advance(settings, state, run, lr, loss, grad)
        return state, run, jnp.where(moves, x + taken * d, x)

    carry = (state, initial_run(settings, x.size, x.dtype), x)
    state, run, x = lax.while_loop(lambda carry: carry[1].phase != DONE, body, carry)
    x = jnp.where(run.unseen, x + state.t * state.d, x)
    return unflatten(x), state._replace(count=jnp.asarray(optax.safe_increment(state.count))), run.first_loss


def _flatten(params: Tree) -> tuple[Array, Callable[[Array], Tree]]:
    """All real numbers of the parameters in one vector, of the widest type and at least float32; and back."""
    with_path, treedef = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in with_path:
        check_array(f"params{jax.tree_util.keystr(path)}", leaf)
    leaves = [jnp.asarray(leaf) for _, leaf in with_path]
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
) -> LBFGS:
    """L-BFGS, as `torch.optim.LBFGS`: its `step` takes a function in place of gradients.

    d = -H g with H from the last history_size pairs (s, y) with y . s > 1e-10, and H_0 = (s . y) / (y . y)
    x <- x + t * d, t = lr (in the very first iteration min(1, 1 / |g|_1) * lr), or, with line_search_fn
    "strong_wolfe", from there the t of torch's cubic search, with c1 = 1e-4 and c2 = 0.9
    A step ends after max_iter iterations, max_eval evaluations (max_iter * 5 // 4 if None), where |g|_inf <=
    tolerance_grad, or where |t d|_inf <= tolerance_change, |loss - loss before| < tolerance_change or
    g . d > -tolerance_change.

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
    )
    return LBFGS(lr, settings)


# --- the line search ---------------------------------------------------------------------------------


def _search(settings: Settings, state: LBFGSState, run: Run, f_new: Array, g_new: Array) -> tuple[Run, Array, Array]:
    """torch's `_strong_wolfe`, from one evaluation to the next: `(run, whether it ends, the next t)`.

    Where it ends, entry `low` of the bracket is the point found.
    """
    t, d = state.t, state.d
    gtd_new = _dot(g_new, d)
    ls_iter = run.ls_iter + (run.phase == ZOOM).astype(jnp.int32)
    too_high = f_new > state.prev_loss + ARMIJO * t * run.gtd
    flat = jnp.abs(gtd_new) <= -CURVATURE * run.gtd

    # Looking for a bracket: entry 0 is the trial before this one.
    looking = run.phase == SEARCH
    given_up = ls_iter >= run.max_ls  # then between the start and here
    closes = too_high | ((ls_iter > 1) & (f_new >= run.bracket_f[0]))
    done_looking = looking & ~given_up & ~closes & flat
    brackets = looking & (given_up | closes | flat | (gtd_new >= 0))
    extends = looking & ~brackets
    extended = _cubic(
        run.bracket[0],
        run.bracket_f[0],
        run.bracket_gtd[0],
        t,
        f_new,
        gtd_new,
        t + 0.01 * (t - run.bracket[0]),
        t * 10,
    )

    # Zooming in.
    low, high = run.low, 1 - run.low
    worse = too_high | (f_new >= _at(run.bracket_f, low))
    done_zooming = (run.phase == ZOOM) & ~worse & flat
    flips = ~worse & ~flat & (gtd_new * (_at(run.bracket, high) - _at(run.bracket, low)) >= 0)

    def choose(old: Pair, n: Array, start: Array) -> Pair:
        """What of the bracket before, the trial and the start makes the next bracket."""
        at_high = jnp.where(worse, n, jnp.where(flips, _at(old, low), _at(old, high)))
        at_low = jnp.where(worse, _at(old, low), n)
        zoomed = _at((at_low, at_high), low), _at((at_high, at_low), low)
        looked = jnp.where(done_looking, n, jnp.where(given_up, start, old[0]))
        return jnp.where(brackets, looked, jnp.where(extends, n, zoomed[0])), jnp.where(looking, n, zoomed[1])

    positions = choose(run.bracket, t, jnp.zeros_like(t))
    losses = choose(run.bracket_f, f_new, state.prev_loss)
    slopes = choose(run.bracket_gtd, gtd_new, run.gtd)
    gradients = choose(run.bracket_g, g_new, state.prev_flat_grad)
    lower = jnp.where(losses[0] <= losses[1], 0, 1)
    low = jnp.where(brackets | ((run.phase == ZOOM) & worse), lower, low)
    ls_iter = jnp.where(extends, ls_iter + 1, ls_iter)

    # The next trial.
    left, right = jnp.minimum(*positions), jnp.maximum(*positions)
    trial = _cubic(positions[0], losses[0], slopes[0], positions[1], losses[1], slopes[1], left, right)
    margin = 0.1 * (right - left)
    near = jnp.minimum(right - trial, trial - left) < margin
    pushed = near & (run.stuck | (trial >= right) | (trial <= left))
    inside = jnp.where(jnp.abs(trial - right) < jnp.abs(trial - left), right - margin, left + margin)
    trial = jnp.where(pushed, inside, trial)

    narrow = jnp.abs(positions[1] - positions[0]) * _largest(d) < settings.tolerance_change
    ends = done_looking | done_zooming | (~extends & ((ls_iter >= run.max_ls) | narrow))
    run = run._replace(
        phase=jnp.where(brackets, ZOOM, run.phase),
        bracket=positions,
        bracket_f=losses,
        bracket_gtd=slopes,
        bracket_g=gradients,
        low=low.astype(jnp.int32),
        stuck=~extends & near & ~pushed,
        ls_iter=ls_iter,
    )
    return run, ends, jnp.where(extends, extended, trial)


def _at(pair: Pair, index: Array) -> Array:
    return jnp.where(index == 0, *pair)


def _cubic(x1: Array, f1: Array, g1: Array, x2: Array, f2: Array, g2: Array, lower: Array, upper: Array) -> Array:
    """The minimum between the bounds of the cubic through two points with slopes g; their middle if it has none."""
    d1 = g1 + g2 - 3 * (f1 - f2) / (x1 - x2)
    square = d1 * d1 - g1 * g2
    d2 = jnp.sqrt(jnp.maximum(square, 0))
    ascending = x2 - (x2 - x1) * ((g2 + d2 - d1) / (g2 - g1 + 2 * d2))
    descending = x1 - (x1 - x2) * ((g1 + d2 - d1) / (g1 - g2 + 2 * d2))
    at = jnp.where(x1 <= x2, ascending, descending)
    return jnp.where(square >= 0, jnp.minimum(jnp.maximum(at, lower), upper), (lower + upper) / 2)
