"""Drawn nestings of jopt's and optax's transformations, over drawn trees, in drawn settings: what a skipped step, an
inactive or frozen parameter and a missing gradient must not change, whatever wraps what."""

import contextlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType

import jopt
from jopt._compat import enable_x64
from jopt.around import chaining

FEW, MANY = 6, 1000

# --- what is drawn

LEAVES = {
    "sgd": lambda: jopt.sgd(lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda: jopt.adamw(lr=0.1, amsgrad=True),
    "scheduled": lambda: jopt.nadam(lr=jopt.schedules.step_lr(0.1, 2)),
    "in state": lambda: jopt.rmsprop(lr=0.1, centered=True, hyperparams_in_state=True),
    "muon": lambda: jopt.muon(lr=0.1),
    "adafactor": lambda: jopt.adafactor(lr=0.1),
    "rounded": lambda: jopt.adam(lr=0.1, stochastic_rounding=3),
    "optax.adam": lambda: optax.adam(0.1),
    "optax.sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "inject": lambda: optax.inject_hyperparams(jopt.sgd)(lr=0.1, momentum=0.5),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), jopt.adam(lr=0.1)),
}
BEFORE = [
    lambda: jopt.clip_grad_norm(0.5),
    lambda: jopt.clip_grad_value(0.2),
    lambda: optax.clip(0.3),
    lambda: optax.trace(0.5),
    lambda: optax.scale_by_schedule(lambda count: 1 / (1.0 + count)),
]


def everywhere(value):
    return lambda tree: jax.tree.map(lambda x: value, tree)


WRAPPERS = {
    "jopt.chain": lambda r, tx: jopt.chain(r.choice(BEFORE)(), tx),
    "before scale": lambda r, tx: jopt.chain(tx, optax.scale(0.5)),
    "optax.chain": lambda r, tx: optax.chain(r.choice(BEFORE)(), tx),
    "MultiSteps": lambda r, tx: optax.MultiSteps(tx, r.choice([1, 2])).gradient_transformation(),
    "masked": lambda r, tx: optax.masked(tx, everywhere(True)),
    "partition": lambda r, tx: optax.partition({"x": tx}, everywhere("x")),
    "schedule_free": lambda r, tx: optax.contrib.schedule_free(tx, 0.1, b1=0.9),
    "groups": lambda r, tx: jopt.param_groups(lambda: tx, {"vector": r.choice([tx, jopt.adam(lr=0.2), None])}),
    "monitor": lambda r, tx: jopt.monitor(tx),
    "skip_nonfinite": lambda r, tx: jopt.skip_nonfinite(tx),
}
SETTINGS = ["eager", "jit", "scan", "vmap", "Auto", "Explicit", "x64"]


def draw(seed):
    """`(what it is called, the transformation, the parameters, the setting)`."""
    r = random.Random(seed)
    name = r.choice(list(LEAVES))
    tx = LEAVES[name]()
    setting = r.choice(SETTINGS)
    for _ in range(r.randrange(4)):
        wrapper = r.choice(list(WRAPPERS))
        if wrapper == "schedule_free" and ("MultiSteps" in name or "groups" in name or "masked" in name):
            continue  # optax computes with the inner updates of every parameter, at every step
        if wrapper == "groups" and "groups" in name:
            continue  # whose pattern would be nobody's first match inside
        tx, name = WRAPPERS[wrapper](r, tx), f"{wrapper}({name})"
    wide = jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32
    dtype = r.choice([wide, wide, jnp.bfloat16])
    rng = np.random.default_rng(seed)
    params = {"matrix": rng.normal(size=(4, 6)), "vector": rng.normal(size=(4, 1) if "muon" in name else 4)}
    params = {k: jnp.asarray(x, dtype) for k, x in params.items()}
    params |= {"none": None, "empty": {}}
    if r.random() < 0.4:
        tx, name = jopt.param_groups(lambda: tx, {"^frozen": None}), f"with frozen({name})"
        params |= {"frozen": {"n": jnp.arange(3), "mask": jnp.array([True, False]), "key": jax.random.key(1)}}
        if r.random() < 0.5:
            tx, name = jopt.chain(jopt.clip_grad_norm(0.7), tx), f"clipped({name})"
    return name, tx, params, setting


def gradients(params, seed, value=None):
    rng = np.random.default_rng(seed)

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return None
        return jnp.asarray(rng.normal(size=x.shape), x.dtype) if value is None else jnp.full(x.shape, value, x.dtype)

    return jax.tree.map(one, params)


# --- in a setting


@contextlib.contextmanager
def context(setting):
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))  # optax's own arithmetic
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    if setting in ("Auto", "Explicit"):
        mesh = jax.make_mesh((1,), ("d",), axis_types=(getattr(AxisType, setting),))
        stack.enter_context(jax.set_mesh(mesh))
    elif setting == "x64":
        stack.enter_context(enable_x64(True))
    with stack:
        yield


def run(tx, params, steps, setting):
    """The parameters and state after each of some steps, `(gradients, keywords)`."""
    state = tx.init(params)
    if setting == "vmap":
        two = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
        state, params = two(state), two(params)
        steps = [(two(grads), two(keywords)) for grads, keywords in steps]
        step = jax.vmap(lambda g, k, s, p: chaining.step(tx, g, s, p, **k))
    else:
        step = lambda g, k, s, p: chaining.step(tx, g, s, p, **k)  # noqa: E731
    if setting == "scan":
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)

        def body(carry, step_):
            new = step(*step_, carry[1], carry[0])
            return new, new

        _, out = jax.lax.scan(body, (params, state), stacked)
        return [jax.tree.map(lambda x, i=i: x[i], out) for i in range(len(steps))]
    if setting != "eager":
        step = jax.jit(step)
    found = []
    for grads, keywords in steps:
        params, state = step(grads, keywords, state, params)
        found.append((params, state))
    return found


def bits(tree):
    """What is in each array, nan and the sign of 0 included."""

    def of(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return x.dtype.name, x.shape, np.asarray(x).tobytes()

    return {jax.tree_util.keystr(path): of(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def same(found, expected):
    found, expected = bits(found), bits(expected)
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []


def skipped_steps_leave_no_trace(seed):
    name, tx, params, setting = draw(seed)
    with context(setting):
        if setting == "x64":
            params = draw(seed)[2]
        go, stay = {"skip": jnp.asarray(False)}, {"skip": jnp.asarray(True)}
        good = [(gradients(params, i), go) for i in range(3)]
        bad = random.Random(seed).choice([float("nan"), float("inf"), 3.0])
        plain = run(tx, params, good, setting)
        broken = run(tx, params, [good[0], (gradients(params, 9, bad), stay), *good[1:]], setting)
        try:
            same(broken[1], broken[0])
            same(broken[3], plain[2])
            if setting != "vmap":
                same(plain[2][0].get("frozen"), params.get("frozen"))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {name} in {setting}: {error}") from error


def inactive_leaves_are_kept(seed):
    """A parameter that is not active keeps its value and its own state; the others step as if it had no gradient."""
    name, tx, params, setting = draw(seed)
    if setting == "vmap" or "schedule_free" in name:  # whose state has sums over all parameters
        setting, (name, tx, params, _) = "jit", draw(seed + 10**6)
        if "schedule_free" in name:
            return
    with context(setting):
        if setting == "x64":
            params = draw(seed)[2]
        active = jax.tree.map(lambda x: jnp.asarray(True), params)
        active["vector"] = jnp.asarray(False)
        steps = [(gradients(params, i), {"active": active}) for i in range(2)]
        found = run(tx, params, steps, setting)
        absent = [({**grads, "vector": None}, {}) for grads, _ in steps]
        expected = run(tx, params, absent, "jit" if setting == "scan" else setting)
        try:
            same(found[1][0]["vector"], params["vector"])
            same(found[0][0]["vector"], params["vector"])
            new, old = (np.asarray(steps[1][0]["matrix"], np.float64) for steps in (found, expected))
            rounding = 8 * float(jnp.finfo(params["matrix"].dtype).eps)  # other programs sum a norm in other orders
            np.testing.assert_allclose(new, old, rtol=rounding, atol=rounding / 8)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {name} in {setting}: {error}") from error


PROPERTIES = [skipped_steps_leave_no_trace, inactive_leaves_are_kept]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("seed", range(FEW))
def test_some_nestings(check, seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("start", range(FEW, FEW + MANY, 50))
def test_many_nestings(check, start):
    for seed in range(start, start + 50):
        check(seed)
        jax.clear_caches()
