"""The classes of interop.optim that torch has not: the authors' numbers, and what every torch optimizer does."""

import copy
import inspect
import json
import pickle
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import interop  # noqa: E402
import jopt  # noqa: E402
from interop import optim  # noqa: E402
from interop.runs import classes  # noqa: E402
from tests import ROOT, authors, cases  # noqa: E402

ARGUMENTS = {
    "LARS": dict(momentum=0.9, weight_decay=0.1, trust_coeff=0.02),
    "Mars": dict(amsgrad=True),
    "Prodigy": dict(d0=0.1, weight_decay=0.1, use_bias_correction=True),
}
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make(name, params, **extra):
    optimizer = getattr(optim, name)(params, **dict(lr=0.01) | ARGUMENTS.get(name, {}) | extra)
    return in_training(optimizer)


def in_training(optimizer):
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def network(name="", dtype=torch.float64):
    """For an optimizer: NorMuon steps matrices alone."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*sizes, bias=name != "NorMuon", dtype=dtype) for sizes in ((8, 6), (6, 3))]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])


def train(model, optimizer, steps, dtype=torch.float64):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X.to(dtype)).square().mean().backward()
        optimizer.step()


def largest(a, b):
    return max(cases.difference(x.detach(), y.detach()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_each_is_here():
    assert set(authors.CLASSES.values()) == set(optim.OTHERS)
    assert set(optim.OTHERS) | set(optim.CLASSES) == set(classes.CLASSES) | {"LBFGS"}


@pytest.mark.parametrize("name", authors.REFERENCES)
def test_the_authors_numbers(name):
    reference = authors.REFERENCES[name]
    for arguments, run in zip(
        reference.runs, json.loads((ROOT / "tests" / "data" / f"{name}.json").read_text())["runs"], strict=True
    ):
        params = [torch.nn.Parameter(torch.tensor(x)) for x in authors.start(np, reference.shapes, reference.warp)]
        given = {key: x for key, x in arguments.items() if key not in reference.renamed}
        optimizer = in_training(getattr(optim, authors.CLASSES[name])(params, **given))
        for step in range(authors.STEPS):
            authors.torch_step(params, optimizer, step, reference.warp)
        for p, expected, state in zip(params, run["params"], run["state"], strict=True):
            assert cases.difference(p.detach(), np.array(expected)) <= cases.AUTHORS["float64"], arguments
            for key, x in state.items():
                signed = np.abs if key.rstrip("_0123456789") in reference.up_to_sign else np.array
                ours = optimizer.state[p][key].numpy()
                assert cases.difference(signed(ours), signed(x).reshape(ours.shape)) <= cases.AUTHORS["float64"], key
        if "evaluated" in run:
            optimizer.eval()
            for p, expected in zip(params, run["evaluated"], strict=True):
                assert cases.difference(p.detach(), np.array(expected)) <= cases.AUTHORS["float64"], arguments


@pytest.mark.parametrize("name", authors.REFERENCES)
def test_a_state_dict_of_the_authors_class_goes_on(name):
    """What their code had saved after half of the steps."""
    reference = authors.REFERENCES[name]
    for arguments, run in zip(
        reference.runs, json.loads((ROOT / "tests" / "data" / f"{name}.json").read_text())["runs"], strict=True
    ):
        params = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in run["halfway"]["params"]]
        given = {key: x for key, x in arguments.items() if key not in reference.renamed}
        optimizer = getattr(optim, authors.CLASSES[name])(params, **given)
        optimizer.load_state_dict(authors.as_tensors(run["halfway"]["state_dict"]))
        for step in range(authors.STEPS // 2, authors.STEPS):
            authors.torch_step(params, optimizer, step, reference.warp)
        for p, expected in zip(params, run["params"], strict=True):
            assert cases.difference(p.detach(), np.array(expected)) <= cases.AUTHORS["float64"], arguments


@pytest.mark.parametrize("name", optim.OTHERS)
def test_a_run_goes_to_jax_and_back(name, x64):
    """Five steps in torch, five in JAX, five in torch: fifteen in torch."""
    model = network(name)
    optimizer = make(name, model.parameters())
    train(model, optimizer, 5)
    tx, params, state = interop.optimizer_to_jax(optimizer, model)

    def loss(params):
        with jax.numpy_rank_promotion("allow"):
            hidden = jnp.tanh(X.numpy() @ params["0.weight"].T + params.get("0.bias", 0.0))
            return jnp.mean((hidden @ params["2.weight"].T + params.get("2.bias", 0.0)) ** 2)

    for _ in range(5):
        params, state = tx.step(jax.grad(loss)(params), state, params)
    back = network(name)
    resumed = make(name, back.parameters())
    interop.optimizer_to_torch(tx, params, state, back, resumed)
    train(back, resumed, 5)
    train(model, optimizer, 10)
    assert largest(back, model) <= cases.NETWORK["float64"]


@pytest.mark.parametrize("name", optim.OTHERS)
@pytest.mark.parametrize("file", ["run.pt", "run.safetensors"])
def test_a_run_goes_through_files_and_copies(name, file, tmp_path, x64):
    model = network(name)
    optimizer = make(name, model.parameters())
    train(model, optimizer, 3)
    saved = interop.Checkpoint.from_torch(model, optimizer)
    interop.save_checkpoint(saved, tmp_path / file)
    loaded = interop.load_checkpoint(tmp_path / file)
    assert loaded.optimizer.name == name
    others = []
    for way in ("file", "state_dict", "deepcopy", "pickle"):
        other = network(name)
        if way == "file":
            opt = make(name, other.parameters())
            loaded.to_torch(other, opt)
        elif way == "state_dict":
            opt = make(name, other.parameters(), lr=0.5)
            other.load_state_dict(model.state_dict())
            opt.load_state_dict(optimizer.state_dict())
        else:
            pair = model, optimizer
            other, opt = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        train(other, opt, 3)
        others.append(other)
    train(model, optimizer, 3)
    for other in others:
        assert largest(other, model) == 0
    # From JAX the file says the same class.
    tx, params, state = loaded.to_jax()
    assert interop.Checkpoint.from_jax(tx, params, state).optimizer.name == name


@pytest.mark.parametrize("name", optim.OTHERS)
def test_clipping_averages_schedules_and_low_precision(name, stepped_by):
    """As where the loop does it; and in bfloat16 with the state in float32 as jopt's step."""
    ours, theirs = network(name), network(name)
    norm = 0.05
    one = make(name, ours.parameters(), max_norm=norm, ema=0.9)
    other = make(name, theirs.parameters())
    schedules = [torch.optim.lr_scheduler.StepLR(x, 2, 0.5) for x in (one, other)]
    average = [p.detach().clone() for p in theirs.parameters()]
    for i in range(6):
        for model, opt in ((ours, one), (theirs, other)):
            opt.zero_grad()
            model(X).square().mean().backward()
            if model is theirs:
                torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
            opt.step()
        for schedule in schedules:
            schedule.step()
        for x, p in zip(average, theirs.parameters(), strict=True):
            x.copy_(p.detach() if i == 0 else x + 0.1 * (p.detach() - x))
    assert largest(ours, theirs) <= cases.NETWORK["float64"]
    for x, p in zip(average, ours.parameters(), strict=True):
        assert cases.difference(one.state[p]["ema"], x) <= cases.NETWORK["float64"]

    model = network(name, torch.bfloat16)
    optimizer = make(name, model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 4, torch.bfloat16)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(x, p) for x, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("function", "name"), authors.CLASSES.items())
def test_the_arguments_are_jopts(function, name):
    function = {"cautious_adamw": "adamw", "cautious_lion": "lion"}.get(function, function)
    theirs = inspect.signature(getattr(jopt, function)).parameters
    ours = inspect.signature(getattr(optim, name)).parameters
    assert next(iter(ours)) == "params"
    new = {"params", "foreach", "fused", "capturable", "differentiable", "max_norm", "ema", "state_dtype"}
    shared = {"cautious", "state_dtype", "master_copy", "stochastic_rounding", "hyperparams_in_state"}
    assert {key: ours[key].default for key in ours if key not in new} == {
        key: theirs[key].default for key in theirs if key not in shared
    }


def test_bad_arguments_are_named():
    model = network()
    for make, error, text in (
        (lambda p: optim.Lion(p, lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
        (lambda p: optim.Adan(p, betas=(0.9, 0.9)), TypeError, r"betas: expected 3 values \(beta1, beta2, beta3\)"),
        (lambda p: optim.Adan(p, betas=(0.9, 0.9, 1.0)), ValueError, "Invalid beta parameter at index 2: 1.0"),
        (lambda p: optim.AdEMAMix(p, alpha_warmup=0.5), ValueError, "alpha_warmup: expected a number of steps"),
        (lambda p: optim.LARS(p, nesterov=True), ValueError, "Nesterov momentum requires a momentum"),
        (lambda p: optim.LAMB(p, momentum=0.9), TypeError, "LAMB: got an unexpected keyword argument 'momentum'"),
        (lambda p: optim.Lion(p, cautious=True), TypeError, "Lion: got an unexpected keyword argument 'cautious'"),
        (
            lambda p: optim.Lion([{"params": p, "cautious": True}]),
            ValueError,
            r"\['cautious'\]: expected False for Lion",
        ),
        (lambda p: optim.NorMuon(p[:1], beta2=1.0), ValueError, r"beta2: expected a number in \[0, 1\), found 1.0"),
        (lambda p: optim.ADOPT(p, differentiable=True), NotImplementedError, "differentiable=True"),
    ):
        with pytest.raises(error, match=text):
            make(list(model.parameters()))
    cautious = optim.CautiousLion(model.parameters())
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['cautious'\]: expected False for Lion, found True"):
        optim.Lion(model.parameters()).load_state_dict(cautious.state_dict())


def test_parameters_without_gradient_and_parts_of_a_model():
    """A parameter that comes late begins then, as torch's optimizers do it."""
    for name in optim.OTHERS:
        model = network(name)
        other = {"weight_decay": 0.2} if name == "Prodigy" else {"lr": 0.02}  # whose rates are alike
        optimizer = make(name, [{"params": model[0].parameters()}, {"params": model[2].parameters(), **other}])
        for p in model[2].parameters():
            p.requires_grad_(False)
        train(model, optimizer, 2)
        assert not optimizer.state[model[2].weight]
        for p in model[2].parameters():
            p.requires_grad_(True)
        train(model, optimizer, 1)
        alone = network(name)
        alone.load_state_dict(model.state_dict())
        assert optimizer.state[model[2].weight].get("step", 1) == 1


def test_schedule_free_trains_and_evaluates():
    """Turned between steps, saved while it evaluates, and refused where it is in the other mode."""
    ours, theirs = network(), network()
    turned, straight = (optim.AdamWScheduleFree(x.parameters(), lr=0.01) for x in (ours, theirs))
    with pytest.raises(RuntimeError, match="Optimizer was not in train mode when step is called"):
        train(ours, turned, 1)
    straight.train()
    for _ in range(3):
        turned.train()
        train(ours, turned, 2)
        turned.eval()
        turned.eval()
    train(theirs, straight, 6)
    resumed_model = network()
    resumed = optim.AdamWScheduleFree(resumed_model.parameters(), lr=0.01)
    resumed_model.load_state_dict(ours.state_dict())
    resumed.load_state_dict(turned.state_dict())
    with pytest.raises(ValueError, match=r"AdamWScheduleFree holds the averages to evaluate; call optimizer.train"):
        interop.optimizer_to_jax(resumed, resumed_model)
    resumed.train()
    train(resumed_model, resumed, 2)
    train(theirs, straight, 2)
    assert largest(resumed_model, theirs) <= cases.NETWORK["float64"]


def test_the_schedule_of_kron_torch_is_ours():
    """Its state_dict has an object there; another's numbers are refused before anything changed."""
    numbers = dict(max_prob=1.0, min_prob=0.03, decay=0.001, flat_start=500)
    optimizer = optim.Kron([torch.nn.Parameter(torch.ones(2, 2))])
    saved = optimizer.state_dict()
    key = "preconditioner_update_probability"
    saved["param_groups"][0] |= {key: types.SimpleNamespace(**numbers), "lr": 0.5}
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][key] is None
    assert optimizer.param_groups[0]["lr"] == 0.5
    saved["param_groups"][0] |= {key: types.SimpleNamespace(**numbers | {"min_prob": 0.1}), "lr": 0.25}
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{key}'\].*0\.1"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
