"""Every optimizer in its user's mesh: the first use of a process under `jax.set_mesh`, explicit axes, shard_map."""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jopt
from tests import cases, child

DEVICES = 2
SPECS = {"w": P(None, "d"), "b": P("d"), "f": P()}
TXS = {
    **{case.name: case.jopt for case in cases.CASES},
    "monitor": lambda: jopt.monitor(jopt.adamw()),
    "skip_nonfinite": lambda: jopt.skip_nonfinite(jopt.muon()),
    "clipped by norm": lambda: jopt.chain(jopt.clip_grad_norm(1.0), jopt.adafactor()),
    "clipped by value": lambda: jopt.chain(jopt.clip_grad_value(1.0), jopt.muon()),
    "groups": lambda: jopt.param_groups(jopt.muon, {"b": jopt.adamw(), "f": None}),
    "in optax's chain": lambda: optax.chain(optax.clip(1.0), jopt.adamw()),
    "accumulated": lambda: optax.MultiSteps(jopt.adamw(), 2).gradient_transformation(),
}
UNLIKE = ["groups", "adamw", "adafactor", "monitor", "clipped by norm"]
NORMS = ["monitor", "skip_nonfinite", "clipped by norm"]  # in shard_map a device's own: the user adds them up


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(getattr(AxisType, kind),))


def make():
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(4, 4)), "b": rng.normal(size=(4, 2)), "f": rng.normal(size=(2, 2))}


def placed(mesh=None):
    host = {name: x.astype(np.float32) for name, x in make().items()}
    return jax.tree.map(jnp.asarray, host) if mesh is None else jax.device_put(host, places(mesh))


def places(mesh):
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def close(found, expected):
    for name in expected:
        # the divided sums of a norm and of a product add up in another order
        np.testing.assert_allclose(jax.device_get(found[name]), jax.device_get(expected[name]), rtol=1e-5, atol=1e-6)


def two_steps(tx, params, wrap=lambda f: f):
    step = wrap(functools.partial(jopt.around.chaining.step, tx))
    state = wrap(tx.init)(params)
    once, state = step(params, state, params)
    return step(once, state, once)[0]


def in_a_mesh(name, kind, active):
    """The same numbers as on one device, and the places that they came from."""
    mesh, tx = mesh_of(kind), TXS[name]()
    with optax_arithmetic():
        expected = two_steps(tx, placed())
        params = placed(mesh)
        with jax.set_mesh(mesh) if active else contextlib.nullcontext():
            for wrap in (jax.jit, lambda f: f) if active or kind == "Auto" else (lambda f: f,):
                found = two_steps(tx, params, wrap)
                close(found, expected)
                if kind == "Explicit":
                    for leaf, place in places(mesh).items():
                        assert found[leaf].sharding.is_equivalent_to(place, found[leaf].ndim), leaf


def in_shard_map(name, check_vma):
    """Each device steps its part, as if it were the parameter."""
    mesh, tx = mesh_of("Auto"), TXS[name]()
    params, specs = placed(), dict(SPECS)
    if name == "prodigy":  # its sums are of each device's parts: nothing is the same on all
        del params["f"], specs["f"]
    step = functools.partial(two_steps, tx)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma)
    with optax_arithmetic():
        found = jax.jit(mapped)(params)
        for part in range(DEVICES):
            own = {"w": np.s_[:, 2 * part : 2 * part + 2], "b": np.s_[2 * part : 2 * part + 2], "f": np.s_[:]}
            expected = step({leaf: x[own[leaf]] for leaf, x in params.items()})
            close({leaf: x[own[leaf]] for leaf, x in found.items()}, expected)


@contextlib.contextmanager
def optax_arithmetic():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rows_of_zeros():
    """Sparse Adam, whose gradients are the rows that a step touched."""
    for kind in ("Auto", "Explicit"):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            params = jax.device_put(placed()["w"], NamedSharding(mesh, P()))
            rows = BCOO((params[:1], jnp.array([[2]])), shape=params.shape)
            tx = jopt.sparse_adam()
            found, _ = jax.jit(tx.step)(rows, tx.init(params), params)
            assert (jax.device_get(found) != jax.device_get(params)).any(axis=1).tolist() == [False, False, True, False]


def pieces(kind, active):
    """What is not a transformation: the arena, averages, L-BFGS, loss scaling."""
    mesh = mesh_of(kind)
    params, tx = placed(mesh), jopt.adamw()
    expected = two_steps(tx, placed())
    with jax.set_mesh(mesh) if active else contextlib.nullcontext():
        packed = jopt.pack(params)
        close(jopt.unpack(two_steps(tx, packed)), expected)
        average = jopt.ema(0.5)
        doubled = jax.tree.map(lambda x: x + x, params)
        state = average.update(doubled, average.update(params, average.init(params)))
        close(jax.tree.map(lambda x: x / 1.5, state.params), placed())
        squares = jax.value_and_grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))
        lbfgs = jopt.lbfgs(line_search_fn="strong_wolfe")
        once, state, _ = lbfgs.step(squares, lbfgs.init(params), params)
        _, _, loss = lbfgs.step(squares, state, once)
        assert loss < 1e-5


def checks(names, kinds, actives, vmas):
    found = {
        f"{name} in {kind}{', active' * active}": functools.partial(in_a_mesh, name, kind, active)
        for kind in kinds
        for active in actives
        for name in names
    }
    found |= {
        f"{name} in shard_map{', checked' * check_vma}": functools.partial(in_shard_map, name, check_vma)
        for check_vma in vmas
        for name in names
        if name not in NORMS
    }
    return found | {
        f"pieces in {kind}{', active' * active}": functools.partial(pieces, kind, active)
        for kind in kinds
        for active in actives
    }


# What each process runs; the first is the first use of jopt in it.
CHECKS = {
    "unlike": checks(UNLIKE, ["Explicit"], [True], [True]) | {"sparse_adam": rows_of_zeros},
    "all": checks(TXS, ["Explicit", "Auto"], [True, False], [True, False]),
}


@pytest.mark.parametrize("name", CHECKS["unlike"])
def test_on_two_devices(name, tmp_path_factory):
    child.report(tmp_path_factory, "tests.jopt.test_meshes", DEVICES, name, "unlike")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS["all"])
def test_all_on_two_devices(name, tmp_path_factory):
    child.report(tmp_path_factory, "tests.jopt.test_meshes", DEVICES, name, "all")


if __name__ == "__main__":
    child.main(CHECKS[sys.argv[1]])
