"""State in eight and sixteen bits in the drop-in: as in JAX, across formats, moved, in files, refused by torch."""

import copy

import numpy as np
import pytest
import torch

import interop
import jopt
from interop import optim
from interop.dropin import formats
from interop.runs.classes import classes_of
from tests import cases

FORMS = pytest.mark.parametrize("form", ["int8", "bfloat16"])
NARROW = [
    case
    for case in cases.CASES
    if case.jopt().rule.signs().keys() & set(case.slots) and classes_of(type(case.jopt().rule))
]


class Model(torch.nn.Module):
    """A matrix with state in codes and a vector without."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(70, 65, dtype=dtype)


def step(model, optimizer, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


def adamw(form, seeds=(), dtype=torch.float32, **arguments):
    model = Model(dtype)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, state_dtype=form, **arguments)
    step(model, optimizer, seeds)
    return model, optimizer


def weights(model):
    return model.a.weight.detach().float().numpy().copy()


@FORMS
@cases.parametrize(NARROW, fast=cases.FEW)
def test_steps_as_in_jax(case, form):
    """Up to a code where another contraction moved a number past the middle between two."""
    model = Model()
    name = next(x.name for x in classes_of(type(case.jopt().rule)) if case.torch in (None, x.name))
    fixed = getattr(optim, name).fixed if hasattr(getattr(optim, name), "fixed") else {}
    arguments = {k: v for k, v in case.arguments.items() if k not in fixed}
    optimizer = getattr(optim, name)(model.parameters(), lr=case.lr, state_dtype=form, **arguments)
    if hasattr(optimizer, "train"):
        optimizer.train()
    tx = case.jopt(state_dtype=form)
    params = {n: interop.to_jax(p.detach().clone()) for n, p in model.named_parameters()}
    state = tx.init(params)
    for seed in range(3):
        step(model, optimizer, [seed])
        grads = {n: interop.to_jax(p.grad.clone()) for n, p in model.named_parameters()}
        params, state = tx.step(grads, state, params)
    error = np.abs(weights(model) - np.asarray(params["a.weight"]))
    assert (error > 1e-5).mean() < 1e-2
    names = {k for k, tree in state.slots.items() if tree["a.weight"] is not None}
    found = optimizer.state[model.a.weight]
    assert names == {k for k, x in found.items() if x.dim()}
    for key in names:
        mine, theirs = found[key].float().numpy(), np.asarray(state.slots[key]["a.weight"], np.float32)
        assert found[key].dtype == interop.to_torch(state.slots[key]["a.weight"]).dtype
        assert (np.abs(mine - theirs) > 1e-2 * np.abs(theirs) + 1e-5 * np.abs(theirs).max()).mean() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@FORMS
def test_a_state_dict_goes_on(form, dtype):
    one, optimizer = adamw(form, range(3), dtype)
    other = Model(dtype)
    other.load_state_dict(one.state_dict())
    second = optim.AdamW(other.parameters(), state_dtype=form)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert second.param_groups[0]["state_dtype"] == form
    for model, x in ((one, optimizer), (other, second)):
        step(model, x, range(3, 6))
    np.testing.assert_array_equal(weights(one), weights(other))


@pytest.mark.parametrize(
    ("first", "second"), [(None, "int8"), ("int8", None), ("int8", "bfloat16"), (None, "bfloat16")]
)
def test_across_formats(first, second):
    one, optimizer = adamw(first, range(3))
    other, target = adamw(second, range(1))
    target.load_state_dict(optimizer.state_dict())
    assert target.param_groups[0].get("state_dtype") == second
    before, after = optimizer.state[one.a.weight], target.state[other.a.weight]
    expected = formats.adapted(target._groups.rules[0], second, other.a.weight, before)
    assert after.keys() == expected.keys()
    for key, x in expected.items():
        assert after[key].dtype == x.dtype
        assert torch.equal(after[key], x)
    step(other, target, range(3, 5))
    assert after.keys() == target.state[other.a.weight].keys()


def test_torch_refuses_codes():
    model, optimizer = adamw("int8", range(2))
    native = torch.optim.AdamW(model.parameters())
    native.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        native.step()


@FORMS
@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_a_run_moves_and_returns(form, layout):
    model, optimizer = adamw(form, range(3))
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    tx, params, state = interop.optimizer_to_jax(optimizer, model, layout=layout)
    name = "a.weight" if layout == "torch" else "a.kernel"
    assert (state.slots["exp_avg_int8"][name] is not None) if form == "int8" else True
    interop.optimizer_to_torch(tx, params, state, model, optimizer, layout=layout)
    for key, x in optimizer.state[model.a.weight].items():
        assert x.dtype == expected[0][key].dtype
        if layout == "torch" or form == "bfloat16":
            assert torch.equal(x, expected[0][key])
    if form == "int8" and layout == "flax":  # blocks of other neighbours: each number within two roundings
        x, y = (
            formats.adapted(tx.rule, None, model.a.weight, s) for s in (optimizer.state[model.a.weight], expected[0])
        )
        for key in ("exp_avg", "exp_avg_sq"):
            assert (x[key] - y[key]).abs().max() < 0.03 * y[key].abs().max()
    step(model, optimizer, [3])


def test_to_jax_in_another_format():
    model, optimizer = adamw("int8", range(3))
    _, _, state = interop.optimizer_to_jax(optimizer, model, state_dtype="float32")
    rule = jopt.adamw().rule
    expected = formats.adapted(rule, None, model.a.weight, optimizer.state[model.a.weight])
    np.testing.assert_array_equal(state.slots["exp_avg"]["a.weight"], expected["exp_avg"].numpy())


@FORMS
@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_files(form, end, tmp_path):
    model, optimizer = adamw(form, range(3))
    interop.save_checkpoint(interop.Checkpoint.from_torch(model, optimizer), tmp_path / f"run.{end}")
    other, target = adamw(form)
    interop.load_checkpoint(tmp_path / f"run.{end}").to_torch(other, target)
    for x, y in ((model, optimizer), (other, target)):
        step(x, y, range(3, 5))
    np.testing.assert_array_equal(weights(model), weights(other))


def test_what_is_refused():
    p = [torch.nn.Parameter(torch.zeros(4, 4))]
    for make, error, text in (
        (lambda: optim.Muon(p, state_dtype="int8"), ValueError, "Muon, whose state"),
        (lambda: optim.ASGD(p, state_dtype="bfloat16"), ValueError, "for ASGD"),
        (lambda: optim.AdamW(p, state_dtype="float16"), ValueError, "in which moments underflow"),
        (lambda: optim.Lion(p, state_dtype="uint8"), TypeError, "state_dtype: expected float32, bfloat16 or int8"),
    ):
        with pytest.raises(error, match=text):
            make()
    model, optimizer = adamw(None, range(2))
    optimizer.param_groups[0]["state_dtype"] = "int8"
    before = weights(model)
    with pytest.raises(KeyError, match=r"reads its state 'exp_avg.*_(int8|absmax)'"):
        step(model, optimizer, [2])
    np.testing.assert_array_equal(weights(model), before)
    optimizer.load_state_dict(optimizer.state_dict())  # converts
    step(model, optimizer, [2])
    assert "exp_avg_int8" in optimizer.state[model.a.weight]


def test_groups_averages_and_clipping():
    model = Model()
    groups = [{"params": [model.a.weight]}, {"params": [model.a.bias], "state_dtype": "bfloat16"}]
    optimizer = optim.AdamW(groups, state_dtype="int8", ema=0.9, max_norm=1.0)
    step(model, optimizer, range(3))
    assert optimizer.state[model.a.bias]["exp_avg"].dtype is torch.bfloat16
    assert optimizer.state[model.a.weight]["exp_avg_int8"].dtype is torch.uint8
    assert optimizer.state[model.a.weight]["ema"].dtype is torch.float32
    copied = copy.deepcopy(optimizer)
    assert [g["state_dtype"] for g in copied.param_groups] == ["int8", "bfloat16"]
