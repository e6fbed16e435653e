"""What a sweep found: its runs, the setting to use with the reason, a table and a picture."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
      optimizer: its label.
      lr: the learning rate.
      hyperparameters: the other swept numbers by name.
      seed: of the initial parameters.
      final: the mean loss of the last tenth of the steps.
      best: the lowest loss of any step.
      diverged: a loss was nan or infinite, or `final` is above the sweep's multiple of the first loss.
      curve: the loss of each step before the step was taken, (steps,), float64.
    """

    optimizer: str
    lr: float
    hyperparameters: Mapping[str, Any]
    seed: int
    final: float
    best: float
    diverged: bool
    curve: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The runs that differ in their seed alone.

    Attributes:
      optimizer, lr, hyperparameters: as of the runs.
      finals: `final` by seed; infinite where the run diverged.
      diverged: how many runs did.
    """

    optimizer: str
    lr: float
    hyperparameters: Mapping[str, Any]
    finals: tuple[float, ...]
    diverged: int

    @property
    def median(self) -> float:
        """Over the seeds; infinite where half of them diverged."""
        return float(np.median(self.finals))

    @property
    def label(self) -> str:
        return label(self.optimizer, self.hyperparameters)


@dataclasses.dataclass(frozen=True)
class Best:
    """The setting to use: `getattr(jopt, best.optimizer)(lr=best.lr, **best.hyperparameters)` if it has jopt's name.

    Attributes:
      optimizer, lr, hyperparameters: the setting.
      loss: its final loss, the median over the seeds.
      at_edge: the lowest loss is at an end of the learning rates tried, so that a lower one may lie beyond.
      reason: in words.
    """

    optimizer: str
    lr: float
    hyperparameters: Mapping[str, Any]
    loss: float
    at_edge: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of `jopt.sweep`, in the order optimizer, other numbers, learning rate, seed.

    `pandas.DataFrame(result.runs)` makes a data frame of them; `print(result)` shows a row a setting.

    Attributes:
      runs: all of them.
      divergence: the multiple of its first loss above which a run's `final` counts as diverged.
    """

    runs: tuple[Run, ...]
    divergence: float

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The runs, seeds put together."""
        groups: dict[Any, list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.optimizer, run.lr, tuple(run.hyperparameters.items())), []).append(run)
        return tuple(
            Setting(
                runs[0].optimizer,
                runs[0].lr,
                runs[0].hyperparameters,
                tuple(math.inf if r.diverged else r.final for r in runs),
                sum(r.diverged for r in runs),
            )
            for runs in groups.values()
        )

    def lines(self) -> dict[str, list[Setting]]:
        """The settings by optimizer and other numbers, each by rising learning rate."""
        lines: dict[str, list[Setting]] = {}
        for setting in self.settings:
            lines.setdefault(setting.label, []).append(setting)
        return {name: sorted(line, key=lambda s: s.lr) for name, line in lines.items()}

    def best(self, optimizer: str | None = None) -> Best:
        """The setting to use, of one optimizer (its label) or of all.

        Of the settings none of whose seeds diverged, that with the lowest final loss, the median over the seeds,
        names optimizer and other numbers. Learning rates within noise of it are as good (their loss is higher by no
        more than one standard error, from the differences seed by seed); of those the largest is taken that has no
        diverging neighbour above, since it goes furthest in as many steps.

        Raises:
          ValueError: no such optimizer, or every setting has a seed that diverged.
        """
        labels = list(dict.fromkeys(run.optimizer for run in self.runs))
        if optimizer is not None and optimizer not in labels:
            raise ValueError(f"optimizer: expected one of {', '.join(labels)}, found {optimizer!r}")
        lines = [line for line in self.lines().values() if optimizer in (None, line[0].optimizer)]
        stable = [(s, line) for line in lines for s in line if not s.diverged]
        if not stable:
            lowest = min(line[0].lr for line in lines)
            raise ValueError(f"best: a run diverged at every learning rate, down to {lowest:.3g}; sweep smaller ones")
        minimum, line = min(stable, key=lambda pair: pair[0].median)
        return _choose(minimum, line, others=len(lines) > 1)

    def __str__(self) -> str:
        settings = [s for line in self.lines().values() for s in line]
        names = list(dict.fromkeys(name for s in settings for name in s.hyperparameters))
        seeds = len(settings[0].finals)
        head = ["optimizer", "lr", *names, "final loss", "lowest", "highest", "diverged", ""]
        try:
            best = self.best()
            reason = best.reason
        except ValueError as error:
            best, reason = None, str(error)
        rows = []
        for s in settings:
            chosen = best is not None and (s.lr, s.label) == (best.lr, label(best.optimizer, best.hyperparameters))
            rows.append(
                [
                    s.optimizer,
                    f"{s.lr:.3g}",
                    *(text(s.hyperparameters.get(name, "")) for name in names),
                    *(f"{x:.4g}" for x in (s.median, min(s.finals), max(s.finals))),
                    f"{s.diverged}/{seeds}" if s.diverged else "",
                    "<- best" if chosen else "",
                ]
            )
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
        return "\n".join([*lines, "", reason])

    def plot(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Draw the final loss over the learning rate: a line an optimizer, a band from the lowest to the highest seed.

        Crosses at the top are learning rates at which a seed diverged, the star is `best()`. Needs matplotlib.
        `path` may be an open binary file, which gets a PNG.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        finite = [x for s in self.settings for x in s.finals if math.isfinite(x)]
        for i, (name, line) in enumerate(self.lines().items()):
            lrs = [s.lr for s in line]
            # Of the seeds that did not diverge.
            kept = [[x for x in s.finals if math.isfinite(x)] or [math.nan] for s in line]
            axis.plot(lrs, [np.median(x) for x in kept], "o-", color=f"C{i % 10}", label=name, markersize=4)
            axis.fill_between(lrs, [min(x) for x in kept], [max(x) for x in kept], color=f"C{i % 10}", alpha=0.15, lw=0)
            lost = [s.lr for s in line if s.diverged]
            # In the axis' own height, each optimizer in a row of its own.
            height = [0.98 - 0.03 * i] * len(lost)
            axis.plot(lost, height, "x", color=f"C{i % 10}", transform=axis.get_xaxis_transform())
        if any(not s.diverged for s in self.settings):
            best = self.best()
            axis.plot(best.lr, best.loss, "*", color="black", markersize=14, label=f"best: lr {best.lr:.3g}")
        axis.set_xscale("log")
        if finite and min(finite) > 0:
            axis.set_yscale("log")
        axis.set(xlabel="learning rate", ylabel="final loss", title="Final loss; x: a seed diverged")
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=120)


def _choose(minimum: Setting, line: list[Setting], *, others: bool) -> Best:
    """Among the learning rates of the line that has the lowest loss."""
    alike = [s for s in line if not s.diverged and _within_noise(s, minimum)]
    lost = min((s.lr for s in line if s.diverged), default=math.inf)

    def next_to_divergence(s: Setting) -> bool:
        above = [t for t in line if t.lr > s.lr]
        return bool(above) and above[0].diverged > 0

    safe = [s for s in alike if not next_to_divergence(s)] or alike
    chosen = max(safe, key=lambda s: s.lr)
    seeds = len(chosen.finals)
    edge = [side for side, end in (("below", line[0]), ("above", line[-1])) if end is minimum and len(line) > 1]

    words = [
        f"{chosen.optimizer}, lr {chosen.lr:.3g}"
        + "".join(f", {name} {text(x)}" for name, x in chosen.hyperparameters.items())
        + f": final loss {chosen.median:.4g}"
        + (f", the median over {seeds} seeds." if seeds > 1 else " of one seed, so that its noise is not known.")
    ]
    what = f"The lowest{' of all optimizers and settings' if others else ''}"
    if chosen is minimum:
        words.append(f"{what}.")
    else:
        words.append(
            f"{what} is {minimum.median:.4g} at lr {minimum.lr:.3g}, within one standard error of it over seeds."
        )
    if len(alike) > 1:
        low, high = min(s.lr for s in alike), max(s.lr for s in alike)
        words.append(f"From lr {low:.3g} to {high:.3g} losses are alike within noise; the larger goes further a step.")
        if max(alike, key=lambda s: s.lr) not in safe:
            words.append("The largest of them is left out since the next one up diverges.")
    if lost < math.inf:
        words.append(f"Runs diverge from lr {lost:.3g}, which is {lost / chosen.lr:.3g} times this one.")
    else:
        words.append("No run diverged with it.")
    if edge:
        words.append(
            f"The lowest loss is at the edge of the grid: sweep learning rates {edge[0]} {minimum.lr:.3g} too."
        )
    return Best(chosen.optimizer, chosen.lr, chosen.hyperparameters, chosen.median, bool(edge), " ".join(words))


def _within_noise(setting: Setting, minimum: Setting) -> bool:
    """Seeds start from the same parameters at every learning rate: it is their differences that scatter."""
    gaps = np.subtract(setting.finals, minimum.finals)
    if len(gaps) < 2:
        return setting is minimum
    return bool(gaps.mean() <= gaps.std(ddof=1) / math.sqrt(len(gaps)))


def label(optimizer: str, hyperparameters: Mapping[str, Any]) -> str:
    return ", ".join([optimizer, *(f"{name} {text(x)}" for name, x in hyperparameters.items())])


def text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(text, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def collect(
    labels: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    losses: np.ndarray,
    divergence: float,
) -> Sweep:
    """The result of runs in the order of (label, setting) and in it of seeds, whose losses are (runs, steps)."""
    runs = []
    curves = losses.reshape(len(settings), len(seeds), -1)
    for name, setting, by_seed in zip(labels, settings, curves, strict=True):
        others = {k: v for k, v in setting.items() if k != "lr"}
        for seed, curve in zip(seeds, by_seed, strict=True):
            final = float(tail(curve))
            best = float(np.min(curve, where=~np.isnan(curve), initial=math.inf))
            runs.append(Run(name, setting["lr"], others, seed, final, best, has_diverged(curve, divergence), curve))
    return Sweep(tuple(runs), divergence)


def tail(curve: np.ndarray) -> np.floating:
    """The mean over the last tenth of the steps, at least one."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.mean(curve[-max(1, len(curve) // 10) :])


def has_diverged(curve: np.ndarray, multiple: float) -> bool:
    """Something is not finite, or the end is above `multiple` times the start; a negative one is as far above."""
    start = curve[0]
    return not np.isfinite(curve).all() or bool(tail(curve) > start + (multiple - 1) * abs(start))
