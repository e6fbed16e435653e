"""How optax's and pytorch_optimizer's versions of today's optimizers differ from ours: 200 steps in float64.

python -m benchmarks.variants [NAME ...]

The problem is that of tests/authors.py. Prints, for each, the largest difference over the largest value after 200
steps, with the numbers that are equal on all sides and everything else at its default. Figures for the pages of
docs/optimizers. Needs `pip install pytorch_optimizer==4.1.0`; without it optax alone is compared.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jopt
from tests import authors, cases

LR = 0.01
# By optimizer: ours, optax's, pytorch_optimizer's class, with what makes their numbers equal.
VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Callable[[], Any]], dict[str, tuple[str, dict[str, Any]]]]] = {
    "lion": (
        lambda: jopt.lion(lr=LR, weight_decay=0.1),
        {"optax.lion": lambda: optax.lion(LR, weight_decay=0.1)},
        {"pytorch_optimizer.Lion": ("Lion", dict(lr=LR, weight_decay=0.1))},
    ),
    "adan": (
        lambda: jopt.adan(lr=LR, weight_decay=0.1),
        {"optax.adan": lambda: optax.adan(LR, weight_decay=0.1)},
        {"pytorch_optimizer.Adan": ("Adan", dict(lr=LR, weight_decay=0.1))},
    ),
    "ademamix": (
        lambda: jopt.ademamix(lr=LR, weight_decay=0.1, alpha=5.0),
        {
            "optax.contrib.ademamix": lambda: optax.contrib.ademamix(
                LR, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0, weight_decay=0.1
            )
        },
        {"pytorch_optimizer.AdEMAMix": ("AdEMAMix", dict(lr=LR, weight_decay=0.1, alpha=5.0, weight_decouple=True))},
    ),
    "adopt": (
        lambda: jopt.adopt(lr=LR),
        {"optax.contrib.adopt": lambda: optax.contrib.adopt(LR)},
        {"pytorch_optimizer.ADOPT": ("ADOPT", dict(lr=LR))},
    ),
    "lamb": (
        lambda: jopt.lamb(lr=LR, weight_decay=0.1),
        {"optax.lamb": lambda: optax.lamb(LR, weight_decay=0.1)},
        {"pytorch_optimizer.Lamb": ("Lamb", dict(lr=LR, weight_decay=0.1))},
    ),
    "schedule_free_adamw": (
        lambda: jopt.schedule_free_adamw(lr=LR),
        {"optax.contrib.schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(LR)},
        {},
    ),
    "schedule_free_sgd": (
        lambda: jopt.schedule_free_sgd(lr=LR),
        {"optax.contrib.schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(LR)},
        {},
    ),
    "soap": (
        lambda: jopt.soap(lr=LR),
        {},
        {"pytorch_optimizer.SOAP": ("SOAP", dict(lr=LR))},
    ),
    "nor_muon": (
        lambda: jopt.nor_muon(lr=LR, weight_decay=0.1),
        {},
        {"pytorch_optimizer.NorMuon": ("NorMuon", dict(lr=LR, weight_decay=0.1))},
    ),
    "prodigy": (
        lambda: jopt.prodigy(weight_decay=0.1, use_bias_correction=True),
        {"optax.contrib.prodigy": lambda: optax.contrib.prodigy(weight_decay=0.1)},
        {"pytorch_optimizer.Prodigy": ("Prodigy", dict(weight_decay=0.1, weight_decouple=True, bias_correction=True))},
    ),
    "lars": (
        lambda: jopt.lars(lr=0.1, momentum=0.9, weight_decay=0.1, trust_coeff=0.02),
        {"optax.lars": lambda: optax.lars(0.1, weight_decay=0.1, trust_coefficient=0.02, momentum=0.9)},
        {"pytorch_optimizer.LARS": ("LARS", dict(lr=0.1, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02))},
    ),
}


def in_jax(tx: Any, problem: authors.Reference, steps: int) -> list[Any]:
    params = authors.start(jnp, problem.shapes, problem.warp)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, i: Any) -> Any:
        updates, state = tx.update(authors.gradients(jnp, params, i, problem.warp), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jnp.asarray(float(i)))
    return [np.asarray(p) for p in params]


def in_torch(name: str, arguments: dict[str, Any], problem: authors.Reference, steps: int) -> list[Any]:
    params = [torch.nn.Parameter(torch.tensor(x)) for x in authors.start(np, problem.shapes, problem.warp)]
    groups = [dict(params=params, use_muon=True)] if name == "NorMuon" else params
    optimizer = getattr(importlib.import_module("pytorch_optimizer"), name)(groups, **arguments)
    for step in range(steps):
        authors.torch_step(params, optimizer, step, problem.warp)
    return [p.detach().numpy() for p in params]


def main(names: list[str]) -> None:
    jax.config.update("jax_enable_x64", True)
    for name in names or VARIANTS:
        ours, optaxs, torchs = VARIANTS[name]
        problem = authors.REFERENCES[name]
        for steps in (1, 2, authors.STEPS):
            expected = in_jax(ours(), problem, steps)
            found = {label: in_jax(make(), problem, steps) for label, make in optaxs.items()}
            with contextlib.suppress(ModuleNotFoundError):
                found |= {label: in_torch(*arguments, problem, steps) for label, arguments in torchs.items()}
            for label, params in found.items():
                worst = max(cases.difference(x, y) for x, y in zip(params, expected, strict=True))
                print(f"{name:20} {label:34} after {steps:3} steps {worst:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
