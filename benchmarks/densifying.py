"""A point cloud that densifies, as Gaussian splatting's: rows appended and removed, the state edited, 60 times."""

from __future__ import annotations

import time
from typing import Any

import jax.monitoring
import numpy as np
import torch

from benchmarks import measure
from benchmarks.measure import OURS
from benchmarks.report import Row

WIDTHS = {"means": 3, "scales": 3, "rotations": 4, "opacities": 1, "colours": 48}
STEPS = 10  # between two changes


class Cloud:
    """Points with an optimizer of five groups; seconds of the steps after a change."""

    def __init__(self, make: Any, points: int, **choice: Any):
        self.random = torch.Generator().manual_seed(0)
        groups = [
            {"params": [torch.nn.Parameter(torch.randn(points, width, generator=self.random))], "name": name, "lr": lr}
            for (name, width), lr in zip(WIDTHS.items(), (1.6e-4, 5e-3, 1e-3, 5e-2, 2.5e-3), strict=True)
        ]
        self.optimizer = make(groups, **choice)
        self._steps()

    def __call__(self, i: int) -> float:
        points = self.optimizer.param_groups[0]["params"][0].shape[0]
        keep = torch.rand(points, generator=self.random) > 0.02
        chosen = torch.randint(points, (int(0.06 * points),), generator=self.random)
        for group in self.optimizer.param_groups:
            [old] = group["params"]
            state = self.optimizer.state.pop(old)
            new = torch.nn.Parameter(torch.cat([old.detach()[keep], old.detach()[chosen]]))
            zeros = torch.zeros(len(chosen), old.shape[1])
            self.optimizer.state[new] = {k: torch.cat([x[keep], zeros]) if x.dim() else x for k, x in state.items()}
            group["params"] = [new]
        return self._steps()

    def _steps(self) -> float:
        seconds = 0.0
        for _ in range(STEPS):
            for group in self.optimizer.param_groups:
                [p] = group["params"]
                p.grad = torch.randn(p.shape, generator=self.random)
            start = time.perf_counter()
            self.optimizer.step()
            seconds += time.perf_counter() - start
        return seconds


def clouds(short: bool) -> list[Row]:
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    rows: list[Row] = []
    changes = 3 if short else 60
    for points in (1_000, 20_000):
        variants = {
            path: Cloud(make, points, **choice)
            for path, (make, choice) in measure.paths("AdamW").items()
            if path != "foreach"
        }
        before = len(compiled)
        times: dict[str, list[float]] = {path: [] for path in variants}
        for i in range(changes):
            for path, cloud in variants.items():
                times[path].append(cloud(i))
        row: Row = {"points, at first": points, "changes": changes, "steps between": STEPS}
        row |= {f"{path}, ms a step": 1e3 * float(np.mean(x)) / STEPS for path, x in times.items()}
        for path in ("default", "fused"):
            row[f"ours beyond {path}, ms a change"] = 1e3 * float(np.mean(times[OURS]) - np.mean(times[path]))
        row["compilations"] = len(compiled) - before
        rows.append(row)
    return rows
