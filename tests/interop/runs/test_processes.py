"""One run through torch, two JAX processes of two devices each, one process of two devices, and torch again.

It is the run that torch makes alone. What runs in processes of its own is a function of this module, called by name.
"""

import functools
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

torch = pytest.importorskip("torch", reason="the run begins and ends in torch")

import interop  # noqa: E402
import jopt  # noqa: E402
from tests import ROOT, cases  # noqa: E402
from tests.child import on_devices  # noqa: E402

pytestmark = pytest.mark.slow  # five processes that import torch and JAX

LEGS = {"torch": range(5), "four": range(5, 25), "two": range(25, 35), "torch again": range(35, 40)}
ROWS = 16


def batch(step):
    rng = np.random.default_rng(step)
    return rng.standard_normal((ROWS, 16), np.float32), rng.standard_normal((ROWS, 8), np.float32)


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def torch_leg(model, optimizer, steps):
    for i in steps:
        x, y = map(torch.tensor, batch(i))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def loss_of(params, x, y):
    hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"][None])
    return jnp.mean((hidden @ params["2.weight"].T + params["2.bias"][None] - y) ** 2)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(tx, params, state, x, y):
    return tx.step(jax.grad(loss_of)(params, x, y), state, params)


def jax_leg(tx, params, state, steps, mesh):
    own = jax.process_index(), jax.process_count()
    for i in steps:
        # Each process gives its rows of the batch.
        rows = [np.split(x, own[1])[own[0]] for x in batch(i)]
        x, y = (jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), part) for part in rows)
        params, state = train_step(tx, params, state, x, y)
    return params, state


def from_torch(folder):
    """The optimizer of the first leg, sharded over all devices, and its run."""
    model, optimizer = make()
    saved = torch.load(folder / "start.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = jax.device_put(jax.device_get(params), NamedSharding(mesh, P()))
    sharded = jopt.shard_state(tx, params, mesh, min_size=1)
    state = jax.device_put(jax.device_get(state), sharded.shardings)
    moment = state.slots["exp_avg"]["0.weight"]
    assert moment.sharding == sharded.shardings.slots["exp_avg"]["0.weight"]
    assert {s.data.shape for s in moment.addressable_shards} == {(64 // jax.device_count(), 16)}
    return tx, sharded, mesh, params, state, model, optimizer


def join(rank, address):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)


WHOLE = {
    "muon": (lambda: jopt.muon(lr=0.02), 0.0),
    "adafactor": (lambda: jopt.adafactor(lr=0.02), cases.FRONT_ENDS["float32"]),
    "clipped": (lambda: jopt.chain(jopt.clip_grad_norm(0.5), jopt.adamw(lr=0.02)), cases.FRONT_ENDS["float32"]),
}


def leg_whole(folder, rank, address):
    """What looks at whole tensors, over two processes' devices and alone; parameters whole and divided."""
    join(rank, address)
    from jax.experimental import multihost_utils

    rng = np.random.default_rng(0)
    host = {name: rng.standard_normal((64, 32), np.float32) for name in "abcde"}
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for name, (make, tolerance) in WHOLE.items():
        tx = make()
        for at in (P(), P("data")):
            params, alone = jax.device_put(host, NamedSharding(mesh, at)), jax.tree.map(jnp.asarray, host)
            sharded = jopt.shard_state(tx, params, mesh)
            state, alone_state = sharded.init(params), tx.init(alone)
            step, step_alone = jax.jit(sharded.step), jax.jit(tx.step)
            for i in range(3):
                grads = {k: np.random.default_rng(i).standard_normal(x.shape, np.float32) for k, x in host.items()}
                params, state = step(jax.device_put(grads, NamedSharding(mesh, at)), state, params)
                alone, alone_state = step_alone(grads, alone_state, alone)
            found = multihost_utils.process_allgather((params, state), tiled=True)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves((alone, alone_state)), strict=True):
                assert cases.difference(x, y) <= tolerance, (name, at)
    jax.distributed.shutdown()


def leg_four(folder, rank, address):
    join(rank, address)
    from jax.experimental import multihost_utils

    _, sharded, mesh, params, state, *_ = from_torch(folder)
    params, state = jax_leg(sharded, params, state, LEGS["four"], mesh)
    assert not state.slots["exp_avg"]["0.weight"].is_fully_addressable
    gathered = multihost_utils.process_allgather((params, state), tiled=True)
    if rank == "0":
        np.savez(folder / "gathered.npz", *jax.tree.leaves(gathered))
    if has_orbax():
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "orbax", (params, state))
    jax.distributed.shutdown()


def leg_two(folder, kind):
    assert jax.device_count() == 2
    tx, sharded, mesh, params, state, model, optimizer = from_torch(folder)
    places = (sharded.param_shardings, sharded.shardings)
    if kind == "gathered":
        with np.load(folder / "gathered.npz") as arrays:
            run = jax.tree.unflatten(jax.tree.structure((params, state)), list(arrays.values()))
        params, state = jax.device_put(run, places)
    else:
        import orbax.checkpoint as ocp

        target = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), (params, state), places
        )
        with ocp.StandardCheckpointer() as checkpointer:
            params, state = checkpointer.restore(folder / "orbax", target)
    assert state.count == LEGS["four"].stop
    params, state = jax_leg(sharded, params, state, LEGS["two"], mesh)
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "end.pt")


def has_orbax():
    return importlib.util.find_spec("orbax") is not None


def start(name, folder, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.interop.runs.test_processes", name, str(folder), *args],
        cwd=ROOT,
        env=os.environ | on_devices(2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(children):
    try:
        outputs = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * len(children), "\n".join(outputs)


def two_processes(name, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    finish([start(name, folder, str(rank), address) for rank in range(2)])


def test_whole_tensors_over_two_processes(tmp_path):
    two_processes("leg_whole", tmp_path)


@pytest.fixture(scope="module")
def after_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, optimizer = make()
    torch_leg(model, optimizer, LEGS["torch"])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "start.pt")
    two_processes("leg_four", folder)
    return folder


def assert_runs_equal(model, optimizer, until):
    alone, expected = make()
    torch_leg(alone, expected, range(until))
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert cases.difference(p.detach(), q.detach()) <= cases.NETWORK["float32"]
        assert optimizer.state[p]["step"] == until
        for slot in cases.MOMENTS:
            assert cases.difference(optimizer.state[p][slot], expected.state[q][slot]) <= cases.NETWORK["float32"]


def test_two_processes_train_one_run(after_four):
    model, optimizer = make()
    tx, params, _ = interop.optimizer_to_jax(optimizer, model)
    with np.load(after_four / "gathered.npz") as arrays:
        structure = jax.tree.structure((params, tx.init(params)))
        params, state = jax.tree.unflatten(structure, [jnp.asarray(x) for x in arrays.values()])
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    assert_runs_equal(model, optimizer, LEGS["four"].stop)


@pytest.mark.parametrize("kind", ["gathered", "orbax"])
def test_a_checkpoint_of_four_devices_goes_on_on_two_and_in_torch(kind, after_four):
    if kind == "orbax" and not has_orbax():
        pytest.skip("pip install 'jopt[ecosystem]'")
    finish([start("leg_two", after_four, kind)])
    saved = torch.load(after_four / "end.pt")
    model, optimizer = make()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch_leg(model, optimizer, LEGS["torch again"])
    assert_runs_equal(model, optimizer, LEGS["torch again"].stop)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  its settings of JAX, and its cache

    name, folder, *args = sys.argv[1:]
    globals()[name](Path(folder), *args)
