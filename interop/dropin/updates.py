"""What steps a bucket: a program, torch's operations, or what processes do together where its leaves are parts."""

from __future__ import annotations

from typing import Any

from interop.dropin import eager, exchange, owned, parts
from interop.dropin.bucket import Bucket
from interop.dropin.program import Norms
from interop.dropin.whole import is_owned
from jopt.rule import Batched


def update_for(optimizer: Any, bucket: Bucket, clip: bool, unscale: bool, norms: Norms) -> Any:
    """What `Bucket.step` is to launch. Of parts: the sums of their mesh, the matrices' exchange, or owners of all."""
    spec, leaves = bucket.spec, bucket.leaves
    if bucket.device.uses_torch:
        return eager.Update(spec)
    if not spec.wholes:
        return optimizer.compile_update(spec, clip, unscale, norms)
    if is_owned(bucket.rule):
        return owned.compile_update(spec, leaves, clip, unscale, norms)
    mesh = leaves[0].placement[0]
    if not isinstance(bucket.rule, Batched):
        return parts.compile_update(spec, clip, unscale, norms).across(mesh)
    owners = exchange.owners([exchange.products(leaf.param.shape) for leaf in leaves], mesh.size())
    brought = exchange.Exchange([leaf.placement for leaf in leaves], owners, [tuple(leaf.shape) for leaf in leaves])
    return optimizer.compile_update(spec, clip, unscale, norms).across(brought)
