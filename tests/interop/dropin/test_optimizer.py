"""Front end 3: a drop-in for torch.optim. In place, for every kind of parameter, and safe."""

import concurrent.futures
import copy
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings
import weakref

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import jopt  # noqa: E402
from interop import optim  # noqa: E402
from interop.dropin import eager, host, program  # noqa: E402
from interop.dropin.step import CompiledStep  # noqa: E402
from interop.memory import HOST  # noqa: E402
from jopt import leaf as leaf_module  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from tests import cases  # noqa: E402


def network(dtype=torch.float32, seed=0, bias=True):
    """Two layers: one tensor with a buffer of its own, three in the shared one."""
    torch.manual_seed(seed)
    first, second = torch.nn.Linear(300, 200, bias=bias), torch.nn.Linear(200, 3, bias=bias)
    return torch.nn.Sequential(first, torch.nn.Tanh(), second).to(dtype)


def backward(model, seed=0):
    first = next(model.parameters())
    x = torch.randn(16, 300, generator=torch.Generator().manual_seed(seed)).to(first.dtype)
    loss = (model(x) ** 2).mean()
    loss.backward()
    return loss


def train(model, opt, steps=5, hook=lambda i: None):
    for i in range(steps):
        opt.zero_grad()
        backward(model, i)
        hook(i)
        opt.step()


def pair(name="AdamW", dtype=torch.float32, **arguments):
    """The same model twice, for torch's optimizer and for ours."""
    arguments = {"lr": 0.01} | arguments
    models = [network(dtype, bias=name != "Muon") for _ in range(2)]
    return models, [
        getattr(module, name)(m.parameters(), **arguments)
        for module, m in zip((torch.optim, optim), models, strict=True)
    ]


def assert_equal(theirs, ours, tolerances=cases.NETWORK):
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert p.dtype is q.dtype
        distance = cases.difference(q.detach().double(), p.detach().double())
        assert distance <= tolerances[str(p.dtype).removeprefix("torch.")]


def compilations():
    return program.compile_update.cache_info().misses


def trained(**arguments):
    model = network()
    opt = optim.AdamW(model.parameters(), **arguments)
    train(model, opt, 3)
    return model, opt


# --- a drop-in


@cases.parametrize(cases.TORCH_CASES, fast=cases.FEW)
def test_classes_are_torchs(case):
    ours, theirs = getattr(optim, case.torch), getattr(torch.optim, case.torch)
    assert issubclass(ours, torch.optim.Optimizer)
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    models, opts = pair(case.torch, torch.float64, lr=case.lr, **case.arguments)
    for model, opt in zip(models, opts, strict=True):
        train(model, opt)
    assert opts[1].defaults == opts[0].defaults
    assert_equal(*models, cases.MUON_OF_LOW_RANK if case.matrices else cases.NETWORK)
    a, b = (opt.state_dict() for opt in opts)
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, state in a["state"].items():
        assert list(b["state"][i]) == list(state)  # the same keys in the same order
        for name, x in state.items():
            assert (x.dtype, x.shape, x.device) == (b["state"][i][name].dtype, b["state"][i][name].shape, x.device)
    assert str(opts[1]) == str(opts[0])


@pytest.mark.parametrize(
    "name", ["StepLR", "OneCycleLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ReduceLROnPlateau"]
)
def test_torchs_schedulers(name):
    arguments = {
        "StepLR": dict(step_size=2),
        "OneCycleLR": dict(max_lr=0.1, total_steps=12),
        "CosineAnnealingWarmRestarts": dict(T_0=3),
        "CyclicLR": dict(base_lr=0.001, max_lr=0.1, step_size_up=3, cycle_momentum=True),
        "ReduceLROnPlateau": dict(patience=1),
    }[name]
    for cls, extra in (("SGD", dict(momentum=0.9)), ("AdamW", {})):
        models, opts = pair(cls, torch.float64, **extra)
        train(models[1], opts[1], 1), train(models[0], opts[0], 1)
        before = compilations()
        for model, opt in zip(models, opts, strict=True):
            scheduler = getattr(torch.optim.lr_scheduler, name)(opt, **arguments)
            for i in range(10):
                opt.zero_grad()
                loss = backward(model, i)
                opt.step()
                scheduler.step(*([loss.item()] if name == "ReduceLROnPlateau" else []))
        assert_equal(*models)
        assert compilations() == before


def test_closure_hooks_and_return_value():
    model = network()
    opt = optim.SGD(model.parameters(), lr=0.1)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        opt.zero_grad()
        return backward(model)

    loss = opt.step(closure)
    assert loss.requires_grad
    assert calls == ["pre", "closure", "post"]
    assert opt.step.__func__.__name__ == "step"  # a plain method, which schedulers patch


def test_hooks_run_once_around_a_subclass_with_a_step_of_its_own():
    class Scaled(optim.SGD):
        def step(self, closure=None):
            calls.append("step")
            return super().step(closure)

    calls = []
    model = network()
    opt = Scaled(model.parameters(), lr=0.1)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    backward(model)
    opt.step()
    assert calls == ["pre", "step", "post"]


def test_hooks_see_and_change_what_step_is_called_with():
    model = network()
    opt = optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def hook(optimizer, args, kwargs):
        seen.append((optimizer, args, kwargs))
        return args, {"closure": lambda: torch.tensor(3.0)}

    opt.register_step_pre_hook(hook)
    assert opt.step(closure=None).item() == 3
    assert seen == [(opt, (opt,), {"closure": None})]


def test_param_groups_and_added_ones():
    (m1, m2), _ = pair()
    for model, module in ((m1, torch.optim), (m2, optim)):
        opt = module.AdamW(
            [{"params": model[0].parameters(), "lr": 0.1}, {"params": [model[2].weight], "weight_decay": 0.5}], lr=0.01
        )
        train(model, opt, 3)
        opt.add_param_group({"params": [model[2].bias], "betas": (0.5, 0.9)})
        train(model, opt, 3)
    assert_equal(m1, m2)


def test_tensor_learning_rate():
    models, opts = pair("Adam", torch.float64)
    for model, opt in zip(models, opts, strict=True):
        opt.param_groups[0]["lr"] = torch.tensor(0.01, dtype=torch.float64)
        train(model, opt, 4, lambda i, opt=opt: opt.param_groups[0]["lr"].mul_(0.9))
    assert_equal(*models)


def test_execution_flags_are_accepted():
    for flags in (dict(foreach=True), dict(fused=True), dict(capturable=True)):
        model = network()
        opt = optim.Adam(model.parameters(), **flags)
        train(model, opt)
        assert not getattr(opt, "_step_supports_amp_scaling", False)


def test_grad_scaler_skips_infinite_gradients():
    models, opts = pair("AdamW", fused=None)
    for model, opt in zip(models, opts, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(4):
            opt.zero_grad()
            x = torch.randn(8, 300, generator=torch.Generator().manual_seed(i))
            scaler.scale((model(x) ** 2).mean()).backward()
            if i == 2:
                next(model.parameters()).grad[0, 0] = float("inf")
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 512.0
    assert_equal(*models)


# --- in place


def test_parameters_are_updated_in_place():
    model = network()
    opt = optim.AdamW(model.parameters(), lr=0.1)
    params = list(model.parameters())
    ids = [id(p) for p in params]
    before = [p.detach().clone() for p in params]
    train(model, opt, 1)
    aliases = [p.data for p in params] + [p.detach().view(-1) for p in params]
    addresses = [p.data_ptr() for p in params]
    arrays = [p.detach().numpy() for p in params]
    train(model, opt, 3)
    assert [id(p) for p in model.parameters()] == ids
    assert [p.data_ptr() for p in params] == addresses
    for i, p in enumerate(params):
        assert not torch.equal(p, before[i])
        assert torch.equal(aliases[i], p)
        assert torch.equal(aliases[len(params) + i].view_as(p), p)
        np.testing.assert_array_equal(arrays[i], p.detach().numpy())


def test_an_alias_made_before_the_first_step_sees_the_updates():
    models, opts = pair()
    held = [p.detach() for p in models[1].parameters()]  # so that the storage may not move
    for model, opt in zip(models, opts, strict=True):
        train(model, opt)
    assert_equal(*models)
    for p, alias in zip(models[1].parameters(), held, strict=True):
        assert torch.equal(p, alias)
        assert p.data_ptr() == alias.data_ptr()


def test_state_views_stay_live_and_in_place():
    """Donation happens although torch holds tensors over the buffers: the same memory, written in place."""
    model, opt = trained()
    p = next(model.parameters())
    exp_avg = opt.state[p]["exp_avg"]
    address, value = exp_avg.data_ptr(), exp_avg.clone()
    train(model, opt, 2)
    assert opt.state[p]["exp_avg"] is exp_avg
    assert exp_avg.data_ptr() == address
    assert not torch.equal(exp_avg, value)
    assert opt.state[p]["step"].item() == 5


def test_the_program_aliases_every_buffer_and_makes_no_array():
    _model, opt = trained()
    (bucket,), (update,) = opt._plan.buckets, opt._plan._compiled[False, False].updates
    memory = update.compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(b.array.nbytes for b in bucket.buffers)
    # Coefficients: a vector for each row of the shared buffers, a few numbers for each leaf.
    coefficients = 4 * len(bucket.spec.columns) * (bucket.spec.rows + len(bucket.leaves))
    assert memory.temp_size_in_bytes < 2 * coefficients + 4096


def test_version_counter_guards_backward():
    for module in (torch.optim, optim):
        model = network()
        opt = module.SGD(model.parameters(), lr=0.1)
        backward(model)
        for _ in range(2):  # the step that adopts the parameters, and one after it
            p = model[0].weight
            loss = (p**2).sum()
            opt.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_gradients_are_not_written():
    model, opt = trained()
    backward(model)
    grads = [p.grad.clone() for p in model.parameters()]
    versions = [p.grad._version for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [p.grad._version for p in model.parameters()] == versions


def test_gradients_do_not_outlive_zero_grad():
    model, opt = trained()
    backward(model)
    opt.step()
    gone = weakref.ref(model[0].weight.grad)
    opt.zero_grad()
    gc.collect()
    assert gone() is None


# --- asynchronous dispatch


def test_nothing_reads_gradients_after_step_returns():
    """JAX on CPU returns before it has computed; a torch write right after must not be seen."""
    p = torch.nn.Parameter(torch.zeros(2**22))
    opt = optim.SGD([p], lr=1.0)
    p.grad = torch.ones_like(p)
    for i in range(30):
        p.grad.fill_(1.0)
        opt.step()
        p.grad.fill_(1e9)
        assert p.min() == p.max() == -(i + 1)


# --- kinds of parameters


def make_parameter(kind):
    torch.manual_seed(0)
    base = torch.randn(24, 50)
    if kind == "contiguous":
        return torch.nn.Parameter(base.clone())
    if kind == "transposed":
        return torch.nn.Parameter(base.clone().t())
    if kind == "channels_last":
        return torch.nn.Parameter(base.view(4, 6, 10, 5).clone(memory_format=torch.channels_last))
    if kind == "strided":
        return torch.nn.Parameter(base.clone()[:, ::2])
    if kind == "view at an odd offset":
        return torch.nn.Parameter(torch.cat([torch.zeros(1), base.flatten()])[1:].view(24, 50))
    if kind == "shared memory":
        return torch.nn.Parameter(base.clone().share_memory_())
    if kind == "big view":
        return torch.nn.Parameter(torch.randn(2 * HOST.big + 3)[3:])
    if kind == "empty":
        return torch.nn.Parameter(torch.zeros(0, 3))
    if kind == "scalar":
        return torch.nn.Parameter(torch.tensor(1.5))
    if kind == "complex":
        return torch.nn.Parameter(torch.randn(20, dtype=torch.complex64))
    raise ValueError(kind)


KINDS = [
    "contiguous",
    "transposed",
    "channels_last",
    "strided",
    "view at an odd offset",
    "shared memory",
    "big view",
    "empty",
    "scalar",
    "complex",
]


@pytest.mark.parametrize("grad_kind", ["as it comes", "transposed", "expanded", "unaligned", "conjugated"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_parameters_and_gradients(kind, grad_kind):
    results = []
    for module in (torch.optim, optim):
        p = make_parameter(kind)
        storage, strides = p.untyped_storage().data_ptr(), p.stride()
        opt = module.AdamW([p], lr=0.1, amsgrad=True)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if grad_kind == "transposed":
                grad = grad.mT.contiguous().mT if grad.ndim > 1 else grad
            elif grad_kind == "expanded":
                grad = torch.ones((), dtype=p.dtype).expand(p.shape)
            elif grad_kind == "unaligned":
                grad = torch.cat([torch.zeros(1, dtype=p.dtype), grad.flatten()])[1:].view(p.shape)
            elif grad_kind == "conjugated":
                grad = grad.conj() if module is optim else grad.conj().resolve_conj()  # torch's step cannot
            p.grad = grad
            opt.step()
        assert p.stride() == strides
        if module is optim and kind not in ("contiguous", "scalar", "complex"):
            assert p.untyped_storage().data_ptr() == storage  # left where it is
        results.append((p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}))
    (a, s), (b, t) = results
    assert (
        cases.difference(torch.view_as_real(b) if b.is_complex() else b, torch.view_as_real(a) if a.is_complex() else a)
        <= 2e-6
    )
    for name in s:
        assert cases.difference(t[name].resolve_conj(), s[name].resolve_conj()) <= 2e-6


def test_float64_models_with_x64_off():
    assert not jax.config.jax_enable_x64
    models, opts = pair("Adam", torch.float64)
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 50)
    assert_equal(*models)
    assert opts[1]._plan.buckets[0].buffers[0].array.dtype == np.float64
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("module", [torch.optim, optim])
def test_tied_and_overlapping_parameters(module):
    """Two parameters over the same memory are stepped one after the other; over parts of it, independently."""
    flat = torch.ones(100)
    halves = [torch.nn.Parameter(flat[:50]), torch.nn.Parameter(flat[50:])]
    tied = [torch.nn.Parameter(flat[:50]), torch.nn.Parameter(flat[20:40])]
    opt = module.SGD([*halves, *tied], lr=0.25, weight_decay=0.5)
    for p in (*halves, *tied):
        p.grad = torch.ones_like(p)
    opt.step()

    def step(x):
        return x - 0.25 * (1 + 0.5 * x)

    once, twice, thrice = step(1.0), step(step(1.0)), step(step(step(1.0)))
    np.testing.assert_allclose(flat[50:], once)
    np.testing.assert_allclose(flat[:20], twice)
    np.testing.assert_allclose(flat[20:40], thrice)
    np.testing.assert_allclose(flat[40:50], twice)


@pytest.mark.parametrize("change", ["data", "swap back and forth", "load_state_dict", "load assign", "double", "share"])
def test_storage_exchanged_between_steps(change):
    models, opts = pair("Adam")
    other = network(seed=5)
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 2)
        if change == "data":
            model[0].weight.data = other[0].weight.detach().clone()
            model[2].bias.data = other[2].bias.detach().clone()
        elif change == "swap back and forth":
            shadow = [p.detach().clone() for p in other.parameters()]
            for i in range(3):
                for j, p in enumerate(model.parameters()):
                    p.data, shadow[j] = shadow[j], p.data
                train(model, opt, 1 + i)
        elif change == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif change == "load assign":
            model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
            opt.param_groups[0]["params"] = list(model.parameters())
            opt.state.clear()
        elif change == "double":
            model.double().float()
        elif change == "share":
            model.share_memory()
        train(model, opt, 3)
        if change == "share":
            assert all(p.is_shared() for p in model.parameters())
    assert_equal(*models)


def test_storages_exchanged_into_an_overlap():
    """Parameters that come to share memory later are noticed too."""
    results = []
    for module in (torch.optim, optim):
        a, b = (torch.nn.Parameter(torch.ones(10)) for _ in range(2))
        opt = module.SGD([a, b], lr=0.25, weight_decay=1.0)
        for _ in range(2):
            a.grad, b.grad = torch.ones(10), torch.ones(10)
            opt.step()
            b.data = a.data
        results.append(a.detach().clone())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("module", [torch.optim, optim])
def test_parameters_over_foreign_memory_stay_there(module):
    """NumPy's memory, say, or a shared block: its other owners see the updates."""
    first, second, block = np.ones(4, np.float32), np.ones(4, np.float32), bytearray(16)
    p = torch.nn.Parameter(torch.from_numpy(first))
    q = torch.nn.Parameter(torch.frombuffer(block, dtype=torch.float32))
    exchanged = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    opt = module.SGD([p, q, *exchanged], lr=0.5)
    new = [np.ones(4, np.float32) for _ in exchanged]
    for i in range(2):
        for x in (p, q, *exchanged):
            x.grad = torch.ones(4)
        opt.step()
        if i == 0:
            for x, a in zip(exchanged, new, strict=True):
                x.data = torch.from_numpy(a)
    assert first.tolist() == [0.0] * 4
    assert np.frombuffer(block, np.float32).tolist() == [-1.0] * 4
    assert [a.tolist() for a in new] == [[0.5] * 4] * 2
    assert second.tolist() == [1.0] * 4


@pytest.mark.parametrize("shape", [(256, 200), (2, 2), (3, 5)])
def test_another_layout_at_the_same_address(shape):
    results = []
    for module in (torch.optim, optim):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(shape))
        opt = module.SGD([p], lr=1.0)
        p.grad = torch.randn(shape, generator=generator)
        opt.step()
        p.grad = None
        p.data = p.data.t()
        p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results)


# --- gradients that come and go


def test_frozen_and_absent_parameters_compile_nothing_new():
    models, opts = pair("AdamW")
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 1)
    before = compilations()

    for model, opt in zip(models, opts, strict=True):

        def hook(i, model=model):
            for j, p in enumerate(model.parameters()):
                if (i >> j) & 1:
                    p.grad = None

        train(model, opt, 16, hook)  # every pattern
        model[0].requires_grad_(False)
        train(model, opt, 2)
    assert compilations() == before
    assert_equal(*models)
    steps = [[opt.state[p]["step"].item() for p in m.parameters()] for m, opt in zip(models, opts, strict=True)]
    assert steps[0] == steps[1]


def test_parameters_that_never_had_a_gradient_have_no_state():
    model = network()
    model[0].requires_grad_(False)
    opt = optim.AdamW(model.parameters())
    train(model, opt, 2)
    assert len(opt.state) == 2
    assert len(opt._plan.leaves) == 2
    before = compilations()
    model[0].requires_grad_(True)
    train(model, opt, 2)
    assert len(opt.state) == 4
    assert compilations() <= before + 1
    assert opt.state[model[0].weight]["step"].item() == 2
    assert opt.state[model[2].weight]["step"].item() == 4


def test_no_gradients_at_all_is_a_no_op():
    model = network()
    opt = optim.AdamW(model.parameters())
    opt.step()
    assert not opt.state


def test_one_compilation_serves_all():
    """Other numbers, a second optimizer, a copy, a reloaded state: the program is the same."""
    model, opt = trained()
    before = compilations()
    for i in range(4):
        group = opt.param_groups[0]
        group.update(lr=0.1 / (i + 1), betas=(0.5 + 0.1 * i, 0.9), eps=1e-6 * (i + 1), weight_decay=0.1 * (i + 1))
        train(model, opt, 1)
    trained(lr=0.5)
    second = copy.deepcopy((model, opt))
    train(*second)
    opt.load_state_dict(opt.state_dict())
    train(model, opt)
    assert compilations() == before
    opt.param_groups[0]["maximize"] = True  # a flag is another program, once
    train(model, opt)
    opt.param_groups[0]["maximize"] = False
    train(model, opt)
    opt.param_groups[0]["maximize"] = True
    train(model, opt)
    assert compilations() <= before + 1


# --- state


@pytest.mark.parametrize("name", ["AdamW", "RAdam", "ASGD"])
def test_leaves_at_different_steps_and_in_different_groups_have_their_own_coefficients(name):
    models, opts = pair(name, torch.float64)
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 2)
        params = list(model.parameters())
        opt.param_groups[0]["params"] = params[:2]
        opt.add_param_group({"params": params[2:], "lr": 0.003, "weight_decay": 0.1})
        train(model, opt, 2)
        opt.state[params[0]]["step"].fill_(11.0)  # in place: a tensor that the step has written itself
        train(model, opt, 2)
        opt.state[params[3]]["step"].add_(5)
        train(model, opt, 2)
        assert [opt.state[p]["step"].item() for p in params[:4]] == [15, 8, 8, 13]
    assert_equal(*models)


def test_edits_of_the_state_are_seen():
    models, opts = pair("AdamW")
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 2)
        p, q = list(model.parameters())[:2]
        opt.state[p]["exp_avg"].mul_(3)  # in place
        opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"] * 2  # exchanged
        opt.state[p]["step"] = torch.tensor(7.0)
        opt.state[p]["note"] = "kept"
        del opt.state[q]  # begins anew
        train(model, opt, 2)
        assert opt.state[p]["note"] == "kept"
        assert opt.state[p]["step"].item() == 9
        assert opt.state[q]["step"].item() == 2
    assert_equal(*models)


@cases.parametrize(
    [
        c
        for c in cases.TORCH_CASES
        if c.id in ("sgd-dampening", "adam-amsgrad", "rmsprop-centered-momentum", "adafactor-l2")
    ]
)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoints_cross(case, direction):
    """Train here, go on there: equal to never having changed."""
    (m1, m2), (o1, _o2) = pair(case.torch, torch.float64, lr=case.lr, **case.arguments)
    train(m1, o1, 6)
    modules = (torch.optim, optim) if direction == "from torch" else (optim, torch.optim)
    first = getattr(modules[0], case.torch)(m2.parameters(), lr=case.lr, **case.arguments)
    train(m2, first, 3)
    file = io.BytesIO()
    torch.save({"model": m2.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    m3 = network(torch.float64, seed=9)
    second = getattr(modules[1], case.torch)(m3.parameters(), lr=1.0, **case.arguments)
    m3.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    for i in range(3, 6):
        second.zero_grad()
        backward(m3, i)
        second.step()
    assert_equal(m1, m3)


def test_saving_one_parameter_writes_that_one():
    model, opt = trained()
    for x in (model[2].bias, opt.state[model[2].bias]["exp_avg"], opt.state[model[2].bias]["step"]):
        file = io.BytesIO()
        torch.save(x.detach(), file)
        assert len(file.getvalue()) < 2500
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_are_independent(copied):
    model, opt = trained()
    duplicate = (lambda x: pickle.loads(pickle.dumps(x))) if copied == "pickle" else copy.deepcopy
    model2, opt2 = duplicate((model, opt))
    values = [p.detach().clone() for p in model.parameters()]
    for a, b in ((model, opt), (model2, opt2)):
        train(a, b, 3)
        if a is model:
            assert all(torch.equal(p, v) for p, v in zip(model2.parameters(), values, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), model2.parameters(), strict=True))


def test_a_freed_optimizer_leaves_its_parameters():
    model, opt = trained()
    values = [p.detach().clone() for p in model.parameters()]
    moment = opt.state[model[0].weight]["exp_avg"]
    value = moment.clone()
    del opt
    gc.collect()
    torch.randn(2**20)  # something to land in freed memory
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    assert torch.equal(moment, value)
    train(model, optim.SGD(model.parameters(), lr=0.1), 2)


def test_memory_goes_with_the_last_view():
    model = torch.nn.Linear(2**10, 2**10)
    opt = optim.AdamW(model.parameters())
    model(torch.ones(1, 2**10)).sum().backward()
    opt.step()
    held = weakref.ref(opt._plan.buckets[0].buffers[0])
    view = model.weight.detach()
    del model, opt
    gc.collect()
    assert held() is not None
    assert torch.isfinite(view).all()
    del view
    gc.collect()
    assert held() is None


def test_float32_state_of_bfloat16_parameters_survives_load():
    """torch rounds it to the parameter's type; here it stays, and the step is computed in it."""
    model = network(torch.bfloat16)
    saved = torch.optim.AdamW(network(torch.float32).parameters())
    backward_model = network(torch.float32)
    saved = torch.optim.AdamW(backward_model.parameters())
    train(backward_model, saved, 3)
    opt = optim.AdamW(model.parameters())
    opt.load_state_dict(saved.state_dict())
    p, q = model[0].weight, backward_model[0].weight
    assert opt.state[p]["exp_avg"].dtype is torch.float32
    assert torch.equal(opt.state[p]["exp_avg"], saved.state[q]["exp_avg"])
    train(model, opt, 2)
    assert opt.state[p]["exp_avg"].dtype is torch.float32
    assert p.dtype is torch.bfloat16


def test_loading_does_not_share_storage_with_the_source():
    (m1, m2), (o1, o2) = pair()
    train(m1, o1, 2)
    o2.load_state_dict(o1.state_dict())
    value = o1.state[m1[0].weight]["exp_avg"].clone()
    train(m2, o2, 2)
    assert torch.equal(o1.state[m1[0].weight]["exp_avg"], value)


def test_swapped_state_is_read_before_it_is_written():
    results = []
    for module in (torch.optim, optim):
        p, q = (torch.nn.Parameter(torch.full((4,), x)) for x in (1.0, 2.0))
        opt = module.Adam([p, q], lr=0.1)
        for i in range(4):
            p.grad, q.grad = torch.full((4,), 1.0 + i), torch.full((4,), -3.0)
            opt.step()
            if i == 1:
                opt.state[p], opt.state[q] = opt.state[q], opt.state[p]
        results.append(torch.stack([p.detach(), q.detach()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reset", ["clear", "load"])
def test_state_reset_begins_anew(reset):
    """SGD's first step with momentum is undamped, again after its state is gone."""
    results = []
    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.ones(4))
        opt = module.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
        initial = copy.deepcopy(opt.state_dict())
        for i in range(6):
            p.grad = torch.ones(4)
            opt.step()
            if i == 2:
                opt.state.clear() if reset == "clear" else opt.load_state_dict(initial)
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_deleted_state_of_a_parameter_without_gradient_stays_deleted():
    model, opt = trained()
    p = model[0].weight
    del opt.state[p]
    model[0].requires_grad_(False)
    p.grad = None
    opt.param_groups[0]["maximize"] = True  # the plan is made anew
    opt.zero_grad()
    backward(model)
    p.grad = None
    opt.step()
    assert p not in opt.state


def test_load_hooks_are_obeyed():
    for module in (torch.optim, optim):
        model = network()
        opt = module.AdamW(model.parameters())
        train(model, opt, 2)
        saved = {"wrapped": copy.deepcopy(opt.state_dict())}
        opt.register_load_state_dict_pre_hook(lambda _, x: x["wrapped"])
        opt.register_load_state_dict_post_hook(lambda o: o.state.clear())
        opt.load_state_dict(saved)
        assert not opt.state
        assert len(opt._optimizer_load_state_dict_pre_hooks) == 1


def test_a_state_of_another_shape_is_refused_before_anything_changes():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = optim.Adam([p, q], lr=0.1)
    for bad, text in ((torch.zeros(5), "found shape .5,."), (1.0, "found float 1.0")):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        opt.step()
        value, opt.state[q]["exp_avg"] = p.detach().clone(), bad
        with pytest.raises(ValueError, match=r"params'\]\[1\]: expected its state 'exp_avg' of .* shape .4,., " + text):
            opt.step()
        assert torch.equal(p, value)
        del opt.state[q]


# --- torch around it


def test_inside_torch_compile():
    models, opts = pair("AdamW")
    for model, opt in zip(models, opts, strict=True):

        def step(i, model=model, opt=opt):
            opt.zero_grad()
            backward(model, i)
            opt.step()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Dynamo says of the graph breaks
            compiled = torch.compile(step, backend="eager")
            for i in range(3):
                compiled(i)
    assert_equal(*models)


def test_inference_mode_and_grad_modes():
    models, opts = pair("SGD")
    for model, opt in zip(models, opts, strict=True):
        backward(model)
        with torch.enable_grad():
            opt.step()
        opt.zero_grad()
        backward(model)
        opt.step()
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert_equal(*models)


def test_jax_settings_do_not_reach_the_step():
    model, opt = trained()
    with jax.transfer_guard("disallow"), jax.disable_jit(), jax.numpy_dtype_promotion("strict"):
        train(model, opt, 2)
    with enable_x64(True):
        train(model, opt, 2)
    jax.clear_caches()
    p = next(model.parameters())
    address = p.data_ptr()
    train(model, opt, 2)
    assert p.data_ptr() == address
    assert opt.state[p]["step"].item() == 9


def test_debug_nans_does_not_free_the_parameters():
    model, opt = trained()
    with jax.debug_nans(True), jax.debug_infs(True):
        backward(model)
        model[2].bias.grad[0] = float("nan")
        opt.step()
        other = torch.nn.Parameter(torch.ones(777))
        other.grad = torch.zeros(777)
        optim.Adam([other], eps=0.0).step()  # 0 / 0, as with torch
    assert model[2].bias.isnan().sum() == 1
    assert torch.isfinite(model[0].weight).all()
    assert other.isnan().all()


def test_threads_compile_side_by_side():
    from jax._src import compiler

    original = compiler.get_compile_options
    params = [torch.nn.Parameter(torch.ones(1000 + i)) for i in range(4)]

    def first_step(p):
        p.grad = torch.ones_like(p)
        optim.AdamW([p], lr=0.1).step()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(first_step, params))
    assert compiler.get_compile_options is original
    assert all(torch.allclose(p, torch.tensor(0.899)) for p in params)


def test_an_interrupted_first_step_can_be_taken_again(monkeypatch, stepped_by):
    """Nothing moves before every program is compiled."""
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = optim.SGD([p, q], lr=0.1, momentum=0.9, dampening=0.5)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    compile_one, calls = eager.Update if stepped_by == "operations" else program.compile_update, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compile_one(*args)

    monkeypatch.setattr(eager, "Update", interrupted)
    monkeypatch.setattr(CompiledStep, "compile_update", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert not opt.state
    opt.step()
    assert torch.allclose(p, torch.tensor(0.9))
    assert torch.allclose(q, torch.tensor(0.9, dtype=torch.float64))


def test_every_waiting_signal_is_delivered():
    seen = []

    def terminate(*_):
        seen.append("TERM")

    # A background job starts with SIGINT ignored: set both.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
    }
    try:
        with pytest.raises(KeyboardInterrupt), host.SignalsWait():  # noqa: PT012 - what it waits for
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert not seen
        assert seen == ["TERM"]
        assert signal.getsignal(signal.SIGTERM) is terminate
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_memory_cannot_be_resized_away():
    model, _ = trained()
    with pytest.raises(RuntimeError, match="not resizable"):
        model[0].weight.untyped_storage().resize_(0)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_gradient_without_memory(steps):
    p = torch.nn.Parameter(torch.ones(200, 300))
    opt = optim.SGD([p], lr=0.5)
    for _ in range(steps):
        p.grad = torch.ones(200, 300)
        opt.step()
    p.grad = torch.ones(200, 300)
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="gradient with its values in memory"):
        opt.step()
    assert torch.equal(p, torch.full((200, 300), 1 - 0.5 * steps))


def subprocess_run(code, **environment):
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
    )


def test_a_forked_child_is_told_rather_than_hung():
    result = subprocess_run(
        """
        import os, torch
        from interop import optim
        p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
        by_torch, by_program = optim.SGD([p], lr=0.1), optim.SGD([q], lr=0.1, max_norm=10.0)
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        by_torch.step()
        by_program.step()
        pid = os.fork()
        if pid == 0:
            by_torch.step()
            torch.testing.assert_close(p.data, torch.full((3,), 0.8))
            try:
                by_program.step()
            except RuntimeError as error:
                os._exit(7 if "forked child" in str(error) and q.sum() < 3 else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        by_torch.step()
        by_program.step()
        """
    )
    assert result.returncode == 0, result.stderr


def test_interrupts_lose_no_memory():
    """KeyboardInterrupt at any moment of a step: the parameters stay readable, the next step works."""
    result = subprocess_run(
        """
        import random, signal, torch
        from interop import optim
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.ones(2**18)); small = torch.nn.Parameter(torch.ones(5))
        opt = optim.AdamW([p, small], lr=1e-4)
        p.grad, small.grad = torch.ones_like(p), torch.ones_like(small)
        opt.step()
        random.seed(0)
        interrupted = 0
        for _ in range(400):
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 2e-3))
                for _ in range(10):
                    opt.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert p.min() == p.max() and small.min() == small.max()
            assert 0 < p[0] < 1 and torch.isfinite(p).all()
            assert all(not b.array.is_deleted() for b in opt._plan.buckets[0].buffers)
        assert interrupted > 100, interrupted
        opt.step()
        """
    )
    assert result.returncode == 0, result.stderr


# --- bad input


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda o: o.Adam([torch.ones(2)], lr=-1), ValueError, "Invalid learning rate: -1"),
        (
            lambda o: o.Adam([torch.nn.Parameter(torch.ones(2))], lr=float("nan")),
            ValueError,
            "Invalid learning rate: nan",
        ),
        (lambda o: o.Adam([torch.nn.Parameter(torch.ones(2))], betas=(1.0, 0.9)), ValueError, "Invalid beta parameter"),
        (lambda o: o.AdamW([torch.nn.Parameter(torch.ones(2))], eps=-1), ValueError, "Invalid epsilon value: -1"),
        (lambda o: o.SGD([torch.nn.Parameter(torch.ones(2))], nesterov=True), ValueError, "Nesterov momentum requires"),
        (lambda o: o.RMSprop([torch.nn.Parameter(torch.ones(2))], alpha=-1), ValueError, "Invalid alpha value: -1"),
        (lambda o: o.Adam([torch.nn.Parameter(torch.ones(2))], lr="0.1"), TypeError, "not supported between"),
        (lambda o: o.Adam([]), ValueError, "optimizer got an empty parameter list"),
        (lambda o: o.Adam(torch.ones(2)), TypeError, "should be an iterable of Tensors or dicts"),
        (lambda o: o.Adam([1.0]), TypeError, "optimizer can only optimize Tensors"),
        (lambda o: o.Adam([torch.ones(2, requires_grad=True) * 2]), ValueError, "can't optimize a non-leaf Tensor"),
    ],
)
def test_torchs_own_errors(make, error, text):
    for module in (torch.optim, optim):
        with pytest.raises(error, match=text):
            make(module)


def test_duplicate_parameters():
    p = torch.nn.Parameter(torch.ones(2))
    for module in (torch.optim, optim):
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            module.SGD([{"params": [p]}, {"params": [p]}])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            module.SGD([p, p])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adadelta", "RMSprop", "Rprop", "ASGD"])
def test_sparse_gradients_raise_as_torch_does(name):
    texts = []
    for module in (torch.optim, optim):
        good, p = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 2))
        opt = getattr(module, name)([good, p])
        good.grad, p.grad = torch.ones(2), torch.eye(3, 2).to_sparse()
        with pytest.raises(RuntimeError) as raised:
            opt.step()
        texts.append(str(raised.value))
        if module is optim:
            assert good.tolist() == [1, 1]
            assert not opt._plan  # before anything changed
    assert texts[0] == texts[1]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch says so once of any sparse tensor it makes
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_are_taken_where_torch_takes_them(name):
    results = []
    for module in (torch.optim, optim):
        embedding = torch.nn.Embedding(10, 4, sparse=True)
        torch.nn.init.ones_(embedding.weight)
        arguments = dict(momentum=0.9) if name == "SGD" else {}
        opt = getattr(module, name)(embedding.parameters(), lr=0.1, **arguments)
        for i in range(3):
            opt.zero_grad()
            embedding(torch.tensor([i, i, 3])).pow(2).sum().backward()
            opt.step()
        results.append(embedding.weight.detach())
    torch.testing.assert_close(*results)


def test_adagrad_refuses_sparse_gradients_with_weight_decay():
    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.ones(3, 2))
        p.grad = torch.eye(3, 2).to_sparse()
        with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
            module.Adagrad([p], weight_decay=0.1).step()


def test_integer_parameters_without_gradient_are_passed_over():
    count, p = torch.zeros(2, dtype=torch.int64), torch.nn.Parameter(torch.ones(2))
    opt = optim.SGD([count, p], lr=0.5)
    p.grad = torch.ones(2)
    opt.step()
    assert count.tolist() == [0, 0]
    assert p.tolist() == [0.5, 0.5]


def test_differentiable_is_refused():
    model = network()
    with pytest.raises(NotImplementedError, match="differentiable=True would need torch's autograd"):
        optim.Adam(model.parameters(), differentiable=True)


def test_meta_parameters_are_refused():
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones(2, device="meta")
    with pytest.raises(TypeError, match="found the meta device, which holds no values"):
        optim.SGD([p]).step()


def test_unsupported_types_are_named():
    p = torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
    p.grad = torch.ones(2).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"expected one of torch.float16, .*, found torch.float8_e4m3fn"):
        optim.SGD([p]).step()


def test_a_model_converted_under_its_optimizer_is_named():
    model, opt = trained()
    model.double()
    backward(model)
    with pytest.raises(
        TypeError, match=r"params'\]\[0\]: expected its state 'exp_avg' in the parameter's type torch.float64"
    ):
        train(model, opt, 1)


# --- optimizers of whole tensors


def step_with(cls, params, grads, steps=3, **arguments):
    ps = [torch.nn.Parameter(p.clone()) for p in params]
    opt = cls(ps, **arguments)
    for _ in range(steps):
        for p, g in zip(ps, grads, strict=True):
            p.grad = None if g is None else g.clone()
        opt.step()
    return ps, opt


SHAPES = [(), (1,), (0,), (5,), (0, 3), (1, 1), (3, 7), (7, 3), (3, 7), (2, 3, 4), (2, 3, 4, 5), (300, 200)]


def test_adafactor_of_every_shape():
    generator = torch.Generator().manual_seed(0)
    params, grads = ([torch.randn(s, generator=generator) for s in SHAPES if 0 not in s] for _ in range(2))
    grads[3] = None
    (ps, a), (qs, b) = (
        step_with(m.Adafactor, params, grads, lr=0.1, weight_decay=0.1, maximize=True) for m in (torch.optim, optim)
    )
    for p, q in zip(ps, qs, strict=True):
        assert cases.difference(q.detach(), p.detach()) <= 1e-6
        assert list(b.state.get(q, {})) == list(a.state.get(p, {}))
        for name, x in a.state.get(p, {}).items():
            assert b.state[q][name].shape == x.shape
            assert cases.difference(b.state[q][name], x) <= 1e-6


def test_empty_tensors_of_whole_tensor_optimizers():
    empty = [torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0)]
    for name, params in (("Adafactor", empty), ("Muon", empty[1:])):
        ps, opt = step_with(getattr(optim, name), [*params, torch.ones(2, 2)], [*params, torch.ones(2, 2)])
        assert [p.shape for p in ps[:-1]] == [p.shape for p in params]
        assert torch.isfinite(ps[-1]).all()
        assert (ps[-1] < 1).all()
        assert all(opt.state[p] for p in ps)


def test_adafactors_eps_is_of_each_parameters_type():
    """torch gives a float32 parameter the bfloat16 epsilon of one before it; here the order says nothing."""
    low, high = torch.ones(4, dtype=torch.bfloat16), torch.ones(4)
    small = 1e-4 * torch.ones(4)  # beside bfloat16's epsilon of 2^-7 it counts for less than by itself
    alone, _ = step_with(torch.optim.Adafactor, [high], [small], lr=0.1)
    after, _ = step_with(optim.Adafactor, [low, high], [small.bfloat16(), small], lr=0.1)
    torchs, _ = step_with(torch.optim.Adafactor, [low, high], [small.bfloat16(), small], lr=0.1)
    assert cases.difference(after[1].detach(), alone[0].detach()) <= 1e-6
    assert cases.difference(torchs[1].detach(), alone[0].detach()) > 0.1


def test_muons_buffer_is_kept_in_bfloat16_without_nesterov():
    """torch normalizes it in place: its norm comes out as 1."""
    grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    start = torch.zeros(16, 16, dtype=torch.bfloat16)
    for cls, kept in ((torch.optim.Muon, False), (optim.Muon, True)):
        ps, opt = step_with(cls, [start], [grad], steps=1, nesterov=False)
        buffer = opt.state[ps[0]]["momentum_buffer"].float()
        assert torch.allclose(buffer, 0.05 * grad.float(), rtol=2**-7) == kept


@pytest.mark.parametrize("dtype", cases.mostly_slow(["float64", "float32", "bfloat16"], ["bfloat16"]))
def test_muon_of_many_matrices_is_torchs_of_each(dtype, monkeypatch):
    """Those of a shape and group together, but no more than caches hold; small ones alone, and one without gradient.

    Unlike jopt.muon, whose products XLA sums in another order, within what all optimizers are held to.
    """
    monkeypatch.setattr(leaf_module, "STACKED", 2 * 24 * 40)
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (16, 8), (3, 1), (16, 70), (70, 16), (24, 40), (40, 24), (32, 32), (1, 300)] * 5
    params, grads = (
        [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes] for _ in range(2)
    )
    results = []
    for module in (optim, torch.optim):
        ps = [torch.nn.Parameter(p.clone()) for p in params]
        groups = [
            {"params": ps[:20], "lr": 0.1},
            {"params": ps[20:40], "lr": 0.01, "ns_coefficients": (3.0, -4.0, 2.0), "adjust_lr_fn": "match_rms_adamw"},
            {"params": ps[40:], "lr": 0.01, "ns_steps": 2, "nesterov": True, "weight_decay": 0.5},
        ]
        opt = module.Muon(groups)
        for i in range(3):
            for j, (p, grad) in enumerate(zip(ps, grads, strict=True)):
                p.grad = None if j == 5 or (j == 14 and i) else grad * (i + 1)
            opt.step()
        results.append((ps, opt))
    (ours, opt), (theirs, reference) = results
    together = {(leaf.shape, len(bucket.leaves)) for bucket in opt._plan.buckets for leaf in bucket.leaves}
    assert {((24, 40), 2), ((24, 40), 1), ((32, 32), 1), ((16, 8), 3)} <= together
    assert torch.equal(ours[5], params[5])
    for p, q in zip(ours, theirs, strict=True):
        assert cases.difference(p.detach().double(), q.detach().double()) <= cases.TOLERANCES[dtype]
        for name, x in reference.state[q].items():
            assert cases.difference(opt.state[p][name].double(), x.double()) <= cases.TOLERANCES[dtype]


def test_muon_in_autocast():
    """The products of its iteration are torch's operations, which that reaches."""
    generator = torch.Generator().manual_seed(0)
    params, grads = ([torch.randn(24, 40, generator=generator) for _ in range(2)] for _ in range(2))
    plain, _ = step_with(optim.Muon, params, grads, steps=2)
    with torch.autocast("cpu", torch.float16):
        cast, _ = step_with(optim.Muon, params, grads, steps=2)
    assert all(torch.equal(p, q) for p, q in zip(cast, plain, strict=True))


def test_muon_of_many_matrices_is_that_of_a_few_at_a_time(monkeypatch):
    """Three at once and the one that is left over; on CPU alone, as what the others lower to shows."""
    generator = torch.Generator().manual_seed(0)
    params, grads = ([torch.randn(8, 16, generator=generator) for _ in range(7)] for _ in range(2))
    monkeypatch.setattr(leaf_module, "STACKED", 3 * 8 * 16 + 1)
    tx = jopt.muon(lr=0.1)
    arrays = [[jax.numpy.asarray(x.numpy()) for x in xs] for xs in (grads, params)]
    traced = jax.jit(tx.step).trace(arrays[0], tx.init(arrays[1]), arrays[1])
    for platform, loops in (("cpu", 3), ("tpu", 1), ("cuda", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.while") == loops, platform
    ours, _ = jax.jit(tx.step)(arrays[0], tx.init(arrays[1]), arrays[1])
    theirs, _ = step_with(torch.optim.Muon, params, grads, steps=1, lr=0.1)
    for p, q in zip(ours, theirs, strict=True):
        assert cases.difference(torch.from_numpy(np.array(p)), q.detach()) <= cases.MUON["float32"]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (dict(ns_steps=100), ValueError, "Number of steps must be less than 100 for computational efficiency"),
        (dict(ns_coefficients=(1.0, 2.0)), ValueError, "Coefficients must be a tuple of exactly 3 values"),
        (dict(adjust_lr_fn="other"), ValueError, "Adjust learning rate function other is not supported"),
    ],
)
def test_muons_late_errors(edit, error, message):
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    opt = optim.Muon([p])
    opt.param_groups[0].update(edit)
    with pytest.raises(error, match=message):
        opt.step()
    assert torch.equal(p, torch.ones(2, 2))
    assert not opt.state


def test_parameters_that_are_not_stepped():
    z = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    for name in ("Adafactor", "Muon"):
        opt = getattr(optim, name)([z])
        with pytest.raises(RuntimeError, match=rf"{name} does not support complex parameters: param_groups\[0\]"):
            opt.step()
    opt = optim.Muon([torch.nn.Parameter(torch.ones(2, 2))])
    vector = torch.nn.Parameter(torch.ones(2))
    vector.grad = torch.ones(2)
    opt.add_param_group({"params": [vector]})
    with pytest.raises(ValueError, match="Muon only supports 2D parameters whereas we found a parameter with size"):
        opt.step()


def test_adafactors_nan_stays_where_it_is():
    """torch takes the largest of Python numbers: max(1.0, nan) is 1.0."""
    bad = torch.ones(4)
    bad[0] = torch.nan
    for params, grads in (([torch.ones(4)], [bad]), ([bad.reshape(2, 2)], [torch.ones(2, 2)])):
        (p,), _ = step_with(torch.optim.Adafactor, params, grads, lr=0.1)
        (q,), _ = step_with(optim.Adafactor, params, grads, lr=0.1)
        assert torch.isnan(p).sum() == torch.isnan(q).sum() == 1
        assert cases.difference(q.detach().nan_to_num(), p.detach().nan_to_num()) <= 1e-6


def test_muons_iterations_as_a_tensor():
    grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    (p,), _ = step_with(torch.optim.Muon, [torch.ones(4, 4)], [grad], ns_steps=torch.tensor(2))
    (q,), _ = step_with(optim.Muon, [torch.ones(4, 4)], [grad], ns_steps=torch.tensor(2))
    assert cases.difference(q.detach(), p.detach()) <= cases.MUON["float32"]
    with pytest.raises(TypeError, match=r"ns_steps: expected an integer, found 3\.0"):
        step_with(optim.Muon, [torch.ones(4, 4)], [grad], ns_steps=3.0)
