"""Muon's iteration by torch's products."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def orthogonalize(x: Tensor, a: float, b: float, c: float, eps: float, steps: int) -> Tensor:
    """`jopt.optimizers.muon.orthogonalize` for a matrix in bfloat16, or a batch of them."""
    rows, columns = x.shape[-2:]
    if rows > columns:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=eps)
    # torch adds up products of 16 rows or fewer in another order for a batch than for one matrix.
    if x.dim() == 3 and (len(x) == 1 or x.shape[1] <= 16):
        x = torch.stack([_iterate(matrix, a, b, c, steps) for matrix in x])
    else:
        x = _iterate(x, a, b, c, steps)
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
