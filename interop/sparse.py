"""SparseAdam's step on the torch side: torch gathers and scatters rows, XLA computes them.

The number of rows with a gradient changes from step to step, so that the program works on a flat buffer of the next
power of two, and is compiled once for each size that occurs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from interop import dlpack
from interop.optimizer import own_settings
from jopt import numerics
from jopt.rule import Rule, step_leaf

SLOTS = ("exp_avg", "exp_avg_sq")
SMALLEST = 1024  # elements


def step(optimizer: Any) -> None:
    """Step every parameter that has a gradient, after all were checked."""
    stepped = []
    for index, group in enumerate(optimizer.param_groups):
        h = {name: np.float64(x) for name, x in optimizer.rule.members(group).items()}
        rule = optimizer.rule.shaped_by(group, h)
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            name = f"param_groups[{index}]['params'][{i}]"
            dlpack.check_tensor(name, p)
            if not p.grad.is_sparse:
                raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")
            dlpack.check_tensor(f"the gradient of {name}", p.grad._values())
            if p.dtype not in dlpack.DTYPES:
                raise TypeError(f"{name}: expected one of {', '.join(map(str, dlpack.DTYPES))}, found {p.dtype}")
            stepped.append((p, rule, h))
    for p, rule, h in stepped:
        state = optimizer.state[p]
        if not state:
            state["step"] = 0
            for slot in SLOTS:
                state[slot] = torch.zeros_like(p, memory_format=torch.preserve_format)
        before = float(state["step"])
        state["step"] += 1  # also for an empty gradient
        grad = p.grad.coalesce()
        if grad.values().numel():
            _step_rows(rule, rule.scalars(h, {"step": np.float64(before)}, np, np.float64)[0], grad, p, state)


def _step_rows(rule: Rule, c: dict[str, Any], grad: Tensor, p: Tensor, state: dict[str, Any]) -> None:
    where = tuple(grad.indices())
    tensors = {"param": p} | {slot: state[slot] for slot in SLOTS}
    n = grad.values().numel()
    size = max(SMALLEST, 1 << (n - 1).bit_length())
    arrays = [_padded(x, size) for x in (grad.values(), *(x[where] for x in tensors.values()))]
    dtypes = tuple(x.dtype for x in arrays)
    program = _compile(rule, dtypes, tuple(c), size)
    compute = max((numerics.compute_dtype(d) for d in dtypes), key=lambda d: d.itemsize)
    with own_settings():
        out = [np.asarray(x) for x in program(*arrays, np.array(list(c.values())).astype(compute))]
    for x, rows in zip(tensors.values(), out, strict=True):
        rows = dlpack.view(rows.ctypes.data, x.dtype, tuple(grad.values().shape), owner=rows)
        x.index_put_(where, rows)


def _padded(x: Tensor, size: int) -> np.ndarray:
    array = dlpack.aligned_zeros(size, dlpack.DTYPES[x.dtype])
    dlpack.view(array.ctypes.data, x.dtype, tuple(x.shape), owner=array).copy_(x)
    return array


@functools.lru_cache(maxsize=128)
def _compile(rule: Rule, dtypes: tuple[np.dtype, ...], coefficients: tuple[str, ...], size: int) -> Any:
    def program(grad, param, exp_avg, exp_avg_sq, values):
        c = {name: values[i] for i, name in enumerate(coefficients)}
        param, state = step_leaf(rule, c, grad, dict(zip(SLOTS, (exp_avg, exp_avg_sq), strict=True)), param)
        return param, *(state[slot] for slot in SLOTS)

    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    compute = max((numerics.compute_dtype(d) for d in dtypes), key=lambda d: d.itemsize)
    with own_settings():
        specs = [jax.ShapeDtypeStruct((size,), d, sharding=sharding) for d in dtypes]
        values = jax.ShapeDtypeStruct((len(coefficients),), compute, sharding=sharding)
        return jax.jit(program).lower(*specs, values).compile()
