"""What is evaluated of a schedule-free run, whatever is around its optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt

PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(3)}


def run(tx, params, steps=4):
    state = tx.init(params)
    for i in range(steps):
        params, state = tx.step(jax.tree.map(lambda x, i=i: jnp.cos(x + i), params), state, params)
    return params, state


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize("nest", ["chain", "groups", "chain of groups", "groups of chains"])
def test_around_it(nest):
    def alone():
        return jopt.schedule_free_adamw(lr=0.1)

    def chained():
        return jopt.chain(jopt.clip_grad_norm(1e3), alone())

    tx = {
        "chain": chained,
        "groups": lambda: jopt.param_groups(lambda: alone(), {"b": alone()}),
        "chain of groups": lambda: jopt.chain(jopt.clip_grad_norm(1e3), jopt.param_groups(alone, {"b": alone()})),
        "groups of chains": lambda: jopt.param_groups(alone, {"b": chained()}),
    }[nest]()
    params, state = run(alone(), PARAMS)
    expected = jopt.schedule_free_eval(alone(), params, state)
    params, state = run(tx, PARAMS)
    same(jopt.schedule_free_eval(tx, params, state), expected)


def test_groups_of_other_optimizers_and_frozen_ones_stay():
    tx = jopt.param_groups(jopt.schedule_free_sgd, {"b": jopt.sgd(lr=0.1)}, lr=0.1)
    params, state = run(tx, PARAMS)
    found = jopt.schedule_free_eval(tx, params, state)
    assert (found["b"] == params["b"]).all()
    assert not (found["w"] == params["w"]).any()
    frozen = jopt.param_groups(jopt.schedule_free_sgd, {"b": None}, lr=0.1)
    params, state = run(frozen, PARAMS)
    assert (jopt.schedule_free_eval(frozen, params, state)["b"] == PARAMS["b"]).all()


def test_another_optimizer_is_refused():
    params, state = run(jopt.sgd(lr=0.1), PARAMS)
    with pytest.raises(TypeError, match=r"or schedule_free_sgd .* found SGD and State"):
        jopt.schedule_free_eval(jopt.sgd(lr=0.1), params, state)
    tx = optax.chain(jopt.schedule_free_sgd(lr=0.1))
    with pytest.raises(TypeError, match="of a chain of optax's take the part"):
        jopt.schedule_free_eval(tx, PARAMS, tx.init(PARAMS))
