"""Front end 1 under everything that JAX and optax do to a gradient transformation. No torch needed."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt import numerics
from jopt._compat import enable_x64
from tests import cases


def tree():
    return {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, 0.2]), "s": jnp.float32(2.0)}


def gradients(params):
    return jax.tree.map(lambda p: 0.5 * p + 0.3, params)


def run(tx, params, steps=5, **kwargs):
    state = tx.init(params)
    for _ in range(steps):
        params, state = tx.step(gradients(params), state, params, **kwargs)
    return params, state


def assert_trees_close(a, b, rtol=5e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


# --- transformations of JAX


@cases.parametrize(cases.CASES, fast=cases.UNLIKE)
def test_structure_types_and_eager_jit_scan_agree(case):
    tx, params = case.jopt(), case.tree(tree())
    state = tx.init(params)
    assert set(state.slots) == set(case.slots)
    assert types(jax.eval_shape(tx.init, params)) == types(state)
    new, after = tx.step(gradients(params), state, params)
    assert types(new) == types(params)
    assert types(after) == types(state)

    eager = run(tx, params)
    jitted = jax.jit(functools.partial(run, tx))(params)

    def body(carry, _):
        params, state = carry
        return tx.step(gradients(params), state, params), None

    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=5))((params, state))
    assert_trees_close(jitted, eager)
    assert_trees_close(scanned, eager)
    assert int(eager[1].count) == 5


@cases.parametrize(cases.CASES, fast=cases.UNLIKE)
def test_vmap_over_learning_rates(case):
    rates = jnp.array([0.001, 0.01, 0.02])

    def final(lr):
        return run(case.jopt(lr=lr), case.tree(tree()))[0]

    many = jax.jit(jax.vmap(final))(rates)
    for i, lr in enumerate(rates.tolist()):
        assert_trees_close(
            jax.tree.map(lambda x, i=i: x[i], many), run(case.jopt(lr=lr), case.tree(tree()))[0], rtol=1e-5
        )


@cases.parametrize(cases.CASES, fast=cases.UNLIKE)
def test_grad_through_scan_of_steps(case, x64):
    """d loss / d lr through 8 scanned steps, against central differences.

    Through one for Muon: its update is piecewise constant in the gradient, being rounded to bfloat16.
    """

    def loss(lr):
        tx = case.jopt(lr=lambda step: lr * cases.lr_factor(step, jnp.cos))
        params = case.tree(jnp.array([1.0, -0.5, 0.3]))

        def body(carry, _):
            params, state = carry
            return tx.step(jnp.sin(params) + 0.2, state, params), None

        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), length=1 if case.matrices else 8)
        return jnp.sum(params**2)

    value = jax.jit(loss)
    h = case.lr / 1000  # large, since ASGD keeps eta in float32, as torch does; hence the difference of fourth order
    expected = (8 * (value(case.lr + h) - value(case.lr - h)) - (value(case.lr + 2 * h) - value(case.lr - 2 * h))) / (
        12 * h
    )
    assert jax.jit(jax.grad(loss))(case.lr) == pytest.approx(float(expected), rel=3e-4)


def test_grad_through_scan_with_x64_off():
    def loss(lr, beta2):
        tx = jopt.adam(lr=lr, betas=(0.9, beta2))

        def body(carry, _):
            params, state = carry
            return tx.step(2 * params, state, params), None

        start = jnp.array([1.0, -0.5])
        return jnp.sum(jax.lax.scan(jax.checkpoint(body), (start, tx.init(start)), length=5)[0][0])

    lr, beta2 = jnp.float32(0.01), jnp.float32(0.99)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(lr, beta2)
    with enable_x64(True):
        expected = jax.grad(loss, argnums=(0, 1))(jnp.float64(0.01), jnp.float64(0.99))
    np.testing.assert_allclose(gradient, expected, rtol=1e-3)
    assert np.isfinite(jax.hessian(loss)(lr, beta2))


@pytest.mark.parametrize(
    "dtype",
    cases.mostly_slow(
        ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"], ["bfloat16", "float64", "complex64"]
    ),
)
@cases.parametrize(cases.CASES, fast=cases.UNLIKE)
def test_types_are_kept(case, dtype, x64):
    params = case.tree([jnp.ones((3, 2), dtype), jnp.array(1.0, dtype)])
    tx = case.jopt(eps=1e-3) if "eps" in case.jopt().hyperparameters else case.jopt()
    if "complex" in dtype and not case.takes_complex:
        with pytest.raises(
            RuntimeError, match=rf"{type(tx.rule).__name__} does not support complex parameters: params\[0\] is comp"
        ):
            tx.init(params)
        return
    new, state = jax.jit(functools.partial(run, tx, steps=2))(params)
    assert types(new) == types(params)
    for name, slot in state.slots.items():
        kept = dtype if name.partition("_")[0] not in ("GG", "Q") else jopt.numerics.compute_dtype(dtype)
        assert all(x.dtype == kept for x in jax.tree.leaves(slot)), name
    assert all(x.dtype == jnp.float32 for x in state.scalars.values())
    assert all(np.isfinite(np.asarray(x).astype(complex)).all() for x in new)


def test_mixed_types_in_one_tree(x64):
    params = {"a": jnp.ones(3, jnp.float64), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.ones(3, jnp.float32)}
    together, _ = run(jopt.adam(0.1), params)
    for name, alone in params.items():
        assert_trees_equal(run(jopt.adam(0.1), alone)[0], together[name])


def test_donation_is_in_place():
    """Every byte of the parameters and the state is written where it was, with no array made on the way."""
    tx = jopt.adamw(1e-3)
    params = {"w": jnp.ones((512, 512)), "b": jnp.ones(512)}
    state = tx.init(params)
    step = jax.jit(lambda params, state, grads: tx.step(grads, state, params), donate_argnums=(0, 1))
    compiled = step.lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * 4 * (512 * 512 + 512)
    assert memory.temp_size_in_bytes < 4 * 512 * 512 / 10
    grads = jax.tree.map(jnp.ones_like, params)
    new, _ = step(params, state, grads)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state.slots)))
    assert np.isfinite(new["w"]).all()


@cases.parametrize(cases.CASES)
def test_init_shares_no_buffer(case):
    params = case.tree(tree())
    state = jax.tree.leaves(case.jopt(hyperparams_in_state=True).init(params))
    pointers = [x.unsafe_buffer_pointer() for x in (*state, *jax.tree.leaves(params)) if x.size]
    assert len(set(pointers)) == len(pointers)


def test_one_compilation_serves_every_step():
    tx = jopt.adam(lr=lambda step: 0.1 / (1 + step), weight_decay=lambda step: 0.01 * step)
    step = jax.jit(lambda params, state: tx.step(gradients(params), state, params))
    params = tree()
    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert step._cache_size() == 1


# --- leaves


def test_empty_trees():
    for empty in ({}, [], (), {"a": {}, "b": None}):
        tx = jopt.adam(0.1)
        new, state = jax.jit(tx.step)(empty, tx.init(empty), empty)
        assert new == empty
        assert int(state.count) == 1


def test_none_and_masked_leaves_are_left_alone():
    params = {"w": jnp.ones(2), "none": None, "masked": optax.MaskedNode()}
    new, state = run(jopt.adam(0.1), params)
    assert new["none"] is None
    assert new["masked"] == optax.MaskedNode()
    assert state.scalars["step"].shape == (1,)


@cases.parametrize(cases.CASES, fast=cases.UNLIKE)
def test_absent_gradients_skip_the_parameter(case):
    """None and a traced False are the same, and as if the parameter had not been there at that step."""
    tx, params = case.jopt(), case.tree(tree())
    first, state = tx.step(gradients(params), tx.init(params), params)
    grads = gradients(first)
    by_none, state_none = tx.step(grads | {"b": None}, state, first)
    mask = {"w": jnp.array(True), "b": jnp.array(False), "s": jnp.array(True)}
    by_mask, state_mask = jax.jit(lambda *a: tx.step(*a, active=mask))(grads, state, first)
    assert_trees_close(by_none, by_mask)
    assert_trees_close(state_none, state_mask)
    assert_trees_equal(by_none["b"], first["b"])
    for slot in state.slots:
        assert_trees_equal(state_none.slots[slot]["b"], state.slots[slot]["b"])
    if "step" in state.scalars:
        assert state_none.scalars["step"].tolist() == [1, 2, 2]  # leaves in order: b, s, w
    if tx.rule.sums:  # what is of all leaves is of the others at that step
        return
    # From here the parameter goes on as if it had taken one step fewer.
    alone = {"b": first["b"]}
    alone_state = state._replace(
        scalars={k: v[:1] for k, v in state.scalars.items()},
        slots={k: {"b": v["b"]} for k, v in state.slots.items()},
    )
    then, _ = tx.step(gradients(by_none), state_none, by_none)
    expected, _ = tx.step(gradients(alone), alone_state, alone)
    assert_trees_close(then["b"], expected["b"])


def test_all_gradients_absent_changes_only_the_count():
    tx, params = jopt.adamw(0.1), tree()
    state = tx.init(params)
    new, after = tx.step(jax.tree.map(lambda _: None, params), state, params)
    assert_trees_equal(new, params)
    assert_trees_equal(after._replace(count=state.count), state)
    assert int(after.count) == 1


# --- optax


@cases.parametrize(cases.CASES, fast=cases.UNLIKE)
def test_update_is_step_to_an_ulp(case):
    tx, params = case.jopt(), case.tree(tree())
    state = tx.init(params)
    updates, state_u = tx.update(gradients(params), state, params)
    new, state_s = tx.step(gradients(params), state, params)
    assert types(updates) == types(params)
    assert_trees_equal(state_u, state_s)
    applied = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), 1), applied, new)


def test_update_of_an_absent_gradient_is_zero():
    tx, params = jopt.adamw(0.1), tree()
    updates, _ = tx.update(gradients(params) | {"b": None}, tx.init(params), params)
    assert_trees_equal(updates["b"], jnp.zeros(2))
    assert_trees_equal(optax.apply_updates(params, updates)["b"], params["b"])


def test_in_a_chain_with_extra_arguments():
    tx = optax.chain(optax.clip_by_global_norm(0.1), jopt.sgd(lr=1.0))
    params = jnp.array([3.0, 4.0])
    updates, _ = jax.jit(functools.partial(tx.update, value=1.0, grad_fn=None))(params, tx.init(params), params)
    np.testing.assert_allclose(updates, -0.1 * params / 5, rtol=1e-5)
    assert isinstance(jopt.sgd(), optax.GradientTransformationExtraArgs)


def test_in_a_partition():
    params = tree()
    tx = optax.partition({"decay": jopt.adamw(0.1), "plain": jopt.sgd(0.1)}, {"w": "decay", "b": "plain", "s": "plain"})
    updates, _ = jax.jit(tx.update)(gradients(params), tx.init(params), params)
    w, _ = jopt.adamw(0.1).update(gradients(params)["w"], jopt.adamw(0.1).init(params["w"]), params["w"])
    np.testing.assert_allclose(updates["w"], w, rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -0.1 * gradients(params)["b"], rtol=1e-6)


def test_masked():
    params = tree()
    tx = optax.masked(jopt.adam(0.1), {"w": True, "b": False, "s": True})
    updates, state = tx.update(gradients(params), tx.init(params), params)
    assert_trees_equal(updates["b"], gradients(params)["b"])  # passed through, as optax does
    assert state.inner_state.scalars["step"].shape == (2,)


def test_inject_hyperparams():
    tx = optax.inject_hyperparams(jopt.adam)(lr=0.1)
    params = tree()
    state = tx.init(params)
    state.hyperparams["lr"] = jnp.float32(0.0)
    updates, state = jax.jit(tx.update)(gradients(params), state, params)
    assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, params))


def test_multi_steps():
    tx = optax.MultiSteps(jopt.adam(0.1), every_k_schedule=2)
    params = tree()
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's own accumulation mixes types
        for _ in range(2):
            updates, state = jax.jit(tx.update)(gradients(params), state, params)
    expected, _ = jopt.adam(0.1).update(gradients(params), jopt.adam(0.1).init(params), params)
    assert_trees_close(updates, expected)


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_tree_map_params(name):
    """optax's way to tell the parameter-like parts of a state from the rest."""
    tx = getattr(jopt, name)(0.1)
    state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(tree()))
    for slot in state.slots.values():
        assert_trees_equal(slot, jax.tree.map(jnp.ones_like, slot))
    assert_trees_equal(state.scalars["step"], jnp.zeros(3))


def test_transform_pickles():
    tx = pickle.loads(pickle.dumps(jopt.adamw(0.1, weight_decay=0.2)))
    assert_trees_equal(run(tx, tree()), run(jopt.adamw(0.1, weight_decay=0.2), tree()))


# --- bfloat16: master copies, stochastic rounding


@cases.parametrize(cases.CASES, fast=cases.UNLIKE)
def test_a_master_copy_is_stepped_as_a_float32_parameter(case):
    """Parameters that are rounded float32 ones, and whose gradients are the same, as if they were float32."""
    low = case.tree(jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree()))
    full = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    tx, reference = case.jopt(master_copy=True, state_dtype=jnp.float32), case.jopt()
    state, reference_state = tx.init(low), reference.init(full)
    step, reference_step = jax.jit(tx.step), jax.jit(reference.step)
    for _ in range(10):
        grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(full))
        low, state = step(grads, state, low)
        full, reference_state = reference_step(grads, reference_state, full)
    assert_trees_close(state.slots["master"], full)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), low, state.slots["master"])
    assert types(tx.init(low)) == types(state)


def test_a_master_copy_of_what_needs_none():
    tx, params = jopt.adam(master_copy=True), {"f32": jnp.ones(2), "f16": jnp.ones(2, jnp.float16)}
    state = tx.init(params)
    assert state.slots["master"]["f32"] is None
    assert state.slots["master"]["f16"].dtype == jnp.float32
    new, _ = tx.step(params, state, params)
    assert types(new) == types(params)


def test_stochastic_rounding_keeps_what_nearest_loses():
    """1000 steps of 2^-14 from 1, an ulp of bfloat16 being 2^-7: nearest stays, at random the mean is right."""
    params = jnp.ones(4096, jnp.bfloat16)
    grads = -jnp.ones(4096, jnp.bfloat16)

    def walk(tx):
        def body(carry, _):
            return tx.step(grads, carry[1], carry[0]), None

        return jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), length=1000)[0])()[0].astype(jnp.float32)

    assert (walk(jopt.sgd(lr=2**-14)) == 1).all()
    walked = walk(jopt.sgd(lr=2**-14, stochastic_rounding=0))
    # Each of the 4096 walks adds a variance of at most ulp * step a step: sqrt(1000 * 2^-7 * 2^-14 / 4096) = 3.4e-4.
    assert abs(walked.mean() - (1 + 1000 * 2**-14)) < 5 * 3.4e-4
    assert walked.std() > 0
    again = walk(jopt.sgd(lr=2**-14, stochastic_rounding=jax.random.key(0)))
    assert_trees_equal(walked, again)
    assert (walked != walk(jopt.sgd(lr=2**-14, stochastic_rounding=1))).any()


def test_stochastic_rounding_of_exact_infinite_and_wide_values():
    x = jnp.array([1.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 3.0e38, 1e-40], jnp.float32)
    rounded = numerics.round_at_random(jax.random.key(0), x).astype(jnp.float32)
    np.testing.assert_array_equal(rounded[:5], x[:5])
    assert abs(rounded[5] / x[5] - 1) < 2**-7
    params = {"f32": jnp.ones(3), "bf16": jnp.ones(3, jnp.bfloat16)}
    new, _ = run(jopt.adam(stochastic_rounding=0), params)
    expected, _ = run(jopt.adam(), params)
    assert_trees_equal(new["f32"], expected["f32"])
    assert new["bf16"].dtype == jnp.bfloat16
    with pytest.raises(
        TypeError, match=r"stochastic_rounding: expected a seed, a key of jax\.random, or None, found True"
    ):
        jopt.adam(stochastic_rounding=True)


# --- hyperparameters


@pytest.mark.parametrize(
    "lr",
    [0.1, np.float32(0.1), np.array(0.1), jnp.float32(0.1), lambda step: 0.1 + 0 * step],
    ids=["float", "numpy scalar", "numpy array", "jax array", "schedule"],
)
def test_kinds_of_numbers(lr):
    assert_trees_close(run(jopt.adam(lr=lr), tree()), run(jopt.adam(lr=0.1), tree()))


def test_every_number_takes_a_schedule():
    """Against the same steps with the numbers given anew each time."""

    def at(i):
        return dict(
            lr=0.1 / (i + 1), betas=(0.9 - 0.01 * i, 0.99 + 0.001 * i), eps=1e-8 * (i + 1), weight_decay=0.1 * i
        )

    def schedule(*path):
        def value(step):
            x = dict(lr=0.1 / (step + 1), betas=(0.9 - 0.01 * step, 0.99 + 0.001 * step))
            x |= dict(eps=1e-8 * (step + 1), weight_decay=0.1 * step)
            return functools.reduce(lambda x, k: x[k], path, x)

        return value

    tx = jopt.adamw(
        lr=schedule("lr"),
        betas=(schedule("betas", 0), schedule("betas", 1)),
        eps=schedule("eps"),
        weight_decay=schedule("weight_decay"),
    )
    found, _ = run(tx, tree())
    params = tree()
    state = jopt.adamw().init(params)
    for i in range(5):
        params, state = jopt.adamw(**at(i)).step(gradients(params), state, params)
    assert_trees_close(found, params)


def test_optax_schedules_serve():
    tx = jopt.sgd(lr=optax.cosine_decay_schedule(0.1, 10))
    params = jnp.array([1.0])
    state = tx.init(params)
    for i in range(10):
        before = params
        params, state = tx.step(jnp.array([1.0]), state, params)
        lr = 0.05 * (1 + math.cos(math.pi * i / 10))
        np.testing.assert_allclose(before - params, [lr], atol=1e-7)


def test_hyperparameters_in_the_state():
    tx = jopt.sgd(lr=0.1, momentum=0, weight_decay=0, hyperparams_in_state=True)
    params = jnp.array([1.0])
    state = tx.init(params)
    assert set(state.hyperparams) == {"lr", "momentum", "dampening", "weight_decay"}
    step = jax.jit(lambda params, state: tx.step(jnp.array([1.0]), state, params))
    params, state = step(params, state)
    np.testing.assert_allclose(params, [0.9])
    state.hyperparams["lr"] = jnp.float32(0.5)
    params, state = step(params, state)
    np.testing.assert_allclose(params, [0.4])
    state.hyperparams.update(momentum=jnp.float32(0.5), weight_decay=jnp.float32(0.1), dampening=jnp.float32(0.25))
    params, state = step(params, state)  # torch's first step with momentum: b = g, undamped
    b = 1 + 0.1 * 0.4
    np.testing.assert_allclose(params, [0.4 - 0.5 * b], rtol=1e-6)
    previous = float(params[0])
    params, state = step(params, state)
    b = 0.5 * b + 0.75 * (1 + 0.1 * previous)
    np.testing.assert_allclose(params, [previous - 0.5 * b], rtol=1e-6)
    assert step._cache_size() == 1


def test_scheduled_hyperparameters_show_in_the_state():
    tx = jopt.adam(lr=lambda step: 0.5 / (1 + step), hyperparams_in_state=True)
    params = tree()
    state = tx.init(params)
    assert float(state.scheduled["lr"]) == 0.5
    for i in range(3):
        params, state = tx.step(gradients(params), state, params)
        assert float(state.scheduled["lr"]) == np.float32(0.5 / (1 + i))
    state.hyperparams["lr"] = jnp.float32(0.5)  # which nothing would read
    with pytest.raises(ValueError, match=r"state.hyperparams: expected .*, found .*lr"):
        tx.step(gradients(params), state, params)


# --- errors


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: jopt.adam(lr=-1), ValueError, "Invalid learning rate: -1"),
        (lambda: jopt.adam(lr=math.nan), ValueError, "Invalid learning rate: nan"),
        (lambda: jopt.adam(betas=(1.0, 0.9)), ValueError, "Invalid beta parameter at index 0: 1.0"),
        (lambda: jopt.adam(betas=(0.9, -0.1)), ValueError, "Invalid beta parameter at index 1: -0.1"),
        (lambda: jopt.adam(eps=-1), ValueError, "Invalid epsilon value: -1"),
        (lambda: jopt.adamw(weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
        (lambda: jopt.adam(betas=0.9), TypeError, "betas: expected 2 values"),
        (lambda: jopt.adam(lr="0.1"), TypeError, "lr: expected a number, a 0-d array or a schedule.*str"),
        (lambda: jopt.adam(lr=True), TypeError, "lr: expected a number"),
        (lambda: jopt.adam(lr=None), TypeError, "lr: expected a number.*NoneType"),
        (lambda: jopt.adam(lr=jnp.ones(2)), TypeError, r"lr: expected a 0-d array, found shape \(2,\)"),
        (lambda: jopt.adam(lr=jnp.float32(-1)), ValueError, "Invalid learning rate: -1.0"),
        (lambda: jopt.sgd(momentum=-0.5), ValueError, "Invalid momentum value: -0.5"),
        (lambda: jopt.sgd(nesterov=True), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        (
            lambda: jopt.sgd(nesterov=True, momentum=0.9, dampening=0.1),
            ValueError,
            "Nesterov momentum requires a momentum and zero dampening",
        ),
        (
            lambda: jopt.sgd(nesterov=True, momentum=np.float32(0)),
            ValueError,
            "Nesterov momentum requires a momentum and zero dampening",
        ),
        (
            lambda: jopt.sgd(nesterov=True, momentum=0.9, dampening=-0.1),
            ValueError,
            "Nesterov momentum requires a momentum and zero dampening",
        ),
        (lambda: jopt.nadam(momentum_decay=-1), ValueError, "Invalid momentum_decay value: -1"),
        (lambda: jopt.radam(lr=-1), ValueError, "Invalid learning rate: -1"),
        (lambda: jopt.adamax(betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1: 1.0"),
        (lambda: jopt.adagrad(lr_decay=-0.5), ValueError, "Invalid lr_decay value: -0.5"),
        (lambda: jopt.adadelta(rho=1.1), ValueError, "Invalid rho value: 1.1"),
        (lambda: jopt.rprop(etas=(1.0, 0.5)), ValueError, "Invalid eta values: 1.0, 0.5"),
        (lambda: jopt.asgd(weight_decay=-0.5), ValueError, "Invalid weight_decay value: -0.5"),
        (lambda: jopt.sgd(dampening=math.nan), ValueError, "Invalid dampening value: nan"),
        (lambda: jopt.rmsprop(alpha=-1), ValueError, "Invalid alpha value: -1"),
        (lambda: jopt.momentum(0.1, beta=1.5), ValueError, "Invalid beta value: 1.5"),
        (lambda: jopt.adam(state_dtype=jnp.int32), TypeError, "state_dtype: expected float32, bfloat16 or int8"),
    ],
)
def test_bad_hyperparameters(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"w": jnp.arange(3)}, r"params\['w'\]: expected a floating point or complex type, found int32"),
        ({"w": 3}, r"params\['w'\]: expected a floating point or complex array, found int"),
        ({"w": jnp.ones(2, bool)}, r"params\['w'\]: .* found bool"),
        ([jnp.ones(2), "text"], r"params\[1\]: expected a floating point or complex array, found str"),
    ],
)
def test_bad_parameters(params, text):
    with pytest.raises(TypeError, match=text):
        jopt.adam().init(params)


@pytest.mark.parametrize(
    ("grads", "error", "text"),
    [
        (
            {"w": jnp.ones(3), "b": jnp.ones(1)},
            ValueError,
            r"grads\['w'\]: expected the parameter's shape \(2,\), found",
        ),
        ({"w": jnp.ones(2)}, ValueError, "grads: expected the structure of params"),
        ({"w": jnp.ones(2), "b": jnp.arange(1)}, TypeError, r"grads\['b'\]: expected a floating point"),
        ({"w": jnp.ones(2), "b": jnp.ones(1, jnp.complex64)}, TypeError, r"grads\['b'\]: found complex64"),
        ({"w": jnp.ones(2), "b": "g"}, TypeError, r"grads\['b'\]: expected an array or None, found str"),
    ],
)
def test_bad_gradients(grads, error, text):
    tx = jopt.adam()
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    with pytest.raises(error, match=text):
        tx.step(grads, tx.init(params), params)


def test_missing_parameters_and_foreign_states():
    tx, params = jopt.adam(), {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="params: expected the parameters, found None"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"state.slots\['exp_avg'\]: expected the structure of params"):
        tx.step(params, tx.init({"other": jnp.ones(2)}), params)
