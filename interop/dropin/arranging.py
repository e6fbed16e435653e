"""Which leaves share buffers, and which are stepped after others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from interop.dropin import dtensor
from interop.dropin.leaf import Leaf, is_big
from interop.memory import Device
from interop.memory.tensors import extent
from jopt.arena import Layout
from jopt.leaf import stack_size
from jopt.rule import Batched, Rule

SHELF = 2**20  # elements: of small tensors in one buffer, whose gradients are gathered in as much memory


def shelves(device: Device, rule: Rule, leaves: list[Leaf]) -> list[list[Leaf]]:
    """The leaves in parts: the small ones of a part fit into buffers of `SHELF` elements; the big are in the first.

    Those that are stepped together are of one shape and group, and of as many elements as caches hold; or of one group,
    if they are parts of matrices that processes exchange, all at once.
    """
    if isinstance(rule, Batched) and any(leaf.whole is not None for leaf in leaves):
        groups = dict.fromkeys(leaf.group for leaf in leaves)
        return [[leaf for leaf in leaves if leaf.group == group] for group in groups]
    if isinstance(rule, Batched):
        alike: dict[Any, list[list[Leaf]]] = {}
        for leaf in leaves:
            found = alike.setdefault((leaf.shape, leaf.group), [[]])
            if len(found[-1]) == stack_size(leaf.size):
                found.append([])
            found[-1].append(leaf)
        return [part for found in alike.values() for part in found]
    parts, room = [[leaf for leaf in leaves if is_big(device, rule, leaf)]], SHELF
    for leaf in leaves:
        if not is_big(device, rule, leaf):
            if leaf.size > room:
                parts.append([])
                room = SHELF
            parts[-1].append(leaf)
            room -= -(-leaf.size // device.row) * device.row
    return parts


def passes_of(params: Sequence[Tensor]) -> dict[Tensor, int]:
    """For each parameter in which pass it is stepped: one that shares memory with an earlier one comes after it.

    torch steps parameters one after the other, which shows there.
    """
    extents = [extent(dtensor.local(p)) for p in params]
    overlapping: list[list[int]] = [[] for _ in params]  # the earlier parameters in the memory of each
    still: list[int] = []
    for i in sorted(range(len(params)), key=extents.__getitem__):
        begin, end = extents[i]
        still = [j for j in still if extents[j][1] > begin]
        if end > begin:
            for j in still:
                overlapping[max(i, j)].append(min(i, j))
            still.append(i)
    passes: list[int] = []
    for earlier in overlapping:
        passes.append(1 + max((passes[j] for j in earlier), default=-1))
    return dict(zip(params, passes, strict=True))


_leaves_of_rows: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def leaf_of_row(device: Device, layout: Layout) -> Any:
    """For each row its leaf: one array for all buckets with such rows."""
    found = _leaves_of_rows.get((device, layout.rows))
    if found is None:
        found = _leaves_of_rows[device, layout.rows] = device.put(layout.leaf_of_row())
    return found
