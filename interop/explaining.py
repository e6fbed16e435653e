"""What a step of `interop.optim`, or of `interop.wrap`, is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from interop.dropin import eager
from interop.dropin.bucket import Bucket
from interop.dropin.step import CompiledStep
from interop.wrapping.group import Group
from interop.wrapping.optimizer import WrappedOptimizer


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters that are stepped together.

    Attributes:
      by: "torch's operations", "a program of one thread" or "a program"; "and Python inside of it" where a wrapped
        transformation calls back, so that its results are copied instead of written in place.
      tensors, elements: how many there are.
      device: where they lie, as torch names it.
      operations: of torch's operations the function, in Python, for each shape that it is made for; else none.
    """

    by: str
    tensors: int
    elements: int
    device: str
    operations: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StepExplanation:
    """What `explain` returns. Printed, it is a line a part, and the operations.

    Attributes:
      optimizer: the name of the class.
      parts: in the order in which they are stepped.
    """

    optimizer: str
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        lines = [f"a step of {self.optimizer}:"]
        for part in self.parts:
            lines.append(f"  {part.tensors} tensors, {part.elements} elements, on {part.device}, by {part.by}")
            lines += [f"    {line}" for source in part.operations for line in source.rstrip().split("\n")]
        return "\n".join(lines)


def explain(optimizer: Any) -> StepExplanation:
    """What the next step of an optimizer of `interop.optim` or `interop.wrap` does, if nothing changes before it.

    Small steps are torch's own operations, the rest programs that XLA compiled: docs/performance.md says where one
    begins to be quicker. A wrapped transformation is always a program, one for each group.

    Raises:
      TypeError: an optimizer without such a step: of another library, or LBFGS or SparseAdam.
      ValueError: it has not made a step yet, so that nothing is planned.

    >>> import torch
    >>> from interop import explain, optim
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = optim.SGD([p], lr=0.1)
    >>> p.grad = torch.ones(3)
    >>> optimizer.step()
    >>> print(explain(optimizer))
    a step of SGD:
      1 tensors, 3 elements, on cpu, by torch's operations
        def step(param, grad, c):
            v0 = param.add_(grad, alpha=c[0])
    """
    if isinstance(optimizer, WrappedOptimizer):
        parts = [_of_group(work) for work in optimizer._groups if work.last is not None]
    elif isinstance(optimizer, CompiledStep):
        parts = [_of_bucket(bucket) for bucket in (optimizer._plan.buckets if optimizer._plan else ())]
    else:
        raise TypeError(
            f"optimizer: expected one of interop.optim but LBFGS and SparseAdam, or of interop.wrap, found "
            f"{type(optimizer).__name__}"
        )
    if not parts:
        raise ValueError("optimizer: expected one that has made a step, found one without; what it steps is not known")
    return StepExplanation(type(optimizer).__name__, tuple(parts))


def _of_bucket(bucket: Bucket) -> Part:
    operations = eager.sources(bucket.spec) if bucket.device.uses_torch else ()
    elements = sum(leaf.size for leaf in bucket.leaves)
    return Part(bucket.device.steps_by, len(bucket.leaves), elements, str(bucket.device.torch_device), operations)


def _of_group(work: Group) -> Part:
    assert work.last is not None
    layout = work.last.layout
    by = layout.device.steps_by + ", and Python inside of it" * work.last.calls_back
    elements = sum(math.prod(spec.shape) for spec in layout.specs)
    return Part(by, len(layout.specs), elements, str(layout.device.torch_device), ())
