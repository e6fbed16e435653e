"""What does not fit is refused by name, with what was found and what was expected, before anything changed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt.around import chaining
from tests import cases

FIRST = {case.name: case for case in cases.CASES if case.name not in ("gradient_descent", "momentum", "sparse_adam")}
REMEDY = "make the state of"


def params():
    return {"w": jnp.ones((3, 4)), "v": jnp.ones((2, 1))}


def layout(state):
    return [(jax.tree_util.keystr(path), x.shape) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def refused(text, tx, state, params, error=ValueError, jitted=True):
    """By the eager step and while it is traced; and what was given is as it was."""
    before = jax.tree.map(np.asarray, (state, params))
    for step in (chaining.step, jax.jit(chaining.step, static_argnums=0)) if jitted else (chaining.step,):
        with pytest.raises(error, match=text):
            step(tx, params, state, params)
    for a, b in zip(jax.tree.leaves((state, params)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("own", FIRST)
def test_anothers_state(own):
    """Unless it is the same: Adam's and AdamW's."""
    tx = FIRST[own].jopt()
    for other in FIRST:
        state = FIRST[other].jopt().init(params())
        if layout(state) != layout(tx.init(params())):
            refused(rf"state\..*: expected .*found.*{REMEDY}", tx, state, params(), jitted=False)


@pytest.mark.parametrize(
    ("made", "used", "text"),
    [
        ({}, {"master_copy": True}, r"state\.slots: expected .*master.*, found exp_avg, exp_avg_sq"),
        ({"master_copy": True}, {}, r"state\.slots: expected exp_avg, exp_avg_sq, found .*master"),
        ({}, {"amsgrad": True}, r"state\.slots: expected .*max_exp_avg_sq"),
        ({}, {"hyperparams_in_state": True}, r"state\.hyperparams: expected .*lr.*, found none"),
        ({"hyperparams_in_state": True}, {}, r"state\.hyperparams: expected none, found .*lr"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_state_of_other_options(made, used, text):
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    refused(text, jopt.adam(**used), jopt.adam(**made).init(tree), tree)


def broken(state):
    """States of the right optimizer, and what is wrong with them."""
    wider = {**state.slots, "exp_avg": {**state.slots["exp_avg"], "w": jnp.ones((3, 5))}}
    yield state._replace(slots=wider), r"state\.slots\['exp_avg'\]\['w'\]: expected .*\(3, 4\), found .*\(3, 5\)"
    missing = {**state.slots, "exp_avg": {**state.slots["exp_avg"], "w": None}}
    yield state._replace(slots=missing), r"state\.slots\['exp_avg'\]\['w'\]: expected .*\(3, 4\), found None"
    yield state._replace(count=jnp.zeros(2, jnp.int32)), r"state\.count: expected shape \(\), found \(2,\)"
    fewer = {"step": jnp.zeros(1)}
    yield state._replace(scalars=fewer), r"state\.scalars\['step'\]: expected shape \(2,\), found \(1,\)"
    yield (1, 2), r"state: expected a jopt\.State, found tuple"
    yield None, r"state: expected a jopt\.State, found NoneType"


@pytest.mark.parametrize("i", range(6))
def test_a_broken_state(i):
    tx = jopt.adamw()
    state, text = list(broken(tx.init(params())))[i]
    refused(text + f".*{REMEDY}", tx, state, params())


@pytest.mark.parametrize("i", range(6))
def test_a_broken_state_inside(i):
    """Of what other transformations wrap the same is said."""
    inner = jopt.adamw()
    state, text = list(broken(inner.init(params())))[i]
    wrapped = jopt.chain(jopt.clip_grad_norm(1.0), inner)
    first, _ = wrapped.init(params())
    refused(text, wrapped, (first, state), params())
    monitored = jopt.monitor(inner)
    refused(text, monitored, monitored.init(params())._replace(inner=state), params())


def test_a_chains_state_of_other_links():
    tx = jopt.chain(jopt.clip_grad_norm(1.0), jopt.adamw())
    refused("state", tx, jopt.adamw().init(params()), params())
    refused("state", tx, jopt.chain(jopt.adamw()).init(params()), params())


@pytest.mark.parametrize("kind", [jopt.ema, jopt.swa], ids=["ema", "swa"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: jnp.ones((5, 5)), r"\['v'\].*expected .*\(2, 1\).*found .*\(5, 5\)"),
        (lambda x: x.astype(jnp.bfloat16), r"\['v'\].*expected .*float32.*found .*bfloat16"),
        (lambda x: x.astype(jnp.complex64), r"\['v'\].*expected .*float32.*found .*complex64"),
    ],
    ids=["shape", "bfloat16", "complex64"],
)
def test_an_average_of_others(kind, change, text):
    average = kind()
    state = average.init(params())
    for update in (average.update, jax.jit(average.update)):
        with pytest.raises(ValueError, match=text):
            update({**params(), "v": change(params()["v"])}, state)


@pytest.mark.parametrize("name", FIRST)
def test_a_number_per_leaf(name):
    """An array of numbers, or a tree of them, where one is wanted: of each argument."""
    numbers = [f for f, x in FIRST[name].jopt()._lift.hyperparameters.items() if isinstance(x, float | int)]
    assert numbers
    with pytest.raises(TypeError, match=r"lr: expected a 0-d array, found shape \(2,\)"):
        getattr(jopt, name)(lr=jnp.ones(2))
    with pytest.raises(TypeError, match=r"lr: expected a number, a 0-d array or a schedule.*found dict"):
        getattr(jopt, name)(lr={"w": 0.1})
    two = lambda count: jnp.ones(2) * 0.1  # noqa: E731
    tx = getattr(jopt, name)(lr=two)
    with pytest.raises((TypeError, ValueError), match=r"lr: expected its schedule to return one real number.*\(2,\)"):
        tx.step(params(), tx.init(params()), params())


@pytest.mark.parametrize(
    ("name", "theirs", "torchs"),
    [
        ("adam", {"learning_rate": 0.1}, "lr"),
        ("adamw", {"b1": 0.9}, "betas"),
        ("adamax", {"b2": 0.9}, "betas"),
        ("rmsprop", {"decay": 0.9}, "alpha"),
        ("sgd", {"learning_rate": 0.1, "momentum": 0.5}, "lr"),
        ("nadam", {"b1": 0.9}, "betas"),
        ("muon", {"learning_rate": 0.1}, "lr"),
    ],
    ids=lambda x: str(x),
)
def test_optaxs_names(name, theirs, torchs):
    (given, *_) = theirs
    with pytest.raises(TypeError, match=rf"{name}: {given} is optax's name; torch's is {torchs}"):
        getattr(jopt, name)(**theirs)


def test_a_name_of_nobody():
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        jopt.adam(speed=3)


@pytest.mark.parametrize("make", [lambda f: jopt.sgd(lr=f), lambda f: jopt.adam(betas=(f, 0.9))], ids=["lr", "beta1"])
def test_a_schedule_that_branches(make):
    """In Python, on the step, which is traced."""
    tx = make(lambda count: 0.1 if count < 10 else 0.01)
    text = "(lr|beta1|betas).*schedule.*(jnp.where|jax.lax|select)"
    state = tx.init(params())
    with pytest.raises(TypeError, match=text):
        jax.jit(tx.step)(params(), state, params())


@pytest.mark.parametrize(
    "dtype", [name for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn") if hasattr(jnp, name)]
)
@pytest.mark.parametrize("name", FIRST)
def test_narrow_floats_are_refused(name, dtype):
    tree = params() | {"v": jnp.ones((2, 1)).astype(dtype)}
    tx = FIRST[name].jopt()
    with pytest.raises(TypeError, match=rf"params\['v'\]: .*{dtype}"):
        tx.init(tree)
    with pytest.raises(TypeError, match=rf"grads\['v'\]: .*{dtype}"):
        tx.step(tree, tx.init(params()), params())


NUMBERS = {"float": 0.5, "numpy": np.float64(0.5), "array": np.full((), 0.5)}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("name", cases.mostly_slow(["sgd", "adamw", "adafactor"], ["adafactor"]))
def test_numbers_as_parameters(name, number):
    """Python's and NumPy's are taken as JAX takes them, everywhere, as under jit; and no warning is given."""
    exact = FIRST[name].jopt()
    for tx in (
        exact,
        jopt.monitor(exact),
        jopt.skip_nonfinite(exact),
        jopt.chain(jopt.clip_grad_norm(0.1), jopt.clip_grad_value(0.2), exact),
        jopt.param_groups(lambda: exact, {"w": {}}),
    ):
        tree, array = {"w": number}, {"w": jnp.asarray(0.5)}
        for f in (tx.step, tx.update):
            ours, _ = f(tree, tx.init(tree), tree)
            theirs, _ = f(array, tx.init(array), array)
            assert ours == theirs
            assert (ours["w"].shape, ours["w"].dtype) == ((), jnp.zeros(()).dtype)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_as_parameters_elsewhere(number):
    tree, array = {"w": number}, {"w": jnp.asarray(0.5)}
    assert jopt.unpack(jopt.pack(tree)) == array
    for average in (jopt.ema(0.5), jopt.swa()):
        assert average.update(tree, average.update(tree, average.init(tree))).params == array
    lbfgs = jopt.lbfgs()
    loss = jax.value_and_grad(lambda p: p["w"] ** 2)
    assert lbfgs.step(loss, lbfgs.init(tree), tree)[0] == lbfgs.step(loss, lbfgs.init(array), array)[0]
    scaling = jopt.loss_scale()
    assert scaling.unscale(tree, scaling.init()) == scaling.unscale(array, scaling.init())


@pytest.mark.parametrize("other", [1, True, "1"])
def test_other_numbers_are_no_parameters(other):
    tree = {"w": other}
    for tx in (jopt.adam(), jopt.monitor(jopt.adam()), jopt.chain(jopt.clip_grad_norm(0.1), jopt.adam())):
        with pytest.raises(TypeError, match=r"params\['w'\]: expected a floating point or complex array, found \w+"):
            tx.init(tree)
    with pytest.raises(TypeError, match=r"\['w'\]: expected a floating point or complex array"):
        jopt.lbfgs().init(tree)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_shapes_alone_make_the_state(case):
    """`jax.ShapeDtypeStruct`s: the state of the parameters that are not there yet."""
    tree = case.tree(params())
    shapes = jax.eval_shape(lambda: tree)
    tx = case.jopt()
    wrapped = [tx, jopt.monitor(tx), jopt.chain(jopt.clip_grad_norm(1.0), tx)]
    for made_by in wrapped if case.id == "adamw" else wrapped[:1]:
        made, expected = made_by.init(shapes), made_by.init(tree)
        assert jax.tree.structure(made) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert isinstance(a, jax.Array | jax.ShapeDtypeStruct)


def test_a_master_copy_needs_the_values():
    shapes = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
    with pytest.raises(ValueError, match="params: expected arrays, which master_copy keeps a copy of"):
        jopt.adam(master_copy=True).init(shapes)


def test_a_result_that_does_not_fit_is_no_surprise_to_optax():
    """optax's apply_updates with updates of jopt: types and structure stay."""
    tx = jopt.adamw()
    tree = {"w": jnp.ones(2, jnp.bfloat16), "none": None}
    updates, _ = tx.update(tree, tx.init(tree), tree)
    new = optax.apply_updates(tree, updates)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, tree)
    assert re.fullmatch(r"\w+", jax.tree.leaves(new)[0].dtype.name)
    assert dataclasses.is_dataclass(tx) or isinstance(tx, tuple)


def test_arguments_in_another_order():
    tx = jopt.adam()
    state = tx.init(params())
    with pytest.raises(TypeError, match=r"found a State; the order is step\(grads, state, params\)"):
        tx.step(params(), params(), state)


@pytest.mark.parametrize(
    ("name", "theirs", "words"),
    [
        ("rmsprop", {"eps_in_sqrt": False}, "eps_in_sqrt is optax's name; torch's eps is always outside"),
        ("adam", {"eps_root": 0.0}, "eps_root is optax's name; torch adds nothing inside"),
        ("adamw", {"mask": None}, "mask is optax's name; take jopt.param_groups"),
        ("adam", {"nesterov": True}, "nesterov is optax's name; take jopt.nadam"),
        ("adam", {"mu_dtype": None}, "mu_dtype is optax's name; take state_dtype"),
    ],
)
def test_what_has_no_name_here(name, theirs, words):
    with pytest.raises(TypeError, match=words):
        getattr(jopt, name)(**theirs)


def test_a_chain_given_another_state():
    tx = jopt.chain(jopt.clip_grad_norm(1.0), jopt.adam())
    others = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)).init(params())
    for state, words in (
        (jopt.adam().init(params()), "expected the 2 states of this chain in a tuple, found a State"),
        (others, "expected clip_grad_norm's own, found a EmptyState"),
        (optax.adam(0.1).init(params()), "expected clip_grad_norm's own, found a ScaleByAdamState"),
    ):
        with pytest.raises(ValueError, match=words):
            tx.step(params(), state, params())
