"""What processes find out together, where parameters are DTensors: the norm of all gradients, whether all are finite.

Each process knows its parts. One sum over the processes of a mesh tells all of them the same; every process of the mesh
takes part in it, also one without gradients or without any part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from interop.dropin import dtensor
from interop.dropin.groups import parameter_name


def meshes(optimizer: Any) -> list[Any]:
    """Of the parameters, in their order; none if they are plain.

    Raises:
      TypeError: some are DTensors, some plain, of which nobody knows whether other processes have the same.
    """
    found: dict[Any, None] = {}
    plain = []
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if (placed := dtensor.placement(p)) is None:
                plain.append((index, p))
            else:
                found[placed[0]] = None
    if found and plain:
        raise TypeError(
            f"{parameter_name(optimizer, *plain[0])}: expected DTensors alone for a norm of all gradients or a loss "
            f"scale, found a plain parameter beside them, of which other processes may have others; distribute it, or "
            "give it an optimizer of its own"
        )
    return list(found)


def agree(meshes: Iterable[Any], norms: Iterable[tuple[Tensor, float]], overflow: bool) -> tuple[float, bool]:
    """The norm of all gradients, and whether one is not finite, as every process of the meshes finds them.

    Args:
      meshes: of the optimizer.
      norms: parameters with the norms of their gradients' parts in this process.
      overflow: whether a part is not finite.
    """
    squares: dict[Any, float] = {}
    for p, norm in norms:
        mesh, placements, _ = dtensor.placement(p)  # type: ignore[misc]
        copies = math.prod(mesh.size(i) for i, placed in enumerate(placements) if placed.is_replicate())
        squares[mesh] = squares.get(mesh, 0.0) + norm * norm / copies
    total, found = 0.0, float(overflow)
    for mesh in meshes:
        sums = torch.tensor([squares.get(mesh, 0.0), found], dtype=torch.float64, device=mesh.device_type)
        for i in range(mesh.ndim):
            dist.all_reduce(sums, group=mesh.get_group(i))
        square, found = sums.tolist()
        total += square
    return math.sqrt(total) if total >= 0 else math.nan, found > 0
