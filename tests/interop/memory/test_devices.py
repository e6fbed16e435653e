"""The seam of `interop.memory`: a second device, whose memory is apart from what torch sees, steps as the first does.

It keeps the order of torch's work and the programs' strictly. What torch writes after `before` no program sees; what
programs write torch sees after `after`, and not sooner. Every call is counted.
"""

import collections
import copy
import weakref

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import interop  # noqa: E402
from interop import amp, memory, optim  # noqa: E402
from interop.dropin import program  # noqa: E402
from interop.memory import device, tensors, values  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from tests import cases  # noqa: E402

CPU = torch.device("cpu")


def put(x):
    """A copy that JAX owns."""
    with enable_x64(True):
        return jax.device_put(x.copy(), Apart.program_device).block_until_ready()


class Buffer(device.Buffer):
    def __init__(self, owner, shape, dtype):
        self.seen = np.zeros(shape, dtype)  # by torch
        self.of_programs = memory.cpu.aligned_zeros(int(np.prod(shape)), dtype).reshape(shape)
        self.pending = None
        self.take_back()
        owner.buffers.add(self)

    def take_back(self):
        self.array = memory.HOST.of_size(0).alias(self.of_programs)

    def view(self, dtype, shape, offset=0):
        return tensors.view(self.seen.reshape(-1).view(np.uint8), dtype, shape, offset)


class Staging(device.Staging):
    def __init__(self, owner, size, dtype):
        self.seen, self.of_programs = (memory.cpu.aligned_zeros(size, dtype) for _ in range(2))
        owner.stagings.add(self)

    def view(self, dtype, shape, offset):
        return tensors.view(self.seen.view(np.uint8), dtype, shape, offset)

    def array(self, shape):
        return self.of_programs[: int(np.prod(shape))].reshape(shape)


class Table(device.Table):
    def __init__(self, rows, columns, dtype):
        self.rows = np.zeros((rows, columns), dtype)

    def array(self):
        return put(self.rows)


class Apart(device.Device):
    torch_device = torch.device("cpu")  # there is no other here
    jax_device, program_device = memory.HOST.jax_device, memory.HOST.of_size(0).program_device
    fuses_outputs = memory.HOST.fuses_outputs
    compiling = memory.HOST.compiling

    def __init__(self):
        self.calls = collections.Counter()
        self.buffers, self.stagings = weakref.WeakSet(), weakref.WeakSet()

    def check(self):
        self.calls["check"] += 1

    def recover(self, buffers):
        self.calls["recover"] += 1

    def begin(self):
        self.calls["begin"] += 1

    def before(self):
        self.calls["before"] += 1
        assert not any(x.pending is not None for x in self.buffers), "a launch was not followed by `after`"
        for x in self.buffers:
            x.of_programs[...] = x.seen
        for x in self.stagings:
            x.of_programs[:] = x.seen
        return ()

    def after(self, results):
        self.calls["after"] += 1
        jax.block_until_ready(results)
        for x in self.buffers:
            if x.pending is not None:
                x.seen[...] = np.asarray(x.pending)
                x.pending = None

    def buffer(self, shape, dtype):
        self.calls["buffer"] += 1
        return Buffer(self, shape, dtype)

    def replace(self, buffers, results):
        self.calls["replace"] += 1
        for x, result in zip(buffers, results, strict=True):
            x.pending = result
            x.take_back()

    def staging(self, size, dtype):
        self.calls["staging"] += 1
        return Staging(self, size, dtype)

    def table(self, rows, columns, dtype):
        self.calls["table"] += 1
        return Table(rows, columns, dtype)

    def put(self, x):
        self.calls["put"] += 1
        return put(x)

    def zeros(self, size, dtype):
        self.calls["zeros"] += 1
        return np.zeros(size, dtype)

    def elements(self, tensors, dtype):
        self.calls["elements"] += 1
        return [None if x is None else np.array(x) for x in memory.HOST.elements(tensors, dtype)]

    def elements_at(self, places, dtype):
        raise AssertionError("only the reader in C++ asks for it, which is off")

    def shown(self, x):
        raise AssertionError("only what processes have parts of is shown")

    def sent(self, x):
        raise AssertionError("values cross by the host")

    received = sent

    def array(self, x):
        self.calls["array"] += 1
        return put(x.numpy())

    def tensor(self, x):
        self.calls["tensor"] += 1
        return values.to_torch(x)


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setitem(memory.DEVICES, CPU, found := Apart())
    return found


SIZES = ((300, 200), (40, 8), (7,), (12, 3))  # the first has buffers of its own


def train(case, extras, on=None):
    """Some steps, with what a plan does not see each time: absent gradients, exchanged state, another group's rate."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(x if len(x) == 2 else (1, *x)) for x in SIZES] if case.matrices else SIZES
    params = [torch.nn.Parameter(torch.randn(x, generator=generator)) for x in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 2 * case.lr}]
    arguments = dict(max_norm=1.0, ema=0.9) if extras else {}
    optimizer = getattr(optim, case.torch)(groups, lr=case.lr, **case.arguments, **arguments)
    scaler = amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    for i in range(6):
        for j, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator)
            p.grad = None if (i, j) == (2, 1) else grad
        if extras:
            for p in params:
                p.grad = None if p.grad is None else p.grad * 2.0**10
            if i == 3:
                params[0].grad[0, 0] = float("inf")  # the step is skipped
        if i == 4:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.param_groups[0]["lr"] /= 2
        if extras:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    state = [x for p in params for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in (*params, *state)], optimizer


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "clipped, unscaled and averaged"])
@cases.parametrize(list({case.name: case for case in cases.TORCH_CASES if case.id in cases.UNLIKE}.values()))
def test_a_second_device_steps_as_the_first(apart, monkeypatch, case, extras):
    launches = []
    launch = program.launch
    monkeypatch.setattr(program, "launch", lambda device, *args: launches.append(device) or launch(device, *args))
    found, optimizer = train(case, extras)
    assert {bucket.device for bucket in optimizer._plan.buckets} == {apart}
    assert set(launches) == {apart}
    n, calls = len(launches), apart.calls.copy()
    monkeypatch.setitem(memory.DEVICES, CPU, memory.HOST)
    expected, _ = train(case, extras)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert calls["replace"] == n
    assert calls["before"] >= n
    assert calls["after"] >= n
    assert calls["buffer"] == sum(len(b.buffers) for b in optimizer._plan.buckets)  # memory is made once
    assert calls["staging"] == 1
    assert calls["table"] == len(optimizer._plan.buckets)


@pytest.mark.parametrize("forgotten", ["before", "after"])
def test_an_order_that_is_not_kept_is_noticed(apart, monkeypatch, forgotten):
    case = next(c for c in cases.TORCH_CASES if c.id == "adamw")
    expected, _ = train(case, extras=False)
    other = Apart()
    monkeypatch.setitem(memory.DEVICES, CPU, other)
    kept = getattr(other, forgotten)
    monkeypatch.setattr(other, forgotten, lambda *args: () if other.calls["replace"] > 2 else kept(*args))
    try:
        found, _ = train(case, extras=False)
    except AssertionError as error:
        assert forgotten in str(error)  # noqa: PT017 - one of two ways to notice
    else:
        assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_several_devices_have_one_norm(apart, monkeypatch, scaled):
    """A bucket is of one device, and what is found in its gradients goes to the others."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    like = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    monkeypatch.setattr("interop.dropin.plan.check_parameter", lambda name, x: memory.HOST if x is p else apart)
    optimizer, expected = optim.SGD([p, q], lr=0.5, max_norm=1.0), torch.optim.SGD(like, lr=0.5)
    scaler = amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for i in range(3):
        for j, (x, y) in enumerate(zip((p, q), like, strict=True)):
            y.grad = torch.full((3,), 1.0 + i + j)
            x.grad = y.grad * (4.0 if scaled else 1.0)
        if i == 2:
            if scaled:
                q.grad[0] = float("nan")
            else:
                break
        elif not scaled or i < 2:
            torch.nn.utils.clip_grad_norm_(like, 1.0)
            expected.step()
        scaler.step(optimizer) if scaled else optimizer.step()
        assert optimizer.skipped == (i == 2)
        scaler.update(4.0) if scaled else None
        for x, y in zip((p, q), like, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def wrapped(tx, asks):
    """Steps of `interop.wrap`, one without a gradient, one with other state, one with a closure."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(x, generator=generator)) for x in SIZES]
    kept = params[1].detach()  # it stays where it is
    optimizer = interop.wrap(tx, params)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    for i in range(5):
        closure()
        params[2].grad = None if i == 2 else params[2].grad
        if i == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(closure if asks or i == 4 else None)
    state = [x for p in params for x in optimizer.state[p].values()]
    assert torch.equal(kept, params[1])
    return [x.detach().clone() for x in (*params, *state)]


@pytest.mark.parametrize("name", ["clipped", "noise", "lbfgs"])
def test_wrapped_optimizers_step_on_a_second_device(apart, monkeypatch, name):
    """Also one that calls the closure from inside."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tx = {
            "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
            "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
            "lbfgs": optax.lbfgs,
        }[name]()
        found = wrapped(tx, name == "lbfgs")
        calls = apart.calls.copy()
        monkeypatch.setitem(memory.DEVICES, CPU, memory.HOST)
        expected = wrapped(tx, name == "lbfgs")
    assert calls["replace"] - 1 == calls["begin"] == 5  # one more makes the first state
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
