"""A parameter as a plan sees it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from interop.dropin.whole import Whole
from interop.memory import Device
from jopt.quantized import holds_codes
from jopt.rule import Rule

EMA = "ema"  # the slot of the parameter's exponential moving average


@dataclasses.dataclass(eq=False, slots=True)
class Leaf:
    """One parameter: where its values and its state lie in a bucket's buffers. A DTensor's are its local tensor's."""

    param: Tensor
    device: Device
    local: Tensor  # of a DTensor; else the parameter itself
    placement: Any  # of a DTensor; else None
    whole: Whole | None  # of a DTensor, where the rule looks at whole tensors: what it is a part of
    group: int
    number: int  # among the parameters of the optimizer
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    size: int  # in real numbers: a complex one is two
    state_dtypes: dict[str, torch.dtype]
    state_shapes: dict[str, tuple[int, ...]]
    lazy: bool  # a conjugate or negative view
    address: int = 0  # of the parameter's values; if it changes, the user exchanged the storage
    home: Tensor | None = None  # the parameter's place in the buffer, if it does not live there: copied in and out
    stays: bool = False  # the user exchanged its storage once: it is left where they put it
    exchanged: int = 0  # how often they did
    views: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what torch's state holds, by name
    # State that does not live in the buffers, by name: its place there. It is copied in and out, as with `home`.
    homes: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def is_lazy(p: Tensor) -> bool:
    """Whether its values are not those in its memory: a conjugate or negative view of them."""
    return p.is_conj() or p.is_neg()


def is_big(device: Device, rule: Rule, leaf: Leaf) -> bool:
    """Whether a leaf has buffers of its own."""
    return leaf.size >= device.big or rule.scope == "tensor" or holds_codes(leaf.state_dtypes)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
