"""What a training step in JAX waits for its batch: `interop.prefetch`, and a plain loop over the DataLoader.

AdamW on a perceptron over images of bytes, batches of 128; the network's width makes the step shorter or longer. On two
processors loading and computing share them: what is gained is what either leaves free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils.data import DataLoader, Dataset

import interop
import jopt
from benchmarks import measure
from benchmarks.report import Figure, Row, Section, Target

OURS, PLAIN = "interop.prefetch", "plain loop"
COLUMNS = ("whole step", "wait for the batch")


class Images(Dataset):
    """Bytes, each image read and flipped as a dataset in memory or a decoded file would be."""

    def __init__(self, n: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, 10, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[i].flip(-1) if i % 2 else self.images[i], self.labels[i]


class Loop:
    """An epoch of training: seconds a step, and of them those in which it waits for a batch of JAX arrays."""

    def __init__(self, batches: Callable[[], Iterable[Any]], params: Any):
        self.batches = batches
        self.tx = jopt.adamw(lr=1e-3)
        self.params = jax.tree.map(jnp.array, params)
        self.state = self.tx.init(self.params)
        self.train_step = jax.jit(self._train_step, donate_argnums=(0, 1))

    def _train_step(self, params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            x = (images.astype(jnp.float32) / 255 - 0.5).reshape(len(images), -1)
            for w in params[:-1]:
                x = jax.nn.relu(x @ w)
            return -jnp.take_along_axis(jax.nn.log_softmax(x @ params[-1]), labels[:, None], axis=1).mean()

        return self.tx.step(jax.grad(loss)(params), state, params)

    def __call__(self, i: int) -> tuple[float, float]:
        start, waited, steps = time.perf_counter(), 0.0, 0
        batches = iter(self.batches())
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            jax.block_until_ready(batch)
            waited += time.perf_counter() - asked
            self.params, self.state = self.train_step(self.params, self.state, *batch)
            jax.block_until_ready(self.params)  # as a loop does that reads its loss
            steps += 1
        return (time.perf_counter() - start) / steps, waited / steps


def converted(loader: DataLoader) -> Iterable[Any]:
    """The loop by hand: each batch is taken to JAX when it is asked for."""
    for images, labels in loader:
        yield interop.to_jax(images), interop.to_jax(labels.int())


def run(short: bool) -> Section:
    n, size, widths = (256, 8, (16,)) if short else (4096, 64, (16, 128, 512))
    loader = DataLoader(Images(n, size), batch_size=128, shuffle=True, drop_last=True)
    rows: dict[str, list[Row]] = {column: [] for column in COLUMNS}
    for width in widths:
        keys = jax.random.split(jax.random.key(0), 2)
        shapes = ((3 * size * size, width), (width, 10))
        params = [0.01 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        variants = {
            OURS: Loop(lambda: interop.prefetch(loader), params),
            PLAIN: Loop(lambda: converted(loader), params),
        }
        first, times = measure.interleave(f"width {width}", variants, 0.1 if short else 20)
        for column, name in enumerate(COLUMNS):
            compared = measure.compare(first, times, (PLAIN,), column)
            rows[name].append({"network": f"width {width}"} | compared | {"flag": measure.flag(own=False)})
    figures = [
        Figure(
            f"{name[0].upper()}{name[1:]}",
            "ms (median)",
            [r["network"] for r in found],
            {v: [r[f"{v}, ms"] for r in found] for v in (OURS, PLAIN)},
        )
        for name, found in rows.items()
    ]
    targets = [
        Target(f"{r['network']}, {name}: plain loop over prefetch", goal, r["best / ours"])
        for (name, found), goal in zip(rows.items(), (1.0, 2.0), strict=True)
        for r in found
    ]
    return Section("Loading", __doc__.strip(), dict(rows), figures, targets)
