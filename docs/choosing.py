"""Sweeps learning rates of eight optimizers on three problems, and writes what they show to docs/choosing.md.

make choosing

Every number of the page comes from here, and so does each verdict: a piece of advice holds where the figure beside it
is as the advice says. Three minutes on two cores.
"""

import argparse
import functools
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import jopt
from examples.porting_a_run import load as load_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LRS = np.geomspace(1e-5, 100, 22)  # a factor of 2.15 from one to the next
SEEDS = 3
GOOD = 0.95  # of the way from the first loss to the lowest that any optimizer reached
OPTIMIZERS = {
    "SGD": jopt.sgd,
    "SGD, momentum 0.9": functools.partial(jopt.sgd, momentum=0.9),
    "Adagrad": jopt.adagrad,
    "RMSprop": jopt.rmsprop,
    "Adam": jopt.adam,
    "AdamW": jopt.adamw,
    "NAdam": jopt.nadam,
    "RAdam": jopt.radam,
}
ADAPTIVE = ("Adagrad", "RMSprop", "Adam", "AdamW", "NAdam", "RAdam")


class Problem(NamedTuple):
    """What is learned: a loss of parameters and a batch, the parameters' start, and batches by the step."""

    what: str
    loss: Callable[[Any, Any], Any]
    init: Callable[[Any], Any]
    batch: Callable[[int], Any]
    steps: int


# --- the problems


def dense(key: Any, shape: tuple[int, int]) -> jax.Array:
    return jax.random.normal(key, shape) / shape[0] ** 0.5


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def images(size: int = 64, steps: int = 300) -> Problem:
    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)

    def init(key: Any) -> Any:
        a, b, c = jax.random.split(key, 3)
        return {
            "a": dense(a, (64, 64)),
            "b": dense(b, (64, 64)),
            "c": dense(c, (64, 10)),
            **{name: jnp.zeros(n) for name, n in (("a_bias", 64), ("b_bias", 64), ("c_bias", 10))},
        }

    def loss(p: Any, batch: Any) -> Any:
        x = jax.nn.relu(batch[0] @ p["a"] + p["a_bias"])
        x = jax.nn.relu(x @ p["b"] + p["b_bias"])
        return cross_entropy(x @ p["c"] + p["c_bias"], batch[1])

    def batch(step: int) -> Any:
        at = np.random.default_rng(step).integers(0, len(x), size)
        return x[at], y[at]

    return Problem("scikit-learn's digits, three dense layers", loss, init, batch, steps)


def text() -> Problem:
    data, characters = load_text(None)
    context, width, hidden = 8, 16, 128

    def init(key: Any) -> Any:
        a, b, c = jax.random.split(key, 3)
        return {
            "embed": jax.random.normal(a, (characters, width)) * 0.1,
            "hidden": dense(b, (context * width, hidden)),
            "out": dense(c, (hidden, characters)),
            "hidden_bias": jnp.zeros(hidden),
            "out_bias": jnp.zeros(characters),
        }

    def loss(p: Any, batch: Any) -> Any:
        x = p["embed"][batch[0]].reshape(len(batch[0]), -1)
        return cross_entropy(jnp.tanh(x @ p["hidden"] + p["hidden_bias"]) @ p["out"] + p["out_bias"], batch[1])

    def batch(step: int) -> Any:
        at = np.random.default_rng(step).integers(0, len(data) - context - 1, 64)
        return data[at[:, None] + np.arange(context)], data[at + context]

    return Problem("the next character of Python's help texts from the eight before it", loss, init, batch, 300)


def ratings() -> Problem:
    users, items, rank, noise = 300, 200, 4, 0.3
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((users, rank)), rng.standard_normal((items, rank))
    i, j = rng.integers(0, users, 20000), rng.integers(0, items, 20000)
    r = ((u[i] * v[j]).sum(1) / rank**0.5 + noise * rng.standard_normal(len(i))).astype(np.float32)
    i, j = i.astype(np.int32), j.astype(np.int32)

    def init(key: Any) -> Any:
        a, b = jax.random.split(key)
        return {"user": 0.1 * jax.random.normal(a, (users, rank)), "item": 0.1 * jax.random.normal(b, (items, rank))}

    def loss(p: Any, batch: Any) -> Any:
        return jnp.mean((jnp.sum(p["user"][batch[0]] * p["item"][batch[1]], axis=1) - batch[2]) ** 2)

    def batch(step: int) -> Any:
        at = np.random.default_rng(step).integers(0, len(r), 256)
        return i[at], j[at], r[at]

    what = f"generated ratings of rank {rank}, whose noise alone costs {noise**2:.2f}, factorised"
    return Problem(what, loss, init, batch, 600)


# --- what sweeps say


def sweep(problem: Problem, optimizers: Any, bar: Any, **arguments: Any) -> Any:
    def counted(jobs: Any) -> Iterable[Any]:
        for job in jobs:
            yield job
            bar.update()

    return jopt.sweep(
        problem.loss,
        problem.init,
        problem.batch,
        **dict(steps=problem.steps, lr=LRS, seeds=SEEDS, optimizers=optimizers, progress=counted) | arguments,
    )


class Line:
    """An optimizer's final losses over the learning rates, as shares of the best fall."""

    def __init__(self, settings: Any, first: float, lowest: float):
        self.lrs = [s.lr for s in settings]
        self.losses = [s.median if not s.diverged else math.inf for s in settings]
        self.lost = min((s.lr for s in settings if s.diverged), default=math.inf)
        self.falls = [max((first - x) / (first - lowest), 0.0) if math.isfinite(x) else 0.0 for x in self.losses]

    @property
    def at(self) -> int:
        return int(np.argmin(self.losses))

    @property
    def best(self) -> float:
        return self.lrs[self.at]

    @property
    def fall(self) -> float:
        return self.falls[self.at]

    @property
    def width(self) -> float:
        """From the smallest to the largest learning rate that is good, as a factor; 0 if none is."""
        good = [lr for lr, fall in zip(self.lrs, self.falls, strict=True) if fall >= GOOD]
        return max(good) / min(good) if good else 0.0

    def at_lr(self, lr: float) -> float:
        return self.falls[int(np.argmin(np.abs(np.log(np.array(self.lrs) / lr))))]


def lines(result: Any) -> dict[str, Line]:
    settings = result.lines()
    first = float(np.median([run.curve[0] for run in result.runs]))
    lowest = min(s.median for line in settings.values() for s in line if not s.diverged)
    return {name: Line(line, first, lowest) for name, line in settings.items()}


def factor(x: float) -> str:
    return "none" if x == 0 else "never" if math.isinf(x) else f"{x:.2g}x" if x < 100 else f"{x:.0f}x"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def verdict(holds: list[bool]) -> str:
    return "holds" if all(holds) else f"holds in {sum(holds)} of {len(holds)}" if any(holds) else "does not hold"


class Advice(NamedTuple):
    text: str
    figures: str
    holds: list[bool]


def advice(found: dict[str, dict[str, Line]], cosine: Any, batches: Any, ranges: Any) -> list[Advice]:
    """Each piece of advice, what was measured, and whether it is so in each case."""

    def each(show: Callable[[dict[str, Line]], str]) -> str:
        return "; ".join(f"{name} {show(line)}" for name, line in found.items())

    every = list(found.values())
    widest = [np.median([line[name].width for name in ADAPTIVE]) for line in every]
    coarse = {
        name: min(
            max(x.falls[i] for i in range(start, len(LRS), 3)) / x.fall for x in line.values() for start in range(3)
        )
        for name, line in found.items()
    }
    sizes = sorted(batches)
    growth = {name: batches[sizes[-1]][name].best / batches[sizes[0]][name].best for name in batches[sizes[0]]}
    return [
        Advice(
            "Adam with its default learning rate of 0.001 is a good first choice.",
            f"Share of the best fall at 0.001: {each(lambda x: percent(x['Adam'].at_lr(1e-3)))}.",
            [x["Adam"].at_lr(1e-3) >= GOOD for x in every],
        ),
        Advice(
            "Tuned, Adam is as good as any.",
            f"Share at its best learning rate: {each(lambda x: percent(x['Adam'].fall))}.",
            [x["Adam"].fall >= GOOD for x in every],
        ),
        Advice(
            "The learning rate matters more than the optimizer.",
            "The worst optimizer, tuned: "
            + each(lambda x: percent(min(y.fall for y in x.values())))
            + "; Adam a factor of 10 above or below its best learning rate: "
            + each(lambda x: percent(min(x["Adam"].at_lr(x["Adam"].best * f) for f in (0.1, 10))))
            + ".",
            [
                min(y.fall for y in x.values()) > min(x["Adam"].at_lr(x["Adam"].best * f) for f in (0.1, 10))
                for x in every
            ],
        ),
        Advice(
            "A learning rate is one optimizer's own: do not carry it to another.",
            "Best of SGD over best of Adam: " + each(lambda x: factor(x["SGD"].best / x["Adam"].best)) + ".",
            [x["SGD"].best / x["Adam"].best >= 5 for x in every],
        ),
        Advice(
            "RMSprop and Adam take about the same.",
            "Best of RMSprop over best of Adam: " + each(lambda x: factor(x["RMSprop"].best / x["Adam"].best)) + ".",
            [1 / 3 <= x["RMSprop"].best / x["Adam"].best <= 3 for x in every],
        ),
        Advice(
            "Adaptive optimizers forgive a wrong learning rate.",
            f"Good learning rates span, SGD {each(lambda x: factor(x['SGD'].width))}; the median of the adaptive ones "
            + "; ".join(f"{name} {factor(float(w))}" for name, w in zip(found, widest, strict=True))
            + ".",
            [bool(w > x["SGD"].width) for w, x in zip(widest, every, strict=True)],
        ),
        Advice(
            "With a momentum of 0.9 take a tenth of plain SGD's learning rate.",
            "Best with momentum over best without: "
            + each(lambda x: factor(x["SGD, momentum 0.9"].best / x["SGD"].best))
            + ".",
            [1 / 30 <= x["SGD, momentum 0.9"].best / x["SGD"].best <= 1 / 3 for x in every],
        ),
        Advice(
            "Momentum speeds up SGD.",
            "Share of the best fall in the same steps, without and with: "
            + each(lambda x: f"{percent(x['SGD'].fall)} and {percent(x['SGD, momentum 0.9'].fall)}")
            + ".",
            [x["SGD, momentum 0.9"].fall > x["SGD"].fall for x in every],
        ),
        Advice(
            "Take the largest learning rate that does not diverge, and less: a third to a tenth.",
            "Where SGD diverges over its best: " + each(lambda x: factor(x["SGD"].lost / x["SGD"].best)) + ".",
            [x["SGD"].lost / x["SGD"].best <= 12 for x in every],
        ),
        Advice(
            "Let the learning rate decay.",
            "Final loss with a cosine over without, each at its best: "
            + "; ".join(f"{name} {x:.2f}" for name, x in cosine.items())
            + ".",
            [x < 1 for x in cosine.values()],
        ),
        Advice(
            "A larger batch takes a larger learning rate.",
            f"Best for batches of {sizes[-1]} over best for {sizes[0]} of the digits: "
            + "; ".join(f"{name} {factor(x)}" for name, x in growth.items())
            + ".",
            [x > 1.5 for x in growth.values()],
        ),
        Advice(
            "Search by factors of ten first.",
            "The worst optimizer's share of its best fall on a grid of powers of ten, wherever that begins: "
            + "; ".join(f"{name} {percent(x)}" for name, x in coarse.items())
            + ".",
            [x >= 0.9 for x in coarse.values()],
        ),
        Advice(
            "A range test of one run finds it.",
            "Share of the best fall at the learning rate that `lr_range_test` suggests, SGD and Adam: "
            + "; ".join(f"{name} {' and '.join(percent(x) for x in pair)}" for name, pair in ranges.items())
            + ".",
            [x >= 0.9 for pair in ranges.values() for x in pair],
        ),
    ]


# --- the page


def table(found: dict[str, dict[str, Line]]) -> str:
    head = "| | " + " | ".join(f"{name}: best lr | fall | good lr span | diverges from" for name in found) + " |"
    rows = [head, "|---|" + "---:|" * (4 * len(found))]
    for optimizer in OPTIMIZERS:
        cells = []
        for line in found.values():
            x = line[optimizer]
            lost = f"{x.lost:.2g}" if math.isfinite(x.lost) else "-"
            cells += [f"{x.best:.2g}", percent(x.fall), factor(x.width), lost]
        rows.append(f"| {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


PAGE = """# Choosing an optimizer and a learning rate

What is usually advised, and what {runs} runs say to it: eight optimizers, {lrs} learning rates from 1e-5 to 100,
{seeds} seeds, three problems, constant learning rates. `make choosing` makes all runs again, in {minutes} minutes, and
writes this page; the verdicts are computed.

{problems}

![final loss over the learning rate](choosing.png)

*Fall*: how far the final loss (the mean of the last tenth of the steps, the median over the seeds) has come from the
first loss towards the lowest that any of the eight reached. *Good* is {good} of it. *Span*: the largest good learning
rate over the smallest.

{table}

## The advice

| | measured | |
|---|---|---|
{advice}

## What to do

1. Start with AdamW or Adam at 0.001 to see that all works. It is seldom the best: here it takes {adam} of the fall.
2. Sweep the learning rate by factors of ten, then of two or three around the best, with three seeds:
   `jopt.sweep(loss, init, batches, lr=np.geomspace(1e-5, 10, 7))` is one compiled program, and `result.best().reason`
   says how sure it is ([sweeps](sweeps.md)); for a PyTorch model `interop.sweep`.
3. Changing optimizer, momentum or batch, sweep again: the best learning rates of one problem differ by up to {spread}
   between optimizers.
4. Keep a distance from where runs diverge, clip gradients (`jopt.clip_grad_norm`) if they do so late, and try a
   schedule that decays to nothing ([schedules](schedules.md)).
5. If nothing learns at any rate look at the gradients, not at the optimizer:
   [vanishing gradients](vanishing-gradients.md).

## What this does not say

These are small problems, a few hundred steps, and training losses. What generalises better, and what a large model
wants after 100,000 steps, no sweep of a minute shows. Longer runs reach as far with smaller learning rates. The order
in which to search is the same.

Measured with jax {jax} on {machine}.
"""


def draw(results: dict[str, dict[str, Line]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(4.6 * len(results) + 1.8, 4.3), constrained_layout=True)
    for axis, (name, line) in zip(np.atleast_1d(axes), results.items(), strict=True):
        for i, (optimizer, x) in enumerate(line.items()):
            finite = [loss if math.isfinite(loss) else math.nan for loss in x.losses]
            axis.plot(x.lrs, finite, ".-", color=f"C{i}", label=optimizer)
            if math.isfinite(x.lost):
                axis.plot(x.lost, 0.98 - 0.03 * i, "x", color=f"C{i}", transform=axis.get_xaxis_transform())
        axis.set(xscale="log", yscale="log", xlabel="learning rate", title=name)
    np.atleast_1d(axes)[0].set_ylabel("final loss (x: a seed diverges from here)")
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="the folder of the page and the picture")
    parser.add_argument("--steps", type=int, help="instead of each problem's own; for a try")
    arguments = parser.parse_args(argv)

    def cut(problem: Problem) -> Problem:
        return problem if arguments.steps is None else problem._replace(steps=arguments.steps)

    problems = {"images": cut(images()), "text": cut(text()), "ratings": cut(ratings())}
    two = {name: OPTIMIZERS[name] for name in ("SGD", "Adam")}
    sizes = {16: cut(images(16)), 256: cut(images(256))}
    with tqdm(total=len(problems) * (len(OPTIMIZERS) + 2) + 2 * len(sizes), unit="sweep") as bar:
        results = {name: sweep(problem, OPTIMIZERS, bar) for name, problem in problems.items()}
        found = {name: lines(result) for name, result in results.items()}
        cosine = {}
        for name, problem in problems.items():
            schedule = jopt.schedules.cosine_annealing_lr(1.0, T_max=problem.steps)
            decayed = lines(sweep(problem, two, bar, schedule=schedule))
            for optimizer, line in decayed.items():
                cosine[f"{optimizer} on {name}"] = min(line.losses) / min(found[name][optimizer].losses)
        batches = {size: lines(sweep(problem, two, bar)) for size, problem in sizes.items()}
        ranges = {}
        for name, problem in problems.items():
            shares = []
            for optimizer in two:
                test = jopt.lr_range_test(
                    problem.loss, problem.init, problem.batch, steps=problem.steps, optimizer=OPTIMIZERS[optimizer]
                )
                shares.append(found[name][optimizer].at_lr(test.suggestion) if test.suggestion else 0.0)
            ranges[name] = tuple(shares)
        minutes = math.ceil(bar.format_dict["elapsed"] / 60)

    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(found, arguments.out / "choosing.png")
    runs = sum(len(result.runs) for result in results.values())
    page = PAGE.format(
        runs=runs,
        lrs=len(LRS),
        seeds=SEEDS,
        minutes=minutes,
        good=percent(GOOD),
        problems="\n".join(f"- **{name}**: {p.what}; {p.steps} steps." for name, p in problems.items()),
        table=table(found),
        advice="\n".join(
            f"| {item.text} | {item.figures} | **{verdict(item.holds)}** |"
            for item in advice(found, cosine, batches, ranges)
        ),
        adam=", ".join(percent(line["Adam"].at_lr(1e-3)) for line in found.values()),
        spread=factor(max(max(x.best for x in f.values()) / min(x.best for x in f.values()) for f in found.values())),
        jax=jax.__version__,
        machine=f"{platform.machine()}, {jax.devices()[0].platform}",
    )
    (arguments.out / "choosing.md").write_text(page)


if __name__ == "__main__":
    main()
