"""Transformations and schedules are values: copied, pickled, hashed, compared, printed, and pytrees without leaves."""

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt import schedules
from jopt.around import chaining
from tests import cases

SCHEDULES: dict[str, Callable[[float], Any]] = {
    "constant_lr": lambda lr: schedules.constant_lr(lr, 0.5, 3),
    "linear_lr": lambda lr: schedules.linear_lr(lr, 0.5, total_iters=3),
    "exponential_lr": lambda lr: schedules.exponential_lr(lr, 0.9),
    "step_lr": lambda lr: schedules.step_lr(lr, 2),
    "multi_step_lr": lambda lr: schedules.multi_step_lr(lr, [1, 3]),
    "polynomial_lr": lambda lr: schedules.polynomial_lr(lr, 4),
    "cosine_annealing_lr": lambda lr: schedules.cosine_annealing_lr(lr, 4),
    "cosine_annealing_warm_restarts": lambda lr: schedules.cosine_annealing_warm_restarts(lr, 3),
    "cyclic_lr": lambda lr: schedules.cyclic_lr(lr, 1.0, 3),
    "one_cycle_lr": lambda lr: schedules.one_cycle_lr(lr, 10),
    "lambda_lr": lambda lr: schedules.lambda_lr(lr, halved),
    "sequential_lr": lambda lr: schedules.sequential_lr(
        [schedules.linear_lr(lr, 0.1, total_iters=2), schedules.exponential_lr(lr, 0.5)], [2]
    ),
}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "chain": lambda lr: jopt.chain(jopt.clip_grad_norm(0.5), jopt.adamw(lr)),
    "clip_grad_value": lambda lr: jopt.chain(jopt.clip_grad_value(0.5), jopt.sgd(lr)),
    "param_groups": lambda lr: jopt.param_groups(jopt.adamw, {"b": {"lr": lr}, "c": None}, lr=0.5),
    "monitor": lambda lr: jopt.monitor(jopt.rmsprop(lr)),
    "skip_nonfinite": lambda lr: jopt.skip_nonfinite(jopt.nadam(lr)),
    "array": lambda lr: jopt.sgd(lr if callable(lr) else jnp.float32(lr)),
    "rounded": lambda lr: jopt.adam(lr, stochastic_rounding=3),
}
OTHERS = {
    "lbfgs": jopt.lbfgs,
    "ema": jopt.ema,
    "swa": lambda lr: jopt.swa(),
    "loss_scale": lambda lr: jopt.loss_scale(init_scale=lr),
    "reduce_lr_on_plateau": lambda lr: jopt.reduce_lr_on_plateau(factor=lr),
}
STEPPED = {case.id: lambda lr, case=case: case.jopt(lr=lr) for case in cases.CASES} | WRAPPERS
ALL = STEPPED | OTHERS | SCHEDULES


def halved(count):
    return 0.5**count


def params():
    return {"a": jnp.ones((3, 2)), "b": jnp.full((2, 2), 2.0), "c": jnp.zeros((2, 1))}


def stepped(tx):
    grads = jax.tree.map(lambda x: x + 0.5, params())
    return chaining.step(tx, grads, tx.init(params()), params())


def copies(value):
    found = {
        "pickle": pickle.loads(pickle.dumps(value)),
        "copy": copy.copy(value),
        "deepcopy": copy.deepcopy(value),
        "tree.map": jax.tree.map(lambda x: x, value),
    }
    if not isinstance(value, schedules.Schedule):  # a function, and as such a leaf
        found["a tree's"] = jax.tree.unflatten(jax.tree.structure(value), [])
    return found


@pytest.mark.parametrize("name", ALL)
def test_what_is_made_alike_is_equal(name):
    value, alike, other = ALL[name](0.25), ALL[name](0.25), ALL[name](0.75)
    assert value == alike
    assert hash(value) == hash(alike)
    if name != "swa":
        assert value != other
    assert value != 0.25
    assert {value: 1}[alike] == 1


@pytest.mark.parametrize("name", ALL)
def test_copies_are_equal(name):
    value = ALL[name](0.25)
    for way, made in copies(value).items():
        assert made == value, way
        assert hash(made) == hash(value), way


@pytest.mark.parametrize("name", WRAPPERS)
def test_copies_step_alike(name):
    expected = stepped(STEPPED[name](0.25))
    for way, made in copies(STEPPED[name](0.25)).items():
        for a, b in zip(jax.tree.leaves(stepped(made)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=way)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_inside_are_values(name):
    made = lambda: jopt.param_groups(jopt.adamw, {"b": {"lr": SCHEDULES[name](0.25)}}, lr=0.5)  # noqa: E731
    tx = pickle.loads(pickle.dumps(made()))
    assert tx == made()
    for a, b in zip(jax.tree.leaves(stepped(tx)), jax.tree.leaves(stepped(made())), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", STEPPED)
def test_one_compilation_serves_equal_transformations(name):
    compiled = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, x):
        compiled.append(tx)
        return x

    for _ in range(3):
        step(STEPPED[name](0.25), 1.0)
    step(STEPPED[name](0.75), 1.0)
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ALL)
def test_repr_is_one_readable_line(name):
    text = repr(ALL[name](0.25))
    assert "\n" not in text
    assert len(text) < 400
    assert not re.search(r"0x[0-9a-f]{4}|<function|<lambda|object at", text)
    if name != "swa":
        assert "0.25" in text


def test_a_transformation_passes_through_jit_grad_and_scan():
    """As an argument and a result, and in the carry."""
    tx = jopt.adamw(0.25)
    made, _ = jax.jit(lambda tx, x: (tx, x))(tx, 1.0)
    assert made == tx
    (made, total), _ = jax.lax.scan(lambda carry, x: ((carry[0], carry[1] + x), None), (tx, 0.0), jnp.ones(3))
    assert made == tx
    assert total == 3


def test_different_arguments_differ():
    """Whatever the arguments' types are."""
    arrays = [jnp.float32(0.25), jnp.float32(0.5), jnp.asarray(0.25, jnp.bfloat16)]
    made = [jopt.sgd(lr) for lr in (0.25, 0.5, *arrays)]
    made += [jopt.sgd(0.25, nesterov=True, momentum=0.5), jopt.sgd(0.25, momentum=0.5), jopt.adam(0.25)]
    made += [jopt.sgd(schedules.step_lr(0.25, 2)), jopt.sgd(schedules.step_lr(0.25, 3)), jopt.sgd(halved)]
    made += [jopt.monitor(jopt.sgd(0.25)), jopt.skip_nonfinite(jopt.sgd(0.25)), jopt.chain(jopt.sgd(0.25))]
    for i, a in enumerate(made):
        assert [b == a for b in made] == [j == i for j in range(len(made))], a


def test_functions_are_themselves():
    f, g = (lambda count: 0.1), (lambda count: 0.1)
    assert jopt.sgd(f) == jopt.sgd(f)
    assert jopt.sgd(f) != jopt.sgd(g)
    around = [jopt.chain(optax.clip(1.0), jopt.sgd(0.1)) for _ in range(2)]
    assert around[0] == around[0]
    assert around[0] != around[1]  # optax's clip is made of functions


def test_in_equinox_modules():
    """As a field, through filter_jit and filter_grad, and when the module is mapped over."""
    eqx = pytest.importorskip("equinox", reason="pip install '.[ecosystem]' brings it")

    class Learner(eqx.Module):
        model: eqx.nn.Linear
        tx: jopt.Transform
        state: jopt.State

    model = eqx.nn.Linear(2, 1, key=jax.random.key(0))
    tx = jopt.adamw(schedules.step_lr(0.25, 2))
    learner = Learner(model, tx, tx.init(eqx.filter(model, eqx.is_inexact_array)))

    @eqx.filter_jit
    def step(learner, x):
        loss, grads = eqx.filter_value_and_grad(lambda model: jnp.mean(model(x) ** 2))(learner.model)
        arrays, rest = eqx.partition(learner.model, eqx.is_inexact_array)
        arrays, state = learner.tx.step(grads, learner.state, arrays)
        return Learner(eqx.combine(arrays, rest), learner.tx, state), loss

    losses = []
    for _ in range(5):
        learner, loss = step(learner, jnp.ones(2))
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert learner.tx == tx
    assert jax.tree.map(lambda x: x, learner).tx == tx
    assert "adam" in repr(learner).lower()
