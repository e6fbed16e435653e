"""A sweep's runs are separate runs', and torch's; what it recommends is what theory says."""

import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt._compat import enable_x64
from jopt.sweeps import inputs as sweep_inputs
from jopt.sweeps import result as sweep_result
from jopt.sweeps.inputs import make_plan, start
from jopt.sweeps.sweep import LoopProgram, chunk_size
from tests import cases, child

STEPS = 12


def problem(dtype="float32", steps=STEPS):
    """A network of one layer on noise; matrices alone, which Muon takes too."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, 16, 6)).astype(dtype)
    y = rng.standard_normal((steps, 16, 4)).astype(dtype)

    def init(key):
        a, b = jax.random.split(key)
        scale = jnp.asarray(0.5, dtype)
        return {"a": scale * jax.random.normal(a, (6, 8), dtype), "b": scale * jax.random.normal(b, (8, 4), dtype)}

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)

    return loss, init, (x, y)


def separately(loss, params, batches, tx):
    """The losses of one run with tx.step."""

    def advance(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        return tx.step(grads, state, params), value

    return jax.lax.scan(advance, (params, tx.init(params)), batches)[1]


def check_against_separate_runs(chosen):
    loss, init, batches = problem()
    lrs = (0.02, 0.003)
    optimizers = {case.id: lambda lr, case=case: case.jopt(lr=lr) for case in chosen}
    result = jopt.sweep(loss, init, batches, lr=lrs, seeds=[3, 5], optimizers=optimizers)

    @jax.jit
    def references(starts):
        return [separately(loss, p, batches, case.jopt(lr=lr)) for case in chosen for lr in lrs for p in starts]

    expected = references([init(jax.random.key(seed)) for seed in (3, 5)])
    for run, own in zip(result.runs, expected, strict=True):
        tolerance = cases.FRONT_ENDS["float32"] if run.optimizer[:4] != "muon" else cases.MUON["float32"]
        assert cases.difference(run.curve, own) < tolerance, run
    order = [(case.id, lr, seed) for case in chosen for lr in lrs for seed in (3, 5)]
    assert [(run.optimizer, run.lr, run.seed) for run in result.runs] == order


def test_runs_are_separate_runs():
    check_against_separate_runs([case for case in cases.CASES if case.id in cases.UNLIKE])


@pytest.mark.slow  # compiles 53 programs
def test_runs_are_separate_runs_in_every_configuration():
    check_against_separate_runs(cases.CASES)


def test_float64_and_exact_numbers(x64):
    """Swept numbers reach the step in float64, betas, decay and a schedule's factor too: nothing else gives this."""
    loss, init, batches = problem("float64")
    factor = jopt.schedules.exponential_lr(1.0, 0.9)
    decays, betas = [0.0, 0.1], [(0.9, 0.999), (0.7, 0.95)]
    result = jopt.sweep(loss, init, batches, lr=[0.003], seeds=1, schedule=factor, weight_decay=decays, betas=betas)
    expected = [
        separately(
            loss,
            init(jax.random.key(0)),
            batches,
            jopt.adamw(lr=lambda step: 0.003 * factor(step), weight_decay=decay, betas=pair),
        )
        for decay in decays
        for pair in betas
    ]
    for run, own in zip(result.runs, expected, strict=True):
        assert cases.difference(run.curve, own) < cases.FRONT_ENDS["float64"]
    assert [tuple(r.hyperparameters.values()) for r in result.runs] == [(d, b) for d in decays for b in betas]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_runs_are_torchs(dtype):
    """A sequential loop of torch.optim, from the same weights, on the same batches."""
    torch = pytest.importorskip("torch", reason="the truth is torch's")
    with enable_x64(dtype == "float64"):
        loss, init, batches = problem(dtype, steps=30)
        lrs = (1e-3, 0.03)
        optimizers = {
            "adamw": (jopt.adamw, torch.optim.AdamW),
            "sgd": (lambda lr: jopt.sgd(lr, momentum=0.9), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)),
            "nadam": ("nadam", torch.optim.NAdam),
        }
        ours = {name: make for name, (make, _) in optimizers.items()}
        result = jopt.sweep(loss, init, batches, lr=lrs, seeds=2, optimizers=ours)
        starts = [jax.tree.map(np.asarray, init(jax.random.key(seed))) for seed in (0, 1)]
    for run in result.runs:
        start = starts[run.seed]
        p = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
        optimizer = optimizers[run.optimizer][1](p.values(), lr=run.lr)
        curve = []
        for x, y in zip(*map(torch.from_numpy, batches), strict=True):
            optimizer.zero_grad()
            value = (((x @ p["a"]).tanh() @ p["b"] - y) ** 2).mean()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        assert cases.difference(run.curve, curve) < cases.NETWORK[dtype], run


def test_chunks_and_forms_of_batches_do_not_matter(monkeypatch):
    """As many runs at once as there are or two; a tree, a list, a generator, a function in blocks of five steps."""
    loss, init, (x, y) = problem()
    traces = 0

    def counted(params, batch):
        nonlocal traces
        traces += 1
        return loss(params, batch)

    def sweep(batches, **arguments):
        nonlocal traces
        traces = 0
        return np.stack(
            [r.curve for r in jopt.sweep(counted, init, batches, lr=[0.1, 0.01], seeds=3, **arguments).runs]
        )

    whole = sweep((x, y))
    once = traces
    for chunk in (1, 4):  # other shapes, which XLA may sum in another order
        assert cases.difference(sweep((x, y), chunk=chunk), whole) < cases.FRONT_ENDS["float32"]
        assert traces <= once  # one program, whatever the chunks
    np.testing.assert_array_equal(sweep(list(zip(x, y, strict=True))), whole)
    np.testing.assert_array_equal(sweep(((a, b) for a, b in zip(x, y, strict=True)), steps=7), whole[:, :7])
    monkeypatch.setattr(sweep_inputs, "BLOCK", 5 * (x[0].nbytes + y[0].nbytes))
    np.testing.assert_array_equal(sweep(lambda i: (x[i], y[i]), steps=STEPS), whole)
    assert traces <= once


def test_memory_is_the_chunks():
    """By default what fits, in chunks of one size; parameters and state are stepped where they lie."""
    loss, init, batches = problem()
    params = start(init, 0)
    program = LoopProgram(jopt.adamw, None, loss)
    plan = make_plan("adamw", list(np.geomspace(1e-4, 1, 25)), 4, None, 2.0, None, {})
    kilobytes = 4 * 4 * (6 * 8 + 8 * 4) / 1024  # parameters, gradients, two moments
    assert chunk_size(plan, None, program, params, memory=int(20.5 * kilobytes * 1024)) == 20
    assert chunk_size(plan, None, program, params, memory=1) == 1
    assert chunk_size(plan, 33, program, params, memory=1) == 25  # 4 of 25, not 3 of 33 and one of 1
    numbers = {"lr": np.zeros((20, 3), np.float32)}
    stacked = jax.tree.map(lambda x: np.stack([x] * 20), params)
    state = program._begin(stacked, numbers)
    compiled = program._advance.lower(stacked, state, numbers, batches, STEPS).compile()
    donated = sum(x.nbytes for x in jax.tree.leaves((stacked, state)))
    assert compiled.memory_analysis().alias_size_in_bytes == donated


def test_quadratic_diverges_where_it_must():
    """Gradient descent on L p^2 / 2 contracts by |1 - lr L|: fastest at 1 / L, not at all beyond 2 / L."""
    curvature = 4.0
    lrs = [0.01, 0.1, 0.25, 0.45, 0.55, 1.0]
    result = jopt.sweep(
        lambda p, batch: curvature * jnp.sum(p**2) / 2 + batch,
        lambda key: jnp.ones(3),
        np.zeros(40, np.float32),
        lr=lrs,
        optimizers="gradient_descent",
        seeds=1,
    )
    assert [r.lr for r in result.runs if r.diverged] == [0.55, 1.0]
    assert not np.isfinite(result.runs[-1].curve).all() or result.runs[-1].curve[-1] > 1e9
    best = result.best()
    assert (best.lr, best.at_edge) == (0.25, False)
    assert "Runs diverge from lr 0.55" in best.reason
    assert "one seed" in best.reason
    np.testing.assert_allclose(result.runs[0].curve, 6 * (1 - 0.04) ** (2 * np.arange(40)), rtol=1e-5)


def made_up(finals, divergence=2.0):
    """A result of flat curves after a first loss of 1: {lr: a final loss a seed}."""
    curves = np.array([[1.0] + [x] * 19 for by_seed in finals.values() for x in by_seed])
    seeds = range(len(next(iter(finals.values()))))
    return sweep_result.collect(["sgd"] * len(finals), [{"lr": lr} for lr in finals], seeds, curves, divergence)


def test_the_recommendation():
    noisy = {0.1: (0.30, 0.60), 0.2: (0.20, 0.50), 0.4: (0.21, 0.48), 0.8: (0.5, 0.8)}
    best = made_up(noisy).best()  # the differences by seed tell 0.2 from 0.1, the scatter of seeds does not
    assert (best.lr, best.loss, best.at_edge) == (0.4, pytest.approx(0.345), False)
    best = made_up(noisy | {0.4: (0.21, 0.50)}).best()
    assert best.lr == 0.4
    assert "From lr 0.2 to 0.4 losses are alike within noise" in best.reason
    assert "The lowest is 0.35 at lr 0.2" in best.reason
    best = made_up(noisy | {0.4: (0.21, 0.50), 0.8: (0.3, math.nan)}).best()  # 0.4 has a diverging neighbour
    assert best.lr == 0.2
    assert "left out since the next one up diverges" in best.reason
    best = made_up({0.1: (0.5, 0.5), 0.2: (0.4, 0.4)}).best()
    assert best.at_edge
    assert "sweep learning rates above 0.2 too" in best.reason
    with pytest.raises(ValueError, match=r"a run diverged at every learning rate, down to 0\.1; sweep smaller ones"):
        made_up({0.1: (3.0,), 0.2: (math.inf,)}).best()
    with pytest.raises(ValueError, match="optimizer: expected one of sgd, found 'adam'"):
        made_up(noisy).best("adam")


def test_what_diverged_means():
    runs = made_up({0.1: (1.9,), 0.2: (2.1,), 0.3: (math.nan,), 0.4: (math.inf,)}).runs
    assert [r.diverged for r in runs] == [False, True, True, True]
    assert [r.diverged for r in made_up({0.1: (1.9,), 0.2: (2.1,)}, 1.5).runs] == [True, True]
    assert not sweep_result.has_diverged(np.array([-1.0, -2.0]), 2.0)
    assert sweep_result.has_diverged(np.array([-1.0, 0.5]), 2.0)


def test_print_and_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="of the demo extra")
    result = made_up({0.1: (0.5, 0.7), 0.2: (0.4, 0.6), 0.4: (0.9, math.inf)})
    assert re.search(r"^sgd +0.2 +0.5 +0.4 +0.6 +<- best$", str(result), re.MULTILINE)
    assert re.search(r"^sgd +0.4 +inf +0.9 +inf +1/2$", str(result), re.MULTILINE)
    assert str(result).endswith(result.best().reason)
    lost = made_up({0.1: (3.0,)})
    assert "diverged at every learning rate" in str(lost)
    for i, r in enumerate((result, lost)):
        r.plot(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5_000
    result.plot(picture := io.BytesIO())
    assert picture.getvalue().startswith(b"\x89PNG")


def test_range_test_of_a_noisy_quadratic(tmp_path):
    """Its loss falls while lr < 2 / L, and the last learning rates are those that diverge."""
    pytest.importorskip("matplotlib", reason="of the demo extra")
    curvature, steps = 4.0, 300
    noise = np.random.default_rng(0).standard_normal((steps, 8)).astype(np.float32)
    loss = lambda p, batch: curvature * jnp.mean((p - batch) ** 2) / 2  # noqa: E731
    found = jopt.lr_range_test(loss, lambda key: jnp.full(8, 10.0), noise, low=1e-4, high=1e4)
    limit = 2 / (curvature / 8)  # of the mean over 8
    assert found.base_lr < found.suggestion == found.max_lr / 10 < found.max_lr < limit
    np.testing.assert_allclose(found.lrs, np.geomspace(1e-4, 1e4, steps)[: len(found.lrs)])
    assert len(found.lrs) < steps
    assert f"lr {found.suggestion:.2g}: a tenth of {found.max_lr:.2g}" in str(found)
    assert "four times its lowest" in found.reason
    found.plot(tmp_path / "a.png")

    # The first loss is at the start itself; the first step is of `low`, exactly.
    np.testing.assert_allclose(found.losses[0], curvature * np.mean((10 - noise[0]) ** 2) / 2, rtol=1e-6)
    still = jopt.lr_range_test(loss, lambda key: jnp.full(8, 10.0), noise, low=1e-6, high=1e-2)
    assert "Test beyond 0.01" in still.reason
    flat = jopt.lr_range_test(lambda p, b: 0 * jnp.sum(p) + 1, lambda key: jnp.ones(2), noise)
    assert flat.suggestion is None
    assert "never fell" in str(flat)


DEVICES = """
import numpy as np, jax, jax.numpy as jnp, jopt
assert len(jax.devices()) == 4
x = np.random.default_rng(0).standard_normal((5, 8, 3)).astype(np.float32)
result = jopt.sweep(
    lambda p, x: jnp.mean((x @ p - 1) ** 2), lambda key: jax.random.normal(key, (3,)), x, lr=[0.1, 0.2, 0.3], chunk=5
)
for run in result.runs:
    p, tx = jax.random.normal(jax.random.key(run.seed), (3,)), jopt.adamw(lr=run.lr)
    state = tx.init(p)
    for i in range(5):
        value, grad = jax.value_and_grad(lambda p: jnp.mean((x[i] @ p - 1) ** 2))(p)
        np.testing.assert_allclose(run.curve[i], value, rtol=1e-5)
        p, state = tx.step(grad, state, p)
assert len(result.runs) == 9
from jopt.sweeps.sweep import LoopProgram
from jopt._compat import enable_x64
shards = jax.device_put(np.zeros((8, 2)), LoopProgram(jopt.adamw, None, None)._sharding(8)).addressable_shards
assert [s.data.shape for s in shards] == [(2, 2)] * 4
"""


def test_sharded_over_four_devices():
    """In a process of its own: the devices are made as JAX starts."""
    child.run(4, "-c", DEVICES, timeout=120)


def test_chains_groups_optax_and_complex_parameters():
    import optax

    target = 1 + 2j  # against the conjugate of the gradient nothing converges to it
    makes = {
        "chain": lambda lr: jopt.chain(jopt.clip_grad_value(1.0), jopt.adam(lr=lr)),
        "groups": lambda lr: jopt.param_groups(jopt.adam, {"a": {"weight_decay": 0.0}}, lr=lr),
        "optax": lambda lr: optax.sgd(lr),
    }
    for dtype, chosen in ((jnp.float32, makes), (jnp.complex64, {"groups": makes["groups"]})):

        def init(key, dtype=dtype):
            return {"a": jnp.zeros(2, dtype)}

        def loss(p, batch):
            goal = target if jnp.iscomplexobj(p["a"]) else target.real
            return jnp.sum(jnp.abs(p["a"] - goal) ** 2) + batch

        result = jopt.sweep(loss, init, np.zeros(80, np.float32), lr=[0.1], optimizers=chosen, seeds=1)
        for run in result.runs:
            assert run.curve[0] == pytest.approx(10 if dtype == jnp.complex64 else 2)
            assert run.final < 0.1, run


BAD = [
    (dict(lr=[]), ValueError, "lr: expected at least one value, found none"),
    (dict(lr=[-0.1]), ValueError, "Invalid learning rate: -0.1"),
    (dict(lr=[0.1, 0.1]), ValueError, "lr: expected different values"),
    (dict(lr=[math.nan]), ValueError, "lr: expected finite numbers, found nan"),
    (dict(lr=0.1), TypeError, "lr: expected a sequence of numbers, found 0.1"),
    (dict(lr=["a"]), TypeError, "lr: expected numbers, or tuples of them, found 'a'"),
    (dict(betas=[(0.9, 1.0)]), ValueError, "Invalid beta parameter at index 1: 1.0"),
    (dict(nesterov=[True]), TypeError, "nesterov: expected numbers, .*functools.partial"),
    (dict(momentum=[0.9]), TypeError, "unexpected keyword argument 'momentum'"),
    (dict(optimizers=[]), ValueError, "optimizers: expected at least one, found none"),
    (dict(optimizers="adamv"), ValueError, "optimizers: expected one of .*adamw.* found 'adamv'"),
    (dict(optimizers=["sgd", jopt.sgd]), ValueError, "optimizers: 'sgd' is there twice"),
    (dict(optimizers=jopt.sgd(lr=0.1)), TypeError, "optimizers: expected names or functions of lr"),
    (dict(optimizers=[jopt.lbfgs]), TypeError, "optimizers: lbfgs evaluates the loss as often as it likes"),
    (dict(optimizers="lbfgs"), TypeError, "optimizers: lbfgs evaluates"),
    (dict(optimizers=jopt.sparse_adam), TypeError, "optimizers: sparse_adam takes sparse gradients"),
    (dict(optimizers=lambda lr: lr), TypeError, "expected <lambda> to return a gradient transformation, found float"),
    (dict(seeds=0), ValueError, "seeds: expected at least one, found 0"),
    (dict(seeds=[1, 1]), ValueError, "seeds: expected one or more different integers"),
    (dict(seeds=[0.5]), TypeError, "seeds: expected integers, found 0.5"),
    (dict(chunk=0), ValueError, "chunk: expected a number of runs, at least 1, found 0"),
    (dict(divergence=1.0), ValueError, "divergence: expected a multiple above 1"),
    (dict(schedule=0.1), TypeError, "schedule: expected a function, found float"),
    (dict(steps=0), ValueError, "steps: expected at least 1, found 0"),
    (dict(steps=13), ValueError, "batches: expected 13, one a step, found 12"),
    (dict(batches=lambda i: i), ValueError, "steps: expected how many, since batches is a function"),
    (dict(batches=[]), ValueError, "batches: expected at least one, found none"),
    (dict(batches=(np.ones((3, 2)), np.ones((4, 2)))), ValueError, r"found 3 of batches\[0\], 4 of batches\[1\]"),
    (dict(batches={"x": np.ones(())}), ValueError, r"batches: expected arrays stacked .* found 0 of batches\['x'\]"),
    (dict(batches=[np.ones(2), np.ones(3)]), ValueError, r"batches: expected one shape and type, found .*at step 1"),
    (dict(batches={"x": np.array([1.0, np.nan])}), ValueError, r"batches\['x'\]: .*nan or infinity at step 1"),
    (dict(batches=[np.ones(2), np.array([1.0, np.inf])]), ValueError, "batches at step 1: expected finite numbers"),
    (dict(init=lambda key: {"w": "no"}), TypeError, "init's w: expected a floating point or complex array, found str"),
    (dict(init=lambda key: jnp.ones(2, int)), TypeError, "init's result: expected a floating point or complex type"),
    (dict(init=lambda key: None), ValueError, "init: expected a tree of arrays, found None"),
    (dict(init=lambda key: jnp.full(2, jnp.nan)), ValueError, "init's result: expected finite numbers"),
    (dict(init=3), TypeError, "init: expected a function, found int"),
    (dict(loss=lambda p, b: p), ValueError, r"loss: expected a real 0-d array, found float32 of shape \(2,\)"),
    (dict(loss=lambda p, b: (jnp.sum(p), 0)), TypeError, "loss: expected one 0-d array, .* no auxiliary values"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=[f"{next(iter(change))}-{i}" for i, (change, _, _) in enumerate(BAD)]
)
def test_bad_input(change, error, message):
    arguments = (
        dict(
            loss=lambda p, batch: jnp.sum(p**2),
            init=lambda key: jnp.ones(2),
            batches=np.ones((STEPS, 2), np.float32),
            lr=[0.1],
        )
        | change
    )
    with pytest.raises(error, match=message):
        jopt.sweep(**arguments)


def test_bad_input_of_the_range_test():
    loss, init, batches = problem()
    for change, message in (
        (dict(low=0.0), "low: expected a positive number, found 0.0"),
        (dict(low=1.0, high=0.5), "high: expected more than low"),
        (dict(smoothing=1.0), "smoothing: expected a number from 0 to below 1"),
        (dict(steps=9), "at least 10 steps, better 100, found 9"),
    ):
        with pytest.raises(ValueError, match=message):
            jopt.lr_range_test(loss, init, batches, **change)


def test_parameters_of_other_shapes_by_seed():
    with pytest.raises(ValueError, match=r"init\['w'\]: expected one shape and type, found .* of seed 0, .* of seed 1"):
        jopt.sweep(
            lambda p, batch: jnp.sum(p["w"]),
            lambda key: {"w": jnp.ones(2 + int(jax.random.key_data(key)[1]))},
            np.ones((3, 2)),
            lr=[0.1],
        )
