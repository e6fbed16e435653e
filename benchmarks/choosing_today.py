"""Sweeps today's optimizers beside Adam's kind under equal tuning, and writes docs/choosing-today.md.

python -m benchmarks.choosing_today

Every optimizer has the same learning rates, seeds, steps and batches on the problems of `benchmarks.choosing`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jopt
from benchmarks import choosing, report

LRS = choosing.LRS[::2]
SEEDS = 2
OPTIMIZERS: dict[str, Any] = {
    "SGD, momentum 0.9": functools.partial(jopt.sgd, momentum=0.9),
    "AdamW": jopt.adamw,
    "AdamW, cautious": functools.partial(jopt.adamw, cautious=True),
    "Lion": jopt.lion,
    "Adan": jopt.adan,
    "AdEMAMix": jopt.ademamix,
    "ADOPT": jopt.adopt,
    "LAMB": jopt.lamb,
    "Schedule-free AdamW": jopt.schedule_free_adamw,
    "Prodigy": jopt.prodigy,
}
# One run after the other: vectorized, each step would pay for a refresh of their matrices.
ALONE: dict[str, Any] = {"SOAP": jopt.soap, "Kron": jopt.kron}
PAGE = """# Choosing among today's optimizers

{runs} runs: each optimizer with the same {lrs} learning rates from 1e-5 to 46, {seeds} seeds, steps and batches, all
else at its default, without a schedule. `python -m benchmarks.choosing_today` makes them again, in {minutes} minutes.
[Choosing](choosing.md) has the classic ones, the problems and what the words mean.

{problems}

*Fall* is the share of the best fall of the training loss on that problem, at the optimizer's best learning rate
(*best lr*); at its default learning rate in the last column of each.

{table}

What a step of the optimizer alone costs there, for {parameters} parameters in {tensors} tensors (images), compiled, on
this machine; and the numbers of state beside each parameter:

{costs}

What the figures say, and no more:

{said}

SOAP and Kron were run one run after the other (`chunk=1`): over vectorized runs a branch is a select, so that every
step would pay for a refresh of their matrices. Their step's cost is the mean over steps with a refresh and without.
These are small problems of a few hundred steps: what wins in pretraining is not decided here. Schedule-free AdamW is
evaluated at its training parameters. A rate that is the best of eleven is within a factor of 2.2 of its best.

Measured with jax {jax} on {machine}.
"""


def default_lr(optimizer: Any) -> float:
    return float(optimizer().hyperparameters["lr"])


def cost(optimizer: Any, params: Any) -> tuple[float, float]:
    """Milliseconds of a step, the mean of a hundred, and the numbers of state by the parameter."""
    tx = optimizer()
    step = jax.jit(tx.step)
    state = tx.init(params)
    numbers = sum(x.size for x in jax.tree.leaves(state.slots)) / sum(x.size for x in jax.tree.leaves(params))
    for _ in range(10):
        jax.block_until_ready(step(params, state, params))
    start = time.perf_counter()
    new = params
    for _ in range(100):
        new, state = step(params, state, new)
    jax.block_until_ready(new)
    return 10 * (time.perf_counter() - start), numbers


def thirty_layers() -> choosing.Problem:
    """`choosing.deep` with a matrix a layer, not a stack: what looks at matrices sees each."""
    deep = choosing.deep("vanish", "residual")

    def init(key: Any) -> Any:
        params = deep.init(key)
        return params | {"layers": list(params["layers"])}

    def loss(params: Any, batch: Any) -> Any:
        return deep.loss(params | {"layers": jnp.stack(params["layers"])}, batch)

    return deep._replace(what="the digits, 30 residual layers of tanh", init=init, loss=loss)


def swept(problem: choosing.Problem, bar: Any) -> Any:
    """All optimizers' lines."""
    together = choosing.sweep(problem, OPTIMIZERS, bar, lr=LRS, seeds=SEEDS)
    alone = choosing.sweep(problem, ALONE, bar, lr=LRS, seeds=SEEDS, chunk=1)
    return choosing.lines(dataclasses.replace(together, runs=together.runs + alone.runs))


def main() -> None:
    jopt.enable_multi_output_fusion()
    problems = {
        "images": choosing.images(),
        "text": choosing.text(),
        "ratings": choosing.ratings(),
        "30 layers": thirty_layers(),
    }
    start = time.perf_counter()
    params = problems["images"].init(jax.random.key(0))
    optimizers = OPTIMIZERS | ALONE
    costs = {name: cost(optimizer, params) for name, optimizer in optimizers.items()}
    chunks = len(OPTIMIZERS) + len(ALONE) * len(LRS) * SEEDS
    with tqdm(total=len(problems) * chunks, unit="chunk") as bar:
        found = {name: swept(problem, bar) for name, problem in problems.items()}
    rows = []
    for optimizer, make in optimizers.items():
        row: dict[str, Any] = {"": optimizer}
        for name, line in found.items():
            x = line[optimizer]
            row |= {
                f"{name}: best lr": f"{x.best:.2g}",
                f"{name}: fall": choosing.percent(x.fall),
                f"{name}: at its default": choosing.percent(x.at_lr(default_lr(make))),
            }
        rows.append(row)
    said = []
    for name, line in found.items():
        order = sorted(line, key=lambda optimizer: line[optimizer].loss)
        best, adamw = line[order[0]].loss, line["AdamW"].loss
        said.append(
            f"- {name}: {order[0]} has the lowest loss, {best:.3g}; {order[1]} {line[order[1]].loss:.3g}, AdamW "
            f"{adamw:.3g} (place {order.index('AdamW') + 1} of {len(order)}). Last is {order[-1]} with "
            f"{line[order[-1]].loss:.3g}."
        )
    untuned = {
        name: min(line[name].at_lr(default_lr(make)) for line in found.values()) for name, make in optimizers.items()
    }
    surest = max(untuned, key=lambda name: untuned[name])
    said.append(
        f"- Untuned: at its default rate {surest} has at least {choosing.percent(untuned[surest])} of the fall on each "
        f"problem, AdamW {choosing.percent(untuned['AdamW'])}."
    )
    base = costs["AdamW"][0]
    page = PAGE.format(
        runs=len(problems) * len(optimizers) * len(LRS) * SEEDS,
        lrs=len(LRS),
        seeds=SEEDS,
        minutes=math.ceil((time.perf_counter() - start) / 60),
        problems="\n".join(f"- **{name}**: {p.what}; {p.steps} steps." for name, p in problems.items()),
        table="\n".join(report.table(rows)),
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        tensors=len(jax.tree.leaves(params)),
        costs="\n".join(
            report.table(
                [
                    {"": name, "ms": f"{ms:.3f}", "of AdamW's": f"{ms / base:.2g}x", "state": f"{numbers:.2g}"}
                    for name, (ms, numbers) in costs.items()
                ]
            )
        ),
        said="\n".join(said),
        jax=jax.__version__,
        machine=f"{platform.machine()}, {jax.devices()[0].platform}",
    )
    (choosing.HERE / "choosing-today.md").write_text(report.wrapped(page))


if __name__ == "__main__":
    main()
