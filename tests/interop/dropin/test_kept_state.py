"""What a user keeps of an optimizer's state, and what becomes of it: docs/drop-in.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt

N = 40_000
TX = jopt.adam(lr=0.1)


def moment(state):
    return state.slots["exp_avg"]["w"]


@pytest.fixture
def params():
    return {"w": jnp.ones(N)}


def step(state, params):
    return TX.step({"w": jnp.ones(N)}, state, params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def donated(params, state):
    return TX.step({"w": jnp.ones(N)}, state, params)


def test_kept_arrays_stay_as_they_were(params):
    state = TX.init(params)
    after, _ = step(state, params)
    assert not moment(state).any()
    assert (params["w"] == 1).all()
    assert (after["w"] < 1).all()


def test_donated_arrays_are_gone_and_copies_are_not(params):
    state = TX.init(params)
    copy = jax.tree.map(jnp.copy, state)
    donated(params, state)
    with pytest.raises(RuntimeError, match="Array has been deleted"):
        np.asarray(moment(state))
    assert not moment(copy).any()


def test_a_view_of_numpys_keeps_an_array_from_being_donated(params):
    state = TX.init(params)
    view = np.asarray(moment(state))
    donated(params, state)
    assert not view.any()
    assert not moment(state).is_deleted()
    assert state.slots["exp_avg_sq"]["w"].is_deleted()


def test_runs_that_were_moved_share_nothing():
    torch = pytest.importorskip("torch", reason="runs move from and to it")
    import interop
    from interop import optim

    model = torch.nn.Linear(300, 200)
    optimizer = optim.Adam(model.parameters())

    def train():
        model(torch.ones(1, 300)).sum().backward()
        optimizer.step()

    train()
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    moved = jax.tree.map(np.array, (params, state))
    train()
    jax.tree.map(np.testing.assert_array_equal, (params, state), moved)
    kept = optimizer.state[model.weight]["exp_avg"].clone()
    stepped = jax.jit(tx.step, donate_argnums=(1, 2))(jax.tree.map(jnp.ones_like, params), state, params)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], kept)
    interop.optimizer_to_torch(tx, *stepped, model, optimizer)
    moved = jax.tree.map(np.array, stepped)
    train()
    jax.tree.map(np.testing.assert_array_equal, stepped, moved)


def test_the_drop_ins_state_dict_is_the_state_as_torchs_is():
    torch = pytest.importorskip("torch", reason="the drop-in is torch's")
    from interop import optim

    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = module.Adam([p])
        optimizer.step()
        kept = optimizer.state_dict()["state"][0]["exp_avg"]
        before = kept.clone()
        optimizer.step()
        assert kept is optimizer.state[p]["exp_avg"]
        assert (kept > before).all()
