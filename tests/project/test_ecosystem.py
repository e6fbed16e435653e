"""jopt's transformations inside the libraries that people train with in JAX: each run is the plain run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import ROOT, cases

REASON = "pip install 'jopt[ecosystem]'"
STEPS = 5


@pytest.fixture(autouse=True)
def as_users(relaxed):
    """These libraries and optax mix types and ranks."""


@pytest.fixture
def problem():
    return cases.Problem("float32")


def plain(tx, problem, steps=STEPS):
    """The run that the others have to be."""
    params = [jnp.asarray(x) for x in problem.start]
    state, step = tx.init(params), jax.jit(tx.step)
    for i in range(steps):
        params, state = step([jnp.asarray(g) for g in problem.grads(i, params)], state, params)
    return params


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert cases.difference(a, b) <= cases.FRONT_ENDS["float32"]


# --- optax


def test_inject_hyperparams(problem):
    """betas are a tuple, which optax leaves static; the learning rate may be set in the state."""
    tx = optax.inject_hyperparams(jopt.adamw, static_args=("betas",))(lr=0.5, weight_decay=0.1, betas=(0.8, 0.99))
    params = [jnp.asarray(x) for x in problem.start]
    state = tx.init(params)
    state.hyperparams["lr"] = jnp.asarray(0.02)
    for i in range(STEPS):
        updates, state = jax.jit(tx.update)([jnp.asarray(g) for g in problem.grads(i, params)], state, params)
        params = optax.apply_updates(params, updates)
    assert_same(params, plain(jopt.adamw(lr=0.02, weight_decay=0.1, betas=(0.8, 0.99)), problem))


@pytest.mark.parametrize("name", ["partition", "masked"])
def test_partition_and_masked(name, problem):
    """Two optimizers of one model, by optax's means."""
    labels = ["adam", "sgd", "adam"]
    txs = {"adam": jopt.adam(lr=0.02), "sgd": jopt.sgd(lr=0.1, momentum=0.9)}
    if name == "partition":
        tx = optax.partition(txs, labels)
    else:
        tx = optax.chain(*(optax.masked(t, [label == key for label in labels]) for key, t in txs.items()))
    params = [jnp.asarray(x) for x in problem.start]
    state = tx.init(params)
    for i in range(STEPS):
        updates, state = jax.jit(tx.update)([jnp.asarray(g) for g in problem.grads(i, params)], state, params)
        params = optax.apply_updates(params, updates)
    by_hand = {key: plain(t, problem) for key, t in txs.items()}
    assert_same(params, [by_hand[label][i] for i, label in enumerate(labels)])


def test_apply_if_finite_and_lookahead_take_it(problem):
    tx = optax.apply_if_finite(jopt.rmsprop(lr=0.01), max_consecutive_errors=3)
    params = [jnp.asarray(x) for x in problem.start]
    state = tx.init(params)
    bad = [jnp.full_like(x, jnp.nan) for x in params]
    updates, state = tx.update(bad, state, params)
    params = optax.apply_updates(params, updates)
    for i in range(STEPS):
        updates, state = jax.jit(tx.update)([jnp.asarray(g) for g in problem.grads(i, params)], state, params)
        params = optax.apply_updates(params, updates)
    assert_same(params, plain(jopt.rmsprop(lr=0.01), problem))


LR = 0.01
FALLING = optax.exponential_decay(LR, 1, 0.95)
SAME = {  # docs/from-optax.md: what a user of optax writes, jopt's, how far apart they may be in float64
    "adam": (optax.adam(LR), jopt.adam(lr=LR), 1e-14),
    "adamax": (optax.adamax(LR), jopt.adamax(lr=LR), 1e-14),
    "adamw": (optax.adamw(LR, weight_decay=1e-2), jopt.adamw(lr=LR), 1e-14),
    "sgd": (optax.sgd(LR, momentum=0.9, nesterov=True), jopt.sgd(lr=LR, momentum=0.9, nesterov=True), 1e-14),
    "adadelta": (optax.adadelta(1.0), jopt.adadelta(), 1e-14),
    "rmsprop": (
        optax.rmsprop(LR, decay=0.99, eps_in_sqrt=False, centered=True, momentum=0.9),
        jopt.rmsprop(lr=LR, centered=True, momentum=0.9),
        1e-14,
    ),
    "decay": (
        optax.chain(optax.add_decayed_weights(0.1), optax.adam(LR)),
        jopt.adam(lr=LR, weight_decay=0.1),
        1e-14,
    ),
    "clip": (
        optax.chain(optax.clip(0.5), optax.sgd(LR)),
        jopt.chain(jopt.clip_grad_value(0.5), jopt.sgd(lr=LR)),
        1e-14,
    ),
    "clip_by_global_norm": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(LR)),
        jopt.chain(jopt.clip_grad_norm(1.0), jopt.sgd(lr=LR)),
        1e-6,
    ),
    "theirs around ours": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(FALLING)),
        optax.chain(optax.clip_by_global_norm(1.0), jopt.sgd(lr=FALLING)),
        1e-6,  # optax computes its schedules in float32
    ),
    "accumulated": (
        optax.MultiSteps(optax.adam(LR), 2).gradient_transformation(),
        optax.MultiSteps(jopt.adam(lr=LR), 2).gradient_transformation(),
        1e-14,
    ),
    "adagrad": (optax.adagrad(LR, initial_accumulator_value=0.0, eps=1e-20), jopt.adagrad(lr=LR), 1e-8),
    "radam": (optax.radam(LR), jopt.radam(lr=LR), 1e-6),
}
OTHERWISE = {
    "rmsprop": (optax.rmsprop(LR), jopt.rmsprop(lr=LR)),
    "rmsprop's momentum": (
        optax.rmsprop(FALLING, decay=0.99, eps_in_sqrt=False, momentum=0.9),
        jopt.rmsprop(lr=FALLING, momentum=0.9),
    ),
    "adagrad": (optax.adagrad(LR), jopt.adagrad(lr=LR)),
    "amsgrad": (optax.amsgrad(LR), jopt.adam(lr=LR, amsgrad=True)),
    "nadam": (optax.nadam(LR), jopt.nadam(lr=LR)),
    "rprop": (optax.rprop(LR), jopt.rprop(lr=LR)),
}


def apart(*transformations, steps=50):
    def run(tx):
        def step(carry, i):
            w, state = carry
            updates, state = tx.update(0.1 * w + jnp.sin(i * jnp.arange(1.0, 4.0)), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.array([1.0, -2.0, 3.0])
        return np.asarray(jax.lax.scan(step, (w, tx.init(w)), jnp.arange(float(steps)))[0][0])

    theirs, ours = map(run, transformations)
    return np.abs(theirs - ours).max()


@pytest.mark.parametrize("name", SAME)
def test_what_optax_calls_it(name, x64):
    *pair, tolerance = SAME[name]
    assert apart(*pair) <= tolerance


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_optax_has_otherwise(name, x64):
    assert apart(*OTHERWISE[name]) > 1e-3


@pytest.mark.parametrize(
    ("theirs", "ours", "until"),
    [
        (optax.cosine_decay_schedule(LR, 100), jopt.schedules.cosine_annealing_lr(LR, T_max=100), 101),
        (optax.linear_schedule(LR / 10, LR, 10), jopt.schedules.linear_lr(LR, start_factor=0.1, total_iters=10), 30),
        (optax.exponential_decay(LR, 1, 0.9), jopt.schedules.exponential_lr(LR, 0.9), 50),
        (
            optax.piecewise_constant_schedule(LR, {3: 0.1, 6: 0.1}),
            jopt.schedules.multi_step_lr(LR, milestones=[3, 6], gamma=0.1),
            10,
        ),
    ],
    ids=["cosine", "linear", "exponential", "piecewise"],
)
def test_schedules_of_both(theirs, ours, until, x64):
    for step in range(until):
        assert float(theirs(step)) == pytest.approx(float(ours(step)), rel=1e-6, abs=1e-9)


# --- flax nnx


@pytest.mark.slow
def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx", reason=REASON)
    x = jax.random.normal(jax.random.key(0), (16, 4))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(jax.nn.tanh(self.norm(self.hidden(x))))

    def loss(model):
        return jnp.mean((model(x) - 1.0) ** 2)

    tx = jopt.param_groups(jopt.adamw, {jopt.norms_and_biases: {"weight_decay": 0.0}}, lr=1e-2, weight_decay=0.1)
    model, again = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(train_step(model, optimizer)) for _ in range(STEPS)]
    graph, params = nnx.split(again, nnx.Param)
    patterns = {r"^hidden\.kernel$": {"lr": 0.1}, "bias$": {"weight_decay": 0.0}, r"norm\.scale": None}
    assert jopt.param_groups(jopt.adamw, patterns).assignment(params) == {
        "hidden.bias": "bias$",
        "hidden.kernel": r"^hidden\.kernel$",
        "norm.bias": "bias$",
        "norm.scale": r"norm\.scale",
        "out.bias": "bias$",
        "out.kernel": "the rest",
    }
    state, step = tx.init(params), jax.jit(tx.step)
    for value in losses:
        found, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p)))(params)
        assert float(found) == pytest.approx(value, rel=cases.NETWORK["float32"])
        params, state = step(grads, state, params)
    assert losses[-1] < losses[0]
    groups = tx.assignment(params)
    assert {name for name, group in groups.items() if group == "the rest"} == {
        name for name in groups if "kernel" in name
    }


# --- equinox


@pytest.mark.slow
def test_equinox():
    eqx = pytest.importorskip("equinox", reason=REASON)
    x = jax.random.normal(jax.random.key(0), (16, 4))
    model = eqx.nn.MLP(4, 1, 8, 2, key=jax.random.key(1))
    tx = jopt.param_groups(jopt.adamw, {jopt.norms_and_biases: {"weight_decay": 0.0}}, lr=1e-2, weight_decay=0.1)

    def loss(model, x):
        return jnp.mean((jax.vmap(model)(x) - 1.0) ** 2)

    @eqx.filter_jit
    def by_update(model, state, x):
        value, grads = eqx.filter_value_and_grad(loss)(model, x)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    @eqx.filter_jit
    def by_step(model, state, x):
        value, grads = eqx.filter_value_and_grad(loss)(model, x)
        params, static = eqx.partition(model, eqx.is_array)
        params, state = tx.step(grads, state, params)
        return eqx.combine(params, static), state, value

    runs = []
    for train_step in (by_update, by_step):
        trained, state, losses = model, tx.init(eqx.filter(model, eqx.is_array)), []
        for _ in range(STEPS):
            trained, state, value = train_step(trained, state, x)
            losses.append(float(value))
        runs.append(losses)
        assert losses[-1] < losses[0]
    np.testing.assert_allclose(*runs, rtol=cases.NETWORK["float32"])
    assert tx.assignment(eqx.filter(model, eqx.is_array))["layers.0.bias"] == "norms_and_biases"


# --- orbax


@pytest.mark.slow
@pytest.mark.parametrize("hyperparams_in_state", [False, True])
def test_orbax(tmp_path, problem, hyperparams_in_state):
    """A run that is saved, restored into fresh trees and gone on with is the run that went through."""
    ocp = pytest.importorskip("orbax.checkpoint", reason=REASON)
    tx = jopt.chain(
        jopt.clip_grad_norm(5.0), jopt.nadam(lr=0.02, weight_decay=0.1, hyperparams_in_state=hyperparams_in_state)
    )
    average = jopt.ema(0.9)
    params = [jnp.asarray(x) for x in problem.start]
    state, averaged, step = tx.init(params), average.init(params), jax.jit(tx.step)

    def train(params, state, averaged, steps):
        for i in steps:
            params, state = step([jnp.asarray(g) for g in problem.grads(i, params)], state, params)
            averaged = average.update(params, averaged)
        return params, state, averaged

    half = train(params, state, averaged, range(5))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", half)
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, (params, state, averaged))
        restored = checkpointer.restore(tmp_path / "run", like)
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    whole = train(*half, range(5, 10))
    for a, b in zip(jax.tree.leaves(train(*restored, range(5, 10))), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_pages_orbax_recipe_goes_on():
    pytest.importorskip("orbax.checkpoint", reason=REASON)
    page = (ROOT / "docs" / "jax-libraries.md").read_text()
    (recipe,) = (x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "StandardCheckpointer" in x)
    names = {}
    exec(recipe, names)
    tx, params = jopt.adamw(lr=1e-3), {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        params, state = tx.step(params, state, params)
    for a, b in zip(jax.tree.leaves((names["params"], names["state"])), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_array_equal(a, b)


# --- torchax


@pytest.fixture
def torchax(monkeypatch):
    """torchax, imported. Its tables name overloads of torch's that torch 2.13 has no more; none of them is called."""
    torch = pytest.importorskip("torch", reason="torchax runs torch's modules")
    packet = type(torch.ops.aten.prod)
    overload = packet.__getattr__

    def overload_or_name(self, name):
        try:
            return overload(self, name)
        except AttributeError:
            return _Gone()

    monkeypatch.setattr(packet, "__getattr__", overload_or_name)
    return pytest.importorskip("torchax", reason=REASON)


class _Gone:
    def name(self):
        return "an overload that this torch has not"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchax's, of torch and JAX
def test_torchax_runs_the_module_and_jopt_steps_it(torchax):
    """A PyTorch module in JAX, as docs/jax-libraries.md has it, is the run in PyTorch."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    params, apply = torchax.extract_jax(model)
    tx = jopt.adamw(lr=1e-2)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, x, y):
        grads = jax.grad(lambda p: jnp.mean((apply(p, (x,)) - y) ** 2))(params)
        return tx.step(grads, state, params)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        params, state = train_step(params, state, x.numpy(), y.numpy())
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert cases.difference(params[name], p.detach()) <= cases.NETWORK["float32"], name
