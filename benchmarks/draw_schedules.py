"""Draws every schedule of jopt.schedules into docs/schedules.png, torch's values under them.

make pictures
"""

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.optim import lr_scheduler as t
from torch.optim.swa_utils import SWALR

from jopt import schedules as s

STEPS = 200
PLOTS = {
    "lambda_lr": (s.lambda_lr(1.0, lambda e: 0.98**e), lambda o: t.LambdaLR(o, lambda e: 0.98**e)),
    "multiplicative_lr": (
        s.multiplicative_lr(1.0, lambda e: 0.97 + 0.02 * (e % 40 < 20)),
        lambda o: t.MultiplicativeLR(o, lambda e: 0.97 + 0.02 * (e % 40 < 20)),
    ),
    "step_lr": (s.step_lr(1.0, 40, 0.5), lambda o: t.StepLR(o, 40, 0.5)),
    "multi_step_lr": (s.multi_step_lr(1.0, [30, 80, 170], 0.4), lambda o: t.MultiStepLR(o, [30, 80, 170], 0.4)),
    "constant_lr": (s.constant_lr(1.0, 0.3, 60), lambda o: t.ConstantLR(o, 0.3, 60)),
    "linear_lr": (s.linear_lr(1.0, 0.1, 1.0, 120), lambda o: t.LinearLR(o, 0.1, 1.0, 120)),
    "exponential_lr": (s.exponential_lr(1.0, 0.98), lambda o: t.ExponentialLR(o, 0.98)),
    "polynomial_lr": (s.polynomial_lr(1.0, 150, 2.0), lambda o: t.PolynomialLR(o, 150, 2.0)),
    "cosine_annealing_lr": (s.cosine_annealing_lr(1.0, 120, 0.1), lambda o: t.CosineAnnealingLR(o, 120, 0.1)),
    "cosine_annealing_warm_restarts": (
        s.cosine_annealing_warm_restarts(1.0, 25, 2),
        lambda o: t.CosineAnnealingWarmRestarts(o, 25, 2),
    ),
    "cyclic_lr, triangular": (s.cyclic_lr(0.1, 1.0, 20), lambda o: t.CyclicLR(o, 0.1, 1.0, 20)),
    "cyclic_lr, triangular2": (
        s.cyclic_lr(0.1, 1.0, 20, 30, "triangular2"),
        lambda o: t.CyclicLR(o, 0.1, 1.0, 20, 30, "triangular2"),
    ),
    "cyclic_lr, exp_range": (
        s.cyclic_lr(0.1, 1.0, 20, mode="exp_range", gamma=0.99),
        lambda o: t.CyclicLR(o, 0.1, 1.0, 20, mode="exp_range", gamma=0.99),
    ),
    "one_cycle_lr": (s.one_cycle_lr(1.0, STEPS), lambda o: t.OneCycleLR(o, 1.0, STEPS)),
    "one_cycle_lr, three_phase, linear": (
        s.one_cycle_lr(1.0, STEPS, three_phase=True, anneal_strategy="linear"),
        lambda o: t.OneCycleLR(o, 1.0, STEPS, three_phase=True, anneal_strategy="linear"),
    ),
    "sequential_lr: warm-up and cosine": (
        s.sequential_lr([s.linear_lr(1.0, 0.01, total_iters=30), s.cosine_annealing_lr(1.0, 170)], [30]),
        lambda o: t.SequentialLR(o, [t.LinearLR(o, 0.01, total_iters=30), t.CosineAnnealingLR(o, 170)], [30]),
    ),
    "chained_scheduler: constant, exponential": (
        s.chained_scheduler([s.constant_lr(1.0, 0.3, 40), s.exponential_lr(1.0, 0.99)]),
        lambda o: t.ChainedScheduler([t.ConstantLR(o, 0.3, 40), t.ExponentialLR(o, 0.99)]),
    ),
    "swalr": (s.swalr(1.0, 0.2, 80), lambda o: SWALR(o, 0.2, 80)),
}


def held(make, steps):
    """What torch's optimizer holds, step for step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no optimizer.step() came before
            scheduler.step()
    return np.array(values)


def main():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(6, 3, figsize=(12, 14), constrained_layout=True, sharex=True)
    print(
        "| schedule | largest difference from the lr that torch's optimizer holds, of the largest value |\n|---|---:|"
    )
    for axis, (name, (ours, theirs)) in zip(axes.flat, PLOTS.items(), strict=True):
        torchs, values = held(theirs, STEPS), ours(np.arange(STEPS))
        axis.plot(torchs, color="C1", linewidth=4, alpha=0.4, label="torch")
        axis.plot(values, color="C0", linewidth=1.2, label="jopt")
        axis.set_title(name, fontsize=10)
        axis.set_ylim(-0.04, 1.06)
        print(f"| {name} | {np.abs(values - torchs).max() / torchs.max():.1e} |")
    axes.flat[0].legend()
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(Path(__file__).parent.parent / "docs" / "schedules.png", dpi=90)


if __name__ == "__main__":
    main()
