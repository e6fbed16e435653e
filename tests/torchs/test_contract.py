"""The contract of torch.optim.Optimizer over torch's own table of configurations.

After what torch's test_optim.py asserts. Left out, as they say nothing of another class on CPU: the tests of CUDA, of
several devices, of `foreach` and `fused` against the loop, and of `differentiable=True`, which is refused.
"""

import copy
import functools
import io
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")
pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch.optim import optimizer as torch_optimizer  # noqa: E402
from torch.testing._internal.common_optimizers import optim_db  # noqa: E402

from interop import optim  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from tests import cases  # noqa: E402

INFOS = {info.optim_cls.__name__: info for info in optim_db}


def arguments_of(item):
    """A tensor in float64, as the parameters are: in float32 torch computes with it in float32."""
    return {k: v.double() if torch.is_tensor(v) else v for k, v in item.kwargs.items()}


CONFIGURATIONS = [
    pytest.param(name, arguments_of(item), id=f"{name}-{i}")
    for name, info in INFOS.items()
    for i, item in enumerate(info.optim_inputs_func(device="cpu"))
]
every_configuration = pytest.mark.parametrize(("name", "arguments"), CONFIGURATIONS)
# L-BFGS near the minimum multiplies an ulp: tests/jopt/test_lbfgs.py compares it with torch as far as that goes.
but_lbfgs = pytest.mark.parametrize(("name", "arguments"), [c for c in CONFIGURATIONS if c.values[0] != "LBFGS"])
LAST = {c.values[0]: c.id for c in CONFIGURATIONS}.values()
few_configurations = pytest.mark.parametrize(  # of each class the first and the last
    ("name", "arguments"),
    [
        pytest.param(*c.values, id=c.id, marks=[pytest.mark.slow] * (c.id not in LAST and not c.id.endswith("-0")))
        for c in CONFIGURATIONS
        if c.values[0] != "LBFGS"
    ],
)
every_class = pytest.mark.parametrize("name", INFOS)


@pytest.fixture(autouse=True)
def float64():
    """The drop-in's own float64, whatever JAX's setting: cases.difference reads it."""
    with enable_x64(True):
        yield


class Run:
    """A small least-squares problem, its parameters in all layouts that the class takes, and an optimizer of it."""

    def __init__(self, module, name, arguments=None, *, groups=False, dtype=torch.float64):
        self.name = name
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
        values = [draw(4, 3), draw(3, 4).T] if name == "Muon" else [draw(4, 3), draw(3, 4).T, draw(5), draw(())]
        if name == "SparseAdam":
            values = values[:1]
        if name == "LBFGS":  # torch's views gradients as vectors, and raises where their layout does not allow it
            values = [x.contiguous() for x in values]
        self.params = [torch.nn.Parameter(x) for x in values]
        self.targets = [torch.ones_like(x) for x in values]
        given = self.params if not groups else [{"params": self.params[:1]}, {"params": self.params[1:]}]
        self.optimizer = getattr(module, name)(given, **(arguments or {}))

    def loss(self):
        return sum(((p - x) ** 2).sum() for p, x in zip(self.params, self.targets, strict=True))

    def backward(self):
        loss = self.loss()
        loss.backward()
        if self.name == "SparseAdam":
            rows = torch.tensor([0, 2, 0])
            for p in self.params:
                p.grad = torch.sparse_coo_tensor(rows[None], p.grad[rows] / 2, p.shape, check_invariants=True)
        return loss

    def step(self, change=lambda params: None):
        def closure():
            self.optimizer.zero_grad()
            loss = self.backward()
            change(self.params)
            return loss

        if self.name == "LBFGS":
            return self.optimizer.step(closure)
        closure()
        return self.optimizer.step()


def assert_equal(ours, theirs):
    """Parameters and all of the state."""
    for a, b in zip(ours.params, theirs.params, strict=True):
        assert cases.difference(a.detach().numpy(), b.detach().numpy()) <= cases.TOLERANCES["float64"]
    ours, theirs = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for index, state in theirs["state"].items():
        assert list(ours["state"][index]) == list(state)
        for key, value in state.items():
            mine = ours["state"][index][key]
            assert type(mine) is type(value), key
            if torch.is_tensor(value):
                assert mine.dtype == value.dtype
                assert mine.shape == value.shape
                assert cases.difference(mine.numpy(), value.numpy()) <= cases.TOLERANCES["float64"], key


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@but_lbfgs
def test_runs_as_torchs(name, arguments):
    """Seven steps; all gradients absent in the third, the first parameter's in the fourth and fifth."""
    runs = [Run(module, name, arguments) for module in (optim, torch.optim)]
    for i in range(7):

        def change(params, i=i):
            for p in params if i == 2 else params[:1] if i in (3, 4) else ():
                p.grad = None

        for run in runs:
            run.step(change)
        assert_equal(*runs)


@pytest.mark.parametrize("groups", cases.mostly_slow([False, True], [True]))
@every_configuration
def test_goes_in_the_right_direction(name, arguments, groups):
    run = Run(optim, name, arguments, groups=groups and INFOS[name].supports_param_groups)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.99)
    first = run.loss().item()
    for _ in range(20):
        run.step()
        scheduler.step()
    assert (run.loss().item() > first) == bool(arguments.get("maximize"))


@few_configurations
def test_checkpoints(name, arguments):
    """Both ways, through torch.load(weights_only=True).

    With ours the run goes on as if nothing had been; torch's load takes NAdam's and ASGD's scalars into the parameter's
    type, and goes on as from a checkpoint of its own.
    """
    runs = {module: Run(module, name, arguments) for module in (optim, torch.optim)}
    for run in runs.values():
        for _ in range(3):
            run.step()
    resumed = {}
    for source, run in runs.items():
        for target in runs:
            new = resumed[source, target] = Run(target, name, arguments)
            before = run.optimizer.state_dict()
            new.optimizer.load_state_dict(saved(before))
            assert new.optimizer.state_dict()["param_groups"] == before["param_groups"]
            for p, q in zip(new.params, run.params, strict=True):
                p.data.copy_(q.data)
    for run in (*runs.values(), *resumed.values()):
        for _ in range(10):
            run.step()
    assert_equal(resumed[optim, optim], runs[torch.optim])
    assert_equal(resumed[torch.optim, optim], runs[torch.optim])
    assert_equal(resumed[optim, torch.optim], resumed[torch.optim, torch.optim])


# What torch's __setstate__ knows a default for.
OLDER = {"maximize": ("Adafactor", "SparseAdam", "Muon"), "foreach": ("Muon", "SparseAdam")}


@pytest.mark.parametrize("name", [n for n in INFOS if n != "LBFGS"])
def test_older_checkpoints(name):
    """Flags that older versions did not save take their defaults; a step count may be a number."""
    new, old = Run(optim, name), Run(optim, name)
    for run in (new, old):
        run.step()
    checkpoint = old.optimizer.state_dict()
    for group in checkpoint["param_groups"]:
        for flag in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
            if name not in OLDER.get(flag, ()):
                group.pop(flag, None)
    for state in checkpoint["state"].values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].item()
    old.optimizer.load_state_dict(checkpoint)
    for run in (new, old):
        run.step()
    for a, b in zip(old.params, new.params, strict=True):
        assert torch.equal(a, b)


@every_class
def test_named_parameters(name):
    run = Run(optim, name)
    named = [(f"p{i}", p) for i, p in enumerate(run.params)]
    optimizer = getattr(optim, name)(named)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in named]
    optimizer.load_state_dict(run.optimizer.state_dict())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in named]


@pytest.mark.parametrize("name", [n for n in INFOS if n != "LBFGS"])
def test_a_tensor_learning_rate(name):
    plain = Run(torch.optim, name, {"lr": 0.01})
    for shape in ((), (1,)):
        lr = torch.full(shape, 0.01, dtype=torch.float64)
        ours = Run(optim, name, {"lr": lr})
        for _ in range(5):
            ours.step()
        assert float(lr) == 0.01
        if not shape:
            for _ in range(5):
                plain.step()
        for a, b in zip(ours.params, plain.params, strict=True):
            assert cases.difference(a.detach().numpy(), b.detach().numpy()) <= cases.TOLERANCES["float64"]


@every_class
def test_gradients_are_not_written(name):
    run = Run(optim, name)
    before = []

    def keep(params):
        before[:] = [(p.grad, p.grad.clone(), p.grad._version) for p in params]

    for _ in range(5):
        run.step(keep)
        for grad, copy_of_it, version in before:
            assert grad._version == version
            assert torch.equal(grad.to_dense(), copy_of_it.to_dense())


@pytest.mark.parametrize("name", [n for n in INFOS if n != "LBFGS"])
def test_no_gradient_is_a_no_op(name):
    run = Run(optim, name)
    before = [p.detach().clone() for p in run.params]
    run.optimizer.step()
    assert all(map(torch.equal, run.params, before))
    assert bool(run.optimizer.state) == (name == "Adagrad")  # whose constructor makes it


@pytest.mark.parametrize("name", [n for n, info in INFOS.items() if info.supports_param_groups])
def test_a_groups_own_options(name):
    """A learning rate of zero, nearly, in one group alone."""
    run = Run(optim, name, groups=True)
    if len(run.params) == 1:
        run.optimizer.param_groups.pop()
    run.optimizer.param_groups[0]["lr"] = 1e-28
    before = [p.detach().clone() for p in run.params]
    run.step()
    same = [torch.equal(p, x) for p, x in zip(run.params, before, strict=True)]
    if name not in ("Adadelta", "Rprop"):  # a learning rate that is only a start (Rprop), or not the step's size
        assert same == [True] + [False] * (len(same) - 1)


@pytest.mark.parametrize("name", [n for n, info in INFOS.items() if info.supports_complex and n != "LBFGS"])
def test_complex_is_two_reals(name):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    start, target = draw(5, 2), draw(5, 2)
    whole = torch.nn.Parameter(start.clone())
    halves = torch.nn.Parameter(torch.view_as_real(start).clone())
    optimizers = [getattr(optim, name)([p]) for p in (whole, halves)]
    for _ in range(5):
        whole.grad = whole.detach() - target
        halves.grad = halves.detach() - torch.view_as_real(target)
        for optimizer in optimizers:
            optimizer.step()
        difference = cases.difference(torch.view_as_real(whole.detach()).numpy(), halves.detach().numpy())
        assert difference <= cases.TOLERANCES["float64"]


@every_class
def test_copies_go_on_alike(name):
    """deepcopy and pickle, public attributes included; the state is not empty, and repr names the class."""
    run = Run(optim, name)
    run.step()
    assert all(run.optimizer.state_dict()["state"].values())
    assert repr(run.optimizer).startswith(f"{name} (")
    for copied in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert {k for k in vars(copied.optimizer) if k[0] != "_"} == {k for k in vars(run.optimizer) if k[0] != "_"}
        original = copy.deepcopy(run)
        for r in (copied, original):
            r.step()
        assert_equal(copied, original)


@every_class
def test_hooks_are_called_in_torchs_order(name):
    run, calls = Run(optim, name), []

    def say(what):
        return lambda *_: calls.append(what)

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(say("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(say("global post")),
    ]
    try:
        run.optimizer.register_step_pre_hook(say("pre"))
        run.optimizer.register_step_post_hook(say("post"))
        run.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"]
    run.optimizer.register_state_dict_pre_hook(say("state pre"))
    run.optimizer.register_state_dict_post_hook(say("state post"))
    run.optimizer.register_load_state_dict_pre_hook(say("load pre"))
    run.optimizer.register_load_state_dict_post_hook(say("load post"))
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert calls[4:] == ["state pre", "state post", "load pre", "load post"]


@every_class
def test_float32_too(name):
    """A step in float32 has float32's state, whatever the default type."""
    run = Run(optim, name, dtype=torch.float32)
    run.step()
    types = {x.dtype for x in run.optimizer.state[run.params[0]].values() if torch.is_tensor(x)}
    assert types <= {torch.float32, torch.int64}
    assert all(np.isfinite(p.detach().numpy()).all() for p in run.params)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Adafactor"])
def test_parameters_and_state_are_swapped_in(name):
    """torch's context manager puts others in place of the optimizer's for a while; then its own are stepped again."""
    stateless = pytest.importorskip("torch.optim._stateless", reason="torch has it from 2.13 on")
    runs = []
    for module in (optim, torch.optim):
        p = torch.nn.Parameter(torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4))
        other = torch.nn.Parameter(torch.linspace(-3, -1, 12, dtype=torch.float64).view(3, 4))
        optimizer = getattr(module, name)([p], lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
        seen = []
        for swapped in (False, False, True, False):
            if swapped:
                state = copy.deepcopy(optimizer.state_dict())
                with stateless.swap_in_optimizer_params_and_state(optimizer, {"p": other}, state):
                    other.grad = other.detach().clone()
                    optimizer.step()
                    optimizer.step()
            else:
                p.grad = p.detach().clone()
                optimizer.step()
            seen += [p.detach().clone(), other.detach().clone()]
        runs.append(seen)
    for a, b in zip(*runs, strict=True):
        assert cases.difference(a.numpy(), b.numpy()) <= cases.TOLERANCES["float64"]


def test_the_profiler_names_the_step():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([p])
    p.grad = torch.ones(3)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    found = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= found
