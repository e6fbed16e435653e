"""A sweep of a torch model is a sequential loop over torch.optim."""

import copy
import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models are torch's")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import interop  # noqa: E402
import jopt  # noqa: E402
from tests import cases  # noqa: E402

STEPS = 15


class Net(nn.Module):
    """Convolution, layer norm, attention; a tied weight, a frozen parameter, a buffer, one that is never used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tied, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.tied.weight
        self.unused = nn.Linear(3, 3)
        self.out = nn.Linear(8, 2)
        self.out.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        x = self.norm(self.conv(x).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.again(self.tied(x).tanh()).mean(1)) * self.scale


def loss(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 6, 4, 5, generator=generator, dtype=dtype)
    return x, torch.randint(2, (STEPS, 6), generator=generator)


def reset(module):
    if isinstance(module, nn.MultiheadAttention):
        module._reset_parameters()
    elif not isinstance(module, Net):
        module.reset_parameters()


def sequentially(model, batches, seed, make):
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    torch.manual_seed(seed)
    model.apply(reset)
    for p, value in frozen:
        p.data.copy_(value)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    curve = []
    for batch in zip(*batches, strict=True):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve


# torch's remark that it loops over the runs for this operation.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_runs_are_torchs(dtype):
    batches = data(getattr(torch, dtype))
    model = Net().to(getattr(torch, dtype))
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    makes = {
        "adamw": (
            functools.partial(jopt.adamw, weight_decay=0.1),
            functools.partial(torch.optim.AdamW, weight_decay=0.1),
        ),
        "sgd": (functools.partial(jopt.sgd, momentum=0.9), functools.partial(torch.optim.SGD, momentum=0.9)),
    }
    result = interop.sweep(
        model, loss, batches, lr=[1e-3, 3e-2], seeds=[4, 7], optimizers={k: v[0] for k, v in makes.items()}, chunk=3
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert len(result.runs) == 8
    for run in result.runs:
        make = functools.partial(makes[run.optimizer][1], lr=run.lr)
        curve = sequentially(copy.deepcopy(model), batches, run.seed, make)
        assert cases.difference(run.curve, curve) < cases.NETWORK[dtype], run


def test_forms_of_batches():
    """A DataLoader, a list, stacked tensors; one result class."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = torch.randn(12, 3), torch.randint(2, (12,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    stacked = (x.reshape(3, 4, 3), y.reshape(3, 4))
    results = [
        interop.sweep(model, loss, batches, lr=[0.1], seeds=1, optimizers="sgd")
        for batches in (loader, list(zip(*stacked, strict=True)), stacked)
    ]
    assert {type(r) for r in results} == {jopt.Sweep}
    assert all(np.array_equal(r.runs[0].curve, results[0].runs[0].curve) for r in results)


def test_dropout_draws_for_each_run():
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    batches = (torch.randn(4, 8, 3), torch.randint(2, (4, 8)))
    sweep = functools.partial(interop.sweep, model, loss, batches, lr=[1e-9, 2e-9], seeds=1, optimizers="sgd")
    with pytest.raises(RuntimeError, match=r"model: torch.func cannot vectorize it .*randomness='different'"):
        sweep()
    a, b = (run.curve for run in sweep(randomness="different").runs)
    assert not np.array_equal(a, b)
    a, b = (run.curve for run in sweep(randomness="same").runs)
    assert np.allclose(a, b, atol=1e-5)


class Branches(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2))

    def forward(self, x):
        return x @ self.w


def test_models_that_cannot_be_vectorized():
    batches = (torch.randn(4, 8, 3), torch.randint(2, (4, 8)))
    for model, error, message in (
        (Branches(3, 2), RuntimeError, "cannot vectorize it .* data-dependent control flow"),
        (Bare(), ValueError, r"model: it \(Bare\) has parameters and no reset_parameters"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            ValueError,
            r"model: 1 would update its running statistics",
        ),
        (nn.Linear(3, 2).half().to("meta"), TypeError, "weight: expected .* CPU"),
        (lambda x: x, TypeError, "model: expected a torch.nn.Module, found function"),
    ):
        with pytest.raises(error, match=message):
            interop.sweep(model, loss, batches, lr=[0.1])
    evaluated = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    assert len(interop.sweep(evaluated, loss, batches, lr=[0.1], seeds=1, optimizers="sgd").runs) == 1


def test_bad_input():
    batches = (torch.randn(4, 8, 3), torch.randint(2, (4, 8)))
    for change, error, message in (
        (dict(lr=[]), ValueError, "lr: expected at least one value"),
        (dict(lr=[-1.0]), ValueError, "Invalid learning rate: -1.0"),
        (dict(optimizers="lbfgs"), TypeError, "lbfgs evaluates the loss"),
        (dict(randomness="some"), ValueError, "randomness: expected 'error', 'different' or 'same', found 'some'"),
        (
            dict(loss=lambda m, b: m(b[0])),
            ValueError,
            r"loss: expected a real 0-d tensor, found torch.float32 of shape",
        ),
        (dict(loss=lambda m, b: torch.ones(())), ValueError, "loss: expected it to depend on a parameter"),
        (dict(loss=1), TypeError, "loss: expected a function"),
        (dict(batches=(batches[0], batches[1][:3])), ValueError, r"found 4 of batches\[0\], 3 of batches\[1\]"),
        (dict(batches=(batches[0] * torch.nan, batches[1])), ValueError, r"batches\[0\]: .* nan or infinity at step 0"),
        (dict(batches=(batches[0].bfloat16(), batches[1])), TypeError, "batches: .* found torch.bfloat16"),
    ):
        with pytest.raises(error, match=message):
            interop.sweep(**{"model": nn.Linear(3, 2), "loss": loss, "batches": batches, "lr": [0.1]} | change)
    assert not jax.config.read("jax_enable_x64")
