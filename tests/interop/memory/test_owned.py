"""Memory that torch owns: what is adopted, what is ordered, what is copied back, what is counted and taken back.

Here the memory is the host's (owned.py). tests/interop/dropin run whole under the same device in `make test-all`.
"""

import copy
import gc
import io
import itertools
import threading
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import interop  # noqa: E402
from interop import amp, memory, optim  # noqa: E402
from interop.dropin import program  # noqa: E402
from tests import cases  # noqa: E402
from tests.interop.memory.owned import OnCpu  # noqa: E402

F32 = np.dtype(np.float32)
BIG, ODD = (300, 200), (7,)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setitem(memory.DEVICES, memory.HOST.torch_device, found := OnCpu())
    return found


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


# --- what is where ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.AdamW, lambda p: interop.wrap(optax.adamw(0.1), p)], ids=["AdamW", "wrapped"])
def test_no_parameter_moves(device, relaxed, make):
    """What torch captured in a CUDA graph would read it where it was."""
    params = parameters(BIG, ODD)
    before = [p.data_ptr() for p in params]
    optimizer = make(params)
    for _ in range(2):
        optimizer.step()
    assert [p.data_ptr() for p in params] == before


def test_big_parameters_are_stepped_where_they_lie_and_small_ones_share(device):
    big, _ = params = parameters(BIG, ODD)
    optimizer = optim.AdamW(params)
    optimizer.step()
    [bucket] = optimizer._plan.buckets
    assert bucket.buffers[0].address == big.data_ptr()
    assert [leaf.home is None for leaf in bucket.leaves] == [True, False]


def test_a_wrapped_parameter_whose_storage_is_exchanged_is_stepped_in_the_new_one(device, relaxed):
    [p] = parameters(BIG)
    like = p.detach().clone()
    optimizer = interop.wrap(optax.sgd(0.5), [p])
    for _ in range(3):
        p.data = p.data.clone()
        like -= 0.5 * p.grad
        address = p.data_ptr()
        optimizer.step()
        assert p.data_ptr() == address == optimizer._groups[0]._held.params[0].buffer.address
        torch.testing.assert_close(p.detach(), like)


def test_clipping_complex_parameters(device):
    ours, theirs = ([torch.nn.Parameter(torch.ones(s, dtype=torch.complex64)) for s in (BIG, ODD)] for _ in range(2))
    a, b = optim.AdamW(ours, max_norm=1.0), torch.optim.AdamW(theirs)
    for i in range(2):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_all_memory_is_made_in_the_thread_that_steps(device, monkeypatch):
    """torch's current stream is a thread's own."""
    made, of = [], device.zero_bytes
    monkeypatch.setattr(device, "zero_bytes", lambda n: made.append(threading.get_ident()) or of(n))
    optim.AdamW(parameters(BIG, ODD)).step()
    assert set(made) == {threading.get_ident()}


@pytest.mark.parametrize("place", ["the call", "the results"])
def test_want_of_memory_is_tried_again_once(device, monkeypatch, place):
    buffer, calls = device.buffer(1000, F32), []
    view = buffer.view(torch.float32, (1000,))
    monkeypatch.setattr(device, "make_room", lambda error: "RESOURCE_EXHAUSTED" in str(error))

    def launched(arrays):
        calls.append(1)
        if len(calls) == 1:
            arrays[0].delete()
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if place == "the results":
            arrays[0].delete()
            return [None]
        return [jax.block_until_ready(arrays[0] + 1)]

    if place == "the results":  # which are no arrays
        with pytest.raises(AttributeError):
            program.launch(device, launched, [buffer])
        program.launch(device, lambda arrays: [jax.block_until_ready(arrays[0] + 1)], [buffer])
    else:
        program.launch(device, launched, [buffer])
    assert len(calls) == 2
    assert torch.equal(view, torch.ones(1000))


def test_views_and_tied_parameters_are_stepped_where_they_lie(device):
    """As FSDP's shards and views of one flat tensor: no copy is made of them."""
    flat = torch.zeros(2 * 60000)
    params = [torch.nn.Parameter(flat[i * 60000 : (i + 1) * 60000]) for i in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optim.SGD(params, lr=0.5)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(flat, torch.full_like(flat, -1.0))
    assert [leaf.home for leaf in optimizer._plan.leaves.values()] == [None, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(40000 + 1)[1:],  # not where XLA takes memory
        lambda: torch.zeros(200, 201)[:, 1:],
        lambda: torch.zeros(8, 16, 20, 20).contiguous(memory_format=torch.channels_last),
    ],
    ids=["unaligned", "with gaps", "channels last"],
)
def test_memory_that_programs_cannot_take_is_copied_in_and_out(device, make):
    p = torch.nn.Parameter(make())
    address = p.data_ptr()
    optimizer = optim.SGD([p], lr=0.5)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.data_ptr() == address
    assert torch.equal(p, torch.full(p.shape, -1.0))


def test_a_gradient_that_programs_cannot_take_is_copied(device):
    """As in the buckets of DistributedDataParallel."""
    p, like = parameters(BIG) + parameters(BIG)
    optimizer, expected = optim.AdamW([p]), torch.optim.AdamW([like])
    for _ in range(3):
        like.grad = torch.randn(BIG)
        p.grad = torch.cat([torch.zeros(1), like.grad.view(-1)])[1:].view(BIG)
        assert p.grad.data_ptr() % device.alignment
        optimizer.step()
        expected.step()
    torch.testing.assert_close(p, like, rtol=1e-6, atol=1e-7)


def test_a_parameter_whose_storage_is_exchanged_each_time_is_planned_for_twice(device, monkeypatch):
    [p], like = parameters(BIG), torch.zeros(BIG)
    like.copy_(p.detach())
    optimizer, plans = optim.SGD([p], lr=0.5), set()
    for _ in range(5):
        p.data = p.data.clone()
        like -= 0.5 * p.grad
        optimizer.step()
        plans.add(optimizer._plan)
        torch.testing.assert_close(p.detach(), like)
    assert len(plans) == 3


def test_memory_ends_with_the_last_who_sees_it(device):
    big, odd = params = parameters(BIG, ODD)
    optimizer = optim.AdamW(params)
    optimizer.step()
    state, owner = optimizer.state[big]["exp_avg"], weakref.ref(optimizer._plan.buckets[0].buffers[1].memory)
    values = state.clone()
    del optimizer, params, big, odd
    gc.collect()
    assert owner() is not None
    assert torch.equal(state, values)
    del state
    gc.collect()
    assert owner() is None


# --- order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "launches"),
    [
        (lambda p: optim.AdamW(p), 1),
        (lambda p: optim.AdamW(p, max_norm=1.0, ema=0.9), 1),  # the norms are torch's
        (lambda p: optim.Muon(p[:1]), 2),
        (lambda p: optim.Prodigy(p), 2),
        (lambda p: interop.wrap(optax.adamw(0.1), p), 1),
    ],
    ids=["AdamW", "clipped", "Muon", "Prodigy", "wrapped"],
)
def test_each_launch_comes_after_torch_and_torch_after_it(device, relaxed, make, launches):
    params = parameters(BIG, ODD)
    optimizer = make(params)
    optimizer.step()
    device.recorded.clear()
    optimizer.step()
    order = [x for x in device.recorded if x in ("order", "wait")]
    assert order[0] == "order"
    assert order[-1] == "wait"
    assert order.count("order") == launches
    for x, y in itertools.pairwise(order):
        assert (x, y) != ("order", "order")  # torch waits for one before the next sees its memory
    assert device.recorded.index("begin") < device.recorded.index("order")


def test_a_launch_takes_along_what_orders_it(device):
    """A program waits for all that it is given, so also for this, though it reads none of it."""
    params = parameters(BIG)
    optimizer = optim.SGD(params, lr=0.5)
    optimizer.step()
    [update] = optimizer._plan.programs(optimizer).updates
    taken = jax.tree.leaves(
        update.compiled.in_avals if hasattr(update.compiled, "in_avals") else update.compiled.args_info
    )
    assert tuple(taken[-1].shape) == (1,)
    assert len(re_parameters(update.compiled.as_text())) == len(taken)


def re_parameters(text):
    entry = text[text.index("\nENTRY") :]
    return [line for line in entry.splitlines() if " parameter(" in line]


# --- results ---------------------------------------------------------------------------------------------


def test_results_in_place_are_kept_and_others_copied_back(device):
    buffer = device.buffer(1000, F32)
    view = buffer.view(torch.float32, (10, 100))
    same = buffer.array

    def in_place(arrays):
        view.fill_(3.0)
        return arrays

    program.launch(device, in_place, [buffer])
    assert buffer.array is same
    program.launch(device, lambda arrays: [jax.block_until_ready(arrays[0] + 1)], [buffer])
    assert buffer.array is not same
    assert torch.equal(view, torch.full((10, 100), 4.0))
    assert buffer.array.unsafe_buffer_pointer() == view.data_ptr()


def test_a_copy_that_was_not_to_be_is_said_once(device, monkeypatch):
    monkeypatch.setattr(OnCpu, "warns_of_copies", True)
    buffer = device.buffer(1000, F32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            program.launch(device, lambda arrays: [arrays[0] + 1], [buffer])
    assert ["came to lie elsewhere" in str(x.message) for x in said] == [True]


def test_memory_is_whole_after_a_launch_that_raised(device):
    params = parameters(BIG, ODD)
    optimizer = optim.AdamW(params)
    optimizer.step()
    plan = optimizer._plan
    updates = plan.programs(optimizer).updates
    kept, values = updates[0], [p.detach().clone() for p in params]

    def failing(buffers, *arguments):
        for x in buffers[:-1]:
            x.delete()
        raise RuntimeError("out of memory")

    updates[0] = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for p, x in zip(params, values, strict=True):
        assert torch.equal(p, x)
    updates[0] = kept
    other = parameters(BIG, ODD)
    expected = optim.AdamW(other)
    for _ in range(2):
        expected.step()
    optimizer.step()
    for p, x in zip(params, other, strict=True):
        assert torch.equal(p, x)


@pytest.mark.parametrize("dtype", [*memory.tensors.DTYPES, torch.bool, torch.int32, torch.int64, torch.uint8])
def test_values_cross_in_every_type(device, x64, dtype):
    x = (torch.arange(12) % 2).to(dtype).reshape(3, 4)
    sent = interop.to_jax(x)
    assert sent.dtype == memory.tensors.numpy_dtype(dtype)
    x.zero_()
    assert np.asarray(sent).real.astype(np.float64).sum() == 6
    received = interop.to_torch(sent)
    assert received.dtype is dtype
    assert received.sum().real == 6
    assert interop.to_torch(jnp.zeros((0, 3))).shape == (0, 3)
    for refused in (lambda: interop.to_jax(x, copy=False), lambda: interop.to_torch(sent, copy=False)):
        with pytest.raises(ValueError, match="cannot share its memory"):
            refused()


# --- steps that the device skips --------------------------------------------------------------------


def scaled(optimizer, params, scaler, value=1.0):
    for p in params:
        p.grad = torch.full_like(p, 2.0**10 * value)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("asks", ["next step", "skipped", "state_dict", "pickle"])
def test_the_host_takes_back_the_count_of_a_step_that_was_skipped(device, asks):
    params = parameters(BIG, ODD)
    optimizer, scaler = optim.AdamW(params), amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=0.5)
    scaler.scale(torch.ones(()))
    scaled(optimizer, params, scaler)
    before = [p.detach().clone() for p in params]
    scaled(optimizer, params, scaler, float("inf"))
    assert scaler.get_scale() == 2.0**9
    assert optimizer._around.pending is not None  # nobody has waited
    count = optimizer.state[params[0]]["step"]
    if asks == "next step":
        scaled(optimizer, params, scaler, 0.5)
        assert count == 2
        assert not optimizer.skipped
        return
    if asks == "skipped":
        assert optimizer.skipped
    elif asks == "state_dict":
        assert [x["step"] for x in optimizer.state_dict()["state"].values()] == [1, 1]
    else:
        torch.save(optimizer, file := io.BytesIO())
        file.seek(0)
        assert [x["step"] for x in torch.load(file, weights_only=False).state.values()] == [1, 1]
    assert count == 1
    for p, x in zip(params, before, strict=True):
        assert torch.equal(p, x)


def test_a_count_that_its_user_set_since_stays(device):
    params = parameters(BIG)
    optimizer, scaler = optim.AdamW(params), amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    scaled(optimizer, params, scaler)
    scaled(optimizer, params, scaler, float("nan"))
    optimizer.state[params[0]]["step"].fill_(7)
    assert optimizer.skipped
    assert optimizer.state[params[0]]["step"] == 7


@cases.parametrize([case for case in cases.TORCH_CASES if case.id in cases.UNLIKE])
def test_a_scaled_run_is_torchs(device, case):
    """Steps, some of them skipped, are those that torch.amp.GradScaler takes with torch's optimizer."""
    shapes = (BIG, (40, 8)) if case.matrices else (BIG, (40, 8), ODD)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    a = getattr(optim, case.torch)(ours, lr=case.lr, **case.arguments)
    b = getattr(torch.optim, case.torch)(theirs, lr=case.lr, **case.arguments)
    scalers = amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(5):
        for params, optimizer, scaler in zip((ours, theirs), (a, b), scalers, strict=True):
            scaler.scale(torch.ones(()))
            generator = torch.Generator().manual_seed(i)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) * scaler.get_scale()
            if i in (1, 3):
                params[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].state_dict() == scalers[1].state_dict()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key, x in b.state[q].items():
            if key == "step":
                assert a.state_dict()["state"][0][key] == x


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}])
def test_step_counts_are_saved_where_torch_keeps_them(monkeypatch, options):
    """The meta device stands in for a GPU: on it torch's own classes keep the count with `capturable` or `fused`."""
    from interop.dropin.state import placed

    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0].update(options)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(torch.optim.Optimizer.state_dict(optimizer))
    optimizer.param_groups[0]["params"] = [p]
    found = placed(optimizer, saved)["state"][0]
    assert found["step"].device.type == ("meta" if options else "cpu")
    assert found["exp_avg"].device.type == "cpu"  # as it was
