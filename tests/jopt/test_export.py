"""A step lowered once for four platforms, written to bytes and read back, is the step itself where it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.sparse import BCOO

import jopt
from tests import cases

pytest.importorskip("flatbuffers", reason="jax.export writes with it: pip install flatbuffers")

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
FIRST = {case.name: case for case in reversed(cases.CASES)}
FAST = ("adamw", "adafactor", "muon")


def through_bytes(f, *args):
    """What the artefact returns; and what `f` does."""
    exported = export.export(jax.jit(f), platforms=PLATFORMS)(*args)
    read = export.deserialize(exported.serialize())
    assert read.platforms == PLATFORMS
    return read.call(*args), jax.jit(f)(*args)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def a_step(name):
    case = FIRST[name]
    problem = cases.Problem("float32", matrices=case.matrices)
    params = {name: jnp.asarray(x) for name, x in zip("abc", problem.start, strict=True)}
    grads = {name: jnp.asarray(x) for name, x in zip("abc", problem.grads(0, problem.start), strict=True)}
    return case.jopt(lr=jopt.schedules.cosine_annealing_lr(case.lr, T_max=10)), grads, params


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FIRST])
def test_one_artefact_for_all_platforms(name):
    tx, grads, params = a_step(name)
    assert_same(*through_bytes(tx.step, grads, tx.init(params), params))
    if tx.rule.scope == "element":
        packed = jopt.pack(params).buffers  # a Packed has no form outside of this process, its buffers have
        found, expected = through_bytes(tx.step, packed, tx.init(packed), packed)
        assert_same(found, expected)


def test_sparse_rows():
    tx, table = jopt.sparse_adam(), jnp.ones((8, 2))

    def step(rows, indices, state, table):
        return tx.step(BCOO((rows, indices), shape=table.shape), state, table)

    assert_same(*through_bytes(step, jnp.ones((3, 2)), jnp.array([[2], [0], [2]]), tx.init(table), table))


@pytest.mark.slow  # its line search is the largest program
def test_lbfgs():
    solver, x = jopt.lbfgs(line_search_fn="strong_wolfe"), jnp.array([-1.0, 2.0])
    value_and_grad = jax.value_and_grad(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
    assert_same(*through_bytes(lambda state, x: solver.step(value_and_grad, state, x), solver.init(x), x))


def test_what_goes_around_a_step():
    """Chains, averages, loss scaling and plateaus: their states are written too. Of groups the leaves."""
    params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    tx = jopt.skip_nonfinite(jopt.monitor(jopt.chain(jopt.clip_grad_norm(1.0), jopt.adamw())))
    average, scaler, plateau = jopt.ema(), jopt.loss_scale(), jopt.reduce_lr_on_plateau()

    def step(grads, state, params, averaged, scale, patience):
        params, state = tx.step(grads, state, params)
        return params, state, average.update(params, averaged), scale, patience

    assert_same(
        *through_bytes(step, params, tx.init(params), params, average.init(params), scaler.init(), plateau.init())
    )

    groups = jopt.param_groups(jopt.adamw, {"b": {"weight_decay": 0.0}})
    leaves, treedef = jax.tree.flatten(groups.init(params))

    def step_of_leaves(grads, leaves, params):
        params, state = groups.step(grads, treedef.unflatten(leaves), params)
        return params, jax.tree.leaves(state)

    assert_same(*through_bytes(step_of_leaves, params, leaves, params))
