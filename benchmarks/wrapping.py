"""Transformations of optax over torch's parameters (`interop.wrap`), on 24 matrices of 768 x 768 and 48 vectors.

`over floor` is a step's time over that of the passes over memory that its mathematics needs, at the speed of a
three-pass add measured in the same rounds: each of gradient, parameter and state is read once, parameter and state are
written, and a norm reads the gradients once more. `optax in JAX` is the same update under `jax.jit` with parameters and
state donated, over JAX's own arrays and with XLA as it comes. `AdamW of interop.optim` is the drop-in."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import numpy as np
import optax
import torch
from optax import contrib

import interop
from benchmarks import measure
from benchmarks.measure import OURS, Add, TorchStep
from benchmarks.report import Figure, Row, Section, Target
from interop import optim

IN_JAX = "optax in JAX"
# The transformation, and the passes that it needs.
TRANSFORMATIONS = {
    "lion": (lambda: optax.lion(1e-4), 5),
    "adam": (lambda: optax.adam(1e-3), 7),
    "clip_by_global_norm, adamw": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 8),
    "schedule_free of sgd": (lambda: contrib.schedule_free(optax.sgd(1e-3), 1e-3, b1=0.9), 5),
    "schedule_free_adamw": (lambda: contrib.schedule_free_adamw(1e-3), 7),
}


class WrappedStep:
    """Gradients are fresh tensors at every step, which is not counted."""

    def __init__(self, tx: Any, shapes: list[tuple[int, ...]], grads: list[torch.Tensor]):
        self.params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
        self.grads = grads
        self.optimizer = interop.wrap(tx, self.params)

    def __call__(self, i: int) -> float:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g.clone()
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


class JaxStep:
    def __init__(self, tx: Any, shapes: list[tuple[int, ...]], grads: list[torch.Tensor]):
        self.params = {f"param_{i}": jax.numpy.zeros(s) for i, s in enumerate(shapes)}
        self.grads = {f"param_{i}": interop.to_jax(g) for i, g in enumerate(grads)}
        self.state = tx.init(self.params)

        def step(state: Any, params: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return state, optax.apply_updates(params, updates)

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self, i: int) -> float:
        start = time.perf_counter()
        self.state, self.params = jax.block_until_ready(self.step(self.state, self.params, self.grads))
        return time.perf_counter() - start


def run(short: bool) -> Section:
    size = 32 if short else 768
    shapes: list[tuple[int, ...]] = [(size, size)] * 24 + [(size,)] * 48
    grads, n = measure.gradients(shapes), sum(map(math.prod, shapes))
    rows: list[Row] = []
    for name, (make, passes) in TRANSFORMATIONS.items():
        variants: dict[str, Any] = {OURS: WrappedStep(make(), shapes, grads), IN_JAX: JaxStep(make(), shapes, grads)}
        add = variants["add"] = Add(n)
        if name == "adam":
            variants["AdamW of interop.optim"] = TorchStep(optim.AdamW, shapes, grads)
        first, times = measure.interleave(f"wrap({name})", variants, 0.1 if short else 10)
        floor = passes * add.seconds_a_pass(times.pop("add")[:, 0], n)
        row: Row = {"transformation": name} | {f"{k}, ms": 1e3 * float(np.median(x)) for k, x in times.items()}
        row |= {"passes": passes, "over floor": measure.ratio(times[OURS][:, 0], floor)}
        row |= {f"{IN_JAX} / ours": measure.ratio(times[IN_JAX][:, 0], times[OURS][:, 0]), "first call, s": first[OURS]}
        rows.append(row)
    targets = [Target(f"{row['transformation']}: over floor", 1.2, row["over floor"], True) for row in rows]
    series = {key: [row[f"{key}, ms"] for row in rows] for key in (OURS, IN_JAX)}
    figure = Figure("A step of interop.wrap", "ms (median)", list(TRANSFORMATIONS), series)
    return Section("Wrapped transformations", __doc__ or "", {"Steps": rows}, [figure], targets)
