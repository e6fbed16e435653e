"""A leaf's first state: what a rule's `init` gives, in torch's tensors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from jopt import numerics
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
        value = {"zeros_like": lambda _: 0.0, "full_like": lambda _, value: value}[name](*args)
        return torch.full(options.get("shape", self.shape), value, dtype=self.x.dtype, device=self.x.device)


@functools.lru_cache(maxsize=1024)
def slot_shapes(rule: Rule, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a leaf's tensor state, in torch's order."""
    param: Any = _Param(torch.empty(shape, device="meta"))
    state: dict[str, Any] = rule.init(dict.fromkeys(rule.hyperparameters, 0.0), param)
    return {name: tuple(x.shape) for name, x in state.items()}


@functools.lru_cache(maxsize=1024)
def first_slots(rule: Rule, axes: int, dtype: torch.dtype, h: tuple[tuple[str, float], ...]) -> dict[str, Tensor]:
    """The tensor state before the first step of a leaf of so many axes, in tensors of one element each.

    In each of its slots all elements are equal (`Rule.init`), so that an array of the leaf's size is not needed. Those
    of a complex leaf are complex, their real and imaginary parts alike.
    """
    param: Any = _Param(torch.empty((1,) * axes, dtype=dtype.to_real() if dtype.is_complex else dtype))
    state: dict[str, Any] = rule.init(dict(h), param)
    return {name: torch.complex(x, x) if dtype.is_complex else x for name, x in state.items()}
