"""Groups are torch's parameter groups, on any tree."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt import schedules
from jopt._compat import enable_x64
from tests import cases


def tree(problem):
    a, b, c = (jnp.asarray(x) for x in problem.start)
    return {"dense": {"bias": a, "kernel": b}, "head": [c]}


def flat(params):
    return [params["dense"]["bias"], params["dense"]["kernel"], params["head"][0]]


def like(params, leaves):
    return {"dense": {"bias": leaves[0], "kernel": leaves[1]}, "head": [leaves[2]]}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("packed", [False, True])
def test_groups_are_torchs(dtype, packed):
    """Numbers, a schedule and a missing gradient by group, in the tree and packed."""
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    problem = cases.Problem(dtype)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in problem.start]
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs[0]], "weight_decay": 0.0},
            {"params": [theirs[2]], "lr": 0.1, "betas": (0.5, 0.9)},
            {"params": [theirs[1]]},
        ],
        lr=0.02,
        weight_decay=0.1,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 1.0, lambda e: 0.9**e, lambda e: 1.0])
    tx = jopt.param_groups(
        jopt.adamw,
        {
            jopt.norms_and_biases: {"weight_decay": 0.0},
            "^head": {"lr": schedules.exponential_lr(0.1, 0.9), "betas": (0.5, 0.9)},
        },
        lr=0.02,
        weight_decay=0.1,
    )
    with enable_x64(dtype == "float64"):
        ours = tree(problem)
        params = jopt.pack(ours, groups=tx) if packed else ours
        state, step = tx.init(params), jax.jit(tx.step)
        for i in range(30):
            on = [True, True, packed or i % 5 != 3]
            for p, g, a in zip(theirs, problem.grads(i, [p.detach().numpy() for p in theirs]), on, strict=True):
                p.grad = torch.tensor(g) if a else None
            optimizer.step()
            scheduler.step()
            grads = like(ours, [jnp.asarray(g) for g in problem.grads(i, flat(ours))])
            if packed:
                params, state = step(jopt.pack(grads, groups=tx), state, params)
                ours = jopt.unpack(params)
            else:
                ours, state = step(grads, state, ours, active=like(ours, on))
    for p, x in zip(theirs, flat(ours), strict=True):
        assert cases.difference(x, p.detach().numpy()) <= cases.TOLERANCES[dtype]


def test_whole_rules_chains_and_frozen_leaves():
    problem = cases.Problem("float32")
    tx = jopt.param_groups(
        jopt.adamw,
        {
            "bias": jopt.sgd(lr=0.1, momentum=0.9),
            r"kernel$": jopt.chain(jopt.clip_grad_norm(0.5), jopt.rmsprop(lr=0.01)),
            "head": None,
        },
        lr=1.0,
    )
    params = tree(problem)
    frozen = params["head"][0]
    alone = [(jopt.sgd(lr=0.1, momentum=0.9)), jopt.chain(jopt.clip_grad_norm(0.5), jopt.rmsprop(lr=0.01))]
    expected = [params["dense"]["bias"], params["dense"]["kernel"]]
    states = [t.init(x) for t, x in zip(alone, expected, strict=True)]
    state = tx.init(params)
    assert jax.tree.leaves(state.groups[2]) == []  # nothing is kept for what is frozen
    step, steps = jax.jit(tx.step), [jax.jit(t.step) for t in alone]
    for i in range(5):
        grads = [jnp.asarray(g) for g in problem.grads(i, flat(params))]
        params, state = step(like(params, grads), state, params)
        for k, step_alone in enumerate(steps):
            expected[k], states[k] = step_alone(grads[k], states[k], expected[k])
    np.testing.assert_array_equal(params["head"][0], frozen)
    for found, x in zip(flat(params), expected, strict=False):
        assert cases.difference(found, x) <= cases.FRONT_ENDS["float32"]


def test_first_match_wins_and_each_leaf_is_in_one_group():
    params = {"a": {"bias": jnp.ones(2), "w": jnp.ones((2, 2))}, "b": {"bias": jnp.ones(2)}}
    tx = jopt.param_groups(jopt.sgd, {"^b": {"lr": 1.0}, "bias": {"lr": 2.0}, r"\.w$": {"lr": 3.0}}, lr=4.0)
    assert tx.assignment(params) == {"a.bias": "bias", "a.w": r"\.w$", "b.bias": "^b"}
    new, _ = tx.step(params, tx.init(params), params)
    assert [new["a"]["bias"][0], new["a"]["w"][0, 0], new["b"]["bias"][0]] == [-1.0, -2.0, 0.0]


def test_as_an_optax_transformation():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.chain(optax.scale(2.0), jopt.param_groups(jopt.sgd, {"a": {"lr": 0.1}}, lr=0.2))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.4, rtol=1e-6)


def test_groups_of_optax():
    """The function may be optax's, and so may a group."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = jopt.param_groups(optax.sgd, {"a": optax.scale(-3.0)}, learning_rate=0.5)
    new, _ = tx.step(params, tx.init(params), params)
    assert (new["a"][0], new["b"][0]) == (-2.0, 0.5)


def test_it_pickles():
    tx = pickle.loads(pickle.dumps(jopt.param_groups(jopt.sgd, {"a": {"lr": 0.1}, "b": None}, lr=0.2)))
    assert tx.assignment({"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)})["c"] == "the rest"


def test_bad_input():
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    tx = jopt.param_groups(jopt.sgd, {"bais": {"lr": 0.1}}, lr=0.2)
    for call in (tx.init, tx.assignment, lambda p: tx.step(p, None, p)):
        with pytest.raises(ValueError, match="pattern 'bais' is no parameter's first match; the paths are a, b"):
            call(params)
    good = jopt.param_groups(jopt.sgd, {"a": {"lr": 0.1}}, lr=0.2)
    with pytest.raises(
        ValueError, match=r"holds parameters of 2 groups; pack them apart: jopt.pack\(params, groups=tx\)"
    ):
        good.init(jopt.pack(params))
    with pytest.raises(ValueError, match="state: expected that of 2 groups"):
        good.step(params, (), params)
    with pytest.raises(ValueError, match="at least one pattern"):
        jopt.param_groups(jopt.sgd, {}, lr=0.1)
    with pytest.raises(TypeError, match="as pattern, found 3"):
        jopt.param_groups(jopt.sgd, {3: {}}, lr=0.1)
    with pytest.raises(TypeError, match=r"groups\['a'\]: expected arguments, a transformation or None, found 0.1"):
        jopt.param_groups(jopt.sgd, {"a": 0.1}, lr=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_dekay'"):
        jopt.param_groups(jopt.sgd, {"a": {"weight_dekay": 0.1}}, lr=0.1)
    with pytest.raises(ValueError, match="Invalid weight_decay value: -1"):
        jopt.param_groups(jopt.sgd, {"a": {"weight_decay": -1.0}}, lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer: expected a function such as jopt\.adamw"):
        jopt.param_groups("adamw", {"a": {}}, lr=0.1)
    with pytest.raises(ValueError, match="params: expected the parameters, found None"):
        good.update(params, good.init(params))


# --- the learning rate that follows a metric


METRICS = {
    "noisy": lambda i: float(np.random.default_rng(i).normal() + 3 / (1 + i)),
    "plateaus": lambda i: 1.0 - 0.05 * (i // 9),
    "tiny": lambda i: 1.0 - 1e-5 * i,
    "negative": lambda i: -1.0 + 0.01 * (i % 11),
    "nan": lambda i: float("nan") if i % 5 == 2 else 1.0 / (1 + i % 7),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(mode="max", patience=2),
        dict(factor=0.5, patience=0, threshold_mode="abs", threshold=0.01, cooldown=3),
        dict(mode="max", threshold_mode="abs", patience=1, cooldown=1, min_lr=1e-3),
        dict(factor=0.3, patience=1, eps=1e-2),
    ],
)
def test_plateau_counts_as_torch(metric, arguments, x64):
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **arguments)
    ours = jopt.reduce_lr_on_plateau(**arguments)
    state = jopt.sgd(lr=0.3, hyperparams_in_state=True).init(jnp.zeros(1))
    plateau, step = ours.init(), jax.jit(ours.step)
    for i in range(120):
        theirs.step(METRICS[metric](i))
        plateau, state = step(METRICS[metric](i), plateau, state)
        assert state.hyperparams["lr"].item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-15)
        assert plateau.num_bad_epochs == theirs.num_bad_epochs
        assert plateau.cooldown_counter == theirs.cooldown_counter
        assert plateau.best == theirs.best


def test_plateau_of_groups_and_of_optax():
    tx = jopt.param_groups(jopt.sgd, {"a": {"lr": 0.1}}, lr=1.0, hyperparams_in_state=True)
    scheduler = jopt.reduce_lr_on_plateau(factor=0.1, patience=0, min_lr=[0.05, 0.0])
    state = tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
    plateau = scheduler.init()
    for _ in range(2):
        plateau, state = scheduler.step(1.0, plateau, state)
    lrs = [s.hyperparams["lr"].item() for s in state.groups]
    np.testing.assert_allclose(lrs, [0.05, 0.1], rtol=1e-6)
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0).init(jnp.ones(1))
    plateau, one = jopt.reduce_lr_on_plateau(patience=0), jopt.reduce_lr_on_plateau(patience=0).init()
    for _ in range(2):
        one, injected = plateau.step(1.0, one, injected)
    np.testing.assert_allclose(injected.hyperparams["learning_rate"], 0.1, rtol=1e-6)
    with pytest.raises(ValueError, match="expected 2 min_lrs, got 1"):
        jopt.reduce_lr_on_plateau(min_lr=[0.1]).step(1.0, scheduler.init(), state)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(factor=1.0), r"Factor should be < 1.0."),
        (dict(mode="least"), "mode least is unknown!"),
        (dict(threshold_mode="x"), "threshold mode x is unknown!"),
    ],
)
def test_plateau_bad_input(arguments, text):
    with pytest.raises(ValueError, match=text):
        jopt.reduce_lr_on_plateau(**arguments)


def test_plateau_needs_a_learning_rate():
    scheduler = jopt.reduce_lr_on_plateau()
    with pytest.raises(ValueError, match="hyperparams_in_state=True"):
        scheduler.step(1.0, scheduler.init(), jopt.sgd(lr=0.1).init(jnp.ones(1)))


@pytest.mark.parametrize(
    "tx",
    [
        jopt.sgd(lr=jopt.schedules.linear_lr(1.0, 0.25, 1.0, 3), hyperparams_in_state=True),
        jopt.chain(jopt.clip_grad_norm(1.0), jopt.adam(lr=lambda count: 0.1, hyperparams_in_state=True)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.25, 1.0, 3)),
    ],
    ids=["jopt", "chain", "optax"],
)
def test_plateau_of_a_scheduled_learning_rate(tx):
    """The schedule would set it anew at the next step."""
    scheduler = jopt.reduce_lr_on_plateau()
    with pytest.raises(ValueError, match="state: found a learning rate that a schedule sets"):
        scheduler.step(1.0, scheduler.init(), tx.init(jnp.ones(1)))


def test_plateau_beside_another_number_that_is_scheduled():
    tx = jopt.sgd(lr=1.0, momentum=jopt.schedules.constant_lr(0.9), hyperparams_in_state=True)
    scheduler, state = jopt.reduce_lr_on_plateau(patience=0, factor=0.5), tx.init(jnp.ones(1))
    _, state = scheduler.step(2.0, scheduler.step(1.0, scheduler.init(), state)[0], state)
    assert state.hyperparams["lr"] == 0.5
