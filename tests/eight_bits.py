"""Trajectories of others' 8-bit optimizers: tests/data/int8.json.

python -m tests.eight_bits      with torch, and bitsandbytes==0.50.2 and torchao==0.18.0 on PYTHONPATH (pip's --no-deps)

200 steps in float32 on 4096 numbers, with feedback and gradients of magnitudes that differ tenfold in a block.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import numpy as np

from tests import ROOT

STEPS, SIZE = 200, 4096
DATA = ROOT / "tests" / "data" / "int8.json"


@dataclasses.dataclass(frozen=True)
class Reference:
    """A class, its arguments and jopt's, and how much nearer to it than it is to float32 jopt is to be."""

    source: str
    path: str
    arguments: dict[str, Any]
    nearer: float


REFERENCES = {
    # Its codes are the nearest, as ours are.
    "adamw": Reference("torchao==0.18.0", "torchao.optim.AdamW8bit", dict(lr=0.02, weight_decay=0.01), 10),
    # On CPU its codes of what is less than a ten thousandth of the largest are not.
    "lion": Reference("bitsandbytes==0.50.2", "bitsandbytes.optim.Lion8bit", dict(lr=0.003, weight_decay=0.1), 2),
}


def start() -> np.ndarray:
    return np.cos(np.arange(SIZE)).astype(np.float32)


def gradient(params: np.ndarray, step: int) -> np.ndarray:
    index = np.arange(SIZE)
    scale = 10 ** ((np.cos(7.0 * index) - 1) / 2)
    return (scale * (0.7 * (params - np.sin(3.0 * index)) + 0.5 * np.sin(index * (1.5 + step) ** 2))).astype(np.float32)


def main() -> None:
    import torch

    torch.compile = lambda f, **_: f  # torchao's step as it is written
    found = {}
    for name, reference in REFERENCES.items():
        module, _, cls = reference.path.rpartition(".")
        p = torch.nn.Parameter(torch.tensor(start()))
        optimizer = getattr(importlib.import_module(module), cls)([p], **reference.arguments)
        for step in range(STEPS):
            p.grad = torch.tensor(gradient(p.detach().numpy(), step))
            optimizer.step()
        found[name] = {"source": reference.source, "params": [round(x, 6) for x in p.tolist()]}
    DATA.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
