"""Vanishing and exploding gradients: named by jopt's health report, and cured.

    python -m examples.vanishing_gradients

Three networks that do not learn: 30 tanh layers with torch's default initialisation, a tanh recurrence that forgets,
a ReLU recurrence that grows. `jopt.monitor` measures each layer's gradient inside the compiled step, and
`jopt.health_report` names the layers (for a recurrence, the time steps) whose gradients vanish or explode. Then the
cures: another optimizer, an orthogonal initialisation, residual connections, clipping.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jopt

DEPTH, WIDTH, LENGTH, EVERY, CLASSES = 30, 64, 80, 8, 4
Tree = Any


# --- networks


def linear(key: jax.Array, inp: int, out: int, how: str) -> Tree:
    """torch's default for nn.Linear: uniform, of standard deviation 1 / sqrt(3 inp). Or the weight orthogonal."""
    a, b = jax.random.split(key)
    bound = inp**-0.5
    weight = jax.random.uniform(a, (inp, out), minval=-bound, maxval=bound)
    bias = jax.random.uniform(b, (out,), minval=-bound, maxval=bound)
    return {"weight": orthogonal(a, inp, out) if how == "orthogonal" else weight, "bias": bias}


def orthogonal(key: jax.Array, inp: int, out: int) -> jax.Array:
    return jax.nn.initializers.orthogonal()(key, (inp, out))


def deep(how: str) -> Tree:
    """DEPTH equal layers between the first and the last."""
    keys = jax.random.split(jax.random.key(0), DEPTH + 2)
    layers = {f"layer {i:02}": linear(keys[i], WIDTH, WIDTH, how) for i in range(DEPTH)}
    return {"in": linear(keys[-2], 64, WIDTH, how), **layers, "out": linear(keys[-1], WIDTH, 10, how)}


def deep_loss(params: Tree, batch: Any, residual: bool) -> jax.Array:
    x, y = batch

    def apply(layer: Tree, h: jax.Array) -> jax.Array:
        return h @ layer["weight"] + layer["bias"][None]

    def block(h: jax.Array, layer: Tree) -> Any:
        new = jnp.tanh(apply(layer, h))
        return (h + new if residual else new), None

    layers = jax.tree.map(lambda *xs: jnp.stack(xs), *(params[f"layer {i:02}"] for i in range(DEPTH)))
    h, _ = jax.lax.scan(block, jnp.tanh(apply(params["in"], x)), layers)
    return cross_entropy(apply(params["out"], h), y)


def recurrent(gain: float, identity: bool = False) -> Tree:
    """The weights, and a zero added to the state at every eighth step: its gradient is the state's."""
    a, b, c = jax.random.split(jax.random.key(0), 3)
    taps = {f"time {t:02}": jnp.zeros(WIDTH) for t in range(0, LENGTH, EVERY)}
    weights = {
        "in": orthogonal(a, CLASSES, WIDTH),
        "hidden": gain * (jnp.eye(WIDTH) if identity else orthogonal(b, WIDTH, WIDTH)),
        "out": orthogonal(c, WIDTH, CLASSES),
    }
    return taps | weights


def recurrent_loss(params: Tree, batch: Any, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Which class was shown at the first step? Noise follows."""
    x, y = batch
    added = jnp.zeros((LENGTH, WIDTH))
    added = added.at[::EVERY].set(jnp.stack([params[f"time {t:02}"] for t in range(0, LENGTH, EVERY)]))

    def cell(h: jax.Array, now: Any) -> Any:
        x, tap = now
        return activation(x @ params["in"] + h @ params["hidden"] + tap[None]), None

    h, _ = jax.lax.scan(cell, jnp.zeros((len(y), WIDTH)), (x.transpose(1, 0, 2), added))
    return cross_entropy(h @ params["out"], y)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))


# --- data


def digits(step: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _digits()
    rows = np.random.default_rng(step).integers(len(x), size=128)
    return x[rows], y[rows]


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return ((x - x.mean()) / x.std()).astype(np.float32), y.astype(np.int32)


def sequences(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    x = 0.1 * rng.standard_normal((64, LENGTH, CLASSES)).astype(np.float32)
    y = rng.integers(CLASSES, size=64).astype(np.int32)
    x[:, 0] = np.eye(CLASSES, dtype=np.float32)[y]
    return x, y


# --- runs


@dataclasses.dataclass
class Run:
    problem: str
    name: str
    params: Tree
    loss: Callable[[Tree, Any], jax.Array]
    batch: Callable[[int], Any]
    tx: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    first: Any = None  # the report of the first step
    report: Any = None  # that of the first step in which something explodes, or else `first`
    step: int = 0

    def train(self, steps: int, show: Callable[[], Any]) -> None:
        tx = jopt.monitor(self.tx)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train_step(params: Tree, state: Any, batch: Any) -> Any:
            value, grads = jax.value_and_grad(self.loss)(params, batch)
            params, state = tx.step(grads, state, params)
            return params, state, value

        params = jax.tree.map(jnp.array, self.params)
        state = tx.init(params)
        for step in range(steps):
            params, state, value = train_step(params, state, self.batch(step))
            if step == 0:
                self.first = self.report = jopt.health_report(state.health, params)
            elif not self.report.exploding:
                report = jopt.health_report(state.health, params)
                if report.exploding:
                    self.report, self.step = report, step
            self.losses.append(float(value))
            show()

    @property
    def final(self) -> float:
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))


def runs() -> list[Run]:
    plain, with_residuals = (functools.partial(deep_loss, residual=r) for r in (False, True))
    tanh, relu = (functools.partial(recurrent_loss, activation=f) for f in (jnp.tanh, jax.nn.relu))
    sgd = jopt.sgd(lr=0.01, momentum=0.9)
    # The zeros at the time steps are there to be measured, and stay.
    frozen = functools.partial(jopt.param_groups, groups={"^time": None})
    recurrent_sgd, slower = (frozen(jopt.sgd, lr=lr, momentum=0.9) for lr in (0.05, 0.003))
    clipped, gently = jopt.chain(jopt.clip_grad_norm(1.0), slower), jopt.chain(jopt.clip_grad_norm(0.3), recurrent_sgd)
    a, b, c = "30 tanh layers", "a tanh recurrence", "a ReLU recurrence"
    return [
        Run(a, "as it is, sgd", deep("default"), plain, digits, sgd),
        Run(a, "adamw", deep("default"), plain, digits, jopt.adamw(lr=1e-3)),
        Run(a, "orthogonal start, sgd", deep("orthogonal"), plain, digits, sgd),
        Run(a, "residual, sgd", deep("default"), with_residuals, digits, sgd),
        Run(b, "as it is, sgd", recurrent(0.7), tanh, sequences, recurrent_sgd),
        Run(b, "orthogonal, clipped sgd", recurrent(1.0), tanh, sequences, gently),
        Run(c, "as it is, sgd", recurrent(1.05, identity=True), relu, sequences, slower),
        Run(c, "clipped, sgd", recurrent(1.05, identity=True), relu, sequences, clipped),
    ]


# --- what comes out


def named(report: Any) -> str:
    """Which layers stand out, in a few words; beside what explodes everything is small."""
    for what in ("exploding", "vanishing"):
        if names := getattr(report, what):
            return f"{what}: {names[0]}" + (f" to {names[-1]}, {len(names)}" if len(names) > 1 else "")
    return "healthy"


def plot(done: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys(run.problem for run in done))
    figure, axes = plt.subplots(2, len(problems), figsize=(14, 8), constrained_layout=True)
    for (above, below), problem in zip(axes.T, problems, strict=True):
        for i, run in enumerate(r for r in done if r.problem == problem):
            layers = [x for x in run.first.layers if re.match(r"layer .*weight|time", x.name)]
            places = [int(x.name[6:8] if x.name[0] == "l" else x.name[5:7]) for x in layers]
            above.plot(places, [x.grad_rms or np.nan for x in layers], ".-", color=f"C{i}", label=run.name)
            marked = [k for k, x in enumerate(layers) if x.name in (*run.first.vanishing, *run.first.exploding)]
            above.plot([places[k] for k in marked], [layers[k].grad_rms or np.nan for k in marked], "x", color="red")
            kernel = np.ones(10) / 10
            smooth = np.convolve(run.losses, kernel, "valid") if len(run.losses) > 20 else run.losses
            lost = np.flatnonzero(~np.isfinite(run.losses))
            ending = f": not finite from step {lost[0]}" if len(lost) else ""
            below.plot(smooth, color=f"C{i}", label=run.name + ending)
        above.set(yscale="log", title=problem, ylabel="gradient at the first step (rms)")
        above.set_xlabel("layer" if "layers" in problem else "time step")
        below.set(xlabel="step", ylabel="training loss", ylim=(0, 3.5))
        below.legend()
        above.legend()
    axes[0, 0].plot([], [], "x", color="red", label="named by the report")
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/vanishing_gradients.png"), help="where the plot goes")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, found {arguments.steps}")

    done = runs()
    with tqdm(total=len(done) * arguments.steps, unit="step", disable=None) as bar:
        for run in done:
            bar.set_description(f"{run.problem}, {run.name}")
            run.train(arguments.steps, bar.update)
    print(f"\n{'':20}{'':24}{'first loss':>10}  {'last':>6}  the report")
    for run in done:
        words = f"step {run.step}: {named(run.report)}"
        print(f"{run.problem:20}{run.name:24}{run.losses[0]:10.2f}  {run.final:6.2f}  {words}")
    plot(done, arguments.out)
    print(f"\npicture: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
