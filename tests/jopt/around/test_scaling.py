"""The loss scale is GradScaler's, step for step; what is not finite changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from tests import cases


def overflows(step):
    return step in (3, 4, 11) or step == 30


@pytest.mark.parametrize("interval", [3, 7])
def test_a_run_in_float16_is_torchs(interval):
    """Scale, skipped steps, parameters, moments, and the scheduler's count, which goes on where a step is skipped."""
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    problem = cases.Problem("float32")
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in problem.start]
    optimizer = torch.optim.AdamW(theirs, lr=0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=interval)

    tx = jopt.chain(jopt.clip_grad_norm(20.0), jopt.adamw(lr=jopt.schedules.exponential_lr(0.02, 0.97)))
    ours = [jnp.asarray(x) for x in problem.start]
    scale = jopt.loss_scale(init_scale=64.0, growth_interval=interval)
    state, s = tx.init(ours), scale.init()

    def loss_of(params, targets, factor):
        return (
            sum(
                ((p.astype(jnp.float16) - t) ** 2).sum().astype(jnp.float32)
                for p, t in zip(params, targets, strict=True)
            )
            * factor
        )

    @jax.jit
    def train_step(params, state, s, targets, factor):
        grads = jax.grad(lambda p: scale.scale(loss_of(p, targets, factor), s))(params)
        return scale.step(tx, grads, state, params, s)

    skipped = []
    for i in range(40):
        targets = [np.asarray(t + 0.1 * i, np.float16) for t in problem.target]
        factor = 1e30 if overflows(i) else 0.01
        optimizer.zero_grad()
        loss = (
            sum(((p.half() - torch.tensor(t)) ** 2).sum().float() for p, t in zip(theirs, targets, strict=True))
            * factor
        )
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theirs, 20.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        ours, state, s = train_step(ours, state, s, targets, jnp.float32(factor))
        skipped.append(bool(s.found_inf))
        assert s.scale == scaler.get_scale()
        assert s.growth_tracker == scaler._growth_tracker.item()
    assert [i for i, x in enumerate(skipped) if x] == [i for i in range(40) if overflows(i)]
    adamw = state[1]
    assert adamw.count == 40
    for i, p in enumerate(theirs):
        assert adamw.scalars["step"][i].item() == optimizer.state[p]["step"].item() == 36
        assert cases.difference(ours[i], p.detach().numpy()) <= cases.NETWORK["float32"]
        found = adamw.slots["exp_avg"][i]
        assert cases.difference(found, optimizer.state[p]["exp_avg"].numpy()) <= cases.HALF_GRADIENTS


def test_the_scale_never_grows_to_infinity():
    scale = jopt.loss_scale(init_scale=2.0**127, growth_interval=1)
    s = scale.update(jnp.asarray(False), scale.init())
    assert s.scale == 2.0**127
    assert s.growth_tracker == 0


def test_pieces_compose_to_the_step():
    scale, tx = jopt.loss_scale(init_scale=8.0), jopt.sgd(lr=0.5)
    params = jnp.ones(2)
    state, s = tx.init(params), scale.init()
    grads, found_inf = scale.unscale(jnp.array([8.0, 16.0]), s)
    assert grads.tolist() == [1.0, 2.0]
    assert not found_inf
    new, _, after = scale.step(tx, jnp.array([8.0, 16.0]), state, params, s)
    assert new.tolist() == [0.5, 0.0]
    assert after == scale.update(found_inf, s)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(growth_factor=1.0), r"The growth factor must be > 1.0."),
        (dict(backoff_factor=1.0), r"The backoff factor must be < 1.0."),
        (dict(growth_interval=0), "growth_interval: expected at least 1"),
        (dict(init_scale=0.0), "init_scale: expected a number greater than 0"),
    ],
)
def test_bad_input(arguments, text):
    with pytest.raises(ValueError, match=text):
        jopt.loss_scale(**arguments)


# --- skipping


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [lambda: jopt.adamw(lr=0.1), lambda: optax.adamw(0.1), lambda: jopt.adafactor(lr=0.1)])
def test_a_bad_gradient_changes_nothing_and_is_counted(make, bad):
    with jax.numpy_dtype_promotion("standard"):
        tx = jopt.skip_nonfinite(make())
        params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
        good = {"a": jnp.ones((3, 2)), "b": jnp.full(2, 0.5)}
        step = jax.jit(tx.step)
        params, state = step(good, tx.init(params), params)
        kept, inner = params, state.inner
        params, state = step(good | {"b": jnp.array([1.0, bad])}, state, params)
        jax.tree.map(np.testing.assert_array_equal, (params, state.inner), (kept, inner))
        assert state.skipped == 1
        params, state = step(good, state, params)
        assert (params["b"] < kept["b"]).all()
        assert state.skipped == 1
        # A run without the bad step is the same run.
        plain = make()
        expected, plain_state = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}, None
        plain_state = plain.init(expected)
        for _ in range(2):
            updates, plain_state = plain.update(good, plain_state, expected)
            expected = optax.apply_updates(expected, updates)
        for name, x in expected.items():
            assert cases.difference(params[name], x) <= cases.FRONT_ENDS["float32"]


def test_update_skips_too():
    tx = optax.chain(jopt.skip_nonfinite(jopt.sgd(lr=1.0)))
    params = jnp.ones(2)
    updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(params), params)
    assert updates.tolist() == [0.0, 0.0]
    assert state[0].skipped == 1


def test_large_gradients_are_finite():
    """Their sum or their square would not be."""
    tx = jopt.skip_nonfinite(jopt.sgd(lr=1e-38))
    params = jnp.zeros(4)
    _, state = tx.step(jnp.full(4, 3e38), tx.init(params), params)
    assert state.skipped == 0


def test_no_transformation():
    with pytest.raises(TypeError, match="expected a gradient transformation, found float"):
        jopt.skip_nonfinite(0.1)


# --- accumulation


def test_accumulating_with_optax_is_the_mean_batch():
    """optax.MultiSteps over a jopt optimizer: every fourth call steps, with the mean of four gradients."""
    problem = cases.Problem("float32")
    plain = jopt.adamw(lr=0.01)
    tx = optax.MultiSteps(plain, every_k_schedule=4)
    params = expected = [jnp.asarray(x) for x in problem.start]
    state, plain_state = tx.init(params), plain.init(expected)
    update = jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for i in range(3):
            many = [[jnp.asarray(g) for g in problem.grads(4 * i + k, expected)] for k in range(4)]
            for grads in many:
                updates, state = update(grads, state, params)
                params = optax.apply_updates(params, updates)
            mean = jax.tree.map(lambda *x: functools.reduce(jnp.add, x) / 4, *many)
            expected, plain_state = plain.step(mean, plain_state, expected)
    for a, b in zip(params, expected, strict=True):
        assert cases.difference(a, b) <= cases.FRONT_ENDS["float32"]


def test_accumulating_skips_what_is_not_finite():
    """Without should_skip_update_fn one nan stays in the accumulated gradient; with it that batch is left out."""
    params = jnp.ones(2)
    tx = optax.MultiSteps(jopt.sgd(lr=1.0), every_k_schedule=2, should_skip_update_fn=optax.skip_not_finite)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for grads in (jnp.array([jnp.nan, 1.0]), jnp.ones(2), jnp.ones(2)):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert jnp.isfinite(params).all()
    assert params.tolist() == [0.0, 0.0]
