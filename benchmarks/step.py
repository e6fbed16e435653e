"""Time one optimizer step: the torch drop-in against torch, and jopt against optax in JAX.

    python -m benchmarks.step --out benchmarks/results

Every variant steps parameters of its own with the same shapes, once a round, in turn, in one process: a ratio then
holds when the machine's speed drifts. The figure is the median of a round's ratio. Gradients are fresh tensors, as
backward leaves them after zero_grad(set_to_none=True); the learning rate changes every step; what a user pays is
counted, making the gradients is not. The time of the first call (compilation, moving the parameters) stands apart.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from tqdm import tqdm

import jopt
from benchmarks.shapes import MODELS
from interop import optim

TORCH = {
    "AdamW": dict(lr=1e-3),
    "Adam": dict(lr=1e-3),
    "SGD": dict(lr=1e-2, momentum=0.9),
    "RMSprop": dict(lr=1e-3),
}
JAX: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "AdamW": (jopt.adamw, lambda lr: optax.adamw(lr, weight_decay=1e-2)),
    "Adam": (jopt.adam, optax.adam),
    "SGD": (lambda lr: jopt.sgd(lr, momentum=0.9), lambda lr: optax.sgd(lr, momentum=0.9)),
    "RMSprop": (jopt.rmsprop, lambda lr: optax.rmsprop(lr, decay=0.99, eps_in_sqrt=False)),
}


class TorchVariant:
    """A torch optimizer over tensors of these shapes."""

    def __init__(self, make: Callable[..., Any], shapes: list[tuple[int, ...]], **arguments: Any):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in shapes]
        self.optimizer = make(self.params, **arguments)

    def run(self, i: int, grads: list[torch.Tensor]) -> float:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.clone()
        self.optimizer.param_groups[0]["lr"] = 1e-3 * (1 + 0.01 * i)
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


class JaxVariant:
    """A jitted step over arrays of these shapes, parameters and state donated."""

    def __init__(self, step: Callable[..., Any], init: Callable[..., Any], params: Any):
        self.params, self.state = params, init(params)
        # Donated arguments come in the order of the results, or XLA copies them.
        self.step = jax.jit(lambda params, state, grads: step(grads, state, params), donate_argnums=(0, 1))

    def run(self, i: int, grads: Any) -> float:
        start = time.perf_counter()
        self.params, self.state = self.step(self.params, self.state, grads)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


def torch_variants(name: str, shapes: list[tuple[int, ...]]) -> dict[str, TorchVariant]:
    arguments = TORCH[name]
    native = getattr(torch.optim, name)
    variants = {
        "interop.optim": TorchVariant(getattr(optim, name), shapes, **arguments),
        "torch default": TorchVariant(native, shapes, **arguments),
        "torch foreach": TorchVariant(native, shapes, foreach=True, **arguments),
    }
    if name != "RMSprop":  # has no fused path
        variants["torch fused"] = TorchVariant(native, shapes, fused=True, **arguments)
    return variants


def jax_variants(name: str, shapes: list[tuple[int, ...]]) -> dict[str, JaxVariant]:
    def fresh() -> list[jax.Array]:
        rng = np.random.default_rng(0)
        return [jnp.asarray(0.02 * rng.standard_normal(s, np.float32)) for s in shapes]

    ours, theirs = (make(1e-3) for make in JAX[name])

    def optax_step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return {
        "jopt": JaxVariant(ours.step, ours.init, fresh()),
        "jopt packed": JaxVariant(ours.step, ours.init, jopt.pack(fresh())),
        "optax": JaxVariant(optax_step, theirs.init, fresh()),
    }


def measure(label: str, variants: dict[str, Any], grads: Callable[[str, int], Any], rounds: int) -> dict[str, Any]:
    first = {name: variant.run(0, grads(name, 0)) for name, variant in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for i in tqdm(range(rounds), desc=label, leave=False):
        order = order[1:] + order[:1]  # nobody always follows the same one
        for name in order:
            times[name].append(variants[name].run(i, grads(name, i)))
    ours = times[next(iter(variants))]
    return {
        name: {
            "first_call_ms": 1e3 * first[name],
            "median_ms": 1e3 * statistics.median(ts),
            "min_ms": 1e3 * min(ts),
            "times_ours": statistics.median(t / o for t, o in zip(ts, ours, strict=True)),
        }
        for name, ts in times.items()
    }


def machine() -> dict[str, Any]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    versions = {m.__name__: m.__version__ for m in (torch, jax, optax, np, jopt)}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        **versions,
    }


def run(models: list[str], optimizers: list[str], rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": machine(), "torch": {}, "jax": {}}
    for model in models:
        shapes = MODELS[model]()
        generator = torch.Generator().manual_seed(1)
        torch_grads = [torch.randn(s, generator=generator) * 1e-3 for s in shapes]
        jax_grads: Any = [jnp.asarray(g.numpy()) for g in torch_grads]
        packed = jopt.pack(jax_grads)
        for name in optimizers:
            label = f"{name}, {model}"
            results["torch"][label] = measure(
                label, torch_variants(name, shapes), lambda _, i, g=torch_grads: g, rounds
            )
            gc.collect()
            results["jax"][label] = measure(
                label + " (JAX)",
                jax_variants(name, shapes),
                lambda variant, _, a=jax_grads, b=packed: b if variant == "jopt packed" else a,
                rounds,
            )
            gc.collect()
    return results


def table(results: dict[str, Any]) -> str:
    lines = ["# One optimizer step on the CPU", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items() if value != ""]
    lines += [
        "",
        "Medians; `x` is the median over rounds of a variant's time over the first one's, so that above 1 the",
    ]
    lines += ["first is faster. First calls include compilation.", ""]
    for world in ("torch", "jax"):
        for label, variants in results[world].items():
            lines += [
                f"## {label}" + (", in JAX" if world == "jax" else ""),
                "",
                "| variant | ms a step | x | first call, ms |",
                "|---|---:|---:|---:|",
            ]
            lines += [
                f"| {name} | {v['median_ms']:.2f} | {v['times_ours']:.2f} | {v['first_call_ms']:.0f} |"
                for name, v in variants.items()
            ]
            lines += [""]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    titles = ("PyTorch models: interop.optim and torch.optim", "JAX: jopt and optax, jitted, donated")
    for axis, world, title in zip(axes, ("torch", "jax"), titles, strict=True):
        labels = list(results[world])
        names = list(dict.fromkeys(n for variants in results[world].values() for n in variants))
        width = 0.8 / len(names)
        for k, name in enumerate(names):
            xs = [
                i + (k - (len(names) - 1) / 2) * width
                for i, label in enumerate(labels)
                if name in results[world][label]
            ]
            ys = [results[world][label][name]["median_ms"] for label in labels if name in results[world][label]]
            axis.bar(xs, ys, width, label=name)
        axis.set_xticks(range(len(labels)), [x.replace(", ", "\n") for x in labels], fontsize=8)
        axis.set_yscale("log")
        axis.set_ylabel("ms a step (median)")
        axis.set_title(title)
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", default=list(TORCH), choices=list(TORCH))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="folder for step.json, step.md and step.png")
    arguments = parser.parse_args()
    results = run(arguments.models, arguments.optimizers, arguments.rounds)
    print(table(results))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "step.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "step.md").write_text(table(results))
        plot(results, arguments.out / "step.png")


if __name__ == "__main__":
    main()
