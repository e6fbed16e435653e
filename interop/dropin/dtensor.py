"""DTensors, as FSDP2 and tensor parallelism make them: a step sees the local tensor.

That is enough for a rule that looks at single elements. What a rule needs that looks at whole tensors, processes find
out together: sums (parts.py), or the matrices that Muon makes orthogonal (exchange.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def placement(x: Any) -> tuple[Any, ...] | None:
    """How a DTensor's elements lie over the processes; None for anything else."""
    if not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor  # not in every build of torch

    return (x.device_mesh, tuple(x.placements), x.shape) if type(x) is DTensor else None


def local(x: Any) -> Any:
    """A DTensor's elements in this process; anything else as it is. Call it without autograd."""
    if placement(x) is None:
        return x
    x = x.to_local()
    return x.wait() if hasattr(x, "wait") else x  # a collective may still be computing it


def placed_by(x: Tensor, placement: tuple[Any, ...] | None) -> Tensor:
    """A contiguous local tensor as a DTensor that lies so, in the same memory; with None as it is."""
    if placement is None:
        return x
    from torch.distributed.tensor import DTensor

    mesh, placements, shape = placement
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)


def error(p: Tensor, grad: Tensor) -> str | None:
    """What is wrong with stepping the local tensors alone, if `p` or its gradient is a DTensor; None if nothing is.

    It asks only what all processes know, so that all raise or none does.
    """
    if placement(grad) != placement(p):
        both = placement(grad) is not None and placement(p) is not None
        remedy = "p.grad.redistribute(p.device_mesh, p.placements) is one" if both else "distribute both, or none"
        return f"expected a gradient placed as the parameter, {describe(p)}, found {describe(grad)}; {remedy}"
    if any(x.is_partial() for x in p.placements):  # type: ignore[attr-defined]
        return f"expected a DTensor sharded or replicated, found {describe(p)}; redistribute it first"
    return None


def describe(x: Any) -> str:
    """How messages call a tensor's placement."""
    if (placed := placement(x)) is None:
        return "a plain tensor" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r}"
    return say(placed)


def say(placement: tuple[Any, ...] | None) -> str:
    """How messages call a placement."""
    if placement is None:
        return "a plain tensor"
    mesh, placements, shape = placement
    return f"a DTensor of shape {tuple(shape)} and placements {placements} on {mesh}"
