"""Muon on 24 equal matrices, and an evaluation of LBFGS over a million parameters, against torch.optim."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import OURS, TorchStep
from benchmarks.report import Figure, Row, Section, Target
from interop import optim

THEIRS = "torch.optim"


class LBFGSStep:
    """A step from a fresh start on a convex function that differs with each round; seconds for one evaluation."""

    def __init__(self, make: Any, n: int, line_search: str | None):
        self.make, self.line_search = make, line_search
        self.scale = torch.logspace(0, 3, n)
        self.p = torch.nn.Parameter(torch.zeros(n))
        self.optimizer = make([self.p], history_size=10, line_search_fn=line_search)

    def __call__(self, i: int) -> float:
        generator = torch.Generator().manual_seed(i)
        target = torch.randn(self.p.shape, generator=generator)
        evaluations = 0

        def closure() -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            self.optimizer.zero_grad()
            e = self.p - target
            value = (self.scale * e * e / 2 + (1 + e * e).sqrt()).mean()
            value.backward()
            return value

        start = time.perf_counter()
        self.optimizer.step(closure)
        return (time.perf_counter() - start) / evaluations


def run(short: bool) -> Section:
    """The evaluation's forward and backward are counted on both sides."""
    rows: list[Row] = []
    for size in (16,) if short else (128, 256, 768):
        shapes = [(size, size)] * 24
        grads = measure.gradients(shapes)
        variants = {
            name: TorchStep(module.Muon, shapes, grads) for name, module in ((OURS, optim), (THEIRS, torch.optim))
        }
        label = f"Muon, 24 of {size}x{size}"
        compared = measure.compare(*measure.interleave(label, variants, 0.1 if short else 8), (THEIRS,))
        rows.append({"what": label} | compared | {"flag": measure.flag(own=True)})
    n = 1000 if short else 1_000_000
    for line_search in (None, "strong_wolfe"):
        variants = {
            name: LBFGSStep(module.LBFGS, n, line_search) for name, module in ((OURS, optim), (THEIRS, torch.optim))
        }
        label = f"LBFGS, {n} parameters, line_search_fn={line_search}"
        compared = measure.compare(*measure.interleave(label, variants, 0.1 if short else 10), (THEIRS,))
        rows.append({"what": label} | compared | {"flag": "off"})
    series = {name: [r[f"{name}, ms"] for r in rows] for name in (OURS, THEIRS)}
    figure = Figure("Muon, a step; LBFGS, an evaluation", "ms (median)", [r["what"] for r in rows], series)
    targets = [
        Target(f"{r['what']}: torch.optim over ours", 3.0 if "Muon" in r["what"] else 1.0, r["best / ours"])
        for r in rows
    ]
    return Section("Muon and LBFGS", f"{__doc__}\n{run.__doc__}", {"Times": rows}, [figure], targets)
