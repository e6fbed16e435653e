"""Sparse gradients: SparseAdam on both sides against torch's, and what SGD and Adagrad make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

import jopt
from tests import cases

torch = pytest.importorskip("torch", reason="parity is with torch")

from interop import optim  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402

CONFIGURATIONS = [{}, dict(maximize=True, lr=0.002), dict(betas=(0.5, 0.9), eps=1e-3)]


def entries(step, n_rows, n=24):
    """Indices with repetitions; none at step 3."""
    rng = np.random.default_rng(step)
    indices = rng.integers(0, n_rows, n if step != 3 else 0)
    return indices, rng.standard_normal((len(indices), 4))


def coo(indices, rows, shape, dtype):
    return torch.sparse_coo_tensor(
        torch.from_numpy(indices)[None], torch.from_numpy(rows).to(dtype), shape, check_invariants=True
    )


def to_numpy(x):
    return x.detach().double().numpy()


@pytest.mark.parametrize("dtype", list(cases.TOLERANCES))
@pytest.mark.parametrize("arguments", CONFIGURATIONS)
def test_sparse_adam_equals_torch(arguments, dtype):
    torch_dtype = getattr(torch, dtype)
    arguments = {"lr": 0.02} | arguments
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((37, 4))).to(torch_dtype)
    ps = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [module.SparseAdam([p], **arguments) for module, p in zip((torch.optim, optim), ps, strict=True)]
    with enable_x64(dtype == "float64"):
        table = jnp.asarray(start.float().numpy() if dtype != "float64" else start.numpy()).astype(dtype)
        tx = jopt.sparse_adam(**arguments)
        state = tx.init(table)
        step = jax.jit(lambda table, state, grad: tx.step(grad, state, table), donate_argnums=(0, 1))
        for i in range(100):
            indices, noise = entries(i, 37)
            # Feedback from each side's own rows.
            for p, optimizer in zip(ps, optimizers, strict=True):
                rows = to_numpy(p)[indices] + 0.3 * noise
                p.grad = coo(indices, rows, p.shape, torch_dtype)
                optimizer.step()
            rows = np.asarray(table).astype(np.float64)[indices] + 0.3 * noise
            # A fixed number of entries, as under jit: the rest is padding.
            padded = np.full(24, 37)
            padded[: len(indices)] = indices
            rows = np.concatenate([rows, np.ones((24 - len(rows), 4))])
            grad = BCOO((jnp.asarray(rows).astype(dtype), jnp.asarray(padded)[:, None]), shape=table.shape)
            table, state = step(table, state, grad)
    reference = optimizers[0].state[ps[0]]
    assert list(optimizers[1].state[ps[1]]) == list(reference)
    assert optimizers[1].state[ps[1]]["step"] == reference["step"] == 100
    assert state.scalars["step"].tolist() == [100]
    tolerance = cases.TOLERANCES[dtype]
    assert cases.difference(to_numpy(ps[1]), to_numpy(ps[0])) <= tolerance
    assert cases.difference(np.asarray(table).astype(np.float64), to_numpy(ps[0])) <= tolerance
    for name in ("exp_avg", "exp_avg_sq"):
        expected = to_numpy(reference[name])
        assert optimizers[1].state[ps[1]][name].dtype is torch_dtype
        assert cases.difference(to_numpy(optimizers[1].state[ps[1]][name]), expected) <= tolerance
        assert cases.difference(np.asarray(state.slots[name]).astype(np.float64), expected) <= tolerance


def test_rows_without_gradient_are_untouched_and_the_step_is_the_parameters():
    table = jnp.arange(12.0).reshape(4, 3)
    tx = jopt.sparse_adam(lr=0.1)
    state = tx.init(table)
    grad = BCOO((jnp.ones((2, 3)), jnp.array([[1], [1]])), shape=(4, 3))
    new, state = tx.step(grad, state, table)
    np.testing.assert_array_equal(np.asarray(new)[[0, 2, 3]], np.asarray(table)[[0, 2, 3]])
    assert not np.asarray(state.slots["exp_avg"])[[0, 2, 3]].any()
    np.testing.assert_allclose(np.asarray(new)[1], np.asarray(table)[1] - 0.1, rtol=1e-6)
    frozen, after = tx.step(grad, state, new, active=jnp.array(False))
    np.testing.assert_array_equal(frozen, new)
    assert after.scalars["step"].tolist() == [1]


@pytest.mark.parametrize("n_sparse", [1, 2])
def test_sparse_dimensions(n_sparse):
    """Entries may be scalars of a matrix, as torch's with sparse_dim=2, and gradients of a vector."""
    rng = np.random.default_rng(1)
    p = torch.nn.Parameter(torch.from_numpy(rng.standard_normal((6, 5))))
    q = torch.nn.Parameter(p.detach().clone())
    dense = rng.standard_normal((6, 5)) * (rng.random((6, 5)) < 0.3)
    with enable_x64(True):
        table = jnp.asarray(p.detach().numpy())
        tx = jopt.sparse_adam(lr=0.1)
        grad = BCOO.fromdense(jnp.asarray(dense), n_dense=2 - n_sparse)
        table, _ = tx.step(grad, tx.init(table), table)
        for x, module in ((p, torch.optim), (q, optim)):
            x.grad = torch.from_numpy(dense).to_sparse(n_sparse)
            module.SparseAdam([x], lr=0.1).step()
        assert cases.difference(table, p.detach().numpy()) <= 1e-15
        assert cases.difference(q.detach().numpy(), p.detach().numpy()) <= 1e-15


def test_strided_parameters_and_many_sizes():
    base = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    ps = [torch.nn.Parameter(x.t().t()[:, ::2]) for x in (base.clone(), base.clone())]
    assert not ps[0].is_contiguous()
    optimizers = [module.SparseAdam([p], lr=0.1) for module, p in zip((torch.optim, optim), ps, strict=True)]
    for n in (1, 7, 300, 1000):
        indices = np.random.default_rng(n).integers(0, 50, n)
        for p, optimizer in zip(ps, optimizers, strict=True):
            p.grad = coo(indices, np.ones((n, 4)), p.shape, torch.float32)
            optimizer.step()
    torch.testing.assert_close(ps[1], ps[0], rtol=1e-6, atol=1e-6)


def test_an_embedding_trains():
    embedding = torch.nn.Embedding(20, 4, sparse=True)
    twin = torch.nn.Embedding(20, 4, sparse=True)
    twin.load_state_dict(embedding.state_dict())
    optimizers = optim.SparseAdam(embedding.parameters(), lr=0.1), torch.optim.SparseAdam(twin.parameters(), lr=0.1)
    for i in range(20):
        for model, optimizer in zip((embedding, twin), optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.tensor([i % 5, 3, 3])).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(embedding.weight, twin.weight, rtol=1e-6, atol=1e-6)
    copy = optim.SparseAdam(embedding.parameters())
    copy.load_state_dict(torch.optim.SparseAdam(twin.parameters()).state_dict() | optimizers[1].state_dict())
    assert copy.state[embedding.weight]["step"] == 20


def test_float32_moments_of_bfloat16_rows():
    table = jnp.ones((4, 2), jnp.bfloat16)
    tx = jopt.sparse_adam(lr=1e-4, state_dtype=jnp.float32, master_copy=True)
    state = tx.init(table)
    grad = BCOO((jnp.ones((1, 2), jnp.bfloat16), jnp.array([[2]])), shape=(4, 2))
    for _ in range(100):
        table, state = tx.step(grad, state, table)
    np.testing.assert_allclose(state.slots["master"][2], 1 - 100e-4, rtol=1e-5)
    assert table[0, 0] == 1
    np.testing.assert_allclose(np.asarray(table[2]).astype(np.float32), 0.99, rtol=2**-8)


def test_errors():
    table = jnp.zeros((4, 2))
    grad = BCOO((jnp.ones((1, 2)), jnp.array([[2]])), shape=(4, 2))
    tx = jopt.sparse_adam()
    with pytest.raises(RuntimeError, match=r"grads\['w'\]: SparseAdam does not support dense gradients, please con"):
        tx.step({"w": table}, tx.init({"w": table}), {"w": table})
    with pytest.raises(RuntimeError, match=r"Adam does not support sparse gradients"):
        jopt.adam().step(grad, jopt.adam().init(table), table)
    with pytest.raises(ValueError, match=r"expected the parameter's shape \(4, 2\), found \(5, 2\)"):
        tx.step(BCOO((grad.data, grad.indices), shape=(5, 2)), tx.init(table), table)
    batch = BCOO((jnp.ones((4, 1)), jnp.zeros((4, 1, 1), jnp.int32)), shape=(4, 2))
    with pytest.raises(ValueError, match="n_batch=1"):
        tx.step(batch, tx.init(table), table)
    with pytest.raises(ValueError, match="SparseAdam does not support complex parameters"):
        tx.init(table.astype(jnp.complex64))
    with pytest.raises(ValueError, match="found a scalar"):
        tx.init(jnp.zeros(()))
    with pytest.raises(ValueError, match="Invalid learning rate: 0"):
        jopt.sparse_adam(lr=0)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients, please consider Adam instead"):
        optim.SparseAdam([p]).step()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_indices_of_narrow_types(dtype):
    """Row numbers and their sentinel are counted in a type that holds them."""
    for shape, at in (((256, 1), [3]), ((20, 20), [19, 19]), ((127, 2), [126])):
        table = jnp.zeros(shape)
        tx = jopt.sparse_adam(lr=0.5)
        entries = jnp.ones((2, *shape[len(at) :]))
        grad = BCOO((entries, jnp.array([at, at], dtype)), shape=shape)
        new, _ = tx.step(grad, tx.init(table), table)
        expected = np.zeros(shape, bool)
        expected[tuple(at)] = True
        np.testing.assert_array_equal(np.asarray(new) != 0, expected)


def test_a_table_without_rows():
    table = jnp.zeros((0, 2))
    tx = jopt.sparse_adam()
    grad = BCOO((jnp.ones((1, 2)), jnp.array([[0]])), shape=(0, 2))
    assert tx.step(grad, tx.init(table), table)[0].shape == (0, 2)
