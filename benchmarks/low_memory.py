"""AdamW with state in eight and sixteen bits: distance from float32's run, loss, memory and time, beside others'.

python -m benchmarks.low_memory

Prints the tables of docs/low-memory-state.md. Others' are stepped where they are installed (`bitsandbytes==0.50.2`,
`torchao==0.18.0`), by the gradients that JAX computes at their parameters.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jopt
from benchmarks import choosing
from benchmarks.report import table

LR, RANK, SIZE, REPEATS = 3e-3, 32, 2**24, 15
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "bfloat16, at random": {"state_dtype": "bfloat16", "stochastic_rounding": 0},
    "int8": {"state_dtype": "int8"},
    "int8, at random": {"state_dtype": "int8", "stochastic_rounding": 0},
}
OTHERS = {"bitsandbytes": "bitsandbytes.optim.AdamW8bit", "torchao": "torchao.optim.AdamW8bit"}


def ratings() -> choosing.Problem:
    """Those of `choosing`, with matrices of more than 4096 elements."""

    def init(key: Any) -> Any:
        a, b = jax.random.split(key)
        return {"user": 0.1 * jax.random.normal(a, (300, RANK)), "item": 0.1 * jax.random.normal(b, (200, RANK))}

    return choosing.ratings()._replace(init=init)


PROBLEMS: dict[str, Callable[[], choosing.Problem]] = {
    "digits": choosing.images,
    "30 layers": lambda: choosing.deep("vanish", "residual"),
    "text": choosing.text,
    "ratings": ratings,
}


def ours(problem: choosing.Problem, params: Any, options: dict[str, Any]) -> Any:
    tx = jopt.adamw(lr=LR, **options)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        return tx.step(jax.grad(problem.loss)(params, batch), state, params)

    state = tx.init(params)
    for i in range(problem.steps):
        params, state = step(params, state, problem.batch(i))
    return params


def theirs(problem: choosing.Problem, params: Any, cls: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    tensors = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in leaves]
    optimizer = cls(tensors, lr=LR, weight_decay=1e-2)
    grad = jax.jit(jax.grad(problem.loss))
    for i in range(problem.steps):
        params = treedef.unflatten([p.detach().numpy() for p in tensors])
        for p, g in zip(tensors, jax.tree.leaves(grad(params, problem.batch(i))), strict=True):
            p.grad = torch.tensor(np.array(g))
        optimizer.step()
    return treedef.unflatten([jnp.asarray(p.detach().numpy()) for p in tensors])


def others() -> dict[str, Any]:
    found = {}
    for name, path in OTHERS.items():
        module, _, cls = path.rpartition(".")
        try:
            found[name] = getattr(importlib.import_module(module), cls)
        except ImportError as error:
            print(f"{name}: {error}")
    return found


def distances(classes: dict[str, Any]) -> list[dict[str, Any]]:
    """For each problem and format: how far from float32's end, over how far that is from the start; the loss."""
    rows: list[dict[str, Any]] = [{"state": name} for name in [*FORMATS, *classes]]
    for name, make in PROBLEMS.items():
        problem = make()
        start = problem.init(jax.random.key(0))
        ends = {form: ours(problem, start, options) for form, options in FORMATS.items()}
        ends |= {other: theirs(problem, start, cls) for other, cls in classes.items()}

        def norm(a: Any, b: Any) -> float:
            return float(sum(jnp.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)) ** 0.5)

        for row, end in zip(rows, ends.values(), strict=True):
            loss = np.mean([problem.loss(end, problem.batch(i)) for i in range(10000, 10020)])
            away = norm(end, ends["float32"]) / norm(start, ends["float32"])
            row[name] = f"{100 * away:.2g} %, {loss:.4f}"
    return rows


def costs(classes: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes of state a parameter, and the median time of a step of many in one array."""
    rows = []
    for name, options in FORMATS.items():
        tx = jopt.adamw(lr=LR, **options)
        params, grads = (jax.random.normal(jax.random.key(i), (SIZE,)) for i in (0, 1))
        state = tx.init(params)
        nbytes = sum(x.nbytes for x in jax.tree.leaves(state.slots))
        step = jax.jit(lambda p, s, g, tx=tx: tx.step(g, s, p), donate_argnums=(0, 1))
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            params, state = jax.block_until_ready(step(params, state, grads))
            times.append(time.perf_counter() - begin)
        rows.append({"state": name, "bytes": f"{nbytes / SIZE:.2f}", "ms": round(1000 * float(np.median(times)))})
    for name, cls in classes.items():
        p = torch.nn.Parameter(torch.randn(SIZE))
        p.grad = torch.randn(SIZE)
        optimizer, times = cls([p], lr=LR), []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - begin)
        rows.append({"state": name, "bytes": "", "ms": round(1000 * float(np.median(times)))})
    return rows


def main() -> None:
    classes = others()
    print("\n".join(table(costs(classes))))
    print("\n".join(table(distances(classes))))


if __name__ == "__main__":
    jopt.enable_multi_output_fusion()
    main()
