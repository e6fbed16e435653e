"""Prodigy, whose step size is made of sums over all parameters: of groups, types, buckets and processes."""

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import jax  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402

import interop  # noqa: E402
import jopt  # noqa: E402
from interop import amp, optim  # noqa: E402
from tests import cases  # noqa: E402
from tests.interop.dropin.test_distributed import network, on_all, shard, spawn, train, whole  # noqa: E402
from tests.interop.dropin.test_parts import assert_near, give_gradients, parameters, random  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*", "ignore::UserWarning:torch.*")

SHAPES = ((300, 200), (7, 5), (), (11,), (0, 3))  # the first has buffers of its own
ARGUMENTS = dict(d0=0.01, weight_decay=0.1, use_bias_correction=True, betas=(0.9, 0.99))
NEAR = cases.NETWORK["float64"]


@pytest.fixture
def stepped_by():
    """By programs only: such a rule is never stepped by torch's operations."""


def leaves(narrow=()):
    """The parameters, in float64; in float32 where named."""
    full = [random(i, shape, torch.float64) for i, shape in enumerate(SHAPES)]
    return [torch.nn.Parameter(x.float() if i in narrow else x) for i, x in enumerate(full)]


def give(params, i):
    for j, p in enumerate(params):
        p.grad = (0.8 * p.detach() + random(1000 * i + j, p.shape, torch.float64)).to(p.dtype)


def run(optimizer, params, steps):
    for i in steps:
        give(params, i)
        optimizer.step()


def largest(a, b):
    return max(cases.difference(x.detach(), y.detach()) for x, y in zip(a, b, strict=True) if x.numel())


def test_groups_and_types_share_the_sums(x64):
    """As one group; as groups in JAX; and in several types as in one."""
    one, several, mixed = leaves(), leaves(), leaves(narrow=(0, 3))
    together = optim.Prodigy(one, **ARGUMENTS)
    groups = optim.Prodigy([{"params": several[1::2]}, {"params": several[::2]}], **ARGUMENTS)
    types = optim.Prodigy(mixed, **ARGUMENTS)
    tx = jopt.param_groups(jopt.prodigy, {"^[13]$": {}}, **ARGUMENTS)
    values = [interop.to_jax(p.detach()) for p in leaves()]
    state = tx.init(values)
    step = jax.jit(tx.step)
    for i in range(10):
        for params, optimizer in ((one, together), (several, groups), (mixed, types)):
            run(optimizer, params, [i])
        given = [0.8 * x + interop.to_jax(random(1000 * i + j, x.shape, torch.float64)) for j, x in enumerate(values)]
        values, state = step(given, state, values)
    assert together.d > 0.05
    assert groups.d == pytest.approx(together.d, rel=1e-13)
    assert types.d == pytest.approx(together.d, rel=1e-6)
    assert largest(one, several) <= NEAR
    assert largest(one, mixed) <= cases.NETWORK["float32"]
    assert max(cases.difference(x, p.detach()) for x, p in zip(values, one, strict=True) if x.size) <= NEAR
    for of_group in state.groups:
        d = float(of_group.scalars["d"]) + float(of_group.scalars["d_rest"])
        assert d == pytest.approx(together.d, rel=1e-13)


def test_a_group_with_a_rate_of_0_stays_and_is_not_counted():
    ours, alone = leaves(), leaves()
    frozen = [p.detach().clone() for p in ours[:2]]
    optimizer = optim.Prodigy([{"params": ours[:2], "lr": 0.5}, {"params": ours[2:]}], **ARGUMENTS)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, ours, range(10))
    rest = optim.Prodigy(alone[2:], **ARGUMENTS)
    for i in range(10):
        give(alone, i)
        rest.step()
    assert all(torch.equal(p, x) for p, x in zip(ours, frozen, strict=False))
    assert rest.d == pytest.approx(optimizer.d, rel=1e-14)
    assert largest(ours[2:], alone[2:]) <= NEAR


def test_groups_that_do_not_go_together_are_named(x64):
    """Before anything changes, in JAX likewise."""
    for group, error, text in (
        ({"lr": 0.5}, RuntimeError, "Setting different lr values in different parameter groups is only supported"),
        ({"d_coef": 2.0}, ValueError, r"param_groups\[1\]\['d_coef'\]: expected 1.0 as in the first group"),
        ({"betas": (0.5, 0.99)}, ValueError, r"param_groups\[1\]\['beta1'\]: expected 0.9 as in the first group"),
        ({"beta3": 0.9}, ValueError, r"param_groups\[1\]\['beta3'\]: expected None as in the first group"),
        ({"decouple": False}, ValueError, r"param_groups\[1\]\['decouple'\]: expected True as in the first group"),
    ):
        params = leaves()
        before = [p.detach().clone() for p in params]
        optimizer = optim.Prodigy([{"params": params[:2]}, {"params": params[2:], **group}], **ARGUMENTS)
        give(params, 0)
        with pytest.raises(error, match=text):
            optimizer.step()
        assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
        assert not optimizer.state
        with pytest.raises(error, match=text.partition(": expected")[0]):
            jopt.param_groups(jopt.prodigy, {"a": group}, **ARGUMENTS)
    with pytest.raises(ValueError, match="slice_p: expected 1, found 11"):
        optim.Prodigy(leaves(), slice_p=11)

    params = leaves()
    optimizer = optim.Prodigy(params, **ARGUMENTS)
    run(optimizer, params, range(3))
    optimizer.state[params[3]] = {**optimizer.state[params[3]], "d": torch.tensor(7.0)}
    before = [p.detach().clone() for p in params]
    give(params, 3)
    with pytest.raises(ValueError, match=r"\['params'\]\[3\]: expected its state 'd' equal to that of .* found 7.0"):
        optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


def test_scaled_clipped_and_averaged():
    """As unscaled and clipped before the step; a step that is skipped leaves what all share as it was."""
    ours, theirs = leaves(), leaves()
    optimizer = optim.Prodigy(ours, **ARGUMENTS, max_norm=1.0, ema=0.9)
    plain = optim.Prodigy(theirs, **ARGUMENTS)
    average = [p.detach().clone() for p in theirs]
    scaler = amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for i in range(8):
        give(ours, i), give(theirs, i)
        for p in ours:
            p.grad.mul_(8.0)
        if i == 3:
            ours[1].grad[0, 0] = torch.inf
        before = {key: x.clone() for key, x in optimizer.state[ours[2]].items()}
        scaler.step(optimizer)
        scaler.update(8.0)
        assert optimizer.skipped == (i == 3)
        if i == 3:
            assert all(torch.equal(x, before[key]) for key, x in optimizer.state[ours[2]].items() if key != "ema")
        else:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            plain.step()
        for x, p in zip(average, theirs, strict=True):  # after a step that was skipped too
            x.lerp_(p.detach(), 0.1) if i else x.copy_(p.detach())
    assert plain.d > 0.02
    assert optimizer.d == pytest.approx(plain.d, rel=1e-12)
    assert largest(ours, theirs) <= NEAR
    assert largest([optimizer.state[p]["ema"] for p in ours], average) <= NEAR


def test_what_does_not_step_keeps_up():
    """A parameter that sits out a while has the step size of all then; one that comes late begins with it."""
    params = leaves()
    optimizer = optim.Prodigy(params, **ARGUMENTS)
    run(optimizer, params[:4], range(3))
    assert not optimizer.state[params[4]]
    params[0].grad = params[1].grad = None
    stayed = [p.detach().clone() for p in params[:2]]
    run(optimizer, params[2:], range(3, 6))
    assert all(torch.equal(p, x) for p, x in zip(params, stayed, strict=False))
    for key in optimizer.rule.shared:
        assert len({float(optimizer.state[p][key]) for p in params}) == 1, key
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 3, 6, 6, 3]

    # Gradients of zeros from the first step on: nothing to estimate by, so nothing changes.
    params = leaves()
    optimizer = optim.Prodigy(params, **ARGUMENTS)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert optimizer.d == ARGUMENTS["d0"]


# --- processes


def sums_worker(rank, world):
    """Each element counted once, whatever has it; what goes wrong in one is known to all."""
    divided, wholes = parameters(world, "Prodigy", torch.float64)
    ours = optim.Prodigy(divided, **ARGUMENTS, max_norm=2.0, ema=0.9)
    theirs = optim.Prodigy(wholes, **ARGUMENTS, max_norm=2.0)
    average = [q.detach().clone() for q in wholes]
    scaler = amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for i in range(10):
        give_gradients(divided, wholes, i)
        for p, q in zip(divided, wholes, strict=True):  # towards 0, so that the step size grows
            q.grad.mul_(0.1).add_(q.detach())
            p.grad = distribute_tensor(8.0 * q.grad, p.device_mesh, p.placements)
        if i == 2 and rank == world - 1:
            next(p for p in divided if p.to_local().numel()).grad.to_local().view(-1)[0] = torch.inf
        scaler.step(ours)
        scaler.update(8.0)
        assert on_all(ours.skipped, world) == [i == 2] * world
        if i != 2:
            theirs.step()
        for x, q in zip(average, wholes, strict=True):
            x.lerp_(q.detach(), 0.1) if i else x.copy_(q.detach())
        assert len(set(on_all(ours.d, world))) == 1
    assert theirs.d > 0.02
    assert theirs.d == pytest.approx(ours.d, rel=1e-12)
    assert_near(divided, wholes, cases.PARTS["float64"])
    assert_near([ours.state[p]["ema"] for p in divided], average, cases.PARTS["float64"])

    mesh = init_device_mesh("cpu", (world,))
    params = [
        torch.nn.Parameter(distribute_tensor(random(i, shape, torch.float64), mesh, [placed]))
        for i, (shape, placed) in enumerate((((4, 3), Shard(0)), ((1,), Shard(0)), ((3,), Replicate())))
    ]
    full = [torch.nn.Parameter(whole(p).clone()) for p in params]
    ours, theirs = optim.Prodigy(params, **ARGUMENTS), optim.Prodigy(full, **ARGUMENTS)

    def step(i):
        give_gradients(params, full, i)
        ours.step(), theirs.step()

    step(0)
    give_gradients(params, full, 1)
    if rank:
        params[1].grad = None
    with pytest.raises(RuntimeError, match=rf"\[1\]: expected a gradient in all .* found one in 1 of {world}"):
        ours.step()
    give_gradients(params, full, 2)
    params[0].grad = full[0].grad = None
    ours.step(), theirs.step()
    for p in (*params, *full):
        p.grad = None
    ours.step(), theirs.step()
    step(3)
    assert_near(params, full, cases.PARTS["float64"])

    if world == 2:  # FSDP2, which keeps hold of its memory
        reference, model = network(), shard(network(), mesh)
        theirs, ours = (optim.Prodigy(x.parameters(), **ARGUMENTS) for x in (reference, model))
        train(reference, theirs, None, range(10)), train(model, ours, rank, range(10))
        assert ours.d == pytest.approx(theirs.d, rel=1e-12)
        assert_near(list(model.parameters()), list(reference.parameters()), cases.PARTS["float64"])

    plain = torch.nn.Parameter(random(9, (3,), torch.float64))
    plain.grad = torch.ones_like(plain)
    with pytest.raises(TypeError, match=r"\[3\]: expected DTensors alone for .* sums over all parameters"):
        optim.Prodigy([*params, plain]).step()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_sums_are_of_all_processes_parts(world, tmp_path):
    spawn(sums_worker, world, folder=tmp_path, world=world)
