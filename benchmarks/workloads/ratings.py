"""Matrix factorisation of ratings (Koren, Bell & Volinsky 2009), with gradients of the rows that a batch meets."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental.sparse import BCOO
from torch import Tensor, nn

from benchmarks.workloads.task import Batch, Params, Recipe, Workload, split

FACTORS, BATCH = 8, 512
USERS, ITEMS, RATINGS, RANK, NOISE = 600, 400, 50_000, 4, 0.5  # of the generated set


def load(path: Path) -> Batch:
    """Users, items and ratings of a file of MovieLens: `u.data`, tab-separated, or `ratings.csv`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except UnicodeDecodeError:
        sys.exit(f"{path}: expected text, a rating a line")
    tabs = bool(lines) and "\t" in lines[0]
    rows = csv.reader(lines, delimiter="\t" if tabs else ",")
    users, items, ratings = [], [], []
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and row[:3] == ["userId", "movieId", "rating"]):
            continue
        try:
            user, item, rating = int(row[0]), int(row[1]), float(row[2])
            if not np.isfinite(rating):
                raise ValueError
        except (ValueError, IndexError):
            kind = "user, item, rating, timestamp, separated by " + ("tabs" if tabs else "commas")
            sys.exit(f"{path}, line {number}: expected {kind}, found {(chr(9) if tabs else ',').join(row)!r:.80}")
        users.append(user)
        items.append(item)
        ratings.append(rating)
    if len(ratings) < 2 * BATCH:
        sys.exit(f"{path}: expected at least {2 * BATCH} ratings, found {len(ratings)}")
    # Numbers have gaps: a row is a number that occurs.
    rows_of = [np.unique(x, return_inverse=True)[1].astype(np.int32) for x in (users, items)]
    return rows_of[0], rows_of[1], np.array(ratings, np.float32)


def generate() -> Batch:
    """Biases and factors of rank `RANK`, and noise: no model can be better on ratings not seen than `NOISE`."""
    rng = np.random.default_rng(0)
    at = rng.choice(USERS * ITEMS, RATINGS, replace=False)
    users, items = at // ITEMS, at % ITEMS
    p, q = (rng.standard_normal((n, RANK)) / np.sqrt(RANK) for n in (USERS, ITEMS))
    bias_p, bias_q = (0.4 * rng.standard_normal(n) for n in (USERS, ITEMS))
    means = 3.5 + bias_p[users] + bias_q[items] + (p[users] * q[items]).sum(1)
    ratings = means + NOISE * rng.standard_normal(RATINGS)
    return users.astype(np.int32), items.astype(np.int32), ratings.astype(np.float32)


class Model(nn.Module):
    """A row holds the factors and, last, the bias; a rating is away from the mean by their sum."""

    def __init__(self, users: int, items: int, sparse: bool):
        super().__init__()
        self.users = nn.Embedding(users, FACTORS + 1, sparse=sparse)
        self.items = nn.Embedding(items, FACTORS + 1, sparse=sparse)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return predict(self.users(users), self.items(items))


def predict(users: Any, items: Any) -> Any:
    """From the rows of each, in torch and in JAX."""
    return (users[:, :-1] * items[:, :-1]).sum(1) + users[:, -1] + items[:, -1]


class Ratings(Workload):
    name, title = "ratings", "Recommendation: matrix factorisation with row-sparse gradients"
    measure, higher = "RMSE", False
    steps = 800
    recipes = (
        Recipe("SparseAdam", 2e-2, sparse=True),
        Recipe("Adam", 1e-2),
        Recipe("Adagrad", 0.1),
        Recipe("SGD", 2.0, dict(momentum=0.9)),
    )

    def __init__(self, path: str | None = None):
        users, items, ratings = generate() if path is None else load(Path(path))
        self.counts = int(users.max()) + 1, int(items.max()) + 1
        self.mean = ratings.mean()
        self.train, self.test = split(users, items, ratings - self.mean, part=0.1)
        self.floor = NOISE if path is None else None
        # A bound for the generated set; for a real one, what the mean alone is wrong by, less a tenth.
        self.goal = 1.25 * NOISE if path is None else 0.9 * float(self.test[2].std())
        kind = f"generated: rank {RANK} and noise of {NOISE}, the floor of the RMSE" if path is None else path
        self.source = (
            f"{kind}; {len(ratings)} ratings of {self.counts[1]} items by {self.counts[0]} users, a tenth to test on"
        )

    def data(self) -> dict[str, np.ndarray]:
        names = ("users", "items", "ratings", "test_users", "test_items", "test_ratings")
        return dict(zip(names, (*self.train, *self.test), strict=True))

    def model(self, recipe: Recipe) -> nn.Module:
        return Model(*self.counts, recipe.sparse)

    def batch(self, step: int) -> Batch:
        at = np.random.default_rng(step).integers(0, len(self.train[0]), BATCH)
        return tuple(x[at] for x in self.train)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        users, items, ratings = batch
        return (model(users, items) - ratings).square().mean()

    def jax_loss(self, params: Params, buffers: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        users, items, ratings = batch
        rows = params["users.weight"][users], params["items.weight"][items]
        return jnp.mean((predict(*rows) - ratings) ** 2), buffers

    def value_and_grad(self, recipe: Recipe) -> Callable[..., Any]:
        """For SparseAdam with respect to the rows looked up, as torch's embeddings have it."""
        if not recipe.sparse:
            return super().value_and_grad(recipe)

        def of_rows(params: Params, buffers: Params, *batch: jax.Array) -> Any:
            *indices, ratings = batch
            rows = [params[name][at] for name, at in zip(("users.weight", "items.weight"), indices, strict=True)]
            value, grads = jax.value_and_grad(lambda rows: jnp.mean((predict(*rows) - ratings) ** 2))(rows)
            sparse = {
                name: BCOO((grad, at[:, None]), shape=params[name].shape)
                for name, grad, at in zip(("users.weight", "items.weight"), grads, indices, strict=True)
            }
            return (value, buffers), sparse

        return of_rows

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        return float(self.loss(model, *map(torch.from_numpy, self.test)).sqrt())
