"""Muon's iteration by torch's products."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def orthogonalize(x: Tensor, a: float, b: float, c: float, eps: float, steps: int, fused: bool) -> Tensor:
    """`jopt.optimizers.muon.orthogonalize` for a matrix in bfloat16, or a batch of them."""
    rows, columns = x.shape[-2:]
    if rows > columns:
        x = x.mT
    length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / (length.clamp_(min=eps) if fused else length.add_(eps))
    iterate = functools.partial(_iterate if fused else _iterate_rounding, a=a, b=b, c=c, steps=steps)
    # torch adds up products of 16 rows or fewer in another order for a batch than for one matrix.
    each = x.dim() == 3 and (len(x) == 1 or x.shape[1] <= 16)
    x = torch.stack(list(map(iterate, x))) if each else iterate(x)
    return (x.mT if rows > columns else x).contiguous()


def _iterate(x: Tensor, a: float, b: float, c: float, steps: int) -> Tensor:
    addmm = torch.addmm if x.dim() == 2 else torch.baddbmm
    gram, polynomial = (x.new_empty(*x.shape[:-1], x.shape[-2]) for _ in range(2))
    results = itertools.cycle(x.new_empty(x.shape) for _ in range(2))  # not x: it may be a transpose
    for _ in range(steps):
        torch.matmul(x, x.mT, out=gram)
        addmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        x = addmm(x, polynomial, x, beta=a, out=next(results))
    return x


def _iterate_rounding(x: Tensor, a: float, b: float, c: float, steps: int) -> Tensor:
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
