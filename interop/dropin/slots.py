"""A leaf's first state: what a rule's `init` gives, in torch's tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jopt import numerics, quantized
from jopt.rule import Rule


@dataclasses.dataclass
class _Param(numerics.Foreign):
    """A parameter to `Rule.init`, which asks for its shape and for arrays like it."""

    x: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def ndim(self) -> int:
        return self.x.dim()

    def operate(self, name: str, *args: Any, **options: Any) -> Tensor:
        dtype, shape = self.x.dtype, options.get("shape", self.shape)
        if name == "zeros":
            shape, dtype = args[1], torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        value = args[1] if name == "full_like" else 0.0
        return torch.full((1,) * len(shape), value, dtype=dtype, device=self.x.device).expand(shape)


@functools.lru_cache(maxsize=1024)
def slot_dtypes(rule: Rule, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The types of a leaf's tensor state before anything else is loaded."""
    first = first_slots(rule, shape, dtype, tuple(dict.fromkeys(rule.hyperparameters, 0.0).items()))
    return {name: x.dtype for name, x in first.items()}


@functools.lru_cache(maxsize=1024)
def slot_shapes(rule: Rule, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a leaf's tensor state, in torch's order."""
    param: Any = _Param(torch.empty(shape, device="meta"))
    state: dict[str, Any] = rule.init(dict.fromkeys(rule.hyperparameters, 0.0), param)
    return {name: tuple(x.shape) for name, x in state.items()}


def code_slots(slot: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a slot in codes."""
    return {slot + quantized.CODES: shape, slot + quantized.ABSMAX: (quantized.blocks(math.prod(shape)),)}


def shape_of_slot(shapes: Mapping[str, tuple[int, ...]], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf's array of that name, in codes or not; that of the leaf for what is no slot."""
    if name.endswith(quantized.ABSMAX):
        return (quantized.blocks(math.prod(shape)),)
    return shapes.get(name, shape)


@functools.lru_cache(maxsize=1024)
def first_slots(
    rule: Rule, shape: tuple[int, ...], dtype: torch.dtype, h: tuple[tuple[str, float], ...]
) -> dict[str, Tensor]:
    """The tensor state of a leaf before its first step, each slot in the memory of one element.

    In each all elements are equal (`Rule.init`). Those of a complex leaf are complex, their real and imaginary parts
    alike.
    """
    real = dtype.to_real() if dtype.is_complex else dtype
    param: Any = _Param(torch.empty((1,) * len(shape), dtype=real).expand(shape))
    state: dict[str, Any] = rule.init(dict(h), param)
    if dtype.is_complex:
        ones = {name: x[(slice(1),) * x.dim()] for name, x in state.items()}
        return {name: torch.complex(x, x).expand(state[name].shape) for name, x in ones.items()}
    for slot, signed in rule.signs().items():
        if slot in state:  # where all of a block are equal, they are its largest
            value = next(iter(state[slot].reshape(-1)[:1].tolist()), 0.0)
            code = 255 if value else 127 if signed else 0
            for (name, shape), x in zip(
                code_slots(slot, tuple(state[slot].shape)).items(),
                (torch.tensor(code, dtype=torch.uint8), torch.tensor(value, dtype=torch.float32)),
                strict=True,
            ):
                state[name] = x.expand(shape)
    return state
