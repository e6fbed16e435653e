"""What the world's training loops write: where in a tree of state_dicts the model and the optimizer are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from interop.memory.tensors import address
from interop.runs.bridge import OptimizerState
from interop.runs.classes import CLASSES, SCALARS, defaults
from interop.runs.files.errors import CheckpointError
from interop.runs.files.naming import assign, renamed
from interop.runs.files.run import EXTRA_STATE, Checkpoint, last_step, split

MODELS = ("model", "model_state_dict", "state_dict", "model_state", "module", "net", "network", "params", "weights")
OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optim_state_dict", "opt")
LIGHTNING = "optimizer_states"
STEPS = ("step", "global_step", "iteration", "iter", "num_updates")
OWN = "jopt"  # of files that are written here: {"optimizer": class, "buffers": names}


def unwrap(
    raw: Any,
    *,
    model: torch.nn.Module | None = None,
    names: Sequence[str] | Literal["numbers"] | None = None,
    patterns: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The checkpoint in what `torch.load` gave.

    Args:
      raw: a model's state_dict, an optimizer's, or a dictionary that has one or both under keys of `MODELS` and
        `OPTIMIZERS`, or Lightning's.
      model: tells parameters from buffers, and names numbered optimizer state.
      names: those of the optimizer's parameters, in its order; "numbers": where there are none, #0, #1, ...
      patterns: for `naming.renamed`.

    Raises:
      CheckpointError: neither found, or optimizer state that has no names.
    """
    tensors, optimizer, extra = _find(raw)
    own = extra.pop(OWN, {})
    if not isinstance(own, Mapping):
        raise CheckpointError(f"key {OWN!r}: expected a dictionary, found {type(own).__name__}")
    given: list[str] = list(own.get("buffers", ()))
    if patterns:
        named = _names_in(optimizer)
        new = renamed([*tensors, *named], patterns)
        tensors = {new[n]: x for n, x in tensors.items()}
        optimizer = _with_names(optimizer, [new[n] for n in named]) if named else optimizer
        given = [new.get(n, n) for n in given]
    params, buffers, other = split(tensors, model, set(given) if own else None)
    if other:
        extra[EXTRA_STATE] = other
    found = None if optimizer is None else _named(optimizer, params, model, names, own.get("optimizer"))
    step = next((extra.pop(key) for key in STEPS if type(extra.get(key)) is int), None)
    if step is None and found is not None:
        step = last_step(found)
    return Checkpoint(params, buffers, found, step, extra)


def _find(raw: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, dict[str, Any]]:
    """The model's tensors, the optimizer's state_dict, and the other keys."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"expected a dictionary of state_dicts, found {type(raw).__name__}")
    if _is_optimizer(raw):
        return {}, raw, {k: v for k, v in raw.items() if k not in ("state", "param_groups")}
    if _is_model(raw):
        return raw, None, {}
    if strange := [k for k in raw if not isinstance(k, str)]:
        raise CheckpointError(f"expected keys that are strings, found {strange[0]!r:.80}")
    extra = dict(raw)
    tensors: Mapping[str, Any] = {}
    optimizer = None
    key = next((k for k in MODELS if k in extra), None)
    if key is not None:
        tensors = extra.pop(key)
        if not (_is_model(tensors) or (isinstance(tensors, Mapping) and not tensors)):
            raise CheckpointError(f"key {key!r}: expected a state_dict of tensors, found {_describe(tensors)}")
    key = next((k for k in OPTIMIZERS if extra.get(k)), None)
    if key is not None:
        optimizer = extra.pop(key)
        if not _is_optimizer(optimizer):
            raise CheckpointError(
                f"key {key!r}: expected a dictionary of 'state' and 'param_groups', found {_describe(optimizer)}"
            )
    elif isinstance(several := extra.get(LIGHTNING), list) and len(several) == 1 and _is_optimizer(several[0]):
        optimizer = several[0]
        del extra[LIGHTNING]
    if not tensors and optimizer is None:
        raise CheckpointError(
            f"found the keys {', '.join(map(repr, list(raw)[:8])) or '(none)'}; expected a model under one of "
            f"{', '.join(MODELS)}, an optimizer under one of {', '.join(OPTIMIZERS)}, or a bare state_dict"
        )
    return tensors, optimizer, extra


def _describe(x: Any) -> str:
    if isinstance(x, Mapping):
        return f"a dictionary of {', '.join(map(repr, list(x)[:5])) or 'nothing'}"
    return type(x).__name__


def _is_model(x: Any) -> bool:
    """Names and tensors; `get_extra_state` may give other values under its own suffix."""
    return (
        isinstance(x, Mapping)
        and bool(x)
        and all(isinstance(k, str) and (isinstance(v, Tensor) or k.endswith(EXTRA_STATE)) for k, v in x.items())
        and any(isinstance(v, Tensor) for v in x.values())
    )


def _is_optimizer(x: Any) -> bool:
    return isinstance(x, Mapping) and isinstance(x.get("state"), Mapping) and isinstance(x.get("param_groups"), list)


def _names_in(optimizer: Mapping[str, Any] | None) -> list[str]:
    """The names that an optimizer's state_dict itself gives: param_names, or strings instead of numbers."""
    if optimizer is None:
        return []
    names: list[str] = []
    for g, group in enumerate(optimizer["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise CheckpointError(f"param_groups[{g}]: expected a dictionary with a list 'params'")
        members = group["params"]
        given = group.get("param_names") or members
        if not isinstance(given, list) or len(given) != len(members):
            raise CheckpointError(f"param_groups[{g}]: expected as many param_names as params ({len(members)})")
        if not all(isinstance(n, str) for n in given):
            return []
        names += given
    return names


def _with_names(optimizer: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    """The state_dict with these names in place of its numbers."""
    assert optimizer is not None
    new = dict(zip([i for group in optimizer["param_groups"] for i in group["params"]], names, strict=True))
    if len(new) != len(names) or len(set(names)) != len(names):
        raise CheckpointError("param_groups: a parameter comes twice")
    unknown = [key for key in optimizer["state"] if key not in new]
    if unknown:
        raise CheckpointError(f"the optimizer's state has {unknown[0]!r:.80}, which is in none of its groups")
    groups = [
        {k: v for k, v in group.items() if k != "param_names"} | {"params": [new[i] for i in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    return {"state": {new[i]: values for i, values in optimizer["state"].items()}, "param_groups": groups}


def _named(
    optimizer: Mapping[str, Any],
    params: Mapping[str, Tensor],
    model: torch.nn.Module | None,
    names: Sequence[str] | Literal["numbers"] | None,
    name: str | None,
) -> OptimizerState:
    found = _names_in(optimizer)
    ids = [i for group in optimizer["param_groups"] for i in group["params"]]
    if any(not isinstance(i, int | str) for i in ids):
        raise CheckpointError("param_groups: expected params that are numbers or names")
    if names is not None and names != "numbers":
        if len(names) != len(ids):
            raise CheckpointError(f"names: expected {len(ids)}, one for each of the optimizer's parameters")
        found = list(names)
    elif not found:
        order = _order(params, model)
        if len(order) > len(ids) and model is not None:
            order = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        shapes = [[_shape(optimizer["state"].get(i)) for i in group["params"]] for group in optimizer["param_groups"]]
        try:
            found = [n for group in assign(shapes, order) for n in group]
        except CheckpointError:
            if names != "numbers":
                raise
            found = [f"#{i}" for i in range(len(ids))]
    named = _with_names(optimizer, found)
    for parameter, values in named["state"].items():
        if not isinstance(values, Mapping) or not all(isinstance(k, str) for k in values):
            raise CheckpointError(f"the state of {parameter!r}: expected a dictionary by names")
    if name is not None and name not in CLASSES:
        raise CheckpointError(f"optimizer: expected one of torch.optim's but LBFGS, found {name!r:.80}")
    groups = named["param_groups"]
    state = {n: dict(values) for n, values in named["state"].items() if values}
    return OptimizerState(name or _guess(groups, state), groups, state)


def _order(params: Mapping[str, Tensor], model: torch.nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Parameters in the order of `model.parameters()`, tied ones once."""
    if model is not None:
        return {name: tuple(p.shape) for name, p in model.named_parameters()}
    seen, order = set(), {}
    for name, x in params.items():
        place = (address(x), tuple(x.shape), x.stride())
        if not x.numel() or place not in seen:
            seen.add(place)
            order[name] = tuple(x.shape)
    return order


def _shape(values: Any) -> tuple[int, ...] | None:
    """The shape of a parameter, told by its state."""
    if not isinstance(values, Mapping):
        return None
    for key, x in values.items():
        if isinstance(x, Tensor) and key not in (*SCALARS, "row_var", "col_var"):
            return tuple(x.shape)
    row, column = values.get("row_var"), values.get("col_var")
    if isinstance(row, Tensor) and isinstance(column, Tensor):
        return (*row.shape[:-1], column.shape[-1])
    return None


def _guess(groups: list[dict[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> str | None:
    """torch's class whose options and state these are, if one alone has them; None for what others may have too."""
    later = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}  # than `maximize`
    given = set(groups[0]) - {"params", "initial_lr"} if groups else set()
    matches, exact = [], []
    for cls in CLASSES.values():
        options = set(defaults(cls.name))
        if any(map(cls.lacks, state.values())):
            continue
        if given <= options and options - given <= later and "maximize" in given:
            matches.append(cls)
        if given == options and cls.fixed.items() <= groups[0].items():
            exact.append(cls)
    best = exact or matches
    if len({cls.rule for cls in best}) == 1 and "decoupled_weight_decay" in given:  # two names of one rule
        best = [cls for cls in best if cls.decouples({}) == groups[0]["decoupled_weight_decay"]] or best
    return best[0].name if len(best) == 1 else None
