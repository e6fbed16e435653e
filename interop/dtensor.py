"""DTensors, as FSDP2 and tensor parallelism make them: a step sees the local tensor.

Enough for a rule that looks at single elements. What looks at more would compute the numbers of one process's part:
it is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jopt.rule import Rule


def placement(x: Any) -> tuple[Any, ...] | None:
    """How a DTensor's elements lie over the processes; None for anything else."""
    if type(x) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor  # costs half a second, which only its users pay

    return (x.device_mesh, tuple(x.placements), x.shape) if type(x) is DTensor else None


def local(x: Any) -> Any:
    """A DTensor's elements in this process, to be called without autograd; anything else as it is."""
    if placement(x) is None:
        return x
    x = x.to_local()
    return x.wait() if hasattr(x, "wait") else x  # a collective may still be computing it


def like(x: Tensor, p: Tensor) -> Tensor:
    """A contiguous local tensor as the state of the parameter `p`, in the same memory."""
    if (placed := placement(p)) is None:
        return x
    from torch.distributed.tensor import DTensor

    mesh, placements, shape = placed
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)


def check(name: str, optimizer: Any, rule: Rule, p: Tensor, grad: Tensor) -> None:
    """Raise TypeError where stepping the local tensors alone would be wrong.

    It depends on nothing but what all processes know, so that none goes on without the others.
    """
    placed = placement(p)
    if placement(grad) != placed:
        kinds_differ = placed is None or placement(grad) is None
        remedy = (
            "distribute both, or none" if kinds_differ else "p.grad.redistribute(p.device_mesh, p.placements) is one"
        )
        raise TypeError(
            f"the gradient of {name}: expected {describe(p)} as the parameter, found {describe(grad)}; {remedy}"
        )
    if placed is None:
        return
    if any(x.is_partial() for x in placed[1]):
        raise TypeError(
            f"{name}: expected a DTensor sharded or replicated, found {describe(p)}; redistribute it before the "
            "optimizer is made"
        )
    if rule.scope != "element":
        raise TypeError(
            f"{name}: expected a plain tensor, found a DTensor: interop.optim.{type(optimizer).__name__} looks at whole "
            "tensors, of which each process has a part; use an elementwise optimizer such as AdamW, or "
            "DistributedDataParallel, which keeps parameters whole"
        )
    if optimizer.max_norm is not None:
        raise TypeError(
            f"{name}: max_norm does not take DTensors: the norm is of all processes' parts; call "
            "torch.nn.utils.clip_grad_norm_ before the step, and leave max_norm=None"
        )
    if optimizer.grad_scale is not None:
        raise TypeError(
            f"{name}: interop.amp.GradScaler does not take DTensors: whether to skip a step is for all processes to "
            "decide; use torch.amp.GradScaler"
        )


def describe(x: Any) -> str:
    """For messages."""
    if (placed := placement(x)) is None:
        return "a plain tensor" if isinstance(x, Tensor) else f"{type(x).__name__} {x!r}"
    return f"a DTensor of shape {tuple(placed[2])} and placements {placed[1]} on {placed[0]}"
