"""Today's optimizers against their authors' packages and heavyball (torch.compile): milliseconds of a step on the CPU.

python -m benchmarks.today [NAME ...]

The authors' code of `tests/authors.py`, and `heavyball==3.2.1`, are measured where they are on PYTHONPATH. In turn, in
one process, on two threads; medians. Writes benchmarks/results/today.md.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jopt
from benchmarks import measure, shapes
from benchmarks.measure import OURS, TorchStep
from benchmarks.report import Row, table, wrapped
from interop import optim
from tests import ROOT
from tests.authors import REFERENCES, authors_class

LIMITS = """## What limits them

Arrays of the model's size that a step reads and writes, each once: Lion 5 (gradient; parameter and momentum, both
ways), ADOPT and schedule-free AdamW 7, AdEMAMix 9, Adan 11, Prodigy 16 (5 of them for its two sums, before the update).
For ResNet-50 an array is 102 MB. `torch._foreach_add_` on such arrays, which reads two and writes one, moves 74 GB/s
on the machine of the table.

- Lion, Adan, AdEMAMix, ADOPT and schedule-free AdamW in PyTorch move 51 to 65 GB/s: less time needs fewer bytes.
  The authors of ADOPT and schedule-free need 2.3 times ours because their loops, too, are few operations.
- Prodigy moves 45 GB/s. The authors' loop reads as often: its sums are torch's dot products. The sums come first, for
  the update needs the new estimate of d.
- LAMB and cautious AdamW sum what has roots and quotients before they can step (a norm, the share of signs). XLA on CPU
  does not vectorize such a loop, so a few terms at a time are computed, then added, by one thread a tensor.
  Then the update is computed again, in place.
- Lion in JAX is one loop in optax too, over the same 5 arrays: there is nothing to gain.
- SOAP: some 70 GFLOP of products a step. XLA's products are Eigen's, torch's are MKL's.
"""
AUTHORS, HEAVYBALL, IN_JAX, OPTAX = "authors", "heavyball", "jopt", "optax"
# Our class, heavyball's and its arguments.
ELEMENTWISE: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "lion": ("Lion", None, {}),
    "adan": ("Adan", None, {}),
    "ademamix": ("AdEMAMix", "AdEMAMix", {}),
    "adopt": ("ADOPT", "ADOPT", {}),
    "lamb": ("LAMB", None, {}),
    "schedule_free_adamw": ("AdamWScheduleFree", "SFAdamW", {}),
    "prodigy": ("Prodigy", None, {}),
    "cautious_adamw": ("CautiousAdamW", "AdamW", dict(caution=True)),
}
# Sides of at most 1024 elements have matrices, refreshed every 10th step.
EVERY, SIDE = 10, 1024
# Our class and its arguments, which are the authors' too; heavyball's, and what it needs beside them.
MATRICES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "soap": ("SOAP", dict(precondition_frequency=EVERY, max_precond_dim=SIDE), "SOAP", dict(merge_dims=False)),
    "kron": ("Kron", dict(preconditioner_update_probability=1 / EVERY, max_size_triangular=SIDE), "PSGDKron", {}),
}
OPTAXS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "lion": (jopt.lion, optax.lion),
    "adan": (jopt.adan, optax.adan),
    "ademamix": (jopt.ademamix, optax.contrib.ademamix),
    "adopt": (jopt.adopt, optax.contrib.adopt),
    "lamb": (jopt.lamb, optax.lamb),
    "lars": (jopt.lars, optax.lars),
    "prodigy": (jopt.prodigy, optax.contrib.prodigy),
    "schedule_free_adamw": (jopt.schedule_free_adamw, optax.contrib.schedule_free_adamw),
}


class Several:
    """The mean of several steps: of those that refresh and those that do not."""

    def __init__(self, step: TorchStep, n: int):
        self.step, self.n = step, n

    def __call__(self, i: int) -> float:
        return sum(self.step(i * self.n + k) for k in range(self.n)) / self.n


def stepped(make: Any, model: Any, grads: Any, several: int, **arguments: Any) -> Any:
    step = TorchStep(make, model, grads, **arguments)
    if hasattr(step.optimizer, "train"):
        step.optimizer.train()
    return Several(step, several) if several > 1 else step


def in_torch(name: str, model: Any, seconds: float) -> Row:
    grads, several = measure.gradients(model), 1
    reference = REFERENCES[name]
    if name in ELEMENTWISE:
        ours, heavy, heavy_arguments = ELEMENTWISE[name]
        own: dict[str, Any] = {}
        theirs = {reference.renamed.get(key, key): True for key in reference.renamed} | reference.others
    else:
        ours, own, heavy, beside = MATRICES[name]
        theirs, heavy_arguments = own, own | beside
        several = EVERY
    lr = 1.0 if name == "prodigy" else 1e-4
    variants = {OURS: stepped(getattr(optim, ours), model, grads, several, lr=lr, **own)}
    with contextlib.suppress(ModuleNotFoundError, AssertionError):
        cls = authors_class(reference, edited=False)
        variants[AUTHORS] = stepped(cls, model, grads, several, lr=lr, **theirs)
    if heavy:
        with contextlib.suppress(ModuleNotFoundError):
            heavyball = importlib.import_module("heavyball")
            heavyball.utils.compile_mode = "default"  # the others try every product for minutes
            cls = getattr(heavyball, heavy)
            variants[HEAVYBALL] = stepped(cls, model, grads, several, lr=lr, **heavy_arguments)
    with contextlib.redirect_stdout(io.StringIO()):  # kron_torch prints
        _, times = measure.interleave(name, variants, seconds)
    milliseconds = {f"{key}, ms": 1e3 * float(np.median(x)) for key, x in times.items()}
    rest = {f"{key} / ours": measure.ratio(x[:, 0], times[OURS][:, 0]) for key, x in times.items() if key != OURS}
    return {"optimizer": name, **milliseconds, **rest}


def in_jax(name: str, model: Any, seconds: float) -> Row:
    def variant(make: Callable[..., Any]) -> Callable[[int], float]:
        tx = make() if name == "prodigy" else make(1e-4)
        params = [0.02 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(model)]
        grads = [jnp.asarray(g.numpy()) for g in measure.gradients(model)]

        def step(grads: Any, state: Any, params: Any) -> Any:
            if hasattr(tx, "step"):
                return tx.step(grads, state, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        update = jax.jit(step, donate_argnums=(1, 2))
        held = [params, jax.tree.map(jnp.array, jax.jit(tx.init)(params))]

        def run(i: int) -> float:
            start = time.perf_counter()
            held[:] = jax.block_until_ready(update(grads, held[1], held[0]))
            return time.perf_counter() - start

        return run

    ours, theirs = OPTAXS[name]
    _, times = measure.interleave(name, {IN_JAX: variant(ours), OPTAX: variant(theirs)}, seconds)
    milliseconds = {f"{key}, ms": 1e3 * float(np.median(x)) for key, x in times.items()}
    return {"optimizer": name, **milliseconds, "optax / jopt": measure.ratio(times[OPTAX][:, 0], times[IN_JAX][:, 0])}


def main(names: list[str]) -> None:
    measure.prepare()
    jopt.enable_multi_output_fusion()
    blocks = shapes.gpt2_small()[2:26]  # two of the twelve
    jobs = [
        ("In PyTorch, ResNet-50 (25.6 M parameters)", in_torch, shapes.resnet50(), ELEMENTWISE),
        (
            "In PyTorch, two blocks of GPT-2 small (14.2 M), mean of ten steps, of which one refreshes",
            in_torch,
            blocks,
            MATRICES,
        ),
        ("In JAX, ResNet-50", in_jax, shapes.resnet50(), OPTAXS),
    ]
    lines = ["# Today's optimizers", "", "`python -m benchmarks.today`; milliseconds of a step, medians in turn.", ""]
    lines += [f"- {key}: {x}" for key, x in measure.machine().items()] + [""]
    for title, run, model, table_of in jobs:
        rows = [run(name, model, 8.0) for name in table_of if not names or name in names]
        lines += [f"## {title}", "", *table(rows), ""]
        print("\n".join(lines[-len(rows) - 5 :]), flush=True)
    if not names:
        (ROOT / "benchmarks" / "results" / "today.md").write_text(wrapped("\n".join([*lines, LIMITS])))


if __name__ == "__main__":
    main(sys.argv[1:])
