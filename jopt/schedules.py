"""torch's learning rate schedulers as pure functions of the step.

Each function here returns a `Schedule`: called with a step it gives the value that torch's optimizer holds after that
many `scheduler.step()`. Any hyperparameter of a jopt optimizer takes one, and optax's `learning_rate` too.

>>> import jopt
>>> from jopt import schedules
>>> lr = schedules.step_lr(0.1, step_size=30, gamma=0.1)
>>> round(lr(0), 6), round(lr(59), 6), round(lr(60), 6)
(0.1, 0.01, 0.001)
>>> tx = jopt.sgd(lr=lr, momentum=0.9)

The step is a Python or NumPy number or array (the value is computed by NumPy, in float64), or a JAX array, traced or
not (the value is computed in float64 too, whatever `jax_enable_x64` says, and rounded once to JAX's default float).
Nothing is carried from step to step, so a run goes on from any step. `jit`, `vmap`, `scan` and `grad` pass through.

The values are torch's closed forms. Where torch multiplies the last value on and on instead, its own values drift
from these by rounding: docs/schedules.md has the figures.

Source: torch/optim/lr_scheduler.py and torch/optim/swa_utils.py.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jopt import numerics, valued

__all__ = [
    "Schedule",
    "chained_scheduler",
    "constant_lr",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cyclic_lr",
    "cyclic_momentum",
    "exponential_lr",
    "lambda_lr",
    "linear_lr",
    "multi_step_lr",
    "multiplicative_lr",
    "one_cycle_lr",
    "one_cycle_momentum",
    "polynomial_lr",
    "sequential_lr",
    "step_lr",
    "swalr",
]

A = ParamSpec("A")
Number = Any  # a Python number or a 0-d array, traced or not
Function = Callable[[Any, Any], Any]  # (step, NumPy or jax.numpy) -> value


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A function of the step. Made by the functions of this module; call it."""

    name: str
    value: Function
    base: Number | None = None  # the lr that the values are relative to; None if they do not depend on the optimizer's
    recurse: Callable[[Any, Any, Any], Any] | None = None  # (lr, step, xp): what torch makes of the lr before
    resumed: Callable[[Any, Any, Any], Any] | None = None  # (lr, step, xp): the value if it goes on from an lr
    last: int | None = None  # the last step that torch takes
    made: tuple[Callable[..., Schedule], dict[str, Any]] | None = None  # by which function, with which arguments

    def __call__(self, step: Any) -> Any:
        """The value after `step` steps of torch's scheduler: a float, or an array of the shape of `step`.

        Raises:
          ValueError: a known step is negative, or beyond the last one of `one_cycle_lr`. A traced one cannot be
            checked: beyond the last step the value stays.
        """
        if isinstance(step, Array):
            if jax.config.read("jax_enable_x64"):  # as in the scope in which jopt computes an optimizer's numbers
                with jax.numpy_dtype_promotion("standard"):
                    return self.value(self._held(step, jnp), jnp)
            return numerics.in_double(lambda x, _: self.value(self._held(x, jnp), jnp), step, dtype=jnp.zeros(()).dtype)
        steps = np.asarray(step)
        if (steps < 0).any():
            raise ValueError(f"{self.name}: expected a step of at least 0, found {step}")
        if self.last is not None and (steps > self.last).any():
            raise ValueError(f"Tried to step {steps.max()} times. The specified number of total steps is {self.last}")
        value = self.value(steps.item() if steps.ndim == 0 else steps, np)
        return float(value) if steps.ndim == 0 else np.broadcast_to(value, steps.shape)

    def __repr__(self) -> str:
        return f"<schedule {self.name}>" if self.made is None else valued.call(self.name, (), self.made[1])

    def __reduce__(self) -> Any:
        if self.made is None:
            raise TypeError(f"{self!r}: only what the functions of jopt.schedules return can be pickled")
        return _make, self.made

    def __deepcopy__(self, memo: Any) -> Schedule:
        return self

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Schedule) and self._value == other._value)

    def __hash__(self) -> int:
        return hash(self._value)

    @functools.cached_property
    def _value(self) -> Any:
        return (self.name, id(self)) if self.made is None else (self.name, valued.value(self.made[1]))

    def _held(self, step: Any, xp: Any) -> Any:
        return step if self.last is None else xp.minimum(step, self.last)

    def after(self, lr: Any, step: Any, xp: Any) -> Any:
        """The next lr where the last one is `lr`, as torch's `get_lr` computes it: what chaining composes."""
        if self.base is None:
            return self.value(step, xp)
        if self.recurse is not None:
            return self.recurse(lr, step, xp)
        before = xp.where(step == 0, self.base, self.value(xp.maximum(step - 1, 0), xp))
        still = before == 0  # where torch leaves the lr as it is
        return lr * xp.where(still, 1, self.value(step, xp) / xp.where(still, 1, before))


def _make(function: Callable[..., Schedule], arguments: dict[str, Any]) -> Schedule:
    return function(**arguments)


def _schedule(function: Callable[A, Schedule]) -> Callable[A, Schedule]:
    """A function whose schedules know what made them: to be shown, compared and pickled."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Schedule:
        args = tuple(list(x) if isinstance(x, Iterator) else x for x in args)
        schedule = function(*args, **kwargs)
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        return dataclasses.replace(schedule, made=(make, dict(arguments)))

    return make  # type: ignore[return-value]


def _float(x: Any) -> Any:
    return x.astype(np.float64) if isinstance(x, Array | np.ndarray) else float(x)


def _over(a: Any, b: Any) -> Any:
    """a / b, rounded once.

    XLA would multiply by the reciprocal of a constant instead, which cosines of large arguments show; it cannot know
    that this divisor is one.
    """
    return a / (b + 0.0 * a) if isinstance(a, Array) else a / b


def _last(step: Array) -> Array:
    return jnp.max(step, initial=0).astype(jnp.int64)


def _check(function: str, name: str, value: Any, accepts: Callable[[Any], bool], expected: str) -> None:
    """Raise unless a known number is as expected."""
    if isinstance(value, Array):
        return
    try:
        good = accepts(value)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{function}: expected {name} {expected}, found {value!r}")


def _positive(function: str, **values: Any) -> None:
    for name, value in values.items():
        _check(function, name, value, lambda x: x > 0, "greater than 0")


def _check_function(value: Any) -> None:
    if not callable(value):
        raise TypeError(f"lr_lambda should be a function, but got {type(value).__name__}")


# --- of the base lr ----------------------------------------------------------------------------------


@_schedule
def lambda_lr(lr: Number, lr_lambda: Callable[[Any], Any]) -> Schedule:
    """lr * lr_lambda(step), as `LambdaLR`.

    `lr_lambda` is traced in training: write it with operators and `jax.numpy`.

    >>> lambda_lr(0.5, lambda step: 0.5**step)(3)
    0.0625
    """
    _check_function(lr_lambda)
    return Schedule("lambda_lr", lambda step, xp: lr * lr_lambda(step))


@_schedule
def multiplicative_lr(lr: Number, lr_lambda: Callable[[Any], Any]) -> Schedule:
    """lr * lr_lambda(1) * ... * lr_lambda(step), as `MultiplicativeLR`.

    A product of unknown factors has no closed form: a value costs `step` evaluations.

    >>> multiplicative_lr(0.5, lambda step: 0.5)(3)
    0.0625
    """
    _check_function(lr_lambda)

    def product(lr: Any, first: int, step: Any, xp: Any) -> Any:
        def times(i: Any, value: Any) -> Any:
            return xp.where(i <= step, value * lr_lambda(i), value)

        value = lr * xp.ones(np.shape(step))
        if xp is np:
            for i in range(first, int(np.max(step, initial=0)) + 1):
                value = times(i, value)
            return value
        return lax.fori_loop(first, _last(step) + 1, times, value)

    return Schedule(
        "multiplicative_lr",
        lambda step, xp: product(lr, 1, step, xp),
        base=lr,
        recurse=lambda before, step, xp: before * xp.where(step == 0, 1, lr_lambda(step)),
        resumed=lambda before, step, xp: product(before, 0, step, xp),
    )


@_schedule
def step_lr(lr: Number, step_size: int, gamma: Number = 0.1) -> Schedule:
    """lr * gamma ** (step // step_size), as `StepLR`.

    >>> step_lr(1.0, step_size=2, gamma=0.5)([0, 1, 2, 3, 4]).tolist()
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    _positive("step_lr", step_size=step_size)
    return Schedule("step_lr", lambda step, xp: lr * gamma ** _float(step // step_size), base=lr)


@_schedule
def multi_step_lr(lr: Number, milestones: Iterable[int], gamma: Number = 0.1) -> Schedule:
    """lr * gamma ** (milestones reached), as `MultiStepLR`; a milestone given twice counts twice.

    >>> multi_step_lr(1.0, [2, 3, 3], gamma=0.5)([1, 2, 3]).tolist()
    [1.0, 0.5, 0.125]
    """
    milestones = sorted(milestones)
    for milestone in milestones:
        _check("multi_step_lr", "milestones", milestone, lambda x: x >= 0, "of at least 0")
    return Schedule(
        "multi_step_lr",
        lambda step, xp: lr * gamma ** _float(sum(((step >= m) * 1 for m in milestones), 0 * step)),
        base=lr,
    )


@_schedule
def constant_lr(lr: Number, factor: Number = 1.0 / 3, total_iters: int = 5) -> Schedule:
    """lr * factor, and from step `total_iters` on lr, as `ConstantLR`.

    With total_iters=0 it stays at lr * factor, as torch's does.

    >>> constant_lr(1.0, factor=0.5, total_iters=2)([0, 1, 2]).tolist()
    [0.5, 0.5, 1.0]
    """
    if not isinstance(factor, Array) and not 0 <= factor <= 1:
        raise ValueError("Constant multiplicative factor expected to be between 0 and 1.")
    _check("constant_lr", "total_iters", total_iters, lambda x: x >= 0, "of at least 0")
    end = total_iters or math.inf
    return Schedule("constant_lr", lambda step, xp: lr * (factor + (step >= end) * (1 - factor)), base=lr)


@_schedule
def linear_lr(lr: Number, start_factor: Number = 1.0 / 3, end_factor: Number = 1.0, total_iters: int = 5) -> Schedule:
    """lr * (start_factor + (end_factor - start_factor) * min(step, total_iters) / total_iters), as `LinearLR`.

    With total_iters=0 it stays at lr * start_factor, as torch's does.

    >>> linear_lr(1.0, start_factor=0.5, total_iters=2)([0, 1, 2, 3]).tolist()
    [0.5, 0.75, 1.0, 1.0]
    """
    if not isinstance(start_factor, Array) and not 0 < start_factor <= 1:
        raise ValueError("Starting multiplicative factor expected to be greater than 0 and less or equal to 1.")
    if not isinstance(end_factor, Array) and not 0 <= end_factor <= 1:
        raise ValueError("Ending multiplicative factor expected to be between 0 and 1.")
    _check("linear_lr", "total_iters", total_iters, lambda x: x >= 0, "of at least 0")
    return Schedule(
        "linear_lr",
        lambda step, xp: (
            lr
            * (
                start_factor
                + (end_factor - start_factor) * _over(xp.minimum(total_iters, _float(step)), max(total_iters, 1))
            )
        ),
        base=lr,
    )


@_schedule
def exponential_lr(lr: Number, gamma: Number) -> Schedule:
    """lr * gamma ** step, as `ExponentialLR`.

    >>> exponential_lr(1.0, gamma=0.5)(3)
    0.125
    """
    return Schedule("exponential_lr", lambda step, xp: lr * gamma ** _float(step), base=lr)


@_schedule
def polynomial_lr(lr: Number, total_iters: int = 5, power: Number = 1.0) -> Schedule:
    """lr * (1 - min(step, total_iters) / total_iters) ** power, as `PolynomialLR`.

    With total_iters=0 it stays at lr, as torch's does.

    >>> polynomial_lr(1.0, total_iters=4, power=2.0)([0, 1, 2, 4, 5]).tolist()
    [1.0, 0.5625, 0.25, 0.0, 0.0]
    """
    _check("polynomial_lr", "total_iters", total_iters, lambda x: x >= 0, "of at least 0")
    return Schedule(
        "polynomial_lr",
        lambda step, xp: lr * (1.0 - _over(xp.minimum(total_iters, _float(step)), max(total_iters, 1))) ** power,
        base=lr,
    )


@_schedule
def cosine_annealing_lr(lr: Number, T_max: int, eta_min: Number = 0.0) -> Schedule:
    """eta_min + (lr - eta_min) * (1 + cos(pi * step / T_max)) / 2, as `CosineAnnealingLR`.

    After T_max it rises again, with a period of 2 * T_max.

    >>> cosine_annealing_lr(1.0, T_max=2)([0, 1, 2, 3, 4]).round(6).tolist()
    [1.0, 0.5, 0.0, 0.5, 1.0]
    """
    _positive("cosine_annealing_lr", T_max=T_max)

    def value(step: Any, xp: Any) -> Any:
        return eta_min + (lr - eta_min) * (1 + xp.cos(_over(math.pi * _float(step), T_max))) / 2

    def recurse(before: Any, step: Any, xp: Any) -> Any:
        turned = (step - 1 - T_max) % (2 * T_max) == 0  # the value before was eta_min: nothing to multiply
        up = before + (lr - eta_min) * (1 - math.cos(math.pi / T_max)) / 2
        last = 1 + xp.cos(_over(math.pi * _float(step - 1), T_max))
        on = (1 + xp.cos(_over(math.pi * _float(step), T_max))) / xp.where(turned, 1, last) * (
            before - eta_min
        ) + eta_min
        return xp.where(step == 0, before, xp.where(turned, up, on))

    return Schedule("cosine_annealing_lr", value, base=lr, recurse=recurse)


@_schedule
def cosine_annealing_warm_restarts(lr: Number, T_0: int, T_mult: int = 1, eta_min: Number = 0.0) -> Schedule:
    """eta_min + (lr - eta_min) * (1 + cos(pi * T_cur / T_i)) / 2, as `CosineAnnealingWarmRestarts`.

    T_cur counts the steps since the last restart; the i-th cycle has T_i = T_0 * T_mult**i steps. A step may be a
    fraction.

    >>> cosine_annealing_warm_restarts(1.0, T_0=2, T_mult=2)([0, 1, 2, 4, 6]).round(6).tolist()
    [1.0, 0.5, 1.0, 0.5, 1.0]
    """
    if not isinstance(T_0, int) or T_0 <= 0:
        raise ValueError(f"Expected positive integer T_0, but got {T_0}")
    if not isinstance(T_mult, int) or T_mult < 1:
        raise ValueError(f"Expected integer T_mult >= 1, but got {T_mult}")
    if not isinstance(eta_min, float | int | Array):
        raise ValueError(f"Expected float or int eta_min, but got {eta_min} of type {type(eta_min)}")

    def value(step: Any, xp: Any) -> Any:
        step = _float(step)
        if T_mult == 1:
            now, length = step % T_0, float(T_0)
        else:
            # Whole numbers, since a logarithm is off by one at a restart now and then.
            start, length = 0.0 * step, T_0 + 0.0 * step
            begin, size = 0, T_0
            while begin + size < 2**53:
                begin, size = begin + size, size * T_mult
                start, length = xp.where(step >= begin, begin, start), xp.where(step >= begin, size, length)
            now = step - start
        return eta_min + (lr - eta_min) * (1 + xp.cos(_over(math.pi * now, length))) / 2

    return Schedule("cosine_annealing_warm_restarts", value)


@_schedule
def swalr(lr: Number, swa_lr: Number, anneal_epochs: int = 10, anneal_strategy: str = "cos") -> Schedule:
    """swa_lr * a + lr * (1 - a), a from 0 to 1 in `anneal_epochs` steps, as `torch.optim.swa_utils.SWALR`.

    `lr` is the one at which it begins: `sequential_lr([before, swalr(...)], [start])` goes on from the one before.

    >>> swalr(1.0, swa_lr=0.5, anneal_epochs=2, anneal_strategy="linear")([0, 1, 2, 3]).tolist()
    [1.0, 0.75, 0.5, 0.5]
    """
    if anneal_strategy not in ("cos", "linear"):
        raise ValueError(f"anneal_strategy must be one of 'cos' or 'linear', instead got {anneal_strategy}")
    if not isinstance(anneal_epochs, int) or anneal_epochs < 0:
        raise ValueError(f"anneal_epochs must be equal or greater than 0, got {anneal_epochs}")

    def value(lr: Any, step: Any, xp: Any) -> Any:
        t = xp.minimum(1.0, _over(_float(step), anneal_epochs)) if anneal_epochs else 1.0
        a = (1 - xp.cos(math.pi * t)) / 2 if anneal_strategy == "cos" else t
        return swa_lr * a + lr * (1 - a)

    return Schedule("swalr", lambda step, xp: value(lr, step, xp), resumed=value)


# --- of their own limits -----------------------------------------------------------------------------


@_schedule
def cyclic_lr(
    base_lr: Number,
    max_lr: Number,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """base_lr + (max_lr - base_lr) * height * scale, as `CyclicLR`: height goes from 0 to 1 and back in each cycle.

    Args:
      mode: the scale: "triangular" 1, "triangular2" 2 ** (1 - cycle), "exp_range" gamma ** step.
      scale_fn: a scale of your own, instead of a mode: of the cycle (1, 2, ...), or with scale_mode="iterations" of
        the step. It is traced in training.

    Torch cycles the momentum against it: that is `cyclic_momentum`.

    >>> cyclic_lr(0.0, 1.0, step_size_up=2, mode="triangular2")([0, 1, 2, 3, 4, 6]).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]
    """
    height = _cycle("cyclic_lr", step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
    return Schedule("cyclic_lr", lambda step, xp: base_lr + (max_lr - base_lr) * height(step, xp))


@_schedule
def cyclic_momentum(
    base_momentum: Number = 0.8,
    max_momentum: Number = 0.9,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """max_momentum - (max_momentum - base_momentum) * height * scale: the momentum, or Adam's beta1, under `CyclicLR`.

    >>> import jopt
    >>> cycle = dict(step_size_up=100, mode="exp_range", gamma=0.999)
    >>> tx = jopt.sgd(lr=cyclic_lr(1e-3, 1e-1, **cycle), momentum=cyclic_momentum(**cycle))
    """
    height = _cycle("cyclic_momentum", step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
    return Schedule(
        "cyclic_momentum", lambda step, xp: max_momentum - (max_momentum - base_momentum) * height(step, xp)
    )


def _cycle(
    function: str,
    step_size_up: int,
    step_size_down: int | None,
    mode: str,
    gamma: Number,
    scale_fn: Callable[[Any], Any] | None,
    scale_mode: str,
) -> Function:
    _positive(function, step_size_up=step_size_up)
    if step_size_down is not None:
        _check(function, "step_size_down", step_size_down, lambda x: x >= 0, "of at least 0")
    if mode not in ("triangular", "triangular2", "exp_range") and scale_fn is None:
        raise ValueError("mode is invalid and scale_fn is None")
    if scale_mode not in ("cycle", "iterations"):
        raise ValueError(f"{function}: expected scale_mode 'cycle' or 'iterations', found {scale_mode!r}")
    up = float(step_size_up)
    total = up + (up if step_size_down is None else float(step_size_down))
    ratio = up / total

    def height(step: Any, xp: Any) -> Any:
        cycle = xp.floor(1 + _over(_float(step), total))
        x = 1.0 + _over(_float(step), total) - cycle
        rise = xp.where(x <= ratio, _over(x, ratio), _over(x - 1, ratio - 1 if ratio < 1 else 1.0))
        if scale_fn is not None:
            return rise * scale_fn(cycle if scale_mode == "cycle" else step)
        if mode == "triangular2":
            return rise / 2.0 ** (cycle - 1)
        return rise * gamma ** _float(step) if mode == "exp_range" else rise

    return height


@_schedule
def one_cycle_lr(
    max_lr: Number,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """From max_lr / div_factor up to max_lr and down to max_lr / div_factor / final_div_factor, as `OneCycleLR`.

    Args:
      total_steps: of the run; or epochs * steps_per_epoch. Torch raises if it is stepped further, and so does a known
        step here; a traced one stays at the last value.
      pct_start: the share of the steps that go up.
      anneal_strategy: "cos" or "linear".
      three_phase: down to max_lr / div_factor as long as up, and then to the end.

    Torch cycles the momentum against it: that is `one_cycle_momentum`.

    >>> lr = one_cycle_lr(1.0, total_steps=5, pct_start=0.4, anneal_strategy="linear", div_factor=2.0)
    >>> lr([0, 1, 4]).round(6).tolist()
    [0.5, 1.0, 5e-05]
    """
    total, ends = _one_cycle(total_steps, epochs, steps_per_epoch, pct_start, anneal_strategy, three_phase)
    first = max_lr / div_factor
    last = first / final_div_factor
    levels = [first, max_lr, first, last] if three_phase else [first, max_lr, last]
    return Schedule("one_cycle_lr", lambda s, xp: _phases(s, xp, ends, levels, anneal_strategy), last=total)


@_schedule
def one_cycle_momentum(
    base_momentum: Number = 0.85,
    max_momentum: Number = 0.95,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    three_phase: bool = False,
) -> Schedule:
    """From max_momentum down to base_momentum and up again: the momentum, or Adam's beta1, under `OneCycleLR`.

    >>> import jopt
    >>> cycle = dict(total_steps=1000)
    >>> tx = jopt.adamw(lr=one_cycle_lr(1e-2, **cycle), betas=(one_cycle_momentum(**cycle), 0.999))
    """
    total, ends = _one_cycle(total_steps, epochs, steps_per_epoch, pct_start, anneal_strategy, three_phase)
    low, high = base_momentum, max_momentum
    levels = [high, low, high, high] if three_phase else [high, low, high]
    return Schedule("one_cycle_momentum", lambda s, xp: _phases(s, xp, ends, levels, anneal_strategy), last=total)


def _one_cycle(
    total_steps: int | None,
    epochs: int | None,
    steps_per_epoch: int | None,
    pct_start: float,
    anneal_strategy: str,
    three_phase: bool,
) -> tuple[int, list[float]]:
    """The number of steps, and where each phase ends."""
    if total_steps is None:
        if epochs is None or steps_per_epoch is None:
            raise ValueError("You must define either total_steps OR (epochs AND steps_per_epoch)")
        for name, x in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
            if not isinstance(x, int) or x <= 0:
                raise ValueError(f"Expected positive integer {name}, but got {x}")
        total_steps = epochs * steps_per_epoch
    elif not isinstance(total_steps, int) or total_steps <= 0:
        raise ValueError(f"Expected positive integer total_steps, but got {total_steps}")
    if not isinstance(pct_start, float) or not 0 <= pct_start <= 1:
        raise ValueError(f"Expected float between 0 and 1 pct_start, but got {pct_start}")
    if anneal_strategy not in ("cos", "linear"):
        raise ValueError(f"anneal_strategy must be one of 'cos' or 'linear', instead got {anneal_strategy}")
    ends = [pct_start * total_steps - 1, total_steps - 1]
    return total_steps, [ends[0], 2 * pct_start * total_steps - 2, ends[1]] if three_phase else ends


def _phases(step: Any, xp: Any, ends: list[float], levels: list[Any], strategy: str) -> Any:
    """From level to level; phase i ends at step ends[i] on level i + 1, and the last one goes on."""
    starts = [0.0, *ends[:-1]]
    value: Any = None
    for i in reversed(range(len(ends))):
        length = ends[i] - starts[i]
        part = _over(_float(step) - starts[i], length if length else 1.0)
        a, b = levels[i], levels[i + 1]
        x = b + (a - b) / 2.0 * (xp.cos(math.pi * part) + 1) if strategy == "cos" else (b - a) * part + a
        value = x if value is None else xp.where(step <= ends[i], x, value)
    return value


# --- of other schedules ------------------------------------------------------------------------------


@_schedule
def sequential_lr(schedules: Sequence[Schedule], milestones: Sequence[int]) -> Schedule:
    """`schedules[i](step - milestones[i - 1])` between two milestones, as `SequentialLR`.

    `multiplicative_lr` and `swalr` go on from the value before their milestone, as torch's do; the others begin anew.
    Warm-up and cosine:

    >>> warm_up = linear_lr(1.0, start_factor=0.01, total_iters=10)
    >>> lr = sequential_lr([warm_up, cosine_annealing_lr(1.0, T_max=90)], milestones=[10])
    >>> lr([0, 5, 10, 55, 100]).round(3).tolist()
    [0.01, 0.505, 1.0, 0.5, 0.0]

    Raises:
      ValueError: not one schedule more than milestones, or milestones that go down.
    """
    schedules, milestones = list(schedules), list(milestones)
    _check_schedules("sequential_lr", schedules)
    if len(milestones) != len(schedules) - 1:
        raise ValueError(
            "Sequential Schedulers expects number of schedulers provided to be one more "
            f"than the number of milestone points, but got number of schedulers {len(schedules)} and the "
            f"number of milestones to be equal to {len(milestones)}"
        )
    if milestones != sorted(milestones) or any(m < 0 for m in milestones):
        raise ValueError(f"sequential_lr: expected milestones of at least 0 that go up, found {milestones}")
    starts = [0, *milestones]

    def value(step: Any, xp: Any, upto: int = len(schedules)) -> Any:
        result: Any = None
        for i, schedule in enumerate(schedules[:upto]):
            local = xp.maximum(step - starts[i], 0)
            if i and schedule.resumed is not None and starts[i] > 0:
                x = schedule.resumed(value(starts[i] - 1, xp, i), local, xp)
            else:
                x = schedule.value(schedule._held(local, xp), xp)
            result = x if result is None else xp.where(step >= starts[i], x, result)
        return result

    def recurse(lr: Any, step: Any, xp: Any) -> Any:
        result: Any = None
        for i, schedule in enumerate(schedules):
            x = schedule.after(lr, schedule._held(xp.maximum(step - starts[i], 0), xp), xp)
            if i and starts[i] > 0:  # where torch computes the next one's first value anew
                first = schedule.value(0, xp) if schedule.resumed is None else schedule.resumed(lr, 0, xp)
                x = xp.where(step == starts[i], first, x)
            result = x if result is None else xp.where(step >= starts[i], x, result)
        return result

    relative = [s.base for s in schedules if s.base is not None]
    return Schedule("sequential_lr", value, relative[0] if relative else None, recurse if relative else None)


@_schedule
def chained_scheduler(schedules: Sequence[Schedule]) -> Schedule:
    """The schedules one after the other on the same lr, at each step, as `ChainedScheduler`.

    Those that multiply the lr (step_lr, exponential_lr, ...) have the product of their factors. One that does not
    look at the lr (lambda_lr, cyclic_lr, ...) overrides what comes before it, and what comes after it multiplies by
    its last step's factor alone: that is what torch computes. With `cosine_annealing_lr` a value costs `step`
    evaluations.

    >>> chained_scheduler([constant_lr(1.0, 0.5, total_iters=2), exponential_lr(1.0, 0.5)])([0, 1, 2]).tolist()
    [0.5, 0.25, 0.25]

    Raises:
      ValueError: no schedule, or schedules of different lr.
    """
    schedules = list(schedules)
    _check_schedules("chained_scheduler", schedules)
    relative = [s for s in schedules if s.base is not None]
    if any(s.base is not relative[0].base and s.base != relative[0].base for s in relative[1:]):
        raise ValueError(f"chained_scheduler: expected schedules of one lr, found {[s.base for s in relative]}")
    absolute = [i for i, s in enumerate(schedules) if s.base is None]

    def through(lr: Any, step: Any, xp: Any) -> Any:
        for schedule in schedules[absolute[-1] if absolute else 0 :]:
            lr = schedule.after(lr, schedule._held(step, xp), xp)
        return lr

    def value(step: Any, xp: Any) -> Any:
        if absolute:
            return through(None, step, xp)
        base: Any = schedules[0].base
        if all(s.recurse is None for s in schedules):
            return base * math.prod(s.value(step, xp) / base for s in schedules)
        lr = base * xp.ones(np.shape(step))
        if xp is np:
            for i in range(int(np.max(step, initial=0)) + 1):
                lr = np.where(i <= step, through(lr, i, np), lr)
            return lr
        return lax.fori_loop(0, _last(step) + 1, lambda i, lr: jnp.where(i <= step, through(lr, i, jnp), lr), lr)

    if absolute:
        return Schedule("chained_scheduler", value)
    return Schedule("chained_scheduler", value, base=schedules[0].base, recurse=through)


def _check_schedules(function: str, schedules: list[Any]) -> None:
    if not schedules:
        raise ValueError(f"{function} expects at least one schedule, but got none.")
    for i, schedule in enumerate(schedules):
        if not isinstance(schedule, Schedule):
            raise TypeError(f"{function}: expected schedules of jopt.schedules, found {schedule!r} at index {i}")
