"""A live run from torch to JAX and back: parameters, the optimizer's state and its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from interop import optim
from interop.dropin import formats, lbfgs
from interop.dropin.leaf import EMA
from interop.dropin.options import check_groups
from interop.dropin.state import placed_step
from interop.memory.values import to_jax
from interop.modules import Layout, check_arrays, leaves
from interop.runs import bridge, schedulers
from interop.runs.bridge import OptimizerState
from interop.runs.classes import LINE_SEARCHING, class_of
from jopt._compat import enable_x64
from jopt.lbfgs import LBFGS


def optimizer_to_jax(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    *,
    step: int | None = None,
    scheduler: LRScheduler | None = None,
    every: int = 1,
    layout: Layout = "torch",
    **arguments: Any,
) -> tuple[Any, dict[str, jax.Array], Any]:
    """The run that a torch optimizer, native or of `interop.optim`, is in the middle of, for `jopt` to go on with.

    >>> import torch, jax.numpy as jnp, interop
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> tx, params, state = interop.optimizer_to_jax(optimizer, model)
    >>> sorted(params), state.scalars["step"].tolist()
    (['bias', 'weight'], [1.0, 1.0])
    >>> grads = {name: jnp.ones_like(x) for name, x in params.items()}
    >>> params, state = tx.step(grads, state, params)
    >>> interop.optimizer_to_torch(tx, params, state, model, optimizer)
    >>> optimizer.state[model.weight]["step"].item()
    2.0

    Args:
      optimizer: any class of torch.optim, or a subclass. Groups of different options become those of a
        `jopt.param_groups`, by the parameters' names; the state is then a `GroupsState`.
      model: whose `named_parameters()` give the names. Parameters that the optimizer does not hold are left out; those
        that it holds must be of the model.
      step: `State.count`, at which schedules are evaluated. By default what the scheduler has taken; without one the
        largest step count of the state, and for SGD and Muon, which store none, 0.
      scheduler: torch's, whose schedule each group's lr (and cycled momentum) becomes: see `scheduler_to_jax`.
      every: the optimizer's steps between two steps of the scheduler.
      layout: "flax" gives the parameters flax's names and axes (see `interop.modules.leaves`), and their state with
        them.
      arguments: instead of the optimizer's own, as `lr=` a schedule; or those that torch has not, as `state_dtype=`.

    Returns:
      `(tx, params, state)`: the transformation, the parameters by name, and a state of the structure of
      `tx.init(params)`. All are copies. What `interop.optim` does around the step is not in `tx`: see `average_to_jax`
      for `ema=`, and `jopt.chain(jopt.clip_grad_norm(max_norm), tx)` for `max_norm=`. For LBFGS `tx` is a
      `jopt.lbfgs`.

    Raises:
      TypeError: the optimizer is none of these; an argument that it has not; a type or place that JAX does not have
        (float64 needs jax_enable_x64).
      NotImplementedError: an option of a newer torch that this version does not know.
      ValueError: a parameter that the model has not, a state of another shape, a scheduler that does not fit; flax's
        axes for Muon and Adafactor, which look at the axes.

    Warns:
      UserWarning: the optimizer clips or averages, which is not in `tx`.
    """
    cls = class_of(optimizer)
    _warn_of_around(optimizer)
    names, leaves_of = names_of(optimizer, model), leaves(model, layout)[0]
    scheduled: tuple[dict[str, Any], ...] = ({},) * len(optimizer.param_groups)
    if scheduler is not None:
        schedulers.check_belongs(scheduler, optimizer)
        scheduled = schedulers.scheduler_to_jax(scheduler, every=every)
    params = {name: p.detach() for p, name in names.items()}
    own = {name: leaves_of[name] for name in names.values()}
    if cls == LINE_SEARCHING:
        check_groups(optim.LBFGS, optimizer.param_groups)
        arrays = {leaf.name: to_jax(leaf.to_jax(params[name])) for name, leaf in own.items()}
        by_tensor = {p: own[name] for p, name in names.items()}
        tx, state = lbfgs.run_to_jax(optimizer, by_tensor, arrays, step, scheduled[0] | arguments)
        return tx, arrays, state
    run = run_of(optimizer, names)
    if step is None:
        step = _count(run, scheduler, every)
    return bridge.run_to_jax(run, params, own, step=step, scheduled=scheduled, arguments=arguments)


def _warn_of_around(optimizer: torch.optim.Optimizer) -> None:
    max_norm, ema = (getattr(optimizer, name, None) for name in ("max_norm", "ema"))
    if max_norm is not None:
        warnings.warn(
            f"optimizer_to_jax: max_norm={max_norm} is not in tx; clip by jopt.clip_grad_norm({max_norm}) before it, "
            "as docs/porting-a-run.md shows",
            stacklevel=3,
        )
    if ema is not None:
        warnings.warn(
            f"optimizer_to_jax: ema={ema} does not go on in tx; take it along by average_to_jax(optimizer, model) and "
            "back by average_to_torch, or the optimizer keeps the average of now",
            stacklevel=3,
        )


def run_of(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> OptimizerState:
    """A live optimizer by the names of its parameters. Its tensors are not copied."""
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        | {"params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {names[p]: dict(values) for p, values in optimizer.state.items() if p in names and values}
    return OptimizerState(class_of(optimizer), groups, state)


def _count(run: OptimizerState, scheduler: LRScheduler | None, every: int) -> int:
    """What schedules go on from."""
    if scheduler is None:
        return int(max(run.steps, default=0))
    epoch = schedulers.last_epoch(scheduler)
    within = int(max(run.steps, default=-1))  # where in its epoch, if the state says so
    return within if within // every == epoch else epoch * every


def optimizer_to_torch(
    tx: Any,
    params: dict[str, Any],
    state: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: LRScheduler | None = None,
    every: int = 1,
    layout: Layout = "torch",
) -> None:
    """Write what `optimizer_to_jax` gave, some steps later, back into the model and the optimizer.

    Parameters are written in place; the state is replaced; the groups' `lr` becomes what the next step has. Their other
    numbers stay as they are. A parameter that was never stepped has no state, as in torch.
    A scheduler is stepped on, by torch, as often as JAX stepped the optimizer (divided by `every`), and sets all the
    numbers that it sets. Averages of `interop.optim` (`ema=`) stay as they were: see `average_to_torch`.

    Args:
      scheduler: the one that was given to `optimizer_to_jax`, or a new one of the optimizer.
      every, layout: those given to `optimizer_to_jax`.

    Raises:
      TypeError, ValueError: another optimizer, parameters of other names, shapes or types, a scheduler that is further
        than the state; before anything changed.
    """
    cls = class_of(optimizer)
    names, leaves_of = names_of(optimizer, model), leaves(model, layout)[0]
    by_tensor = {p: leaves_of[name] for p, name in names.items()}
    groups = bridge.parts(cls, tx, state, [group["params"] for group in optimizer.param_groups])
    values = check_arrays("params", params, by_tensor)
    if scheduler is not None:
        schedulers.check_belongs(scheduler, optimizer)
    if cls == LINE_SEARCHING:
        bridge.check_state(tx, params, state)
        first = optimizer.param_groups[0]["params"][0]
        new = {first: lbfgs.run_to_torch(tx, state, optimizer, by_tensor)}
    else:
        members = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        own = {name: p.detach() for p, name in names.items()}
        found = bridge.run_to_torch(cls, tx, params, state, members, own, leaves_of)
        new = {p: found[name] for p, name in names.items()}
        new |= formats.adapt(optimizer, new)
    if scheduler is not None:
        schedulers.advance(scheduler, int(groups[0][1].count) // every)
    by_group = {p: group for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for p, value in values.items():
            p.copy_(value)
        for p, found in new.items():
            if found:
                average = {EMA: optimizer.state[p][EMA]} if EMA in optimizer.state.get(p, {}) else {}
                optimizer.state[p] = placed_step(by_group[p], p, found) | average
            else:
                optimizer.state.pop(p, None)
    for group in optimizer.param_groups:
        if "train_mode" in group:  # the parameters are those of training now
            group["train_mode"] = True
    if scheduler is None:
        for part_tx, part, members in groups:
            own = set(members)
            for group in optimizer.param_groups:
                if not own.isdisjoint(group["params"]):
                    _set_learning_rate(group, part_tx, part)


def _set_learning_rate(group: dict[str, Any], tx: Any, state: Any) -> None:
    lr, old = _learning_rate(tx, state), group["lr"]
    if isinstance(lr, np.ndarray) and lr == np.asarray(float(old), lr.dtype):
        return  # the same number, which the state keeps in fewer digits
    if isinstance(old, Tensor):
        old.fill_(float(lr))
    else:
        group["lr"] = float(lr)


def names_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[Tensor, str]:
    """The model's names of the optimizer's parameters, in its order.

    Raises:
      ValueError: a parameter that the model has not.
    """
    known = {p: name for name, p in model.named_parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p not in known:
                raise ValueError(
                    f"optimizer: its parameter {i} of group {g}, of shape {tuple(p.shape)}, is none of the model's; "
                    "give the model that it optimizes"
                )
    return {p: known[p] for group in optimizer.param_groups for p in group["params"]}


def _learning_rate(tx: Any, state: Any) -> Any:
    if not isinstance(tx, LBFGS) and "lr" in state.hyperparams:
        return np.asarray(state.hyperparams["lr"])
    lr: Any = tx.lr if isinstance(tx, LBFGS) else tx.hyperparameters["lr"]
    if not callable(lr):
        return float(lr)  # type: ignore[arg-type]
    with enable_x64(True):
        return float(lr(state.count))  # type: ignore[operator]
