"""Optimizers that torch has not, against numbers of their authors' own code."""

import json

import jax
import jax.numpy as jnp
import numpy as np

import jopt
from tests import ROOT, cases

DATA = ROOT / "tests" / "data"


def test_mars(x64):
    """50 steps of `MARS` ("mars-adamw") of github.com/AGI-Arena/MARS at 20c60c1, in float64 with torch 2.13.

    Three parameters start at cos((k + 1) * index); gradient 0.8 * p + sin(index + step * (k + 1.5)) / 2.
    """
    for run in json.loads((DATA / "mars.json").read_text()):
        expected = [np.array(x) for x in run["params"]]
        index = [jnp.arange(float(x.size)).reshape(x.shape) for x in expected]
        params = [jnp.cos((k + 1) * i) for k, i in enumerate(index)]
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in run["arguments"].items()}
        tx = jopt.mars(**arguments)
        state = tx.init(params)
        step = jax.jit(tx.step)
        for i in range(50):
            grads = [
                0.8 * p + 0.5 * jnp.sin(j + i * (k + 1.5)) for k, (p, j) in enumerate(zip(params, index, strict=True))
            ]
            params, state = step(grads, state, params)
        for p, x in zip(params, expected, strict=True):
            assert cases.difference(p, x) <= cases.TOLERANCES["float64"]
