"""What L-BFGS decides (torch/optim/lbfgs.py, `_strong_wolfe`; Nocedal & Wright 2006, algorithms 3.5 and 3.6).

Two pure functions of numbers: `judge` takes in an evaluation, `begin` an iteration's direction, and both say where the
next evaluation is wanted. `jopt.lbfgs` runs them in a compiled loop, the drop-in torch optimizer between the calls of
torch's closure.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jax.core import Tracer

from jopt.rule import single

Number = Any  # a traced one, NumPy's, or Python's
Pair = tuple[Number, Number]  # no array of two rows, which XLA on CPU would write in branches, number by number
ARMIJO, CURVATURE = 1e-4, 0.9  # c1 and c2 of the strong Wolfe conditions
NARROWEST = 1e-9  # a bracket; torch gives its search no tolerance_change
START, SEARCH, ZOOM, DONE = range(4)  # the phases of a step
OLD, TRIAL, BEGINNING = 0, 2, 3  # the gradients of a bracket


class Run(NamedTuple):
    """One step under way, in numbers. The next evaluation is wanted at `x + t * d`, `x` at the start.

    Attributes:
      phase: START, SEARCH (for a bracket; without line search the one evaluation), ZOOM or DONE.
      n_iter, evals: iterations and evaluations in this step.
      fresh: no iteration has ever begun.
      t: how far along d.
      prev_loss, gtd: where the iteration began: the loss, and the gradient . d
      d_norm: max |d|
      bracket, bracket_f, bracket_gtd, bracket_norm: pairs of positions, losses, slopes, and max |gradient|; before
        there is a bracket the first is the trial before this one.
      low: which of the two has the lower loss.
      stuck: the last trial of the zoom was close to the bracket's end.
      ls_iter, max_ls: iterations of the line search, and how many there may be.
      first_loss: of the step's first evaluation.
      unseen: the step ends with a move to a point that is not evaluated.
    """

    phase: Number
    n_iter: Number
    evals: Number
    fresh: Number
    t: Number
    prev_loss: Number
    gtd: Number
    d_norm: Number
    bracket: Pair
    bracket_f: Pair
    bracket_gtd: Pair
    bracket_norm: Pair
    low: Number
    stuck: Number
    ls_iter: Number
    max_ls: Number
    first_loss: Number
    unseen: Number


class Verdict(NamedTuple):
    """What an evaluation leads to.

    Attributes:
      bracket_g: which gradients the bracket has now: OLD or OLD + 1, as before; TRIAL, this evaluation's; BEGINNING,
        that where the iteration began. Entry `low` is the gradient at the point found.
      moves: the parameters go from x to x + bracket[low] * d.
      begins: another iteration begins there, with `begin`.
    """

    bracket_g: Pair
    moves: Number
    begins: Number


@dataclasses.dataclass(frozen=True)
class Settings:
    """torch's arguments without lr."""

    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: str | None
    maximize: bool

    def __post_init__(self) -> None:
        for name in ("max_iter", "max_eval", "history_size"):
            object.__setattr__(self, name, _number(name, getattr(self, name), int))
        for name in ("tolerance_grad", "tolerance_change"):
            object.__setattr__(self, name, _number(name, getattr(self, name), float))
        object.__setattr__(self, "maximize", single("maximize", self.maximize))
        if self.maximize not in (False, True):
            raise ValueError(f"maximize: expected True or False, found {self.maximize!r}")
        if self.line_search_fn not in (None, "strong_wolfe"):
            raise RuntimeError(f"line_search_fn: only 'strong_wolfe' is supported, found {self.line_search_fn!r}")
        if self.history_size < 1:
            raise ValueError(f"history_size: expected at least 1, found {self.history_size}")


def _number(name: str, value: Any, kind: type) -> Any:
    value = single(name, value)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        expected = "an integer" if kind is int else "a number"
        why = "; it is part of the compiled program" if isinstance(value, Tracer) or callable(value) else ""
        raise TypeError(f"{name}: expected {expected}, found {value!r}{why}")
    return kind(value)


def initial_run(fresh: Any, t: Any, prev_loss: Any) -> Run:
    zero = t * 0
    return Run(
        phase=START,
        n_iter=0,
        evals=0,
        fresh=fresh,
        t=t,
        prev_loss=prev_loss,
        gtd=zero,
        d_norm=zero,
        bracket=(zero, zero),
        bracket_f=(zero, zero),
        bracket_gtd=(zero, zero),
        bracket_norm=(zero, zero),
        low=0,
        stuck=False,
        ls_iter=0,
        max_ls=0,
        first_loss=zero,
        unseen=False,
    )


def judge(m: Any, settings: Settings, run: Run, f_new: Number, gtd_new: Number, norm: Number) -> tuple[Run, Verdict]:
    """Take in the evaluation that was asked for.

    Args:
      m: has `where`, also for trees, `minimum`, `maximum`, `divide`, `sqrt` and `logical_not` for the numbers.
      f_new, gtd_new, norm: its loss, gradient . d (looked at in a line search only), max |gradient|.

    Unless `begins` or `run.phase` is DONE, the next evaluation is wanted at `x + run.t * d`.
    """
    starting = run.phase == START
    run = run._replace(evals=run.evals + 1, first_loss=m.where(starting, f_new, run.first_loss))
    t, trial = run.t, (TRIAL, TRIAL)
    here = run._replace(
        bracket=(t, t), bracket_f=(f_new, f_new), bracket_gtd=(gtd_new, gtd_new), bracket_norm=(norm, norm)
    )
    if settings.line_search_fn is None:
        run, accepted, next_t, bracket_g = here, True, t, trial
    else:
        searched, found, next_t, bracket_g = _search(m, run, f_new, gtd_new, norm)
        accepted = starting | found
        run, bracket_g = m.where(starting, (here, trial), (searched, bracket_g))

    taken, loss = entry(m, run.bracket, run.low), entry(m, run.bracket_f, run.low)
    small, going = settings.tolerance_change, m.logical_not(starting)
    stops = entry(m, run.bracket_norm, run.low) <= settings.tolerance_grad
    stops |= going & (
        (run.n_iter == settings.max_iter)
        | (run.evals >= settings.max_eval)
        | (run.d_norm * abs(taken) <= small)
        | (abs(loss - run.prev_loss) < small)
    )
    begins = accepted & m.logical_not(stops) & (run.n_iter < settings.max_iter)
    run = run._replace(
        phase=m.where(accepted & m.logical_not(begins), DONE, run.phase), t=m.where(accepted, taken, next_t)
    )
    return run, Verdict(bracket_g, accepted & going, begins)


def begin(m: Any, settings: Settings, run: Run, lr: Number, total: Number, gtd: Number, d_norm: Number) -> Run:
    """Begin an iteration at the point found.

    Args:
      m: as in `judge`.
      total: sum |gradient|, looked at in the very first iteration only.
      gtd, d_norm: gradient . d and max |d| with the new d.

    If `run.unseen`, the parameters go to `x + run.t * d` without an evaluation.
    """
    inverse, n_iter = 1 / total, run.n_iter + 1
    loss, norm = entry(m, run.bracket_f, run.low), entry(m, run.bracket_norm, run.low)
    climbs = gtd > -settings.tolerance_change
    # Without line search the last point is not evaluated: in a stochastic setting there is no use for it.
    unseen = m.logical_not(climbs) & (n_iter == settings.max_iter) & (settings.line_search_fn is None)
    return run._replace(
        phase=m.where(climbs | unseen, DONE, SEARCH),
        n_iter=n_iter,
        fresh=False,
        t=m.where(run.fresh & (inverse < 1), inverse, 1) * lr,
        prev_loss=loss,
        gtd=gtd,
        d_norm=d_norm,
        bracket=(0.0, 0.0),
        bracket_f=(loss, loss),
        bracket_gtd=(gtd, gtd),
        bracket_norm=(norm, norm),
        low=0,
        stuck=False,
        ls_iter=0,
        max_ls=settings.max_eval - run.evals,
        unseen=unseen,
    )


def _search(m: Any, run: Run, f_new: Number, gtd_new: Number, norm: Number) -> tuple[Run, Number, Number, Pair]:
    """torch's `_strong_wolfe`, from one evaluation to the next: `(run, whether it ends, the next t, bracket_g)`.

    Where it ends, entry `low` of the bracket is the point found.
    """
    t, no = run.t, m.logical_not
    looking, zooming = run.phase == SEARCH, run.phase == ZOOM
    ls_iter = run.ls_iter + m.where(zooming, 1, 0)
    too_high = f_new > run.prev_loss + ARMIJO * t * run.gtd
    flat = abs(gtd_new) <= -CURVATURE * run.gtd

    # Looking for a bracket: entry 0 is the trial before this one.
    given_up = ls_iter >= run.max_ls  # then between the start and here
    closes = too_high | ((ls_iter > 1) & (f_new >= run.bracket_f[0]))
    done_looking = looking & no(given_up) & no(closes) & flat
    brackets = looking & (given_up | closes | flat | (gtd_new >= 0))
    extends = looking & no(brackets)
    extended = _cubic(
        m,
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
    worse = too_high | (f_new >= entry(m, run.bracket_f, low))
    better = no(worse)
    done_zooming = zooming & better & flat
    flips = better & no(flat) & (gtd_new * (entry(m, run.bracket, high) - entry(m, run.bracket, low)) >= 0)

    def choose(old: Pair, n: Number, start: Number) -> Pair:
        """What of the bracket before, the trial and the start makes the next bracket."""
        at_high = m.where(worse, n, m.where(flips, entry(m, old, low), entry(m, old, high)))
        at_low = m.where(worse, entry(m, old, low), n)
        zoomed = entry(m, (at_low, at_high), low), entry(m, (at_high, at_low), low)
        looked = m.where(done_looking, n, m.where(given_up, start, old[0]))
        return m.where(brackets, looked, m.where(extends, n, zoomed[0])), m.where(looking, n, zoomed[1])

    positions = choose(run.bracket, t, 0.0)
    losses = choose(run.bracket_f, f_new, run.prev_loss)
    slopes = choose(run.bracket_gtd, gtd_new, run.gtd)
    norms = choose(run.bracket_norm, norm, norm)  # the start comes in where evaluations have run out: no norm counts
    gradients = choose((OLD, OLD + 1), TRIAL, BEGINNING)
    lower = m.where(losses[0] <= losses[1], 0, 1)
    low = m.where(brackets | (zooming & worse), lower, low)
    ls_iter = m.where(extends, ls_iter + 1, ls_iter)

    # The next trial.
    left, right = m.minimum(*positions), m.maximum(*positions)
    trial = _cubic(m, positions[0], losses[0], slopes[0], positions[1], losses[1], slopes[1], left, right)
    margin = 0.1 * (right - left)
    near = m.minimum(right - trial, trial - left) < margin
    pushed = near & (run.stuck | (trial >= right) | (trial <= left))
    inside = m.where(abs(trial - right) < abs(trial - left), right - margin, left + margin)
    trial = m.where(pushed, inside, trial)

    narrow = abs(positions[1] - positions[0]) * run.d_norm < NARROWEST
    ends = done_looking | done_zooming | (no(extends) & ((ls_iter >= run.max_ls) | narrow))
    run = run._replace(
        phase=m.where(brackets, ZOOM, run.phase),
        bracket=positions,
        bracket_f=losses,
        bracket_gtd=slopes,
        bracket_norm=norms,
        low=low,
        stuck=no(extends) & near & no(pushed),
        ls_iter=ls_iter,
    )
    return run, ends, m.where(extends, extended, trial), gradients


def entry(m: Any, pair: tuple[Any, ...], index: Number) -> Any:
    return m.where(index == 0, *pair)


def _cubic(
    m: Any, x1: Number, f1: Number, g1: Number, x2: Number, f2: Number, g2: Number, lower: Number, upper: Number
) -> Number:
    """The minimum between the bounds of the cubic through two points with slopes g; their middle if it has none."""
    d1 = g1 + g2 - m.divide(3 * (f1 - f2), x1 - x2)
    square = d1 * d1 - g1 * g2
    d2 = m.sqrt(m.maximum(square, 0))
    ascending = x2 - (x2 - x1) * ((g2 + d2 - d1) / (g2 - g1 + 2 * d2))
    descending = x1 - (x1 - x2) * ((g1 + d2 - d1) / (g1 - g2 + 2 * d2))
    at = m.where(x1 <= x2, ascending, descending)
    return m.where(square >= 0, m.minimum(m.maximum(at, lower), upper), (lower + upper) / 2)
