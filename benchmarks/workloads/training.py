"""One run: a workload, an optimizer, and who steps it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import Tensor, nn

import interop
from benchmarks.workloads.task import Batch, Recipe, Workload
from examples.digits import nudge
from interop import optim
from jopt._compat import enable_x64

TORCH, DROP_IN, JAX, NUDGED = "torch.optim", "interop.optim", "jopt in JAX", "one ulp away"
ROUNDED = "one ulp a step"
MODULES = {TORCH: torch.optim, DROP_IN: optim, NUDGED: torch.optim, ROUNDED: torch.optim}


def run(
    workload: Workload,
    recipe: Recipe,
    way: str,
    *,
    dtype: str,
    steps: int,
    every: int,
    seed: int = 0,
    show: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """`steps` steps from the same weights over the same batches.

    Args:
      every: steps between two looks at the quality, whose time is not counted.
      seed: of what moves weights by one ulp: the first, `NUDGED`, or those after every step too, `ROUNDED`.

    Returns:
      losses and seconds of each step; [step, quality] pairs; and the buffers at the end (batch norm's statistics).
    """
    torch.manual_seed(0)
    model = workload.model(recipe).to(getattr(torch, dtype))
    if way in (NUDGED, ROUNDED):
        nudge(model, seed)
    with enable_x64(dtype == "float64"):
        trainer = (InJax if way == JAX else InTorch)(workload, recipe, model, way)
        losses, seconds, qualities = [], [], []
        for step in range(steps):
            batch = workload.everything() if recipe.full else workload.batch(step)
            batch = tuple(x.astype(dtype) if x.dtype.kind == "f" else x for x in batch)
            trainer.prepare(batch)
            start = time.perf_counter()
            losses.append(trainer.step())
            seconds.append(time.perf_counter() - start)
            if way == ROUNDED:
                nudge(model, 1000 * (seed + 1) + step)
            if (step + 1) % every == 0 or step + 1 == steps:
                trained = trainer.model().eval()
                qualities.append([step + 1, workload.quality(trained)])
                trained.train()
            show()
        buffers = {name: x.double().ravel().tolist() for name, x in trainer.model().named_buffers()}
    return {"losses": losses, "seconds": seconds, "qualities": qualities, "buffers": buffers}


class InTorch:
    """The usual loop, with torch.optim or interop.optim."""

    def __init__(self, workload: Workload, recipe: Recipe, model: nn.Module, way: str):
        self.workload, self.trained = workload, model
        self.optimizers = recipe.torch(model, MODULES[way])
        self.closes = recipe.optimizer == "LBFGS"

    def prepare(self, batch: Batch) -> None:
        self.batch = tuple(map(torch.from_numpy, batch))

    def step(self) -> float:
        def closure() -> Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = self.workload.loss(self.trained, *self.batch)
            loss.backward()
            return loss

        if self.closes:
            return self.optimizers[0].step(closure).item()
        loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    def model(self) -> nn.Module:
        return self.trained


class InJax:
    """The model's parameters in a JAX script: one jitted function a step."""

    def __init__(self, workload: Workload, recipe: Recipe, model: nn.Module, way: str):
        self.template = model
        arrays = interop.to_jax(model)
        self.params, self.buffers = arrays["params"], arrays["buffers"]
        tx: Any = recipe.jax()
        self.state = tx.init(self.params)
        value_and_grad = workload.value_and_grad(recipe)

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def train_step(params: Any, buffers: Any, state: Any, batch: Any) -> Any:
            (loss, buffers), grads = value_and_grad(params, buffers, *batch)
            params, state = tx.step(grads, state, params)
            return params, buffers, state, loss

        def closed_step(params: Any, buffers: Any, state: Any, batch: Any) -> Any:
            self.closure = self.closure or jax.jit(lambda params: of_all(params, batch))
            params, state, loss = tx.step(self.closure, state, params)
            return params, buffers, state, loss

        def of_all(params: Any, batch: Any) -> Any:
            (loss, _), grads = value_and_grad(params, self.buffers, *batch)
            return loss, grads

        self.closure: Any = None  # LBFGS compiles one function once, so that its batch has to stay
        self.train_step = closed_step if recipe.optimizer == "LBFGS" else train_step

    def prepare(self, batch: Batch) -> None:
        self.batch = batch

    def step(self) -> float:
        self.params, self.buffers, self.state, loss = self.train_step(self.params, self.buffers, self.state, self.batch)
        return float(loss)

    def model(self) -> nn.Module:
        return interop.to_torch({"params": self.params, "buffers": self.buffers}, into=self.template)
