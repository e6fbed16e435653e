"""Rules that look at whole tensors, of which processes have parts: Muon, Adafactor, and what is around them.

Each worker runs in some processes; its assertions are the test. What is computed is compared with torch.optim on whole
tensors in one process: torch's Adafactor does not step DTensors, and its Muon gathers each matrix on every one.
NorMuon, which torch has not, is compared with ours in one process, which test_others.py compares with the authors'.
"""

import collections
import functools
import itertools
import os
import signal
import time

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402

from interop import amp, optim  # noqa: E402
from interop.dropin import exchange, muon, orthogonal  # noqa: E402
from tests import cases  # noqa: E402
from tests.interop.dropin.test_distributed import on_all, spawn, whole  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*", "ignore::UserWarning:torch.*")

SHAPES = ((5, 7), (64, 48), (3, 16), (64, 48), (1, 9), (6,), (3, 5, 4))
CONFIGURATIONS = (
    ("Adafactor", dict(lr=0.1)),
    ("Adafactor", dict(lr=0.1, weight_decay=0.1, maximize=True, eps=(1e-3, 1e-2), d=1.5)),
    ("Muon", dict(lr=0.1)),
    ("Muon", dict(lr=0.1, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")),
    ("NorMuon", dict(lr=0.1, weight_decay=0.1, beta2=0.8)),
    ("SOAP", dict(lr=0.1, precondition_frequency=3)),
    ("Kron", dict(lr=0.1, weight_decay=0.1)),
)


@pytest.fixture
def stepped_by():
    """By programs only: parts are never stepped by torch's operations alone."""


def layouts(world):
    line = init_device_mesh("cpu", (world,))
    found = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found += [
            (grid, [Shard(0), Shard(1)]),
            (grid, [Replicate(), Shard(0)]),
            (grid, [Shard(0), Shard(0)]),
            (grid, [Shard(1), Replicate()]),
        ]
    return found


def random(seed, shape, dtype):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameters(world, name, dtype):
    """DTensors in all layouts, and whole ones like them: uneven and empty parts, copies, several axes."""
    divided, wholes = [], []
    shapes = (
        ((5, 7), (1, 9), (6,), (3, 5, 4)) if name in ("SOAP", "Kron") else SHAPES
    )  # whose programs take long to compile
    for (mesh, placements), shape in itertools.product(layouts(world), shapes):
        fits = all(getattr(x, "dim", 0) < len(shape) for x in placements)
        if fits and (len(shape) == 2 or "Muon" not in name):
            full = random(len(wholes), shape, dtype)
            divided.append(torch.nn.Parameter(distribute_tensor(full.clone(), mesh, placements)))
            wholes.append(torch.nn.Parameter(full.clone()))
    return divided, wholes


def in_one_process(name):
    return getattr(torch.optim, name, getattr(optim, name))


def near(name):
    return (cases.MUON if "Muon" in name else cases.PARTS)["float64"]


def give_gradients(divided, wholes, i):
    for j, (p, q) in enumerate(zip(divided, wholes, strict=True)):
        q.grad = random(1000 * i + j, q.shape, q.dtype)
        p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements)


def assert_near(divided, wholes, tolerance):
    for p, q in zip(divided, wholes, strict=True):
        assert cases.difference(whole(p), q.detach()) <= tolerance


def layouts_worker(rank, world, dtype):
    tolerance = cases.PARTS[str(dtype).split(".")[1]]
    for name, arguments in CONFIGURATIONS:
        divided, wholes = parameters(world, name, dtype)
        ours, theirs = getattr(optim, name)(divided, **arguments), in_one_process(name)(wholes, **arguments)
        for i in range(20):
            give_gradients(divided, wholes, i)
            ours.step(), theirs.step()
        assert_near(divided, wholes, tolerance)
        for p, q in zip(divided, wholes, strict=True):
            assert list(ours.state[p]) == list(theirs.state[q])
            for key, x in theirs.state[q].items():
                found = ours.state[p][key]
                assert whole(found).shape == x.shape
                assert cases.difference(whole(found), x) <= tolerance
                if x.dim():
                    assert type(found) is DTensor
                    assert found.device_mesh == p.device_mesh
                    # Divided as the parameter, but where it has one element for many.
                    kept = [getattr(a, "dim", None) for a in found.placements]
                    one = [d for d in range(q.dim()) if x.dim() == q.dim() and x.shape[d] == 1 < q.shape[d]]
                    assert all(d not in one for d in kept)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_parts_step_as_the_whole(world, dtype, tmp_path):
    spawn(layouts_worker, world, dtype, folder=tmp_path, world=world)


# --- around a step


def around_worker(rank, world):
    """Clipped, averaged, unscaled; an infinity in one process; all beside each other."""
    for name, arguments in CONFIGURATIONS[::2]:
        divided, wholes = parameters(world, name, torch.float64)
        ours = getattr(optim, name)(divided, **arguments, max_norm=1.0, ema=0.9)
        theirs = in_one_process(name)(wholes, **arguments)
        average = [q.detach().clone() for q in wholes]
        scaler = amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        for i in range(6):
            give_gradients(divided, wholes, i)
            for p in divided:
                p.grad.mul_(8.0)
            if i == 2 and rank == world - 1:
                next(p for p in divided if p.to_local().numel()).grad.to_local().view(-1)[0] = torch.inf
            scaler.step(ours)
            scaler.update(8.0)
            assert on_all(ours.skipped, world) == [i == 2] * world
            if i != 2:
                norm = torch.nn.utils.clip_grad_norm_(wholes, 1.0)
                assert cases.difference(ours.grad_norm, norm) <= cases.PARTS["float64"]
                theirs.step()
            for x, q in zip(average, wholes, strict=True):  # after a step that was skipped too
                x.lerp_(q.detach(), 0.1) if i else x.copy_(q.detach())
        assert_near(divided, wholes, cases.PARTS["float64"])
        assert_near([ours.state[p]["ema"] for p in divided], average, cases.PARTS["float64"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_clipping_averages_and_scaling_around_them(world, tmp_path):
    spawn(around_worker, world, folder=tmp_path, world=world)


# --- models


class Block(torch.nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 3 * width), torch.nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(3)), torch.nn.Linear(24, 5)).double()


def in_2d(model, mesh):
    """Tensor parallelism inside a block, then FSDP2: some matrices are divided twice along one axis."""
    for block in model[:-1]:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def in_1d(model, mesh):
    for block in model[:-1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizers(model, name, find):
    """Muon for matrices, AdamW for what is none; or one for all."""
    if "Muon" not in name:
        return [find(name)(model.named_parameters(), lr=0.01)]
    matrices = [(k, p) for k, p in model.named_parameters() if p.dim() == 2]
    others = [(k, p) for k, p in model.named_parameters() if p.dim() != 2]
    return [find(name)(matrices, lr=0.01), find("AdamW")(others, lr=0.01)]


def train(model, opts, steps):
    losses = []
    for i in steps:
        for opt in opts:
            opt.zero_grad()
        loss = model(random(i, (8, 24), torch.float64)).square().mean()
        loss.backward()
        for opt in opts:
            opt.step()
        losses.append(loss.item())
    return losses


def models_worker(rank, shape, name):
    model = network()
    if len(shape) == 1:
        model = in_1d(model, init_device_mesh("cpu", shape))
    elif name == "replicated":
        name, mesh = "Muon", init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts"))
        model = in_1d(model, mesh)
    else:
        model = in_2d(model, init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")))
    reference = network()
    ours = train(model, optimizers(model, name, functools.partial(getattr, optim)), range(20))
    theirs = train(reference, optimizers(reference, name, in_one_process), range(20))
    assert cases.difference(ours, theirs) <= near(name)
    assert_near(model.parameters(), reference.parameters(), near(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((2,), "Adafactor"),
        ((4,), "Muon"),
        ((2, 2), "Adafactor"),
        ((2, 2), "Muon"),
        ((2, 2), "NorMuon"),
        ((2, 2), "replicated"),
        ((2,), "SOAP"),
        ((2, 2), "Kron"),
    ],
    ids=str,
)
def test_models(shape, name, tmp_path):
    """FSDP2, alone, over copies, and with tensor parallelism, for 20 steps as torch.optim in one process."""
    spawn(models_worker, shape, name, folder=tmp_path, world=torch.Size(shape).numel())


# --- checkpoints

SAVED = ("Adafactor", "Muon", "NorMuon", "SOAP", "Kron")


def save_worker(rank, folder, world):
    for name in SAVED:
        model = in_1d(network(), init_device_mesh("cpu", (world,)))
        opts = optimizers(model, name, functools.partial(getattr, optim))
        train(model, opts, range(3))
        model_state, opt_state = get_state_dict(model, opts)
        dcp.save({"model": model_state, "optimizer": opt_state}, checkpoint_id=f"{folder}/{name}")


def load_worker(rank, folder, world, names=SAVED):
    for name in names:
        reference = network()
        train(reference, optimizers(reference, name, in_one_process), range(6))
        model = network()
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        if world > 1:
            model = in_1d(model, init_device_mesh("cpu", (world,)))
        opts = optimizers(model, name, functools.partial(getattr, optim))
        model_state, opt_state = get_state_dict(model, opts)
        state = {"model": model_state, "optimizer": opt_state}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_state_dict(model, opts, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        train(model, opts, range(3, 6))
        assert_near(model.parameters(), reference.parameters(), near(name))


@pytest.mark.slow
def test_checkpoints_are_divided_anew(tmp_path):
    """Saved by two processes, gone on with in four and in one, as torch's uninterrupted run on whole tensors."""
    spawn(save_worker, tmp_path, 2, folder=tmp_path, world=2)
    spawn(load_worker, tmp_path, 4, folder=tmp_path, world=4)
    spawn(load_worker, tmp_path, 1, folder=tmp_path, world=1)


def killed_in_a_save_worker(rank, folder):
    model = in_1d(network(), init_device_mesh("cpu", (2,)))
    opts = optimizers(model, "Muon", functools.partial(getattr, optim))
    train(model, opts, range(3))
    for name in ("Muon", "killed"):
        if name == "killed" and rank == 1:
            FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        model_state, opt_state = get_state_dict(model, opts)
        dcp.save({"model": model_state, "optimizer": opt_state}, checkpoint_id=f"{folder}/{name}")


@pytest.mark.slow
def test_a_process_killed_in_a_save_leaves_the_last_checkpoint(tmp_path):
    """The other process fails at once; what was saved before goes on, and what is in parts is refused."""
    started = time.monotonic()
    with pytest.raises(Exception, match=r"SIGKILL|Connection closed"):
        spawn(killed_in_a_save_worker, tmp_path, folder=tmp_path, world=2)
    assert time.monotonic() - started < 120  # not by the timeout of 300 seconds
    spawn(load_worker, tmp_path, 1, ("Muon",), folder=tmp_path, world=1)
    with pytest.raises(CheckpointException):
        dcp.load({}, checkpoint_id=tmp_path / "killed", no_dist=True)


# --- work and traffic

WORK = ((96, 32), (96, 32), (96, 32), (32, 96), (32, 96), (32, 96), (200, 32), (48, 48))


def counting(monkeypatch, found):
    """Count collectives and the elements that they take, and the multiplications of Muon's iteration."""
    for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor"):
        f = getattr(dist, name)

        def counted(*args, name=name, f=f, **options):
            given = args[1] if name == "all_to_all_single" else args[0]
            found[name] += 1
            found[name, "bytes"] += given.numel() * given.element_size()
            return f(*args, **options)

        monkeypatch.setattr(dist, name, counted)

    def iterated(x, *args, **options):
        found["products"] += len(x) * exchange.products(x.shape[1:])
        return orthogonal.orthogonalize(x, *args, **options)

    monkeypatch.setattr(muon, "orthogonalize", iterated)


def counts_worker(rank, world):
    mesh = init_device_mesh("cpu", (world,))

    def counted(name, **arguments):
        params = []
        for i, shape in enumerate(WORK):
            params.append(torch.nn.Parameter(distribute_tensor(random(i, shape, torch.float32), mesh, [Shard(0)])))
        opt, found = getattr(optim, name)(params, **arguments), collections.Counter()
        for i in range(2):
            for p in params:
                p.grad = distribute_tensor(random(i, p.shape, torch.float32), mesh, [Shard(0)])
            with pytest.MonkeyPatch.context() as monkeypatch:
                found.clear()
                counting(monkeypatch, found)
                opt.step()
        return found

    size = sum(torch.Size(shape).numel() for shape in WORK)
    costs = list(map(exchange.products, WORK))
    found = counted("Muon")
    assert found["products"] <= sum(costs) / world + max(costs)
    assert sum(on_all(found["products"], world)) == sum(costs)
    # Each matrix once to its owner and once back, in bfloat16, what stays in a process counted too.
    assert sum(on_all(found["all_to_all_single", "bytes"], world)) == 2 * 2 * size
    assert found["all_to_all_single"] == 2
    # Who has a gradient, and whether somebody raises.
    assert found["all_reduce"] == 1
    assert found["all_reduce", "bytes"] == 8 * (3 + len(WORK))
    assert not found["all_gather_into_tensor"] + found["reduce_scatter_tensor"]

    found = counted("SOAP")
    assert found["all_to_all_single"] == 2
    matrices = sum(2 * n * n for shape in WORK for n in shape)
    # Gradient, parameter, two moments and the matrices to the owner, all but the gradient back, in float32.
    elements = 4 * size + matrices + 3 * size + matrices
    assert sum(on_all(found["all_to_all_single", "bytes"], world)) == 4 * elements
    assert not found["all_gather_into_tensor"] + found["reduce_scatter_tensor"]

    found = counted("Adafactor", max_norm=1.0)
    assert found["all_reduce"] == 3  # with the norm; the norms and columns, the last norms
    columns = sum(shape[1] for shape in WORK)
    assert found["all_reduce", "bytes"] == 8 * (3 + len(WORK)) + 4 * (columns + 3 * len(WORK))
    assert not found["all_to_all_single"] + found["all_gather_into_tensor"] + found["reduce_scatter_tensor"]


@pytest.mark.slow
def test_work_and_traffic_of_four(tmp_path):
    """Each matrix is iterated in one process, and goes over the wire twice; all of SOAP does; Adafactor sends sums."""
    spawn(counts_worker, 4, folder=tmp_path, world=4)


@pytest.mark.parametrize("seed", range(20))
def test_owners_share_the_work(seed):
    generator = torch.Generator().manual_seed(seed)
    n, processes = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(2))
    costs = torch.randint(1, 100, (n,), generator=generator).tolist()
    found = exchange.owners(costs, processes)
    loads = [sum(c for c, k in zip(costs, found, strict=True) if k == process) for process in range(processes)]
    assert max(loads) <= sum(costs) / processes + max(costs)
    assert sum(loads) == sum(costs)


# --- faults


def faults_worker(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for name in ("Muon", "Adafactor"):
        params = [
            torch.nn.Parameter(distribute_tensor(random(i, (6, 4), torch.float64), mesh, [Shard(0)])) for i in (0, 1)
        ]
        wholes = [torch.nn.Parameter(whole(p).clone()) for p in params]
        ours, theirs = getattr(optim, name)(params, lr=0.1), getattr(torch.optim, name)(wholes, lr=0.1)

        def step(i, ours=ours, theirs=theirs, params=params, wholes=wholes):
            give_gradients(params, wholes, i)
            ours.step(), theirs.step()

        step(0)
        before = [whole(p).clone() for p in params]

        # A gradient in one process alone
        give_gradients(params, wholes, 1)
        if rank:
            params[1].grad = None
        with pytest.raises(RuntimeError, match=rf"\[1\]: expected a gradient in all .* found one in 1 of {world}"):
            ours.step()
        step(2)

        # One that raises, before anything has changed
        give_gradients(params, wholes, 3)
        old = dict(ours.state[params[0]])
        if rank == 0:
            ours.state[params[0]] = {key: torch.zeros(3) if x.dim() else x for key, x in old.items()}
        with pytest.raises(TypeError if rank == 0 else RuntimeError, match=r"\[0\]: expected its state"):
            ours.step()
        if rank == 0:
            ours.state[params[0]] = old
        assert any(not torch.equal(whole(p), x) for p, x in zip(params, before, strict=True))
        step(4)
        # A parameter that none has a gradient of
        give_gradients(params, wholes, 5)
        params[0].grad = wholes[0].grad = None
        ours.step(), theirs.step()
        # None at all
        for p, q in zip(params, wholes, strict=True):
            p.grad = q.grad = None
        ours.step(), theirs.step()
        step(6)
        assert_near(params, wholes, cases.PARTS["float64"])


@pytest.mark.slow
def test_what_goes_wrong_in_one_of_four_is_known_to_all(tmp_path):
    """None waits for ever, nothing was stepped, and the next steps are right."""
    spawn(faults_worker, 4, folder=tmp_path, world=4)


def compared_worker(rank):
    """At the first step all are told, before anything has changed."""
    mesh = init_device_mesh("cpu", (2,))

    def params(*shapes):
        found = [
            torch.nn.Parameter(distribute_tensor(random(i, s, torch.float64), mesh, [Shard(0)]))
            for i, s in enumerate(shapes)
        ]
        for p in found:
            p.grad = torch.ones_like(p)
        return found

    first, second = params((4, 2), (6, 2)), params((4, 2), (6, 2))
    different = (
        (lambda: optim.AdamW(first, lr=0.1 + rank), r"param_groups\[0\]\['lr'\]: .* found 0.1 in process 0 and 1.1 in"),
        (lambda: optim.Adafactor(second[:: 1 - 2 * rank]), r"\['params'\]\[0\]: .* shape \(4, 2\) .* shape \(6, 2\)"),
        (lambda: optim.SGD(first[: 1 + rank]), r"\['params'\]\[1\]: .* found none in process 0 and a DTensor"),
        (
            lambda: optim.SGD([("b" * rank or "a", first[0])]),
            r"\['params'\]\[0\]: .* found a, a DTensor .* and b, a DTensor",
        ),
        (lambda: (optim.SGD, optim.Muon)[rank](first), "the class: .* found SGD in process 0 and Muon in process 1"),
    )
    before = [whole(p).clone() for p in (*first, *second)]
    for make, text in different:
        with pytest.raises(ValueError, match=text):
            make().step()
        assert all(torch.equal(whole(p), x) for p, x in zip((*first, *second), before, strict=True))


def in_turn(rank, world):
    counts_worker(rank, world)
    faults_worker(rank, world)
    compared_worker(rank)


def test_what_two_processes_send_and_tell_each_other(tmp_path):
    """Work and traffic, faults, and different numbers; in one pair of processes, which take seconds to start."""
    spawn(in_turn, 2, folder=tmp_path)
