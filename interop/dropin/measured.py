"""What a step finds in its gradients before it: norms, and whether one is not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array
from torch import Tensor

from interop.dropin import norms, processes
from interop.dropin.bucket import Bucket, Work
from interop.dropin.reader import Gradients
from interop.memory import Device, number_array
from interop.memory.tensors import TORCH_DTYPES


@dataclasses.dataclass
class Measured:
    """What was found in the gradients of all buckets, for their updates.

    Attributes:
      max_norm, inverse_scale: numbers of the step; without a scale that is None.
      devices, norms, overflows: of each bucket, in arrays or tensors of its device.
    """

    max_norm: float
    inverse_scale: float | Tensor | None
    devices: list[Device] = dataclasses.field(default_factory=list)
    norms: list[Any] = dataclasses.field(default_factory=list)
    overflows: list[Any] = dataclasses.field(default_factory=list)

    def take(self, work: Work, measure: Any, grads: Gradients) -> None:
        """Find out about a bucket's gradients, by the program `measure` or by torch."""
        bucket, device = work.bucket, work.bucket.device
        if device.measures_by_torch:
            found = norms.measure(device, bucket.dtype, grads.tensors(work), self.inverse_scale)
        else:
            scale = self._scale(device, bucket.spec.compute_dtype)
            found = measure(grads.arrays(work), bucket.leaf_of_row, work.counted, scale)
        self.devices.append(device)
        self.norms.append(found[0])
        self.overflows.append(found[1])

    def _scale(self, device: Device, dtype: np.dtype) -> Array:
        if isinstance(self.inverse_scale, Tensor):
            return device.array(self.inverse_scale.to(device.torch_device, TORCH_DTYPES[dtype]))
        return number_array(device, 1.0 if self.inverse_scale is None else self.inverse_scale, dtype)

    def of(self, bucket: Bucket) -> dict[str, Any]:
        """As the bucket's program takes it."""
        device, dtype = bucket.device, bucket.spec.compute_dtype
        return {
            "norms": [_on(device, *x) for x in zip(self.devices, self.norms, strict=True)],
            "overflows": [_on(device, *x) for x in zip(self.devices, self.overflows, strict=True)],
            "max_norm": number_array(device, self.max_norm, dtype),
            "inverse_scale": self._scale(device, dtype),
        }

    def wait(self) -> None:
        """Wait for the programs that read gradients, before torch may write to those."""
        for device in dict.fromkeys(self.devices):
            found = zip(self.devices, self.norms, self.overflows, strict=True)
            device.after([x[1:] for x in found if x[0] is device and isinstance(x[1], Array)])

    def agree(self, optimizer: Any, meshes: list[Any], buckets: Sequence[Bucket]) -> None:
        """Exchange them for what all processes found: the norm of all gradients stands where that of one was."""
        local = [np.asarray(x.tolist() if isinstance(x, Tensor) else x, np.float64) for x in self.norms]
        leaves = (leaf.param for bucket in buckets for leaf in bucket.leaves)
        own = zip(leaves, np.concatenate(local).tolist(), strict=True)
        total, overflow, _ = processes.agree(meshes, optimizer, own, any(map(bool, self.overflows)))
        widest = max(buckets, key=lambda bucket: bucket.dtype.itemsize)  # which rounds it least
        for i, (bucket, x) in enumerate(zip(buckets, local, strict=True)):
            of_bucket = np.zeros(len(x), bucket.dtype)
            of_bucket[:1] = total if bucket is widest else 0
            self.norms[i] = bucket.device.put(of_bucket)
            self.overflows[i] = bucket.device.put(np.asarray(overflow))


def _on(device: Device, source: Device, x: Any) -> Any:
    """An array, or a tensor, of one device as a program of another takes it."""
    if isinstance(x, Array):
        if source is device:
            return x
        x = source.tensor(x)
    return device.array(x.to(device.torch_device))


def measures(optimizer: Any) -> bool:
    """Whether a step looks at its gradients first, to clip or unscale them."""
    return optimizer.max_norm is not None or optimizer.grad_scale is not None
