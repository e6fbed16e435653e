"""A step in JAX: jopt on a tree and packed, and optax, each jitted with parameters and state donated.

All of them run in one process, with XLA's fusion of several outputs on (`jopt.enable_multi_output_fusion()`), and
evaluate a schedule of the learning rate. optax stands there twice: the last columns have it as most run it today,
without donation and without the flag, in a process of its own; its ratio is corrected by a three-pass add that is
measured in both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jopt
from benchmarks import measure
from benchmarks.measure import Add
from benchmarks.report import Figure, Row, Section, Target
from benchmarks.shapes import MODELS, Shapes

OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "AdamW": (jopt.adamw, lambda lr: optax.adamw(lr, weight_decay=1e-2)),
    "Adam": (jopt.adam, optax.adam),
    "SGD": (lambda lr: jopt.sgd(lr, momentum=0.9), lambda lr: optax.sgd(lr, momentum=0.9)),
    "RMSprop": (jopt.rmsprop, lambda lr: optax.rmsprop(lr, decay=0.99, eps_in_sqrt=False)),
    "Adagrad": (jopt.adagrad, optax.adagrad),
    "Adadelta": (jopt.adadelta, optax.adadelta),
    "Adamax": (jopt.adamax, optax.adamax),
    "NAdam": (jopt.nadam, optax.nadam),
    "RAdam": (jopt.radam, optax.radam),
}
SECONDS = {"resnet50": 4, "gpt2_small": 8, "tiny": 0.1}
TREE, PACKED, OPTAX = "jopt", "jopt packed", "optax"


def schedule(step: Any) -> Any:
    return 1e-3 * 0.999**step


class JaxStep:
    """A jitted step over arrays of its own."""

    def __init__(
        self, step: Callable[..., Any], init: Callable[..., Any], params: Any, grads: Any, donates: bool = True
    ):
        self.params, self.state, self.grads = params, init(params), grads
        # Donated arguments come in the order of the results, or XLA copies them.
        self.step = jax.jit(
            lambda params, state, grads: step(grads, state, params), donate_argnums=(0, 1) if donates else ()
        )

    def __call__(self, i: int) -> float:
        start = time.perf_counter()
        self.params, self.state = self.step(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


def optax_step(tx: Any) -> Callable[..., Any]:
    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def arrays(shapes: Shapes, scale: float) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(scale * rng.standard_normal(s, np.float32)) for s in shapes]


def as_most_run_it(model: str, names: list[str], seconds: float) -> dict[str, Any]:
    """optax without donation or flag: medians in milliseconds, and that of the add."""
    shapes = MODELS[model]()
    grads = arrays(shapes, 1e-3)
    add = Add(2**25)
    found: dict[str, Any] = {"flag": measure.flag(own=False)}
    for name in names:
        tx = OPTIMIZERS[name][1](schedule)
        variants = {OPTAX: JaxStep(optax_step(tx), tx.init, arrays(shapes, 0.02), grads, donates=False), "add": add}
        _, times = measure.interleave(f"{name}, {model}, as most run it", variants, seconds)
        found[name] = {variant: 1e3 * float(np.median(x)) for variant, x in times.items()}
    return found


def run(short: bool) -> Section:
    rows: list[Row] = []
    for model in ("tiny",) if short else ("resnet50", "gpt2_small"):
        names = ["AdamW", "RMSprop"] if short else list(OPTIMIZERS)
        if model == "gpt2_small":
            names = ["AdamW", "SGD", "RMSprop"]
        shapes, seconds = MODELS[model](), SECONDS[model]
        today = measure.in_own_process(as_most_run_it, model, names, seconds / 2, XLA_FLAGS=None)
        grads = arrays(shapes, 1e-3)
        packed_grads = jopt.pack(grads)
        n, add = sum(math.prod(s) for s in shapes), Add(2**25)
        for name in names:
            ours, theirs = (make(schedule) for make in OPTIMIZERS[name])
            variants = {
                PACKED: JaxStep(ours.step, ours.init, jopt.pack(arrays(shapes, 0.02)), packed_grads),
                TREE: JaxStep(ours.step, ours.init, arrays(shapes, 0.02), grads),
                OPTAX: JaxStep(optax_step(theirs), theirs.init, arrays(shapes, 0.02), grads),
            }
            slots = sum(x.size for x in jax.tree.leaves(variants[PACKED].state) if x.ndim and x.size >= n) / n
            first, times = measure.interleave(f"{name}, {model}, in JAX", {**variants, "add": add}, seconds)
            adds = times.pop("add")[:, 0]
            floor = (3 + 2 * slots) * add.seconds_a_pass(adds, n)
            compared, here = measure.compare(first, times, (OPTAX,)), 1e3 * float(np.median(adds))
            detail = compared.pop("detail")
            rows.append(
                {"optimizer": name, "shapes": model}
                | {f"{v}, ms": compared[f"{v}, ms"] for v in variants}
                | {
                    "optax / packed": compared["best / ours"],
                    "optax / jopt": measure.ratio(times[OPTAX], times[TREE]),
                    "packed, share of floor": float(np.median(floor / times[PACKED][:, 0])),
                    "first call packed, ms": 1e3 * first[PACKED],
                    "jopt, ms first": 1e3 * first[TREE],
                    "optax, ms first": 1e3 * first[OPTAX],
                    "flag": measure.flag(own=False),
                    "optax as most run it, ms": today[name][OPTAX],
                    "its flag": today["flag"],
                    "as most run it / packed": today[name][OPTAX]
                    / compared[f"{PACKED}, ms"]
                    * here
                    / today[name]["add"],
                    "add here, ms": here,
                    "add there, ms": today[name]["add"],
                    "detail": detail,
                }
            )
            del variants
    labels = [f"{r['optimizer']}, {r['shapes']}" for r in rows]
    columns = (PACKED, TREE, OPTAX, "optax as most run it")
    figure = Figure("One step in JAX", "ms (median)", labels, {c: [r[f"{c}, ms"] for r in rows] for c in columns})
    targets = []
    for model in dict.fromkeys(r["shapes"] for r in rows):
        for column, target in (("optax / packed", 1.1), ("optax / jopt", 1.1), ("as most run it / packed", 1.5)):
            worst = min((r for r in rows if r["shapes"] == model), key=lambda r: r[column])
            targets.append(Target(f"{model}: {column}, the worst ({worst['optimizer']})", target, worst[column]))
    return Section("A step in JAX", __doc__, {"One step": rows}, [figure], targets)
