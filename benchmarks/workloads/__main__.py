"""Four models trained by torch.optim, by interop.optim and by jopt in JAX, from the same weights and data.

    python -m benchmarks.workloads                       all four: writes benchmarks/results/workloads.{json,md,png}
    python -m benchmarks.workloads --only text --data-text FILE --out out/mine
    python -m benchmarks.workloads --short               few steps: whether it runs at all; writes out/workloads

images: a folder with one subfolder a class, or module:name of a torch Dataset (default: scikit-learn's digits).
text: any file in UTF-8 (default: the texts of Python's help()).
ratings: MovieLens' u.data or ratings.csv (default: generated, of known rank and noise).
speech: wav files in one subfolder a class (default: digits by espeak-ng if it is installed, else formant tones).

Finished runs are kept in OUT/workloads, so that a command that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch
from tqdm import tqdm

import jopt
from benchmarks import measure, report
from benchmarks.workloads import page, training
from benchmarks.workloads.cells import Cells
from benchmarks.workloads.images import Images
from benchmarks.workloads.ratings import Ratings
from benchmarks.workloads.speech import Speech
from benchmarks.workloads.task import Recipe, Workload
from benchmarks.workloads.text import Text
from benchmarks.workloads.training import DROP_IN, JAX, NUDGED, ROUNDED, TORCH

WORKLOADS = {w.name: w for w in (Images, Text, Ratings, Speech)}
NUDGES = {NUDGED: 3, ROUNDED: 2}
LOOKS = 20
FULL = 20  # steps with all data in each
FIRST, FIRST_FULL = 20, 3  # steps in float64
SHORT = 24
GRID = (0.25, 1.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run of one recipe: (way, dtype, seed) and how many steps."""

    recipe: Recipe
    steps: int
    runs: tuple[tuple[str, str, int], ...]
    first: int

    def __len__(self) -> int:
        return sum(self.length(dtype) for _, dtype, _ in self.runs)

    def length(self, dtype: str) -> int:
        return self.steps if dtype == "float32" else self.first


def plans(workload: type[Workload] | Workload, steps: int | None, short: bool) -> list[Plan]:
    """Each recipe all ways; in a grid its other learning rates by torch.optim alone."""
    found = []
    ways = (TORCH, DROP_IN, JAX)
    compared = tuple((way, "float32", 0) for way in ways)
    compared += tuple((way, "float32", seed) for way, n in NUDGES.items() for seed in range(n))
    compared += tuple((way, "float64", 0) for way in ways)
    for recipe in workload.recipes[:2] if short else workload.recipes:
        n = steps or (SHORT if short else workload.steps)
        n, first = (min(n, FULL), FIRST_FULL) if recipe.full else (n, FIRST)
        for factor in GRID if workload.grid and not short else (1.0,):
            at = dataclasses.replace(recipe, lr=recipe.lr * factor)
            runs = compared if factor == 1 else ((TORCH, "float32", 0),)
            found.append(Plan(at, n, runs, min(first, n)))
    return found


def carry_out(workload: Workload, plan: Plan, cells: Cells, show: Callable[..., Any]) -> page.Runs:
    found: page.Runs = {}
    for way, dtype, seed in plan.runs:
        steps = plan.length(dtype)
        every = max(1, steps // LOOKS)
        configuration = {
            "workload": workload.name,
            "data": workload.fingerprint,
            "recipe": str(plan.recipe),
            **{k: v for k, v in dataclasses.asdict(plan.recipe).items() if k != "optimizer"},
            "way": way,
            "dtype": dtype,
            "seed": seed,
            "steps": steps,
            "every": every,
            "versions": [torch.__version__, jax.__version__, jopt.__version__],
        }
        result = cells.find(configuration)
        if result is None:
            result = training.run(
                workload,
                plan.recipe,
                way,
                dtype=dtype,
                seed=seed,
                steps=steps,
                every=every,
                show=show,
            )
            cells.keep(configuration, result)
        else:
            show(steps)
        found[way, dtype, seed] = result
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, separated by commas")
    parser.add_argument("--steps", type=int, help="of each run (default: the workload's own number)")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} steps, two optimizers each, no grid")
    parser.add_argument("--out", type=Path, help="folder for the results")
    for name in WORKLOADS:
        parser.add_argument(f"--data-{name}", metavar="PATH", help="your own data")
    options = parser.parse_args(argv)
    if unknown := set(options.only.split(",")) - set(WORKLOADS):
        parser.error(f"--only: expected some of {', '.join(WORKLOADS)}, found {', '.join(sorted(unknown))}")
    if options.steps is not None and options.steps < page.SMOOTH:
        parser.error(f"--steps: expected at least {page.SMOOTH}, over which losses are smoothed, found {options.steps}")
    out = options.out or (Path("out/workloads") if options.short else Path(__file__).parent.parent / "results")

    workloads = []
    for name in options.only.split(","):
        path = getattr(options, f"data_{name}")
        try:
            workloads.append(WORKLOADS[name](path))
        except SystemExit as error:
            sys.exit(f"--data-{name}: {error}")
    cells = Cells(out / "workloads")
    planned = {w.name: plans(w, options.steps, options.short) for w in workloads}
    results = []
    with tqdm(total=sum(len(p) for ps in planned.values() for p in ps), unit="step", disable=None) as bar:
        for workload in workloads:
            for plan in planned[workload.name]:
                bar.set_description(f"{workload.name}, {plan.recipe}")
                runs = carry_out(workload, plan, cells, bar.update)
                results.append(page.Result(workload, plan.recipe, runs))
    page.write(results, measure.machine(), out)
    report.summary(out)
    disagree = [r for r in results if r.compared and not r.agrees]
    compared = sum(r.compared for r in results)
    print(f"{compared - len(disagree)} of {compared} agree with torch.optim; {out / 'workloads.md'}")
    for r in disagree:
        print(f"{r.workload.name}, {r.recipe}: DOES NOT AGREE: {r.gaps()}, torch from itself {r.yardsticks()}")
    return 1 if disagree else 0


if __name__ == "__main__":
    measure.prepare()
    torch.set_num_threads(1)  # the models are small: a second thread costs more than it gives
    sys.exit(main())
