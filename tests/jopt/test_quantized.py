"""State in eight and sixteen bits: the map, every rule over it, what is refused; against numbers of torchao's."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import quantized
from jopt.leaf import init_leaf, step_leaf
from tests import cases, eight_bits

SIGNED = pytest.mark.parametrize("signed", [True, False])
ROUNDED = pytest.mark.parametrize("seed", [None, 0], ids=["nearest", "at random"])
NARROW = [case for case in cases.CASES if case.jopt().rule.signs().keys() & set(case.slots)]
SHAPE = (65, 70)  # of more than 4096 elements, the last block of less than 256


def numbers(signed, size=2**16, seed=0):
    """Of all magnitudes, to some below every code."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(size) * 10.0 ** rng.uniform(-9, 0, size)).astype(np.float32)
    return x if signed else np.abs(x)


# --- the map


@SIGNED
def test_the_map_is_as_documented(signed):
    """0, 1, and in each decade twice as many values as in the one below, in the middles of equal parts."""
    found = quantized.dynamic_map(signed)
    assert found.size == 256
    assert (np.diff(found) > 0).all()
    assert {0, 1} <= set(found.tolist())
    for k in range(7):
        n = 2 ** (6 - k) * (1 if signed else 2)
        part = found[(found > 0.1 * 10.0**-k) & (found < 10.0**-k)]
        np.testing.assert_allclose(part, 10.0**-k * (0.1 + 0.9 * (np.arange(n) + 0.5) / n), rtol=2e-7)
        if signed:
            np.testing.assert_array_equal(np.sort(-part), found[(found < -0.1 * 10.0**-k) & (found > -(10.0**-k))])


@SIGNED
def test_each_code_is_the_nearest(signed):
    """Of all 256, by brute force; but what is no 0 does not become one where it is never negative."""
    x = numbers(signed)
    codes, absmax = map(np.asarray, quantized.encode(jnp.asarray(x), signed))
    blocks = x.reshape(-1, 256)
    np.testing.assert_array_equal(absmax, np.abs(blocks).max(1))
    scaled = (blocks * (1 / absmax[:, None])).reshape(-1).astype(np.float64)
    values = quantized.dynamic_map(signed).astype(np.float64)
    nearest = np.abs(scaled[:, None] - values).argmin(1)
    expected = nearest if signed else np.where(x > 0, np.maximum(nearest, 1), 0)
    np.testing.assert_array_equal(codes, expected)
    assert signed or (nearest == 0).sum() > 1000
    decoded = np.asarray(quantized.decode(jnp.asarray(codes), jnp.asarray(absmax), signed))
    np.testing.assert_array_equal(decoded, (values[codes].astype(np.float32) * absmax.repeat(256)))


@SIGNED
@ROUNDED
def test_codes_are_their_own(signed, seed):
    """What a code stands for is encoded as it, whatever the rounding."""
    codes = jnp.arange(256, dtype=jnp.uint8)
    key = None if seed is None else jax.random.key(seed)
    again, absmax = quantized.encode(quantized.decode(codes, jnp.ones(1), signed), signed, key)
    np.testing.assert_array_equal(again, codes)
    assert absmax.tolist() == [1]


@SIGNED
def test_rounding_at_random_keeps_the_mean(signed):
    """Within five deviations of the mean of 1000, at numbers between the map's ends."""
    x = numbers(signed, 4096)
    values = quantized.magnitudes(signed)
    encode = jax.jit(functools.partial(quantized.encode, signed=signed))
    decoded = []
    for seed in range(1000):
        codes, absmax = encode(jnp.asarray(x), key=jax.random.key(seed))
        decoded.append(np.asarray(quantized.decode(codes, absmax, signed)))
    largest = np.asarray(absmax).repeat(256)
    scaled = np.abs(x) / largest
    above = np.searchsorted(values, scaled)
    steps = values[above] - values[np.maximum(above - 1, 0)]
    inside = (scaled > values[1]) & (scaled < values[-2])
    bound = 5 * 0.5 * steps / 1000**0.5
    error = np.abs(np.mean(decoded, 0, dtype=np.float64) - x) / largest
    assert inside.sum() > 2000
    assert (error <= bound)[inside].all()
    np.testing.assert_array_less(np.abs(decoded[0] - x), steps * largest * 1.001 + 1e-30)


@SIGNED
def test_zeros_and_what_is_not_finite(signed):
    x = np.zeros(1024, np.float32)
    x[256:259] = 1, 0, 0.5
    x[512] = np.nan
    x[768] = np.inf
    decoded = np.asarray(quantized.decode(*quantized.encode(jnp.asarray(x), signed), signed))
    assert not decoded[:256].any()
    assert decoded[256] == 1
    assert not decoded[257]
    assert not np.isfinite(decoded[512:]).any()


# --- rules


def leaf(case, dtype=jnp.float32, **options):
    """A leaf of a rule after a few steps in float32, its coefficients and a gradient."""
    tx = case.jopt(**options)
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal(SHAPE), dtype)
    state = tx.init(params)
    for _ in range(3):
        params, state = tx.step(jnp.asarray(rng.standard_normal(SHAPE), dtype), state, params)
    return tx, params, state, jnp.asarray(rng.standard_normal(SHAPE), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@cases.parametrize(NARROW, fast=cases.FEW)
def test_a_step_is_the_rules_on_the_decoded_state(case, dtype, x64):
    tx, params, state, grad = leaf(case, dtype, state_dtype="int8")
    rule, signs = tx.rule, tx.rule.signs()
    wide = state._replace(slots={})
    for name, x in state.slots.items():
        if name.endswith("_int8"):
            slot = name.removesuffix("_int8")
            assert (x.dtype, x.shape) == (jnp.uint8, SHAPE)
            absmax = state.slots[f"{slot}_absmax"]
            assert (absmax.dtype, absmax.shape) == (jnp.float32, (18,))
            wide.slots[slot] = quantized.decode(x, absmax, signs[slot])
        elif x is not None and not name.endswith("_absmax"):
            wide.slots[name] = x
    plain = case.jopt(state_dtype="float32")
    expected, expected_state = plain.step(grad, wide, params)
    new, new_state = tx.step(grad, state, params)
    assert new.dtype == params.dtype
    tolerance = {"bfloat16": 2**-8} | cases.FRONT_ENDS
    assert cases.difference(new.astype(jnp.float32), expected.astype(jnp.float32)) <= tolerance[dtype]
    assert any(name.endswith("_int8") for name in new_state.slots) == bool(rule.signs())
    for slot, x in expected_state.slots.items():
        if f"{slot}_int8" not in new_state.slots:
            assert cases.difference(new_state.slots[slot], x) <= cases.FRONT_ENDS["float32"]
            continue
        codes, absmax = (new_state.slots[f"{slot}_{end}"] for end in ("int8", "absmax"))
        their_codes, their_absmax = quantized.encode(x, signs[slot])
        assert cases.difference(absmax, their_absmax) <= cases.FRONT_ENDS["float32"]
        # The same, but where another contraction moved a number past the middle between two.
        assert np.abs(np.asarray(codes, int) - np.asarray(their_codes, int)).max() <= 1
        assert (codes != their_codes).mean() < 1e-3


@cases.parametrize(NARROW, fast=cases.FEW)
@ROUNDED
def test_sixteen_bits(case, seed):
    """The state of float32 parameters in bfloat16: the step is float32's on it, and rounds once."""
    options = {} if seed is None else {"stochastic_rounding": seed}
    tx, params, state, grad = leaf(case, state_dtype="bfloat16", **options)
    signs = tx.rule.signs()
    assert all(x.dtype == (jnp.bfloat16 if name in signs else jnp.float32) for name, x in state.slots.items())
    wide = state._replace(slots={name: x.astype(jnp.float32) for name, x in state.slots.items()})
    expected, expected_state = case.jopt().step(grad, wide, params)
    new, new_state = tx.step(grad, state, params)
    assert cases.difference(new, expected) <= cases.FRONT_ENDS["float32"]
    for slot, x in expected_state.slots.items():
        found, x = (np.asarray(y, np.float32) for y in (new_state.slots[slot], x))
        ulps = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 1e-30))) - 7)
        # What is left of numbers that cancel has float32's error of those.
        float32s = cases.FRONT_ENDS["float32"] * np.abs(x).max()
        assert (np.abs(found - x) <= ulps * (1 if seed is not None else 0.5) + float32s).all()


def test_sixteen_bits_at_random_keep_what_nearest_loses():
    """A second moment that falls by a thousandth a step: to nearest bfloat16 it stays where it is."""
    params = jnp.zeros(10000)
    found = {}
    for seed in (None, 0):
        tx = jopt.rmsprop(lr=0.0, alpha=0.999, state_dtype="bfloat16", stochastic_rounding=seed)
        state = tx.init(params)
        state = state._replace(slots={"square_avg": jnp.ones(10000, jnp.bfloat16)})
        for _ in range(100):
            _, state = jax.jit(tx.step)(params, state, params)
        found[seed] = state.slots["square_avg"].astype(jnp.float32).mean()
    assert found[None] == 1
    assert abs(found[0] - 0.999**100) < 1e-3


def adam(n):
    """AdamW's rule, coefficients, and a leaf of n numbers with its gradient and first state in codes."""
    h = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    rule = jopt.optimizers.Adam(True, False, False, True)
    c = {name: jnp.asarray(x, jnp.float32) for name, x in rule.scalars(h, {"step": 3.0}, np, np.asarray)[0].items()}
    param, grad = (jnp.asarray(numbers(True, n, seed)) for seed in (1, 2))
    return rule, c, grad, init_leaf(rule, h, param, quantized.INT8), param


@pytest.mark.parametrize("n", [4096 * 6, 256 * 101 + 7], ids=["even", "with a rest"])
def test_in_pieces_as_in_one(monkeypatch, n):
    rule, c, grad, first, start = adam(n)
    results = []
    for piece in (2**20, 4096):
        monkeypatch.setattr(quantized, "PIECE", piece)
        param, state = start, first
        for _ in range(3):
            param, state = step_leaf(rule, c, grad, state, param)
        results.append((param, state))
    (one, one_state), (pieces, pieces_state) = results
    assert cases.difference(pieces, one) <= cases.FRONT_ENDS["float32"]
    for name, x in one_state.items():
        y = pieces_state[name]
        if x.dtype == jnp.uint8:
            assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1
            assert (x != y).mean() < 1e-3
        else:
            assert cases.difference(y, x) <= cases.FRONT_ENDS["float32"]


def test_pieces_have_random_numbers_of_their_own(monkeypatch):
    monkeypatch.setattr(quantized, "PIECE", 4096)
    rule, c, _, state, _ = adam(8192)
    same = jnp.tile(jnp.asarray(numbers(True, 4096)), 2)
    _, state = step_leaf(rule, c, same, state, same, key=jax.random.key(0))
    first, second = state["exp_avg_int8"].reshape(2, -1)
    assert 0 < (first != second).mean() < 1
    assert (state["exp_avg_absmax"][:16] == state["exp_avg_absmax"][16:]).all()


def test_what_is_not_stepped_is_kept_to_the_bit():
    """A gradient that is missing, not active or skipped: also where decoding and encoding would lose something."""
    tx = jopt.adamw(lr=0.1, state_dtype="int8")
    params = {"a": jnp.asarray(numbers(True, 5000)), "b": jnp.asarray(numbers(True, 5000, 1))}
    state = tx.init(params)
    params, state = tx.step(params, state, params)
    step = jax.jit(tx.step)
    for result in (
        step({"a": None, "b": None}, state, params),
        step(params, state, params, active={"a": False, "b": jnp.asarray(False)}),
        step(params, state, params, skip=jnp.asarray(True)),
    ):
        before, after = (jax.tree.leaves(x) for x in ((params, state.slots), (result[0], result[1].slots)))
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x, y)


def test_small_complex_and_packed_leaves():
    tx = jopt.adam(state_dtype="int8")
    params = {
        "small": jnp.ones(4095, jnp.bfloat16),
        "large": jnp.ones((64, 64), jnp.bfloat16),
        "complex": jnp.ones((64, 64), jnp.complex64),
    }
    slots = tx.init(params).slots
    assert set(slots) == {"exp_avg", "exp_avg_sq"} | {
        f"exp_avg{a}_{b}" for a in ("", "_sq") for b in ("int8", "absmax")
    }
    assert slots["exp_avg"]["small"].dtype == jnp.float32
    assert slots["exp_avg"]["complex"].dtype == jnp.complex64
    assert slots["exp_avg"]["large"] is None
    assert slots["exp_avg_int8"]["large"].dtype == jnp.uint8
    assert slots["exp_avg_int8"]["small"] is None
    params, state = tx.step(params, tx.init(params), params)
    jax.block_until_ready(state)
    packed = jopt.pack({"a": jnp.ones(3000), "b": jnp.ones((40, 40))})
    state = tx.init(packed)
    packed, state = tx.step(packed, state, packed)
    assert [x.dtype for x in jax.tree.leaves(state.slots["exp_avg_int8"])] == [jnp.uint8]
    np.testing.assert_allclose(jopt.unpack(packed)["a"], 0.999, rtol=1e-6)


@ROUNDED
def test_under_vmap_scan_and_in_a_chain(seed):
    tx = jopt.chain(jopt.clip_grad_norm(1.0), jopt.adamw(lr=0.1, state_dtype="int8", stochastic_rounding=seed))
    params = jnp.asarray(numbers(True, 3 * 4096)).reshape(3, 4096)

    def run(params):
        def step(carry, _):
            params, state = carry
            params, state = tx.step(params, state, params)
            return (params, state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0]

    together = jax.vmap(run)(params)
    if seed is None:
        for x, y in zip(together, map(run, params), strict=True):
            assert cases.difference(x, y) <= cases.FRONT_ENDS["float32"]
    assert np.isfinite(together).all()


def test_memory():
    """AdamW: 2 bytes of codes and 8 of float32 for 256 elements; in place, with temporary memory of a few pieces."""
    n = 2**22
    tx, params = jopt.adamw(state_dtype="int8"), {"w": jax.ShapeDtypeStruct((2**12, 2**10), jnp.float32)}
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params).slots)]
    assert sum(sizes) == 2 * n + 8 * n // 256
    found = jopt.explain(tx, params)
    assert found.outputs_in_place == found.outputs
    assert found.temporary_bytes < 6 * 4 * quantized.PIECE
    assert found.accessed_bytes is None


def test_what_is_refused():
    for make, error, text in (
        (
            lambda: jopt.muon(state_dtype="int8"),
            ValueError,
            r"Muon, whose state \(momentum_buffer\) is not kept in",
        ),
        (lambda: jopt.asgd(state_dtype="bfloat16"), ValueError, r"for ASGD, whose state \(ax\) .* found bfloat16"),
        (lambda: jopt.sparse_adam(state_dtype="int8"), ValueError, "for SparseAdam"),
        (lambda: jopt.rmsprop(centered=True, state_dtype="int8"), ValueError, r"\(grad_avg, square_avg\)"),
        (lambda: jopt.adam(state_dtype="int4"), TypeError, "expected float32, bfloat16 or int8, found int4"),
        (lambda: jopt.adam(state_dtype="float23"), TypeError, "expected float32, bfloat16 or int8, found float23"),
        (lambda: jopt.adam(state_dtype="float16"), ValueError, "found float16, in which moments underflow"),
        (lambda: jopt.adam(state_dtype="uint8"), TypeError, "expected float32, bfloat16 or int8, found uint8"),
    ):
        with pytest.raises(error, match=text):
            make()
    assert not jopt.sgd(state_dtype="int8").init(jnp.ones(5000)).slots  # it has no state
    params = jnp.ones(5000)
    with pytest.raises(ValueError, match=r"state\.slots: expected exp_avg, exp_avg_absmax, exp_avg_int8, .*, found"):
        jopt.adam(state_dtype="int8").step(params, jopt.adam().init(params), params)


# --- trajectories


@pytest.mark.parametrize("name", eight_bits.REFERENCES)
def test_others_trajectories(name):
    """A number near the middle between two codes goes to either by its last bit, and that feeds back."""
    reference, saved = eight_bits.REFERENCES[name], json.loads(eight_bits.DATA.read_text())[name]
    assert saved["source"] == reference.source
    found = {}
    for dtype in (None, "int8"):
        tx = getattr(jopt, name)(**reference.arguments, state_dtype=dtype)
        params = jnp.asarray(eight_bits.start())
        state = tx.init(params)
        step = jax.jit(tx.step)
        for i in range(eight_bits.STEPS):
            params, state = step(jnp.asarray(eight_bits.gradient(np.asarray(params), i)), state, params)
        found[dtype] = np.asarray(params, np.float64)
    theirs = np.array(saved["params"])
    ours_to_theirs, theirs_to_wide = (np.sqrt(np.mean((found[x] - theirs) ** 2)) for x in ("int8", None))
    assert ours_to_theirs < theirs_to_wide / reference.nearer
