"""torch's learning rate schedulers, in the middle of a run, as schedules of jopt; and on from there when it is back."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import jopt
from jopt import schedules
from jopt.around.plateau import Plateau, PlateauState

Arguments = dict[str, Any]
RELATIVE = 1e-6  # how far torch's recursions may have drifted from the closed form


@dataclasses.dataclass(frozen=True)
class _Every:
    """A schedule that is stepped once in `every` steps of the optimizer."""

    schedule: schedules.Schedule
    every: int

    def __call__(self, step: Any) -> Any:
        return self.schedule(step // self.every)


def scheduler_to_jax(scheduler: LRScheduler, *, every: int = 1) -> tuple[Arguments, ...]:
    """What a torch scheduler makes of each parameter group's numbers, as arguments for an optimizer of jopt.

    `{"lr": schedule}`; of a scheduler that cycles the momentum also `momentum`, or `betas` with a schedule as the
    first. All are functions of the optimizer's step from the run's beginning: at `scheduler.last_epoch * every` they
    have the value that torch's optimizer holds now. `optimizer_to_jax(..., scheduler=scheduler)` uses them.

    >>> import torch, interop
    >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=1.0)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    >>> (arguments,) = interop.scheduler_to_jax(scheduler)
    >>> [arguments["lr"](step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]

    Args:
      scheduler: any of torch.optim.lr_scheduler, but ReduceLROnPlateau (see `plateau_to_jax`), or SWALR. The functions
        of LambdaLR and MultiplicativeLR are traced by JAX: write them with operators.
      every: the optimizer's steps between two steps of the scheduler, as many as an epoch has for one that is stepped
        once an epoch.

    Raises:
      TypeError: a scheduler of another class, or composed as torch's own are not to be: the formula is not known.
      ValueError: the optimizer's number is not the scheduler's: something else has set it.
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1, found {every!r}")
    made: list[tuple[Any, Arguments, Any]] = []

    def make(function: Callable[..., Any], arguments: Arguments) -> Any:
        """One schedule for groups of the same numbers, so that they are seen to be the same."""
        for other, given, schedule in made:
            if other is function and given == arguments:
                return schedule
        made.append((function, arguments, function(**arguments)))
        return made[-1][2]

    def build(scheduler: Any, g: int) -> Arguments:
        cls = type(scheduler)
        if cls is lr_scheduler.SequentialLR:
            inside = [type(s) for s in scheduler._schedulers]
            if composite := set(inside) & {lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler}:
                raise TypeError(
                    f"scheduler: found a {composite.pop().__name__} inside a SequentialLR, where torch runs it a step "
                    "early; give its parts to the SequentialLR, or give lr= a function of the step"
                )
            parts, milestones = [build(s, g) for s in scheduler._schedulers], scheduler._milestones
            held = {name: hold(name, parts, milestones) for name in ("momentum", "beta1")}
            held["lr"] = [part["lr"] for part in parts]
            given = {name: {"schedules": values, "milestones": milestones} for name, values in held.items() if values}
            return {name: make(schedules.sequential_lr, arguments) for name, arguments in given.items()}
        if cls is lr_scheduler.ChainedScheduler:
            parts = [build(s, g) for s in scheduler._schedulers]
            chained = make(schedules.chained_scheduler, {"schedules": [part["lr"] for part in parts]})
            for name in ("momentum", "beta1"):
                if sum(name in part for part in parts) > 1:
                    raise TypeError(
                        f"scheduler: found a ChainedScheduler of several that cycle {name}, which is no function of "
                        "the step that is known; give cycle_momentum=False to all but one"
                    )
            return {name: schedule for part in parts for name, schedule in part.items()} | {"lr": chained}
        if cls not in _FORMULAS:
            remedy = "take plateau_to_jax" if cls is ReduceLROnPlateau else "give lr= a function of the step"
            raise TypeError(
                f"scheduler: found {cls.__module__}.{cls.__qualname__}, which is no function of the step that "
                f"is known; {remedy}"
            )
        return {name: make(*formula) for name, formula in _FORMULAS[cls](scheduler, g).items()}

    def hold(name: str, parts: list[Arguments], milestones: list[int]) -> list[Any]:
        """Each part's momentum; one that does not cycle it leaves it where it is. None if no part does."""
        cycled = [part[name] for part in parts if name in part]
        if not cycled:
            return []
        now = cycled[-1](0)  # torch's schedulers set it when they are made
        found = []
        for part, start, end in zip(parts, [0, *milestones], [*milestones, None], strict=True):
            held = make(schedules.constant_lr, {"lr": now, "factor": 1.0})
            found.append(part.get(name, held))
            if end is not None and end > start:
                now = found[-1](end - start - 1)
        return found

    result = []
    epoch = last_epoch(scheduler)
    for g, group in enumerate(scheduler.optimizer.param_groups):
        found = build(scheduler, g)
        for name, schedule in found.items():
            number = group["betas"][0] if name == "beta1" else group[name]
            expected = schedule(epoch)
            if not math.isclose(expected, float(number), rel_tol=RELATIVE, abs_tol=1e-30):
                raise ValueError(
                    f"scheduler: at its step {epoch} {name} of group {g} is {expected:.8g}, but the optimizer has "
                    f"{float(number):.8g}, which something else has set; give {name}= a schedule instead"
                )
        own = {name: _Every(schedule, every) if every > 1 else schedule for name, schedule in found.items()}
        if "beta1" in own:
            own["betas"] = (own.pop("beta1"), float(group["betas"][1]))
        result.append(own)
    return tuple(result)


def last_epoch(scheduler: Any) -> int:
    """How many steps it has taken."""
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        return last_epoch(scheduler._schedulers[0])
    return scheduler.last_epoch


def advance(scheduler: LRScheduler, steps: int) -> None:
    """Step a scheduler on to so many steps, as torch does.

    Raises:
      ValueError: it is further already, or, from torch, ends before; then it and the groups are as they were.
    """
    now = last_epoch(scheduler)
    if now > steps:
        raise ValueError(
            f"scheduler: has taken {now} steps, more than the {steps} of the state; give the one that left"
        )
    groups = scheduler.optimizer.param_groups
    before, numbers = copy.deepcopy(scheduler.state_dict()), [_numbers(group) for group in groups]
    try:
        with warnings.catch_warnings():  # torch sees no optimizer.step() between
            warnings.filterwarnings("ignore", message="Detected call of|To get the last learning rate")
            for _ in range(steps - now):
                scheduler.step()
    except BaseException:
        scheduler.load_state_dict(before)
        for group, own in zip(groups, numbers, strict=True):
            group.update(own)
        raise


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    return {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}


# --- each scheduler's formula: the function of jopt and its arguments, from the scheduler's attributes -----------


def _plain(function: Callable[..., Any], *names: str) -> Callable[[Any, int], dict[str, tuple[Any, Arguments]]]:
    def formula(scheduler: Any, g: int) -> dict[str, tuple[Any, Arguments]]:
        arguments = {name: getattr(scheduler, name) for name in names}
        return {"lr": (function, {"lr": _base(scheduler, g)} | arguments)}

    return formula


def _base(scheduler: Any, g: int) -> float:
    return float(scheduler.base_lrs[g])


def _multi_step(scheduler: Any, g: int) -> dict[str, tuple[Any, Arguments]]:
    milestones = sorted(scheduler.milestones.elements())
    return {"lr": (schedules.multi_step_lr, dict(lr=_base(scheduler, g), milestones=milestones, gamma=scheduler.gamma))}


def _of_function(function: Callable[..., Any]) -> Callable[[Any, int], dict[str, tuple[Any, Arguments]]]:
    return lambda scheduler, g: {
        "lr": (function, dict(lr=_base(scheduler, g), lr_lambda=scheduler.lr_lambdas[g])),
    }


def _swa(scheduler: Any, g: int) -> dict[str, tuple[Any, Arguments]]:
    """It begins at the lr that it found, which it keeps nowhere: that is computed back from the lr of now."""
    group = scheduler.optimizer.param_groups[g]
    now, end = float(group["lr"]), float(group["swa_lr"])
    alpha = scheduler.anneal_func(max(0, min(1, (scheduler._step_count - 1) / max(1, scheduler.anneal_epochs))))
    first = end if alpha == 1 else (now - alpha * end) / (1 - alpha)
    return {
        "lr": (
            schedules.swalr,
            dict(
                lr=first,
                swa_lr=end,
                anneal_epochs=scheduler.anneal_epochs,
                anneal_strategy="linear" if scheduler.anneal_func(0.25) == 0.25 else "cos",
            ),
        )
    }


def _cyclic(scheduler: Any, g: int) -> dict[str, tuple[Any, Arguments]]:
    up = scheduler.total_size * scheduler.step_ratio
    up = float(round(up)) if math.isclose(up, round(up), rel_tol=1e-12) else up
    cycle = dict(
        step_size_up=up,
        step_size_down=scheduler.total_size - up,
        mode=scheduler.mode,
        gamma=scheduler.gamma,
        scale_fn=scheduler._scale_fn_custom,
        scale_mode=scheduler.scale_mode,
    )
    base, top = _base(scheduler, g), float(scheduler.max_lrs[g])
    found: dict[str, tuple[Any, Arguments]] = {"lr": (schedules.cyclic_lr, dict(base_lr=base, max_lr=top) | cycle)}
    if scheduler.cycle_momentum:
        low, high = float(scheduler.base_momentums[g]), float(scheduler.max_momentums[g])
        momentum = (schedules.cyclic_momentum, dict(base_momentum=low, max_momentum=high) | cycle)
        found["beta1" if scheduler.use_beta1 else "momentum"] = momentum
    return found


def _one_cycle(scheduler: Any, g: int) -> dict[str, tuple[Any, Arguments]]:
    group = scheduler.optimizer.param_groups[g]
    cycle = dict(
        total_steps=scheduler.total_steps,
        pct_start=(scheduler._schedule_phases[0]["end_step"] + 1) / scheduler.total_steps,
        anneal_strategy=scheduler._anneal_func_type,
        three_phase=len(scheduler._schedule_phases) == 3,
    )
    first, top, last = (float(group[name]) for name in ("initial_lr", "max_lr", "min_lr"))
    levels = dict(max_lr=top, div_factor=top / first, final_div_factor=first / last)
    found: dict[str, tuple[Any, Arguments]] = {"lr": (schedules.one_cycle_lr, levels | cycle)}
    if scheduler.cycle_momentum:
        low, high = float(group["base_momentum"]), float(group["max_momentum"])
        momentum = (schedules.one_cycle_momentum, dict(base_momentum=low, max_momentum=high) | cycle)
        found["beta1" if scheduler.use_beta1 else "momentum"] = momentum
    return found


_FORMULAS: dict[type, Callable[[Any, int], dict[str, tuple[Any, Arguments]]]] = {
    lr_scheduler.LambdaLR: _of_function(schedules.lambda_lr),
    lr_scheduler.MultiplicativeLR: _of_function(schedules.multiplicative_lr),
    lr_scheduler.StepLR: _plain(schedules.step_lr, "step_size", "gamma"),
    lr_scheduler.MultiStepLR: _multi_step,
    lr_scheduler.ConstantLR: _plain(schedules.constant_lr, "factor", "total_iters"),
    lr_scheduler.LinearLR: _plain(schedules.linear_lr, "start_factor", "end_factor", "total_iters"),
    lr_scheduler.ExponentialLR: _plain(schedules.exponential_lr, "gamma"),
    lr_scheduler.PolynomialLR: _plain(schedules.polynomial_lr, "total_iters", "power"),
    lr_scheduler.CosineAnnealingLR: _plain(schedules.cosine_annealing_lr, "T_max", "eta_min"),
    lr_scheduler.CosineAnnealingWarmRestarts: _plain(
        schedules.cosine_annealing_warm_restarts, "T_0", "T_mult", "eta_min"
    ),
    lr_scheduler.CyclicLR: _cyclic,
    lr_scheduler.OneCycleLR: _one_cycle,
    swa_utils.SWALR: _swa,
}


# --- the one that looks at a metric ------------------------------------------------------------------


def plateau_to_jax(scheduler: ReduceLROnPlateau) -> tuple[Plateau, PlateauState]:
    """`jopt.reduce_lr_on_plateau` as a torch scheduler has it, and its state.

    Keep the learning rate in the optimizer's state: `optimizer_to_jax(optimizer, model, hyperparams_in_state=True)`.

    >>> import torch, interop
    >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=1.0)
    >>> scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    >>> scheduler.step(3.0)
    >>> plateau, state = interop.plateau_to_jax(scheduler)
    >>> plateau.patience, state.best.item()
    (1, 3.0)
    >>> interop.plateau_to_torch(state, scheduler)
    """
    _check_plateau(scheduler)
    names = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps")
    floors = set(map(float, scheduler.min_lrs))
    plateau = jopt.reduce_lr_on_plateau(
        **{name: getattr(scheduler, name) for name in names},
        min_lr=floors.pop() if len(floors) == 1 else tuple(map(float, scheduler.min_lrs)),
    )
    fresh = plateau.init()
    return plateau, PlateauState(
        jnp.asarray(scheduler.best, fresh.best.dtype),
        jnp.asarray(scheduler.num_bad_epochs, jnp.int32),
        jnp.asarray(scheduler.cooldown_counter, jnp.int32),
    )


def plateau_to_torch(state: PlateauState, scheduler: ReduceLROnPlateau) -> None:
    """Write the state of `jopt.reduce_lr_on_plateau` into torch's scheduler. The lr comes by `optimizer_to_torch`."""
    _check_plateau(scheduler)
    scheduler.best = float(state.best)
    scheduler.num_bad_epochs, scheduler.cooldown_counter = int(state.num_bad_epochs), int(state.cooldown_counter)


def _check_plateau(scheduler: Any) -> None:
    if not isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            f"scheduler: expected a ReduceLROnPlateau, found {type(scheduler).__name__}; take scheduler_to_jax"
        )


def check_belongs(scheduler: Any, optimizer: Optimizer) -> None:
    """Raise unless it is a scheduler of this optimizer."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "scheduler: ReduceLROnPlateau is no function of the step; take plateau_to_jax, and keep the lr in the "
            "state: optimizer_to_jax(optimizer, model, hyperparams_in_state=True)"
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler: expected one of torch.optim.lr_scheduler, found {type(scheduler).__name__}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler: is of another optimizer; give the one that it was made with")
