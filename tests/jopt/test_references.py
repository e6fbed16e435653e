"""Optimizers that torch has not, against numbers of their authors' own code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from tests import ROOT, authors, cases

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


@pytest.mark.parametrize("name", authors.REFERENCES)
def test_the_authors_numbers(x64, name):
    """Parameters and state after 200 steps of the authors' own code, in float64: see `tests/authors.py`."""
    saved = json.loads((DATA / f"{name}.json").read_text())
    reference = authors.REFERENCES[name]
    assert saved["source"] == reference.source
    for arguments, run in zip(reference.runs, saved["runs"], strict=True):
        tx = getattr(jopt, reference.function or name)(**arguments)
        params = authors.start(jnp, reference.shapes, reference.warp)
        state = tx.init(params)

        @jax.jit
        def step(params, state, i, tx=tx):
            return tx.step(authors.gradients(jnp, params, i, reference.warp), state, params)

        for i in range(authors.STEPS):
            params, state = step(params, state, jnp.asarray(float(i)))
        for k, (p, expected) in enumerate(zip(params, run["params"], strict=True)):
            assert cases.difference(p, np.array(expected)) <= cases.AUTHORS["float64"], (arguments, k)
            for key, x in run["state"][k].items():
                signed = np.abs if key.rstrip("_0123456789") in reference.up_to_sign else np.array
                found = signed(state.slots[key][k])  # some authors keep them flat, or neighbouring axes in one
                expected = signed(x).reshape(found.shape)
                assert cases.difference(found, expected) <= cases.AUTHORS["float64"], (arguments, key)
        if "evaluated" in run:
            for x, expected in zip(jopt.schedule_free_eval(tx, params, state), run["evaluated"], strict=True):
                assert cases.difference(x, np.array(expected)) <= cases.AUTHORS["float64"], arguments
