"""What a workload is: a model in PyTorch and in JAX, data, a measure of quality, and the optimizers tried on it."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

import jopt

Batch = tuple[np.ndarray, ...]
Params = dict[str, jax.Array]  # by the names in the PyTorch model; of buffers too


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer of torch.optim and its arguments.

    `grid` also tries a quarter and four times the learning rate. `full` gives it all data in each of fewer steps.
    """

    optimizer: str
    lr: float
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    sparse: bool = False
    full: bool = False

    def __str__(self) -> str:
        return self.optimizer + (", sparse gradients" if self.sparse and self.optimizer != "SparseAdam" else "")

    def torch(self, model: nn.Module, module: Any) -> list[torch.optim.Optimizer]:
        """Of torch.optim or interop.optim. Muon steps matrices alone: AdamW steps the rest."""
        make = getattr(module, self.optimizer)
        if self.optimizer != "Muon":
            return [make(model.parameters(), lr=self.lr, **self.arguments)]
        matrices = [p for p in model.parameters() if p.dim() == 2]
        return [
            make(matrices, lr=self.lr, **self.arguments),
            module.AdamW([p for p in model.parameters() if p.dim() != 2]),
        ]

    def jax(self) -> Any:
        name = "sparse_adam" if self.optimizer == "SparseAdam" else self.optimizer.lower()
        make = getattr(jopt, name)
        if self.optimizer == "Muon":
            return jopt.param_groups(make, {lambda path, p: p.ndim != 2: jopt.adamw()}, lr=self.lr, **self.arguments)
        return make(lr=self.lr, **self.arguments)


class Workload(abc.ABC):
    name: ClassVar[str]
    title: ClassVar[str]
    measure: ClassVar[str]  # of quality
    higher: ClassVar[bool]  # is better
    goal: ClassVar[float]
    steps: ClassVar[int]
    recipes: ClassVar[tuple[Recipe, ...]]  # the first one's curves are drawn
    grid: ClassVar[bool] = False  # each at three learning rates
    source: str  # what the data are

    @abc.abstractmethod
    def model(self, recipe: Recipe) -> nn.Module: ...

    @abc.abstractmethod
    def data(self) -> dict[str, np.ndarray]:
        """All that a run depends on, for its fingerprint."""

    @abc.abstractmethod
    def batch(self, step: int) -> Batch: ...

    def everything(self) -> Batch:
        raise NotImplementedError(f"{self.name} has no full batch")

    @abc.abstractmethod
    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def jax_loss(self, params: Params, buffers: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        """The same in JAX, and the buffers after it."""

    @abc.abstractmethod
    def quality(self, model: nn.Module) -> float:
        """On data that were not trained on."""

    def value_and_grad(self, recipe: Recipe) -> Callable[..., Any]:
        return jax.value_and_grad(self.jax_loss, has_aux=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        found = hashlib.sha256()
        for name, x in self.data().items():
            found.update(f"{name} {x.dtype} {x.shape}".encode())
            found.update(np.ascontiguousarray(x).data)
        return found.hexdigest()[:16]

    def reached(self, quality: float) -> bool:
        return quality >= self.goal if self.higher else quality <= self.goal


def split(x: np.ndarray, *others: np.ndarray, part: float, seed: int = 0) -> tuple[Batch, Batch]:
    """To train on, and `part` of them, drawn, to test on."""
    order = np.random.default_rng(seed).permutation(len(x))
    test = max(1, round(part * len(x)))
    return tuple(a[order[test:]] for a in (x, *others)), tuple(a[order[:test]] for a in (x, *others))


# --- layers in JAX, by the names of the PyTorch model's parameters


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logits, labels[..., None], axis=-1))
