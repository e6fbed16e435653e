"""A live run from torch to JAX and back: parameters, the optimizer's state and its numbers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

import jopt
from interop import optim
from interop.dropin import lbfgs
from interop.dropin.leaf import EMA
from interop.dropin.options import EXECUTION, check_groups
from interop.modules import Layout, Leaf, check_arrays, leaves, to_jax, to_torch
from interop.runs import schedulers
from jopt import State, Transform
from jopt._compat import enable_x64
from jopt.around.groups import Groups, GroupsState
from jopt.lbfgs import LBFGS

# What of an optimizer's group is no argument of its mathematics.
NO_ARGUMENTS = ("params", "param_names", "initial_lr", *EXECUTION)
UNCOUNTED = ("SGD", "Muon")  # which store no step
AXES_MATTER = ("Adafactor", "Muon")  # which look at rows and columns


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
    """
    cls = torch_class(optimizer)
    check_groups(getattr(optim, cls), optimizer.param_groups)
    names = _leaves_of(optimizer, model, layout)
    params = {leaf.name: to_jax(leaf.to_jax(p.detach())) for p, leaf in names.items()}
    scheduled: tuple[dict[str, Any], ...] = ({},) * len(optimizer.param_groups)
    if scheduler is not None:
        schedulers.check_belongs(scheduler, optimizer)
        scheduled = schedulers.scheduler_to_jax(scheduler, every=every)
    if cls == "LBFGS":
        tx, state = lbfgs.run_to_jax(optimizer, names, params, step, scheduled[0] | arguments)
        return tx, params, state
    groups = _groups(optimizer, scheduled)
    if step is None:
        step = _count(optimizer, scheduler, every)
    parts = []
    for options, members in groups:
        own = {names[p].name: p for p in members}
        masked = {name: x if name in own else optax.MaskedNode() for name, x in params.items()}
        parts.append(_group_to_jax(cls, options, arguments, names, own, masked, optimizer, step))
    if len(parts) == 1:
        tx, state = parts[0]
        return tx, params, state
    own_names = [_Names(frozenset(names[p].name for p in members), g) for g, (_, members) in enumerate(groups)]
    txs, states = zip(*parts, strict=True)
    return Groups(tuple(own_names[:-1]), txs), params, GroupsState(states)


def _count(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, every: int) -> int:
    """What schedules go on from."""
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    if scheduler is None:
        return max(steps, default=0)
    epoch = schedulers.last_epoch(scheduler)
    within = max(steps, default=-1)  # where in its epoch, if the state says so
    return within if within // every == epoch else epoch * every


def _group_to_jax(
    cls: str,
    options: dict[str, Any],
    arguments: dict[str, Any],
    names: Mapping[Tensor, Leaf],
    own: dict[str, Tensor],
    params: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> tuple[Transform, State]:
    """The transformation of a group, and its state; the parameters of others are masked."""
    function = getattr(jopt, "sparse_adam" if cls == "SparseAdam" else cls.lower())
    known = inspect.signature(function).parameters
    given = {k: _number(v) for k, v in options.items() if k in known} | arguments
    states: dict[str, dict[str, Any]] = {name: optimizer.state.get(p, {}) for name, p in own.items()}
    if any(_is_wider(x, own[name]) for name, state in states.items() for x in state.values()):
        given.setdefault("state_dtype", jnp.float32)
    tx = function(**given)
    state = tx.init(params)
    slots = {slot: dict(tree) for slot, tree in state.slots.items()}
    for slot, tree in slots.items():
        for name, p in own.items():
            fresh, value = tree[name], states[name].get(slot)
            if fresh is not None and value is not None:
                value = names[p].to_jax(value.detach()) if value.shape == p.shape else value.detach()
                _check(f"the state {slot!r} of {name!r}", value, fresh.shape)
                tree[name] = to_jax(value).astype(fresh.dtype)
    scalars = {key: np.array(x) for key, x in state.scalars.items()}
    for key, values in scalars.items():
        for i, name in enumerate(_order(own)):
            if key in states[name]:
                values[i] = float(states[name][key])
            elif cls in UNCOUNTED and key == "step":
                values[i] = states[name].get("momentum_buffer") is not None
    return tx, state._replace(
        count=jnp.asarray(step, jnp.int32), slots=slots, scalars={k: jnp.asarray(v) for k, v in scalars.items()}
    )


@dataclasses.dataclass(frozen=True)
class _Names:
    """The pattern of a group: its parameters' names."""

    names: frozenset[str]
    group: int

    def __call__(self, path: str, leaf: Any) -> bool:
        return path in self.names

    @property
    def __name__(self) -> str:
        return f"param_groups[{self.group}]"


def _order(own: Iterable[str]) -> list[str]:
    """The names in the order of a tree's leaves."""
    return list(jax.tree.leaves({name: name for name in own}))


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
    cls = torch_class(optimizer)
    names = _leaves_of(optimizer, model, layout)
    groups = _parts(cls, tx, state, optimizer)
    values = check_arrays("params", params, names)
    _check_state(tx, params, state)
    if scheduler is not None:
        schedulers.check_belongs(scheduler, optimizer)
    new: dict[Tensor, dict[str, Any]] = {}
    if cls == "LBFGS":
        new[optimizer.param_groups[0]["params"][0]] = lbfgs.run_to_torch(tx, state, optimizer, names)
    else:
        for _, part, members in groups:
            order = _order(names[p].name for p in members)
            for p in members:
                new[p] = _state_of(cls, part, p, names[p], order.index(names[p].name))
    if scheduler is not None:
        schedulers.advance(scheduler, int(groups[0][1].count) // every)
    with torch.no_grad():
        for p, value in values.items():
            p.copy_(value)
        for p, found in new.items():
            if found:
                average = {EMA: optimizer.state[p][EMA]} if EMA in optimizer.state.get(p, {}) else {}
                optimizer.state[p] = found | average
            else:
                optimizer.state.pop(p, None)
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


def _check_state(tx: Any, params: dict[str, Any], state: Any) -> None:
    """Raise unless the state is of the structure, shapes and types that tx.init(params) has."""
    expected, treedef = jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, params))
    found = jax.tree.structure(state)
    if found != treedef:
        raise ValueError(f"state: expected the structure of tx.init(params), {treedef}, found {found}")
    for (path, spec), x in zip(expected, jax.tree.leaves(state), strict=True):
        if (spec.shape, spec.dtype) != (np.shape(x), x.dtype):
            raise ValueError(
                f"state{jax.tree_util.keystr(path)}: expected {spec.dtype} of shape {spec.shape}, found {x.dtype} of "
                f"shape {np.shape(x)}"
            )


def _parts(cls: str, tx: Any, state: Any, optimizer: torch.optim.Optimizer) -> list[tuple[Any, Any, list[Tensor]]]:
    """What steps each group of the optimizer, or all of them."""
    if isinstance(tx, Groups):
        txs, states = tx.transforms, state.groups if isinstance(state, GroupsState) else ()
        members = [list(group["params"]) for group in optimizer.param_groups]
        if not len(txs) == len(states) == len(members):
            raise ValueError(f"tx: expected one of {len(members)} groups, as the optimizer's, found {len(txs)}")
    else:
        txs, states = [tx], [state]
        members = [[p for group in optimizer.param_groups for p in group["params"]]]
    for one in txs:
        found = "LBFGS" if isinstance(one, LBFGS) else type(getattr(one, "rule", one)).__name__
        expected = "LBFGS" if cls == "LBFGS" else getattr(optim, cls).rule.__name__
        if found != expected:
            raise TypeError(f"tx: expected one that steps {expected}, as {cls}, found {found}")
    return list(zip(txs, states, members, strict=True))


def _state_of(cls: str, state: State, p: Tensor, leaf: Leaf, i: int) -> dict[str, Any]:
    """torch's state of a parameter, the i-th of its group; none if it was never stepped."""
    scalars = {key: float(x[i]) for key, x in state.scalars.items()}
    if scalars.get("step", 1) == 0 and cls != "Adagrad":
        return {}
    kept = {key: int(x) if cls == "SparseAdam" else torch.tensor(x) for key, x in scalars.items()}
    slots = {}
    for key, tree in state.slots.items():
        if tree[leaf.name] is not None:
            x = to_torch(tree[leaf.name])
            slots[key] = leaf.to_torch(x).contiguous() if x.shape == leaf.shape(p) else x
    return {key: x for key, x in kept.items() if key != "step" or cls not in UNCOUNTED} | slots


def torch_class(optimizer: Any) -> str:
    """The name of the class of torch.optim that an optimizer, native or of `interop.optim`, is of.

    Raises:
      TypeError: of none.
    """
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in optim.CLASSES:
            return cls.__name__
    raise TypeError(
        f"optimizer: expected one of torch.optim's, found {type(optimizer).__module__}.{type(optimizer).__qualname__}"
    )


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


def _leaves_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module, layout: Layout) -> dict[Tensor, Leaf]:
    parameters, _ = leaves(model, layout)
    names = {p: parameters[name] for p, name in names_of(optimizer, model).items()}
    cls = torch_class(optimizer)
    turned = [leaf.name for leaf in names.values() if leaf.axes is not None]
    if turned and cls in AXES_MATTER:
        raise ValueError(
            f"layout: {cls} looks at the axes of a matrix, and would step {turned[0]!r} otherwise with them in flax's "
            "order; move it in torch's layout"
        )
    return names


def _groups(
    optimizer: torch.optim.Optimizer, scheduled: Iterable[dict[str, Any]]
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """The groups' options and parameters; all in one where their options are equal."""
    groups = [
        ({k: v for k, v in group.items() if k not in NO_ARGUMENTS} | own, list(group["params"]))
        for group, own in zip(optimizer.param_groups, scheduled, strict=True)
    ]
    first = groups[0][0]
    if all(first.keys() == other.keys() and all(other[k] == v for k, v in first.items()) for other, _ in groups[1:]):
        return [(first, [p for _, members in groups for p in members])]
    return groups


def _number(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return tuple(map(_number, x))
    return x.item() if isinstance(x, Tensor) else x


def _is_wider(x: Any, p: Tensor) -> bool:
    return (
        isinstance(x, Tensor) and x.dim() > 0 and x.dtype == torch.float32 and p.dtype in (torch.bfloat16, torch.half)
    )


def _check(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if tuple(np.shape(x)) != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {tuple(np.shape(x))}")


def _learning_rate(tx: Any, state: Any) -> Any:
    if not isinstance(tx, LBFGS) and "lr" in state.hyperparams:
        return np.asarray(state.hyperparams["lr"])
    lr: Any = tx.lr if isinstance(tx, LBFGS) else tx.hyperparameters["lr"]
    if not callable(lr):
        return float(lr)  # type: ignore[arg-type]
    with enable_x64(True):
        return float(lr(state.count))  # type: ignore[operator]
