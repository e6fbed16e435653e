"""A run from torch to JAX and back is the run that stayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

torch = pytest.importorskip("torch", reason="moving is from torch")

import interop  # noqa: E402
import jopt  # noqa: E402
from interop import optim  # noqa: E402
from tests import cases  # noqa: E402

STEPS = 50  # on each of three legs; cases.active freezes parameters in them


class Model(torch.nn.Module):
    """The parameters of a Problem, in an order that is not that of their names."""

    def __init__(self, problem):
        super().__init__()
        for name, x in zip("bca", problem.start, strict=True):
            self.register_parameter(name, torch.nn.Parameter(torch.tensor(np.asarray(x))))

    def values(self):
        return [p.detach().numpy().copy() for p in self.parameters()]


def torch_leg(problem, model, optimizer, steps):
    for i in steps:
        grads = problem.grads(i, model.values())
        for p, g, on in zip(model.parameters(), grads, cases.active(i), strict=True):
            p.grad = torch.tensor(g) if on else None
        optimizer.step()


def jax_leg(problem, tx, params, state, steps):
    step = jax.jit(tx.step)
    for i in steps:
        grads = problem.grads(i, [np.asarray(params[name]) for name in "bca"])
        grads = {name: jnp.asarray(g) for name, g in zip("bca", grads, strict=True)}
        active = {name: jnp.asarray(on) for name, on in zip("bca", cases.active(i), strict=True)}
        params, state = step(grads, state, params, active=active)
    return params, state


def there_and_back(problem, model, optimizer):
    """The second leg in JAX."""
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    assert sorted(params) == ["a", "b", "c"]
    with torch.no_grad():  # that what comes back is what went is seen by nothing being left
        for p in model.parameters():
            p.fill_(7)
    params, state = jax_leg(problem, tx, params, state, range(STEPS, 2 * STEPS))
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    return tx, params, state


def assert_equal(case, ours, theirs):
    tolerance = (cases.MUON if case.torch == "Muon" else cases.TOLERANCES)["float64"]
    (model, optimizer), (reference, expected) = ours, theirs
    for a, b in zip(model.values(), reference.values(), strict=True):
        assert cases.difference(a, b) <= tolerance
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        state, found = expected.state[q], optimizer.state[p]
        assert sorted(found) == sorted(state)  # jit sorts a dictionary's keys
        for key, x in state.items():
            assert found[key].dtype == x.dtype, key
            assert found[key].shape == x.shape, key
            assert cases.difference(found[key].numpy(), x.numpy()) <= tolerance, key


ONE_EACH = {case.torch: case for case in cases.CASES if case.torch}  # the last of each class, with flags set
RUNS = {f"{case.id}-native": (case, torch.optim) for case in cases.CASES if case.torch} | {
    f"{case.id}-drop-in": (case, optim) for case in ONE_EACH.values()
}


@pytest.mark.parametrize(
    ("case", "module"),
    [
        pytest.param(*run, id=name, marks=[pytest.mark.slow] * (run[0].id not in cases.UNLIKE))
        for name, run in RUNS.items()
    ],
)
def test_there_and_back(case, module, x64):
    problem = cases.Problem("float64", matrices=case.matrices)
    runs = []
    for moves in (True, False):
        model = Model(problem)
        optimizer = getattr(module if moves else torch.optim, case.torch)(
            model.parameters(), **{"lr": case.lr} | case.arguments
        )
        torch_leg(problem, model, optimizer, range(STEPS))
        if moves:
            there_and_back(problem, model, optimizer)
        else:
            torch_leg(problem, model, optimizer, range(STEPS, 2 * STEPS))
        torch_leg(problem, model, optimizer, range(2 * STEPS, 3 * STEPS))
        runs.append((model, optimizer))
    assert_equal(case, *runs)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam", "Adafactor"])
def test_groups_there_and_back(name, x64):
    """Groups of different numbers become those of jopt.param_groups; each keeps its own."""
    problem = cases.Problem("float64")
    runs = []
    for moves in (True, False):
        model = Model(problem)
        groups = [
            {"params": [model.b], "weight_decay": 0.0},
            {"params": [model.c, model.a], "lr": 0.005},
        ]
        optimizer = getattr(torch.optim, name)(groups, lr=0.02, weight_decay=0.1)
        torch_leg(problem, model, optimizer, range(STEPS))
        if moves:
            tx, params, state = there_and_back(problem, model, optimizer)
            assert tx.assignment(params) == {"b": "param_groups[0]", "c": "the rest", "a": "the rest"}
        else:
            torch_leg(problem, model, optimizer, range(STEPS, 2 * STEPS))
        torch_leg(problem, model, optimizer, range(2 * STEPS, 3 * STEPS))
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.005]
        runs.append((model, optimizer))
    assert_equal(next(c for c in cases.CASES if c.torch == name), *runs)
    model = Model(problem)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected one of 1 groups, as the optimizer's, found 2"):
        interop.optimizer_to_torch(tx, params, state, model, optimizer)


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH)
def test_from_jax_first(case, x64):
    """Into an optimizer that has not stepped yet."""
    problem, arguments = cases.Problem("float64", matrices=case.matrices), {"lr": case.lr} | case.arguments
    model, reference = Model(problem), Model(problem)
    optimizer, expected = (getattr(torch.optim, case.torch)(m.parameters(), **arguments) for m in (model, reference))
    tx = case.jopt()
    params = {n: jnp.asarray(x) for n, x in zip("bca", problem.start, strict=True)}
    params, state = jax_leg(problem, tx, params, tx.init(params), range(STEPS))
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    torch_leg(problem, model, optimizer, range(STEPS, 2 * STEPS))
    torch_leg(problem, reference, expected, range(2 * STEPS))
    assert_equal(case, (model, optimizer), (reference, expected))


def test_a_parameter_without_state_stays_without():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    assert state.scalars["step"].tolist() == [0, 1]  # bias, weight
    assert int(state.count) == 1
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    assert list(optimizer.state) == [model.weight]


def test_float32_state_of_bfloat16_parameters_stays():
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        optimizer.state[p] = {"step": torch.tensor(3.0)} | {
            k: torch.full(p.shape, 0.1) for k in ("exp_avg", "exp_avg_sq")
        }
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    assert state.slots["exp_avg"]["weight"].dtype == jnp.float32
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float32
    assert params["weight"].dtype == jnp.bfloat16


def test_clipping_stays_behind():
    model = torch.nn.Linear(3, 2)
    optimizer = optim.Adam(model.parameters(), max_norm=2.0)
    with pytest.warns(UserWarning, match=r"max_norm=2.0 is not in tx; clip by jopt.clip_grad_norm\(2.0\)"):
        interop.optimizer_to_jax(optimizer, model)


def test_averages_stay_behind():
    model = torch.nn.Linear(3, 2)
    optimizer = optim.Adam(model.parameters(), ema=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    average = optimizer.state[model.weight]["ema"].clone()
    with pytest.warns(UserWarning, match=r"ema=0.9 does not go on in tx; take it along by average_to_jax"):
        tx, params, state = interop.optimizer_to_jax(optimizer, model)
    params, state = tx.step({k: jnp.ones_like(x) for k, x in params.items()}, state, params)
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    assert torch.equal(optimizer.state[model.weight]["ema"], average)
    optimizer.step()
    expected = average.lerp(model.weight.detach(), 1 - 0.9)
    assert (
        cases.difference(optimizer.state[model.weight]["ema"].numpy(), expected.numpy()) <= cases.TOLERANCES["float32"]
    )


def test_schedules_go_on_where_the_scheduler_is():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    tx, params, state = interop.optimizer_to_jax(optimizer, model, lr=lambda step: 0.5 * 0.9**step)
    _, state = tx.step({k: jnp.ones_like(x) for k, x in params.items()}, state, params)
    interop.optimizer_to_torch(tx, params, state, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.9**5, rel=1e-15)


def test_sgd_counts_as_it_is_told():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    assert int(interop.optimizer_to_jax(optimizer, model)[2].count) == 0
    assert int(interop.optimizer_to_jax(optimizer, model, step=7)[2].count) == 7


def test_sparse_adam():
    runs = []
    for moves in (True, False):
        model = torch.nn.Embedding(6, 4, sparse=True)
        with torch.no_grad():
            model.weight.copy_(torch.arange(24.0).reshape(6, 4))
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        for i in range(6):
            rows, values = np.array([i % 6, 2]), np.full((2, 4), 1.0 + i, np.float32)
            if moves and i == 2:
                tx, params, state = interop.optimizer_to_jax(optimizer, model)
            if moves and 2 <= i < 4:
                grad = BCOO((jnp.asarray(values), jnp.asarray(rows[:, None])), shape=(6, 4))
                params, state = tx.step({"weight": grad}, state, params)
                if i == 3:
                    interop.optimizer_to_torch(tx, params, state, model, optimizer)
                continue
            index = torch.tensor(rows)[None]
            model.weight.grad = torch.sparse_coo_tensor(index, torch.tensor(values), (6, 4), check_invariants=True)
            optimizer.step()
        runs.append(model.weight.detach().numpy())
        assert optimizer.state[model.weight]["step"] == 6
    assert cases.difference(*runs) <= cases.TOLERANCES["float32"]


@pytest.mark.parametrize("first", ["native", "drop-in", "jax"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search, first, x64):
    """Parameters in another order than JAX's, more pairs than the history takes, complex ones among them."""

    def bowl(xs, m):
        return sum(
            m.sum(scale * abs(x - 1) ** 2) / 2 + 3 * m.sum(m.cos(abs(x)))
            for x, scale in zip(xs, (1, 7, 3), strict=True)
        )

    def leg(model, optimizer, steps):
        def closure():
            optimizer.zero_grad()
            loss = bowl(list(model.parameters()), torch)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)

    def loss(params):
        return bowl([params[name] for name in "bca"], jnp)

    def value_and_grad(params):
        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(jnp.conj, grads)

    runs = []
    for moves in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Module()
        for name, shape in (("b", (3,)), ("c", (2, 4)), ("a", (5,))):
            dtype = torch.complex128 if name == "c" else torch.float64
            model.register_parameter(name, torch.nn.Parameter(3 * torch.randn(shape, dtype=dtype)))
        module = optim if moves and first == "drop-in" else torch.optim
        arguments = dict(
            lr=0.3, max_iter=2, history_size=4, line_search_fn=search, tolerance_change=0.0, tolerance_grad=0.0
        )
        optimizer = module.LBFGS(model.parameters(), **arguments)
        if first != "jax":
            leg(model, optimizer, 3)
        if moves:
            tx, params, state = interop.optimizer_to_jax(optimizer, model)
            assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))
            for _ in range(3):
                params, state, _ = tx.step(value_and_grad, state, params)
            interop.optimizer_to_torch(tx, params, state, model, optimizer)
        else:
            leg(model, optimizer, 3)
        leg(model, optimizer, 3)
        runs.append((model, optimizer))
    ours, theirs = ([p.detach().numpy() for p in model.parameters()] for model, _ in runs)
    for x, y in zip(ours, theirs, strict=True):
        assert cases.difference(x, y) <= cases.NETWORK["float64"]
    found, expected = (optimizer.state[model.b] for model, optimizer in runs)
    assert found.keys() == expected.keys()
    assert [found[k] for k in ("n_iter", "func_evals")] == [expected[k] for k in ("n_iter", "func_evals")]
    for key in ("d", "prev_flat_grad"):
        assert cases.difference(found[key].numpy(), expected[key].numpy()) <= cases.NETWORK["float64"]
    assert len(found["old_dirs"]) == len(expected["old_dirs"]) == 4


def test_what_cannot_be_moved():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"expected one of torch\.optim's or interop\.optim's, found .*Own"):
        interop.optimizer_to_jax(type("Own", (torch.optim.Optimizer,), {})(model.parameters(), {}), model)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, of shape \(2, 3\), is none of the model's"):
        interop.optimizer_to_jax(torch.optim.AdamW(model.parameters()), torch.nn.Linear(3, 2))
    wide = torch.nn.Linear(3, 2).double()
    with pytest.raises(TypeError, match="jax_enable_x64"):
        interop.optimizer_to_jax(torch.optim.AdamW(wide.parameters()), wide)


def test_nothing_is_written_by_a_refused_return():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    tx, params, state = interop.optimizer_to_jax(optimizer, model)
    before = [p.detach().clone() for p in model.parameters()]
    params = {k: x + 1 for k, x in params.items()}
    for other, given, error in (
        (jopt.lbfgs(), params, "expected one that steps Adam, as AdamW, found LBFGS"),
        (jopt.sgd(lr=1.0), params, "expected one that steps Adam, as AdamW, found SGD"),
        (tx, {"weight": params["weight"]}, r"missing \['bias'\], unknown \[\]"),
        (tx, params | {"bias": jnp.ones(3)}, r"params\['bias'\]: expected shape \(2,\), found \(3,\)"),
        (tx, params | {"bias": params["bias"].astype(jnp.bfloat16)}, "expected torch.float32, found torch.bfloat16"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            interop.optimizer_to_torch(other, given, state, model, optimizer)
    slots = {slot: tree | {"bias": jnp.ones(3)} for slot, tree in state.slots.items()}
    for wrong, error in (
        (
            state._replace(slots=slots),
            r"state.*'bias'.*expected float32 of shape \(2,\), found float32 of shape \(3,\)",
        ),
        (state._replace(slots={}), r"state: expected the structure of tx.init\(params\)"),
    ):
        with pytest.raises(ValueError, match=error):
            interop.optimizer_to_torch(tx, params, wrong, model, optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state


@pytest.mark.parametrize("form", ["int8", "bfloat16", "float32"])
def test_a_checkpoint_from_jax_says_the_format_of_its_state(form, tmp_path):
    tx = jopt.adamw(lr=0.1, state_dtype=form)
    params = {"w": jnp.linspace(-1, 1, 5000)}
    params, state = tx.step({"w": jnp.cos(params["w"])}, tx.init(params), params)
    interop.save_checkpoint(interop.Checkpoint.from_jax(tx, params, state), tmp_path / "run.pt")
    back, again, restored = interop.load_checkpoint(tmp_path / "run.pt").to_jax()
    assert back.state_dtype == tx.state_dtype
    expected, found = back.step(again, restored, again), tx.step(params, state, params)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True))
