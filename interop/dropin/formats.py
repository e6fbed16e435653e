"""State in fewer bits than its parameter's: `state_dtype`, a key of a group.

A slot in eight bits is two tensors, `exp_avg_int8` and `exp_avg_absmax` (`jopt.quantized`). torch's optimizers read
`exp_avg` and would take codes of that name for numbers, so there is none: they raise KeyError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interop.dropin import dtensor, host
from interop.dropin.groups import hyperparameters
from interop.dropin.leaf import EMA
from interop.dropin.slots import code_slots, slot_dtypes
from jopt import quantized
from jopt.quantized import ABSMAX, CODES
from jopt.rule import Rule
from jopt.transform import check_state_dtype

KEY = "state_dtype"


def check(optimizer: Any, group: dict[str, Any]) -> None:
    """Set a group's format by its name; TypeError or ValueError for one that its state cannot have."""
    given = str(group[KEY]).removeprefix("torch.") if isinstance(group[KEY], torch.dtype) else group[KEY]
    rule = optimizer.rule.shaped_by(group, optimizer.rule.members(group))
    group[KEY] = str(check_state_dtype(rule, given))


def of(group: Mapping[str, Any]) -> str | None:
    return group.get(KEY)


def check_part(name: str, form: str | None, placement: Any) -> None:
    """Raise for a part of a parameter in a format of whole ones."""
    if placement is not None and form == "int8":
        raise TypeError(
            f"{name}: expected a plain tensor for state_dtype='int8', whose blocks are of a whole parameter, found "
            "a DTensor; take state_dtype='bfloat16'"
        )


def names(rule: Rule, form: str | None, p: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a parameter's tensor state in this format, of those without it."""
    if form != "int8" or p.dtype.is_complex or p.numel() < quantized.SMALLEST:
        return dict(shapes)
    signs = rule.signs()
    found: dict[str, tuple[int, ...]] = {}
    for slot, shape in shapes.items():
        found |= code_slots(slot, shape) if slot in signs else {slot: shape}
    return found


def dtype_of(rule: Rule, form: str | None, p: Tensor, name: str) -> torch.dtype:
    """The type that a slot has in this format."""
    if name.endswith(CODES):
        return torch.uint8
    if name.endswith(ABSMAX):
        return torch.float32
    own = slot_dtypes(rule, tuple(dtensor.local(p).shape), p.dtype).get(name, p.dtype)
    if form is None or p.dtype.is_complex or name == EMA:
        return own
    if form == "bfloat16" and name in rule.signs():
        return torch.bfloat16
    wanted = torch.float32 if form == "int8" else getattr(torch, form)
    return max(own, wanted, key=lambda x: x.itemsize)


def adapted(rule: Rule, form: str | None, p: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state, of any format, in this one; what is in it already is the same."""
    signs, found = rule.signs(), {}
    codes = {name.removesuffix(CODES) for name in values if name.endswith(CODES)}
    slots = {name: tuple(x.shape) for name, x in values.items() if name in signs and isinstance(x, Tensor)}
    wanted = names(rule, form, p, slots | dict.fromkeys(codes, tuple(p.shape)))
    for name, x in values.items():
        slot = name.removesuffix(CODES).removesuffix(ABSMAX)
        if slot in codes and slot != name:
            if slot in wanted:
                x = decode(values[slot + CODES], values[slot + ABSMAX], signs[slot])
                keeps = form is None and p.dtype in (torch.bfloat16, torch.float16)
                found[slot] = x if keeps else x.to(dtype_of(rule, form, p, slot))
            else:
                found[name] = x
        elif name in slots and name not in wanted:
            found[name + CODES], found[name + ABSMAX] = encode(x, signs[name])
        elif form is not None and isinstance(x, Tensor) and x.dim():
            found[name] = x.to(dtype_of(rule, form, p, name))
        else:
            found[name] = x
    return found


def has_codes(values: Iterable[str]) -> bool:
    return quantized.holds_codes(map(str, values))


def adapt(optimizer: Any, states: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """Of these states, of any format, those that are to change for the optimizer's; tensors of their own."""
    groups = optimizer.param_groups
    if not any(map(of, groups)) and not any(map(has_codes, states.values())):
        return {}
    found = {}
    for rule, group in zip(hyperparameters(optimizer)[1], groups, strict=True):
        for p in group["params"]:
            if values := states.get(p):
                values = {k: x.to(p.device, copy=True) if isinstance(x, Tensor) else x for k, x in values.items()}
                found[p] = adapted(rule, of(group), p, values)
    return found


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The numbers that codes stand for, in float32."""
    with host.own_settings():
        found = quantized.decode(codes.cpu().numpy(), absmax.cpu().numpy(), signed)  # type: ignore[arg-type]
        return torch.from_numpy(np.array(found)).to(codes.device)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes of numbers, and the largest absolute values of their blocks."""
    with host.own_settings():
        codes, absmax = quantized.encode(np.asarray(x.detach().float().cpu().contiguous()), signed)  # type: ignore[arg-type]
        return torch.from_numpy(np.array(codes)).to(x.device), torch.from_numpy(np.array(absmax)).to(x.device)
