"""The drop-in under torch.distributed: DDP, ZeroRedundancyOptimizer, distributed checkpoints, FSDP2.

What needs two processes runs in two, spawned, on gloo: a worker is a function of this module whose assertions are the
test. Each process has data of its own, so that a gradient that is not reduced shows.
"""

import contextlib
import copy
import datetime
import gc

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from interop import amp, optim  # noqa: E402
from tests import cases  # noqa: E402

WORLD = 2
ROWS = 8  # of a process's batch

# torch.distributed warns of its own use of old names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*", "ignore::UserWarning:torch.*")


def spawn(worker, *args, folder):
    torch.multiprocessing.spawn(_enter, (worker, f"file://{folder}/store", args), nprocs=WORLD)


def _enter(rank, worker, store, args):
    import tests.conftest  # noqa: F401  its settings of JAX, and its cache

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
    worker(rank, *args)
    dist.destroy_process_group()


@contextlib.contextmanager
def alone():
    """A process group of this process, and a mesh of it."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def network(seed=0, dtype=torch.float64):
    """Over two processes: a large matrix in uneven shards, small tensors in even ones, and some that leave one empty."""
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


def train(model, opt, rank, steps=range(5), set_to_none=True, before_step=lambda: None):
    for i in steps:
        opt.zero_grad(set_to_none=set_to_none)
        backward(model, i, rank)
        before_step()
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

            def clip(params=list(theirs.parameters()), max_norm=max_norm):
                if max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(params, max_norm)

            train(theirs, opt, rank, set_to_none=set_to_none, before_step=clip)
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
            # torch's own, sharded otherwise or not at all, takes it up; and so do these.
            resumed = []
            for make in (
                lambda p: getattr(torch.optim, name)(p, **arguments),  # noqa: B023
                lambda p: getattr(optim, name)(p, **arguments),  # noqa: B023
                lambda p: ZeroRedundancyOptimizer(p, getattr(optim, name), **arguments),  # noqa: B023
                lambda p: ZeroRedundancyOptimizer(p, getattr(torch.optim, name), **arguments),  # noqa: B023
            ):
                model = network()
                model.load_state_dict(ours.module.state_dict())
                model = DistributedDataParallel(model)
                fresh = make(model.parameters())
                fresh.load_state_dict(copy.deepcopy(saved[0]))  # torch loads tensors as they are
                train(model, fresh, rank, range(5, 8))
                resumed.append(model)
            train(theirs, opt, rank, range(5, 8))
            for model in resumed:
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


def fsdp_checkpoint_worker(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    checkpoints(f"{folder}/fsdp", rank, wrap=lambda model: shard(model, mesh))
    checkpoints(f"{folder}/whole", rank, wrap=lambda model: shard(model, mesh), load_wrap=lambda model: model)


@pytest.mark.slow
def test_checkpoints_under_fsdp2(tmp_path):
    """Also of a sharded run into a whole one."""
    spawn(fsdp_checkpoint_worker, tmp_path, folder=tmp_path)
