"""From nothing to the first result: tracing, compiling and the first run, against the number of tensors of 16x16.

What is done once a process, whatever is compiled, is done before. torch.compile starts from an empty cache, in a
process of its own; a size is left out once a smaller one took more than 120 s.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from tqdm import tqdm

import jopt
from benchmarks import measure
from benchmarks.in_jax import JaxStep, arrays, optax_step, schedule
from benchmarks.measure import COMPILE, OURS, TorchStep
from benchmarks.report import Figure, Row, Section, Target
from interop import optim

SIZES, LIMIT = (10, 30, 100, 300, 1000), 120.0
CACHED = 30  # tensors, for the cache on disk


def loss(params: Any, x: jax.Array) -> jax.Array:
    """A network of that many layers."""
    return jnp.mean(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x) ** 2)


def packed_loss(params: Any, x: jax.Array) -> jax.Array:
    return loss(jopt.unpack(params), x)


def first_call(f: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(f)(*arguments))
    return time.perf_counter() - start


def of_jax(n: int) -> dict[str, float]:
    """Seconds of the first calls over n tensors."""
    ours, theirs = jopt.adamw(lr=schedule), optax.adamw(schedule)
    tree, grads = [arrays([(16, 16)] * n, scale) for scale in (0.02, 1e-3)]
    packed, packed_grads, x = jopt.pack(tree), jopt.pack(grads), jnp.ones((16, 16))

    def train(params: Any, state: Any, x: jax.Array) -> Any:
        value, grads = jax.value_and_grad(packed_loss)(params, x)
        return *ours.step(grads, state, params), value

    return {
        "jopt packed": JaxStep(ours.step, ours.init, packed, packed_grads, donates=False)(0),
        "jopt": JaxStep(ours.step, ours.init, tree, grads)(0),
        "optax": JaxStep(optax_step(theirs), theirs.init, arrays([(16, 16)] * n, 0.02), grads)(0),
        "loss and backward": first_call(jax.value_and_grad(loss), grads, x),
        "loss, backward and step through unpack": first_call(train, packed, ours.init(packed), x),
    }


def of_torch(make: Any, n: int, compiles: bool = False) -> float:
    """Seconds of the first step over n tensors, the moving of memory with it."""
    shapes = [(16, 16)] * n
    arguments = {"lr": torch.tensor(1e-3), "update": lambda o: measure.compiled(o.step)} if compiles else {}
    return TorchStep(make, shapes, measure.gradients(shapes), **arguments)(0)


def of_torch_compile(sizes: list[int]) -> list[float | None]:
    of_torch(torch.optim.AdamW, 2, compiles=True)
    found: list[float | None] = []
    for n in sizes:
        slow = bool(found) and (found[-1] is None or found[-1] > LIMIT)
        found.append(None if slow else of_torch(torch.optim.AdamW, n, compiles=True))
    return found


def with_cache(kind: str) -> float:
    """Seconds of the first call in a fresh process over `CACHED` tensors."""
    if kind == COMPILE:
        return of_torch(torch.optim.AdamW, CACHED, compiles=True)
    if kind == OURS:
        return of_torch(optim.AdamW, CACHED)
    tx, shapes = jopt.adamw(lr=schedule), [(16, 16)] * CACHED
    params, grads = (jopt.pack(arrays(shapes, scale)) for scale in (0.02, 1e-3))
    return JaxStep(tx.step, tx.init, params, grads)(0)


def run(short: bool) -> Section:
    sizes = (2, 4) if short else SIZES
    of_jax(3)
    of_torch(optim.AdamW, 3)
    rows: list[Row] = []
    for n in tqdm(sizes, desc="compile", leave=False, disable=None):
        rows.append({"tensors": n} | of_jax(n) | {OURS: of_torch(optim.AdamW, n)})
    if not short:
        with tempfile.TemporaryDirectory() as empty:
            for row, seconds in zip(
                rows, measure.in_own_process(of_torch_compile, sizes, TORCHINDUCTOR_CACHE_DIR=empty), strict=True
            ):
                row[COMPILE] = seconds
    cached: list[Row] = []
    for kind in ("jopt packed", OURS) if short else ("jopt packed", OURS, COMPILE):
        with tempfile.TemporaryDirectory() as cache:
            environment = {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "TORCHINDUCTOR_CACHE_DIR": cache,
            }
            first, second = (measure.in_own_process(with_cache, kind, **environment) for _ in range(2))
        cached.append({"what": kind, "first process, s": first, "second process, s": second})
    names = [name for name in rows[0] if name != "tensors"]
    figure = Figure("First call", "seconds", list(sizes), {name: [r.get(name) for r in rows] for name in names})
    many = rows[-1]
    train = "loss, backward and step through unpack"
    targets = [
        Target(f"{sizes[-1]} tensors, jopt packed, seconds", 1.0, many["jopt packed"], at_most=True),
        Target(
            f"{sizes[-1]} tensors, {train}, over loss and backward",
            2.0,
            many[train] / many["loss and backward"],
            at_most=True,
        ),
        *(
            Target(
                f"second process over the first, {r['what']}", 0.5, r["second process, s"] / r["first process, s"], True
            )
            for r in cached
            if r["what"] != COMPILE
        ),
    ]
    skipped = [str(r["tensors"]) for r in rows if not short and r[COMPILE] is None]
    note = f"\ntorch.compile was not tried with {' and '.join(skipped)} tensors." if skipped else ""
    tables = {"Seconds of the first call": rows, f"With a cache on disk, {CACHED} tensors": cached}
    return Section("Compiling", __doc__ + note, tables, [figure], targets)
