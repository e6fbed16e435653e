"""The norms of gradients by torch's operations, for a device on which many reductions are many launches of a program.

torch takes them for all tensors in a few launches, and they are those of `torch.nn.utils.clip_grad_norm_`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from interop.memory import Device
from interop.memory.tensors import torch_dtype
from jopt import numerics as t


def measure(
    device: Device, dtype: np.dtype, grads: Sequence[Tensor | None], inverse_scale: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a program of `program.compile_norms` finds.

    Args:
      device: where the gradients are.
      dtype: of the parameters.
      grads: None for those that are missing, whose norm is 0.
      inverse_scale: what the norms are multiplied by. If that is None, nothing that is not finite is looked for.
    """
    compute = torch_dtype(t.compute_dtype(dtype))
    present = [_real(x) for x in grads if x is not None and x.numel()]
    zero, no = _constants(device, compute)
    if not present:
        return zero.to(torch_dtype(dtype)).expand(len(grads)).contiguous(), no
    # They are stacked in the order of the leaves, among the zeros of what is missing.
    found = iter(torch._foreach_norm(present, 2.0, dtype=compute))  # type: ignore[attr-defined]
    norms = torch.stack([zero if x is None or not x.numel() else next(found) for x in grads])
    overflow = no
    if inverse_scale is not None:
        norms *= inverse_scale.to(device.torch_device, compute) if isinstance(inverse_scale, Tensor) else inverse_scale
        # Squares can overflow where no gradient does: so the largest of each is asked for.
        overflow = ~torch.stack(torch._foreach_norm(present, math.inf)).isfinite().all()  # type: ignore[attr-defined]
    return norms.to(torch_dtype(dtype)), overflow


def _real(x: Tensor) -> Tensor:
    """A gradient's numbers; a complex one has two of each."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@functools.cache
def _constants(device: Device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zero, and no."""
    where = device.torch_device
    return torch.zeros((), dtype=dtype, device=where), torch.zeros((), dtype=torch.bool, device=where)
