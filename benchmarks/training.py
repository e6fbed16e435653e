"""Forward, backward and step of a real model with AdamW, and the step alone right after the backward."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import measure
from benchmarks.measure import COMPILE, OURS, PATHS
from benchmarks.models import MODELS
from benchmarks.report import Figure, Section, Target


class Training:
    """A copy of the model with an optimizer of its own."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, make: Any, compiles: bool, **arguments: Any):
        self.model, self.x, self.y = copy.deepcopy(model), x, y
        self.optimizer = make(self.model.parameters(), **arguments)
        self.step: Callable[[], Any] = measure.compiled(self.optimizer.step) if compiles else self.optimizer.step

    def __call__(self, i: int) -> tuple[float, float]:
        measure.set_lr(self.optimizer, 1e-4 * (1 + 0.01 * (i % 10)))
        start = time.perf_counter()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(self.x), self.y).backward()
        middle = time.perf_counter()
        self.step()
        end = time.perf_counter()
        return end - start, end - middle


def run(short: bool) -> Section:
    """All of torch's paths. OpenMP's threads still spin when the step begins."""
    whole, alone = [], []
    for label, make_model in MODELS.items():
        torch.manual_seed(0)
        model, x, y = make_model(short)
        variants = {
            path: Training(model, x, y, make, False, **choice)
            for path, (make, choice) in measure.paths("AdamW").items()
        }
        if not short:
            lr = torch.tensor(1e-4)
            variants[COMPILE] = Training(model, x, y, torch.optim.AdamW, True, lr=lr)
        first, times = measure.interleave(label, variants, 0.1 if short else 20)
        for column, rows in enumerate((whole, alone)):
            compared = measure.compare(first, times, PATHS, column)
            rows.append({"model": label} | compared | {"flag": measure.flag(own=True)})
    names = [f"{name}, ms" for name in (OURS, *PATHS, COMPILE) if f"{name}, ms" in whole[0]]
    figures = [
        Figure(
            title,
            "ms (median)",
            [r["model"] for r in rows],
            {n.removesuffix(", ms"): [r[n] for r in rows] for n in names},
        )
        for title, rows in (("Forward, backward and step", whole), ("The step alone", alone))
    ]
    targets = [
        Target(f"{r['model']}, {what}: torch's best over ours", 0.9, r["best / ours"])
        for what, rows in (("trained", whole), ("step alone", alone))
        for r in rows
    ]
    tables = {"Forward, backward and step": whole, "The step alone, right after the backward": alone}
    return Section("Training", __doc__ + "\n" + (run.__doc__ or ""), tables, figures, targets)
