"""The memory that torch and XLA share: nothing dangles, nothing is stale, whatever is done to it between steps.

Each test trains twice, with torch's optimizer and with ours, and does the same to both.
"""

import concurrent.futures
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from interop import amp, optim  # noqa: E402
from interop.dropin import arranging, reader  # noqa: E402
from interop.memory import HOST  # noqa: E402
from tests import cases  # noqa: E402
from tests.interop.dropin.test_optimizer import backward, network, subprocess_run  # noqa: E402

DECAY, MAX_NORM = 0.9, 0.05  # a norm between those that occur
extras = pytest.mark.parametrize("extras", [False, True], ids=["plain", "clipped and averaged"])


class Side:
    """A model and its optimizer; clipping, averages and unscaling by torch around torch's, inside ours."""

    def __init__(self, ours, name="AdamW", extras=False, model=None, params=None, **arguments):
        self.ours = ours
        self.model = network() if model is None else model
        cls = getattr(optim if ours else torch.optim, name)
        self.opt = cls(self.model.parameters() if params is None else params(self.model), **{"lr": 0.01} | arguments)
        self.average = self.max_norm = self.scaler = None
        if extras:
            self.set(MAX_NORM, DECAY)

    def set(self, max_norm, ema):
        self.max_norm = max_norm
        if self.ours:
            self.opt.max_norm, self.opt.ema = max_norm, ema
        elif ema is None:
            self.average = None
        elif self.average is None:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(ema))

    def update(self):
        """Step by the gradients that are there."""
        params = [p for group in self.opt.param_groups for p in group["params"]]
        if self.scaler is not None and not self.ours:
            self.scaler.unscale_(self.opt)
        if not self.ours and self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        if self.scaler is not None:
            self.scaler.step(self.opt)
            self.scaler.update()
        else:
            self.opt.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def train(self, steps, seed=0, edit=lambda side: None):
        for i in range(steps):
            self.model.zero_grad()
            loss = backward(self.model, seed + i)
            if self.scaler is not None:
                self.model.zero_grad()
                self.scaler.scale(loss / loss.detach())  # makes the scale
                backward(self.model, seed + i)
                for p in self.model.parameters():
                    p.grad *= self.scaler.get_scale()
            edit(self)
            self.update()


def sides(*args, **kwargs):
    return [Side(ours, *args, **kwargs) for ours in (False, True)]


def assert_same(theirs, ours, tolerance=None):
    """Parameters, states and averages."""
    for p, q in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert p.dtype is q.dtype
        tolerance = tolerance or cases.NETWORK[str(p.dtype).removeprefix("torch.")]
        assert cases.difference(q.detach(), p.detach()) <= tolerance
        for name, x in theirs.opt.state.get(p, {}).items():
            assert cases.difference(ours.opt.state[q][name], x) <= tolerance, name
    if theirs.average is not None:
        for e, q in zip(theirs.average.module.parameters(), ours.model.parameters(), strict=True):
            assert cases.difference(ours.opt.state[q]["ema"], e.detach()) <= tolerance


def churn():
    """Free what can be freed, and write over it."""
    gc.collect()
    return [torch.full((n,), float("nan")) for n in (3, 200, 600, 60000, 2**20) for _ in range(20)]


def views(x):
    """Every way to look at a tensor's memory."""
    array = x.detach().numpy()
    return [
        x.detach(),
        x.data,
        x.detach().view(-1).view(x.shape),
        array,
        memoryview(array),
        np.from_dlpack(x.detach()),
        torch.from_numpy(array),
        torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())),
    ]


def assert_views(held, value):
    for view in held:
        np.testing.assert_array_equal(np.asarray(view), np.asarray(value))


# --- what exchanges memory or values between two steps


def _flat(side):
    """As frameworks that flatten do: all parameters become parts of one storage."""
    flat = torch.cat([p.detach().flatten() for p in side.model.parameters()])
    torch.nn.utils.vector_to_parameters(flat, side.model.parameters())
    side.flat = flat


def _load_assign(side):
    side.model.load_state_dict({k: v.clone() for k, v in network(seed=5).state_dict().items()}, assign=True)
    side.opt.param_groups[0]["params"] = list(side.model.parameters())
    side.opt.state.clear()
    if side.average is not None:
        side.average = None
        side.set(MAX_NORM, DECAY)


def _assign_itself(side):
    """Other Parameter objects over the same memory; the state goes with them."""
    old = list(side.model.parameters())
    side.model.load_state_dict(side.model.state_dict(), assign=True)
    new = side.opt.param_groups[0]["params"] = list(side.model.parameters())
    for p, q in zip(old, new, strict=True):
        side.opt.state[q] = side.opt.state.pop(p)


def _swap(side, convert):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        convert(side.model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _data(side):
    side.model[0].weight.data = network(side.model[0].weight.dtype, seed=5)[0].weight.detach()
    side.model[2].bias.data = torch.from_numpy(np.ones(3)).to(side.model[2].bias.dtype)


def _set(side):
    for p in side.model.parameters():
        with torch.no_grad():
            p.set_(p.detach() * 0.5)


def _frozen(side):
    side.model[0].requires_grad_(False)
    side.train(2, 50)
    side.model[0].requires_grad_(True)
    side.model[2].weight.requires_grad_(False)
    side.train(2, 60)
    side.model[2].weight.requires_grad_(True)


EXCHANGES = {
    "data": _data,
    "set_": _set,
    "flattened": _flat,
    "model loaded": lambda side: side.model.load_state_dict(network(seed=5).state_dict()),
    "model loaded from itself": lambda side: side.model.load_state_dict(side.model.state_dict()),
    "model assigned": _load_assign,
    "model assigned from itself": _assign_itself,
    "model swapped": lambda side: _swap(side, lambda m: m.load_state_dict(network(seed=5).state_dict())),
    "optimizer loaded": lambda side: side.opt.load_state_dict(side.saved),
    "optimizer loaded from itself": lambda side: side.opt.load_state_dict(side.opt.state_dict()),
    "to float64 and back": lambda side: side.model.double().float(),
    "to bfloat16 and back": lambda side: side.model.to(torch.bfloat16).to(torch.float32),
    "to float64 and back, swapped": lambda side: _swap(side, lambda m: m.double().float()),
    "shared": lambda side: side.model.share_memory(),
    "frozen and thawed": _frozen,
}

# Which parameters are elsewhere then: their memory keeps its values for those who look at it.
LEFT = dict.fromkeys(
    ["set_", "flattened", "model assigned"] + [x for x in EXCHANGES if x.startswith("to ")], range(4)
) | {"data": (0, 3)}


@extras
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_exchanges_between_steps(exchange, extras):
    both = sides(extras=extras)
    for side in both:
        side.train(2)
        side.saved = copy.deepcopy(side.opt.state_dict())
        if exchange == "optimizer loaded" and not side.ours and extras:
            averages = copy.deepcopy(side.average.module.state_dict())
        side.train(2, 2)
        held = [(views(p), p.detach().clone()) for p in side.model.parameters()]
        EXCHANGES[exchange](side)
        if exchange == "optimizer loaded" and not side.ours and extras:
            side.average.module.load_state_dict(averages)  # ours are part of the state
        side.train(3, 4)
        for i, (p, (memory, value)) in enumerate(zip(side.model.parameters(), held, strict=True)):
            if exchange == "shared":
                memory = memory[:3]  # the others dangle with torch's too: sharing frees what they look at
            assert_views(memory, value if i in LEFT.get(exchange, ()) else p.detach())
        if exchange == "flattened":
            expected = torch.cat([p.detach().flatten() for p in side.model.parameters()])
            assert torch.equal(side.flat, expected)
    assert_same(*both, 2**-7 if exchange == "to bfloat16 and back" else None)  # where an ulp may grow to bfloat16's
    if exchange == "shared":
        assert all(p.is_shared() for p in both[1].model.parameters())


def test_state_that_goes_to_another_parameter():
    """Whose entries are the same, one after the other."""
    buffers = []
    for module in (torch.optim, optim):
        p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        opt = module.SGD([p, q], lr=0.1, momentum=0.9)
        for i in range(4):
            p.grad = torch.full((3,), i + 1.0)
            if i == 3:
                opt.state[p], opt.state[q] = opt.state[q], opt.state[p]
            opt.step()
            assert len(opt.state[q]) == (i == 3)  # which puts an empty one there
        buffers.append((p.detach(), opt.state[p]["momentum_buffer"]))
    for a, b in zip(*buffers, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=cases.NETWORK["float32"])


@extras
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_another_type_for_good(name, extras):
    both, start = sides(name, extras), network(torch.float64, seed=5)  # where both go on, to the last digit
    for side in both:
        side.train(3)
        side.model.double()
        with torch.no_grad():
            for p, q in zip(side.model.parameters(), start.parameters(), strict=True):
                p.copy_(q)
        side.opt.state.clear()
        if side.average is not None:
            side.average = None
            side.set(MAX_NORM, DECAY)
        side.train(3, 3)
        assert all(p.dtype is torch.float64 for p in side.model.parameters())
    assert_same(*both)


# --- copies and files


def _saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: torch.load(io.BytesIO(_saved(x)), weights_only=False),
}


@extras
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_all_go_on_as_torchs(how, extras):
    """Model and optimizer copied together; the originals train on, or are freed."""
    both = sides(extras=extras)
    for side in both:
        side.train(3)
    theirs, ours = both
    twin = Side(True, extras=extras)
    twin.model, twin.opt = COPIES[how]((ours.model, ours.opt))
    assert (twin.opt.max_norm, twin.opt.ema) == (ours.opt.max_norm, ours.opt.ema)
    values = [p.detach().clone() for p in twin.model.parameters()]
    ours.train(2, 30)
    assert all(torch.equal(p, v) for p, v in zip(twin.model.parameters(), values, strict=True))
    del ours, both
    kept = churn()
    theirs.train(3, 3)
    twin.train(3, 3)
    assert_same(theirs, twin)
    del kept


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_one_part(how):
    """A copied model does not learn with the original; a copied optimizer has parameters of its own."""
    theirs, ours = sides()
    ours.train(3), theirs.train(3)
    model, opt = COPIES[how](ours.model), COPIES[how](ours.opt)
    own = [p for group in opt.param_groups for p in group["params"]]
    for p, q in zip(own, ours.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
        p.grad = torch.ones_like(p)
    opt.step()
    again = Side(True, model=model)
    again.opt.load_state_dict(copy.deepcopy(ours.opt.state_dict()))  # torch's load shares what it is given
    for side in (theirs, ours, again):
        side.train(2, 3)
    assert_same(theirs, ours)
    assert_same(theirs, again)


def test_files_are_of_torchs_size():
    theirs, ours = sides()
    for side in (theirs, ours):
        side.train(2)
        side.model.zero_grad()
    slack = 1024  # names of classes, alignment
    assert len(_saved(ours.model.state_dict())) <= len(_saved(theirs.model.state_dict())) + slack
    assert len(_saved(ours.opt.state_dict())) <= len(_saved(theirs.opt.state_dict())) + slack
    assert len(_saved(ours.model)) <= len(_saved(theirs.model)) + slack
    assert len(pickle.dumps(ours.model)) <= len(pickle.dumps(theirs.model)) + slack
    assert len(pickle.dumps(ours.opt)) <= len(pickle.dumps(theirs.opt)) + slack
    sizes = [len(_saved(ours.opt.state_dict()))]
    ours.set(None, DECAY)
    ours.train(1)
    sizes.append(len(_saved(ours.opt.state_dict())))
    parameters = sum(p.numel() * p.element_size() for p in ours.model.parameters())
    assert sizes[1] - sizes[0] <= parameters + 4 * 256  # an average each, and its entry in the file


def test_files_of_small_parameters_of_a_large_model():
    params = [torch.nn.Parameter(torch.ones(n)) for n in [10] * 300 + [10**6]]
    opt = optim.AdamW(params, lr=0.1, ema=DECAY)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    for x in (params[7], *opt.state[params[7]].values()):
        assert len(_saved(x)) < 2500
        assert len(_saved({"one": x.detach()})) < 2500
        assert len(pickle.dumps(x)) < 1000


# --- who is freed first


@extras
def test_a_freed_model_leaves_its_optimizer(extras):
    both = sides(extras=extras)
    results = []
    for side in both:
        side.train(3)
        params = side.opt.param_groups[0]["params"]
        grads = [p.grad.clone() for p in params]
        opt, clip = side.opt, side.max_norm if not side.ours else None
        del params, side.model, side.average, side.opt
        kept = churn()
        for _ in range(2):
            for p, g in zip(opt.param_groups[0]["params"], grads, strict=True):
                p.grad = g.clone()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], clip)
            opt.step()
        results.append([p.detach().clone() for p in opt.param_groups[0]["params"]])
        del kept
    for p, q in zip(*results, strict=True):
        assert cases.difference(q, p) <= cases.NETWORK["float32"]


@extras
@pytest.mark.parametrize("last", ["theirs", "ours"])
def test_a_freed_optimizer_leaves_a_model_for_the_next(extras, last):
    """The next may be torch's or ours, and the one after that too."""
    both = []
    for ours in (False, True):
        side = Side(ours, extras=extras, model=network(torch.float64))
        both.append(side)
        side.train(3)
        for name in ("SGD", "Adam"):
            side.opt = None
            kept = churn()
            new = Side(side.ours and last == "ours", name, model=side.model)
            side.opt = new.opt
            new.train(2, 10)
            del kept
    both[0].average = None
    assert_same(*both)


@extras
@pytest.mark.parametrize("shelf", [arranging.SHELF, 256])
def test_views_outlive_model_and_optimizer(monkeypatch, extras, shelf):
    """Each keeps the memory by itself."""
    monkeypatch.setattr(arranging, "SHELF", shelf)
    side = Side(True, extras=extras)
    side.train(2)
    held = []
    for p in side.model.parameters():
        for x in (p, *side.opt.state[p].values()):
            held += [(view, x) for view in views(x)]
    side.train(2)
    held = [(view, x.detach().clone()) for view, x in held]
    for view, value in held:
        assert_views([view], value)  # they saw the steps
    del side, p, x
    kept = churn()
    while held:
        view, value = held.pop()
        assert_views([view], value)
    del kept


@extras
def test_a_plan_made_anew_leaves_views(extras):
    """A first gradient makes new buffers: parameters that are looked at stay where they are, old state is readable."""
    both = sides(extras=extras)
    for side in both:
        side.model[2].requires_grad_(False)
        side.train(3)
        params = list(side.model[0].parameters())
        held = [(views(p), p) for p in params]
        states = [
            (views(x), name, p, x.clone()) for p in params for name, x in side.opt.state[p].items() if x is not None
        ]
        side.model[2].requires_grad_(True)
        side.train(3, 3)
        kept = churn()
        for memory, p in held:
            assert_views(memory, p.detach())
        for memory, name, p, before in states:
            for view in memory:
                value = np.asarray(view)
                assert np.array_equal(value, before) or np.array_equal(value, side.opt.state[p][name])
        del held, memory, view, value
        side.train(2, 6)  # the parameters may move, now that nothing looks at them
        side.opt.param_groups[0]["maximize"] = True
        side.train(2, 8)
        for memory, _, _, _ in states:
            assert all(np.isfinite(np.asarray(view)).all() for view in memory)
        del kept
    assert_same(*both)


@extras
def test_a_storage_held_by_itself_stays_readable(extras):
    """What shows nowhere as a view: it is left behind, not freed."""
    side = Side(True, extras=extras)
    values = [p.detach().clone() for p in side.model.parameters()]
    early = [p.untyped_storage() for p in side.model.parameters()]
    side.train(2)
    late = [p.untyped_storage() for p in side.model.parameters()]
    side.train(1)
    now = [p.detach().clone() for p in side.model.parameters()]
    del side
    kept = churn()
    for storages, expected in ((early, (values, now)), (late, (now,))):
        for i, s in enumerate(storages):
            x = torch.empty(0).set_(s, 0, now[i].shape)
            assert any(torch.equal(x, e[i]) for e in expected)
    del kept


# --- groups and several optimizers


@extras
def test_a_group_added_in_mid_run(extras):
    both = sides(extras=extras, params=lambda m: m[0].parameters())
    for side in both:
        side.train(3)
        held = [(views(p), p) for p in side.model[0].parameters()]
        side.opt.add_param_group({"params": [side.model[2].weight], "lr": 0.1})
        side.train(2, 3)
        side.opt.add_param_group({"params": side.model[2].bias, "betas": (0.5, 0.6)})
        side.train(2, 5)
        for memory, p in held:
            assert_views(memory, p.detach())
    assert [side.opt.state[side.model[2].bias]["step"].item() for side in both] == [2, 2]
    assert_same(*both)


@extras
@pytest.mark.parametrize("over", ["parts", "the same"])
def test_two_optimizers_on_one_model(over, extras):
    """Over the same parameters the second finds them in the first's memory, and neither sees old values."""
    both = []
    for ours in (False, True):
        model = network()
        part = {
            "parts": (lambda m: m[0].parameters(), lambda m: m[2].parameters()),
            "the same": (lambda m: m.parameters(), lambda m: m.parameters()),
        }[over]
        pair = [
            Side(ours, name, extras, model, params, lr=lr)
            for name, params, lr in zip(("AdamW", "SGD"), part, (0.01, 0.1), strict=True)
        ]
        for i in range(6):
            for side in pair if over == "parts" or i % 2 == 0 else reversed(pair):
                side.train(1, i)
        both.append(pair)
    for pair in both:
        for side, i in zip(pair, (0, 2), strict=True):
            if over == "parts":
                side.model = side.model[i]
                if side.average is not None:
                    side.average.module = side.average.module[i]
    for theirs, ours in zip(*both, strict=True):
        assert_same(theirs, ours)


@extras
def test_small_tensors_on_several_shelves(monkeypatch, extras):
    """Exchanged, absent, late and reset parameters, each on a shelf of its own."""
    monkeypatch.setattr(arranging, "SHELF", 64)
    both = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(7, 9) for _ in range(4)])
        side = Side(ours, extras=extras, model=model)
        side.opt.param_groups[0]["lr"] = 0.1
        generator = torch.Generator().manual_seed(1)
        absent = {(7, 0), (7, 1), (7, 2), (7, 3), (7, 4), (2, 3), (2, 8)}
        for i in range(12):
            for j, p in enumerate(model.parameters()):
                grad = torch.randn(p.shape, generator=generator) * 0.01
                p.grad = None if (j, i) in absent else grad
            if i == 4:
                model[1].weight.data = model[1].weight.data * 2
            if i == 6:
                model[2].load_state_dict({"weight": torch.full((9, 7), 0.5), "bias": torch.full((9,), 0.25)})
            if i == 7:
                del side.opt.state[model[0].bias]
                if side.average is not None:  # ours is part of the state, and begins anew
                    side.average.module[0].bias.data.copy_(model[0].bias.data)
            side.update()
        both.append(side)
    assert len(both[1].opt._plan.buckets) > 3
    assert_same(*both)


# --- the fast path: a step that finds all as the last one left it checks nothing again


def _grads(side, change):
    """The gradients of one step in another form; torch's step, which does not take every form, gets its values."""

    def edit(side):
        for p in side.model.parameters():
            grad, p.grad = change(p.grad), None
            if side.ours:
                p.grad_dtype = grad.dtype
                p.grad = grad
            else:
                p.grad = grad.detach().to_dense().to(p.dtype).resolve_neg().contiguous()

    side.train(1, 40, edit)
    for p in side.model.parameters():
        p.grad = None
        p.grad_dtype = p.dtype


def _unaligned(grad):
    return torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape)


def _absent(side, which):
    def edit(side):
        for i, p in enumerate(side.model.parameters()):
            if i in which:
                p.grad = None

    side.train(1, 40, edit)


def _other_strides(side):
    p = side.model[0].weight
    p.data = p.data.as_strided(p.shape, (1, p.shape[0]))


def _state(side, change):
    params = list(side.model.parameters())
    change([side.opt.state[p] for p in params], side.opt.state, params)


def _replace(states, all_states, params):
    for state in states:
        state["exp_avg"] = state["exp_avg"] * 2


def _replace_step(states, all_states, params):
    states[0]["step"] = torch.tensor(1.0)
    states[3]["step"] = torch.tensor(1.0)


def _swap_entries(states, all_states, params):
    for state in states:
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].abs(), state["exp_avg_sq"]
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def _delete(states, all_states, params):
    del all_states[params[0]], all_states[params[3]]


def _exchange_data(states, all_states, params):
    for state in states:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state[name].data = state[name].data * 2


def _move(side, keep_order):
    first, second = side.opt.param_groups
    if keep_order:
        second["params"].insert(0, first["params"].pop())
    else:
        second["params"].append(first["params"].pop(0))


def _one_object_for_another(side):
    new = torch.nn.Parameter(side.model[0].bias.detach() * 2)
    params = side.opt.param_groups[0]["params"]
    old, params[1] = params[1], new
    side.opt.state[new] = side.opt.state.pop(old)
    side.model[0].bias = new


def _scaler(side):
    side.scaler = (amp if side.ours else torch.amp).GradScaler("cpu", init_scale=1024.0)

    def edit(side):
        if side.model[2].bias.grad is not None and side.scaler.get_scale() == 1024.0:
            side.model[2].bias.grad[0] = float("inf")  # the first step is skipped

    side.train(2, 40, edit)
    side.scaler = None


def _tensor_lr(side):
    side.opt.param_groups[0]["lr"] = torch.tensor(0.03, dtype=torch.float64)
    side.train(3, 40)
    side.opt.param_groups[0]["lr"].mul_(0.5)


def _amsgrad(side):
    side.opt.param_groups[0]["amsgrad"] = True
    for p in side.model.parameters():
        side.opt.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)


def _switched_off(side):
    side.set(MAX_NORM, None)
    side.train(3, 40)
    side.set(None, None)


def _reordered(side):
    side.opt.param_groups[0]["params"].reverse()


def _swap_states(side):
    a, b = side.model[0].bias, side.model[2].bias
    side.opt.state[a], side.opt.state[b] = side.opt.state[b], side.opt.state[a]


CHANGES = {
    "data exchanged": _data,
    "data exchanged for its own": lambda side: setattr(side.model[2].bias, "data", side.model[2].bias.data.clone()),
    "same storage, other strides": _other_strides,
    "edited in place": lambda side: [p.data.mul_(0.5) for p in side.model.parameters()],
    "gradient sparse": lambda side: _grads(side, lambda g: g.to_sparse()),
    "gradient of some rows": lambda side: _grads(side, lambda g: g.to_sparse(1)),
    "gradient of another type": lambda side: _grads(side, lambda g: g.float()),
    "gradient a Parameter": lambda side: _grads(side, lambda g: torch.nn.Parameter(g)),
    "gradient with a graph": lambda side: _grads(side, lambda g: g.requires_grad_() * 1.0),
    "gradient non-contiguous": lambda side: _grads(side, lambda g: g.mT.contiguous().mT if g.ndim > 1 else g),
    "gradient strided": lambda side: _grads(side, lambda g: torch.stack([g, g], -1)[..., 0]),
    "gradient unaligned": lambda side: _grads(side, _unaligned),
    "gradient with the neg bit": lambda side: _grads(side, lambda g: torch._neg_view(-g)),
    "gradient absent": lambda side: _absent(side, {0, 3}),
    "gradients absent": lambda side: _absent(side, {0, 1, 2, 3}),
    "requires_grad": lambda side: (side.model[0].requires_grad_(False), side.train(2, 40)),
    "state replaced": lambda side: _state(side, _replace),
    "step replaced": lambda side: _state(side, _replace_step),
    "two entries swapped": lambda side: _state(side, _swap_entries),
    "state of two parameters swapped": _swap_states,
    "state deleted": lambda side: _state(side, _delete),
    "state cleared": lambda side: side.opt.state.clear(),
    "state edited in place": lambda side: _state(side, lambda s, *_: [x["exp_avg"].mul_(2) for x in s]),
    "state's data exchanged": lambda side: _state(side, _exchange_data),
    "state's data moved": lambda side: _state(side, lambda s, *_: [v.share_memory_() for x in s for v in x.values()]),
    "state loaded": lambda side: side.opt.load_state_dict(copy.deepcopy(side.opt.state_dict())),
    "state noted in": lambda side: _state(side, lambda s, *_: s[0].update(note=torch.ones(()))),
    "state of no parameter": lambda side: side.opt.state.update({"global": 3}),
    "parameters reordered": _reordered,
    "parameter moved to another group": lambda side: _move(side, keep_order=False),
    "parameter moved to the group beside": lambda side: _move(side, keep_order=True),
    "groups reordered": lambda side: side.opt.param_groups.reverse(),
    "parameter removed": lambda side: side.opt.param_groups[0]["params"].pop(0),
    "another object": _one_object_for_another,
    "a flag": lambda side: side.opt.param_groups[0].update(maximize=True),
    "a flag with state": _amsgrad,
    "a number": lambda side: side.opt.param_groups[0].update(lr=0.03, betas=(0.5, 0.6)),
    "lr a tensor": _tensor_lr,
    "averages on": lambda side: side.set(None, DECAY),
    "clipping on": lambda side: side.set(MAX_NORM, None),
    "both on": lambda side: side.set(MAX_NORM, DECAY),
    "both off": _switched_off,
    "a scaler used": _scaler,
}
SPARSE = {"gradient sparse", "gradient of some rows"}
GROUPED = {"parameter moved to another group", "parameter moved to the group beside", "groups reordered"}
# What goes for the averages too, which torch keeps elsewhere; and what is about the extras.
PLAIN = {"state of two parameters swapped", "state deleted", "state cleared", "averages on", "clipping on", "both on"}


def groups(model):
    first, second = list(model[0].parameters()), list(model[2].parameters())
    return [{"params": first, "lr": 0.01}, {"params": second, "lr": 0.1}]


def twins():
    """A network with two parameters of one shape."""
    model = network(torch.float64)
    model[2] = torch.nn.Linear(200, 200).double()
    torch.nn.init.constant_(model[2].weight, 0.01)
    torch.nn.init.constant_(model[2].bias, 0.1)
    return model


if not hasattr(torch.Tensor, "grad_dtype"):  # until torch 2.10, where a gradient has its parameter's type
    del CHANGES["gradient of another type"]


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    ("change", "extras"), [(change, on) for change in CHANGES for on in (False, True) if not (on and change in PLAIN)]
)
def test_every_change_after_unchanged_steps_is_noticed(monkeypatch, change, extras):
    checked = []
    gradients = reader.checked
    monkeypatch.setattr(reader, "checked", lambda opt: checked.append(opt) or gradients(opt))
    both = []
    for ours in (False, True):
        name = "SGD" if change in SPARSE else "AdamW"
        arguments = dict(momentum=0.9) if name == "SGD" else {}
        # In float64, since a state that begins anew makes signs of gradients that are all rounding.
        model = twins() if change == "state of two parameters swapped" else network(torch.float64)
        side = Side(ours, name, extras, model, groups if change in GROUPED else None, **arguments)
        side.train(5)
        assert len(checked) == ours  # by the first step alone: the others took the fast path
        CHANGES[change](side)
        side.train(4, 5)
        both.append(side)
    if change in ("both off", "parameter removed"):  # then torch's averages are of other steps
        both[0].average = None
    both[0].opt.state.pop("global", None)
    assert_same(*both)


@pytest.mark.parametrize("n", [10, HOST.big])
@pytest.mark.parametrize("change", ["conj", "neg", "conj and neg", "strided", "data conj", "data neg"])
def test_changes_of_complex_tensors_are_noticed(n, change):
    results = []
    for module in (torch.optim, optim):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(n, dtype=torch.complex64, generator=generator))
        opt = module.SGD([p], lr=0.1, momentum=0.9) if "data" in change else module.AdamW([p], lr=0.1)
        for i in range(8):
            grad = torch.randn(n, dtype=torch.complex64, generator=generator)
            if (
                module is optim and i > 4 and "data" not in change
            ):  # the same values; torch's step does not take them so
                if "conj" in change:
                    grad = grad.conj().resolve_conj().conj()
                if "neg" in change:
                    grad = torch._neg_view(-grad)
                if change == "strided":
                    grad = torch.stack([grad, grad], -1)[:, 0]
            if "data" in change and i == 5:
                p.data = p.data.conj() if change == "data conj" else torch._neg_view(p.data)
            p.grad = grad
            opt.step()
        results.append(torch.view_as_real(p.detach().resolve_conj().resolve_neg()))
    assert cases.difference(results[1], results[0]) <= cases.NETWORK["float32"]


@pytest.mark.parametrize(("i", "n"), [(0, HOST.big + 1), (0, 5), (1, 11), (1, 5)])
def test_a_gradient_of_another_size_is_refused(i, n):
    """It can only come to be by `grad.data`; nothing is read past its end."""
    for module in (torch.optim, optim):
        params = [torch.nn.Parameter(torch.ones(size)) for size in (HOST.big, 10)]
        opt = module.AdamW(params, lr=0.1)
        for step in range(4):
            for p in params:
                p.grad = torch.ones_like(p)
            if step == 3:
                params[i].grad.data = torch.ones(n)
                with pytest.raises((RuntimeError, TypeError)):
                    opt.step()
            else:
                opt.step()
        assert torch.isfinite(params[i]).all()
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()


AVERAGED = {
    "unchanged": lambda side: None,
    "edited in place": lambda side: [p.data.mul_(2) for p in side.model[0].parameters()],
    "data exchanged": lambda side: [setattr(p, "data", p.data * 2) for p in side.model[0].parameters()],
    "state loaded": lambda side: side.opt.load_state_dict(copy.deepcopy(side.opt.state_dict())),
    "average edited": lambda side: [x.mul_(2) for x in _averages(side)],
}


def _averages(side):
    if side.ours:
        return [side.opt.state[p]["ema"] for p in side.model[0].parameters()]
    return [p.data for p in side.average.module[0].parameters()]


@pytest.mark.parametrize("plan", ["kept", "made anew"])
@pytest.mark.parametrize("place", ["moved", "copied"])
@pytest.mark.parametrize("change", AVERAGED)
def test_averages_of_parameters_without_gradient(change, place, plan):
    """They go on, towards the values that the parameters have now, wherever those are."""
    both = []
    for ours in (False, True):
        side = Side(ours, model=network(torch.float64))
        if place == "copied":
            side.model.share_memory()
        side.set(None, DECAY)
        side.model[2].weight.requires_grad_(plan == "kept")
        side.train(3)
        side.model[0].requires_grad_(False)
        side.train(1, 3)
        AVERAGED[change](side)
        side.model[2].weight.requires_grad_(True)
        side.train(3, 4)
        both.append(side)
    assert_same(*both)


# --- JAX beside it


def test_arrays_that_jax_code_holds():
    """jax.live_arrays() shows the buffers: a NumPy view of one keeps it from being donated, and torch's view holds."""
    both = sides(extras=True)
    for side in both:
        side.train(2)
        addresses = [p.data_ptr() for p in side.model.parameters()]
        held = [np.asarray(x) for x in jax.live_arrays()] if side.ours else []
        side.train(2, 2)
        assert [p.data_ptr() for p in side.model.parameters()] == addresses or not side.ours
        del held
        side.train(2, 4)
    assert_same(*both)


def test_jax_work_and_garbage_collection_in_other_threads():
    both = sides(extras=True)
    both[0].train(12)
    stop, failures = [], []

    def work(n):
        try:
            while not stop:
                x = jnp.full((n,), 1.0, jnp.float32)
                assert float(jax.jit(lambda x: (x + x).sum())(x)) == 2 * n
                if n == 100:
                    gc.collect()
                    jax.clear_caches()
        except BaseException as error:
            failures.append(error)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work, n) for n in (100, 60000)]
        try:
            both[1].train(4)
            addresses = [p.data_ptr() for p in both[1].model.parameters()]
            both[1].train(8, 4)
        finally:
            stop.append(True)
        [job.result() for job in jobs]
    assert not failures
    assert [p.data_ptr() for p in both[1].model.parameters()] == addresses
    assert_same(*both)


# --- threads


@extras
def test_two_optimizers_in_threads(extras):
    pairs = [sides(name, extras) for name in ("AdamW", "SGD")]
    for theirs, _ in pairs:
        theirs.train(40)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: pair[1].train(40), pairs))
    for pair in pairs:
        assert_same(*pair)


@extras
def test_a_thread_reads_while_another_steps(extras):
    """Each element counts down by one a step: a reader finds whole numbers that never rise."""
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 1000, HOST.big)]
    options = dict(max_norm=1e9, ema=0.0) if extras else {}
    opt = optim.SGD(params, lr=1.0, **options)
    steps, done = 300, []

    def step():
        try:
            for _ in range(steps):
                for p in params:
                    p.grad = torch.ones_like(p)
                opt.step()
        finally:
            done.append(True)

    def read():
        last = [p.detach().clone() for p in params]
        count = 0
        while not done or count < 10:
            for i, p in enumerate(params):
                now = p.detach().clone()
                assert torch.equal(now, now.round())
                assert (now <= last[i]).all()
                assert (now >= -steps).all()
                last[i] = now
            count += 1

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(step), pool.submit(read)]
        [job.result() for job in jobs]
    for p in params:
        assert p.min() == p.max() == -steps
        if extras:
            assert torch.equal(opt.state[p]["ema"], p)


# --- processes


def test_shared_memory_and_a_second_process():
    """Shared before the first step, or after it: another process sees each step, and a step what it writes."""
    result = subprocess_run(
        """
        import multiprocessing, torch
        from interop import optim
        torch.set_num_threads(1)

        def other(params, pipe):
            for _ in range(3):
                pipe.recv()
                pipe.send([p.detach().clone().flatten()[:3].tolist() for p in params])
                with torch.no_grad():
                    for p in params:
                        p.flatten()[:3].mul_(2)
                pipe.send(None)

        def run(module, when, options):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 700, 40000)]
            opt = module.AdamW(params, lr=0.1, **options)
            seen = []

            def step():
                for p in params:
                    p.grad = torch.full_like(p, 0.5)
                if module is torch.optim and max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(params, max_norm)
                opt.step()

            if when == "before":
                [p.share_memory_() for p in params]
            for _ in range(2):
                step()
            [p.share_memory_() for p in params]
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(target=other, args=(params, there))
            process.start()
            for _ in range(3):
                step()
                here.send(None)
                seen.append(torch.tensor(here.recv()))
                assert torch.equal(seen[-1], torch.stack([p.detach()[:3] for p in params])) or here.poll(30)
                here.recv()
            step()
            process.join()
            assert process.exitcode == 0
            assert all(p.is_shared() for p in params)
            return seen + [p.detach().clone() for p in params]

        for max_norm in (None, 0.5):
            for when in ("before", "after"):
                options = {} if max_norm is None else dict(max_norm=max_norm, ema=0.9)
                theirs = run(torch.optim, when, {})
                ours = run(optim, when, options)
                for a, b in zip(theirs, ours, strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        """
    )
    assert result.returncode == 0, result.stderr


def test_fork_after_use():
    """DataLoader's workers, and parameters and state read in a child; the parent trains on."""
    result = subprocess_run(
        """
        import torch
        from interop import optim
        torch.set_num_threads(1)

        class Data(torch.utils.data.Dataset):
            def __init__(self, params, state):
                self.params, self.state = params, state
            def __len__(self):
                return 8
            def __getitem__(self, i):
                seen = [x.detach().clone() for x in (*self.params, *self.state)]
                return torch.full((50,), float(i)), torch.cat([x.flatten() for x in seen])

        def run(module, options):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(n)) for n in (50, 40000)]
            opt = module.AdamW(params, lr=0.1, **options)
            for epoch in range(3):
                state = [x for p in params for x in opt.state[p].values()] if opt.state else []
                now = torch.cat([x.detach().clone().flatten() for x in (*params, *state)])
                loader = torch.utils.data.DataLoader(Data(params, state), batch_size=2, num_workers=2)
                for x, seen in loader:
                    assert all(torch.equal(s, now) for s in seen)  # the child has what was at the fork
                    loss = ((x * params[0]).sum() + params[1].sum()) / 1000
                    opt.zero_grad()
                    loss.backward()
                    if module is torch.optim and max_norm is not None:
                        torch.nn.utils.clip_grad_norm_(params, max_norm)
                    opt.step()
            return [p.detach().clone() for p in params]

        for max_norm in (None, 0.1):
            options = {} if max_norm is None else dict(max_norm=max_norm, ema=0.9)
            for a, b in zip(run(torch.optim, {}), run(optim, options), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        """
    )
    assert result.returncode == 0, result.stderr


def test_memory_is_valid_while_the_interpreter_exits():
    result = subprocess_run(
        """
        import atexit, torch
        from interop import optim
        p = torch.nn.Parameter(torch.ones(40000))
        atexit.register(lambda: print(p.min().item(), p.max().item(), len(opt.state)))  # after jax's own handlers
        opt = optim.SGD([p], lr=0.5, momentum=0.9, ema=0.5)
        p.grad = torch.ones_like(p)
        opt.step()
        keep = [p, opt, opt.state[p]["ema"].numpy(), p.detach().numpy()]
        keep.append(keep)
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0.5", "0.5", "1"]


def processes(path, code, n):
    """Run n processes of a script, which know their rank, and wait for all."""
    file = path / "script.py"
    file.write_text(textwrap.dedent(code))
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(file)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "RANK": str(i), "STORE": str(path / "store")},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * n, "\n".join(errors)


def test_distributed_data_parallel(tmp_path):
    """Two processes: the ranks stay identical, and equal to torch's. Bucket views are gradients in DDP's memory."""
    processes(
        tmp_path,
        """
        import os, datetime, torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from interop import optim

        torch.set_num_threads(1)
        rank = int(os.environ["RANK"])
        dist.init_process_group(
            "gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=2,
            timeout=datetime.timedelta(seconds=120),
        )

        def run(module, bucket_view, max_norm, before):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Tanh(), torch.nn.Linear(200, 3))
            options = {} if max_norm is None or module is torch.optim else dict(max_norm=max_norm, ema=0.9)
            if before:  # the parameters move before they are wrapped
                opt = module.AdamW(net.parameters(), lr=0.01, **options)
                net(torch.ones(1, 300)).sum().backward()
                opt.step()
                opt.zero_grad()
            model = DistributedDataParallel(net, gradient_as_bucket_view=bucket_view)
            if not before:
                opt = module.AdamW(model.parameters(), lr=0.01, **options)
            for i in range(6):
                x = torch.randn(8, 300, generator=torch.Generator().manual_seed(10 * i + rank))
                opt.zero_grad(set_to_none=i % 2 == 0)
                (model(x) ** 2).mean().backward()
                if module is torch.optim and max_norm is not None and (i or not before):
                    torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
                opt.step()
            return torch.cat([p.detach().flatten() for p in net.parameters()])

        for bucket_view in (False, True):
            for max_norm in (None, 0.05):
                for before in (False, True):
                    if before and max_norm is not None:
                        continue
                    theirs, ours = (run(m, bucket_view, max_norm, before) for m in (torch.optim, optim))
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
                    ranks = [torch.empty_like(ours) for _ in range(2)]
                    dist.all_gather(ranks, ours)
                    assert torch.equal(*ranks)
        dist.barrier()  # a process that leaves sooner looks to gloo like one that failed
        dist.destroy_process_group()
        """,
        2,
    )


@pytest.mark.slow  # as test_processes_in_turn_share_state, in more ways
def test_two_processes_train_one_model_in_turns(tmp_path):
    """Hogwild, but in turns so that torch's result is known: each has an optimizer over the shared parameters."""
    processes(
        tmp_path,
        """
        import torch, torch.multiprocessing as mp
        from interop import optim

        def make(module, params, options):
            return module.AdamW(params, lr=0.1, **options)

        def step(opt, params, i):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            opt.step()

        def other(params, mine, yours, options):
            torch.set_num_threads(1)
            opt = make(optim, params, options)
            for i in range(4):
                yours.acquire()
                step(opt, params, 2 * i + 1)
                mine.release()

        def start():
            torch.manual_seed(0)
            return [torch.nn.Parameter(torch.randn(n)) for n in (30, 40000)]

        if __name__ == "__main__":
            torch.set_num_threads(1)
            params, options = start(), dict(ema=0.5, max_norm=1e9)
            opts = [make(torch.optim, params, {}) for _ in range(2)]
            for i in range(8):
                step(opts[i % 2], params, i)
            shared = start()
            ours = make(optim, shared, options)
            [p.share_memory_() for p in shared]
            context = mp.get_context("spawn")
            mine, yours = context.Semaphore(0), context.Semaphore(0)
            process = context.Process(target=other, args=(shared, mine, yours, options))
            process.start()
            for i in range(4):
                step(ours, shared, 2 * i)
                yours.release()
                assert mine.acquire(timeout=120)
            process.join()
            for p, q in zip(params, shared, strict=True):
                torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        """,
        1,
    )


# --- for long


@pytest.mark.slow
def test_memory_is_flat_over_many_steps():
    """10^5 steps with clipping and averages. glibc's heap grows and shrinks by 128 KiB at least, arenas by more."""
    result = subprocess_run(
        """
        import gc, os, torch
        from interop import optim
        torch.set_num_threads(1)
        params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 300, 2**15)]
        opt = optim.AdamW(params, lr=1e-3, max_norm=1.0, ema=0.9)

        def resident():
            gc.collect()
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        for i in range(1, 10**5 + 1):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
            if i in (10**4, 10**5):
                print(resident())
        """
    )
    assert result.returncode == 0, result.stderr
    early, late = map(int, result.stdout.split())
    assert late - early < 2**20


# --- a write straight after a step


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lives in a buffer", "is copied", "of optax"])
def test_a_write_straight_after_a_step_never_races(kind):
    """XLA runs behind Python's back: the step must neither read nor overwrite what is written once it has returned.

    Ten thousand times, to the parameter, its gradient and its state, of a size that takes XLA a while.
    """
    import optax

    import interop

    n, lr = 2**16, 0.5
    w = torch.nn.Parameter(torch.zeros(n))
    alias = w.detach() if kind == "is copied" else None  # a second owner: the parameter stays where it is
    made = interop.wrap(optax.trace(0.0), [w]) if kind == "of optax" else optim.SGD([w], lr=lr, momentum=0.5)
    grad = torch.empty(n)
    w.grad = grad
    for i in range(10_000):
        before, g = float(i % 7), float(1 + i % 5)
        with torch.no_grad():
            w.fill_(before)
        grad.fill_(g)
        for x in made.state.get(w, {}).values():
            if isinstance(x, torch.Tensor):
                x.zero_()
        made.step()
        grad.fill_(1e9)  # were it read late, it would be seen
        found = w[:: n - 1].tolist()
        with torch.no_grad():
            w.fill_(-1.0)
        expected = before + g if kind == "of optax" else before - lr * g
        assert found == [expected] * 2, i
        assert w[0].item() == w[-1].item() == -1.0
    assert alias is None or alias[0].item() == -1.0
