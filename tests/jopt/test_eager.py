"""A step that is not jitted, in a loop: it keeps nothing and compiles nothing anew."""

import gc
import logging

import jax
import jax.numpy as jnp
import pytest

import jopt
from tests import cases

UNLIKE = ["sgd-momentum", "adamw", "adafactor", "muon", "asgd", "rprop", "radam"]
CASES = [case for case in cases.CASES if case.id in UNLIKE]
TXS = {case.id: (lambda case=case: case.jopt()) for case in CASES}
TXS |= {
    "chain": lambda: jopt.chain(jopt.clip_grad_norm(1.0), jopt.adamw()),
    "groups": lambda: jopt.param_groups(jopt.adamw, {"a": {"lr": 0.1}}),
    "scheduled": lambda: jopt.sgd(lr=jopt.schedules.step_lr(0.1, 2)),
    "skip_nonfinite": lambda: jopt.skip_nonfinite(jopt.adamw()),
    "monitor": lambda: jopt.monitor(jopt.adamw()),
}


@pytest.mark.parametrize("name", TXS)
def test_steps_keep_and_compile_nothing(name, caplog):
    tx = TXS[name]()
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((3, 4))}
    state = tx.init(params)
    for _ in range(3):
        params, state = tx.step(params, state, params)
    gc.collect()
    before = len(gc.get_objects())
    steps = 10
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for _ in range(steps):
            params, state = tx.step(params, state, params)
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    caplog.clear()
    gc.collect()
    assert compiled == []
    # JAX keeps an object or two of each call in caches that it bounds.
    assert len(gc.get_objects()) - before < 4 * steps
