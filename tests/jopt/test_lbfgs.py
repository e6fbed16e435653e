"""L-BFGS in JAX and as a drop-in, against torch's: the same points, iterations and evaluations."""

import copy
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from tests import cases

torch = pytest.importorskip("torch", reason="parity is with torch")

from interop import optim  # noqa: E402
from interop._compat import SEARCH_EVALUATIONS  # noqa: E402

N = 40
SCALE = np.linspace(1, 30, N)
CONFIGURATIONS = [
    dict(lr=1),
    dict(lr=0.1, max_iter=5, history_size=3),
    dict(lr=1, max_iter=30, max_eval=12),
    dict(lr=1, max_iter=1, max_eval=1),
    dict(lr=1, tolerance_grad=1e-2),
    dict(lr=1, tolerance_change=1e-3),
]


def start(dtype="float64"):
    return np.random.default_rng(0).standard_normal(N).astype(dtype)


def bowl(x, m):
    """Convex, not quadratic: differences of an ulp do not grow."""
    scale = torch.from_numpy(SCALE).to(x.dtype) if m is torch else jnp.asarray(SCALE).astype(x.dtype)
    return m.sum(scale * x * x) / 2 + 3 * m.sum(m.cos(x))


def rosenbrock(x, m):
    return m.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


class TorchRun:
    def __init__(self, module, f, x, **arguments):
        self.p = torch.nn.Parameter(torch.from_numpy(np.array(x)))
        self.f, self.calls = f, 0
        self.optimizer = module.LBFGS([self.p], **arguments)

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.f(self.p, torch)
        loss.backward()
        return loss

    def step(self):
        return self.optimizer.step(self.closure).item()

    @property
    def state(self):
        return self.optimizer.state[self.p]

    @property
    def x(self):
        return self.p.detach().numpy()


class JaxRun:
    def __init__(self, f, x, **arguments):
        self.x, self.solver = jnp.asarray(x), jopt.lbfgs(**arguments)
        self.value_and_grad = jax.value_and_grad(lambda x: f(x, jnp))
        self.state = self.solver.init(self.x)

    def step(self):
        self.x, self.state, loss = self.solver.step(self.value_and_grad, self.state, self.x)
        return float(loss)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_equals_torch(arguments, search, x64):
    arguments = arguments | {"line_search_fn": search}
    reference = TorchRun(torch.optim, bowl, start(), **arguments)
    beside = TorchRun(torch.optim, bowl, np.nextafter(start(), 9), **arguments)
    drop_in, pure = TorchRun(optim, bowl, start(), **arguments), JaxRun(bowl, start(), **arguments)
    # Before torch 2.10 a line search goes on beyond max_eval.
    torch_ends_searches = SEARCH_EVALUATIONS is None or "max_eval" not in arguments
    for _ in range(6):
        losses = [run.step() for run in (reference, drop_in, pure)]
        state = reference.state
        assert drop_in.calls == reference.calls
        assert drop_in.state["func_evals"] == state["func_evals"]
        if torch_ends_searches or search is None:
            for name in ("func_evals", "n_iter"):
                assert int(getattr(pure.state, name)) == state[name]
            assert losses[2] == pytest.approx(losses[0], rel=1e-13)
        assert losses[1] == pytest.approx(losses[0], rel=1e-13)
        assert drop_in.state["n_iter"] == state["n_iter"]
        # Near the minimum gradients are differences of what is near, so that the last digits are those of the sums:
        # there torch, started an ulp away, is as far from itself.
        beside.step()
        tolerance = max(1e-13, 2 * cases.difference(beside.x, reference.x))
        assert cases.difference(drop_in.x, reference.x) <= tolerance
        if torch_ends_searches or search is None:
            assert cases.difference(pure.x, reference.x) <= tolerance
        assert list(drop_in.state) == list(state)
        assert len(drop_in.state.get("old_dirs", [])) == len(state.get("old_dirs", []))
        for name in ("d", "prev_flat_grad"):
            if name in state:
                assert (drop_in.state[name].dtype, drop_in.state[name].shape) == (state[name].dtype, state[name].shape)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_history_is_torchs(search, x64):
    """More pairs than there is room for, in torch's order; and its scalars."""
    arguments = dict(lr=1, max_iter=4, history_size=11, line_search_fn=search)
    runs = [TorchRun(module, bowl, start(), **arguments) for module in (torch.optim, optim)]
    pure = JaxRun(bowl, start(), **arguments)
    for _ in range(4):
        for run in (*runs, pure):
            run.step()
        a, b = (run.state for run in runs)
        stored, size = int(pure.state.stored), 12
        order = [i % size for i in range(max(0, stored - 11), stored)]
        assert len(order) == len(a["ro"])
        for name in ("old_dirs", "old_stps", "ro"):
            for x, y, z in zip(a[name], b[name], np.asarray(getattr(pure.state, name))[order], strict=True):
                assert cases.difference(y, x) <= 1e-11
                assert cases.difference(z, x) <= 1e-11
        assert cases.difference(b["H_diag"], a["H_diag"]) <= 1e-11
        assert cases.difference(b["d"], a["d"]) <= 1e-9
    assert len(b["old_dirs"]) == 11


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("f", [bowl, rosenbrock])
def test_drop_in_equals_torch_to_the_last_bit(f, search, dtype):
    """Sums in torch's order, numbers in torch's types: parameters and all state, where an ulp would grow as well."""
    arguments = dict(lr=0.9, max_iter=8, history_size=5, line_search_fn=search)
    runs = [TorchRun(module, f, 0.3 * start(dtype), **arguments) for module in (torch.optim, optim)]
    for _ in range(6):
        losses = [run.step() for run in runs]
        assert losses[0] == losses[1]
        a, b = (run.state for run in runs)
        assert runs[0].calls == runs[1].calls
        assert torch.equal(runs[0].p, runs[1].p)
        assert list(a) == list(b)
        for name in set(a) - {"al"}:  # torch's working memory
            for x, y in zip(*(s[name] if isinstance(s[name], list) else [s[name]] for s in (a, b)), strict=True):
                assert torch.equal(torch.as_tensor(x, dtype=runs[0].p.dtype), torch.as_tensor(y, dtype=runs[0].p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_is_torchs_to_the_last_bit(dtype):
    """Kinks make the search zoom in on brackets whose both ends are tensors: torch divides by their distance as it
    divides a number by a tensor, in two operations.
    """
    runs = []
    for module in (torch.optim, optim):
        torch.manual_seed(0)
        x = torch.randn(64, 4, dtype=dtype)
        layers = torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)
        model = torch.nn.Sequential(*layers).to(dtype)
        optimizer = module.LBFGS(model.parameters(), max_iter=5, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = (model(x) - torch.sin(x.sum(1, keepdim=True))).square().mean()
            loss.backward()
            return loss

        points = []
        for _ in range(15):
            optimizer.step(closure)
            points.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        runs.append(points)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_learning_rate_that_is_a_tensor_is_torchs_to_the_last_bit(search, dtype):
    """Of the parameters' type: steps go by torch's tensors, and so do the search's numbers."""
    lr = torch.tensor(0.7, dtype=getattr(torch, dtype))
    arguments = dict(lr=lr, max_iter=5, history_size=5, tolerance_change=0, line_search_fn=search)
    runs = [TorchRun(module, rosenbrock, 0.3 * start(dtype), **arguments) for module in (torch.optim, optim)]
    for _ in range(12):
        losses = [run.step() for run in runs]
        assert losses[0] == losses[1]
        assert torch.equal(runs[0].p, runs[1].p)


def test_the_line_search_has_its_own_least_bracket(x64):
    """torch gives it 1e-9, whatever tolerance_change is: with the latter the search would end an evaluation early."""
    arguments = dict(lr=8, max_iter=8, tolerance_change=0.1, line_search_fn="strong_wolfe")
    reference, drop_in = (TorchRun(module, rosenbrock, start(), **arguments) for module in (torch.optim, optim))
    pure = JaxRun(rosenbrock, start(), **arguments)
    for _ in range(3):
        for run in (reference, drop_in, pure):
            run.step()
    assert reference.calls == drop_in.calls == int(pure.state.func_evals) == 24


def test_a_closure_that_moves_the_parameters():
    """A line search goes on from where it began, so that what the closure adds is lost; without one it is kept."""
    for search in (None, "strong_wolfe"):
        runs = [TorchRun(module, bowl, start(), max_iter=4, line_search_fn=search) for module in (torch.optim, optim)]
        for run in runs:
            closure = run.closure

            def clamping(run=run, closure=closure):
                loss = closure()
                with torch.no_grad():
                    run.p.clamp_(-0.5, 0.5)
                return loss

            for _ in range(3):
                run.optimizer.step(clamping)
        assert torch.equal(runs[0].p, runs[1].p)
    assert runs[1].p.abs().max() > 0.5


class Passes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts numbers read and written by torch's operations, views and the closure aside."""

    def __init__(self):
        super().__init__()
        self.numbers, self.paused = 0, False

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if not self.paused and not f.is_view and f is not torch.ops.aten.detach.default:
            self.numbers += sum(x.numel() for x in jax.tree.leaves((args, out)) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize(("search", "most"), [(None, 23), ("strong_wolfe", 20)])
def test_passes_over_vectors(search, most):
    """An evaluation waits for memory: the two loops read each pair twice, in 10 passes, and little comes to that."""
    pairs, found = 5, []
    for module in (torch.optim, optim):
        run = TorchRun(module, bowl, start(), lr=0.5, max_iter=6, history_size=pairs, line_search_fn=search)
        for _ in range(2):
            run.step()
        passes, closure = Passes(), run.closure

        def unseen(run=run, passes=passes, closure=closure):
            passes.paused = True
            loss = closure()
            passes.paused = False
            return loss

        before = run.calls
        with passes:
            run.optimizer.step(unseen)
        found.append(passes.numbers / N / (run.calls - before))
    assert found[1] <= 10 * pairs + most
    assert found[1] < found[0] - 5


def test_rosenbrock_until_an_ulp_has_grown(x64):
    """In the curved valley torch itself, started an ulp away, is as far from itself as we are from it."""
    arguments = dict(lr=1, line_search_fn="strong_wolfe", max_iter=10)
    x = start() * 0.3
    reference, beside = (TorchRun(torch.optim, rosenbrock, y, **arguments) for y in (x, np.nextafter(x, 9)))
    runs = [TorchRun(optim, rosenbrock, x, **arguments), JaxRun(rosenbrock, x, **arguments)]
    for _ in range(3):
        for run in (reference, beside, *runs):
            run.step()
        growth = cases.difference(beside.x, reference.x)
        for run in runs:
            assert cases.difference(run.x, reference.x) <= max(100 * growth, 1e-13)
    assert growth > 1e-13
    for _ in range(60):
        losses = [run.step() for run in (reference, *runs)]
    assert max(losses) < 1e-8


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_float32(search):
    arguments = dict(lr=1, max_iter=8, line_search_fn=search)
    reference = TorchRun(torch.optim, bowl, start("float32"), **arguments)
    runs = [TorchRun(optim, bowl, start("float32"), **arguments), JaxRun(bowl, start("float32"), **arguments)]
    for run in (reference, *runs):
        run.step()
    for run in runs:
        assert run.x.dtype == np.float32
        assert cases.difference(run.x, reference.x) <= 1e-4
    assert runs[0].state["old_dirs"][0].dtype is torch.float32


def test_a_tree_of_parameters_schedule_arguments_and_one_compilation():
    traces = 0

    def loss(params, data):
        nonlocal traces
        traces += 1
        return jnp.sum((params["w"] @ data - params["b"]) ** 2) + 0.1 * jnp.sum(params["w"] ** 2) + jnp.cos(params["s"])

    value_and_grad = jax.value_and_grad(loss)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones((2,), jnp.bfloat16), "s": jnp.float32(0.5)}
    solver = jopt.lbfgs(lr=lambda step: jnp.where(step < 2, 0.0, 1.0), line_search_fn="strong_wolfe")
    state = solver.init(params)
    assert state.d.shape == (9,)
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.standard_normal((3, 1)), jnp.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        new, state, before = solver.step(value_and_grad, state, params, data)
        assert traces > 0
        traces = 0
        losses = [float(before)]
        for _ in range(4):
            new, state, now = solver.step(value_and_grad, state, new, data)
            losses.append(float(now))
    assert traces == 0
    assert int(state.count) == 5
    assert losses[0] == pytest.approx(losses[1])
    assert losses[4] < losses[0] - 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_inside_jit_and_vmap():
    solver = jopt.lbfgs(line_search_fn="strong_wolfe", max_iter=50)

    @jax.jit
    def minimum(scale):
        def value_and_grad(x):
            return jax.value_and_grad(lambda x: jnp.sum(jnp.cosh(x - scale)))(x)

        x = jnp.zeros(3)
        return solver.step(value_and_grad, solver.init(x), x)[0]

    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(minimum(2.0), 2 * np.ones(3), atol=1e-3)
        found = jax.vmap(minimum)(jnp.array([1.0, -1.5]))
    np.testing.assert_allclose(found, np.outer([1, -1.5], np.ones(3)), atol=1e-3)


def test_complex_and_sparse_and_absent_gradients(x64):
    rng = np.random.default_rng(0)
    z, w, e = rng.standard_normal(6) + 1j * rng.standard_normal(6), rng.standard_normal(4), rng.standard_normal((5, 2))
    target = rng.standard_normal(6) + 1j * rng.standard_normal(6)
    results = []
    for module in (torch.optim, optim):
        ps = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in (z, w, e)]
        unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = module.LBFGS([ps[0], unused, *ps[1:]], line_search_fn="strong_wolfe", max_iter=6)

        def closure(ps=ps, optimizer=optimizer):
            optimizer.zero_grad()
            rows = torch.nn.functional.embedding(torch.tensor([1, 3, 3]), ps[2], sparse=True)
            loss = (ps[0] - torch.from_numpy(target)).abs().pow(4).sum() + (ps[1] - 1).cosh().sum() + (rows**4).sum()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        assert torch.equal(unused, torch.ones(3, dtype=torch.float64))
        results.append([p.detach().numpy() for p in ps])
    for a, b in zip(*results, strict=True):
        assert cases.difference(b, a) <= 1e-9

    solver = jopt.lbfgs(line_search_fn="strong_wolfe", max_iter=6)
    params = {"w": jnp.asarray(w), "z": jnp.asarray(z)}

    def value_and_grad(params):
        loss, grads = jax.value_and_grad(
            lambda q: jnp.sum(jnp.abs(q["z"] - target) ** 4) + jnp.sum(jnp.cosh(q["w"] - 1))
        )(params)
        return loss, jax.tree.map(jnp.conj, grads)

    new, _, _ = solver.step(value_and_grad, solver.init(params), params)
    for _ in range(4):
        new, _, _ = solver.step(value_and_grad, solver.init(params), new)
    assert np.abs(new["z"] - target).max() < 0.05
    assert new["z"].dtype == jnp.complex128


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoints_cross(direction):
    arguments = dict(lr=0.5, max_iter=3, history_size=5, line_search_fn="strong_wolfe")
    modules = (torch.optim, optim) if direction == "from torch" else (optim, torch.optim)
    reference, first = (
        TorchRun(torch.optim, bowl, start(), **arguments),
        TorchRun(modules[0], bowl, start(), **arguments),
    )
    for _ in range(4):
        reference.step()
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second = TorchRun(modules[1], bowl, first.x, lr=9.0)
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        second.step()
    assert cases.difference(second.x, reference.x) <= 1e-10


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_step(how):
    run = TorchRun(optim, bowl, start(), max_iter=3)
    run.step()
    p, optimizer = how((run.p, run.optimizer))
    twin = copy.copy(run)
    twin.p, twin.optimizer = p, optimizer
    run.step()
    assert cases.difference(run.x, twin.x) > 0
    twin.step()
    assert cases.difference(run.x, twin.x) <= 1e-12
    assert twin.state["old_dirs"][0].data_ptr() != run.state["old_dirs"][0].data_ptr()


def test_an_exception_in_the_closure_leaves_a_usable_state():
    for module in (torch.optim, optim):
        run = TorchRun(module, bowl, start(), max_iter=4, line_search_fn="strong_wolfe")
        run.step()
        calls, closure = run.calls, run.closure

        def failing(run=run, calls=calls, closure=closure):
            if run.calls == calls + 3:
                raise KeyError("data")
            return closure()

        with pytest.raises(KeyError, match="data"):
            run.optimizer.step(failing)
        for _ in range(8):
            loss = run.step()
        assert loss == pytest.approx(-120 + 0 * loss, abs=250)
        assert run.state["prev_flat_grad"].abs().max() < 1e-3


def test_errors():
    run = TorchRun(optim, bowl, start(), line_search_fn="backtracking")
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        run.step()
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        jopt.lbfgs(line_search_fn="backtracking")
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        jopt.lbfgs(lr=-1)
    with pytest.raises(ValueError, match="history_size: expected at least 1, found 0"):
        jopt.lbfgs(history_size=0)
    solver, x = jopt.lbfgs(), jnp.ones(3)
    with pytest.raises(TypeError, match="params: expected a floating point or complex type, found int32"):
        solver.init(jnp.arange(3))
    with pytest.raises(ValueError, match="state: expected one of 3 numbers, as params have, found 2"):
        solver.step(jax.value_and_grad(jnp.sum), solver.init(x[:2]), x)
    with pytest.raises(ValueError, match=r"expected a scalar loss, found shape \(3,\)"):
        solver.step(lambda x: (x, x), solver.init(x), x)
    with pytest.raises(ValueError, match="expected gradients of the structure and shapes of params"):
        solver.step(lambda x: (x[0], x[1:]), solver.init(x), x)
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        optim.LBFGS([{"params": [torch.ones(1, requires_grad=True)]}, {"params": [torch.ones(2, requires_grad=True)]}])


def steps_after(edit, **arguments):
    """Both sides' points after two steps, an edit of the state, and two more."""
    runs = [TorchRun(module, bowl, start(), max_iter=3, **arguments) for module in (torch.optim, optim)]
    for run in runs:
        for _ in range(2):
            run.step()
        edit(run.state)
        for _ in range(2):
            run.step()
    return [run.x for run in runs]


def drop_newest(state):
    for name in ("old_dirs", "old_stps", "ro"):
        state[name].pop()


def scale_ro(state):
    state["ro"][-1] *= 0.5


def exchange_ro(state):
    state["ro"] = [x * 0.9 for x in state["ro"]]


def begin_anew(state):
    state["n_iter"] = 0


def scale_a_row(state):
    state["old_dirs"][1].mul_(1.1)


@pytest.mark.parametrize("edit", [drop_newest, scale_ro, exchange_ro, begin_anew, scale_a_row])
def test_edits_of_the_state_are_seen(edit):
    a, b = steps_after(edit)
    assert cases.difference(b, a) <= 1e-10
    assert cases.difference(steps_after(lambda state: None)[0], a) > 1e-6


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_gradient_that_is_not_finite_leaves_no_trace_in_the_history(search):
    """The pair that it makes is not remembered, by torch neither."""
    xs = []
    for module in (torch.optim, optim):
        run = TorchRun(module, bowl, start(), max_iter=4, line_search_fn=search)
        for _ in range(2):
            run.step()
        x = run.p.detach().clone()
        run.f = lambda x, m: bowl(x, m) * float("nan")
        run.step()
        run.p.data.copy_(x)
        for name in ("d", "prev_flat_grad"):
            run.state[name] = torch.ones_like(run.p)
        run.f = bowl
        for _ in range(2):
            run.step()
        xs.append(run.x)
    assert np.isfinite(xs[0]).all()
    assert cases.difference(xs[1], xs[0]) <= 1e-10


def test_a_history_of_uneven_lists_is_refused():
    run = TorchRun(optim, bowl, start(), max_iter=3)
    run.step()
    run.step()
    n = len(run.state["ro"])
    run.state["ro"].pop()
    with pytest.raises(ValueError, match=f"expected old_dirs, old_stps and ro of one length, found {n}, {n}, {n - 1}"):
        run.step()


def test_float32_state_of_bfloat16_parameters_survives_a_checkpoint():
    def fresh():
        p = torch.nn.Parameter(torch.from_numpy(start()).bfloat16())
        optimizer = optim.LBFGS([p], max_iter=4)

        def closure():
            p.grad = (p.detach().float() * torch.from_numpy(SCALE).float()).bfloat16()
            return (p.detach().float() ** 2 * torch.from_numpy(SCALE).float()).sum() / 2

        return p, optimizer, closure

    p, optimizer, closure = fresh()
    optimizer.step(closure)
    q, second, _ = fresh()
    second.load_state_dict(optimizer.state_dict())
    for name in ("old_dirs", "old_stps", "ro"):
        assert all(map(torch.equal, optimizer.state[p][name], second.state[q][name]))
        assert {x.dtype for x in second.state[q][name]} == {torch.float32}
    assert torch.equal(optimizer.state[p]["d"], second.state[q]["d"])


def test_more_errors():
    for name in ("max_iter", "max_eval", "history_size"):
        with pytest.raises(TypeError, match=rf"{name}: expected an integer, found 2\.5"):
            jopt.lbfgs(**{name: 2.5})
    with pytest.raises(TypeError, match="tolerance_grad: expected a number, found 'a'"):
        jopt.lbfgs(tolerance_grad="a")
    solver, x = jopt.lbfgs(), jnp.ones(3)
    with pytest.raises(ValueError, match="found a tuple in place of the loss"):
        solver.step(jax.value_and_grad(lambda x: (jnp.sum(x), x), has_aux=True), solver.init(x), x)
    run = TorchRun(optim, bowl, start(), tolerance_grad=torch.tensor(1e-5), max_iter=2)
    run.step()
    run.optimizer.param_groups[0]["max_iter"] = 2.5
    calls = run.calls
    with pytest.raises(TypeError, match=r"max_iter: expected an integer, found 2\.5"):
        run.step()
    assert run.calls == calls
