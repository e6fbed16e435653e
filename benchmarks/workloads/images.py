"""A residual CNN with batch normalisation (He et al. 2015) on images."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import Residual
from benchmarks.workloads.task import Batch, Params, Recipe, Workload, cross_entropy, linear, split
from examples import digits

WIDTH, BATCH, SIZE, MOMENTUM, EPS = 16, 64, 32, 0.1, 1e-5


class Images(Workload):
    name, title = "images", "Images: a residual CNN with batch normalisation"
    measure, higher, goal = "accuracy", True, 0.95
    steps, grid = 150, True
    recipes = (
        Recipe("AdamW", 2e-3, dict(weight_decay=1e-2)),
        Recipe("SGD", 0.05, dict(momentum=0.9, weight_decay=5e-4)),
        Recipe("Adam", 2e-3),
        Recipe("Adamax", 4e-3),
        Recipe("NAdam", 2e-3),
        Recipe("RAdam", 4e-3),
        Recipe("Adagrad", 0.02),
        Recipe("Adadelta", 1.0),
        Recipe("RMSprop", 1e-3),
        Recipe("ASGD", 0.1),
        Recipe("Adafactor", 0.02),
    )

    def __init__(self, path: str | None = None):
        x, y = digits.load(path, SIZE)
        self.train, self.test = split(x, y, part=0.2)
        if len(self.train[0]) < BATCH:
            sys.exit(f"expected at least {BATCH} images to train on, found {len(self.train[0])}")
        self.classes = int(y.max()) + 1
        self.source = (
            f"{'scikit-learn: handwritten digits' if path is None else path}; {len(x)} images of "
            f"{'x'.join(map(str, x.shape[1:]))} in {self.classes} classes, a fifth of them to test on"
        )

    def data(self) -> dict[str, np.ndarray]:
        return dict(zip(("x", "y", "test_x", "test_y"), (*self.train, *self.test), strict=True))

    def model(self, recipe: Recipe) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(self.train[0].shape[1], WIDTH, 3, 1, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(inplace=True),
            Residual(WIDTH, WIDTH, 1),
            Residual(WIDTH, 2 * WIDTH, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * WIDTH, self.classes),
        )

    def batch(self, step: int) -> Batch:
        at = np.random.default_rng(step).choice(len(self.train[0]), BATCH, replace=False)
        return tuple(x[at] for x in self.train)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        x, y = batch
        return functional.cross_entropy(model(x), y.long())

    def jax_loss(self, params: Params, buffers: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        x, y = batch
        seen: Params = {}

        def conv(name: str, x: jax.Array, stride: int = 1, padding: int = 1) -> jax.Array:
            return lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)

        def norm(name: str, x: jax.Array) -> jax.Array:
            y, seen_here = batch_norm(params, buffers, name, x)
            seen.update(seen_here)
            return y

        def residual(name: str, x: jax.Array, stride: int) -> jax.Array:
            inner = jax.nn.relu(norm(f"{name}.inner.1", conv(f"{name}.inner.0", x, stride)))
            inner = norm(f"{name}.inner.4", conv(f"{name}.inner.3", inner))
            if stride != 1:
                x = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", x, stride, 0))
            return jax.nn.relu(inner + x)

        x = jax.nn.relu(norm("1", conv("0", x)))
        x = residual("4", residual("3", x, 1), 2)
        return cross_entropy(linear(params, "7", x.mean((2, 3))), y), seen

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        x, y = map(torch.from_numpy, self.test)
        dtype = next(model.parameters()).dtype
        return float((model(x.to(dtype)).argmax(1) == y).double().mean())


def batch_norm(params: Params, buffers: Params, name: str, x: jax.Array) -> tuple[jax.Array, Params]:
    """nn.BatchNorm2d in training: by the batch's biased variance; the running one is unbiased."""

    def over_channels(v: jax.Array) -> jax.Array:
        return v[None, :, None, None]

    n = x.size // x.shape[1]
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    running: dict[str, Any] = {"running_mean": mean, "running_var": var * (n / (n - 1))}
    after = {f"{name}.{k}": (1 - MOMENTUM) * buffers[f"{name}.{k}"] + MOMENTUM * v for k, v in running.items()}
    after[f"{name}.num_batches_tracked"] = buffers[f"{name}.num_batches_tracked"] + 1
    x = (x - over_channels(mean)) / over_channels(jnp.sqrt(var + EPS))
    x = x * over_channels(params[f"{name}.weight"]) + over_channels(params[f"{name}.bias"])
    return x, after
