"""An LSTM that predicts the next character (Hochreiter & Schmidhuber 1997)."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads.task import Batch, Params, Recipe, Workload, cross_entropy, linear
from examples import porting_a_run
from examples.porting_a_run import CONTEXT

EMBEDDING, HIDDEN = 32, 128


class Model(nn.Module):
    def __init__(self, characters: int):
        super().__init__()
        self.embed = nn.Embedding(characters, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])


class Text(Workload):
    name, title = "text", "Text: an LSTM of characters"
    measure, higher, goal = "bits a character", False, 2.2
    steps = 200
    recipes = (
        Recipe("AdamW", 5e-3),
        Recipe("RMSprop", 2e-3),
        Recipe("SGD", 2.0, dict(momentum=0.9, nesterov=True)),
    )

    def __init__(self, path: str | None = None):
        text, self.characters = porting_a_run.load(None if path is None else Path(path))
        held_out = len(text) // 10
        self.train, self.test = text[:-held_out], text[-held_out:]
        kind = "the texts of Python's help()" if path is None else path
        self.source = f"{kind}; {len(text)} characters, {self.characters} different, the last tenth to test on"

    def data(self) -> dict[str, np.ndarray]:
        return {"train": self.train, "test": self.test}

    def model(self, recipe: Recipe) -> nn.Module:
        return Model(self.characters)

    def batch(self, step: int) -> Batch:
        return porting_a_run.batch(self.train, step)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        x, y = batch
        return functional.cross_entropy(model(x.long()).flatten(0, 1), y.long().flatten())

    def jax_loss(self, params: Params, buffers: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        x, y = batch
        inputs = params["embed.weight"][x.T]  # time first
        inputs = inputs @ params["lstm.weight_ih_l0"].T + params["lstm.bias_ih_l0"][None, None]

        def cell(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h, c = carry
            gates = x + (h @ params["lstm.weight_hh_l0"].T + params["lstm.bias_hh_l0"][None])
            i, f, g, o = jnp.split(gates, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((len(x), HIDDEN), inputs.dtype)
        h = jax.lax.scan(cell, (zeros, zeros), inputs)[1].reshape(-1, HIDDEN)
        return cross_entropy(linear(params, "head", h), y.T.reshape(-1)), buffers

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        n = min(len(self.test) - 1, 200 * CONTEXT) // CONTEXT * CONTEXT
        x, y = (torch.from_numpy(a[:n].reshape(-1, CONTEXT)) for a in (self.test, self.test[1:]))
        return self.loss(model, x, y).item() / math.log(2)
