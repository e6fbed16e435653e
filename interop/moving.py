"""A live run from torch to JAX and back: parameters, the optimizer's state and its numbers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor

import jopt
from interop import optim
from interop.dlpack import DTYPES, to_jax, to_torch
from interop.program import EMA
from jopt import State, Transform
from jopt.groups import Groups, GroupsState

# What of an optimizer's group is no argument of its mathematics.
NO_ARGUMENTS = ("params", "param_names", "initial_lr", "foreach", "fused", "capturable", "differentiable")
UNCOUNTED = ("SGD", "Muon")  # which store no step


def optimizer_to_jax(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, *, step: int | None = None, **arguments: Any
) -> tuple[Transform | Groups, dict[str, jax.Array], State | GroupsState]:
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
      optimizer: any class of torch.optim but LBFGS, or a subclass. Groups of different options become those of a
        `jopt.param_groups`, by the parameters' names; the state is then a `GroupsState`.
      model: whose `named_parameters()` give the names. Parameters that the optimizer does not hold are left out; those
        that it holds must be of the model.
      step: `State.count`, at which schedules are evaluated. By default the largest step count of the state; SGD and
        Muon store none, for them it is 0.
      arguments: instead of the optimizer's own, as `lr=` a schedule; or those that torch has not, as `state_dtype=`.

    Returns:
      `(tx, params, state)`: the transformation, the parameters by name, and a state of the structure of
      `tx.init(params)`. All are copies. What `interop.optim` does around the step (`max_norm=`, `ema=`) is not in `tx`.

    Raises:
      TypeError: the optimizer is none of these, or a type or place that JAX does not have (float64 needs
        jax_enable_x64).
      ValueError: a parameter that the model has not, or a state of another shape.
    """
    cls = _torch_class(optimizer)
    names = _names(optimizer, model)
    params = {name: to_jax(p.detach(), copy=True) for p, name in names.items()}
    groups = _groups(optimizer)
    parts = []
    for options, members in groups:
        own = {names[p]: p for p in members}
        masked = {name: x if name in own else optax.MaskedNode() for name, x in params.items()}
        parts.append(_group_to_jax(cls, options, own, masked, optimizer, step, arguments))
    if len(parts) == 1:
        tx, state = parts[0]
        return tx, params, state
    own_names = [_Names(frozenset(names[p] for p in members), g) for g, (_, members) in enumerate(groups)]
    txs, states = zip(*parts, strict=True)
    return Groups(tuple(own_names[:-1]), txs), params, GroupsState(states)


def _group_to_jax(
    cls: str,
    options: dict[str, Any],
    own: dict[str, Tensor],
    params: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    step: int | None,
    arguments: dict[str, Any],
) -> tuple[Transform, State]:
    """The transformation of a group, and its state; the parameters of others are masked."""
    function = getattr(jopt, "sparse_adam" if cls == "SparseAdam" else cls.lower())
    known = inspect.signature(function).parameters
    given = {k: _number(v) for k, v in options.items() if k in known}
    states: dict[str, dict[str, Any]] = {name: optimizer.state.get(p, {}) for name, p in own.items()}
    if any(_is_wider(x, own[name]) for name, state in states.items() for x in state.values()):
        given["state_dtype"] = jnp.float32
    tx = function(**given | arguments)
    state = tx.init(params)
    slots = {slot: dict(tree) for slot, tree in state.slots.items()}
    for slot, tree in slots.items():
        for name in own:
            fresh, value = tree[name], states[name].get(slot)
            if fresh is not None and value is not None:
                _check(f"the state {slot!r} of {name!r}", value, fresh.shape)
                tree[name] = to_jax(value.detach(), copy=True).astype(fresh.dtype)
    scalars = {key: np.array(x) for key, x in state.scalars.items()}
    for key, values in scalars.items():
        for i, name in enumerate(_order(own)):
            if key in states[name]:
                values[i] = float(states[name][key])
            elif cls in UNCOUNTED and key == "step":
                values[i] = states[name].get("momentum_buffer") is not None
    if step is None:
        step = 0 if cls in UNCOUNTED else int(max(scalars["step"], default=0))
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
    tx: Transform | Groups,
    params: dict[str, Any],
    state: State | GroupsState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write what `optimizer_to_jax` gave, some steps later, back into the model and the optimizer.

    Parameters are written in place; the state is replaced; the groups' `lr` becomes what the next step has. Their other
    numbers stay as they are. A parameter that was never stepped has no state, as in torch.
    Averages of `interop.optim` (`ema=`) stay as they were when the run left, and go on from there.

    Raises:
      TypeError, ValueError: another optimizer, parameters of other names, shapes or types; before anything changed.
    """
    cls = _torch_class(optimizer)
    names = _names(optimizer, model)
    groups = _parts(cls, tx, state, optimizer)
    if set(params) != set(names.values()):
        missing, extra = set(names.values()) - set(params), set(params) - set(names.values())
        raise ValueError(f"params: expected the optimizer's; missing {sorted(missing)}, unknown {sorted(extra)}")
    for p, name in names.items():
        _check(f"params[{name!r}]", params[name], tuple(p.shape))
        if DTYPES[p.dtype] != params[name].dtype:
            raise TypeError(f"params[{name!r}]: expected {p.dtype}, found {params[name].dtype}")
    new: dict[Tensor, dict[str, Any]] = {}
    for _, part, members in groups:
        order = _order(names[p] for p in members)
        for p in members:
            new[p] = _state_of(cls, part, names[p], order.index(names[p]))
    with torch.no_grad():
        for p, values in new.items():
            p.copy_(to_torch(params[names[p]]))
            if values:
                average = {EMA: optimizer.state[p][EMA]} if EMA in optimizer.state.get(p, {}) else {}
                optimizer.state[p] = values | average
            else:
                optimizer.state.pop(p, None)
    for part_tx, part, members in groups:
        lr = _learning_rate(part_tx, part)
        own = set(members)
        for group in optimizer.param_groups:
            if own.isdisjoint(group["params"]):
                continue
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _parts(
    cls: str, tx: Transform | Groups, state: Any, optimizer: torch.optim.Optimizer
) -> list[tuple[Transform, State, list[Tensor]]]:
    """What steps each group of the optimizer, or all of them."""
    if isinstance(tx, Groups):
        txs, states = tx.transforms, state.groups if isinstance(state, GroupsState) else ()
        members = [list(group["params"]) for group in optimizer.param_groups]
        if not len(txs) == len(states) == len(members):
            raise ValueError(f"tx: expected one of {len(members)} groups, as the optimizer's, found {len(txs)}")
    else:
        txs, states = [tx], [state]
        members = [[p for group in optimizer.param_groups for p in group["params"]]]
    expected = getattr(optim, cls).rule
    for one in txs:
        rule = getattr(one, "rule", one)
        if type(rule) is not expected:
            raise TypeError(f"tx: expected one that steps {expected.__name__}, as {cls}, found {type(rule).__name__}")
    return list(zip(txs, states, members, strict=True))  # type: ignore[arg-type]


def _state_of(cls: str, state: State, name: str, i: int) -> dict[str, Any]:
    """torch's state of a parameter, the i-th of its group; none if it was never stepped."""
    scalars = {key: float(x[i]) for key, x in state.scalars.items()}
    if scalars.get("step", 1) == 0 and cls != "Adagrad":
        return {}
    kept = {key: int(x) if cls == "SparseAdam" else torch.tensor(x) for key, x in scalars.items()}
    slots = {k: to_torch(tree[name], copy=True) for k, tree in state.slots.items() if tree[name] is not None}
    return {key: x for key, x in kept.items() if key != "step" or cls not in UNCOUNTED} | slots


def _torch_class(optimizer: Any) -> str:
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in optim.__all__ and cls.__name__ != "LBFGS":
            return cls.__name__
    raise TypeError(
        f"optimizer: expected one of torch.optim's but LBFGS, found {type(optimizer).__module__}."
        f"{type(optimizer).__qualname__}"
    )


def _names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[Tensor, str]:
    by_parameter = {p: name for name, p in model.named_parameters()}
    names = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p not in by_parameter:
                raise ValueError(
                    f"optimizer: its parameter {i} of group {g}, of shape {tuple(p.shape)}, is none of the model's; "
                    "give the model that it optimizes"
                )
            names[p] = by_parameter[p]
    return names


def _groups(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """The groups' options and parameters; all in one where their options are equal."""
    groups = [
        ({k: v for k, v in group.items() if k not in NO_ARGUMENTS}, list(group["params"]))
        for group in optimizer.param_groups
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


def _learning_rate(tx: Transform, state: State) -> float:
    if "lr" in state.hyperparams:
        return float(state.hyperparams["lr"])
    lr = tx.hyperparameters["lr"]
    if not callable(lr):
        return float(lr)
    with jax.enable_x64(True):
        return float(lr(state.count))
