"""SparseAdam's step on the torch side: torch gathers and scatters rows, XLA computes them.

The number of rows with a gradient changes from step to step, so that the program works on flat buffers of the next
power of two, and is compiled once for each size that occurs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import torch
from jax import Array
from torch import Tensor

from interop.dropin import eager, host, program
from interop.dropin.groups import Groups, parameter_name
from interop.dropin.state import check_slot, check_state
from interop.memory import Buffer, Device, check, check_parameter
from interop.memory.tensors import DTYPES, address
from jopt import numerics
from jopt.leaf import step_leaf
from jopt.rule import Rule

SLOTS = ("exp_avg", "exp_avg_sq")
SMALLEST = 1024  # elements


def step(optimizer: Any) -> None:
    """Step every parameter that has a gradient, after all were checked."""
    stepped = []
    groups = Groups(optimizer)
    numbers, rules = groups.numbers, groups.rules
    for index, group in enumerate(optimizer.param_groups):
        h, rule = {name: np.float64(x) for name, x in numbers[index].items()}, rules[index]
        for p in group["params"]:
            if p.grad is None:
                continue
            name = parameter_name(optimizer, index, p)
            device = check_parameter(name, p)
            if not p.grad.is_sparse:
                raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")
            check(f"the gradient of {name}", p.grad._values())
            if state := optimizer.state.get(p):
                shape = tuple(p.shape)
                check_state(optimizer, name, rule, numbers[index], dict.fromkeys(SLOTS, shape), state)
                for slot in SLOTS:
                    check_slot(device, name, slot, state[slot], shape)
            stepped.append((device, p, rule, h))
    work = optimizer._work = optimizer._work or _Work()
    for device, p, rule, h in stepped:
        state = optimizer.state[p]
        if not state:
            state["step"] = 0
            for slot in SLOTS:
                state[slot] = torch.zeros_like(p, memory_format=torch.preserve_format)
        before = float(state["step"])
        state["step"] += 1  # also for an empty gradient
        grad = p.grad.coalesce()
        if grad.values().numel():
            c = rule.scalars(h, {"step": np.float64(before)}, np, np.float64)[0]
            _step_rows(device, work, rule, c, grad, p, state)


def _step_rows(
    device: Device, work: _Work, rule: Rule, c: dict[str, Any], grad: Tensor, p: Tensor, state: dict[str, Any]
) -> None:
    lead = grad.sparse_dim()
    index = grad.indices()[0]
    for axis in range(1, lead):
        index = index * p.shape[axis] + grad.indices()[axis]
    tensors = [p, *(state[slot] for slot in SLOTS)]
    tables = [x.flatten(0, lead - 1) for x in tensors]  # views where the leading axes lie so
    rows = grad.values()
    by_torch, extra = eager.compile_rule(rule, SLOTS, tuple(c))
    if extra * rows.numel() <= eager.ROOM and {x.dtype for x in tensors} == {rows.dtype}:
        views = [rows, *(table.index_select(0, index) for table in tables)]
        by_torch(views[1], rows, *views[2:], list(map(float, c.values())))
    else:
        views = _by_program(device, work, rule, c, index, [rows, *tables])
    for x, table, view in zip(tensors, tables, views[1:], strict=True):
        table.index_copy_(0, index, view)
        if address(table) != address(x):
            x.copy_(table.view_as(x))


def _by_program(
    device: Device, work: _Work, rule: Rule, c: dict[str, Any], index: Tensor, tables: list[Tensor]
) -> list[Tensor]:
    """The rows after the step, behind their gradient; `tables` is that and what the others are taken from."""
    host.check_process()
    rows = tables[0]
    buffers = work.buffers(device, rows.numel(), [x.dtype for x in tables])
    views = [b.view(x.dtype, tuple(rows.shape)) for b, x in zip(buffers, tables, strict=True)]
    views[0].copy_(rows)
    for table, view in zip(tables[1:], views[1:], strict=True):
        torch.index_select(table, 0, index, out=view)
    compiled = _compile(device, rule, tuple(b.array.dtype for b in buffers), tuple(c), buffers[0].array.size)
    compute = numerics.widest(b.array.dtype for b in buffers)
    with host.SignalsWait(), host.settings():
        device.after(program.launch(device, compiled, buffers, np.array(list(c.values())).astype(compute)))
    return views


class _Work:
    """Buffers to gather rows into, kept from step to step: new memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[Any, list[Buffer]] = {}

    def buffers(self, device: Device, n: int, dtypes: list[torch.dtype]) -> list[Buffer]:
        size = max(SMALLEST, 1 << (n - 1).bit_length())
        key = (device, size, *dtypes)
        if key not in self._kept:
            self._kept = {key: [device.buffer(size, DTYPES[d]) for d in dtypes]}
        return self._kept[key]


@functools.lru_cache(maxsize=128)
def _compile(device: Device, rule: Rule, dtypes: tuple[np.dtype, ...], coefficients: tuple[str, ...], size: int) -> Any:
    def step(arrays: list[Array], values: Array) -> list[Array]:
        c = {name: values[i] for i, name in enumerate(coefficients)}
        grad, param, *slots = arrays
        param, state = step_leaf(rule, c, grad, dict(zip(SLOTS, slots, strict=True)), param)
        return [grad, param, *(state[slot] for slot in SLOTS)]

    compute = numerics.widest(dtypes)
    with host.own_settings():
        arrays = [jax.ShapeDtypeStruct((size,), d, sharding=device.sharding) for d in dtypes]
        values = jax.ShapeDtypeStruct((len(coefficients),), compute, sharding=device.sharding)
        return program.compile_on(device, step, arrays, values, donate_argnums=0)
