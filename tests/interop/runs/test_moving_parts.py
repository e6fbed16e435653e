"""What else a run has than parameters and an optimizer: schedulers, averages, a loss scale, modules' layouts."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="moving is from torch")
from torch.optim import lr_scheduler, swa_utils  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

import interop  # noqa: E402
from interop import optim  # noqa: E402
from interop._compat import TORCH  # noqa: E402
from tests import cases  # noqa: E402
from tests.jopt.test_schedules import LR  # noqa: E402
from tests.torchs.test_torch_schedulers import SCHEDULERS, Run  # noqa: E402

LEG = 15
ONE_OF_EACH = {name.split("-")[0]: name for name in SCHEDULERS}.values()  # the last, of the most arguments
FUNCTIONS = {name: make for name, make in SCHEDULERS.items() if name != "plateau"}


def steps_in_jax(run, tx, params, state, steps):
    """What `Run.train` does, in JAX."""

    def loss(params, x):
        return 0.05 * ((x @ params["weight"].T + params["bias"][None] - 1) ** 2).mean()

    step = jax.jit(lambda params, state, x: tx.step(jax.grad(loss)(params, x), state, params))
    for i in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        params, state = step(params, state, jnp.asarray(x.numpy()))
    return params, state


def numbers(optimizer):
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", cases.mostly_slow(FUNCTIONS, ONE_OF_EACH))
def test_schedulers_there_and_back(name, x64):
    """Two groups with lr and momentum as the scheduler moves them: torch, JAX, torch is torch."""
    stays = Run(torch.optim, FUNCTIONS[name]).train(range(3 * LEG))
    run = Run(torch.optim, FUNCTIONS[name]).train(range(LEG))
    if name == "sequential-from-0" and TORCH < (2, 13):  # it began with its first scheduler, whatever the milestones
        with pytest.raises(ValueError, match="scheduler: at its step 15 lr of group 0 is"):
            interop.optimizer_to_jax(run.opt, run.model, scheduler=run.scheduler)
        return
    tx, params, state = interop.optimizer_to_jax(run.opt, run.model, scheduler=run.scheduler)
    params, state = steps_in_jax(run, tx, params, state, range(LEG, 2 * LEG))
    interop.optimizer_to_torch(tx, params, state, run.model, run.opt, scheduler=run.scheduler)
    run.train(range(2 * LEG, 3 * LEG))
    assert run.seen[LEG:] == stays.seen[2 * LEG :]
    assert numbers(run.opt) == numbers(stays.opt)  # torch's own, to the last bit
    for p, q in zip(run.model.parameters(), stays.model.parameters(), strict=True):
        assert cases.difference(p.detach().numpy(), q.detach().numpy()) <= cases.SCHEDULES["recursive"]


def test_a_scheduler_that_steps_once_an_epoch(x64):
    run, stays = (Run(torch.optim, lambda t, o: t.ExponentialLR(o, 0.5), cls="Adam", eps=1e-8) for _ in range(2))

    def train(run, epochs):
        for epoch in epochs:
            for i in range(4):
                step(run, 4 * epoch + i)
            run.scheduler.step()

    def step(run, i):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        run.opt.zero_grad()
        (0.05 * (run.model(x) - 1).pow(2).mean()).backward()
        run.opt.step()

    train(stays, range(6))
    train(run, range(2))
    for i in (8, 9):  # away in the middle of an epoch
        step(run, i)
    tx, params, state = interop.optimizer_to_jax(run.opt, run.model, scheduler=run.scheduler, every=4)
    assert [int(s.count) for s in state.groups] == [10, 10]
    params, state = steps_in_jax(run, tx, params, state, range(10, 20))
    interop.optimizer_to_torch(tx, params, state, run.model, run.opt, scheduler=run.scheduler, every=4)
    assert run.scheduler.last_epoch == 5
    train(run, [5])
    assert numbers(run.opt) == numbers(stays.opt)  # torch's own, to the last bit
    for p, q in zip(run.model.parameters(), stays.model.parameters(), strict=True):
        assert cases.difference(p.detach().numpy(), q.detach().numpy()) <= cases.TOLERANCES["float64"]


def test_schedulers_that_cannot_move():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer)
    for move in (interop.scheduler_to_jax, lambda s: interop.optimizer_to_jax(optimizer, model, scheduler=s)):
        with pytest.raises(TypeError, match="plateau_to_jax"):
            move(plateau)

    class Own(lr_scheduler.StepLR):
        pass

    with pytest.raises(TypeError, match=r"Own, which is no function of the step that is known; give lr="):
        interop.scheduler_to_jax(Own(optimizer, 3))
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match="every: expected at least 1, found 0"):
        interop.scheduler_to_jax(scheduler, every=0)
    with pytest.raises(ValueError, match="is of another optimizer"):
        interop.optimizer_to_jax(torch.optim.SGD(model.parameters()), model, scheduler=scheduler)
    optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"at its step 0 lr of group 0 is 0\.3, but the optimizer has 7, which"):
        interop.scheduler_to_jax(scheduler)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_refused_scheduler_leaves_all_as_it_was():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    tx, params, state = interop.optimizer_to_jax(optimizer, model, scheduler=scheduler)
    for _ in range(12):
        params, state = tx.step({k: jnp.ones_like(x) for k, x in params.items()}, state, params)
    before = copy.deepcopy([scheduler.state_dict(), numbers(optimizer), model.state_dict()])
    with pytest.raises(ValueError, match=r"Tried to step \d+ times"):
        interop.optimizer_to_torch(tx, params, state, model, optimizer, scheduler=scheduler)
    for _ in range(3):
        scheduler.step()
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    ahead = copy.deepcopy([scheduler.state_dict(), numbers(optimizer), model.state_dict()])
    with pytest.raises(ValueError, match="has taken 3 steps, more than the 0 of the state"):
        interop.optimizer_to_torch(tx, params, state, model, optimizer, scheduler=scheduler)
    for now, then in ((before, ahead), (ahead, [scheduler.state_dict(), numbers(optimizer), model.state_dict()])):
        assert then[0]["last_epoch"] == now[0]["last_epoch"] + (3 if then is ahead and now is before else 0)
    assert ahead[1] == numbers(optimizer)
    assert all(torch.equal(x, model.state_dict()[k]) for k, x in before[2].items())
    assert not optimizer.state


def test_plateau_there_and_back(x64):
    metrics = [3.0, 2.0, 2.1, 2.2, 2.3, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    runs = []
    for moves in (True, False):
        model = torch.nn.Linear(2, 1, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1, cooldown=1, min_lr=0.01)
        for i, metric in enumerate(metrics):
            if moves and i == 4:
                tx, params, state = interop.optimizer_to_jax(optimizer, model, hyperparams_in_state=True)
                plateau, counters = interop.plateau_to_jax(scheduler)
            if moves and 4 <= i < 8:
                counters, state = plateau.step(metric, counters, state)
                if i == 7:
                    interop.optimizer_to_torch(tx, params, state, model, optimizer)
                    interop.plateau_to_torch(counters, scheduler)
            else:
                scheduler.step(metric)
        names = ("best", "num_bad_epochs", "cooldown_counter")
        runs.append([optimizer.param_groups[0]["lr"], *(getattr(scheduler, name) for name in names)])
    assert runs[0] == pytest.approx(runs[1], rel=cases.TOLERANCES["float64"])
    with pytest.raises(TypeError, match="expected a ReduceLROnPlateau, found StepLR"):
        interop.plateau_to_jax(lr_scheduler.StepLR(optimizer, 1))


def test_a_learning_rate_kept_in_float32_comes_back_as_it_was():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tx, params, state = interop.optimizer_to_jax(optimizer, model, hyperparams_in_state=True)
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == LR


# --- averages and the loss scale ---------------------------------------------------------------------

AVERAGES = {
    "mean": {},
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "ema-each": {"avg_fn": swa_utils.get_ema_avg_fn(0.8)},
    "swa": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "swa-each": {"avg_fn": swa_utils.get_swa_avg_fn()},
    "buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_there_and_back(name, updates, x64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    moves, stays = (AveragedModel(model, **AVERAGES[name]) for _ in range(2))
    values = lambda: {k: jnp.asarray(x.detach().numpy()) for k, x in model.state_dict().items()}  # noqa: E731

    def drift():
        with torch.no_grad():
            for x in model.state_dict().values():
                x.add_(torch.ones_like(x))

    for _ in range(updates):
        drift()
        moves.update_parameters(model)
        stays.update_parameters(model)
    average, state = interop.average_to_jax(moves)
    for _ in range(4):
        drift()
        stays.update_parameters(model)
        state = average.update({k: x for k, x in values().items() if k in state.params}, state)
    interop.average_to_torch(state, moves)
    for _ in range(2):
        drift()
        moves.update_parameters(model)
        stays.update_parameters(model)
    assert int(moves.n_averaged) == updates + 6
    tolerance = cases.MEAN_WEIGHT if name.startswith("swa") else cases.TOLERANCES["float64"]
    for (key, x), y in zip(moves.state_dict().items(), stays.state_dict().values(), strict=True):
        assert x.dtype == y.dtype
        assert cases.difference(x.numpy(), y.numpy()) <= tolerance, key


@pytest.mark.parametrize("cls", ["Adam", "SGD"])
def test_the_average_of_a_drop_in_goes_along(cls, x64):
    runs = []
    for moves in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        optimizer = getattr(optim, cls)(model.parameters(), lr=0.1, ema=0.9)
        for i in range(9):
            if moves and i == 3:
                with pytest.warns(UserWarning, match="ema=0.9"):
                    tx, params, state = interop.optimizer_to_jax(optimizer, model)
                average, averaged = interop.average_to_jax(optimizer, model)
            if moves and 3 <= i < 6:
                params, state = tx.step({k: x.copy() for k, x in params.items()}, state, params)
                averaged = average.update(params, averaged)
                if i == 5:
                    interop.optimizer_to_torch(tx, params, state, model, optimizer)
                    interop.average_to_torch(averaged, optimizer, model)
                continue
            for p in model.parameters():
                p.grad = p.detach().clone()
            optimizer.step()
        runs.append([optimizer.state[p]["ema"].numpy() for p in model.parameters()])
    for x, y in zip(*runs, strict=True):
        assert cases.difference(x, y) <= cases.TOLERANCES["float64"]


def test_averages_that_cannot_move():
    model = torch.nn.Linear(3, 2)
    own = AveragedModel(model, avg_fn=lambda average, p, n: average)
    with pytest.raises(TypeError, match="is none of torch's; take the weights by to_jax"):
        interop.average_to_jax(own)
    with pytest.raises(ValueError, match="it has no ema="):
        interop.average_to_jax(optim.Adam(model.parameters()), model)
    with pytest.raises(ValueError, match="model: expected the model that the optimizer steps"):
        interop.average_to_jax(optim.Adam(model.parameters(), ema=0.9))
    with pytest.raises(TypeError, match="expected torch's AveragedModel"):
        interop.average_to_jax(torch.optim.Adam(model.parameters()), model)
    averaged = AveragedModel(model)
    _, state = interop.average_to_jax(averaged)
    before = copy.deepcopy(averaged.state_dict())
    with pytest.raises(
        ValueError, match=r"state.params: expected the names of to_jax; missing \['bias'\], unknown \[\]"
    ):
        interop.average_to_torch(state._replace(params={"weight": jnp.ones((2, 3))}), averaged)
    assert all(torch.equal(x, before[k]) for k, x in averaged.state_dict().items())


def test_a_loss_scale_there_and_back():
    runs = []
    for moves in (True, False):
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=3)
        for i in range(12):
            bad = i in (1, 5, 6)
            if moves and i == 3:
                scale, state = interop.scaler_to_jax(scaler)
            if moves and 3 <= i < 8:
                state = scale.update(jnp.asarray(bad), state)
                if i == 7:
                    interop.scaler_to_torch(state, scaler)
                continue
            loss = scaler.scale(model(torch.ones(1, 2)).sum() * (float("inf") if bad else 1.0))
            optimizer.zero_grad()
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(scaler.state_dict())
    assert runs[0] == runs[1]
    with pytest.raises(ValueError, match="is disabled"):
        interop.scaler_to_jax(torch.amp.GradScaler("cpu", enabled=False))


# --- modules -----------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, (3, 2), groups=2),
        torch.nn.BatchNorm2d(4),
        torch.nn.ConvTranspose2d(4, 3, 2),
        torch.nn.Flatten(),
        torch.nn.Linear(3 * 4 * 5, 6),
        torch.nn.LayerNorm(6),
        torch.nn.Embedding(5, 6),
    )


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_modules_there_and_back(layout):
    model = network()
    model[1].num_batches_tracked.fill_(5)
    before = copy.deepcopy(model.state_dict())
    arrays = interop.to_jax(model, layout=layout)
    assert arrays["buffers"]["1.num_batches_tracked"].dtype == jnp.int32  # x64 is off
    if layout == "flax":
        shapes = {k: x.shape for k, x in arrays["params"].items()}
        assert shapes["0.kernel"] == (3, 2, 1, 4)
        assert shapes["2.kernel"] == (2, 2, 3, 4)
        assert shapes["4.kernel"] == (60, 6)
        assert {"1.scale", "1.bias", "5.scale", "6.embedding"} <= set(shapes)
        assert {"1.mean", "1.var"} <= set(arrays["buffers"])
    with torch.no_grad():
        for x in model.state_dict().values():
            x.fill_(3)
    assert interop.to_torch(arrays, into=model, layout=layout) is model
    for key, x in model.state_dict().items():
        assert x.dtype == before[key].dtype
        assert torch.equal(x, before[key]), key
    parameters = {"params": arrays["params"]}
    assert interop.to_torch(parameters, into=model, layout=layout) is model


def test_a_kernel_is_what_jax_convolves_with():
    """flax's axes, in JAX's own words: a dot and two convolutions compute what the torch modules do."""
    model = network().eval()
    params = interop.to_jax(model, layout="flax")["params"]
    x = torch.randn(3, 2, 5, 5)
    conv = jax.lax.conv_general_dilated(
        x.permute(0, 2, 3, 1).numpy(),
        params["0.kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    expected = torch.nn.functional.conv2d(x, model[0].weight, groups=2).permute(0, 2, 3, 1)
    assert cases.difference(np.asarray(conv), expected.detach().numpy()) <= cases.NETWORK["float32"]
    y = torch.randn(3, 4, 3, 4)
    back = jax.lax.conv_transpose(
        y.permute(0, 2, 3, 1).numpy(),
        params["2.kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=True,
    )
    expected = torch.nn.functional.conv_transpose2d(y, model[2].weight).permute(0, 2, 3, 1)
    assert cases.difference(np.asarray(back), expected.detach().numpy()) <= cases.NETWORK["float32"]
    z = torch.randn(3, 60)
    expected = torch.nn.functional.linear(z, model[4].weight)
    assert (
        cases.difference(np.asarray(z.numpy() @ params["4.kernel"]), expected.detach().numpy())
        <= cases.NETWORK["float32"]
    )


@pytest.mark.parametrize("cls", ["AdamW", "LBFGS"])
def test_moments_turn_with_their_kernels(cls, x64):
    """Steps with flax's axes are those with torch's, state and all."""
    runs = []
    for layout in ("flax", "torch"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, (3, 2)), torch.nn.Linear(3, 5)).double()
        optimizer = getattr(torch.optim, cls)(model.parameters(), lr=0.1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum((p**2).sum() / 2 + torch.cos(p).sum() for p in model.parameters())
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        tx, params, state = interop.optimizer_to_jax(optimizer, model, layout=layout)
        value_and_grad = jax.value_and_grad(lambda t: sum((p**2).sum() / 2 + jnp.cos(p).sum() for p in t.values()))
        for _ in range(2):
            if cls == "LBFGS":
                params, state, _ = tx.step(value_and_grad, state, params)
            else:
                params, state = tx.step(value_and_grad(params)[1], state, params)
        if layout == "flax":
            assert params["0.kernel"].shape == (3, 2, 2, 4)
            assert params["1.kernel"].shape == (3, 5)
        interop.optimizer_to_torch(tx, params, state, model, optimizer, layout=layout)
        for _ in range(2):
            optimizer.step(closure)
        found = [x for p in model.parameters() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        runs.append([x.detach().numpy() for x in [*model.parameters(), *found]])
    # L-BFGS sums over the flat vector, whose order differs.
    tolerance = (cases.NETWORK if cls == "LBFGS" else cases.TOLERANCES)["float64"]
    for x, y in zip(*runs, strict=True):
        assert cases.difference(x, y) <= tolerance


def test_modules_that_cannot_move():
    model = network()
    arrays = interop.to_jax(model)
    before = copy.deepcopy(model.state_dict())
    wrong = arrays["params"] | {"4.bias": jnp.ones(7)}
    half = arrays["params"] | {"4.bias": jnp.ones(6, jnp.bfloat16)}
    less = {k: x for k, x in arrays["params"].items() if k != "4.bias"}
    for given, error in (
        ({"params": wrong}, r"x\['params'\]\['4.bias'\]: expected shape \(6,\), found \(7,\)"),
        ({"params": half}, r"x\['params'\]\['4.bias'\]: expected torch.float32, found torch.bfloat16"),
        ({"params": less}, r"missing \['4.bias'\], unknown \[\]"),
        (arrays["params"], "expected a dictionary of 'params' and 'buffers'"),
        (arrays["params"]["4.bias"], "expected a dictionary of 'params' and 'buffers'"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            interop.to_torch(given, into=model)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    with pytest.raises(ValueError, match="expected 'torch' or 'flax', found 'keras'"):
        interop.to_jax(model, layout="keras")
    with pytest.raises(ValueError, match="weight: has no shape yet"):
        interop.to_jax(torch.nn.LazyLinear(3))
    model[1].num_batches_tracked.fill_(2**40)
    with pytest.raises(TypeError, match=r"num_batches_tracked.*narrowed"):
        interop.to_jax(model)
    linear = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Muon looks at the axes of a matrix, and would step 'kernel' otherwise"):
        interop.optimizer_to_jax(torch.optim.Muon([linear.weight]), linear, layout="flax")


def test_tied_and_frozen_parameters():
    """Tied ones are one; a frozen one has no state and stays."""
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    model[1](model[0](torch.tensor([1]))).sum().backward()
    optimizer.step()
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    assert sorted(params) == ["0.weight", "1.bias", "2.bias", "2.weight"]
    assert state.scalars["step"].tolist() == [1, 1, 0, 0]
    before = [p.detach().clone() for p in model[2].parameters()]
    grads = {k: None if k.startswith("2.") else jnp.ones_like(x) for k, x in params.items()}
    params, state = tx.step(grads, state, params)
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    assert all(map(torch.equal, before, model[2].parameters()))
    assert model[2].weight not in optimizer.state
    assert optimizer.state[model[0].weight]["step"].item() == 2


# --- optax's own -------------------------------------------------------------------------------------

SAME = {
    "adam": ("Adam", dict(lr=0.05), lambda: optax.adam(0.05)),
    "adam-decay": ("Adam", dict(lr=0.05, weight_decay=0.1, maximize=True), None),
    "adamw": ("AdamW", dict(lr=0.05, weight_decay=0.1), lambda: optax.adamw(0.05, weight_decay=0.1)),
    "adam-decoupled": ("Adam", dict(lr=0.05, weight_decay=0.1, decoupled_weight_decay=True), None),
    "adamax": ("Adamax", dict(lr=0.05), lambda: optax.adamax(0.05)),
    "adadelta": ("Adadelta", dict(lr=0.5), None),
    "sgd": ("SGD", dict(lr=0.05), lambda: optax.sgd(0.05)),
    "momentum": ("SGD", dict(lr=0.05, momentum=0.9), lambda: optax.sgd(0.05, 0.9)),
    "nesterov": (
        "SGD",
        dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        None,
    ),
    "rmsprop": ("RMSprop", dict(lr=0.05), None),
    "rmsprop-centered": ("RMSprop", dict(lr=0.05, centered=True, momentum=0.9, weight_decay=0.1), None),
}


@pytest.mark.parametrize("name", SAME)
def test_optax_there_and_back(name, x64, relaxed):
    """50 steps of torch, 50 of optax, 50 of torch are torch's 150."""
    cls, arguments, function = SAME[name]
    noise = np.random.default_rng(0).standard_normal(150).tolist()  # that nothing comes to rest
    runs = []
    for moves in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).double()
        optimizer = getattr(torch.optim, cls)(model.parameters(), **arguments)

        def leg(steps, model=model, optimizer=optimizer):
            for i in steps:
                for p in model.parameters():
                    p.grad = 0.7 * p.detach() + noise[i]
                optimizer.step()

        leg(range(50))
        if moves:
            tx, params, state = interop.optimizer_to_optax(optimizer, model)
            if function is not None:
                tx = function()
            assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
            update = jax.jit(tx.update)
            for i in range(50, 100):
                grads = {k: 0.7 * x + noise[i] for k, x in params.items()}
                updates, state = update(grads, state, params)
                params = optax.apply_updates(params, updates)
            interop.optimizer_from_optax(params, state, model, optimizer, step=100)
        else:
            leg(range(50, 100))
        leg(range(100, 150))
        runs.append((model, optimizer))
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        ours, theirs = runs[0][1].state[p], runs[1][1].state[q]
        assert ours.keys() == theirs.keys()
        for x, y in [(p.detach(), q.detach()), *((ours[k], theirs[k]) for k in theirs)]:
            assert x.dtype == y.dtype
            assert cases.difference(x.numpy(), y.numpy()) <= cases.TOLERANCES["float64"]


def test_optax_computes_otherwise():
    model = torch.nn.Linear(3, 2)
    for cls, arguments, why in (
        ("NAdam", {}, "no mu_product"),
        ("RAdam", {}, "corrects eps"),
        ("Adagrad", {}, "eps into the square root"),
        ("Adam", {"amsgrad": True}, "amsgrad=True is not the same in optax: optax takes the largest of the corrected"),
        ("SGD", {"momentum": 0.9, "dampening": 0.5}, "undamped"),
    ):
        optimizer = getattr(torch.optim, cls)(model.parameters(), **arguments)
        for move in (
            lambda o: interop.optimizer_to_optax(o, model),
            lambda o: interop.optimizer_from_optax({}, (), model, o),
        ):
            with pytest.raises(ValueError, match=why):
                move(optimizer)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.ones(2, 3)
    optimizer.step()
    with pytest.raises(ValueError, match=r"have taken \[0, 1\] steps, but optax counts once for all"):
        interop.optimizer_to_optax(optimizer, model)
    params = interop.to_jax(dict(model.named_parameters()))
    with pytest.raises(TypeError, match="expected ScaleByAdamState for Adam; nothing in it is exp_avg, exp_avg_sq"):
        interop.optimizer_from_optax(params, optax.sgd(0.1).init(params), model, optimizer)
    rmsprop = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    with pytest.raises(ValueError, match="multiplies by the learning rate before its momentum"):
        interop.optimizer_from_optax(params, optax.rmsprop(0.1, momentum=0.9).init(params), model, rmsprop)
    groups = torch.optim.Adam([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}])
    with pytest.raises(ValueError, match="2 groups of different options"):
        interop.optimizer_to_optax(groups, model)
