"""torch's own schedulers and averages drive the drop-in as they drive torch.optim.

The essence of torch's TestLRScheduler and TestSWAUtils, with our classes as carriers.
"""

import copy
import io

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")
from torch.optim import lr_scheduler, swa_utils  # noqa: E402

from interop import optim  # noqa: E402
from tests import cases  # noqa: E402
from tests.jopt.test_schedules import LR, PAIRS  # noqa: E402

STEPS = 25
SCHEDULERS = {name: make for name, (_, make) in PAIRS.items()} | {
    "plateau": lambda t, o: t.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1),
    "swalr": lambda t, o: swa_utils.SWALR(o, 0.05, 5),
}


class Run:
    """A model that follows its scheduler, the metric being its loss."""

    def __init__(self, module, make, tensor_lr=False, cls="SGD", **arguments):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3, dtype=torch.float64)
        arguments = arguments or {"momentum": 0.9}
        lr = torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR
        first, second = self.model.parameters()
        groups = [{"params": [first]}, {"params": [second], "weight_decay": 0.1}]
        self.opt = getattr(module, cls)(groups, lr=lr, **arguments)
        self.scheduler = make(lr_scheduler, self.opt)
        self.seen = []

    def train(self, steps):
        for i in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            self.opt.zero_grad()
            loss = 0.05 * (self.model(x) - 1).pow(2).mean()
            loss.backward()
            self.opt.step()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            else:
                self.scheduler.step()
            keys = ("lr", "momentum", "betas")
            self.seen.append(
                [float(torch.as_tensor(g[k]).flatten()[0]) for g in self.opt.param_groups for k in keys if k in g]
            )
        return self

    def state(self):
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.opt.state_dict(), self.scheduler.state_dict()], file)
        file.seek(0)
        return torch.load(file, weights_only=False)  # a scheduler's state may hold a Counter

    def load(self, state):
        for x, s in zip((self.model, self.opt, self.scheduler), state, strict=True):
            x.load_state_dict(s)
        return self


def assert_same(ours, theirs):
    assert ours.seen == theirs.seen  # the same Python numbers
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert cases.difference(p.detach().numpy(), q.detach().numpy()) <= cases.TOLERANCES["float64"]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_drop_in(name):
    """And a run that is saved and resumed, in torch or here, is the run that went through."""
    make = SCHEDULERS[name]
    theirs = Run(torch.optim, make).train(range(STEPS))
    ours = Run(optim, make).train(range(12))
    state = ours.state()
    assert_same(ours.train(range(12, STEPS)), theirs)
    if "lambda" not in name and "multipl" not in name and "chained-absolute" not in name:  # functions are not saved
        for module in (optim, torch.optim):
            resumed = Run(module, make).load(copy.deepcopy(state)).train(range(12, STEPS))
            resumed.seen = theirs.seen[:12] + resumed.seen
            assert_same(resumed, theirs)


@pytest.mark.parametrize("name", ["step", "cosine-rebound", "one_cycle", "cyclic"])
@pytest.mark.parametrize("cls", ["SGD", "AdamW"])
def test_learning_rates_that_are_tensors(name, cls):
    arguments = {"momentum": 0.9} if cls == "SGD" else {"betas": (0.9, 0.99)}
    runs = [
        Run(m, SCHEDULERS[name], tensor_lr=True, cls=cls, **arguments).train(range(STEPS)) for m in (optim, torch.optim)
    ]
    assert_same(*runs)
    assert isinstance(runs[0].opt.param_groups[0]["lr"], torch.Tensor)


def test_groups_added_under_a_scheduler():
    """The new group has to have an initial_lr, says torch; then it is scheduled and stepped as the others."""
    runs = []
    for module in (optim, torch.optim):
        run = Run(module, SCHEDULERS["exponential"]).train(range(3))
        extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        run.opt.add_param_group({"params": [extra], "lr": 0.1, "initial_lr": 0.1})
        run.scheduler.base_lrs.append(0.1)
        for _ in range(3):
            extra.grad = torch.ones_like(extra)
            run.opt.step()
            run.scheduler.step()
        runs.append((run.opt.param_groups[2]["lr"], extra.tolist()))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == pytest.approx(runs[1][1], rel=cases.TOLERANCES["float64"])


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models(average):
    """Updated by torch beside the drop-in, whose parameters live in XLA's memory; update_bn and a copy included."""
    runs = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)).double()
        options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)} if average == "ema" else {}
        averaged = swa_utils.AveragedModel(model, **options)
        # Not Adam: the bias before a batch norm has a gradient of rounding alone, which Adam divides by itself.
        opt = module.SGD(model.parameters(), lr=0.01, momentum=0.9)
        batches = [
            torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(10)
        ]
        for x in batches:
            opt.zero_grad()
            model(x).pow(2).mean().backward()
            opt.step()
            averaged.update_parameters(model)
        swa_utils.update_bn([(x,) for x in batches], averaged)
        copied = copy.deepcopy(averaged)
        runs.append(copied.state_dict())
    assert runs[0].keys() == runs[1].keys()
    for key, x in runs[1].items():
        assert cases.difference(runs[0][key].numpy(), x.numpy()) <= cases.NETWORK["float64"], key
