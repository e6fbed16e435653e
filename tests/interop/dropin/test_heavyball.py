"""Runs of heavyball's SOAP and PSGDKron go on in interop.optim's classes, from what heavyball wrote."""

import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import interop  # noqa: E402
from interop import optim  # noqa: E402
from tests import ROOT, authors, cases  # noqa: E402

RUNS = json.loads((ROOT / "tests" / "data" / "heavyball.json").read_text())["runs"]
EACH = [pytest.param(name, run, id=f"{name}-{i}") for name, runs in RUNS.items() for i, run in enumerate(runs)]


def made(name, run):
    params = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)) for x in run["params"]]
    return params, getattr(optim, name)(params, lr=0.01, **run["options"])


def saved(run):
    found = authors.as_tensors(copy.deepcopy(run["state_dict"]))
    for views in found["state"].values():
        for key, x in views[0].items():
            if isinstance(x, torch.Tensor):
                views[0][key] = x.float()
    return found


def distance(params, run):
    return max(cases.difference(p.detach(), np.array(x, np.float32)) for p, x in zip(params, run["after"], strict=True))


def go_on(params, optimizer):
    for step in range(authors.HALF, 2 * authors.HALF):
        authors.torch_step(params, optimizer, step, 0.1)


@pytest.mark.parametrize(("name", "run"), EACH)
def test_a_run_of_heavyball_goes_on(name, run):
    """As theirs went on, up to what their float32 and their QR do otherwise; far closer than a run begun anew."""
    params, optimizer = made(name, run)
    optimizer.load_state_dict(saved(run))
    go_on(params, optimizer)
    anew, fresh = made(name, run)
    go_on(anew, fresh)
    assert distance(params, run) <= cases.HEAVYBALL[name]
    assert distance(anew, run) > 100 * cases.HEAVYBALL[name]


@pytest.mark.parametrize(("name", "run"), EACH[::2])
def test_and_moves_to_jax(name, run):
    params, optimizer = made(name, run)
    optimizer.load_state_dict(saved(run))
    tx, arrays, state = interop.optimizer_to_jax(optimizer, torch.nn.ParameterList(params))
    for step in range(authors.HALF, 2 * authors.HALF):
        grads = authors.gradients(np, [np.asarray(x) for x in arrays.values()], step, 0.1)
        arrays, state = tx.step(dict(zip(arrays, map(np.float32, grads), strict=True)), state, arrays)
    after = [torch.tensor(np.asarray(x)) for x in arrays.values()]
    assert distance(after, run) <= cases.HEAVYBALL[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x["param_groups"][0].update(caution=True), r"param_groups\[0\]\['caution'\]: expected False"),
        (lambda x: x["param_groups"][0].update(warmup_steps=100), "expected a run whose warmup is over"),
        (lambda x: x["heavyball"].update(use_ema=True), "use_ema"),
        (lambda x: x["state"][0].update({1: {}}), "expected one view"),
        (lambda x: x["state"][0][0].update(update_by_muon_momentum_2=1.0), "update_by_muon_momentum_2"),
        (lambda x: x["state"][3][0].update(scale_by_soap_exp_avg_2=torch.ones(1, 4, 3)), r"axes \(2, 6\), found"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_changed(change, words):
    run = RUNS["SOAP"][0]
    _, optimizer = made("SOAP", run)
    theirs = saved(run)
    change(theirs)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(theirs)
    assert not optimizer.state
    assert all(group["merge_dims"] is False for group in optimizer.param_groups)
