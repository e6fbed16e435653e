"""A state_dict of heavyball's SOAP or PSGDKron, of its version 3, as the authors' classes have theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interop.dropin.slots import slot_shapes
from jopt.optimizers.soap import FAN_IN
from jopt.rule import Rule

MARK = "heavyball"  # what its state_dicts have beside state and param_groups
TENSORS = {  # by its names of the transformation and of the tensor: what the authors call it
    "soap": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "GG": "GG", "Q": "Q"},
    "psgd": {"exp_avg": "momentum_buffer", "Q": "Q"},
}
SKIPPED = ("step", "running_lower_bound", "Q_cache")
# What changes its mathematics, and is not in ours.
OTHER_WAYS = ("caution", "cautious_weight_decay", "mars", "palm", "ecc", "param_ecc", "split", "precond_grad_accum")


def of_authors(state_dict: Mapping[str, Any], groups: list[dict[str, Any]], rule: type[Rule]) -> dict[str, Any]:
    """Theirs, for the groups of an optimizer of ours, which steps by this rule.

    Its moments and sums are divided by the bias correction of their steps already; ours are not.

    Raises:
      ValueError: ours has not what a group asks for, or not the shape of a parameter's matrices.
    """
    kind = "psgd" if "b1" in rule.hyperparameters else "soap"
    state, found = {}, []
    for i, (own, group) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        _check(i, group, state_dict[MARK])
        views = [state_dict["state"].get(key, {}) for key in group["params"]]
        steps = [float(x[0]["step"]) for x in views if 0 in x and "step" in x[0]]
        step = float(group["step_count"]) if group.get("step_count") is not None else max(steps, default=0.0)
        numbers = {key: x for key, x in group.items() if key in own}
        numbers["merge_dims"] = FAN_IN if group["merge_dims"] and kind == "soap" else False
        beta1 = group["beta"] if group.get("beta") is not None else group["betas"][0]
        if kind == "psgd":
            numbers |= {"b1": beta1, "precond_init_scale": own["precond_init_scale"]}
            left = {"exp_avg": 1 - beta1**step}
        else:
            left = {"exp_avg": 1 - beta1 ** (step - 1), "exp_avg_sq": 1 - group["betas"][1] ** (step - 1)}
            left |= {"GG": 1 - group["shampoo_beta"] ** step}
        now = {**own, **numbers}
        shaped = rule.shaped_by(now, rule.members(now))
        for p, key, view in zip(own["params"], group["params"], views, strict=True):
            if view:
                where = f"param_groups[{i}]: a parameter of shape {tuple(p.shape)}"
                entry = _parameter(where, kind, view, shaped, tuple(p.shape), left)
                state[key] = entry | {"step": step - (kind == "soap")}
        found.append({**now, "params": group["params"]})
    return {"state": state, "param_groups": found}


def _check(i: int, group: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    """Refuse what would go on otherwise than it was."""
    for key in OTHER_WAYS:
        if group.get(key):
            raise ValueError(
                f"param_groups[{i}][{key!r}]: expected False or None for a run of heavyball to go on here, found "
                f"{group[key]!r}"
            )
    if float(group.get("step_count") or 0) <= group.get("warmup_steps", 0) > 0:
        raise ValueError(
            f"param_groups[{i}]['warmup_steps']: expected a run whose warmup is over, found {group['warmup_steps']} "
            f"after {float(group.get('step_count') or 0):g} steps; warm up by a scheduler of the learning rate instead"
        )
    if rest.get("use_ema"):
        raise ValueError("heavyball['use_ema']: expected False for its run to go on here, found True; use ema= here")


def _parameter(
    where: str,
    kind: str,
    views: Mapping[int, Mapping[str, Any]],
    rule: Any,
    shape: tuple[int, ...],
    left: Mapping[str, float],
) -> dict[str, Any]:
    if set(views) != {0}:
        raise ValueError(f"{where}: expected one view of it in heavyball's state, found {len(views)}")
    found: dict[str, Any] = {}
    for key, x in views[0].items():
        match = re.fullmatch(rf"(?:(?:scale|update)_by_(?:delayed_)?{kind}|exp_avg)_(\w+?)_\d+", key)
        name = match[1] if match else key
        if name in TENSORS[kind]:
            found[name] = x
        elif name not in SKIPPED and key != "is_initialized":
            raise ValueError(f"{where}: expected the state of heavyball's {kind.upper()}, found {key!r} in it")
    expected = slot_shapes(rule, shape)
    sizes = rule.merged(shape)
    axes = [k for k, n in enumerate(sizes) if n != 1]  # one of one element has no matrix of theirs
    entry: dict[str, Any] = {}
    for name, ours in TENSORS[kind].items():
        x = found.get(name)
        if isinstance(x, Tensor):
            entry[ours] = x * left[name]
        elif x is not None:
            matrices = _matrices(x)
            theirs = (
                list(found["exp_avg"].shape[1:]) if kind == "soap" else [0 if m is None else len(m) for m in matrices]
            )
            kept = [(n, m) for n, m in zip(theirs, matrices, strict=True) if n != 1]
            if [n for n, _ in kept] != [sizes[k] for k in axes]:
                raise ValueError(
                    f"{where}: expected {name} of axes {tuple(sizes)}, found them of {tuple(theirs)}; its merge_dims "
                    "has no equal here for this shape"
                )
            wanted = [expected.get(f"{name}_{k}", ()) for k in range(len(sizes))]
            entry[ours] = lists = [_one(s) for s in wanted]
            for k, (_, matrix) in zip(axes, kept, strict=True):
                if matrix is not None:
                    matrix = torch.diag(matrix) if matrix.dim() < len(wanted[k]) else matrix
                    lists[k] = matrix * left.get(name, 1.0)
    return entry


def _one(shape: tuple[int, ...]) -> Tensor:
    """The matrix, or diagonal, that changes nothing; empty for an axis that has none."""
    return torch.eye(*shape) if len(shape) == 2 else torch.ones(shape or (0,))


def _matrices(x: list[Any]) -> list[Tensor | None]:
    """A list of theirs, whose tensors have an axis more, and whose triangular ones may be rows of elements."""
    found: list[Tensor | None] = []
    for part in x:
        shape, part = part if isinstance(part, tuple | list) else (None, part)
        if part is None:
            found.append(None)
        elif shape is None:
            found.append(part[0])
        else:
            matrix = torch.zeros(tuple(shape)[1:], dtype=part.dtype)
            rows, columns = torch.triu_indices(*matrix.shape)
            matrix[rows, columns] = part[0]
            found.append(matrix)
    return found
