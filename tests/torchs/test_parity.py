"""torch's numbers: every case against torch.optim over 200 steps with feedback, in jopt and in the drop-in."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is with torch")

from interop import optim  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from tests import cases  # noqa: E402

STEPS = 200


def to_numpy(x):
    return x.detach().float().numpy().astype(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.detach().numpy()


def from_numpy(x):
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))


@pytest.fixture(autouse=True)
def torchs_muon_without_its_bug(monkeypatch):
    """For bfloat16 without nesterov the iteration would normalize the momentum buffer in place."""
    iteration = torch.optim._muon._zeropower_via_newtonschulz
    monkeypatch.setattr(
        torch.optim._muon, "_zeropower_via_newtonschulz", lambda grad, *args: iteration(grad.clone(), *args)
    )


class TorchRun:
    """torch.optim, or the drop-in, on the problem."""

    def __init__(self, cls, case, problem):
        self.problem, self.case = problem, case
        self.params = [torch.nn.Parameter(from_numpy(x)) for x in problem.start]
        self.optimizer = cls(self.params, lr=case.lr, **case.arguments)

    def step(self, i):
        grads = self.problem.grads(i, [to_numpy(p) for p in self.params])
        for p, g, on in zip(self.params, grads, cases.active(i), strict=True):
            p.grad = from_numpy(g) if on else None
        self.optimizer.param_groups[0]["lr"] = self.case.lr * float(cases.lr_factor(i))
        self.optimizer.step()

    def values(self):
        yield from ((f"param {i}", to_numpy(p)) for i, p in enumerate(self.params))
        for i, p in enumerate(self.params):
            yield from ((f"{name} {i}", to_numpy(x)) for name, x in self.optimizer.state[p].items())


class JaxRun:
    """jopt's step, jitted once: the learning rate is a schedule, gradients go missing by a traced mask."""

    def __init__(self, case, problem):
        self.problem = problem
        self.params = [jnp.asarray(x) for x in problem.start]
        tx = case.jopt(lr=lambda step: case.lr * cases.lr_factor(step, jnp.cos))
        self.state = tx.init(self.params)
        self.jitted = jax.jit(lambda params, state, grads, on: tx.step(grads, state, params, active=on))

    def step(self, i):
        grads = self.problem.grads(i, [np.asarray(p) for p in self.params])
        self.params, self.state = self.jitted(self.params, self.state, grads, [np.asarray(x) for x in cases.active(i)])

    def values(self):
        yield from ((f"param {i}", np.asarray(p)) for i, p in enumerate(self.params))
        for i in range(len(self.params)):
            yield from ((f"{name} {i}", np.asarray(x[i])) for name, x in self.state.slots.items() if x[i] is not None)
            yield from ((f"{name} {i}", np.asarray(x[i])) for name, x in self.state.scalars.items())


FAST = {"float64": {case.id for case in cases.TORCH_CASES}, "float32": cases.UNLIKE}


def is_slow(case, dtype):
    return case.id not in FAST.get(dtype, cases.FEW)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}", marks=[pytest.mark.slow] * is_slow(case, dtype))
        for case in cases.TORCH_CASES
        for dtype in cases.TOLERANCES
    ],
)
def test_equals_torch(case, dtype):
    with enable_x64(dtype == "float64"):
        problem = cases.Problem(dtype, matrices=case.matrices)
        reference = TorchRun(getattr(torch.optim, case.torch), case, problem)
        runs = {"jopt": JaxRun(case, problem), "interop": TorchRun(getattr(optim, case.torch), case, problem)}
        worst = dict.fromkeys(runs, (0.0, "", 0))
        for i in range(STEPS):
            reference.step(i)
            compares = i % 10 == 0 or i == STEPS - 1  # it takes longer than a step
            expected = dict(reference.values()) if compares else {}
            for name, run in runs.items():
                run.step(i)
                if not compares:
                    continue
                found = dict(run.values())
                assert expected.keys() <= found.keys()
                for key, value in expected.items():
                    worst[name] = max(worst[name], (cases.difference(found[key], value), key, i))
        for name, (distance, key, step) in worst.items():
            tolerance = (cases.MUON if case.name == "muon" else cases.TOLERANCES)[dtype]
            assert distance <= tolerance, (name, key, step)


def test_the_problem_moves():
    """The comparison above means something: the parameters go somewhere, and freezing shows."""
    problem = cases.Problem("float64")
    run = TorchRun(torch.optim.Adam, cases.TORCH_CASES[6], problem)
    for i in range(61):
        run.step(i)
    frozen = run.params[1].detach().clone()
    for i in range(61, 80):
        run.step(i)
    assert torch.equal(run.params[1], frozen)
    assert all((p - torch.from_numpy(s)).abs().max() > 0.3 for p, s in zip(run.params, problem.start, strict=True))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}", marks=[pytest.mark.slow] * slow)
        for case in cases.TORCH_CASES
        if case.name != "rmsprop"
        for dtype, slow in (("bfloat16", False), ("float16", is_slow(case, "float16")))
    ],
)
def test_one_low_precision_step_is_bit_equal(case, dtype):
    """torch's rounding after each operation, on values of any size."""
    torch_dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (64, 64) if case.matrices else (4096,)
    start, grad = (torch.randn(shape, generator=generator).to(torch_dtype) for _ in range(2))
    p = torch.nn.Parameter(start.clone())
    p.grad = grad.clone()
    getattr(torch.optim, case.torch)([p], lr=case.lr, **case.arguments).step()
    tx = case.jopt()
    params = jnp.asarray(start.float().numpy()).astype(dtype)
    new, _ = jax.jit(tx.step)(jnp.asarray(grad.float().numpy()).astype(dtype), tx.init(params), params)
    different = np.asarray(new.astype(jnp.float32)) != p.detach().float().numpy()
    # Where a contracted a * b + c rounds the other way; Muon iterates such roundings.
    assert different.mean() <= (0.05 if case.name == "muon" else 1e-3)


@cases.parametrize([case for case in cases.TORCH_CASES if case.takes_complex], fast=cases.FEW)
def test_complex_parameters(case):
    """A complex parameter is stepped as pairs of reals; jax.grad's conjugate is torch's gradient."""
    rng = np.random.default_rng(0)
    start, target = (rng.standard_normal(16) + 1j * rng.standard_normal(16) for _ in range(2))
    runs = []
    for cls in (getattr(torch.optim, case.torch), getattr(optim, case.torch)):
        p = torch.nn.Parameter(torch.from_numpy(start.copy()))
        optimizer = cls([p], lr=case.lr, **case.arguments)
        for _ in range(20):
            optimizer.zero_grad()
            (p - torch.from_numpy(target)).abs().pow(2).sum().backward()
            optimizer.step()
        runs.append(p.detach().numpy())
    with enable_x64(True):
        tx = case.jopt()
        params = jnp.asarray(start)
        state = tx.init(params)
        loss = jax.grad(lambda z: jnp.sum(jnp.abs(z - target) ** 2))
        step = jax.jit(lambda params, state: tx.step(jnp.conj(loss(params)), state, params))
        for _ in range(20):
            params, state = step(params, state)
        assert params.dtype == jnp.complex128
        assert all(x.dtype == jnp.complex128 for x in state.slots.values())
    assert cases.difference(runs[1], runs[0]) <= 1e-13
    assert cases.difference(np.asarray(params), runs[0]) <= 1e-13


@cases.parametrize([case for case in cases.TORCH_CASES if case.slots], fast=cases.FEW)
def test_float32_state_of_bfloat16_parameters(case):
    """state_dtype: the step in float32 throughout, rounded once; against torch on float32 copies."""
    problem = cases.Problem("bfloat16", matrices=case.matrices)
    tx = case.jopt(state_dtype=jnp.float32)
    params = [jnp.asarray(x) for x in problem.start]
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.slots)} == {jnp.dtype(jnp.float32)}
    grads = problem.grads(0, problem.start)
    new, state = tx.step([jnp.asarray(g) for g in grads], state, params)
    ps = [torch.nn.Parameter(from_numpy(x).float()) for x in problem.start]
    optimizer = getattr(torch.optim, case.torch)(ps, lr=case.lr, **case.arguments)
    for p, g in zip(ps, grads, strict=True):
        p.grad = from_numpy(g).float()
    optimizer.step()
    for i, p in enumerate(ps):
        assert new[i].dtype == jnp.bfloat16
        assert cases.difference(np.asarray(new[i].astype(jnp.float32)), p.detach().bfloat16().float()) <= 2**-7
        for slot, value in optimizer.state[p].items():
            if slot in case.slots:
                assert cases.difference(state.slots[slot][i], value) <= 1e-6


def test_hyperparameters_in_state_stay_close():
    """In float32 a beta of 0.999 in the state is 0.99900001: still torch's numbers to 2e-5."""
    problem = cases.Problem("float32")
    case = next(c for c in cases.TORCH_CASES if c.id == "adamw")
    reference = TorchRun(torch.optim.AdamW, case, problem)
    tx = case.jopt(hyperparams_in_state=True)
    params = [jnp.asarray(x) for x in problem.start]
    state = tx.init(params)
    step = jax.jit(lambda params, state, grads: tx.step(grads, state, params))
    for _ in range(100):
        reference.step(200)  # every parameter has a gradient
        state.hyperparams["lr"] = jnp.float32(case.lr * cases.lr_factor(200))
        params, state = step(params, state, [jnp.asarray(g) for g in problem.grads(200, params)])
    for p, q in zip(params, reference.params, strict=True):
        assert cases.difference(p, q.detach().numpy()) <= 2e-5
