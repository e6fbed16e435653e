"""What scripts written for torch.optim rely on beside numbers: errors, kept state, freed models, names, processes."""

import copy
import gc
import inspect
import multiprocessing
import weakref

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from interop import amp, memory, optim  # noqa: E402
from interop.dropin import options  # noqa: E402
from interop.memory.owned import TorchOwned  # noqa: E402
from tests import cases, child  # noqa: E402
from tests.interop.dropin.test_optimizer import network, subprocess_run, train  # noqa: E402

NAMES = optim.CLASSES
COMPILED = [name for name in NAMES if name not in ("LBFGS", "SparseAdam")]
MOMENTUM = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}, "Adam": {"amsgrad": True}}


def stepped(module, name, steps=1, **arguments):
    """A parameter and its optimizer after some steps."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = getattr(module, name)([p], **{"lr": 0.1} | MOMENTUM.get(name, {}) | arguments)

    def closure():
        p.grad = torch.full((3, 2), 0.5)
        if name == "SparseAdam":
            p.grad = p.grad.to_sparse(1)
        return (p**2).sum()

    for _ in range(steps):
        opt.step(closure)
    closure()
    return p, opt, closure


def raised(opt, closure):
    try:
        opt.step(closure)
    except Exception as error:
        return error
    return None


def snapshot(p, opt):
    return copy.deepcopy((p.detach(), opt.state_dict()["state"]))


def assert_unchanged(p, opt, before):
    torch.testing.assert_close(snapshot(p, opt), before, rtol=0, atol=0, equal_nan=True)


# --- numbers and state that are not there


@pytest.mark.parametrize("name", NAMES)
def test_a_number_or_flag_that_is_missing_is_torchs_error(name):
    _, opt, _ = stepped(optim, name)
    for key in set(opt.param_groups[0]) - {"params"}:
        errors = []
        for module in (torch.optim, optim):
            p, opt, closure = stepped(module, name)
            del opt.param_groups[0][key]
            before = snapshot(p, opt)
            errors.append(raised(opt, closure))
            if errors[-1] is not None and module is optim:
                assert_unchanged(p, opt, before)
        if errors[1] is None:  # what chooses among torch's own paths means nothing here, and what it sets by itself
            assert torch.isfinite(p).all()
            assert key in options.EXECUTION or errors[0] is None or key == "initial_accumulator_value"
        else:
            assert type(errors[1]) is KeyError
            assert f"param_groups[0][{key!r}]" in str(errors[1])


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("lr", None, TypeError),
        ("lr", "0.1", TypeError),
        ("lr", [0.1], TypeError),
        ("lr", torch.ones(3), TypeError),
        ("eps", "1e-8", TypeError),
        ("weight_decay", None, TypeError),
        ("betas", None, TypeError),
        ("betas", 0.9, TypeError),
        ("betas", ("a", 0.9), TypeError),
        ("betas", (0.9,), ValueError),
        ("betas", (0.9, 0.9, 0.9), ValueError),
    ],
)
def test_what_is_no_number_is_torchs_error_and_named(key, value, error):
    for module in (torch.optim, optim):
        p, opt, closure = stepped(module, "Adam")
        opt.param_groups[0][key] = value
        before = snapshot(p, opt)
        found = raised(opt, closure)
        assert type(found) is error
    assert f"param_groups[0][{key!r}]" in str(found)
    assert_unchanged(p, opt, before)


NO_NUMBERS = {
    "SGD": {"momentum": None, "dampening": "0", "nesterov": torch.ones(3), "maximize": torch.zeros(2)},
    "RMSprop": {"alpha": [0.9], "eps": torch.ones(2), "centered": torch.ones(2)},
    "Adagrad": {"lr_decay": {}, "eps": 1j},
    "Muon": {"ns_coefficients": (1.0, 2.0), "ns_steps": torch.ones(2), "momentum": "0.9"},
    "Adafactor": {"eps": 1e-3, "d": None, "beta2_decay": (0.8,)},
    "ASGD": {"lambd": "1e-4", "t0": None, "alpha": torch.ones(2)},
    "SparseAdam": {"betas": (0.9,), "eps": None, "maximize": torch.ones(2)},
    "LBFGS": {"max_iter": "20", "tolerance_grad": torch.ones(2), "history_size": None, "line_search_fn": "armijo"},
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_or_flag_is_named_in_any_group(name, steps):
    """Also in a later group; nothing changes, and with the number put back the run goes on."""
    q, opt, closure = stepped(optim, name, 0)
    if name != "LBFGS":
        p = torch.nn.Parameter(torch.ones(3, 2))
        opt.add_param_group({"params": [p]})

    def both():
        loss = closure()
        if name != "LBFGS":
            p.grad = q.grad.clone()
        return loss

    for _ in range(steps):
        opt.step(both)
    both()
    index = len(opt.param_groups) - 1
    for key, value in NO_NUMBERS[name].items():
        kept, opt.param_groups[index][key] = opt.param_groups[index][key], value
        before = snapshot(q, opt)
        assert f"param_groups[{index}]" in str(error := raised(opt, both))
        assert key in str(error)
        assert isinstance(error, TypeError | ValueError | RuntimeError)
        assert_unchanged(q, opt, before)
        opt.param_groups[index][key] = kept
    assert raised(opt, both) is None


def test_lbfgs_names_what_is_no_number():
    _, opt, closure = stepped(optim, "LBFGS")
    opt.param_groups[0]["lr"] = "0.1"
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\]"):
        opt.step(closure)


@pytest.mark.parametrize("values", [(0.1, 1), (np.float32(0.1), np.int64(1)), (torch.tensor([0.1]), True)], ids=str)
def test_numbers_of_any_kind_are_taken(values):
    ps = []
    for module in (torch.optim, optim):
        p, opt, closure = stepped(module, "SGD", momentum=0.9)
        opt.param_groups[0].update(lr=float(values[0]) if module is torch.optim else values[0])
        opt.param_groups[0].update(weight_decay=float(values[1]) if module is torch.optim else values[1])
        opt.step(closure)
        ps.append(p.detach())
    assert torch.equal(*ps)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_that_change_between_steps(seed):
    """Drawn ones of drawn groups, of any kind, one or some at once, flags (0 or not) among them."""
    rng, ps, opts = np.random.default_rng(seed), [], []
    for module in (torch.optim, optim):
        ps.append([torch.nn.Parameter(torch.linspace(-1, 1, n).double()) for n in (3, 40000)])
        opts.append(module.SGD([{"params": [ps[-1][0]]}, {"params": [ps[-1][1]], "lr": 0.2}], lr=0.1, momentum=0.9))
    kinds = (np.float64, torch.tensor, lambda x: torch.tensor([x]))
    for i in range(60):
        for _ in range(rng.integers(3)):
            index, key = rng.integers(2), rng.choice(["lr", "lr", "lr", "momentum", "dampening", "weight_decay"])
            value = float(np.float32(rng.choice([0.0, 0.01, 0.3, 0.5])))  # as float32, a tensor's, holds it
            opts[0].param_groups[index][key] = value
            kind = float if rng.random() < 0.8 else kinds[rng.integers(len(kinds))]
            opts[1].param_groups[index][key] = kind(value)
        for p, q in zip(*ps, strict=True):
            p.grad = torch.full_like(p, (i + 1) / 7)
            q.grad = p.grad.clone()
        for opt in opts:
            opt.step()
        for p, q in zip(*ps, strict=True):
            assert cases.difference(q.detach(), p.detach()) <= cases.TOLERANCES["float64"], i


@pytest.mark.parametrize("name", COMPILED)
def test_a_state_that_lacks_something_is_torchs_error(name):
    _, opt, _ = stepped(torch.optim, name)
    for key in opt.state_dict()["state"][0]:
        errors = []
        for module in (torch.optim, optim):
            p, opt, closure = stepped(module, name)
            if key not in opt.state[p]:
                continue
            del opt.state[p][key]
            before = snapshot(p, opt)
            errors.append(raised(opt, closure))
        assert (errors[0] is None) == (errors[1] is None)
        if errors[1] is not None:
            assert type(errors[1]) is KeyError
            assert f"param_groups[0]['params'][0]: {name} reads its state {key!r}" in str(errors[1])
            assert_unchanged(p, opt, before)


@pytest.mark.parametrize("value", [None, "x", torch.ones(5), torch.ones(3, 2, dtype=torch.complex64)], ids=repr)
@pytest.mark.parametrize("name", ["SparseAdam", "LBFGS"])
def test_a_state_that_does_not_fit_is_named_by_those_that_keep_torchs(name, value):
    """Of another shape or type its memory would be read and written past its end."""
    _, opt, _ = stepped(torch.optim, name, 2)
    for key in opt.state_dict()["state"][0].keys() - ({"al", "prev_loss"} if value is None else {"al"}):
        p, opt, closure = stepped(optim, name, 2)
        opt.state[p][key] = value
        before, calls = p.detach().clone(), []

        def counted(calls=calls, closure=closure):
            calls.append(0)
            return closure()

        with pytest.raises((TypeError, ValueError), match=rf"param_groups\[0\]\['params'\]\[0\].*{key}|old_dirs"):
            opt.step(counted) if name == "LBFGS" else opt.step()
        assert not calls
        assert torch.equal(p, before)


def test_lbfgs_names_what_its_state_lacks():
    for key in ("d", "t", "old_dirs", "H_diag", "prev_flat_grad"):
        errors = []
        for module in (torch.optim, optim):
            p, opt, closure = stepped(module, "LBFGS", 2, max_iter=2)
            del opt.state[p][key]
            errors.append(raised(opt, closure))
        assert type(errors[0]) in (TypeError, AttributeError)
        assert type(errors[1]) is TypeError
        assert f"LBFGS reads its state {key!r}" in str(errors[1])


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_a_sparse_state_is_made_dense_and_one_without_values_is_named(name):
    """torch's SGD keeps a sparse momentum after sparse gradients."""
    ps = []
    for sparse in (False, True):
        p, opt, closure = stepped(optim, name)
        for key, x in opt.state[p].items():
            if x.dim() and sparse:
                opt.state[p][key] = x.to_sparse()
        opt.step(closure)
        ps.append(p.detach())
    assert torch.equal(*ps)
    key = next(key for key, x in opt.state[p].items() if x.dim())
    opt.state[p][key] = torch.ones(3, 2, device="meta")
    with pytest.raises(TypeError, match=rf"the state '{key}' of param_groups\[0\]\['params'\]\[0\].*holds no values"):
        opt.step(closure)
    assert torch.equal(p, ps[1])


@pytest.mark.parametrize(("first", "second"), [("SGD", "Adam"), ("Adam", "RMSprop"), ("Adam", "Adamax")])
def test_another_optimizers_checkpoint(first, second):
    saved = stepped(torch.optim, first, **{"momentum": 0} if first == "SGD" else {})[1].state_dict()
    for module in (torch.optim, optim):
        p, opt, closure = stepped(module, second, 0)
        opt.load_state_dict(copy.deepcopy(saved))
        assert type(raised(opt, closure)) is KeyError
        assert torch.equal(p, torch.ones(3, 2))


def test_a_step_count_of_one_axis():
    """As some checkpoints have it."""
    ps = []
    for module in (torch.optim, optim):
        p, opt, closure = stepped(module, "Adam")
        opt.state[p]["step"] = torch.full((1,), 7.0)
        opt.step(closure)
        ps.append(p.detach())
        assert opt.state[p]["step"].item() == 8
    torch.testing.assert_close(*ps, rtol=1e-6, atol=0)
    opt.state[p]["step"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"its state 'step', found shape \(2,\)"):
        opt.step(closure)


def test_other_arguments_of_step_are_torchs_error():
    errors = []
    for module in (torch.optim, optim):
        for name in ("SGD", "AdamW", "SparseAdam", "LBFGS"):
            _, opt, _ = stepped(module, name, 0)
            for args, kwargs in [((), {"foo": 1}), ((None, 2), {}), ((None,), {"foo": 1, "bar": 2})]:
                with pytest.raises(TypeError) as error:
                    opt.step(*args, **kwargs)
                errors.append(str(error.value))
    assert errors[: len(errors) // 2] == errors[len(errors) // 2 :]


# --- state that is kept, or shared


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x.detach(), lambda x: x.numpy()], ids=["it", "view", "array"])
@pytest.mark.parametrize("exchange", ["clear", "load", "assign"])
def test_state_that_its_user_kept_stays_as_it_was(exchange, keep):
    model = network()
    opt = optim.AdamW(model.parameters(), lr=0.01, ema=0.9)
    train(model, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    train(model, opt, 2)
    exchanged = ("exp_avg", "ema") if exchange == "assign" else ("step", "exp_avg", "exp_avg_sq", "ema")
    kept = [(keep(state[name]), state[name].clone()) for state in opt.state.values() for name in exchanged]
    if exchange == "clear":
        opt.state.clear()
    elif exchange == "load":
        opt.load_state_dict(saved)
    else:
        for p in model.parameters():
            opt.state[p].update({name: torch.zeros_like(p) for name in exchanged})
    train(model, opt, 2)
    for x, value in kept:
        np.testing.assert_array_equal(np.asarray(x), np.asarray(value))


def test_two_states_in_turn_are_torchs():
    """As for two tasks in turn: each keeps its own."""
    found = []
    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.ones(1))
        opt = module.SGD([p], lr=0.0, momentum=0.9)
        saved = []
        for gradient in (1.0, 100.0):
            opt.state.clear()
            for _ in range(2):
                p.grad = torch.full((1,), gradient)
                opt.step()
            saved.append(opt.state_dict())
        for which in (0, 1, 0):
            opt.load_state_dict(saved[which])
            found.append(opt.state[p]["momentum_buffer"].item())
    assert found[:3] == found[3:]


@pytest.mark.parametrize("arguments", [{}, {"max_norm": 0.05, "ema": 0.9}], ids=["plain", "clipped and averaged"])
def test_state_in_shared_memory_is_stepped_where_it_lies(arguments):
    """Its numbers are those of state that is not shared; another process, or tensor, sees them."""
    models = [network() for _ in range(2)]
    opts = [optim.AdamW(model.parameters(), lr=0.01, **arguments) for model in models]
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 2)
    shared = {}
    for i, p in enumerate(models[1].parameters()):
        state = opts[1].state[p]
        if i % 2:
            state.update({name: x.clone().share_memory_() for name, x in state.items()})
        else:
            for x in state.values():
                x.share_memory_()
        shared[p] = dict(state)
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, 3)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
        for name, x in opts[0].state[p].items():
            assert opts[1].state[q][name] is shared[q][name]
            assert torch.equal(shared[q][name], x)


SIBLINGS = ["SGD", "Adam", "RMSprop", "Adagrad", "Adafactor", "Muon", "ASGD", "SparseAdam"]


def stepped_together(opt, params, steps, gradient=0.3):
    """By gradients that depend on the step alone."""
    for i in range(steps):
        for j, p in enumerate(params):
            grad = torch.linspace(-1, 2 + i, p.numel(), dtype=p.dtype).reshape(p.shape) * (gradient + j)
            p.grad = grad.to_sparse(1) if "Sparse" in type(opt).__name__ else grad
        opt.step()


@pytest.mark.parametrize("name", SIBLINGS)
def test_shared_state_of_any_optimizer_is_torchs(name):
    """Which stays where it lies, in whichever group and buffer its parameter is."""
    found = []
    for module in (torch.optim, optim):
        params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(200, 200))]
        opt = getattr(module, name)([{"params": [p]} for p in params], lr=0.05, **MOMENTUM.get(name, {}))
        stepped_together(opt, params, 2)
        shared = [
            (p, key, x.share_memory_())
            for p in params
            for key, x in opt.state[p].items()
            if isinstance(x, torch.Tensor)
        ]
        stepped_together(opt, params, 2)
        assert all(opt.state[p][key] is x for p, key, x in shared if x.dim())
        found.append([*(p.detach() for p in params), *(opt.state[p][key] for p, key, _ in shared)])
    torch.testing.assert_close(*found, rtol=5e-3 if name == "Muon" else 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPILED)
def test_state_comes_in_torchs_order(name):
    orders = []
    for module in (torch.optim, optim):
        params = [torch.nn.Parameter(torch.ones(n, 2)) for n in (3, 40_000, 2, 30_000)]
        opt = getattr(module, name)(params, lr=0.05, **MOMENTUM.get(name, {}))
        stepped_together(opt, params, 1)
        orders.append([p.shape for p in opt.state])
    assert orders[0] == orders[1]


def test_processes_in_turn_share_state():
    context, found = multiprocessing.get_context("spawn"), []
    for name in ("torch", "interop"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1).share_memory()
        state = [
            {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for p in model.parameters()
        ]
        for values in state:
            for x in values.values():
                x.share_memory_()
        for _ in range(2):
            if name == "torch":
                child.train(name, model, state)
                continue
            worker = context.Process(target=child.train, args=(name, model, state))
            worker.start()
            worker.join()
            assert worker.exitcode == 0
        found.append((model.weight.detach(), state[0]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    assert found[1][1]["step"] == 4


# --- models that come and go


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("name", cases.mostly_slow(NAMES, ["AdamW", "SGD", "Muon", "LBFGS", "SparseAdam"]))
def test_a_model_is_freed_with_its_optimizer(name):
    """By reference count, whatever was done: the collector may be off."""
    stepped(torch.optim, name)  # torch's first one in a process imports torch._dynamo, whose caught errors keep frames
    gc.collect()
    gc.disable()
    try:
        p, opt, closure = stepped(optim, name, 3)
        if name in COMPILED:
            opt.max_norm, opt.ema = 1.0, 0.9
            opt.step()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            opt.step()
            scaler = amp.GradScaler("cpu", init_scale=1.0)
            scaler.scale(torch.ones(()))
            scaler.step(opt)
            del scaler
        seen = weakref.ref(p), weakref.ref(opt), weakref.ref(next(iter(opt.state.values())).get("exp_avg", p))
        del p, opt, closure
        assert [x() for x in seen] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adafactor", "Muon", "LBFGS"])
def test_trainings_in_a_loop_leave_nothing(name):
    """With the collector off: no array of JAX, no tensor, and no cycle for the collector to find."""

    def training():
        params = [torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(3, 2))]
        groups = params if name == "LBFGS" else [{"params": [p]} for p in params]
        opt = getattr(optim, name)(groups, lr=0.05, **MOMENTUM.get(name, {}))

        def closure():
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            return sum(p.detach().sum() for p in params)

        for _ in range(2):
            opt.step(closure)

    def arrays():
        if isinstance(device := memory.DEVICES[torch.device("cpu")], TorchOwned):
            device.aliases.cache_clear()  # which own nothing
        return len(jax.live_arrays())

    training()
    before = arrays()  # which starts JAX, that leaves some itself
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            training()
        assert arrays() == before
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_second_optimizer_steps_in_place():
    """Once the first one is gone; while it lives its parameters stay where it steps them."""
    model = network()
    first = optim.AdamW(model.parameters(), lr=0.01)
    train(model, first, 2)
    for expected in (True, False):
        second = optim.AdamW(model.parameters(), lr=0.01)
        train(model, second, 2)
        copied = [leaf.home is not None for leaf in second._plan.leaves.values()]
        assert copied == [expected] * 4
        first = None
    held = next(model.parameters()).detach()
    second = optim.SGD(model.parameters(), lr=0.01)
    train(model, second, 2)
    assert torch.equal(held, next(model.parameters()))
    assert [leaf.home is not None for leaf in second._plan.leaves.values()] == [True, False, False, False]


# --- parameters of other kinds


class Tagged(torch.nn.Parameter):
    """As frameworks mark theirs."""


class Plain(torch.Tensor):
    """With torch's operations."""


@pytest.mark.parametrize("make", [Tagged, lambda x: x.as_subclass(Plain).requires_grad_()], ids=["Parameter", "Tensor"])
def test_a_subclass_with_plain_memory(make):
    ps = []
    for module in (torch.optim, optim):
        p = make(torch.arange(6.0))
        opt = module.SGD([p], lr=0.5, momentum=0.5)
        for i in range(4):
            p.grad = torch.full_like(p, 1.0 + i)
            opt.step()
        ps.append([x.detach().as_subclass(torch.Tensor) for x in (p, opt.state[p]["momentum_buffer"])])
    assert all(map(torch.equal, *ps))


@pytest.mark.parametrize("name", [name for name in SIBLINGS if name != "Muon"])
def test_what_overlaps_and_subclasses_of_any_optimizer(name):
    """Parameters that overlap in NumPy's memory, and one of a class of its own."""
    found = []
    for module in (torch.optim, optim):
        memory = np.linspace(-1, 1, 40)
        params = [
            torch.nn.Parameter(torch.from_numpy(memory[a:b]).view(-1, 2)) for a, b in ((0, 20), (10, 30), (28, 40))
        ]
        params.append(Tagged(torch.ones(3, 2)))
        opt = getattr(module, name)(params, lr=0.05, **MOMENTUM.get(name, {}))
        stepped_together(opt, params, 3)
        assert type(params[-1]) is Tagged
        found.append([torch.from_numpy(memory), params[-1].detach().as_subclass(torch.Tensor)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_parameters_that_overlap_through_different_storages():
    """As over one array of NumPy's: torch steps one after the other."""
    memories = []
    for module in (torch.optim, optim):
        memory = np.arange(8.0)
        params = [
            torch.nn.Parameter(torch.from_numpy(memory[part])) for part in (slice(3, 8), slice(0, 5), slice(4, 6))
        ]
        opt = module.AdamW(params, lr=0.1, weight_decay=0.5)
        for i in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1.0 + i)
            opt.step()
        memories.append(memory)
    np.testing.assert_allclose(*memories, rtol=1e-14)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has it from 2.10 on")
def test_a_gradient_wider_than_its_parameter():
    """It would be rounded where torch computes with it: said, and nothing changes. A narrower one is exact."""
    results = []
    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        p.grad_dtype = torch.float32
        p.grad = torch.full((3,), 1.001)
        opt = module.Adam([p], lr=0.1)
        with pytest.raises((RuntimeError, TypeError), match=r"dtype|the gradient of param_groups"):
            opt.step()
        assert torch.equal(p, torch.ones(3, dtype=torch.bfloat16))
        p = torch.nn.Parameter(torch.ones(3))
        p.grad_dtype = torch.bfloat16
        p.grad = torch.full((3,), 1.001, dtype=torch.bfloat16)
        module.SGD([p], lr=0.1).step()
        results.append(p.detach())
    assert torch.equal(*results)


# --- names and signatures


def test_every_public_name_of_torch_optim_is_there():
    for name in [name for name in dir(torch.optim) if not name.startswith("_")]:
        theirs, ours = getattr(torch.optim, name), getattr(optim, name)
        if name in NAMES:
            assert issubclass(ours, theirs)
            assert ours.__module__.startswith("interop")
        else:
            assert ours is theirs
    assert set(NAMES) == {
        name
        for name, x in vars(torch.optim).items()
        if isinstance(x, type) and issubclass(x, torch.optim.Optimizer) and x is not torch.optim.Optimizer
    }
    from interop.optim.lr_scheduler import StepLR
    from interop.optim.swa_utils import AveragedModel

    assert (StepLR, AveragedModel) == (torch.optim.lr_scheduler.StepLR, torch.optim.swa_utils.AveragedModel)


@pytest.mark.parametrize("name", NAMES)
def test_both_signatures_tell_the_arguments(name):
    theirs, ours = getattr(torch.optim, name), getattr(optim, name)
    own = ["max_norm", "ema", "state_dtype"] if name in COMPILED else []
    for a, b in ((theirs, ours), (theirs.__init__, ours.__init__)):
        a, b = (inspect.signature(x).parameters for x in (a, b))
        assert list(b) == [*a, *own]
        assert all(b[key].default == x.default for key, x in a.items())


def test_a_subclass_has_its_own_signature():
    class Mine(optim.AdamW):
        def __init__(self, params, warmup=3):
            super().__init__(params, lr=0.5)

    class Theirs(Mine):
        pass

    for cls in (Mine, Theirs):
        assert list(inspect.signature(cls).parameters) == ["params", "warmup"]
        assert cls([torch.zeros(1)]).defaults["lr"] == 0.5


# --- processes


def test_a_fork_before_any_step():
    """From a process in which nothing has used JAX yet: a child steps as torch's does."""
    code = """
import os, torch
from interop import optim

model = torch.nn.Linear(2, 1)
optimizer = optim.AdamW(model.parameters(), lr=0.1)
model.weight.grad = torch.ones(1, 2)
before = model.weight.detach().clone()
pid = os.fork()
optimizer.step()
assert not torch.equal(model.weight, before)
if pid == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
    done = subprocess_run(code)
    assert done.returncode == 0, done.stderr
