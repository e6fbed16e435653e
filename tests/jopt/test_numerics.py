"""Scalars are double inside any JAX transformation; low precision rounds after each operation."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jopt import numerics as t
from jopt._compat import enable_x64


def correction(count):
    """1 - beta^t, which float32 gets wrong in the fifth digit."""
    return t.in_double(lambda e, _: 1 - 0.999**e, jnp.asarray(count, jnp.float32), dtype=jnp.float32)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: jax.vmap(f)(x[None])[0]])
@pytest.mark.parametrize("count", [1.0, 2.0, 1000.0])
def test_scalars_are_rounded_doubles(wrap, count):
    assert np.asarray(wrap(correction)(jnp.float32(count))) == np.float32(1 - 0.999**count)
    assert np.float32(1 - 0.999) != 1 - np.float32(0.999)  # what it is for


def test_scalars_in_scan_and_export():
    _, found = jax.lax.scan(lambda n, _: (n + 1, correction(n)), jnp.float32(1), length=50)
    np.testing.assert_array_equal(found, np.float32([1 - 0.999**i for i in range(1, 51)]))
    exported = jax.export.export(jax.jit(correction))(jax.ShapeDtypeStruct((), jnp.float32))
    assert exported.call(jnp.float32(3)) == np.float32(1 - 0.999**3)


def test_integer_counts_divide_in_double():
    """count / 1000 of an int32 is float32 even with x64 on; inside the scope counts are int64."""

    def cosine(_, count):
        return 0.5 * (1 + jnp.cos(jnp.pi * count / 1000))

    for count in range(0, 1000, 37):
        found = t.in_double(cosine, (), jnp.int32(count), dtype=jnp.float32)
        assert found == np.float32(0.5 * (1 + math.cos(math.pi * count / 1000)))


def test_derivatives_of_scalars():
    """Through scan, to second order, of a schedule that closes over what is differentiated, with x64 off."""

    def trajectory(lr):
        def body(p, count):
            c = t.in_double(
                lambda step, count: lr * jnp.cos(count / 10) / (1 - 0.9**step),
                jnp.array([1.0, 2.0]) + count.astype(jnp.float32),
                count,
                dtype=jnp.float32,
            )
            return p - c * p**2, None

        return jax.lax.scan(body, jnp.ones(2), jnp.arange(4))[0].sum()

    def exact(lr):
        p = np.ones(2)
        for count in range(4):
            p = p - lr * math.cos(count / 10) / (1 - 0.9 ** (np.array([1.0, 2.0]) + count)) * p**2
        return p.sum()

    h = 1e-4
    first = (exact(0.01 + h) - exact(0.01 - h)) / (2 * h)
    second = (exact(0.01 + h) - 2 * exact(0.01) + exact(0.01 - h)) / h**2
    for grad in (jax.grad, jax.jacfwd, jax.jacrev):
        assert grad(trajectory)(0.01) == pytest.approx(first, rel=1e-4)
        assert jax.jit(grad(grad(trajectory)))(0.01) == pytest.approx(second, rel=1e-3)


def test_derivative_of_a_table():
    """A schedule may index an array: not elementwise, and still differentiable."""

    def value(table):
        return t.in_double(lambda _, i: table[i] ** 2, (), jnp.int32(1), dtype=jnp.float32)

    np.testing.assert_allclose(jax.grad(value)(jnp.array([1.0, 3.0, 5.0])), [0, 6, 0])


OPERATIONS = {
    "add": (lambda x, y, z, w: t.add(x, y), lambda x, y, z, w: x + y),
    "mul": (lambda x, y, z, w: t.mul(x, w), lambda x, y, z, w: x * w),
    "div": (lambda x, y, z, w: t.div(x, w), lambda x, y, z, w: x / w),
    "sqrt": (lambda x, y, z, w: t.sqrt(z), lambda x, y, z, w: np.sqrt(z)),
    "lerp": (lambda x, y, z, w: t.lerp(x, y, w), lambda x, y, z, w: x + w * (y - x)),
    "lerp near 1": (lambda x, y, z, w: t.lerp(x, y, 1 - w), lambda x, y, z, w: y - (y - x) * w),
    "addcmul": (lambda x, y, z, w: t.addcmul(x, y, z, w), lambda x, y, z, w: x + w * y * z),
    "addcdiv": (lambda x, y, z, w: t.addcdiv(x, y, z, w), lambda x, y, z, w: x + w * y / z),
}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_round_once(name, dtype):
    """Against the exact result rounded to the type: equal, or the neighbour where float32 rounded first."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(4096).astype(dtype) for _ in range(2))
    z = (np.abs(rng.standard_normal(4096)) + 0.1).astype(dtype)
    w = np.float32(0.125) if dtype != np.float64 else np.float64(0.125)
    ours, exact = OPERATIONS[name]
    with enable_x64(True):
        found = np.asarray(jax.jit(ours)(x, y, z, w))
    assert found.dtype == dtype
    expected = exact(*(a.astype(np.longdouble) for a in (x, y, z)), np.longdouble(w)).astype(dtype)
    differs = found != expected
    assert differs.mean() <= (1e-3 if dtype in (ml_dtypes.bfloat16, np.float16) else 0.5)
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    assert error <= 2 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected.astype(np.float64)).max()


def test_a_chain_rounds_after_each_operation():
    """XLA may keep excess precision between converted values; torch does not."""
    x = np.full(64, 1.0, ml_dtypes.bfloat16)
    tiny = np.float32(2**-9)  # half an ulp: each addition alone rounds back to 1
    chain = jax.jit(lambda x: t.add(t.mul(t.mul(x, np.float32(1 + 2**-9)), np.float32(1 + 2**-9)), jnp.float32(tiny)))
    np.testing.assert_array_equal(np.asarray(chain(x)).astype(np.float32), 1.0)


def test_float16_subnormals_survive():
    """Second moments of small gradients are subnormal in float16; torch keeps them."""
    x = (np.arange(1, 1024) * 2.0**-24).astype(np.float16)
    found = jax.jit(lambda x: t.mul(x, np.float32(0.75)))(x)
    np.testing.assert_array_equal(found, (x.astype(np.float64) * 0.75).astype(np.float16))
