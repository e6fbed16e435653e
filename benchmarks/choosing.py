"""Sweeps learning rates of eight optimizers on three problems, and writes what they show to docs/choosing.md.

make choosing

Every number of the page comes from here, and so does each verdict: a piece of advice holds where the figure beside it
is as the advice says. Six minutes on two cores.
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
from benchmarks import report
from examples.porting_a_run import load as load_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent.parent / "docs"
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


def images(size: int = 64, layers: int = 3, rows: int | None = None) -> Problem:
    digits = load_digits()
    x, y = (digits.data[:rows] / 16).astype(np.float32), digits.target[:rows].astype(np.int32)

    def init(key: Any) -> Any:
        widths = [(64, 64)] * (layers - 1) + [(64, 10)]
        keys = jax.random.split(key, layers)
        return [{"weight": dense(k, w), "bias": jnp.zeros(w[1])} for k, w in zip(keys, widths, strict=True)]

    def loss(p: Any, batch: Any) -> Any:
        x = batch[0]
        for layer in p[:-1]:
            x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
        return cross_entropy(x @ p[-1]["weight"] + p[-1]["bias"], batch[1])

    def batch(step: int) -> Any:
        at = np.random.default_rng(step).integers(0, len(x), size)
        return x[at], y[at]

    return Problem("scikit-learn's digits, three dense layers", loss, init, batch, 300)


def deep(gradients: str, cure: str = "") -> Problem:
    """30 layers on the digits: tanh, begun as torch.nn.Linear begins, or ReLU, each begun 1.2 times too large."""
    activation, start = {"vanish": (jnp.tanh, 3**-0.5), "explode": (jax.nn.relu, 1.7)}[gradients]

    def init(key: Any) -> Any:
        a, b, c = jax.random.split(key, 3)
        layers = start * jax.random.normal(b, (30, 64, 64)) / 8
        return {"in": dense(a, (64, 64)), "layers": layers, "out": dense(c, (64, 10))}

    def loss(p: Any, batch: Any) -> Any:
        def layer(h: Any, weight: Any) -> Any:
            x = h @ weight
            if cure == "batch norm":
                x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
            return (h + activation(x) if cure == "residual" else activation(x)), None

        h, _ = jax.lax.scan(layer, activation(batch[0] @ p["in"]), p["layers"])
        return cross_entropy(h @ p["out"], batch[1])

    return Problem("", loss, init, images().batch, 300)


def text(rows: int | None = None) -> Problem:
    data, characters = load_text(None)
    data = data[:rows]
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
    def loss(self) -> float:
        """The lowest final loss."""
        return self.losses[self.at]

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


class Article(NamedTuple):
    """What is measured for the advice of an article: optimizers' lines by problem."""

    simple: dict[str, Line]  # one layer
    images: dict[str, Line]  # three
    complex: dict[str, Line]  # eight
    all_data: dict[str, dict[str, Line]]
    little_data: dict[str, dict[str, Line]]
    short: dict[str, dict[str, Line]]  # a tenth of the steps
    deep: dict[str, dict[str, float]]  # by what its gradients do: the lowest final loss of each remedy


LEARNS = 1.15  # half of the loss of a guess
REMEDIES = {
    "SGD": ("SGD", ""),
    "momentum": ("SGD, momentum 0.9", ""),
    "RMSprop": ("RMSprop", ""),
    "residual": ("SGD", "residual"),
    "batch norm": ("SGD", "batch norm"),
}


def article(found: dict[str, dict[str, Line]], cut: Callable[[Problem], Problem], bar: Any) -> Article:
    two = {name: OPTIMIZERS[name] for name in ("SGD", "Adam")}
    four = {name: OPTIMIZERS[name] for name in ("SGD", "SGD, momentum 0.9", "RMSprop", "Adam")}

    def measured(problem: Problem, optimizers: Any = two, **arguments: Any) -> dict[str, Line]:
        return lines(sweep(cut(problem), optimizers, bar, **arguments))

    def remedied(gradients: str, optimizer: str, cure: str) -> float:
        one = {optimizer: OPTIMIZERS[optimizer]}
        result = sweep(cut(deep(gradients, cure)), one, bar, lr=LRS[::2], seeds=1)
        return min((s.median for s in result.settings if not s.diverged), default=math.inf)

    problems = {"images": images(), "text": text(), "ratings": ratings()}
    return Article(
        simple=measured(images(layers=1), four),
        images=found["images"],
        complex=measured(images(layers=8), four),
        all_data={name: found[name] for name in ("images", "text")},
        little_data={"images": measured(images(rows=60)), "text": measured(text(rows=1000))},
        short={name: measured(p, steps=max(cut(p).steps // 10, 1)) for name, p in problems.items()},
        deep={g: {name: remedied(g, *x) for name, x in REMEDIES.items()} for g in ("vanish", "explode")},
    )


def advice_of_article(found: dict[str, dict[str, Line]], a: Article) -> list[Advice]:
    """The sentences of the article's section 9 that advise something, in its order."""

    def ratio(line: dict[str, Line]) -> float:
        return line["SGD"].loss / line["Adam"].loss

    def ratios(cases: dict[str, dict[str, Line]]) -> str:
        return "; ".join(f"{name} {factor(ratio(line))}" for name, line in cases.items())

    def shares(line: dict[str, Line]) -> str:
        return ", ".join(f"{name} {percent(x.fall)}" for name, x in line.items())

    def growth(of: dict[str, Line], over: dict[str, Line]) -> dict[str, float]:
        return {name: of[name].best / over[name].best for name in ("SGD", "Adam")}

    def factors(x: dict[str, float]) -> str:
        return ", ".join(f"{name} {factor(f)}" for name, f in x.items())

    layers, depth = growth(a.complex, a.simple), growth(a.complex, a.images)
    data = {name: growth(line, a.little_data[name]) for name, line in a.all_data.items()}
    own = {name: line["SGD"].best / line["Adam"].best for name, line in found.items()}
    better = max(a.complex["SGD, momentum 0.9"].fall, a.complex["RMSprop"].fall)

    def final(loss: float) -> str:
        return f"{loss:.2g}" if math.isfinite(loss) else "diverges at each"

    def remedies(*names: str) -> tuple[str, list[bool]]:
        """Their losses where gradients vanish and explode, and whether the network learns."""
        text = "; ".join(
            f"gradients {g}: " + ", ".join(f"{name} {final(losses[name])}" for name in names)
            for g, losses in a.deep.items()
        )
        return text, [losses[name] < LEARNS for losses in a.deep.values() for name in names]

    alone, optimizers, structure = remedies("SGD"), remedies("momentum", "RMSprop"), remedies("residual", "batch norm")
    return [
        Advice(
            "9.1 For a simple model gradient descent or SGD may do.",
            f"Share of the best fall with one layer: {shares(a.simple)}.",
            [a.simple["SGD"].fall >= GOOD],
        ),
        Advice(
            "9.1 A complex model is better served by momentum or RMSprop.",
            f"Share of the best fall with eight layers: {shares(a.complex)}.",
            [better > a.complex["SGD"].fall + 0.01],
        ),
        Advice(
            "9.1 Much data: SGD.",
            f"Final loss of SGD over Adam's with all data: {ratios(a.all_data)}.",
            [ratio(x) < 1 for x in a.all_data.values()],
        ),
        Advice(
            "9.1 Little data: Adam.",
            f"The same with 60 images and 1000 characters: {ratios(a.little_data)}.",
            [ratio(x) > 1 for x in a.little_data.values()],
        ),
        Advice(
            "9.1 Few resources: SGD.",
            f"Final loss of SGD over Adam's after a tenth of the steps: {ratios(a.short)}. (SGD has no state, Adam two "
            "numbers a parameter.)",
            [ratio(x) < 1 for x in a.short.values()],
        ),
        Advice(
            "9.1 Ample resources: Adam.",
            f"The same after all steps: {ratios(found)}.",
            [ratio(x) > 1 for x in found.values()],
        ),
        Advice(
            "9.2 The simpler the model, the larger the learning rate.",
            f"Best learning rate with eight layers over one: {factors(layers)}.",
            [x < 1 for x in layers.values()],
        ),
        Advice(
            "9.2 The more data, the smaller the learning rate.",
            "Best learning rate with all data over that with little: "
            + "; ".join(f"{name} {factors(x)}" for name, x in data.items())
            + ".",
            [x < 1 for each in data.values() for x in each.values()],
        ),
        Advice(
            "9.2 SGD takes a larger learning rate than Adam.",
            f"Best of SGD over best of Adam: {'; '.join(f'{name} {factor(x)}' for name, x in own.items())}.",
            [x > 1 for x in own.values()],
        ),
        Advice(
            "9.3 Another learning rate cures vanishing and exploding gradients.",
            f"Final loss in 30 layers at the best of {len(LRS[::2])} learning rates: {alone[0]}. A guess has 2.3.",
            alone[1],
        ),
        Advice(
            "9.3 Deep networks take a smaller learning rate.",
            f"Best learning rate with eight layers over three: {factors(depth)}.",
            [x < 1 for x in depth.values()],
        ),
        Advice(
            "9.3 Momentum or RMSprop cures them.",
            f"Final loss in 30 layers, each at its best learning rate: {optimizers[0]}.",
            optimizers[1],
        ),
        Advice(
            "9.3 Residual connections or batch normalisation cure them.",
            f"Final loss of SGD in 30 layers with either, at the best learning rate: {structure[0]}.",
            structure[1],
        ),
    ]


# --- the page


def rows(pieces: list[Advice]) -> str:
    return "\n".join(f"| {item.text} | {item.figures} | **{verdict(item.holds)}** |" for item in pieces)


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

[Today's optimizers](choosing-today.md) are measured in the same way on a page of their own.

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

## An article's advice

An article that introduces PyTorch's optimizers answers three questions in its section 9: which optimizer, which
learning rate, and what to do about vanishing and exploding gradients. Here is each sentence that advises, in short, and
what was measured. *Simple* and *complex* are the digits by one dense layer and by eight; *little data* is 60 images or
1000 characters. The 30 layers are of tanh, begun as `torch.nn.Linear` begins, whose gradients vanish, and of ReLU, each
begun 1.2 times too large, whose gradients explode. They learn if the loss comes below {learns}.

| said | measured | |
|---|---|---|
{article}

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
    of_article = 2 * 4 + 2 * 2 + 3 * 2 + 2 * len(REMEDIES)
    with tqdm(total=len(problems) * (len(OPTIMIZERS) + 2) + 2 * len(sizes) + of_article, unit="sweep") as bar:
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
        said = article(found, cut, bar)
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
        advice=rows(advice(found, cosine, batches, ranges)),
        article=rows(advice_of_article(found, said)),
        learns=LEARNS,
        adam=", ".join(percent(line["Adam"].at_lr(1e-3)) for line in found.values()),
        spread=factor(max(max(x.best for x in f.values()) / min(x.best for x in f.values()) for f in found.values())),
        jax=jax.__version__,
        machine=f"{platform.machine()}, {jax.devices()[0].platform}",
    )
    (arguments.out / "choosing.md").write_text(report.wrapped(page))


if __name__ == "__main__":
    main()
