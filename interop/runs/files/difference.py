"""In what two runs differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from interop.dropin.options import EXECUTION
from interop.memory import HOST
from interop.runs.files.run import Checkpoint, bits, equal

CHUNK = 1 << 22  # elements at a time


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor or number in which two runs differ.

    Attributes:
      name: `params.<name>`, `state.<name>.<key>`, `options.<name>.<key>`, ...
      found: what differs.
      largest: the largest absolute difference of two tensors of one shape; inf where one of them is nan.
    """

    name: str
    found: str
    largest: float | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.found}"


def differences(a: Checkpoint, b: Checkpoint, tolerance: float = 0.0) -> list[Difference]:
    """What differs: tensors by more than the tolerance (at 0: in a bit), the largest first; then what is no tensor.

    How an optimizer runs (foreach, fused, capturable, differentiable) is not compared.
    """
    left, right = a.tensors(), b.tensors()
    result = []
    for name in dict.fromkeys([*left, *right]):
        x, y = left.get(name), right.get(name)
        if x is None or y is None:
            result.append(Difference(name, f"only in the {'first' if y is None else 'second'}"))
        elif x.shape != y.shape or x.dtype != y.dtype:
            result.append(Difference(name, f"{_kind(x)} and {_kind(y)}"))
        elif tolerance > 0 or not _same(x, y):
            largest = _largest(x, y)
            if largest > tolerance or tolerance == 0:
                result.append(Difference(name, f"largest difference {largest:.6g}", largest))
    result.sort(key=lambda d: -(float("inf") if d.largest is None else d.largest))
    return result + _others(a, b)


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _same(x: Tensor, y: Tensor) -> bool:
    return all(torch.equal(bits(p), bits(q)) for p, q in _pieces(x, y))


def _pieces(x: Tensor, y: Tensor) -> Any:
    return zip(x.detach().reshape(-1).split(CHUNK), y.detach().reshape(-1).split(CHUNK), strict=True)


def _largest(x: Tensor, y: Tensor) -> float:
    wide = torch.complex128 if x.is_complex() else torch.float64
    largest = 0.0
    for p, q in _pieces(x, y):
        p, q = (x.to(HOST.torch_device, wide) for x in (p, q))
        gap = torch.where((p == q) | (p.isnan() & q.isnan()), 0.0, (p - q).abs())
        if gap.numel():
            largest = max(largest, float(torch.nan_to_num(gap, nan=torch.inf, posinf=torch.inf).max()))
    return largest


def _others(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    return [
        Difference(name, f"{_text(x)} and {_text(y)}")
        for name, x, y in _pairs(_numbers(a), _numbers(b))
        if x is None or y is None or not equal(x, y)
    ]


def _pairs(left: dict[str, Any], right: dict[str, Any]) -> Any:
    for name in dict.fromkeys([*left, *right]):
        yield name, left.get(name), right.get(name)


def _text(x: Any) -> str:
    return "nothing" if x is None else f"{_kind(x) if isinstance(x, Tensor) else repr(x):.60}"


def _numbers(run: Checkpoint) -> dict[str, Any]:
    """What is no tensor, by name; nothing where a value is None."""
    found: dict[str, Any] = {"step": run.step} | {f"extra.{key}": x for key, x in run.extra.items()}
    if run.optimizer is not None:
        found["optimizer"] = run.optimizer.name or "unknown"
        for group in run.optimizer.groups:
            options = {k: x for k, x in group.items() if k not in ("params", *EXECUTION)}
            found |= {f"options.{name}.{key}": x for name in group["params"] for key, x in options.items()}
        for name, values in run.optimizer.state.items():
            found |= {f"state.{name}.{key}": x for key, x in values.items() if not isinstance(x, Tensor)}
    return {name: x for name, x in found.items() if x is not None}
