"""The torch optimizer that a `jopt` transformation would be: its class and its groups' options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from interop.dropin.formats import KEY
from interop.runs.classes import classes_of, defaults
from interop.runs.files.errors import CheckpointError
from jopt import State, Transform
from jopt._compat import enable_x64
from jopt.around.groups import Groups, GroupsState
from jopt.leaf import MASTER


def torch_groups(
    tx: Transform | Groups, params: Mapping[str, Any], state: State | GroupsState
) -> tuple[str, list[dict[str, Any]], int]:
    """torch's class, its param_groups with the names of their parameters, and the state's count."""
    if isinstance(tx, Groups):
        txs, states = tx.transforms, state.groups if isinstance(state, GroupsState) else ()
        labels = {name: tx.group_of(name, x) for name, x in params.items()}
    else:
        txs, states, labels = (tx,), (state,), dict.fromkeys(params, 0)
    if len(txs) != len(states):
        raise CheckpointError(f"state: expected that of {len(txs)} groups, found {type(state).__name__}")
    names, groups = [], []
    for i, (one, own) in enumerate(zip(txs, states, strict=True)):
        if not isinstance(one, Transform) or not isinstance(own, State):
            raise CheckpointError(
                f"tx: group {i}: expected an optimizer of jopt and its State, found {type(one).__name__} and "
                f"{type(own).__name__}; take frozen parameters and chains out of tx and params"
            )
        if MASTER in own.slots:
            raise CheckpointError("state: master copies have no place in torch's state; unpack them into params first")
        name, options = _options(one, own)
        names.append(name)
        groups.append(options | {"params": [n for n, label in labels.items() if label == i]})
    if len(set(names)) > 1:
        raise CheckpointError(f"tx: expected one class of optimizer in all groups, found {', '.join(names)}")
    return names[0], groups, max(int(own.count) for own in states)  # type: ignore[arg-type]


def _options(tx: Transform, state: State) -> tuple[str, dict[str, Any]]:
    rule = tx.rule
    candidates = classes_of(type(rule))
    if not candidates:
        raise CheckpointError(f"tx: torch.optim has no {type(rule).__name__}")
    decoupled = getattr(rule, "decoupled_weight_decay", False)
    name = next((x.name for x in candidates if x.decouples({}) == decoupled), candidates[0].name)
    options = dict(defaults(name))
    numbers = {key: _number(tx, state, key) for key in rule.hyperparameters}
    for key in options:
        if key in rule.tuples:
            options[key] = tuple(numbers[member] for member in rule.tuples[key])
        elif key in numbers:
            options[key] = numbers[key]
    for field in dataclasses.fields(rule):
        if field.name in options and field.name not in numbers:
            options[field.name] = getattr(rule, field.name)
    if tx.state_dtype is not None:
        options[KEY] = str(tx.state_dtype)
    if "train_mode" in options:  # what JAX steps are the parameters of training
        options["train_mode"] = True
    return name, options


def _number(tx: Transform, state: State, key: str) -> float | None:
    """A hyperparameter at the state's count; None where none was given (Adafactor's first eps)."""
    value = state.hyperparams.get(key, tx.hyperparameters.get(key))
    if value is None:
        return None
    if callable(value):
        with enable_x64(True):
            value = value(state.count)
    number = float(value)  # type: ignore[arg-type]
    if math.isnan(number):
        raise CheckpointError(f"tx: {key}: expected a number, found {number}")
    return number
