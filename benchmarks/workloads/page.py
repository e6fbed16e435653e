"""What the runs show: agreement, quality, time; as JSON, a page and a plot."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import Row, Section, Target
from benchmarks.workloads.task import Recipe, Workload
from benchmarks.workloads.training import DROP_IN, JAX, NUDGED, ROUNDED, TORCH
from examples.porting_a_run import MARGIN, ROUNDING, SMOOTH, gap, smooth

WAYS = (TORCH, DROP_IN, JAX)
Runs = dict[tuple[str, str, int], dict[str, Any]]  # way, dtype, seed -> what training.run returns

TEXT = f"""Each model is trained by `torch.optim`, by `interop.optim` (the same loop) and, in JAX, by `jopt`, from the
same weights over the same batches. `difference` is the largest between the losses of two runs, each smoothed over
{SMOOTH} steps. What PyTorch's own run differs by from itself is the yardstick: `one ulp away`, the largest of three
runs that start with each weight moved to the next float32, up or down at random; `one ulp a step`, of two in which that
is done after every step too, as another rounding of each step would. A run agrees if it is no further away than
{MARGIN:g} times the larger, or than the rounding of a loss. In float64 the first losses are compared as they are; Muon
iterates in bfloat16 there too, as in torch.
`statistics` are batch norm's running ones at the end: the norm of their difference over their norm.

Quality is of data that were not trained on, at the end of each run, with its buffers. Milliseconds are the median of
whole steps: forward, backward, optimizer, and reading the loss. Seconds to the goal leave out the first step, in which
programs are compiled (`first step, s`), and the time that looking takes. The runs follow one another: where others use
the machine too, times are rough, and `make bench` has the better ones, in alternating rounds."""


@dataclasses.dataclass
class Result:
    """One recipe on one workload."""

    workload: Workload
    recipe: Recipe
    runs: Runs

    @property
    def compared(self) -> bool:
        """With the other ways, or only one more learning rate."""
        return (JAX, "float32", 0) in self.runs

    def run(self, way: str, dtype: str = "float32") -> dict[str, Any]:
        return self.runs[way, dtype, 0]

    def nudged(self, *ways: str) -> list[dict[str, Any]]:
        return [run for (way, _, _), run in self.runs.items() if way in ways]

    def gaps(self) -> dict[str, float]:
        reference = self.run(TORCH)["losses"]
        return {way: gap(self.run(way)["losses"], reference) for way in (DROP_IN, JAX)}

    def yardsticks(self) -> dict[str, float]:
        reference = self.run(TORCH)["losses"]
        return {way: max(gap(run["losses"], reference) for run in self.nudged(way)) for way in (NUDGED, ROUNDED)}

    @property
    def yardstick(self) -> float:
        return max(*self.yardsticks().values(), ROUNDING)

    @property
    def agrees(self) -> bool:
        """False also for a loss that is nan."""
        return max(self.gaps().values()) <= MARGIN * self.yardstick

    def exact(self) -> dict[str, float]:
        reference = np.array(self.run(TORCH, "float64")["losses"])
        return {
            way: float(np.abs(np.array(self.run(way, "float64")["losses"]) - reference).max()) for way in (DROP_IN, JAX)
        }

    def buffers(self, other: dict[str, Any], dtype: str = "float32") -> float:
        """Of batch norm's running means and variances: the norm of the difference over that of torch.optim's."""
        reference = self.run(TORCH, dtype)["buffers"]
        names = [name for name in reference if not name.endswith("num_batches_tracked")]
        own, theirs = (np.concatenate([b[name] for name in names]) for b in (other["buffers"], reference))
        return float(np.linalg.norm(own - theirs) / np.linalg.norm(theirs))

    def numbers(self) -> dict[str, Any]:
        """All that others may want to cite."""
        ways = {}
        for (way, dtype, _), run in self.runs.items():
            if dtype == "float32" and way in WAYS:
                ways[way] = {
                    "final loss": last(run),
                    self.workload.measure: run["qualities"][-1][1],
                    "best": (max if self.workload.higher else min)(q for _, q in run["qualities"]),
                    "ms": milliseconds(run),
                    "first step, s": run["seconds"][0],
                    "s to goal": self.to_goal(run),
                    "steps to goal": next((n for n, q in run["qualities"] if self.workload.reached(q)), None),
                }
        found = {
            "workload": self.workload.name,
            "optimizer": str(self.recipe),
            "lr": self.recipe.lr,
            "arguments": self.recipe.arguments,
            "steps": len(self.run(TORCH)["losses"]),
            "ways": ways,
        }
        if self.compared:
            found |= {"difference": self.gaps(), "torch from itself": self.yardsticks(), "float64": self.exact()}
        return found

    def to_goal(self, run: dict[str, Any]) -> float | None:
        for n, quality in run["qualities"]:
            if self.workload.reached(quality):
                return sum(run["seconds"][1:n])
        return None


def last(run: dict[str, Any]) -> float:
    return float(np.mean(run["losses"][-SMOOTH:]))


def milliseconds(run: dict[str, Any]) -> float:
    return 1e3 * float(np.median(run["seconds"][1:]))


def exponent(x: float) -> str:
    return "0" if x == 0 else f"{x:.1e}"


# --- tables


def agreement(result: Result) -> Row:
    gaps, exact = result.gaps(), result.exact()
    row: Row = {"optimizer": str(result.recipe), "lr": f"{result.recipe.lr:g}"}
    row |= {f"{way}: difference": exponent(x) for way, x in gaps.items()}
    row |= {way: exponent(x) for way, x in result.yardsticks().items()}
    row |= {"agree": "yes" if result.agrees else "NO"}
    row |= {f"{way}, float64": exponent(x) for way, x in exact.items()}
    if result.run(TORCH)["buffers"]:
        row |= {
            f"statistics, {way}": exponent(result.buffers(result.run(way))) for way in (DROP_IN, JAX)
        } | {
            "statistics, one ulp": exponent(max(map(result.buffers, result.nudged(NUDGED, ROUNDED)))),
            "statistics, JAX, float64": exponent(result.buffers(result.run(JAX, "float64"), "float64")),
        }  # fmt: skip
    return row


def outcome(result: Result) -> Row:
    row: Row = {"optimizer": str(result.recipe)}
    floor = getattr(result.workload, "floor", None)
    for way in WAYS:
        row[f"{way}: {result.workload.measure}"] = f"{result.run(way)['qualities'][-1][1]:.3f}"
    if floor:
        row["over the floor"] = f"{result.run(TORCH)['qualities'][-1][1] / floor:.2f}"
    row |= {f"{way}, ms": milliseconds(result.run(way)) for way in WAYS}
    row |= {f"{way}, s to goal": result.to_goal(result.run(way)) for way in WAYS}
    row |= {f"{way}, first step, s": result.run(way)["seconds"][0] for way in (DROP_IN, JAX)}
    return row


def rates(results: list[Result]) -> list[Row]:
    """By torch.optim, at each learning rate."""
    rows = []
    for result in results:
        numbers = result.numbers()["ways"][TORCH]
        row: Row = {"optimizer": str(result.recipe), "lr": f"{result.recipe.lr:g}"}
        rows.append(row | {k: numbers[k] for k in ("final loss", result.workload.measure, "best", "steps to goal")})
    return rows


def section(results: list[Result]) -> Section:
    by_workload: dict[str, list[Result]] = {}
    for result in results:
        by_workload.setdefault(result.workload.name, []).append(result)
    text, tables, targets = [TEXT, ""], {}, []
    for of_one in by_workload.values():
        workload = of_one[0].workload
        compared = [r for r in of_one if r.compared]
        text.append(
            f"- **{workload.title}.** Data: {workload.source}. Goal: {workload.measure} of at "
            f"{'least' if workload.higher else 'most'} {workload.goal:.3g}."
        )
        tables[f"{workload.title}: agreement"] = [agreement(r) for r in compared]
        tables[f"{workload.title}: quality and time"] = [outcome(r) for r in compared]
        if len(of_one) > len(compared):
            tables[f"{workload.title}: learning rates"] = rates(of_one)
        worst = max(max(r.gaps().values()) / r.yardstick for r in compared)
        targets.append(
            Target(f"{workload.name}: difference of losses from torch over what one ulp makes", MARGIN, worst, True)
        )
    return Section("Workloads", "\n".join(text), tables, [], targets)


# --- files


def write(results: list[Result], machine: dict[str, Any], out: Path) -> None:
    seconds = sum(sum(run["seconds"]) for r in results for run in r.runs.values())  # of the steps, whenever they ran
    out.mkdir(parents=True, exist_ok=True)
    found = section(results)
    content = {"machine": machine, "seconds": round(seconds)} | dataclasses.asdict(found)
    content["runs"] = [r.numbers() for r in results]
    (out / "workloads.json").write_text(report.as_json(finite(content)) + "\n")
    (out / "workloads.md").write_text(report.page("workloads", found, machine))
    plot([r for r in results if r.compared], out / "workloads.png")


def finite(x: Any) -> Any:
    """None for what JSON has no number for."""
    if isinstance(x, dict):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def plot(results: list[Result], path: Path) -> None:
    """For each workload its first optimizer's losses, and all optimizers' differences beside one ulp's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r.workload.name for r in results))
    _, axes = plt.subplots(len(names), 2, figsize=(13, 3.8 * len(names)), constrained_layout=True, squeeze=False)
    for (left, right), name in zip(axes, names, strict=True):
        of_one = [r for r in results if r.workload.name == name]
        first = of_one[0]
        for way, style in zip(
            WAYS, (dict(lw=5, color="0.75"), dict(lw=2.2, color="C1"), dict(lw=1, color="C0")), strict=True
        ):
            left.plot(smooth(first.run(way)["losses"]), label=way, **style)
        left.set(title=f"{first.workload.name}, {first.recipe}", xlabel="step", ylabel=f"loss, mean of {SMOOTH}")
        left.set_yscale("log")
        left.legend(fontsize=8)
        for i, result in enumerate(of_one):
            lowest = 1e-9  # an equal run has to be seen
            for way, color in ((NUDGED, "0.6"), (ROUNDED, "0.3")):
                away = [max(gap(run["losses"], result.run(TORCH)["losses"]), lowest) for run in result.nudged(way)]
                label = {"label": f"torch.optim, {way}"} if i == 0 else {}
                right.plot([i] * len(away), away, "_", ms=16, mew=2, color=color, **label)
            for way, marker, color, shift in ((DROP_IN, "o", "C1", -0.15), (JAX, "^", "C0", 0.15)):
                label = {"label": way} if i == 0 else {}
                right.plot(i + shift, max(result.gaps()[way], lowest), marker, color=color, **label)
        right.set_yscale("log")
        right.set_xticks(
            range(len(of_one)), [str(r.recipe).replace(", ", "\n") for r in of_one], fontsize=8, rotation=45
        )
        right.set(title="Away from torch.optim", ylabel="largest difference of loss (1e-9: 0)")
        right.legend(fontsize=8)
    plt.savefig(path, dpi=90)
    plt.close()
