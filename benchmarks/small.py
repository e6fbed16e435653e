"""Small models: steps, whole iterations, first steps and imports, against torch.optim.

Steps have fresh gradients and a learning rate that changes, which are not counted. An iteration is zero_grad, forward,
backward and step, as a training loop has it; each figure is of ten in a row, so that each optimizer finds the caches as
its own loop leaves them. `forward and backward` is the part of it that is not the step: what an optimizer slows beside
itself shows there. The point cloud has five groups; after each of its changes it is stepped ten times, by AdamW."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import densifying, measure
from benchmarks.measure import IN_PYTHON, OURS, PATHS, TorchStep
from benchmarks.report import Figure, Row, Section, Target
from interop import optim

SIZES = {
    "6 tensors, 5 k": [(64, 32), (64,), (32, 64), (32,), (16, 32), (16,)],
    "10 tensors, 235 k": [
        s for n, m in ((300, 300), (300, 300), (150, 300), (30, 150), (10, 30)) for s in ((n, m), (n,))
    ],
    "30 tensors, 1 M": [(256, 256), (256,)] * 15,
}
CLASSES = [
    "SGD",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "Rprop",
    "ASGD",
    "Adafactor",
]
WARM = "JAX's cache on disk warm"
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


def steps(short: bool) -> list[Row]:
    rows: list[Row] = []
    for label, shapes in SIZES.items():
        grads = measure.gradients(shapes)
        for name in ("SGD", "AdamW") if short else CLASSES:
            variants = {
                path: TorchStep(make, shapes, grads, lr=1e-3, **choice)
                for path, (make, choice) in measure.paths(name).items()
            }
            with measure.reading_in_python():
                variants[IN_PYTHON] = TorchStep(getattr(optim, name), shapes, grads, lr=1e-3)
                variants[IN_PYTHON](0)
            _, times = measure.interleave(f"{name}, {label}", variants, 0.05 if short else 2)
            seconds = {path: x[:, 0] for path, x in times.items()}
            row: Row = {"parameters": label, "optimizer": name}
            row |= {f"{path}, us": 1e6 * float(np.median(x)) for path, x in seconds.items()}
            for path in (p for p in PATHS if p in seconds):
                row[f"{path} / ours"] = measure.ratio(seconds[path], seconds[OURS])
                row[f"{path} / {IN_PYTHON}"] = measure.ratio(seconds[path], seconds[IN_PYTHON])
            rows.append(row)
    return rows


def perceptron(*widths: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = [x for a, b in itertools.pairwise(widths) for x in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    return make


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(self.embedding(x)).mean(1))


def convolutions() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


# What is trained: the model, its input for a batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "perceptron, 5 k": (perceptron(32, 64, 32, 10), lambda n: torch.randn(n, 32)),
    "perceptron, 85 k": (perceptron(64, 256, 256, 10), lambda n: torch.randn(n, 64)),
    "perceptron, 1.1 M": (perceptron(64, 1024, 1024, 10), lambda n: torch.randn(n, 64)),
    "perceptron, 5 M": (perceptron(256, 2048, 2048, 10), lambda n: torch.randn(n, 256)),
    "small CNN": (convolutions, lambda n: torch.randn(n, 1, 28, 28)),
    "small transformer": (Transformer, lambda n: torch.randint(0, 64, (n, 16))),
}


class Iterations:
    """Ten iterations in a row; seconds of one, and of its step."""

    def __init__(self, model: str, batch: int, make: Any, **choice: Any):
        torch.manual_seed(0)
        module, data = MODELS[model]
        self.model, self.x = module(), data(batch)
        self.y = torch.randint(0, 10, (batch,))
        self.optimizer = make(self.model.parameters(), lr=1e-3, **choice)

    def __call__(self, i: int) -> list[float]:
        whole = step = 0.0
        for k in range(11):
            start = time.perf_counter()
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            middle = time.perf_counter()
            self.optimizer.step()
            end = time.perf_counter()
            if k:  # the first finds another's caches
                whole, step = whole + (end - start) / 10, step + (end - middle) / 10
        return [whole, step]


def iterations(short: bool) -> list[Row]:
    rows: list[Row] = []
    models = ["perceptron, 5 k"] if short else list(MODELS)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for model in models:
            for batch in (32,) if short else (1, 256) if "perceptron" in model else (32,):
                for name in ("AdamW",) if "perceptron" not in model else ("SGD", "AdamW"):
                    variants = {
                        path: Iterations(model, batch, make, **choice)
                        for path, (make, choice) in measure.paths(name).items()
                        if path != "foreach"
                    }
                    label = f"{model}, batch {batch}, {name}, {threads} threads"
                    _, times = measure.interleave(label, variants, 0.05 if short else 4)
                    row: Row = {"model": model, "batch": batch, "optimizer": name, "threads": threads}
                    row |= {f"{path}, us": 1e6 * float(np.median(x[:, 0])) for path, x in times.items()}
                    for path in ("default", "fused"):
                        row[f"ours / {path}"] = measure.ratio(times[OURS][:, 0], times[path][:, 0])
                    rest = {path: x[:, 0] - x[:, 1] for path, x in times.items()}
                    row["forward and backward, ours / fused"] = measure.ratio(rest[OURS], rest["fused"])
                    rows.append(row)
    torch.set_num_threads(measure.THREADS)
    return rows


def configurations(short: bool) -> list[Row]:
    """torch's table of configurations, each one step of a new optimizer on a small network."""
    from torch.testing._internal.common_optimizers import optim_db

    x = torch.randn(8, 10)

    def seconds(cls: Any, arguments: dict[str, Any]) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
        start = time.perf_counter()
        params = [p for p in model.parameters() if p.dim() == 2 or cls.__name__ != "Muon"]
        optimizer = cls(params, **arguments)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if cls.__name__ == "SparseAdam":
                for p in params:
                    p.grad = None if p.grad is None else p.grad.to_sparse(1)
            return loss

        optimizer.step(closure)
        return time.perf_counter() - start

    seconds(optim.SGD, {})  # what a process pays once: of `starts`
    rows: list[Row] = []
    for info in optim_db[:2] if short else optim_db:
        name = info.optim_cls.__name__
        times = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds(info.optim_cls, {})  # what torch imports at its first
            for given in info.optim_inputs_func(device="cpu"):
                times.append([seconds(cls, dict(given.kwargs)) for cls in (getattr(optim, name), info.optim_cls)])
        ours, theirs = np.sum(times, axis=0)
        rows.append(
            {"optimizer": name, "configurations": len(times), f"{OURS}, ms": 1e3 * ours, "torch, ms": 1e3 * theirs}
        )
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "optimizer"}
    rows.append({"optimizer": "all"} | total)
    for row in rows:
        row["ours / torch"] = row[f"{OURS}, ms"] / row["torch, ms"]
    return rows


def starts(short: bool) -> list[Row]:
    """In a process each, the lowest of some: what imports take beside torch and JAX, and first steps."""
    first = (
        "import torch; from interop import optim; "
        "from benchmarks.shapes import mlp, resnet50; import time; "
        "params = [torch.nn.Parameter(torch.zeros(s)) for s in {}]; o = optim.AdamW(params)\n"
        "for p in params: p.grad = torch.zeros_like(p)\n"
        "t = time.perf_counter(); o.step(); print(time.perf_counter() - t)"
    )
    timed = "{}; import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    codes = {
        "import jopt, after jax": timed.format("import jax", "import jopt"),
        "from interop import optim, after torch and jax": timed.format(
            "import torch, jax", "from interop import optim"
        ),
        "first step, 6 tensors": first.format("[(64, 32), (64,), (32, 64), (32,), (16, 32), (16,)]"),
        "first step, perceptron of 0.3 M": first.format("mlp()"),
        "first step, ResNet-50": first.format("resnet50()"),
    }
    codes |= {f"{what}, {WARM}": codes[what] for what in list(codes)[-2:]}
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for label, code in codes.items():
            found = []
            for _ in range(2 if short else 5):
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", code],
                    env=environment | (cache if WARM in label else {}),
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found.append(float(done.stdout.splitlines()[-1]))
            rows.append({"what": label, "s": min(found)})
    return rows


def run(short: bool) -> Section:
    of_steps, of_iterations, of_clouds, of_configurations, of_starts = (
        f(short) for f in (steps, iterations, densifying.clouds, configurations, starts)
    )
    targets = []
    for label in SIZES:
        rows = [row for row in of_steps if row["parameters"] == label]
        for path, aim, names in (("default", 1.0, CLASSES), ("foreach", 1.0, CLASSES), ("fused", 1 / 1.2, FUSED[:3])):
            ratios = {
                r["optimizer"]: r[f"{path} / ours"] for r in rows if r["optimizer"] in names and f"{path} / ours" in r
            }
            worst = min(ratios, key=ratios.__getitem__)
            targets.append(Target(f"{label}: torch's {path} over ours, the worst ({worst})", aim, ratios[worst]))
    for path, aim in (("default", 1.0), ("fused", 1.05)):
        row = max(of_iterations, key=lambda row: row[f"ours / {path}"])
        which = f"{row['model']}, batch {row['batch']}, {row['optimizer']}, {row['threads']} threads"
        targets.append(
            Target(f"an iteration, ours over torch's {path}, the worst ({which})", aim, row[f"ours / {path}"], True)
        )
    targets.append(
        Target("torch's configurations: ours over torch's", 3.0, of_configurations[-1]["ours / torch"], True)
    )
    for row in of_clouds:
        what = f"{row['points, at first']} points: ours beyond torch's default, ms a change of shapes"
        targets.append(Target(what, 10.0, row["ours beyond default, ms a change"], True))
    for row, aim in zip(of_starts, (0.2, 0.3, 0.3, 0.3, 1.0, 0.2, 0.2), strict=True):
        targets.append(Target(f"{row['what']}, s", aim, row["s"], True))
    labels = [f"{row['parameters']}, {row['optimizer']}" for row in of_steps if row["optimizer"] in ("SGD", "AdamW")]
    chosen = [row for row in of_steps if row["optimizer"] in ("SGD", "AdamW")]
    series = {path: [row.get(f"{path}, us") for row in chosen] for path in (OURS, IN_PYTHON, *PATHS)}
    tables = {
        "Steps": of_steps,
        "Iterations": of_iterations,
        "A point cloud that densifies": of_clouds,
        "Torch's configurations": of_configurations,
        "Starts": of_starts,
    }
    return Section("Small models", __doc__ or "", tables, [Figure("A step", "us (median)", labels, series)], targets)
