"""Rules that do work every k steps: in a branch, at the steps that they say, on request each leaf in its own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt.sweeps.sweep import LoopProgram
from tests import cases

COSTLY = {"eigh", "qr", "geqrf", "householder_product", "triangular_solve", "sort", "random_bits", "threefry2x32"}
RULES = {
    "soap": functools.partial(jopt.soap, lr=0.01),
    "kron": functools.partial(jopt.kron, lr=0.01),
}
REFRESHED = {"soap": "Q_0", "kron": "Q_0"}


def outside_of_branches(jaxpr):
    """The names of the primitives that always run."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name
        if name == "cond":
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from outside_of_branches(inner)


@pytest.mark.parametrize("name", RULES)
def test_what_is_costly_is_in_a_branch(name):
    tx = RULES[name]()
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((5, 2))}
    state = tx.init(params)
    always = set(outside_of_branches(jax.make_jaxpr(tx.step)(params, state, params).jaxpr))
    assert "cond" in always
    assert not always & COSTLY
    assert "conditional(" in jax.jit(tx.step).lower(params, state, params).compile().as_text()


@pytest.mark.parametrize("name", RULES)
def test_a_run_of_a_sweep_that_is_alone_keeps_the_branch(name):
    """Over several vectorized runs it is a select, and what is costly always runs."""
    seen = {}
    for runs in (1, 2):
        program = LoopProgram(RULES[name].func, None, lambda p, batch: jnp.sum((p["a"] - batch) ** 2))
        params = {"a": jnp.ones((runs, 4, 3))}
        numbers = {"lr": jnp.full((runs, 3), 0.01)}
        state = program._begin(params, numbers)
        loop = jax.make_jaxpr(program._loop)(params, state, numbers, jnp.zeros((2, 4, 3)), 2)
        seen[runs] = set(outside_of_branches(loop.jaxpr))
    assert "cond" in seen[1]
    assert not seen[1] & COSTLY
    assert seen[2] & COSTLY


def test_runs_that_are_alone_are_those_of_a_sweep():
    batches, results = jax.random.normal(jax.random.key(9), (12, 4, 3)), []
    for chunk in (1, 4):
        found = jopt.sweep(
            lambda p, batch: jnp.mean((p["a"] - batch) ** 2),
            lambda key: {"a": jax.random.normal(key, (4, 3))},
            batches,
            lr=[0.01, 0.1],
            seeds=2,
            optimizers={"soap": functools.partial(jopt.soap, precondition_frequency=3), "adamw": jopt.adamw},
            chunk=chunk,
        )
        results.append(np.stack([run.curve for run in found.runs]))
    assert cases.difference(*results) <= cases.FRONT_ENDS["float32"]


def changes(tx, name, leaves, steps):
    """Of each step, of each leaf, whether its first matrix changed."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal((3, 4)), jnp.float32) for _ in range(leaves)]
    state, found = tx.init(params), []
    step = jax.jit(tx.step)
    for _ in range(steps):
        grads = [jnp.asarray(rng.standard_normal((3, 4)), jnp.float32) for _ in range(leaves)]
        before = state.slots[REFRESHED[name]]
        params, state = step(grads, state, params)
        found.append([not np.array_equal(x, y) for x, y in zip(before, state.slots[REFRESHED[name]], strict=True)])
    return np.array(found), state


@pytest.mark.parametrize("stagger", [False, True])
def test_soap_refreshes_every_k_steps(stagger):
    """The authors' step does not count the first call, which begins: refreshes are where it is a multiple of k."""
    found, _ = changes(RULES["soap"](precondition_frequency=4, stagger=stagger), "soap", 5, 14)
    for t, k in np.ndindex(found.shape):
        assert found[t, k] == (t == 0 or (t + (k if stagger else 0)) % 4 == 0), (t, k)
    if stagger:
        assert found[1:].sum(axis=1).max() == 2  # of 5


@pytest.mark.parametrize("stagger", [False, True])
def test_kron_refreshes_by_its_probability(stagger):
    found, state = changes(RULES["kron"](preconditioner_update_probability=0.3, stagger=stagger), "kron", 5, 16)
    assert found[0].all()  # the first factors
    for t, k in np.ndindex(found.shape):
        if t:
            assert found[t, k] == ((t + 1 + (k if stagger else 0)) % 4 == 0), (t, k)
    assert [int(x) for x in state.scalars["refreshes"]] == [4] * 5


def test_kron_refreshes_less_and_less():
    """As kron_torch's loop counts with its schedule: exp(-0.001 (t - 500)) between 0.03 and 1."""
    tx = jopt.kron(lr=0.0, max_size_triangular=0)
    params = jnp.ones(1)

    @functools.partial(jax.jit, static_argnums=1)
    def run(state, n):
        body = lambda s, _: (tx.step(params, s, params)[1], s.scalars["refreshes"][0])  # noqa: E731
        return jax.lax.scan(body, state, None, n)

    state, found = run(tx.init(params), 5000)
    waited, refreshes, expected = 0, 0, []
    for t in range(5000):
        expected.append(refreshes)
        waited += 1
        if waited >= 1 / min(1.0, max(0.03, math.exp(-0.001 * (t - 500)))):
            waited, refreshes = 0, refreshes + 1
    assert found.tolist() == expected
    assert int(state.scalars["refreshes"][0]) == refreshes


def test_the_noise_of_kron_is_of_seed_step_and_leaf():
    """Two runs of a seed are equal, two seeds are not; nor are two alike leaves."""

    def run(seed):
        tx = jopt.kron(lr=0.1, seed=seed)
        params = [jnp.eye(3), jnp.eye(3)]
        state = tx.init(params)
        for _ in range(3):
            params, state = tx.step([jnp.eye(3)] * 2, state, params)
        return state.slots["Q_0"]

    one, again, other = run(0), run(0), run(1)
    assert np.array_equal(one[0], again[0])
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[0], one[1])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_matrices_of_narrow_parameters_are_wide(name, dtype):
    """A step of theirs is a step of float32's with the same numbers, rounded."""
    tx = RULES[name]()
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal((6, 4)), dtype)
    state, wide = tx.init(params), tx.init(params.astype(jnp.float32))
    p = params.astype(jnp.float32)
    for _ in range(2):
        grad = jnp.asarray(rng.standard_normal((6, 4)), dtype)
        params, state = tx.step(grad, state, params)
        p, wide = tx.step(grad.astype(jnp.float32), wide, p)
    assert state.slots["Q_0"].dtype == jnp.float32
    assert cases.difference(params.astype(jnp.float32), p) <= 8 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jopt.soap(precondition_frequency=0), "precondition_frequency"),
        (lambda: jopt.soap(precondition_frequency=1.5), "precondition_frequency"),
        (lambda: jopt.soap(max_precond_dim=-1), "max_precond_dim"),
        (lambda: jopt.soap(data_format="NHWC"), "data_format"),
        (lambda: jopt.soap(shampoo_beta=1.0), "shampoo_beta"),
        (lambda: jopt.kron(preconditioner_update_probability=0), "preconditioner_update_probability"),
        (lambda: jopt.kron(memory_save_mode="one"), "Invalid memory_save_mode: one"),
        (lambda: jopt.kron(precond_init_scale=0.0), "precond_init_scale"),
        (lambda: jopt.kron(seed=-1), "seed"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
