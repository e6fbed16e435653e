"""The drop-in under torch.distributed: DDP, ZeroRedundancyOptimizer, distributed checkpoints, FSDP2.

What needs two processes runs in two, spawned, on gloo: a worker is a function of this module whose assertions are the
test. Each process has data of its own, so that a gradient that is not reduced shows.
"""

import contextlib
import copy
import datetime
import functools
import gc
import os
import sys
import tempfile

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from interop import amp, optim  # noqa: E402
from tests import cases  # noqa: E402

WORLD = 2
ROWS = 8  # of a process's batch

# torch.distributed warns of its own use of old names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*", "ignore::UserWarning:torch.*")


def spawn(worker, *args, folder, world=WORLD):
    store = f"file://{tempfile.mkdtemp(dir=folder)}/store"
    torch.multiprocessing.spawn(_enter, (worker, store, world, args), nprocs=world)


def _enter(rank, worker, store, world, args):
    from tests.conftest import TORCHS_MEMORY, step_torchs_memory  # and its settings of JAX, and its cache

    if TORCHS_MEMORY in os.environ:
        step_torchs_memory()
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    worker(rank, *args)
    dist.barrier()  # a process that leaves sooner looks to gloo like one that failed
    dist.destroy_process_group()
    # A thread that wants the interpreter's lock while the interpreter ends aborts the process, and gloo's threads now
    # and then do. What is tested is over here, so the process leaves without that end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def alone():
    """A process group of this process, and a mesh of it."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def network(seed=0, dtype=torch.float64):
    """Over two processes: a large matrix in uneven shards, small tensors in even ones, and some that leave one out."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(300, 201), torch.nn.Tanh(), torch.nn.Linear(201, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
    return torch.nn.Sequential(*layers).to(dtype)


def batch(step, rank, dtype=torch.float64):
    """A process's data, or with rank None that of all, whose mean gradient is the mean of theirs."""
    if rank is None:
        return torch.cat([batch(step, r, dtype) for r in range(WORLD)])
    return torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)


def backward(model, step, rank):
    loss = model(batch(step, rank)).pow(2).mean()
    loss.backward()
    return loss


def train(model, opt, rank, steps=range(5), set_to_none=True, max_norm=None):
    for i in steps:
        opt.zero_grad(set_to_none=set_to_none)
        backward(model, i, rank)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        opt.step()


def whole(x):
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_near(theirs, ours, tolerance=cases.NETWORK["float64"]):
    for p, q in zip(theirs, ours, strict=True):
        assert cases.difference(whole(q), whole(p)) <= tolerance


def assert_same_state(theirs, ours):
    """torch's keys, and its values."""
    for p, q in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        wanted = {name: x for name, x in theirs.state[p].items() if x is not None}
        found = {name: x for name, x in ours.state[q].items() if x is not None}
        assert list(wanted) == list(found)
        assert_near(wanted.values(), found.values())


def assert_equal_on_all(params):
    """Bit for bit."""
    mine = torch.cat([p.detach().flatten() for p in params])
    all_of_them = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(all_of_them, mine)
    assert all(torch.equal(x, mine) for x in all_of_them)


# --- DDP


def ddp_worker(rank, configurations, ways):
    for name, arguments, max_norm in configurations:
        for as_view, set_to_none in ways:
            models = [DistributedDataParallel(network(), gradient_as_bucket_view=as_view) for _ in range(2)]
            theirs, ours = models
            opt = getattr(torch.optim, name)(theirs.parameters(), **arguments, foreach=False)

            train(theirs, opt, rank, set_to_none=set_to_none, max_norm=max_norm)
            opt = getattr(optim, name)(ours.parameters(), **arguments, max_norm=max_norm)
            places = []
            for i in range(5):
                opt.zero_grad(set_to_none=set_to_none)
                backward(ours, i, rank)
                grads = [p.grad for p in ours.parameters()]
                before = [(g.data_ptr(), g.clone()) for g in grads]
                opt.step()
                for p, g, (pointer, value) in zip(ours.parameters(), grads, before, strict=True):
                    assert p.grad is g
                    assert g.data_ptr() == pointer
                    assert torch.equal(g, value)
                places.append([pointer for pointer, _ in before])
            if as_view:  # DDP rebuilds its buckets once, after the first backward pass
                assert all(place == places[1] for place in places[1:])
            del opt
            gc.collect()
            assert all(torch.equal(p.grad, value) for p, (_, value) in zip(ours.parameters(), before, strict=True))
            assert_near(theirs.parameters(), ours.parameters())
            assert_equal_on_all(ours.parameters())


@pytest.mark.slow
def test_ddp(tmp_path):
    """As torch.optim under the same DDP; its gradients, views of buckets or not, stay where they are."""
    spawn(ddp_worker, [("AdamW", dict(lr=0.01), None)], [(False, True), (True, False)], folder=tmp_path)


@pytest.mark.slow
def test_ddp_in_all_ways(tmp_path):
    configurations = [
        ("AdamW", dict(lr=0.01), None),
        ("AdamW", dict(lr=0.01), 0.1),
        ("SGD", dict(lr=0.05, momentum=0.9), None),
        ("SGD", dict(lr=0.05, momentum=0.9), 0.1),
    ]
    ways = [(as_view, set_to_none) for as_view in (False, True) for set_to_none in (False, True)]
    spawn(ddp_worker, configurations, ways, folder=tmp_path)


def ddp_scaler_worker(rank):
    theirs, ours = (DistributedDataParallel(network()) for _ in range(2))
    amp_train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01), rank, 0.1)
    opt = optim.AdamW(ours.parameters(), lr=0.01, max_norm=0.1)
    scaler = amp.GradScaler("cpu", init_scale=8.0)
    for i in range(5):
        opt.zero_grad()
        loss = ours(batch(i, rank)).pow(2).mean()
        scaler.scale(loss * (torch.inf if rank == 1 and i == 2 else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        assert opt.skipped == (i == 2)
    assert_near(theirs.parameters(), ours.parameters())
    assert_equal_on_all(ours.parameters())


@pytest.mark.slow
def test_unscaling_and_clipping_in_the_step_under_ddp(tmp_path):
    """An infinity in one process is skipped by all."""
    spawn(ddp_scaler_worker, folder=tmp_path)


# --- checkpoints


def save(path, model, opt):
    model_state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": model_state, "optimizer": opt_state}, checkpoint_id=path)


def load(path, model, opt):
    model_state, opt_state = get_state_dict(model, opt)
    state = {"model": model_state, "optimizer": opt_state}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


OPTIMIZERS = (
    ("AdamW", dict(lr=0.01, amsgrad=True)),
    ("SGD", dict(lr=0.05, momentum=0.9, dampening=0.5)),
    ("Adagrad", dict(lr=0.01, lr_decay=0.1)),  # makes its state when it is made
)


def checkpoints(folder, rank, wrap, data=None, load_wrap=None, optimizers=OPTIMIZERS):
    """Saved by one, loaded into another, the next steps are those of torch's uninterrupted run."""
    for name, arguments in optimizers:
        for saver, loader in ((torch.optim, optim), (optim, torch.optim), (optim, optim)):
            path = f"{folder}/{name}-{saver.__name__}-{loader.__name__}"
            reference = network()
            opt = getattr(torch.optim, name)(reference.parameters(), **arguments, foreach=False)
            train(reference, opt, data, range(6))
            model = wrap(network())
            first = getattr(saver, name)(model.parameters(), **arguments)
            train(model, first, rank, range(3))
            save(path, model, first)
            model = (load_wrap or wrap)(network(seed=1))
            # Numbers of its own, that the checkpoint's replace
            second = getattr(loader, name)(model.parameters(), **arguments | {"lr": 0.3})
            load(path, model, second)
            train(model, second, data if load_wrap else rank, range(3, 6))
            assert_near(reference.parameters(), model.parameters())
            assert_same_state(opt, second)


def test_checkpoints(tmp_path):
    checkpoints(tmp_path, 0, wrap=lambda model: model, data=0, optimizers=OPTIMIZERS[:1])


@pytest.mark.slow
def test_checkpoints_of_others(tmp_path):
    checkpoints(tmp_path, 0, wrap=lambda model: model, data=0, optimizers=OPTIMIZERS[1:])


def ddp_checkpoint_worker(rank, folder):
    checkpoints(f"{folder}/ddp", rank, wrap=DistributedDataParallel)


@pytest.mark.slow
def test_checkpoints_under_ddp(tmp_path):
    spawn(ddp_checkpoint_worker, tmp_path, folder=tmp_path)


# --- ZeRO


def zero_worker(rank):
    for as_view in (False, True):
        for name, arguments in OPTIMIZERS:
            theirs, ours = (DistributedDataParallel(network()) for _ in range(2))
            opt = getattr(torch.optim, name)(theirs.parameters(), **arguments, foreach=False)
            sharded = ZeroRedundancyOptimizer(
                ours.parameters(),
                optimizer_class=getattr(optim, name),
                parameters_as_bucket_view=as_view,
                **arguments,
            )
            train(theirs, opt, rank)
            train(ours, sharded, rank)
            assert_near(theirs.parameters(), ours.parameters())
            assert_equal_on_all(ours.parameters())
            sharded.consolidate_state_dict(to=0)
            saved = [sharded.state_dict() if rank == 0 else None]
            dist.broadcast_object_list(saved)
            train(theirs, opt, rank, range(5, 8))
            # torch's own takes it up, sharded or not, and so do ours
            classes = getattr(torch.optim, name), getattr(optim, name)
            whole = [functools.partial(c, **arguments) for c in classes]
            parts = [functools.partial(ZeroRedundancyOptimizer, optimizer_class=c, **arguments) for c in classes]
            for make in whole + parts:
                model = network()
                model.load_state_dict(ours.module.state_dict())
                model = DistributedDataParallel(model)
                fresh = make(model.parameters())
                fresh.load_state_dict(copy.deepcopy(saved[0]))  # torch loads tensors as they are
                train(model, fresh, rank, range(5, 8))
                assert_near(theirs.parameters(), model.parameters())


@pytest.mark.slow
def test_zero_redundancy_optimizer(tmp_path):
    spawn(zero_worker, folder=tmp_path)


def test_max_norm_of_a_part_of_the_parameters_is_refused():
    """ZeroRedundancyOptimizer gives each process's optimizer its part, whose norm is not that of all."""
    with alone():
        model = network()
        with pytest.raises(ValueError, match=r"max_norm: expected .* call torch.nn.utils.clip_grad_norm_"):
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optim.AdamW, max_norm=1.0)


# --- FSDP2

ELEMENTWISE = (
    ("AdamW", dict(lr=0.01, amsgrad=True)),
    ("SGD", dict(lr=0.05)),
    ("SGD", dict(lr=0.05, momentum=0.9)),
    ("Adam", dict(lr=0.01)),
    ("NAdam", dict(lr=0.01)),
    ("RAdam", dict(lr=0.01)),
    ("Adamax", dict(lr=0.01)),
    ("Adagrad", dict(lr=0.01)),
    ("Adadelta", dict(lr=0.5)),
    ("RMSprop", dict(lr=0.001, momentum=0.5, eps=1e-3, centered=True)),
    ("Rprop", dict(lr=0.001)),  # torch's does not take DTensors
    ("ASGD", dict(lr=0.01, t0=2)),
)


def shard(model, mesh, **options):
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def assert_placed_as_parameters(opt):
    for p in opt.param_groups[0]["params"]:
        wanted = torch.zeros_like(p)
        for name, x in opt.state[p].items():
            if name in ("step", "mu_product", "eta", "mu"):
                assert type(x) is torch.Tensor
                assert x.ndim == 0
            elif x is not None:
                assert type(x) is DTensor
                assert x.placements == wanted.placements
                assert x.device_mesh == wanted.device_mesh
                assert (x.shape, x.stride(), x.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
                assert x.to_local().shape == wanted.to_local().shape


def fsdp_worker(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, arguments in ELEMENTWISE:
        reference, model = network(), shard(network(), mesh)
        assert {p.to_local().numel() for p in model[4].parameters()} == ({6, 1} if rank == 0 else {0})
        opt = getattr(torch.optim, name)(reference.parameters(), **arguments, foreach=False)
        train(reference, opt, None)
        ours = getattr(optim, name)(model.parameters(), **arguments)
        params = list(model.parameters())
        train(model, ours, rank)
        assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
        assert_near(reference.parameters(), params)
        assert_same_state(opt, ours)
        assert_placed_as_parameters(ours)


def amp_train(model, opt, rank, norm, after_step=lambda: None):
    """torch's way to scale the loss, to skip a step, and to clip the norm over all processes."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(5):
        opt.zero_grad()
        loss = model(batch(i, rank)).pow(2).mean()
        scaler.scale(loss * (torch.inf if rank in (None, 1) and i == 2 else 1.0)).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        scaler.step(opt)
        scaler.update()
        if i != 2:
            after_step()


def fsdp_surroundings_worker(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    part = fully_shard(torch.nn.Linear(300, 1).double(), mesh=mesh)  # of which the second process has nothing
    train(part, optim.AdamW(part.parameters(), ema=0.9), rank)
    assert {p.to_local().numel() for p in part.parameters()} == ({300, 1} if rank == 0 else {0})

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for tolerance, options in (
        (cases.NETWORK["float64"], dict(reshard_after_forward=False)),
        (cases.NETWORK["float32"], dict(mp_policy=policy)),
    ):
        reference, model = network(), shard(network(), mesh, **options)
        average = torch.optim.swa_utils.AveragedModel(
            reference, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        opt = torch.optim.AdamW(reference.parameters(), lr=0.01)
        amp_train(reference, opt, None, 0.1, after_step=lambda: average.update_parameters(reference))  # noqa: B023
        ours = optim.AdamW(model.parameters(), lr=0.01, ema=0.9)
        amp_train(model, ours, rank, 0.1)
        assert_near(reference.parameters(), model.parameters(), tolerance)
        averages = [ours.state[p]["ema"] for p in model.parameters()]
        assert_near(average.module.parameters(), averages, tolerance)
        assert_placed_as_parameters(ours)


@pytest.mark.slow
def test_fsdp2(tmp_path):
    """Elementwise optimizers step even, uneven and empty shards as torch.optim steps the whole."""
    spawn(fsdp_worker, folder=tmp_path)


@pytest.mark.slow
def test_what_is_around_a_step_under_fsdp2(tmp_path):
    spawn(fsdp_surroundings_worker, folder=tmp_path)


def on_all(x, world=WORLD):
    """A number of each process."""
    found = [torch.zeros((), dtype=torch.float64) for _ in range(world)]
    dist.all_gather(found, torch.as_tensor(x, dtype=torch.float64))
    return [float(y) for y in found]


def fsdp_norm_worker(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, arguments in (("AdamW", dict(lr=0.01)), ("SGD", dict(lr=0.05, momentum=0.9))):
        reference, model = network(), shard(network(), mesh)
        theirs = getattr(torch.optim, name)(reference.parameters(), **arguments)
        ours = getattr(optim, name)(model.parameters(), **arguments, max_norm=0.1, ema=0.9)
        for i in range(20):
            theirs.zero_grad(), ours.zero_grad()
            backward(reference, i, None), backward(model, i, rank)
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            theirs.step(), ours.step()
            mine, other = on_all(ours.grad_norm)
            assert mine == other
            assert cases.difference(ours.grad_norm, norm) <= 1e-12
        assert_near(reference.parameters(), model.parameters(), 1e-12)
        assert_same_state(theirs, drop_average(ours))

    # An infinity in one process's part is skipped by all.
    reference, model = network(), shard(network(), mesh)
    theirs, ours = torch.optim.AdamW(reference.parameters()), optim.AdamW(model.parameters(), max_norm=0.1)
    scaler = amp.GradScaler("cpu", init_scale=8.0)
    for i in range(5):
        theirs.zero_grad(), ours.zero_grad()
        backward(reference, i, None)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        scaler.scale(model(batch(i, rank)).pow(2).mean()).backward()
        if i == 2 and rank == 1:
            model[0].weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(ours)
        scaler.update()
        assert on_all(ours.skipped) == [i == 2] * 2
        if i != 2:
            theirs.step()
    assert_near(reference.parameters(), model.parameters())


def drop_average(opt):
    for state in opt.state.values():
        state.pop("ema")
    return opt


def uneven_norms_worker(rank):
    """Gradients that one process has alone, copies over an axis of a mesh, meshes of their own."""
    line, grid = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("a", "b"))
    full = torch.arange(1.0, 13, dtype=torch.float64).view(4, 3)
    params, squares = [], 0.0
    for mesh, placements in (
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(1), Replicate()]),
    ):
        p = torch.nn.Parameter(distribute_tensor(full.clone(), mesh, placements))
        p.grad = distribute_tensor(full.clone(), mesh, placements)
        params.append(p)
        squares += full.square().sum().item()
    opt = optim.SGD(params, lr=1.0, max_norm=1.0)
    opt.step()
    assert on_all(opt.grad_norm) == pytest.approx([squares**0.5] * 2, rel=1e-14)
    for p in params:
        torch.testing.assert_close(whole(p), full - full / (squares**0.5 + 1e-6), rtol=1e-14, atol=1e-14)

    # One process without any gradient: the others do not wait for ever, and all know the norm.
    for p in params:
        p.grad = None
    before = [whole(p).clone() for p in params]
    if rank == 0:
        params[0].grad = distribute_tensor_alone(full, line)
    opt.step()
    assert on_all(opt.grad_norm) == pytest.approx([full[:2].norm().item()] * 2, rel=1e-14)
    assert all(torch.equal(whole(p), x) for p, x in zip(params[1:], before[1:], strict=True))


def agreement_worker(rank):
    """Types that round a norm differently, in both orders; a scaler where one process has no gradient."""
    mesh = init_device_mesh("cpu", (WORLD,))
    full = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    for dtypes in ((torch.bfloat16, torch.float64), (torch.float64, torch.bfloat16)):
        params = [torch.nn.Parameter(distribute_tensor(full.to(x), mesh, [Shard(0)])) for x in dtypes]
        for p in params:
            p.grad = distribute_tensor(full.to(p.dtype), mesh, [Shard(0)])
        opt = optim.SGD(params, lr=1.0, max_norm=0.1)
        opt.step()
        wide = next(p for p in params if p.dtype is torch.float64)
        norm = torch.stack([full.to(x).double().norm() for x in dtypes]).norm()
        # The bfloat16 gradient's norm in each process is rounded to that type, as torch rounds a tensor's.
        torch.testing.assert_close(whole(wide), full - full * 0.1 / norm, rtol=1e-3, atol=1e-3 * 0.1)
        assert float(opt.grad_norm) == pytest.approx(float(norm), rel=2**-9)

    p = torch.nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
    opt, scaler = optim.SGD([p], lr=1.0), amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    if rank == 0:
        p.grad = distribute_tensor_alone(2 * full, mesh)
    scaler.step(opt)
    scaler.update()
    assert on_all(opt.skipped) == [0.0, 0.0]
    assert torch.equal(whole(p), torch.cat([full[:2] * 0, full[2:]]))


def distribute_tensor_alone(full, mesh):
    """This process's part, without asking the others."""
    return DTensor.from_local(full[:2], mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


@pytest.mark.parametrize(
    "worker",
    [pytest.param(fsdp_norm_worker, marks=pytest.mark.slow), uneven_norms_worker, agreement_worker],
    ids=["fsdp2", "uneven", "agreement"],
)
def test_the_norm_is_of_all_processes_parts(worker, tmp_path):
    spawn(worker, folder=tmp_path)


def fsdp_checkpoint_worker(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    checkpoints(f"{folder}/fsdp", rank, wrap=lambda model: shard(model, mesh))
    checkpoints(f"{folder}/whole", rank, wrap=lambda model: shard(model, mesh), load_wrap=lambda model: model)


@pytest.mark.slow
def test_checkpoints_under_fsdp2(tmp_path):
    """Also of a sharded run into a whole one."""
    spawn(fsdp_checkpoint_worker, tmp_path, folder=tmp_path)


def fsdp_refusals_worker(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for make, text in (
        (lambda p: optim.SparseAdam(p), "keep the parameter whole and plain"),
        (lambda p: optim.LBFGS(p), "keep the parameter whole and plain"),
    ):
        model = shard(network(), mesh)
        before = [whole(p).clone() for p in model.parameters()]
        opt = make(model.parameters())
        backward(model, 0, rank)
        with pytest.raises(TypeError, match=rf"param_groups\[0\]\['params'\]\[0\]: .*{text}"):
            opt.step(*([lambda: 1.0] if isinstance(opt, optim.LBFGS) else []))
        assert not opt.state
        assert all(torch.equal(whole(p), x) for p, x in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
def test_what_is_refused_under_fsdp2(tmp_path):
    """In each process, also in one whose part is empty, before anything has changed."""
    spawn(fsdp_refusals_worker, folder=tmp_path)


def tensor_parallel_worker(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    models = []
    for module in (torch.optim, optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 6)).double()
        plan = {
            "0": ColwiseParallel(output_layouts=Shard(0)),
            "1": SequenceParallel(sequence_dim=0),
            "2": RowwiseParallel(input_layouts=Shard(0)),
        }
        models.append(parallelize_module(model, mesh, plan))
        opt = module.AdamW(model.parameters(), lr=0.01)
        for i in range(4):
            opt.zero_grad()
            model(batch(i, 0)[:, :30]).pow(2).mean().backward()
            if module is optim:
                with pytest.raises(
                    TypeError, match=r"\[2\]: expected a gradient .*Replicate.* found .*Partial.*redistribute"
                ):
                    opt.step()
                for p in model.parameters():
                    p.grad = p.grad.redistribute(p.device_mesh, p.placements, async_op=True)
            opt.step()
    assert_near(*(model.parameters() for model in models))
    assert_placed_as_parameters(opt)


@pytest.mark.slow
def test_tensor_parallelism(tmp_path):
    """Of sequences too, whose replicated parameters have gradients that wait for their sum."""
    spawn(tensor_parallel_worker, folder=tmp_path)


# --- DTensors in one process


def sharded(mesh, *shape, placement=None, dtype=torch.float64):
    """A parameter, and its gradient."""
    p, grad = torch.randn(2, *shape, dtype=dtype).unbind()
    p = torch.nn.Parameter(DTensor.from_local(p, mesh, [placement or Shard(0)]))
    p.grad = DTensor.from_local(grad, mesh, [placement or Shard(0)])
    return p


def plain_gradient(opt, p, good):
    p.grad = torch.ones(4, 3, dtype=torch.float64)


def distributed_gradient_of_a_plain_parameter(opt, p, good):
    good.grad = DTensor.from_local(good.grad, p.device_mesh, [Shard(0)])


def partial_gradient(opt, p, good):
    p.grad = DTensor.from_local(p.grad.to_local().detach(), p.device_mesh, [Partial()])


def plain_state(opt, p, good):
    opt.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros_like(p)}


def replicated_state(opt, p, good):
    x = torch.zeros_like(p)
    opt.state[p] = {"step": torch.zeros(()), "exp_avg": x.redistribute(placements=[Replicate()]), "exp_avg_sq": x}


def clipped(opt, p, good):
    opt.max_norm = 1.0


REFUSED = {
    "plain-gradient": (
        plain_gradient,
        "expected a gradient placed as the .*, a DTensor of .*, found a plain .*; distribute both, or none",
    ),
    "distributed-gradient": (
        distributed_gradient_of_a_plain_parameter,
        "expected a gradient .*, a plain tensor, found a DTensor",
    ),
    "partial-gradient": (partial_gradient, r"Shard\(dim=0\),\) .* found .*Partial.*p.grad.redistribute"),
    "plain-state": (plain_state, "its state 'exp_avg' placed as the parameter, a DTensor .*found a plain"),
    "replicated-state": (replicated_state, r"its state 'exp_avg' placed .*Shard\(dim=0\).*, found .*Replicate"),
    "max_norm": (clipped, "expected DTensors alone for a norm of all gradients.* found a plain parameter beside"),
    "LBFGS": (None, "expected a plain tensor, .*DTensor; keep the parameter whole and plain"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    """By name, and before anything has changed."""
    change, text = REFUSED[what]
    name = what if hasattr(optim, what) else "AdamW"
    with alone() as mesh:
        good, p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)), sharded(mesh, 4, 3)
        good.grad = torch.ones_like(good)
        opt = getattr(optim, name)([good, p])
        if change is not None:
            change(opt, p, good)
        states = {q: dict(state) for q, state in opt.state.items()}
        before = p.detach().to_local().clone()
        with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[[01]\].*" + text):
            opt.step(*([lambda: 1.0] if name == "LBFGS" else []))
        assert torch.equal(p.detach().to_local(), before)
        assert torch.equal(good, torch.ones_like(good))
        assert {q: dict(state) for q, state in opt.state.items()} == states


def test_partial_parameter_is_refused():
    with alone() as mesh:
        p = sharded(mesh, 4, placement=Partial())
        with pytest.raises(TypeError, match=r"\('w'\): expected a DTensor sharded or replicated.*; redistribute it"):
            optim.SGD([("w", p)]).step()


def test_dtensors_beside_plain_parameters():
    """Sharded, replicated, empty, without axes: in one bucket."""
    with alone() as mesh:
        results = []
        for module in (torch.optim, optim):
            torch.manual_seed(0)
            params = [
                sharded(mesh, 40, 3),
                sharded(mesh, 5, placement=Replicate()),
                sharded(mesh, 0, 7),
                sharded(mesh, placement=Replicate()),
                torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
            ]
            params[-1].grad = torch.ones(3, dtype=torch.float64)
            opt = module.AdamW(params)
            for _ in range(3):
                opt.step()
            results.append((opt, params))
        (theirs, wanted), (ours, found) = results
        assert_near(wanted, found)
        assert_same_state(theirs, ours)


def test_state_of_a_dtensor():
    """Edits count, in place and by assignment; a float32 state of a bfloat16 parameter stays one."""
    with alone() as mesh:
        results = []
        for module in (torch.optim, optim):
            torch.manual_seed(0)
            p = sharded(mesh, 64, 3)
            opt = module.AdamW([p], lr=0.01)
            opt.step()
            opt.state[p]["exp_avg"].mul_(2)
            opt.step()
            opt.state[p]["exp_avg_sq"] = torch.full_like(p, 0.5)
            opt.step()
            state = opt.state_dict()
            assert type(state["state"][0]["exp_avg"]) is DTensor
            results.append((p, opt))
        (p, theirs), (q, ours) = results
        assert_near([p], [q])
        assert_same_state(theirs, ours)

        narrow = sharded(mesh, 64, 3, dtype=torch.bfloat16)
        opt = optim.AdamW([narrow])
        state = copy.deepcopy(theirs.state_dict())
        for name in ("exp_avg", "exp_avg_sq"):
            state["state"][0][name] = state["state"][0][name].float()
        opt.load_state_dict(state)
        opt.step()
        assert opt.state[narrow]["exp_avg"].dtype is torch.float32


def test_backward_through_values_before_the_step():
    with alone() as mesh:
        p = sharded(mesh, 4)
        opt = optim.SGD([p], lr=0.1)
        loss = (p * p).sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
