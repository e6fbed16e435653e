"""Parameters whose rows change during training, and the state that follows them: docs/changing-shapes.md."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="what it is compared with")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jopt  # noqa: E402
from interop import optim  # noqa: E402
from interop.dropin import eager, program  # noqa: E402
from tests.cases import FRONT_ENDS, NETWORK, TOLERANCES, TORCH_CASES, difference, parametrize  # noqa: E402

WIDTHS = (3, 700)  # of 100 rows the first shares a buffer, the second has its own
ELEMENTWISE = list({case.torch: case for case in TORCH_CASES if case.scope == "element"}.values())


def rounds():
    """Gradients of three steps, which rows are kept after them, and the rows that are added to those."""
    rng = np.random.default_rng(0)
    n = 100
    for _ in range(2):
        grads = [[rng.standard_normal((n, w)).astype(np.float32) for w in WIDTHS] for _ in range(3)]
        keep = rng.random(n) < 0.7
        more = [rng.standard_normal((20, w)).astype(np.float32) for w in WIDTHS]
        n = int(keep.sum()) + 20
        yield grads, keep, more


def start():
    return [np.random.default_rng(1).standard_normal((100, w)).astype(np.float32) for w in WIDTHS]


def new_rows(case, lr):
    """What new rows of each of torch's tensors begin with."""
    return {name: x.item() for name, x in case.jopt(lr=lr).init(jnp.zeros(())).slots.items()}


def in_torch(module, case):
    params = [torch.nn.Parameter(torch.tensor(p)) for p in start()]
    options = {"foreach": False} if module is torch.optim else {}
    groups = [{"params": [p], "lr": case.lr * (i + 1)} for i, p in enumerate(params)]
    optimizer = getattr(module, case.torch)(groups, **case.arguments, **options)
    for grads, keep, more in rounds():
        for step in grads:
            for group, g in zip(optimizer.param_groups, step, strict=True):
                group["params"][0].grad = torch.tensor(g)
            optimizer.step()
        for group, rows in zip(optimizer.param_groups, map(torch.tensor, more), strict=True):
            [old] = group["params"]
            first = new_rows(case, group["lr"])
            state = optimizer.state.pop(old, {})
            group["params"] = [torch.nn.Parameter(torch.cat([old.detach()[keep], rows]))]

            def grown(name, x, rows=rows, keep=keep, first=first):
                if not isinstance(x, torch.Tensor) or not x.dim():
                    return x
                return torch.cat([x[keep], torch.full_like(rows, first[name])])

            if state:
                optimizer.state[group["params"][0]] = {name: grown(name, x) for name, x in state.items()}
    return [
        [group["params"][0].detach().numpy()]
        + [x.numpy() for x in optimizer.state.get(group["params"][0], {}).values() if isinstance(x, torch.Tensor)]
        for group in optimizer.param_groups
    ]


def in_jax(case):
    transforms = [case.jopt(lr=case.lr * (i + 1)) for i in range(len(WIDTHS))]
    steps = [jax.jit(tx.step) for tx in transforms]
    params = [jnp.array(p) for p in start()]
    states = [tx.init(p) for tx, p in zip(transforms, params, strict=True)]
    for grads, keep, more in rounds():
        for step in grads:
            for i, take in enumerate(steps):
                params[i], states[i] = take(jnp.array(step[i]), states[i], params[i])
        for i, tx in enumerate(transforms):
            slots, fresh = states[i].slots, tx.init(jnp.array(more[i])).slots
            params[i] = jnp.concatenate([params[i][keep], more[i]])
            grown = jax.tree.map(lambda a, b, keep=keep: jnp.concatenate([a[keep], b]), slots, fresh)
            states[i] = states[i]._replace(slots=grown)
    return params


@parametrize(ELEMENTWISE)
def test_state_follows_its_rows(case):
    theirs, ours = in_torch(torch.optim, case), in_torch(optim, case)
    for a, b in zip(theirs, ours, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert difference(y, x) <= TOLERANCES["float32"]
    for (p, *_), q in zip(theirs, in_jax(case), strict=True):
        assert difference(q, p) <= TOLERANCES["float32"]


def test_spare_rows_compute_what_added_rows_do():
    """Rows that are masked until they begin, beside rows that are added when they begin."""
    tx = jopt.adam(lr=0.02)
    rng = np.random.default_rng(2)
    first, more = (jnp.array(rng.standard_normal((n, 3)), jnp.float32) for n in (5, 3))
    grads = [jnp.array(rng.standard_normal((8, 3)), jnp.float32) for _ in range(6)]
    spare = jnp.zeros((8, 3)).at[:5].set(first)
    state = tx.init(spare)
    grown, grown_state = first, tx.init(first)
    alive = jnp.arange(8) < 5
    for i, g in enumerate(grads):
        if i == 3:
            assert spare[5:].tolist() == [[0.0] * 3] * 3
            spare, alive = spare.at[5:].set(more), jnp.ones(8, bool)
            grown = jnp.concatenate([grown, more])
            slots = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), grown_state.slots, tx.init(more).slots)
            grown_state = grown_state._replace(slots=slots)
        spare, state = tx.step(jnp.where(alive[:, None], g, 0), state, spare)
        grown, grown_state = tx.step(g[: len(grown)], grown_state, grown)
    assert difference(spare, grown) <= FRONT_ENDS["float32"]


@pytest.fixture
def rented(monkeypatch, stepped_by):
    """After a change of shapes torch's operations take two steps of 2 x 300 x 100 elements; programs all others."""
    if stepped_by == "operations":
        pytest.skip("only programs are replaced")
    monkeypatch.setattr(eager, "RENT", 2 * 13 * 2 * 300 * 100)


def test_operations_take_the_steps_until_compiling_pays(rented):
    torch.manual_seed(0)
    sides = []
    for module in (torch.optim, optim):
        params = [torch.nn.Parameter(torch.ones(300, 100)) for _ in range(2)]
        sides.append(module.AdamW(params, lr=0.01))
    ours = sides[1]

    def step():
        for i, shape in enumerate(tuple(p.shape) for p in ours.param_groups[0]["params"]):
            grad = torch.randn(shape)
            for side in sides:
                side.param_groups[0]["params"][i].grad = grad.clone()
        for side in sides:
            side.step()
        for p, q in zip(*(side.param_groups[0]["params"] for side in sides), strict=True):
            assert difference(q.detach().double(), p.detach().double()) <= NETWORK["float32"]
        return ours._plan.uses_torch

    def resize(rows):
        for side in sides:
            for i, old in enumerate(side.param_groups[0]["params"]):
                state = side.state.pop(old)
                more = max(0, rows - len(old))
                change = functools.partial(torch.nn.functional.pad, pad=(0, 0, 0, more))
                new = side.param_groups[0]["params"][i] = torch.nn.Parameter(change(old.detach()[:rows]))
                side.state[new] = {k: change(x[:rows]) if x.dim() else x for k, x in state.items()}

    assert not step()
    before = program.compile_update.cache_info().misses
    resize(299)
    assert step()
    assert step()
    assert program.compile_update.cache_info().misses == before
    assert not step()
    assert not step()
    assert program.compile_update.cache_info().misses == before + 1
    resize(300)  # whose program is there
    assert not step()
    resize(298)
    assert step()
    resize(297)
    assert step()
    assert step()
    assert not step()
    assert program.compile_update.cache_info().misses == before + 2


def test_a_first_gradient_is_no_change_of_shapes(rented):
    """A run that is resumed makes the same programs as the one that goes on."""
    params = [torch.nn.Parameter(torch.ones(300, 100)) for _ in range(2)]
    optimizer = optim.AdamW(params)
    for i in range(2):
        for p in params[: i + 1]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not optimizer._plan.uses_torch
