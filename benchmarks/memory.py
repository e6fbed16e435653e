"""Memory of an AdamW step of 64 M parameters, in percent of parameters, gradients and state together.

`a step's peak` is how far the resident memory rises within the third step; `in all` is the highest resident memory
during it over what the process had before the model, less the tensors: what lasts is in it too, and in MB, for much of
that is the same for any model. `first step` is the same of the first step, which makes the state. Each path has a
process of its own. For JAX it is what XLA says of the compiled step: its temporary memory and the results that take no
argument's place.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import jopt
from benchmarks import measure
from benchmarks.in_jax import optax_step
from benchmarks.measure import OURS, TorchStep
from benchmarks.report import Figure, Row, Section, Target
from benchmarks.shapes import Shapes

MODELS = {"16 tensors of 2000x2000": ((2000, 2000), 16), "2000 tensors of 125x256": ((125, 256), 2000)}
SHORT = {"16 tensors of 100x100": ((100, 100), 16)}
SLOTS = 4  # parameter, gradient, and AdamW's two of state


def resident(name: str) -> int:
    """VmRSS, the resident memory, or VmHWM, its highest since it was reset: in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def of_torch(path: str, shape: list[int], count: int) -> dict[str, float]:
    make, choice = measure.paths("AdamW")[path]
    TorchStep(make, [(8, 8)], measure.gradients([(8, 8)]), **choice)(0)  # starts JAX, and torch's threads
    start = resident("VmRSS")
    shapes: Shapes = [tuple(shape)] * count
    step = TorchStep(make, shapes, measure.gradients(shapes), **choice)
    for p, g in zip(step.params, step.grads, strict=True):
        p.grad = g
    _, first = before_and_peak(step.update)
    step.update()
    before, peak = before_and_peak(step.update)
    whole = SLOTS * 4 * count * math.prod(shape)
    return {
        "a step's peak, %": 100 * (peak - before) / whole,
        "in all, %": 100 * ((peak - start) / whole - 1),
        "in all, MB": (peak - start - whole) / 1e6,
        "first step, %": 100 * ((first - start) / whole - 1),
    }


def before_and_peak(f: Callable[[], Any]) -> tuple[int, int]:
    ctypes.CDLL(None).malloc_trim(0)  # or f uses what others freed and malloc kept
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    f()
    return before, resident("VmHWM")


def of_jax(shape: tuple[int, ...], count: int) -> list[Row]:
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
    packed = jax.eval_shape(jopt.pack, tree)
    ours, theirs = jopt.adamw(), optax.adamw(1e-3)
    rows = []
    for name, tx, step, params in (
        ("jopt packed", ours, ours.step, packed),
        ("jopt", ours, ours.step, tree),
        ("optax", theirs, optax_step(theirs), tree),
    ):

        def train(params: Any, state: Any, grads: Any, step: Any = step) -> Any:
            return step(grads, state, params)

        lowered = jax.jit(train, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params)
        memory = lowered.compile().memory_analysis()
        extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        rows.append({"variant": name, "extra, %": 100 * extra / (SLOTS * 4 * count * math.prod(shape))})
    return rows


def run(short: bool) -> Section:
    rows: list[Row] = []
    in_jax: list[Row] = []
    paths = (OURS, "fused") if short else (OURS, "default", "foreach", "fused")
    models = SHORT if short else MODELS
    with tqdm(total=len(models) * (len(paths) + 1), desc="memory", leave=False, disable=None) as bar:
        for label, (shape, count) in models.items():
            for path in paths:
                rows.append({"model": label, "path": path} | measure.in_own_process(of_torch, path, shape, count))
                bar.update()
            if count <= 16:  # of more tensors XLA compiles a tree for minutes
                in_jax += [{"model": label} | row | {"flag": measure.flag(own=False)} for row in of_jax(shape, count)]
            bar.update()
    columns = ("a step's peak, %", "in all, %", "first step, %")
    labels = [f"{r['path']}, {r['model']}" for r in rows]
    figure = Figure("AdamW", "% of tensors", labels, {c: [max(r[c], 0.01) for r in rows] for c in columns})
    targets = [
        *(
            Target(f"{OURS}, {r['model']}: {c}", 2.0, r[c], at_most=True)
            for r in rows
            if r["path"] == OURS
            for c in columns[:2]
        ),
        *(
            Target(f"{r['variant']} in JAX, {r['model']}: extra, %", 2.0, r["extra, %"], at_most=True)
            for r in in_jax
            if r["variant"] != "optax"
        ),
    ]
    return Section("Memory", __doc__, {"Drop-in and torch": rows, "In JAX": in_jax}, [figure], targets)
