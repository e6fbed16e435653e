"""Each schedule is the lr that torch's optimizer holds after so many scheduler steps."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt import schedules as s
from jopt._compat import enable_x64, numbers
from tests import cases

STEPS = 1000
LR = 0.3


def wave(step):
    """A factor that Python, NumPy and JAX compute alike."""
    return 1.0 - 0.001 * (step % 7)


# name: (our schedule, torch's scheduler from (torch.optim.lr_scheduler, optimizer))
PAIRS = {
    "lambda": (s.lambda_lr(LR, lambda e: 0.95**e), lambda t, o: t.LambdaLR(o, lambda e: 0.95**e)),
    "multiplicative": (s.multiplicative_lr(LR, wave), lambda t, o: t.MultiplicativeLR(o, wave)),
    "step": (s.step_lr(LR, 30, 0.7), lambda t, o: t.StepLR(o, 30, 0.7)),
    "step-default": (s.step_lr(LR, 300), lambda t, o: t.StepLR(o, 300)),
    "multi_step": (s.multi_step_lr(LR, [10, 500, 900], 0.3), lambda t, o: t.MultiStepLR(o, [10, 500, 900], 0.3)),
    "multi_step-repeated": (s.multi_step_lr(LR, [500, 0, 30, 30]), lambda t, o: t.MultiStepLR(o, [500, 0, 30, 30])),
    "constant": (s.constant_lr(LR), lambda t, o: t.ConstantLR(o)),
    "constant-long": (s.constant_lr(LR, 0.1, 100), lambda t, o: t.ConstantLR(o, 0.1, 100)),
    "constant-never": (s.constant_lr(LR, 0.5, 0), lambda t, o: t.ConstantLR(o, 0.5, 0)),
    "linear": (s.linear_lr(LR), lambda t, o: t.LinearLR(o)),
    "linear-down": (s.linear_lr(LR, 0.9, 0.2, 400), lambda t, o: t.LinearLR(o, 0.9, 0.2, 400)),
    "linear-never": (s.linear_lr(LR, 0.5, 1.0, 0), lambda t, o: t.LinearLR(o, 0.5, 1.0, 0)),
    "exponential": (s.exponential_lr(LR, 0.99), lambda t, o: t.ExponentialLR(o, 0.99)),
    "polynomial": (s.polynomial_lr(LR), lambda t, o: t.PolynomialLR(o)),
    "polynomial-2.5": (s.polynomial_lr(LR, 700, 2.5), lambda t, o: t.PolynomialLR(o, 700, 2.5)),
    "polynomial-never": (s.polynomial_lr(LR, 0), lambda t, o: t.PolynomialLR(o, 0)),
    "cosine": (s.cosine_annealing_lr(LR, 1000), lambda t, o: t.CosineAnnealingLR(o, 1000)),
    "cosine-rebound": (s.cosine_annealing_lr(LR, 90, 0.01), lambda t, o: t.CosineAnnealingLR(o, 90, 0.01)),
    "restarts": (
        s.cosine_annealing_warm_restarts(LR, 70, eta_min=0.01),
        lambda t, o: t.CosineAnnealingWarmRestarts(o, 70, eta_min=0.01),
    ),
    "restarts-2": (
        s.cosine_annealing_warm_restarts(LR, 10, 2),
        lambda t, o: t.CosineAnnealingWarmRestarts(o, 10, 2),
    ),
    "restarts-3": (
        s.cosine_annealing_warm_restarts(LR, 1, 3, 0.1),
        lambda t, o: t.CosineAnnealingWarmRestarts(o, 1, 3, 0.1),
    ),
    "cyclic": (s.cyclic_lr(0.01, 0.1, 50), lambda t, o: t.CyclicLR(o, 0.01, 0.1, 50)),
    "cyclic-2": (
        s.cyclic_lr(0.01, 0.1, 30, 70, "triangular2"),
        lambda t, o: t.CyclicLR(o, 0.01, 0.1, 30, 70, "triangular2"),
    ),
    "cyclic-exp": (
        s.cyclic_lr(0.01, 0.1, 40, 20, "exp_range", 0.999),
        lambda t, o: t.CyclicLR(o, 0.01, 0.1, 40, 20, "exp_range", 0.999),
    ),
    "cyclic-scale": (
        s.cyclic_lr(0.01, 0.1, 40, scale_fn=lambda c: 1 / c),
        lambda t, o: t.CyclicLR(o, 0.01, 0.1, 40, scale_fn=lambda c: 1 / c),
    ),
    "cyclic-scale-iterations": (
        s.cyclic_lr(0.01, 0.1, 40, scale_fn=wave, scale_mode="iterations"),
        lambda t, o: t.CyclicLR(o, 0.01, 0.1, 40, scale_fn=wave, scale_mode="iterations"),
    ),
    "one_cycle": (s.one_cycle_lr(0.1, STEPS), lambda t, o: t.OneCycleLR(o, 0.1, STEPS)),
    "one_cycle-linear": (
        s.one_cycle_lr(0.1, epochs=10, steps_per_epoch=100, anneal_strategy="linear", pct_start=0.25),
        lambda t, o: t.OneCycleLR(o, 0.1, epochs=10, steps_per_epoch=100, anneal_strategy="linear", pct_start=0.25),
    ),
    "one_cycle-three": (
        s.one_cycle_lr(0.1, STEPS, three_phase=True, div_factor=10.0, final_div_factor=50.0),
        lambda t, o: t.OneCycleLR(o, 0.1, STEPS, three_phase=True, div_factor=10.0, final_div_factor=50.0),
    ),
    "one_cycle-three-linear": (
        s.one_cycle_lr(0.1, STEPS, three_phase=True, anneal_strategy="linear"),
        lambda t, o: t.OneCycleLR(o, 0.1, STEPS, three_phase=True, anneal_strategy="linear"),
    ),
    "one_cycle-no-warm-up": (
        s.one_cycle_lr(0.1, STEPS, pct_start=0.0),
        lambda t, o: t.OneCycleLR(o, 0.1, STEPS, pct_start=0.0),
    ),
    "warm-up-cosine": (
        s.sequential_lr([s.linear_lr(LR, 0.01, total_iters=50), s.cosine_annealing_lr(LR, 950)], [50]),
        lambda t, o: t.SequentialLR(o, [t.LinearLR(o, 0.01, total_iters=50), t.CosineAnnealingLR(o, 950)], [50]),
    ),
    "sequential-three": (
        s.sequential_lr([s.constant_lr(LR, 0.1, 20), s.exponential_lr(LR, 0.9), s.step_lr(LR, 3)], [20, 40]),
        lambda t, o: t.SequentialLR(o, [t.ConstantLR(o, 0.1, 20), t.ExponentialLR(o, 0.9), t.StepLR(o, 3)], [20, 40]),
    ),
    "sequential-equal": (
        s.sequential_lr([s.constant_lr(LR, 0.1, 20), s.exponential_lr(LR, 0.9), s.step_lr(LR, 30)], [20, 20]),
        lambda t, o: t.SequentialLR(o, [t.ConstantLR(o, 0.1, 20), t.ExponentialLR(o, 0.9), t.StepLR(o, 30)], [20, 20]),
    ),
    "sequential-from-0": (
        s.sequential_lr([s.constant_lr(LR, 0.1, 20), s.exponential_lr(LR, 0.99)], [0]),
        lambda t, o: t.SequentialLR(o, [t.ConstantLR(o, 0.1, 20), t.ExponentialLR(o, 0.99)], [0]),
    ),
    "sequential-multiplicative": (
        s.sequential_lr([s.exponential_lr(LR, 0.9), s.multiplicative_lr(LR, lambda e: 1 - 1e-3 / (e + 1))], [7]),
        lambda t, o: t.SequentialLR(
            o, [t.ExponentialLR(o, 0.9), t.MultiplicativeLR(o, lambda e: 1 - 1e-3 / (e + 1))], [7]
        ),
    ),
    "chained": (
        s.chained_scheduler([s.constant_lr(LR, 0.1, 20), s.exponential_lr(LR, 0.99)]),
        lambda t, o: t.ChainedScheduler([t.ConstantLR(o, 0.1, 20), t.ExponentialLR(o, 0.99)]),
    ),
    "chained-absolute": (
        s.chained_scheduler([s.exponential_lr(LR, 0.99), s.lambda_lr(LR, wave), s.step_lr(LR, 10, 0.5)]),
        lambda t, o: t.ChainedScheduler([t.ExponentialLR(o, 0.99), t.LambdaLR(o, wave), t.StepLR(o, 10, 0.5)]),
    ),
    "chained-cosine": (
        s.chained_scheduler([s.cosine_annealing_lr(LR, 40, 0.01), s.exponential_lr(LR, 0.999)]),
        lambda t, o: t.ChainedScheduler([t.CosineAnnealingLR(o, 40, 0.01), t.ExponentialLR(o, 0.999)]),
    ),
}


def held(make, optimizer="SGD", steps=STEPS, key="lr", closed=False, **options):
    """What torch's optimizer holds, step for step."""
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    optimizer = getattr(torch.optim, optimizer)([torch.nn.Parameter(torch.zeros(1))], **({"lr": LR} | options))
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    out = []
    for _ in range(steps + 1):
        value = scheduler._get_closed_form_lr()[0] if closed else optimizer.param_groups[0][key]
        out.append(value[0] if key == "betas" else value)
        if len(out) <= steps:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no optimizer.step() came before
                scheduler.step()
    return np.array(out)


def relative(a, b):
    """The largest difference over the largest value: near 0 a cosine has lost its digits on both sides."""
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", PAIRS)
def test_values_are_torchs(name, x64):
    ours, theirs = PAIRS[name]
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    if name == "sequential-from-0" and numbers(torch.__version__) < (2, 13):
        pytest.skip("until torch 2.13 SequentialLR began with its first scheduler, whatever the milestones")
    expected = held(theirs, momentum=0.9)
    steps = np.arange(STEPS + 1)
    at_once = ours(steps)
    few = steps if ours.resumed is None and "chained" not in name else steps[::97]  # those cost as many evaluations
    assert relative([ours(int(i)) for i in few], at_once[few]) <= cases.SCHEDULES["closed"]
    assert relative(at_once, expected) <= cases.SCHEDULES["recursive"]
    traced = jax.jit(ours.__call__)(jnp.arange(STEPS + 1))
    assert traced.dtype == np.float64
    assert relative(traced, at_once) <= cases.SCHEDULES["recursive" if name == "chained-cosine" else "closed"]


@pytest.mark.parametrize("name", PAIRS)
def test_float32_is_the_rounded_double(name):
    """Without x64, inside jit: what a training step sees."""
    ours, _ = PAIRS[name]
    expected = ours(np.arange(STEPS + 1))
    found = jax.jit(ours.__call__)(jnp.arange(STEPS + 1))
    assert found.dtype == np.float32
    ulps = np.abs(np.asarray(found, np.float64) - expected) / np.spacing(np.abs(expected).astype(np.float32) + 1e-30)
    # Half an ulp is the rounding itself; a double off by its last digit seldom rounds to the other side. Near 0 a
    # cosine has lost its digits.
    assert ulps[expected > 1e-3 * expected.max()].max() <= 0.5001


CLOSED = ["step", "multi_step", "constant-long", "linear-down", "exponential", "polynomial-2.5", "cosine-rebound"]


@pytest.mark.parametrize("name", CLOSED)
def test_values_are_torchs_own_closed_form(name):
    ours, theirs = PAIRS[name]
    np.testing.assert_allclose(
        ours(np.arange(STEPS + 1)), held(theirs, closed=True), rtol=cases.SCHEDULES["closed"], atol=0
    )


MOMENTUM = {
    "cyclic": (s.cyclic_momentum(step_size_up=50), lambda t, o: t.CyclicLR(o, 0.01, 0.1, 50)),
    "cyclic-2": (
        s.cyclic_momentum(0.5, 0.99, 30, 10, "triangular2"),
        lambda t, o: t.CyclicLR(o, 0.01, 0.1, 30, 10, "triangular2", base_momentum=0.5, max_momentum=0.99),
    ),
    "one_cycle": (s.one_cycle_momentum(total_steps=100), lambda t, o: t.OneCycleLR(o, 0.1, 100)),
    "one_cycle-three": (
        s.one_cycle_momentum(0.8, 0.9, total_steps=100, three_phase=True, anneal_strategy="linear"),
        lambda t, o: t.OneCycleLR(
            o, 0.1, 100, three_phase=True, base_momentum=0.8, max_momentum=0.9, anneal_strategy="linear"
        ),
    ),
}


@pytest.mark.parametrize(("optimizer", "key"), [("SGD", "momentum"), ("Adam", "betas")])
@pytest.mark.parametrize("name", MOMENTUM)
def test_momentum_cycles_as_torchs(name, optimizer, key):
    ours, theirs = MOMENTUM[name]
    options = {"momentum": 0.9} if key == "momentum" else {}
    expected = held(theirs, optimizer, 100, key, **options)
    np.testing.assert_allclose(ours(np.arange(101)), expected, rtol=cases.SCHEDULES["closed"])


def test_swalr():
    swa_utils = pytest.importorskip("torch.optim.swa_utils", reason="the truth is torch's")
    for strategy, epochs in [("cos", 10), ("linear", 7), ("cos", 0), ("linear", 1)]:
        expected = held(lambda t, o, e=epochs, a=strategy: swa_utils.SWALR(o, 0.05, e, a), steps=20)
        ours = s.swalr(LR, 0.05, epochs, strategy)
        np.testing.assert_allclose(ours(np.arange(21)), expected, rtol=cases.SCHEDULES["recursive"])

    def behind_another(t, o):
        return t.SequentialLR(o, [t.ExponentialLR(o, 0.9), swa_utils.SWALR(o, 0.05, 5)], [8])

    ours = s.sequential_lr([s.exponential_lr(LR, 0.9), s.swalr(LR, 0.05, 5)], [8])
    np.testing.assert_allclose(ours(np.arange(21)), held(behind_another, steps=20), rtol=cases.SCHEDULES["recursive"])


def test_fractions_of_an_epoch():
    """torch's warm restarts take them: scheduler.step(epoch + i / iterations)."""
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2)
    ours = s.cosine_annealing_warm_restarts(LR, 3, 2)
    for step in np.arange(0, 30, 0.3):
        scheduler.step(step)
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


# --- in training


SCHEDULED = {
    "sgd": (
        dict(lr=s.one_cycle_lr(0.1, 40), momentum=s.one_cycle_momentum(total_steps=40)),
        lambda t, o: t.OneCycleLR(o, 0.1, 40),
        "SGD",
        dict(momentum=0.9),
    ),
    "adamw": (
        dict(lr=s.cyclic_lr(1e-3, 1e-1, 7), betas=(s.cyclic_momentum(step_size_up=7), 0.999)),
        lambda t, o: t.CyclicLR(o, 1e-3, 1e-1, 7),
        "AdamW",
        {},
    ),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_run_under_schedules_is_torchs(name, dtype):
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    arguments, make, cls, options = SCHEDULED[name]
    problem = cases.Problem(dtype)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in problem.start]
    optimizer = getattr(torch.optim, cls)(theirs, lr=1.0, **options)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    with enable_x64(dtype == "float64"):
        ours = [jnp.asarray(x) for x in problem.start]
        tx = getattr(jopt, name)(**arguments)
        state, step = tx.init(ours), jax.jit(tx.step)
        for i in range(40):
            for p, g in zip(theirs, problem.grads(i, [p.detach().numpy() for p in theirs]), strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
            scheduler.step()
            ours, state = step([jnp.asarray(g) for g in problem.grads(i, ours)], state, ours)
    for p, x in zip(theirs, ours, strict=True):
        assert cases.difference(x, p.detach().numpy()) <= cases.TOLERANCES[dtype]


def test_any_number_takes_a_schedule(x64):
    """Weight decay and beta2 too: as if set by hand before each step."""
    problem = cases.Problem("float64")
    decay, beta2 = s.cosine_annealing_lr(0.1, 10), s.linear_lr(0.99, 0.5, total_iters=10)
    tx = jopt.adamw(lr=0.01, weight_decay=decay, betas=(0.9, beta2))
    by_hand = jopt.adamw(lr=0.01, hyperparams_in_state=True)
    ours = theirs = [jnp.asarray(x) for x in problem.start]
    state, expected = tx.init(ours), by_hand.init(theirs)
    step, step_by_hand = jax.jit(tx.step), jax.jit(by_hand.step)
    for i in range(12):
        grads = [jnp.asarray(g) for g in problem.grads(i, ours)]
        h = expected.hyperparams | {"weight_decay": jnp.asarray(decay(i)), "beta2": jnp.asarray(beta2(i))}
        ours, state = step(grads, state, ours)
        theirs, expected = step_by_hand(grads, expected._replace(hyperparams=h), theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert cases.difference(a, b) <= cases.FRONT_ENDS["float64"]


def test_optax_takes_them():
    lr = s.step_lr(0.5, 2, 0.5)
    tx = optax.sgd(lr)
    params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    for i in range(5):
        updates, state = tx.update(jnp.ones(()), state, params)
        assert updates == -lr(i)


# --- properties


@pytest.mark.parametrize("name", PAIRS)
def test_pure_under_transformations(name):
    """vmap, scan and a Python loop see one function, of any integer type, from any step on."""
    ours, _ = PAIRS[name]
    steps = np.arange(0, 130, 13)
    expected = np.asarray(jax.jit(ours.__call__)(jnp.asarray(steps)))
    scanned = jax.lax.scan(lambda c, x: (c, ours(x)), None, jnp.asarray(steps, jnp.uint32))[1]
    mapped = jax.vmap(ours.__call__)(jnp.asarray(steps, jnp.int16))
    one = ours(jnp.asarray(39.0))
    assert one.dtype == jnp.float32
    for found, value in [(mapped, expected), (scanned, expected), (one, expected[3])]:
        np.testing.assert_allclose(found, value, rtol=1.2e-7, atol=1e-15)  # an ulp of float32, and where a cosine is 0


@pytest.mark.parametrize("name", ["step", "exponential", "polynomial", "cosine", "multi_step"])
def test_annealing_never_rises(name):
    values = PAIRS[name][0](np.arange(STEPS + 1))
    assert (np.diff(values) <= 0).all()
    assert values[0] == LR


def test_differentiable_in_the_lr_and_gamma():
    def total(lr, gamma):
        return s.exponential_lr(lr, gamma)(jnp.arange(3)).sum()

    dlr, dgamma = jax.grad(total, argnums=(0, 1))(2.0, 0.5)
    assert dlr == pytest.approx(1.75)
    assert dgamma == pytest.approx(2 * (1 + 2 * 0.5))


def test_a_batch_of_learning_rates():
    values = jax.vmap(lambda lr: s.cosine_annealing_lr(lr, 10)(jnp.asarray(5)))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(values, [0.5, 1.0], rtol=1e-7)


# --- bad input


BAD = {
    "step_size": (lambda: s.step_lr(1.0, 0), ValueError, "step_lr: expected step_size greater than 0, found 0"),
    "milestones": (lambda: s.multi_step_lr(1.0, [3, -1]), ValueError, "milestones of at least 0, found -1"),
    "constant": (lambda: s.constant_lr(1.0, 1.5), ValueError, "between 0 and 1"),
    "constant total": (lambda: s.constant_lr(1.0, total_iters=-1), ValueError, "constant_lr: expected total_iters"),
    "linear": (lambda: s.linear_lr(1.0, 0.0), ValueError, "Starting multiplicative factor"),
    "linear end": (lambda: s.linear_lr(1.0, end_factor=2.0), ValueError, "Ending multiplicative factor"),
    "linear total": (lambda: s.linear_lr(1.0, total_iters=-1), ValueError, "linear_lr: expected total_iters"),
    "polynomial": (lambda: s.polynomial_lr(1.0, -1), ValueError, "polynomial_lr: expected total_iters"),
    "T_max": (lambda: s.cosine_annealing_lr(1.0, 0), ValueError, "T_max greater than 0"),
    "T_0": (lambda: s.cosine_annealing_warm_restarts(1.0, -3), ValueError, "Expected positive integer T_0, but got -3"),
    "T_mult": (lambda: s.cosine_annealing_warm_restarts(1.0, 3, 1.5), ValueError, "Expected integer T_mult >= 1"),
    "eta_min": (lambda: s.cosine_annealing_warm_restarts(1.0, 3, eta_min="a"), ValueError, "Expected float or int"),
    "lambda": (lambda: s.lambda_lr(1.0, 0.5), TypeError, "lr_lambda should be a function, but got float"),
    "multiplicative": (lambda: s.multiplicative_lr(1.0, None), TypeError, "lr_lambda should be a function"),
    "mode": (lambda: s.cyclic_lr(0.1, 1.0, mode="square"), ValueError, "mode is invalid and scale_fn is None"),
    "scale_mode": (lambda: s.cyclic_lr(0.1, 1.0, scale_mode="x"), ValueError, "expected scale_mode"),
    "up": (lambda: s.cyclic_momentum(step_size_up=0), ValueError, "cyclic_momentum: expected step_size_up"),
    "down": (lambda: s.cyclic_lr(0.1, 1.0, step_size_down=-2), ValueError, "expected step_size_down"),
    "total_steps": (lambda: s.one_cycle_lr(1.0), ValueError, "You must define either total_steps OR"),
    "total_steps 0": (lambda: s.one_cycle_lr(1.0, 0), ValueError, "Expected positive integer total_steps, but got 0"),
    "epochs": (lambda: s.one_cycle_lr(1.0, epochs=-1, steps_per_epoch=3), ValueError, "positive integer epochs"),
    "pct": (lambda: s.one_cycle_lr(1.0, 10, pct_start=1.5), ValueError, "Expected float between 0 and 1 pct_start"),
    "strategy": (lambda: s.one_cycle_lr(1.0, 10, anneal_strategy="x"), ValueError, "anneal_strategy must be one of"),
    "swalr": (lambda: s.swalr(1.0, 0.1, -1), ValueError, "anneal_epochs must be equal or greater than 0, got -1"),
    "swalr strategy": (lambda: s.swalr(1.0, 0.1, 1, "x"), ValueError, "anneal_strategy must be one of"),
    "no schedules": (lambda: s.sequential_lr([], []), ValueError, "at least one schedule"),
    "milestones too few": (lambda: s.sequential_lr([s.step_lr(1.0, 2)] * 3, [1]), ValueError, "number of schedulers 3"),
    "milestones down": (
        lambda: s.sequential_lr([s.step_lr(1.0, 2)] * 3, [5, 2]),
        ValueError,
        r"that go up, found \[5, 2\]",
    ),
    "no schedule": (lambda: s.chained_scheduler([lambda x: x]), TypeError, "at index 0"),
    "two lrs": (lambda: s.chained_scheduler([s.step_lr(1.0, 2), s.step_lr(2.0, 2)]), ValueError, r"one lr, found \[1"),
    "too far": (
        lambda: s.one_cycle_lr(1.0, 10)(11),
        ValueError,
        "Tried to step 11 times. The specified number of total",
    ),
    "negative": (lambda: s.step_lr(1.0, 10)(-1), ValueError, "step_lr: expected a step of at least 0, found -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text.replace("(", r"\(") if "\\" not in text else text):
        call()


def test_a_traced_step_beyond_the_last_one_stays():
    lr = s.one_cycle_lr(1.0, 10)
    assert jax.jit(lr.__call__)(jnp.asarray(10**6)) == np.float32(lr(10))


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        (lambda step: jnp.ones(2), ValueError),
        (lambda step: 1j, TypeError),
        (lambda step: jnp.asarray(1j), ValueError),
        (lambda step: None, TypeError),
        (lambda step: "fast", TypeError),
    ],
)
@pytest.mark.parametrize("argument", ["lr", "weight_decay"])
def test_a_schedule_that_returns_no_number(argument, schedule, error):
    tx = jopt.adamw(**{argument: schedule})
    with pytest.raises(error, match=f"{argument}: expected its schedule to return"):
        tx.init(jnp.ones(2))


def test_constants_of_the_module():
    assert set(s.__all__) - {"Schedule"} == {
        n for n, f in vars(s).items() if callable(f) and getattr(f, "__module__", "") == s.__name__ and n[0].islower()
    }
    assert math.isclose(s.step_lr(1, 1, gamma=0.5)(np.int64(1)), 0.5)
