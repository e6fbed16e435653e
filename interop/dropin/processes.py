"""What processes find out together, where parameters are DTensors: the norm of all gradients, whether all are finite,
whether each is ready to step, and whether they are to do the same.

Each process knows its parts. One sum over the processes of a mesh tells all of them the same; every process of the mesh
takes part in it, also one without gradients or without any part, and one that raises, so that all do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from interop.dropin import dtensor
from interop.dropin.groups import parameter_name


def meshes(optimizer: Any, *, with_plain: bool = True) -> list[Any]:
    """Of the parameters, in an order that all processes share; none if they are plain.

    Args:
      with_plain: parameters may be DTensors and plain ones.

    Raises:
      TypeError: some are DTensors, some plain, of which nobody knows whether other processes have the same.
    """
    params = _placed(optimizer)
    found = dict.fromkeys(placed[0] for _, _, placed in params if placed is not None)
    plain = [(index, p) for index, p, placed in params if placed is None]
    if found and plain and not with_plain:
        raise TypeError(
            f"{parameter_name(optimizer, *plain[0])}: expected DTensors alone for a norm of all gradients, a loss "
            "scale or sums over all parameters, found a plain parameter beside them, of which other processes may have "
            "others; distribute it, or give it an optimizer of its own"
        )
    return sorted(found, key=lambda mesh: (mesh.mesh.flatten().tolist(), tuple(mesh.shape)))


def compare(optimizer: Any) -> None:
    """Once, before the first step: that all processes of each mesh step the same parameters by the same numbers.

    Raises:
      ValueError: they do not; it names the first difference.
    """
    for mesh in meshes(optimizer):
        found = _gather(mesh, _description(optimizer, mesh))
        for process, other in found[1:]:
            if other != found[0][1]:
                raise ValueError(_difference(type(optimizer).__name__, *found[0], process, other))


def _description(optimizer: Any, mesh: Any) -> dict[str, str]:
    """What processes must agree on, by name: the class, the groups' numbers, the parameters on the mesh."""
    found = {"the class": type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        own = {key: x for key, x in group.items() if key not in ("params", "param_names")}
        found |= {f"param_groups[{index}][{key!r}]": _text(own[key]) for key in sorted(own, key=str)}
        for i, p in enumerate(group["params"]):
            placed = dtensor.placement(p)
            if placed is not None and placed[0] == mesh:
                names = group.get("param_names")
                name = f"param_groups[{index}]['params'][{i}]"
                found[name] = f"{names[i] + ', ' if names else ''}{dtensor.say(placed)} of {p.dtype}"
    return found


def _text(x: Any) -> str:
    return repr(x.tolist() if isinstance(x, Tensor) and dtensor.placement(x) is None else x)


def _difference(name: str, first: int, a: dict[str, str], second: int, b: dict[str, str]) -> str:
    key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
    return (
        f"{key}: expected the same in all processes of {name}'s parameters, found {a.get(key, 'none')} in process "
        f"{first} and {b.get(key, 'none')} in process {second}; give each process the same groups in the same order"
    )


def _gather(mesh: Any, own: Any) -> list[tuple[int, Any]]:
    """What each process of a mesh gives, with its rank; the same list in all."""
    found = [(dist.get_rank(), own)]
    for i in range(mesh.ndim):
        parts: list[Any] = [None] * mesh.size(i)
        dist.all_gather_object(parts, found, group=mesh.get_group(i))
        found = [x for part in parts for x in part]
    return sorted(found, key=lambda x: x[0])


@contextlib.contextmanager
def together(meshes: Sequence[Any], optimizer: Any) -> Iterator[None]:
    """An exception inside reaches the other processes, which wait in `agree`: all raise."""
    try:
        yield
    except Exception as error:
        if meshes:
            agree(meshes, optimizer, error=error)
        raise


def agree(
    meshes: Iterable[Any],
    optimizer: Any,
    norms: Iterable[tuple[Tensor, float]] = (),
    overflow: bool = False,
    error: Exception | None = None,
    sums: Iterable[tuple[Tensor, Any]] = (),
) -> tuple[float, bool, list[float]]:
    """The norm of all gradients, whether one is not finite, and the rule's sums, as every process of the meshes finds
    them.

    Args:
      meshes: of the optimizer.
      norms: parameters with the norms of their gradients' parts in this process.
      overflow: whether a part is not finite.
      error: what this process is about to raise.
      sums: parameters with what their parts in this process add to each of the rule's sums.

    Raises:
      RuntimeError: another process raises; or, for a rule that looks at whole tensors or sums over them, a parameter
        has a gradient in some processes alone.
    """
    n = 1 + len(optimizer.rule.sums)  # what is added of each parameter: its square, and the sums
    adds = [(p, [norm * norm] + [0.0] * (n - 1)) for p, norm in norms] + [(p, [0.0, *x]) for p, x in sums]
    by_mesh: dict[Any, np.ndarray] = {}
    for p, x in adds:
        mesh, placements, _ = dtensor.placement(p)  # type: ignore[misc]
        copies = math.prod(mesh.size(i) for i, placed in enumerate(placements) if placed.is_replicate())
        by_mesh[mesh] = by_mesh.get(mesh, np.zeros(n)) + np.array(x) / copies
    total, found = np.zeros(n), float(overflow)
    for mesh in meshes:
        whole = _whole(optimizer, mesh)
        present = [float(p.grad is not None) for _, p in whole]
        own = [*by_mesh.get(mesh, np.zeros(n)).tolist(), found, float(error is not None), *present]
        added = torch.tensor(own, dtype=torch.float64, device=mesh.device_type)
        for i in range(mesh.ndim):
            dist.all_reduce(added, group=mesh.get_group(i))
        numbers = added.tolist()
        total += numbers[:n]
        found, failed, *counts = numbers[n:]
        if failed or any(count not in (0, mesh.size()) for count in counts):
            optimizer._plan = None  # processes may have different ones now
        if failed:
            texts = _gather(mesh, None if error is None else f"{type(error).__name__}: {error}")
            if error is None:
                reasons = "; ".join(f"process {rank} raised {text}" for rank, text in texts if text is not None)
                raise RuntimeError(f"interop.optim.{type(optimizer).__name__}: nothing was stepped, for {reasons}")
        for (index, p), count in zip(whole, counts, strict=True):
            if error is None and count not in (0, mesh.size()):
                raise RuntimeError(
                    f"{parameter_name(optimizer, index, p)}: expected a gradient in all processes of its mesh or in "
                    f"none, for {type(optimizer).__name__} looks at whole tensors, found one in {count:.0f} of "
                    f"{mesh.size()}; zeros are one where a part has none"
                )
    square, *found_sums = total.tolist()
    return math.sqrt(square) if square >= 0 else math.nan, found > 0, found_sums


def _whole(optimizer: Any, mesh: Any) -> list[tuple[int, Tensor]]:
    """The parameters on a mesh that are looked at as a whole, with their groups."""
    if optimizer.rule.scope != "tensor" and not optimizer.rule.sums:
        return []
    return [(index, p) for index, p, placed in _placed(optimizer) if placed is not None and placed[0] == mesh]


def _placed(optimizer: Any) -> list[tuple[int, Tensor, Any]]:
    """All parameters, with their groups and `dtensor.placement`s."""
    groups = enumerate(optimizer.param_groups)
    return [(index, p, dtensor.placement(p)) for index, group in groups for p in group["params"]]
