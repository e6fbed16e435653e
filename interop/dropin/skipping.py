"""Steps that a device skips before the host knows of it.

Whether a gradient is not finite the device finds, and the host does not wait for that. It counts the step. If it hears
later, at the next step or as somebody asks, that nothing changed, it takes the count back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from interop.dropin.bucket import Work
from interop.dropin.coefficients import Scalars
from interop.memory import Device


@dataclasses.dataclass
class Pending:
    """A step of which the host does not know yet whether it was skipped.

    Attributes:
      flag: whether it was, on the device.
      was_skipped: tells that to the host, and waits until the device has got there.
      counted: the vectors of scalar state, as they were and as the step has left them.
      shared: state in memory of other processes, with its places there.
    """

    flag: Tensor
    was_skipped: Callable[[], bool]
    counted: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    shared: list[tuple[Any, Any]]

    @classmethod
    def finishing(cls, flag: Tensor, device: Device, steps: Sequence[tuple[Work, Scalars]]) -> Pending:
        """Finish steps as if they were taken."""
        vectors = [x for work, _ in steps for x in work.bucket.coefficients.scalars.values()]
        before = [x.copy() for x in vectors]
        for work, scalars in steps:
            work.bucket.finish(work, scalars)
        counted = [(x, old, x.copy()) for x, old in zip(vectors, before, strict=True)]
        return cls(flag, device.later(flag), counted, [pair for work, _ in steps for pair in work.shared_scalars])

    def settle(self) -> bool:
        """Take back what was counted if the step was skipped; whether it was."""
        if skipped := self.was_skipped():
            for vector, old, new in self.counted:
                np.copyto(vector, old, where=vector == new)  # but for what its user has set since
            for place, value in self.shared:
                value.copy_(place)
        return skipped
