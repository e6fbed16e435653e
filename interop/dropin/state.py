"""The state that torch keeps for a parameter: which types it may have, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interop.dropin import dtensor, formats
from interop.dropin.groups import parameters
from interop.dropin.leaf import EMA
from interop.dropin.slots import code_slots
from interop.dropin.whole import slot_placement
from interop.memory import Device, check
from interop.memory.tensors import DTYPES, is_of_processes
from jopt.rule import Rule, is_number


class KeepsWideState:
    """Gives a class of torch.optim a load_state_dict that keeps float32 state of narrower parameters."""

    param_groups: list[dict[str, Any]]
    state: Any

    @staticmethod
    def keeps(state: torch.dtype, param: torch.dtype) -> bool:
        """Whether a state tensor of one type stays as it is beside a parameter of another."""
        return state is torch.float32 and param in (torch.bfloat16, torch.float16)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a state tensor that is wider than its parameter keeps its type, where torch rounds it.

        State of another format (`state_dtype`) is converted to this optimizer's.
        """
        loaded: dict[str, Any] = {}  # the user's hooks may change it
        forms = [formats.of(group) for group in self.param_groups]

        def widen(_: Any) -> None:
            params = parameters(self)
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            for group, form in zip(self.param_groups, forms, strict=True):
                group.pop(formats.KEY, None)
                if form is not None:
                    group[formats.KEY] = form
            for i, p in zip(ids, params, strict=True):
                for name, value in loaded["state"].get(i, {}).items():
                    items = value if isinstance(value, list) else [value]
                    if any(isinstance(x, Tensor) and self.keeps(x.dtype, p.dtype) for x in items):
                        copies = [x.to(device=p.device, copy=True) if isinstance(x, Tensor) else x for x in items]
                        self.state[p][name] = copies if isinstance(value, list) else copies[0]
            given = {p: loaded["state"].get(i, {}) for i, p in zip(ids, params, strict=True)}
            self.state.update(formats.adapt(self, given))

        hooks = (
            self.register_load_state_dict_pre_hook(lambda _, x: loaded.update(x)),  # type: ignore[attr-defined]
            self.register_load_state_dict_post_hook(widen, prepend=True),  # type: ignore[attr-defined]
        )
        try:
            super().load_state_dict(state_dict)  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()


def placed(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with the step counts where torch keeps them.

    With `capturable` or `fused` that is on the parameter's device. Here they are always the host's.
    """
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for i, p in zip(saved["params"], group["params"], strict=True):
            if isinstance(state := state_dict["state"].get(i), dict):
                state_dict["state"][i] = placed_step(saved, p, state)
    return state_dict


def placed_step(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with its step count where torch keeps that."""
    count = state.get("step")
    beside = group.get("capturable") or group.get("fused")
    if beside and isinstance(count, Tensor) and count.device != p.device:
        return {**state, "step": count.to(p.device)}
    return state


def check_state(
    optimizer: Any,
    name: str,
    rule: Rule,
    h: dict[str, float],
    shapes: dict[str, tuple[int, ...]],
    state: dict[str, Any],
) -> None:
    """Raise torch's KeyError if a state that exists lacks something; ValueError if a number in it is none."""
    scalars = rule.init_scalars(h).keys() - optimizer.hidden_scalars
    if not state.keys() - {EMA}:
        return
    late = {key for slot in optimizer.late_slots for key in (slot, *code_slots(slot, ()))} | {EMA}
    for key in (*scalars, *(shapes.keys() - late)):
        if key not in state:
            raise KeyError(
                f"{name}: {type(optimizer).__name__} reads its state {key!r}, found {sorted(map(str, state))}; load "
                "the state_dict of an optimizer of this class, or clear the state, which then begins anew"
            )
        value = state[key]
        if value is None:
            raise TypeError(f"{name}: expected its state {key!r}, found None; clear the state, which then begins anew")
        if key in scalars:
            check_number(name, key, value)


def check_number(name: str, key: str, value: Any) -> None:
    """Raise ValueError unless a value of a parameter's state is a number, or a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            found = f"shape {tuple(value.shape)}" if value.numel() != 1 else f"a {value.dtype} on {value.device}"
            raise ValueError(f"{name}: expected a number, or a tensor of one, for its state {key!r}, found {found}")
    elif not is_number(value):
        raise ValueError(f"{name}: expected a number, or a tensor of one, for its state {key!r}, found {value!r}")


def check_slot(device: Device, name: str, key: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError or TypeError unless a value of a parameter's state is a tensor of the shape, with values."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{name}: expected its state {key!r} of shape {shape}, found {found}")
    check_place(device, f"the state {key!r} of {name}", value)
    if value.dtype.is_complex or value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected its state {key!r} in a real floating type, found {value.dtype}")


def is_shared(value: Any) -> bool:
    """Whether a state tensor stays where it is: in memory of other processes too."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:  # a sparse one has no storage to ask
        return False
    return dtensor.placement(value) is None and is_of_processes(value)


def state_dtypes(
    device: Device,
    name: str,
    rule: Rule,
    form: str | None,
    p: Tensor,
    shapes: dict[str, tuple[int, ...]],
    state: dict[str, Any],
) -> dict[str, torch.dtype]:
    """The type of each slot: the format's, or else the rule's, or float32 where its loaded state has it."""
    dtypes = {}
    for slot, shape in shapes.items():
        value = state.get(slot)
        placed = slot_placement(rule, slot, dtensor.placement(p))
        if value is not None and dtensor.placement(value) != placed:
            raise TypeError(
                f"{name}: expected its state {slot!r} placed as the parameter, {dtensor.say(placed)}, found "
                f"{dtensor.describe(value)}; torch.distributed.checkpoint.state_dict.set_state_dict places it"
            )
        value = dtensor.local(value)
        if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
            whose = "the parameter's shape" if shape == tuple(dtensor.local(p).shape) else "shape"
            raise ValueError(f"{name}: expected its state {slot!r} of {whose} {shape}, found {found}")
        if value is not None and not value.is_sparse and (value.layout is not torch.strided or value.is_meta):
            check_place(device, f"the state {slot!r} of {name}", value)
        expected = formats.dtype_of(rule, form, p, slot)
        dtype = expected if value is None else value.dtype
        if dtype is not expected and not (form is None and KeepsWideState.keeps(dtype, p.dtype)):
            whose = "the parameter's type" if form is None else f"the type of state_dtype={form!r},"
            raise TypeError(
                f"{name}: expected its state {slot!r} in {whose} {expected}, found {dtype}; convert the "
                "model before the optimizer's first step, or its state with it"
            )
        dtypes[slot] = dtype
    return dtypes


def check_place(device: Device, name: str, value: Tensor) -> None:
    """Raise TypeError unless a tensor of the state can be read where its parameter is stepped."""
    if check(name, value) is not device:
        raise TypeError(f"{name}: expected it on its parameter's device, found {value.device}; move it there")


def averages_begun(optimizer: Any) -> bool:
    """Whether other parameters have averages: a new one then begins before the step, as AveragedModel's would."""
    return any(isinstance(state, dict) and EMA in state for state in optimizer.state.values())
