"""Clipping is torch.nn.utils', and a chain ends in the exact step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.experimental.sparse import BCOO

import jopt
from jopt._compat import enable_x64
from tests import cases

TYPES = ["float64", "float32", "bfloat16"]


def gradients(dtype, scale=3.0):
    rng = np.random.default_rng(0)
    return {
        name: (jnp.asarray(rng.standard_normal(shape) * scale)).astype(dtype)
        for name, shape in [("a", (64,)), ("b", (8, 16)), ("c", (1,))]
    }


def in_torch(grads):
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    interop = pytest.importorskip("interop")
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in interop.to_torch(list(grads.values()))]
    for p, g in zip(params, interop.to_torch(list(grads.values())), strict=True):
        p.grad = g
    return torch, interop, params


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "p", cases.mostly_slow([2.0, 1.0, 3.0, 0.5, 0.0, math.inf, -math.inf, -1.0], [2.0, 3.0, 0.0, math.inf])
)
@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e4])
def test_clip_grad_norm(p, max_norm, dtype):
    with enable_x64(dtype == "float64"):
        grads = gradients(dtype)
        torch, _, params = in_torch(grads)
        expected = torch.nn.utils.clip_grad_norm_(params, max_norm, p)
        tx = jopt.clip_grad_norm(max_norm, p)
        clipped, state = jax.jit(tx.update)(grads, tx.init(grads))
        tolerance = cases.CLIPPED[dtype]
        assert cases.difference(state.total_norm, np.asarray(expected.double())) <= tolerance
        for found, q in zip(clipped.values(), params, strict=True):
            assert found.dtype == dtype
            assert cases.difference(found, np.asarray(q.grad.double())) <= tolerance


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
def test_clip_grad_norm_of_complex_gradients(p, x64):
    """Alone and in the step, whose factor multiplies both parts."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((2, *shape)) for shape in ((7,), (3, 2))]
    grads = [jnp.asarray(re + 1j * im) for re, im in values] + [jnp.ones(3)]
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.from_numpy(np.array(g)).dtype)) for g in grads]
    for q, g in zip(params, grads, strict=True):
        q.grad = torch.from_numpy(np.array(g))
    optimizer = torch.optim.SGD(params, lr=0.5)
    expected = torch.nn.utils.clip_grad_norm_(params, 1.0, p)
    optimizer.step()
    clip = jopt.clip_grad_norm(1.0, p)
    clipped, state = jax.jit(clip.update)(grads, clip.init(grads))
    assert cases.difference(state.total_norm, expected.numpy()) <= cases.CLIPPED["float64"]
    for found, q in zip(clipped, params, strict=True):
        assert cases.difference(found, q.grad.numpy()) <= cases.CLIPPED["float64"]
    tx = jopt.chain(clip, jopt.sgd(lr=0.5))
    start = [jnp.zeros_like(g) for g in grads]
    for found, q in zip(tx.step(grads, tx.init(start), start)[0], params, strict=True):
        assert cases.difference(found, q.detach().numpy()) <= cases.CLIPPED["float64"]


@pytest.mark.parametrize("dtype", TYPES)
def test_clip_grad_value(dtype):
    with enable_x64(dtype == "float64"):
        grads = gradients(dtype)
        grads["c"] = jnp.full((1,), jnp.nan, dtype)
        torch, _, params = in_torch(grads)
        torch.nn.utils.clip_grad_value_(params, 0.7)
        tx = jopt.clip_grad_value(0.7)
        clipped, _ = jax.jit(tx.update)(grads, tx.init(grads))
        for found, q in zip(clipped.values(), params, strict=True):
            np.testing.assert_array_equal(np.asarray(found, np.float64), np.asarray(q.grad.double()))


def test_types_mix_and_missing_gradients_do_not_count():
    torch, interop, params = in_torch(gradients("float32"))
    grads = gradients("float32")
    grads["c"], params[2].grad = None, None
    grads["b"], params[1].grad = grads["b"].astype(jnp.bfloat16), None
    params[1] = torch.nn.Parameter(torch.zeros(8, 16, dtype=torch.bfloat16))
    params[1].grad = interop.to_torch(grads["b"])
    expected = torch.nn.utils.clip_grad_norm_(params, 1.0)
    tx = jopt.clip_grad_norm(1.0)
    clipped, state = tx.update(grads, tx.init(grads))
    assert clipped["c"] is None
    assert cases.difference(state.total_norm, expected.numpy()) <= cases.CLIPPED["bfloat16"]
    assert cases.difference(clipped["b"], np.asarray(params[1].grad.double())) <= cases.CLIPPED["bfloat16"]


def test_packed_is_clipped_as_the_tree():
    grads = gradients("float32")
    tx = jopt.clip_grad_norm(1.0)
    packed, state = tx.update(jopt.pack(grads), tx.init(grads))
    plain, expected = tx.update(grads, tx.init(grads))
    assert cases.difference(state.total_norm, expected.total_norm) <= cases.CLIPPED["float32"]
    for name, x in jopt.unpack(packed).items():
        assert cases.difference(x, plain[name]) <= cases.CLIPPED["float32"]
    with pytest.raises(ValueError, match="norm_type"):
        jopt.clip_grad_norm(1.0, -1.0).update(jopt.pack(grads), tx.init(grads))


def test_error_if_nonfinite():
    tx, bad = jopt.clip_grad_norm(1.0, error_if_nonfinite=True), {"w": jnp.array([1.0, jnp.inf])}
    torch, _, params = in_torch(bad)
    with pytest.raises(RuntimeError) as expected:
        torch.nn.utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as found:
        tx.update(bad, tx.init(bad))
    assert str(found.value) == str(expected.value)
    checked = checkify.checkify(jax.jit(tx.update))
    assert "is non-finite" in checked(bad, tx.init(bad))[0].get()
    assert checked({"w": jnp.ones(2)}, tx.init(bad))[0].get() is None


def test_without_gradients():
    tx = jopt.clip_grad_norm(1.0)
    assert tx.update({}, tx.init({}))[1].total_norm == 0
    assert tx.update({"w": None}, tx.init({"w": jnp.ones(1)}))[0] == {"w": None}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: jopt.clip_grad_norm(-1.0), ValueError, "max_norm: expected a number of at least 0.0, found -1.0"),
        (lambda: jopt.clip_grad_norm("a"), ValueError, "max_norm"),
        (lambda: jopt.clip_grad_norm(1.0, "inf"), ValueError, "norm_type"),
        (lambda: jopt.clip_grad_norm(1.0, math.nan), ValueError, "norm_type"),
        (lambda: jopt.clip_grad_value(-0.1), ValueError, "clip_value"),
        (lambda: jopt.chain(), ValueError, "at least one transformation"),
        (lambda: jopt.chain(jopt.sgd(lr=1.0), 0.1), TypeError, "found 0.1 at position 1"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_sparse_gradients_are_refused():
    sparse = BCOO.fromdense(jnp.eye(2))
    for tx in (jopt.clip_grad_norm(1.0), jopt.clip_grad_value(1.0)):
        with pytest.raises(TypeError, match=r"dense gradients, found BCOO at \['w'\]"):
            tx.update({"w": sparse}, tx.init({"w": jnp.ones((2, 2))}))


# --- chains


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_chain_is_torchs_loop(dtype):
    """clip_grad_norm_, clip_grad_value_, step: 40 steps, of Adam and packed too."""
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    problem = cases.Problem(dtype)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in problem.start]
    optimizer = torch.optim.AdamW(theirs, lr=0.02)
    tx = jopt.chain(jopt.clip_grad_norm(5.0), jopt.clip_grad_value(0.4), jopt.adamw(lr=0.02))
    with enable_x64(dtype == "float64"):
        ours = [jnp.asarray(x) for x in problem.start]
        packed = jopt.pack(ours)
        state, packed_state = tx.init(ours), tx.init(packed)
        step = jax.jit(tx.step)
        for i in range(40):
            for p, g in zip(theirs, problem.grads(i, [p.detach().numpy() for p in theirs]), strict=True):
                p.grad = torch.tensor(g)
            torch.nn.utils.clip_grad_norm_(theirs, 5.0)
            torch.nn.utils.clip_grad_value_(theirs, 0.4)
            optimizer.step()
            ours, state = step([jnp.asarray(g) for g in problem.grads(i, ours)], state, ours)
            grads = [jnp.asarray(g) for g in problem.grads(i, jopt.unpack(packed))]
            packed, packed_state = step(jopt.pack(grads), packed_state, packed)
    for p, x, y in zip(theirs, ours, jopt.unpack(packed), strict=True):
        assert cases.difference(x, p.detach().numpy()) <= cases.TOLERANCES[dtype]
        assert cases.difference(y, p.detach().numpy()) <= cases.TOLERANCES[dtype]


def test_a_chain_is_an_optax_transformation():
    tx = optax.chain(jopt.chain(optax.clip(0.5), jopt.sgd(lr=0.1)), optax.scale(2.0))
    params = {"w": jnp.zeros(2)}
    updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
    exact = jopt.chain(optax.clip(0.5), optax.sgd(0.1))  # a last link without a step of its own
    params, _ = exact.step({"w": jnp.ones(2)}, exact.init(params), params)
    np.testing.assert_allclose(params["w"], -0.05, rtol=1e-6)


def test_chains_nest_and_pass_on_what_is_active():
    tx = jopt.chain(jopt.clip_grad_value(0.5), jopt.chain(jopt.clip_grad_norm(10.0), jopt.sgd(lr=1.0)))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    new, _ = tx.step({"a": jnp.ones(2), "b": jnp.ones(2)}, tx.init(params), params, active={"a": True, "b": False})
    np.testing.assert_allclose(new["a"], -0.5, rtol=1e-6)
    assert new["b"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="the 2 states of this chain"):
        tx.step(params, (), params)


def test_the_norm_is_of_what_the_link_sees():
    """Around the groups it is that of all gradients, inside a group's chain that of the group."""
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    params = jax.tree.map(jnp.zeros_like, grads)
    around = jopt.chain(jopt.clip_grad_norm(1.0), jopt.param_groups(jopt.sgd, {"a": {"lr": 2.0}}, lr=1.0))
    new, state = around.step(grads, around.init(params), params)
    assert state[0].total_norm == 5.0
    np.testing.assert_allclose([new["a"][0], new["b"][0]], [-2 * 0.6, -0.8], rtol=1e-6)
    own = jopt.chain(jopt.clip_grad_norm(1.0), jopt.sgd(lr=1.0))
    inside = jopt.param_groups(jopt.sgd, {"a": own}, lr=1.0)
    new, state = inside.step(grads, inside.init(params), params)
    assert state.groups[0][0].total_norm == 3.0
    np.testing.assert_allclose([new["a"][0], new["b"][0]], [-1.0, -4.0], rtol=1e-6)
