"""Front end 2: packing keeps values and gradients, steps as the tree does, and compiles in constant size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt._compat import enable_x64
from jopt.rule import Rule
from jopt.transform import transform
from tests import cases


def tree():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.standard_normal((3, 5)), jnp.float32),
        "b": [jnp.asarray(rng.standard_normal(65), jnp.float32), jnp.asarray(1.5, jnp.float32)],
        "c": jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
        "empty": jnp.zeros((0, 4), jnp.float32),
    }


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_unpack_inverts_pack():
    packed = jopt.pack(tree())
    assert_equal(jopt.unpack(packed), tree())
    assert_equal(jax.jit(jopt.unpack)(packed), tree())
    assert len(jax.tree.leaves(packed)) == 2  # one buffer a type
    assert sorted(x.size for x in jax.tree.leaves(packed)) == [7, 15 + 65 + 1]  # and nothing between
    assert_equal(jopt.unpack(jopt.pack({})), {})


def test_a_long_buffer_divides_among_threads():
    """By any of 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64; what fills it up is 0 and stays 0."""
    tree = {"w": jnp.ones((333, 101)), "b": jnp.ones(4)}
    packed = jopt.pack(tree)
    (buffer,) = packed.buffers
    assert buffer.size % 960 == 0
    assert buffer.size - 960 < 333 * 101 + 4 <= buffer.size
    tx = jopt.adamw(0.1)
    grads = jax.grad(lambda packed: sum((x**2).sum() for x in jax.tree.leaves(jopt.unpack(packed))))(packed)
    new, _ = tx.step(grads, tx.init(packed), packed)
    for x in (buffer, grads.buffers[0], new.buffers[0]):
        assert not x[333 * 101 + 4 :].any()
        assert x[: 333 * 101 + 4].all()
    assert_equal(jopt.unpack(packed), tree)


def test_more_elements_than_int32_counts():
    tree = [jax.ShapeDtypeStruct((2**31,), jnp.float32), jax.ShapeDtypeStruct((3, 2), jnp.float32)]
    back = jax.eval_shape(jopt.unpack, jax.eval_shape(jopt.pack, tree))
    assert [x.shape for x in back] == [(2**31,), (3, 2)]


def test_gradients_come_packed():
    def loss(tree):
        return (tree["a"] ** 2).sum() + (tree["b"][0] ** 3).sum() * tree["b"][1] + tree["c"].astype(jnp.float32).sum()

    expected = jax.jit(jax.grad(loss))(tree())
    found = jax.jit(jax.grad(lambda packed: loss(jopt.unpack(packed))))(jopt.pack(tree()))
    assert isinstance(found, jopt.Packed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), jopt.unpack(found), expected)
    batched = jax.vmap(jax.grad(lambda p: loss(jopt.unpack(p))))(
        jax.tree.map(lambda x: jnp.stack([x, x]), jopt.pack(tree()))
    )
    np.testing.assert_allclose(jax.tree.leaves(batched)[0][1], jax.tree.leaves(found)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", list(cases.FRONT_ENDS))
@cases.parametrize([case for case in cases.CASES if case.scope == "element"], fast=cases.UNLIKE)
def test_packed_step_is_the_tree_step(case, dtype):
    with enable_x64(dtype == "float64"):
        problem = cases.Problem(dtype)
        tx = case.jopt(lr=lambda step: case.lr * cases.lr_factor(step, jnp.cos))
        params = [jnp.asarray(x) for x in problem.start]
        packed = jopt.pack(params)
        state, packed_state = tx.init(params), tx.init(packed)
        step = jax.jit(lambda params, state, grads: tx.step(grads, state, params))
        for i in range(30):
            grads = [jnp.asarray(g) for g in problem.grads(i, params)]
            packed_grads = jopt.pack([jnp.asarray(g) for g in problem.grads(i, jopt.unpack(packed))])
            params, state = step(params, state, grads)
            packed, packed_state = step(packed, packed_state, packed_grads)
        for name, a, b in [
            ("param", params, packed),
            *((n, state.slots[n], packed_state.slots[n]) for n in state.slots),
        ]:
            for x, y in zip(a, jopt.unpack(b), strict=True):
                assert cases.difference(y, x) <= cases.FRONT_ENDS[dtype], name


def test_program_size_does_not_grow_with_tensors():
    def instructions(n):
        packed = jopt.pack([jnp.ones(16)] * n)
        tx = jopt.adamw()
        text = jax.jit(tx.step).lower(packed, tx.init(packed), packed).as_text()
        return text.count("\n")

    assert instructions(200) == instructions(2)


def test_a_rule_over_tensors_refuses_a_buffer():
    class Normalized(Rule):
        hyperparameters = ("lr",)
        scope = "tensor"

        def init(self, h, param):
            return {}

        def scalars(self, h, s, xp, stored):
            return {"lr": h["lr"]}, s | {"step": s["step"] + 1}

        def update(self, c, grad, state, param):
            return param - c["lr"] * grad / jnp.sqrt(jnp.sum(grad**2)), state

    tx = transform(Normalized, dict(lr=0.1))
    params = {"w": jnp.ones(4)}
    np.testing.assert_allclose(tx.step(params, tx.init(params), params)[0]["w"], 0.95)
    with pytest.raises(ValueError, match=r"Normalized looks at whole tensors or rows .scope 'tensor'., which a packed"):
        tx.init(jopt.pack(params))


def test_unpack_wants_a_packed():
    with pytest.raises(TypeError, match=r"packed: expected a jopt.arena.Packed .*, found dict"):
        jopt.unpack({})
