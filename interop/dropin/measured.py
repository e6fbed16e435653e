"""What a step finds in its gradients before it: norms, and whether one is not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from interop.dropin import processes
from interop.dropin.bucket import Bucket, number_array


@dataclasses.dataclass
class Measured:
    """What was found in the gradients of all buckets, for their updates.

    Attributes:
      norms, overflows: of each bucket, as programs take them.
      max_norm, inverse_scale: numbers of the step.
    """

    norms: list[Any]
    overflows: list[Any]
    max_norm: float
    inverse_scale: float

    def of(self, bucket: Bucket) -> dict[str, Any]:
        """As the bucket's program takes it."""
        dtype = bucket.spec.compute_dtype
        numbers = {"max_norm": self.max_norm, "inverse_scale": self.inverse_scale}
        arrays = {name: number_array(bucket.device, x, dtype) for name, x in numbers.items()}
        return {"norms": self.norms, "overflows": self.overflows} | arrays

    def agree(self, optimizer: Any, meshes: list[Any], buckets: Sequence[Bucket]) -> None:
        """Exchange them for what all processes found: the norm of all gradients stands where that of one was."""
        local = [np.asarray(x, np.float64) for x in self.norms]
        leaves = (leaf.param for bucket in buckets for leaf in bucket.leaves)
        norms = zip(leaves, np.concatenate(local).tolist(), strict=True)
        total, overflow, _ = processes.agree(meshes, optimizer, norms, any(map(bool, self.overflows)))
        widest = max(buckets, key=lambda bucket: bucket.dtype.itemsize)  # which rounds it least
        for i, (bucket, x) in enumerate(zip(buckets, local, strict=True)):
            of_bucket = np.zeros(len(x), bucket.dtype)
            of_bucket[:1] = total if bucket is widest else 0
            self.norms[i] = bucket.device.put(of_bucket)
            self.overflows[i] = bucket.device.put(np.asarray(overflow))


def measures(optimizer: Any) -> bool:
    """Whether a step looks at its gradients first, to clip or unscale them."""
    return optimizer.max_norm is not None or optimizer.grad_scale is not None
