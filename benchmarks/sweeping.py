"""A sweep of 64 runs of a small MLP (16 learning rates, 4 seeds) with AdamW, from nothing to the last loss: compiling
and making the parameters included; against the same runs one after the other in torch. Their final losses differ most
where the largest learning rates make training chaotic."""

from __future__ import annotations

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import jopt
from benchmarks.measure import PATHS, THREADS
from benchmarks.report import Figure, Row, Section, Target

WIDTHS = (64, 32, 32, 10)
LRS, SEEDS, BATCH = 16, 4, 32


def init(key: jax.Array) -> Any:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    shapes = zip(keys, itertools.pairwise(WIDTHS), strict=True)
    return [{"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)} for k, (a, b) in shapes]


def loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = jax.nn.log_softmax(x @ params[-1]["w"] + params[-1]["b"])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], axis=1))


def data(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes that a linear map gives noisy images: something to learn."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, BATCH, WIDTHS[0])).astype(np.float32)
    scores = x @ rng.standard_normal((WIDTHS[0], WIDTHS[-1])).astype(np.float32)
    return x, (scores + rng.standard_normal(scores.shape)).argmax(-1).astype(np.int32)


def sequential(lrs: np.ndarray, batches: Any, starts: list[Any], **path: Any) -> np.ndarray:
    """The usual loop, run by run, from the same weights; losses as (runs, steps)."""
    batches = [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in zip(*batches, strict=True)]
    curves = []
    for lr in lrs:
        for start in starts:
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)]
            with torch.no_grad():
                for layer, values in zip(layers, start, strict=True):
                    layer.weight.copy_(torch.tensor(values["w"]).T)
                    layer.bias.copy_(torch.tensor(values["b"]))
            model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **path)
            curve = []
            for x, y in batches:
                optimizer.zero_grad()
                value = functional.cross_entropy(model(x), y)
                value.backward()
                optimizer.step()
                curve.append(value.detach())
            curves.append(torch.stack(curve).numpy())
    return np.stack(curves)


def seconds(f: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def run(short: bool) -> Section:
    """One round, since all is in it. torch in each of its paths, its imports done before, on one thread or two, as one
    run of the 64 is faster."""
    steps, lrs = (5, 2) if short else (2000, LRS)
    grid, batches = np.geomspace(1e-4, 1e-1, lrs), data(steps)
    ours, result = seconds(lambda: jopt.sweep(loss, init, batches, lr=grid, seeds=SEEDS))
    again, _ = seconds(lambda: jopt.sweep(loss, init, batches, lr=grid, seeds=SEEDS))
    rows: list[Row] = [{"what": "jopt.sweep", "s": ours}, {"what": "jopt.sweep, a second time", "s": again}]
    finals = np.array([r.final for r in result.runs])
    starts = [jax.device_get(init(jax.random.key(seed))) for seed in range(SEEDS)]

    def one_run(threads: int) -> float:
        torch.set_num_threads(threads)
        sequential(grid[:1], [x[:2] for x in batches], starts[:1])
        return seconds(lambda: sequential(grid[:1], batches, starts[:1]))[0]

    threads = min(range(1, THREADS + 1), key=one_run)
    torch.set_num_threads(threads)
    times = {}
    for path in tqdm(PATHS, desc="torch", leave=False, disable=None):
        choice = {} if path == "default" else {path: True}
        name = f"torch.optim, {path}"
        times[name], curves = seconds(lambda choice=choice: sequential(grid, batches, starts, **choice))
        theirs = curves[:, -max(1, steps // 10) :].mean(1)
        gap = float(np.abs(theirs - finals).max() / finals.max())
        ratio = times[name] / ours
        rows.append({"what": name, "s": times[name], "over ours": ratio, "final losses apart, %": 100 * gap})
    torch.set_num_threads(THREADS)
    best = min(times, key=lambda name: times[name])
    title = f"{lrs * SEEDS} runs of {steps} steps, {BATCH} rows a batch; torch on {threads} thread{'s' * (threads > 1)}"
    names = [str(r["what"]) for r in rows]
    return Section(
        "Sweeps",
        f"{__doc__}\n{run.__doc__}",
        {title: rows},
        [Figure(title, "seconds", names, {"from nothing": [r["s"] for r in rows]})],
        [Target(f"{title}: torch's best ({best}) over ours, compiling included", 10.0, times[best] / ours)],
    )
