"""`one_loop` computes what it is given, and XLA on CPU makes of it one loop for all outputs of a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jopt import loops
from jopt._compat import JAX
from jopt.fusion import fuses_outputs, multi_output_fusion
from jopt.loops import calls_back, one_loop
from tests import cases

UNARY = [
    jnp.sin,
    jnp.tanh,
    jnp.abs,
    jnp.negative,
    jnp.square,
    jax.nn.relu,
    lambda x: x**3,
    jax.jit(lambda x: x * 2 + 1),
]
BINARY = [jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, lambda x, y: jnp.where(x > y, x, y), jnp.arctan2]
REDUCE = [jnp.sum, jnp.max, lambda x: jnp.sqrt(jnp.sum(x * x))]
OTHER = [lambda x: jnp.cumsum(x, -1), lambda x: x[::-1], lambda x: x - x.mean(-1, keepdims=True)]


def drawn(seed):
    """A function of three arrays of two shapes: elementwise, reducing and other operations of each other's results."""
    random = np.random.default_rng(seed)
    shapes = [(4, 3), (4, 3), (5,), (4, 3)]
    steps = [random.integers(0, 10_000, 4) for _ in range(random.integers(4, 14))]

    def f(*inputs):
        arrays, numbers = list(inputs), [jnp.asarray(0.5, inputs[0].dtype)]
        for kind, which, a, b in steps:
            x = arrays[a % len(arrays)]
            like = [y for y in arrays if y.shape == x.shape]
            match kind % 5:
                case 0:
                    arrays.append(UNARY[which % len(UNARY)](x))
                case 1 | 2:
                    arrays.append(BINARY[which % len(BINARY)](x, like[b % len(like)]))
                case 3:
                    numbers.append(REDUCE[which % len(REDUCE)](x) / 9)
                    arrays.append(x * numbers[b % len(numbers)])
                case _:
                    arrays.append(OTHER[which % len(OTHER)](x))
        chosen = random.permutation(len(arrays))[: max(2, len(arrays) // 2)]
        return [arrays[i] for i in chosen] + numbers[-1:] + [inputs[0], arrays[-1], arrays[-1]]

    rng = np.random.default_rng(seed + 1)
    return f, [jnp.asarray(rng.normal(size=s)) for s in shapes]


@pytest.mark.parametrize("seed", cases.mostly_slow(range(200), range(12)))
def test_drawn_programs_give_the_same(seed, x64):
    f, arrays = drawn(seed)
    closed = jax.make_jaxpr(f)(*arrays)
    with multi_output_fusion():
        found = jax.jit(one_loop(closed))(*arrays)
    expected = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arrays)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", cases.mostly_slow(range(200), range(12)))
def test_sums_of_a_few_terms_at_a_time_are_the_same(seed, x64, monkeypatch):
    """Where all sums are so, of sizes that a part divides and does not."""
    monkeypatch.setattr(loops, "FEW", 2 + seed % 4)
    monkeypatch.setattr(loops, "COSTLY", loops.ELEMENTWISE)
    f, arrays = drawn(seed)
    closed = jax.make_jaxpr(f)(*arrays)
    found = jax.jit(one_loop(closed))(*arrays)
    for x, y in zip(found, jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arrays), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_derivatives_and_batches_go_through_such_sums(x64, monkeypatch):
    monkeypatch.setattr(loops, "FEW", 4)

    def step(x, y):
        z = jnp.tanh(x / (jnp.sqrt(y) + 1))
        return [x - z / jnp.sqrt(jnp.sum(z * z)), z]

    x, y = jnp.linspace(0.1, 1, 3 * 11).reshape(3, 11), jnp.linspace(1, 2, 3 * 11).reshape(3, 11)
    by_parts = one_loop(jax.make_jaxpr(step)(x, y))
    assert "while" in jax.jit(by_parts).lower(x, y).compile().as_text()

    def loss(f, x, y):
        return jnp.sum(f(x, y)[0] ** 3)

    for of in (jax.grad, jax.jacfwd):
        found, expected = (of(lambda x, f=f: loss(f, x, y))(x) for f in (by_parts, step))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    batch = jnp.stack([x, 2 * x])
    found, expected = (jax.vmap(f, (0, None))(batch, y)[0] for f in (by_parts, step))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_sum_of_numbers_alone(relaxed):
    """Which begins with no array that could be taken in parts."""

    def f(x, number):
        return [x * jnp.sum(jnp.sqrt(jnp.broadcast_to(number, (4 * loops.FEW,)))), x + 1]

    x, number = jnp.ones(3), jnp.float32(4.0)
    found = one_loop(jax.make_jaxpr(f)(x, number))(x, number)
    assert found[0].tolist() == [8.0 * loops.FEW] * 3


# Reads and writes of an array as large as the parameter, of which a step cannot do without: of each input and output
# one, and what a norm reads before.
PASSES = {
    "lion": (lambda: optax.lion(1e-3), 5),
    "adam": (lambda: optax.adam(1e-3), 7),
    "adamw": (lambda: optax.adamw(1e-3), 7),
    "rmsprop": (lambda: optax.rmsprop(1e-3, momentum=0.9), 7),
    "clipped adamw": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 8),
    "schedule-free sgd": (lambda: contrib.schedule_free(optax.sgd(1e-3), 1e-3, b1=0.9), 5),
    "schedule-free adamw": (lambda: contrib.schedule_free_adamw(1e-3), 7),
    "ademamix": (lambda: contrib.ademamix(1e-3), 9),
    "adopt": (lambda: contrib.adopt(1e-3), 7),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_transformation_is_one_loop_a_parameter(name, relaxed):
    """By the bytes that its program accesses, as XLA counts them, and with no temporary array of their size."""
    if not fuses_outputs(own=True):
        pytest.skip("this JAX takes no option by which XLA on CPU fuses outputs")
    tx, passes = PASSES[name][0](), PASSES[name][1]
    params = {name: jnp.ones((512, 256)) for name in "ab"}
    state = tx.init(params)

    def step(state, params, grads):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    closed = jax.make_jaxpr(step)(state, params, params)
    flat = jax.tree.leaves((state, params, params))
    n = len(jax.tree.leaves((state, params)))
    with multi_output_fusion():
        compiled = jax.jit(one_loop(closed), donate_argnums=tuple(range(n))).lower(*flat).compile()
    size = sum(x.nbytes for x in params.values())
    if JAX < (0, 10) and name == "clipped adamw":
        return  # this XLA writes the squares of a norm to memory
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.02 * size
    assert compiled.cost_analysis()["bytes accessed"] <= (passes + 0.1) * size


def test_what_calls_back_is_found():
    def callback(x):
        return jax.pure_callback(np.negative, jax.ShapeDtypeStruct((3,), jnp.float32), x)

    def inside(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.jit(callback)(x), lambda x: x, x)

    x = jnp.ones(3)
    assert calls_back(jax.make_jaxpr(callback)(x).jaxpr)
    assert calls_back(jax.make_jaxpr(inside)(x).jaxpr)
    assert calls_back(jax.make_jaxpr(lambda x: jax.debug.print("{}", x))(x).jaxpr)
    assert not calls_back(jax.make_jaxpr(lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x))(x).jaxpr)


def test_effects_that_nothing_reads_stay():
    seen = []

    def f(x):
        jax.debug.callback(seen.append, x.sum())
        return x + 1, x * 2

    closed = jax.make_jaxpr(f)(jnp.ones(3))
    jax.block_until_ready(jax.jit(one_loop(closed))(jnp.ones(3)))
    jax.effects_barrier()
    assert [float(x) for x in seen] == [3.0]
