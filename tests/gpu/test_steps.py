"""What only a GPU can show: `make test-gpu`. Without one these tests skip; most of tests/interop/memory stands in.

torch on the same GPU is the truth. Copies that were not to be are errors here, for pytest makes errors of warnings.
"""

import contextlib
import copy
import gc
import io
import os
import time

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch and JAX have", allow_module_level=True)

import interop  # noqa: E402
from interop import amp, optim  # noqa: E402
from interop.dropin.plan import Plan  # noqa: E402
from interop.memory import cuda  # noqa: E402
from tests import cases  # noqa: E402

GPU = torch.device("cuda", 0)
SHAPES = [(300, 200), (64, 96), (40, 8), (7,), (5, 3)]


def parameters(shapes=SHAPES, dtype=torch.float32, device=GPU, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def gradients(params, i):
    generator = torch.Generator().manual_seed(100 + i)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def distance(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return max((((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in pairs), default=0.0)


def in_place(optimizer):
    """Every buffer's array lies where torch has its memory."""
    plan: Plan = optimizer._plan
    buffers = [x for bucket in plan.buckets for x in bucket.buffers]
    return all(x.array.unsafe_buffer_pointer() == x.memory.data_ptr() == x.address for x in buffers if x.nbytes)


def test_a_step_is_on_the_gpu_that_torch_has():
    assert cuda.cuda_device(0).jax_device.platform == "gpu"


# --- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
@cases.parametrize(cases.TORCH_CASES)
def test_classes_step_as_torchs(case, clipped):
    if clipped and case.id not in cases.UNLIKE:
        pytest.skip("one configuration of each kind is enough for what is around the step")
    shapes = [s for s in SHAPES if len(s) == 2] if case.matrices else SHAPES
    ours, theirs = parameters(shapes), parameters(shapes)
    a = getattr(optim, case.torch)(ours, lr=case.lr, **case.arguments, **({"max_norm": 1.0} if clipped else {}))
    b = getattr(torch.optim, case.torch)(theirs, lr=case.lr, **case.arguments)
    for i in range(4):
        gradients(ours, i)
        gradients(theirs, i)
        a.step()
        if clipped:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        b.step()
    assert in_place(a)
    assert distance(ours, theirs) <= (cases.MUON if case.name == "muon" else cases.TOLERANCES)["float32"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = (o.AdamW(x, lr=0.01, eps=1e-4) for o, x in ((optim, ours), (torch.optim, theirs)))
    for i in range(4):
        gradients(ours, i)
        gradients(theirs, i)
        a.step()
        b.step()
    assert in_place(a)
    narrow = dtype in (torch.bfloat16, torch.float16)
    assert distance(ours, theirs) <= cases.TOLERANCES["bfloat16" if narrow else str(dtype.to_real())[6:]]


@pytest.mark.parametrize("rows", [100, 100_000], ids=["by torch", "by a program"])
def test_sparse_gradients(rows):
    sides = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(rows, 64, sparse=True, device=GPU)
        optimizer = module.SparseAdam(embedding.parameters(), lr=0.01)
        for i in range(3):
            optimizer.zero_grad()
            embedding(torch.arange(i, rows // 2 + i, device=GPU)).square().sum().backward()
            optimizer.step()
        sides.append(embedding.weight.detach())
    assert distance(*([x] for x in sides)) <= cases.NETWORK["float32"]


def test_lbfgs():
    sides = []
    for module in (optim, torch.optim):
        [p] = parameters([(40, 8)])
        optimizer = module.LBFGS([p], line_search_fn="strong_wolfe")

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p.square() + p.cos()).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        sides.append(p.detach())
    assert distance(*([x] for x in sides)) <= 1e-4  # a line search goes another way for a last bit


# --- order ---------------------------------------------------------------------------------------------------


def slow():
    torch.cuda._sleep(100_000_000)  # cycles: some 50 ms


@pytest.mark.parametrize("side", [False, True], ids=["the default stream", "a side stream"])
def test_a_step_comes_after_torchs_work_and_before_it(side):
    """The gradient is written late, and the parameter read at once."""
    [p] = parameters([(1024, 1024)])
    optimizer = optim.SGD([p], lr=1.0)
    if not side:
        p.grad = torch.zeros_like(p)
        optimizer.step()
    p.grad = torch.zeros_like(p)
    torch.cuda.synchronize()
    slow()  # on the default stream: what is made on it would come late
    with torch.cuda.stream(torch.cuda.Stream()) if side else contextlib.nullcontext():
        for k in range(1, 6):
            before = p.detach().clone()
            slow()
            p.grad.fill_(float(k))
            optimizer.step()
            after = p * 1.0
            assert torch.equal(after, before - k), k


def test_without_that_order_it_would_be_wrong(monkeypatch):
    """So the test above can fail."""
    [p] = parameters([(1024, 1024)])
    optimizer, wrong = optim.SGD([p], lr=1.0), 0
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    monkeypatch.setattr(cuda.Cuda, "order", lambda *_: None)
    for k in range(1, 6):
        before = p.detach().clone()
        torch.cuda.synchronize()
        slow()
        p.grad.fill_(float(k))
        optimizer.step()
        torch.cuda.synchronize()
        wrong += not torch.equal(p, before - k)
    assert wrong


def test_a_first_step_in_a_side_stream():
    """The state's zeros are of that stream too."""
    ours, theirs = parameters(), parameters()
    a, b = optim.AdamW(ours), torch.optim.AdamW(theirs)
    gradients(ours, 0)
    gradients(theirs, 0)
    torch.cuda.synchronize()
    slow()
    with torch.cuda.stream(torch.cuda.Stream()):
        a.step()
    torch.cuda.synchronize()
    b.step()
    for i in (1, 2):
        gradients(ours, i)
        gradients(theirs, i)
        a.step()
        b.step()
    assert distance(ours, theirs) <= cases.TOLERANCES["float32"]


def test_torch_makes_its_tensors_on_the_gpu_by_default():
    params = parameters()
    optimizer = optim.AdamW(params, max_norm=1.0)
    with torch.device("cuda"):
        for i in range(2):
            gradients(params, i)
            optimizer.step()


def test_a_graph_that_was_captured_before_the_first_step():
    """Its replays see the parameters that were stepped."""
    model = torch.nn.Linear(300, 200).to(GPU)
    x, optimizer = torch.randn(8, 300, device=GPU), optim.SGD(model.parameters(), lr=0.1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    for i in range(2):
        gradients(list(model.parameters()), i)
        optimizer.step()
    graph.replay()
    torch.testing.assert_close(y, model(x))


def test_the_host_waits_for_nothing():
    """While the GPU has a second's work before it, steps of every kind return."""
    params = parameters()
    scaler = amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale(torch.ones((), device=GPU))
    optimizers = [optim.AdamW(params), optim.AdamW(params, max_norm=1.0, ema=0.9), optim.Adafactor(params)]
    wrapped = interop.wrap(optax.adam(1e-3), params)

    def steps(i):
        gradients(params, i)
        for optimizer in (*optimizers, wrapped):
            optimizer.step()
        scaler.step(optimizers[0])
        scaler.update()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for i in range(3):
            steps(i)
        torch.cuda.synchronize()
        gradients(params, 3)
        torch.cuda._sleep(2_000_000_000)
        end = torch.cuda.Event()
        for optimizer in (*optimizers, wrapped):
            optimizer.step()
        scaler.step(optimizers[0])
        scaler.update()
        end.record()
        assert not end.query()  # the GPU is still asleep
    torch.cuda.synchronize()


def test_gradients_that_are_freed_at_once():
    """Their memory is torch's again when the step has read it, and not before."""
    ours, theirs = parameters([(2048, 2048)]), parameters([(2048, 2048)])
    a, b = optim.AdamW(ours), torch.optim.AdamW(theirs)
    for i in range(10):
        for params, optimizer in ((ours, a), (theirs, b)):
            slow()
            params[0].grad = torch.full_like(params[0], 1.0 + i)
            optimizer.step()
            optimizer.zero_grad()
            torch.full_like(params[0], float("nan"))  # takes the memory that was freed
    assert distance(ours, theirs) <= cases.NETWORK["float32"]


# --- memory -----------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_tensors():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    params = parameters([(4096, 4096)] * 3 + [(4096,)] * 3)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = optim.AdamW(params)
    optimizer.step()
    held = sum(p.nbytes for p in params)
    assert torch.cuda.memory_allocated() - start <= 1.02 * 4 * held
    assert torch.cuda.max_memory_allocated() - start <= 1.02 * 4 * held
    stats = cuda.cuda_device(0).jax_device.memory_stats() or {}
    assert stats.get("bytes_in_use", 0) <= 0.02 * held
    del optimizer, params, p
    gc.collect()
    assert torch.cuda.memory_allocated() <= start + 2**22


def test_no_parameter_moves():
    params = parameters()
    before = [p.data_ptr() for p in params]
    gradients(params, 0)
    optimizer = optim.AdamW(params)
    optimizer.step()
    assert [p.data_ptr() for p in params] == before


# --- around the step --------------------------------------------------------------------------------------------


def test_grad_scaler_is_torchs():
    ours, theirs = parameters(), parameters()
    a, b = optim.AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, fused=True)
    scalers = amp.GradScaler("cuda", init_scale=8.0), torch.amp.GradScaler("cuda", init_scale=8.0)
    for i in range(6):
        for params, optimizer, scaler in zip((ours, theirs), (a, b), scalers, strict=True):
            scaler.scale(torch.ones((), device=GPU))
            gradients(params, i)
            if i in (1, 4):
                params[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert a.skipped == (i in (1, 4))
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert distance(ours, theirs) <= cases.NETWORK["float32"]
    assert {int(x["step"]) for x in a.state.values()} == {4}


def test_under_autocast_with_a_compiled_model():
    """A bfloat16 forward pass of a model that torch compiled, its losses beside those with torch's own optimizer."""
    sides = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1)).to(GPU)
        run = torch.compile(model, backend="aot_eager")
        optimizer, losses = module.AdamW(model.parameters(), lr=1e-3), []
        for i in range(20):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(i)).to(GPU)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = (run(x).float() - x.sum(1, keepdim=True)).square().mean() / 2  # of two parts
            loss.backward()
            losses.append(loss.item())
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        sides.append(losses)
    np.testing.assert_allclose(*sides, rtol=2e-2)  # bfloat16 has 8 bits


def test_a_graph_is_not_captured():
    params = parameters()
    gradients(params, 0)
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.step()
    torch.cuda.synchronize()
    before = [p.detach().clone() for p in params]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=GPU)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            optimizer.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


@pytest.mark.usefixtures("relaxed")
@pytest.mark.parametrize(
    "make", [lambda: optax.adamw(1e-2), lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3))]
)
def test_wrapped(make):
    sides = []
    for device in (GPU, torch.device("cpu")):
        params = parameters(device=device)
        optimizer = interop.wrap(make(), params)
        for i in range(3):
            gradients(params, i)
            optimizer.step()
        sides.append([p.detach().cpu() for p in params])
    assert distance(*sides) <= cases.NETWORK["float32"]


# --- where the model goes -----------------------------------------------------------------------------------------


def test_values_cross():
    x = torch.randn(300, 200, device=GPU)
    slow()
    x.mul_(2)
    array = interop.to_jax(x)
    kept = x.clone()
    x.zero_()
    assert next(iter(array.devices())).platform == "gpu"
    back = interop.to_torch(array * 1)
    assert back.device == GPU
    assert torch.equal(back, kept)


def test_a_run_moves_to_jax_and_back():
    torch.manual_seed(0)
    model = torch.nn.Linear(200, 300).to(GPU)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for i in range(2):
        gradients(list(model.parameters()), i)
        optimizer.step()
    reference = copy.deepcopy(model)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    gradients(list(model.parameters()), 2)
    grads = {name: interop.to_jax(p.grad) for name, p in model.named_parameters()}
    params, state = tx.step(grads, state, params)
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    gradients(list(reference.parameters()), 2)
    other.step()
    for i in (3, 4):
        for m, o in ((model, optimizer), (reference, other)):
            gradients(list(m.parameters()), i)
            o.step()
    assert distance(list(model.parameters()), list(reference.parameters())) <= cases.NETWORK["float32"]


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_checkpoints_go_to_torch_and_back(options):
    ours, theirs = parameters(), parameters()
    a, b = optim.AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for i in range(2):
        gradients(ours, i)
        gradients(theirs, i)
        a.step()
        b.step()
    places = [{k: v.device for k, v in s.items()} for o in (a, b) for s in o.state_dict()["state"].values()]
    assert places[: len(SHAPES)] == places[len(SHAPES) :]
    torch.save(a.state_dict(), file := io.BytesIO())
    file.seek(0)
    b.load_state_dict(torch.load(file))
    a.load_state_dict(copy.deepcopy(a.state_dict()))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p)
    for i in range(2, 4):
        gradients(ours, i)
        gradients(theirs, i)
        a.step()
        b.step()
    assert distance(ours, theirs) <= cases.NETWORK["float32"]


def test_a_model_that_moves_takes_its_state_along():
    torch.manual_seed(0)
    model = torch.nn.Linear(200, 300)
    reference = copy.deepcopy(model)
    optimizer, other = optim.AdamW(model.parameters()), torch.optim.AdamW(reference.parameters())
    for i, device in enumerate(("cpu", GPU, GPU, "cpu", "cpu")):
        model.to(device)
        gradients(list(model.parameters()), i)
        gradients(list(reference.parameters()), i)
        optimizer.step()
        other.step()
    assert distance(list(model.parameters()), list(reference.parameters())) <= cases.NETWORK["float32"]


@pytest.mark.parametrize("clipped", [False, True])
def test_devices_beside_each_other(clipped):
    """Some parameters on the CPU, some on each GPU that there is."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    ours = [p for d in devices for p in parameters(device=d)]
    theirs = [p for d in devices for p in parameters(device=d)]
    a, b = optim.AdamW(ours, max_norm=1.0 if clipped else None), torch.optim.AdamW(theirs)
    for i in range(3):
        gradients(ours, i)
        gradients(theirs, i)
        a.step()
        if clipped:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        b.step()
    assert distance([p.cpu() for p in ours], [p.cpu() for p in theirs]) <= cases.NETWORK["float32"]


def test_copies_and_pickles():
    params = parameters()
    optimizer = optim.AdamW(params)
    gradients(params, 0)
    optimizer.step()
    torch.save((params, optimizer), file := io.BytesIO())
    file.seek(0)
    copies = [copy.deepcopy((params, optimizer)), torch.load(file, weights_only=False)]
    gradients(params, 1)
    optimizer.step()
    for others, other in copies:
        gradients(others, 1)
        other.step()
        assert distance(others, params) == 0


@pytest.fixture(scope="module")
def process_group():
    dist = torch.distributed
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=GPU)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_distributed(kind):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    sides = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(65, 301), torch.nn.GELU(), torch.nn.Linear(301, 1)).to(GPU)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True) if kind == "DDP" else fully_shard(model)
        optimizer = module.AdamW(model.parameters(), lr=1e-2)
        for i in range(4):
            x = torch.randn(32, 65, generator=torch.Generator().manual_seed(i)).to(GPU)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        sides.append([getattr(p, "_local_tensor", p).detach() for p in model.parameters()])
    assert distance(*sides) <= 1e-4  # the products round otherwise with other memory


def test_a_long_run_leaves_nothing():
    """The memory of both allocators is the same after 20 steps and after 200."""
    params = parameters()
    optimizer = optim.AdamW(params, max_norm=1.0)
    jax_device = cuda.cuda_device(0).jax_device
    seen = []
    for i in range(200):
        gradients(params, i % 3)
        optimizer.step()
        if i in (20, 199):
            gc.collect()
            torch.cuda.synchronize()
            time.sleep(0.1)
            seen.append((torch.cuda.memory_allocated(), (jax_device.memory_stats() or {}).get("bytes_in_use")))
    assert seen[0] == seen[1]
