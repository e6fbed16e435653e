"""The figures are NumPy's; sick layers are named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt._compat import enable_x64
from tests import cases


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_figures_are_those_of_numpy(dtype):
    with enable_x64(dtype == "float64"):
        problem = cases.Problem(dtype)
        params = {name: jnp.asarray(x) for name, x in zip("abc", problem.start, strict=True)}
        grads = {name: jnp.asarray(g) for name, g in zip("abc", problem.grads(0, problem.start), strict=True)}
        grads["b"] = grads["b"].at[:2].set(0)
        grads["c"] = grads["c"].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2, 2].set(-jnp.inf)
        tx, plain = jopt.monitor(jopt.adamw(lr=0.1)), jopt.adamw(lr=0.1)
        new, state = jax.jit(tx.step)(grads, tx.init(params), params)
        expected, inner = jax.jit(plain.step)(grads, plain.init(params), params)
    for a, b in zip(jax.tree.leaves((new, state.inner)), jax.tree.leaves((expected, inner)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))
    for i, name in enumerate("abc"):
        g, p, q = (np.asarray(x[name], np.float64) for x in (grads, params, new))
        found = {key: float(x[i]) for key, x in state.health._asdict().items()}
        tolerance = cases.CLIPPED["float32"] if dtype != "bfloat16" else cases.CLIPPED["bfloat16"]  # new - old rounds
        np.testing.assert_allclose(found["grad_norm"], np.linalg.norm(g), rtol=tolerance)
        np.testing.assert_allclose(found["update_norm"], np.linalg.norm(q - p), rtol=tolerance * 10)
        np.testing.assert_allclose(found["param_norm"], np.linalg.norm(p), rtol=tolerance)
        shares = [np.mean(g == 0), np.mean(np.isnan(g)), np.mean(np.isinf(g))]
        np.testing.assert_allclose([found["zeros"], found["nans"], found["infs"]], shares, rtol=1e-6)


def network(depth, activation, scale):
    keys = jax.random.split(jax.random.key(0), depth)
    params = {f"layer{i}": scale * jax.random.normal(k, (16, 16)) / 4 for i, k in enumerate(keys)}

    def loss(params, x):
        for i in range(depth):
            x = activation(x @ params[f"layer{i}"])
        return jnp.mean(x**2)

    return params, loss


@pytest.mark.parametrize(
    ("activation", "scale", "sick"),
    [(jax.nn.sigmoid, 0.5, "vanishing"), (lambda x: x, 6.0, "exploding"), (jnp.tanh, 1.0, None)],
    ids=["sigmoids", "large weights", "healthy"],
)
def test_vanishing_and_exploding_layers_are_named(activation, scale, sick):
    """Twelve sigmoids: each multiplies the gradient by at most a quarter, so that the first layers learn nothing."""
    params, loss = network(12, activation, scale)
    tx = jopt.monitor(jopt.sgd(lr=1e-3))
    grads = jax.grad(loss)(params, jnp.ones((4, 16)))
    params, state = tx.step(grads, tx.init(params), params)
    report = jopt.health_report(state.health, params)
    if sick is None:
        assert (report.vanishing, report.exploding) == ((), ())
    else:
        assert "layer0" in getattr(report, sick)
        assert sick == "exploding" or "layer11" not in report.vanishing
        assert not report.vanishing if sick == "exploding" else not report.exploding
        assert f"{sick}" in str(report).splitlines()[1]


def test_what_is_not_finite_explodes_and_what_is_zero_vanishes():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones((2, 2)), "d": jnp.ones(3)}
    grads = {"a": jnp.ones((2, 2)), "b": jnp.zeros((2, 2)), "c": jnp.full((2, 2), jnp.inf), "d": None}
    tx = jopt.monitor(jopt.sgd(lr=1.0))
    _, state = tx.step(grads, tx.init(params), params)
    report = jopt.health_report(state.health, params)
    assert report.vanishing == ("b", "d")
    assert report.exploding == ("c",)
    assert report.layers[1].zeros == 1.0
    assert report.layers[0].update_ratio == 1.0


def test_no_share_of_zeros_is_below_zero():
    """A product with a size's rounded inverse is not 1 for each size."""
    params = [jnp.ones(n) for n in range(1, 101)] + [jnp.ones(640)]
    tx = jopt.monitor(jopt.sgd(lr=1.0))
    _, state = jax.jit(tx.step)(params, tx.init(params), params)
    np.testing.assert_array_equal(state.health.zeros, 0)


def test_around_a_chain_groups_and_optax():
    params = {"a": jnp.ones(3), "b": jnp.ones((3, 3))}
    inner = jopt.param_groups(jopt.adamw, {"a": {"lr": 0.1}}, lr=0.2)
    for tx in (inner, jopt.chain(jopt.clip_grad_norm(1e-3), inner), optax.sgd(0.1)):
        measured = jopt.monitor(tx)
        new, state = measured.step(params, measured.init(params), params)
        np.testing.assert_allclose(state.health.grad_norm, [3**0.5, 3.0], rtol=1e-6)
        expected = [np.linalg.norm(new[k] - params[k]) for k in "ab"]
        np.testing.assert_allclose(state.health.update_norm, expected, rtol=1e-5)
        _, again = measured.update(params, measured.init(params), params)
        np.testing.assert_allclose(again.health.update_norm, expected, rtol=1e-5)


def test_packed_buffers_are_measured():
    params = jopt.pack({"a": jnp.ones(3), "b": jnp.full((2, 2), 2.0)})
    tx = jopt.monitor(jopt.sgd(lr=0.1))
    _, state = tx.step(params, tx.init(params), params)
    np.testing.assert_allclose(state.health.grad_norm, [(3 + 16) ** 0.5], rtol=1e-6)


def test_bad_input():
    with pytest.raises(TypeError, match="expected a gradient transformation, found int"):
        jopt.monitor(3)
    tx = jopt.monitor(jopt.sgd(lr=0.1))
    state = tx.init({"a": jnp.ones(1)})
    with pytest.raises(ValueError, match="of 1 leaves, found 2"):
        jopt.health_report(state.health, {"a": jnp.ones(1), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match="params: expected the parameters"):
        tx.update({"a": jnp.ones(1)}, state)


def test_what_is_frozen_is_measured_as_it_comes():
    """It is no gradient that vanishes; where there is none for it, there is nothing to measure."""
    tx = jopt.monitor(jopt.param_groups(jopt.sgd, {"^frozen": None}, lr=0.5))
    params = {"frozen": jnp.ones(4), "stepped": jnp.ones(1)}
    grads = {"frozen": jnp.full(4, 2.0), "stepped": jnp.ones(1)}
    new, state = tx.step(grads, tx.init(params), params)
    np.testing.assert_array_equal(new["frozen"], 1)
    np.testing.assert_allclose(state.health.grad_norm, [4, 1])
    np.testing.assert_allclose(state.health.update_norm, [0, 0.5])
    assert jopt.health_report(state.health, params).vanishing == ()
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.health.grad_norm, [4, 1])
