"""The learning rate range test: one run in which the learning rate grows until the loss does."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from jax import Array

from jopt.rule import is_number
from jopt.sweeps.inputs import Batches, check_loss, make_plan, start
from jopt.sweeps.sweep import LoopProgram

Tree = Any


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What `jopt.lr_range_test` found; `print` says it in words.

    Attributes:
      lrs: the learning rate of each step, float64, up to where the loss was four times its lowest.
      losses: the loss before each step.
      smoothed: their exponential average, corrected for its start.
      base_lr, max_lr: where the loss has done a tenth of its fall, and where it is lowest: bounds for a cyclic learning
        rate (Smith 2017). None if it never fell.
      suggestion: for a constant learning rate, or the peak of a schedule: a tenth of `max_lr`.
      reason: in words.
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    base_lr: float | None
    max_lr: float | None
    suggestion: float | None
    reason: str

    def __str__(self) -> str:
        return self.reason

    def plot(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Draw the loss over the learning rate, with the bounds and the suggestion, as `Sweep.plot` does."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.lrs, self.losses, color="C0", alpha=0.3, label="loss")
        axis.plot(self.lrs, self.smoothed, color="C0", label="smoothed")
        for name, lr, color in (
            ("base_lr", self.base_lr, "C2"),
            ("suggestion", self.suggestion, "black"),
            ("max_lr", self.max_lr, "C3"),
        ):
            if lr is not None:
                axis.axvline(lr, color=color, linestyle="--", label=f"{name} {lr:.2g}")
        axis.set_xscale("log")
        axis.set_ylim(top=np.max(self.smoothed) * 1.05 if np.max(self.smoothed) > 0 else None)
        axis.set(xlabel="learning rate", ylabel="loss", title="Learning rate range test")
        axis.legend()
        figure.savefig(path, dpi=120)


def lr_range_test(
    loss: Callable[[Tree, Tree], Any],
    init: Callable[[Array], Tree],
    batches: Any,
    *,
    optimizer: Any = "sgd",
    low: float = 1e-6,
    high: float = 10.0,
    steps: int | None = None,
    seed: int = 0,
    smoothing: float = 0.9,
) -> RangeTest:
    """The learning rate range test (Smith 2017): lr_t = low * (high / low)^(t / (steps - 1)), one step each.

    One compiled pass. Quicker and rougher than `jopt.sweep`: the loss at a learning rate depends on those before it.

    >>> import jax, jax.numpy as jnp, jopt
    >>> x = jax.random.normal(jax.random.key(0), (200, 32, 3))
    >>> y = x @ jnp.array([1.0, -2.0, 3.0]) + jax.random.normal(jax.random.key(1), (200, 32))
    >>> def loss(params, batch):
    ...     x, y = batch
    ...     return jnp.mean((x @ params["w"] - y) ** 2)
    >>> found = jopt.lr_range_test(loss, lambda key: {"w": jnp.zeros(3)}, (x, y))
    >>> found.base_lr < found.suggestion < found.max_lr < 2
    True

    Args:
      loss, init, batches, steps: as `jopt.sweep`; some hundred steps.
      optimizer: a name or a function of `lr`, as one of `jopt.sweep`'s optimizers.
      low, high: the first and the last learning rate.
      seed: `init(jax.random.key(seed))` makes the parameters.
      smoothing: the decay of the average over steps that is read.

    Raises:
      ValueError: bounds, smoothing or steps out of range. Else as `jopt.sweep`.

    Source: Smith, Cyclical learning rates for training neural networks, WACV 2017, section 3.3, whose two bounds these
    are, there read off the accuracy. A tenth of the upper one is how practice reads a single number.
    """
    for name, x in (("low", low), ("high", high)):
        if not is_number(x) or not 0 < x < math.inf:
            raise ValueError(f"{name}: expected a positive number, found {x!r}")
    if not low < high:
        raise ValueError(f"high: expected more than low, {low}, found {high}")
    if not is_number(smoothing) or not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number from 0 to below 1, found {smoothing!r}")
    plan = make_plan([optimizer], [low], [seed], None, 2.0, None, {})
    data = Batches(batches, steps)
    if data.steps < 10:
        raise ValueError(f"batches: expected at least 10 steps, better 100, found {data.steps}")
    params = start(init, seed)
    check_loss(loss, params, data[0])
    growth, last = float(high / low), data.steps - 1
    (make,) = plan.optimizers.values()
    program = LoopProgram(make, lambda step: growth ** (step / last), loss)
    losses = program.run(plan.rows(), 1, [params], data)[0]
    return _read(np.geomspace(low, high, data.steps), losses, smoothing)


def _read(lrs: np.ndarray, losses: np.ndarray, smoothing: float) -> RangeTest:
    smoothed, average = [], 0.0
    for i, x in enumerate(losses):
        average = smoothing * average + (1 - smoothing) * x
        value = average / (1 - smoothing ** (i + 1))
        lowest = min(smoothed, default=value)
        if not math.isfinite(value) or (i > 0 and value > lowest + 3 * abs(lowest)):
            break
        smoothed.append(value)
    n = len(smoothed)
    curve = np.array(smoothed)
    minimum = int(np.argmin(curve)) if n else 0
    top = int(np.argmax(curve[: minimum + 1])) if n else 0
    if n == 0 or math.isclose(curve[top], curve[minimum], rel_tol=1e-6):
        reason = (
            f"The loss never fell between lr {lrs[0]:.2g} and {lrs[max(n, 1) - 1]:.2g}: begin lower, or check the loss."
        )
        return RangeTest(lrs[:n], losses[:n], curve, None, None, None, reason)
    fallen = curve <= curve[top] - 0.1 * (curve[top] - curve[minimum])
    base, best = float(lrs[top + int(np.argmax(fallen[top:]))]), float(lrs[minimum])
    end = "was still falling at the end" if minimum >= n - 2 and n == len(losses) else "stops falling"
    words = [
        f"lr {best / 10:.2g}: a tenth of {best:.2g}, where the smoothed loss is {curve[minimum]:.3g} and {end}.",
        f"For a cyclic learning rate: from {base:.2g}, where it has done a tenth of its fall, to {best:.2g}.",
    ]
    if n < len(losses):
        words.append(f"At lr {lrs[n]:.2g} it was four times its lowest, or not finite.")
    elif minimum >= n - 2:
        words.append(f"Test beyond {lrs[-1]:.2g}.")
    return RangeTest(lrs[:n], losses[:n], curve, base, best, best / 10, " ".join(words))
