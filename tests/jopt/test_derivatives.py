"""Derivatives through steps where gradients are exactly 0: of every rule, in every number, parameter and gradient.

A zero gradient puts roots and norms at 0, where their own derivative is infinite. What follows multiplies it by the
gradient: the derivative of a step, g / (sqrt(v) + eps) with v = g^2, is 1 / eps there, the limit from both sides.
Reverse mode is compared with forward mode and with differences of the loss in float64; a function with such a point
has a derivative there but no second one, so the differences are extrapolated from three widths.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jopt
from jopt.optimizers import NorMuon
from jopt.rule import Batched
from jopt.transform import transform
from tests import cases

STEPS = 7  # RAdam's second moment sets in at the sixth
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def start(case):
    """Parameters, and gradients by the step, None for a frozen one."""
    rng = np.random.default_rng(0)
    params = {
        "some": rng.uniform(0.4, 0.9, (3, 4)),
        "never": rng.uniform(0.4, 0.9, 2),
        "late": rng.uniform(0.4, 0.9, 3),
        "minimum": np.zeros(2),
        "small": rng.uniform(1e-3, 2e-3, 2),  # below Adafactor's floors
        "frozen": np.ones(2),
    }
    grads = {name: rng.uniform(0.3, 0.9, (STEPS, *x.shape)) for name, x in params.items()}
    grads["some"][:, 0] = 0  # a row
    grads["some"][0, 1] = 0  # a row in the first step
    grads["some"][1, 2, 0] = 0  # an entry in a later one
    grads["some"][:, 2, 1:] *= -1
    grads["some"][::3, 2, 2] *= -1  # of changing sign
    grads["never"][:] = 0
    grads["late"][0] = 0
    grads["late"][-1] *= 10  # Adafactor clips
    grads["small"] *= 1e-3
    grads["minimum"][:] = 0  # and stays there: the gradient is the parameter
    del grads["frozen"]
    if case.matrices:
        params = jax.tree.map(np.atleast_2d, params)
        grads = {name: g.reshape(STEPS, *params[name].shape) for name, g in grads.items()}
    return jax.tree.map(jnp.asarray, (params, grads))


def arguments(case):
    """The case's, with numbers that differences can be taken of: an eps that is not tiny, thresholds not met."""
    takes = case.jopt().hyperparameters
    given = {"eps": (1e-2, 1e-2)} if case.name == "adafactor" else {"eps": 1e-1} if "eps" in takes else {}
    # of those that are multiplied by a count the default is next to 0
    plain = dict(d=1.5, momentum_decay=0.3, lambd=0.05, t0=1.5, initial_accumulator_value=0.5, growth_rate=1.3)
    given |= {name: x for name, x in plain.items() if name in takes}
    if case.name == "adamax":
        # beta2 * u and |g| + eps are not next to each other; |weight_decay * p| has two derivatives at 0, as |g| has
        given |= {"betas": (0.9, 0.9), "weight_decay": 0.1}
    if case.name == "rprop":
        given["step_sizes"] = (0.012, 0.03) if "step_sizes" in case.arguments else (1e-3, 50.0)
    return {"lr": case.lr} | given | {k: x for k, x in case.arguments.items() if k not in given}


def numbers(tx):
    """Every number, as an array."""
    return {name: jnp.asarray(x, float) for name, x in tx.hyperparameters.items() if x is not None}


def made(tx, h, **options):
    """The transformation with all its numbers given as arrays."""
    rule = type(tx.rule)
    flags = {name: x for name, x in vars(tx.rule).items() if name not in rule.hyperparameters}
    grouped = {name: tuple(h[m] for m in members) for name, members in rule.tuples.items() if members[0] in h}
    return transform(rule, h | grouped | flags, **options)


def final(tx, params, grads, wrap=lambda tree: tree):
    """A loss of the parameters and the state after the steps."""
    pull = 1e-3 if isinstance(tx.rule, Batched) else 1.0  # whose iteration multiplies what is small by 485

    def gradient(params, g):
        g = {name: g[name] * jnp.cos(params[name]) for name in g}
        return g | {"minimum": g["minimum"] + pull * params["minimum"], "frozen": None}

    def body(carry, g):
        params, state = carry
        return tx.step(gradient(params, g), state, params), None

    (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), grads)
    slots = {name: slot for name, slot in state.slots.items() if name != "prev"}  # see `test_jumps`
    return sum(jnp.sum(x**2 + 0.3 * x) for x in jax.tree.leaves((params, slots)))


def stencil(x, count, relative=2e-3):
    """Entries, shifts and weights of the losses whose sum is the derivative in each entry of x, first `count` numbers.

    In numbers a loss is smooth: of fourth order, to one side of 0. In the others it may have no second derivative.
    """
    number, a = np.arange(x.size) < count, np.abs(np.asarray(x))
    width = np.where(number, np.where(a == 0, 1e-4, relative * np.where(a < 1, np.minimum(a, 1 - a), a)), 1e-5)
    weights = np.zeros((x.size, 9))  # at -4, ... 4 widths
    weights[:] = np.array([-1, 0, 12, -32, 0, 32, -12, 0, 1]) / 24
    weights[number] = np.array([0, 0, 1, -8, 0, 8, -1, 0, 0]) / 12
    weights[number & (a == 0)] = np.array([0, 0, 0, 0, -11, 18, -9, 2, 0]) / 6
    i, k = np.nonzero(weights)
    return i, (k - 4) * width[i], weights[i, k] / width[i]


def alike(found, expected, tolerance, slack=0.0):
    """Each array, beside its largest value."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all(), path
        worst = np.abs(a - b).max(initial=0)
        assert worst <= tolerance * max(np.abs(b).max(initial=0), 1e-3) + slack, (jax.tree_util.keystr(path), a, b)


# The fast ones have a root, an absolute value, and a momentum that is 0.
# Eigenvectors are taken as constants: where eigenvalues are equal they have no derivative. See `test_bases`.
BASES = {"soap"}

FAST = {"adam-amsgrad", "adamax", "gradient_descent"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.id, marks=[] if c.id in FAST else pytest.mark.slow)
        for c in cases.CASES
        if not c.matrices and c.id not in BASES
    ],
)
def test_modes_and_differences(case, x64):
    """Every number is an array here, so that no term is left out for being 0."""
    tx = case.jopt(**arguments(case))
    params, grads = start(case)
    h = numbers(tx)
    x, unravel = ravel_pytree((h, params, grads))
    i, shift, weight = stencil(x, len(h))

    def loss(x):
        h, params, grads = unravel(x)
        return final(made(tx, h), params, grads)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def compute(x):
        losses = jax.lax.map(lambda at: loss(x.at[at[0]].add(at[1])), (i, shift))
        return jax.grad(loss)(x), jax.jacfwd(loss)(x), losses

    reverse, forward, losses = compute(x)
    by_difference = np.bincount(i, weight * losses)
    stored = cases.STORED.get(case.name, 0)
    rounding = np.where(np.arange(x.size) < len(h), 4 * stored, 0) + np.finfo(float).eps * np.abs(losses).max()
    slack = rounding * np.bincount(i, np.abs(weight))
    if case.name == "rprop":  # it jumps where a gradient changes its sign: see `test_jumps`
        jumps = ravel_pytree((h, *jax.tree.map(lambda x: (x == 0).astype(float), (params, grads))))[0]
        by_difference = np.where((np.arange(x.size) >= len(h)) & (np.asarray(jumps) == 1), reverse, by_difference)
    alike(unravel(forward), unravel(reverse), max(cases.DERIVATIVES["modes"], 10 * stored))
    close = np.abs(by_difference - reverse) <= slack
    alike(unravel(reverse), unravel(jnp.where(close, reverse, by_difference)), cases.DERIVATIVES["differences"])


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.id in BASES], ids=lambda c: c.id)
def test_bases(case, x64):
    """Of the numbers that the bases do not depend on, as by differences: the gradients are given."""
    rng = np.random.default_rng(0)
    grads = [
        {"a": jnp.asarray(rng.standard_normal((4, 3))), "b": jnp.asarray(rng.standard_normal(3))} for _ in range(8)
    ]

    def loss(h):
        tx = case.jopt(**h)
        params = jax.tree.map(jnp.ones_like, grads[0])
        state = tx.init(params)
        for g in grads:
            params, state = tx.step(g, state, params)
        return sum(jnp.sum(jnp.sin(x)) for x in params.values())

    h = {"lr": jnp.asarray(0.02), "weight_decay": jnp.asarray(0.1)}
    found, loss = jax.jit(jax.grad(loss))(h), jax.jit(loss)
    for name, x in h.items():
        width = 1e-5
        by_difference = (loss(h | {name: x + width}) - loss(h | {name: x - width})) / (2 * width)
        assert abs(found[name] - by_difference) <= cases.DERIVATIVES["differences"] * abs(by_difference), name


def test_jumps(x64):
    """Rprop's step is the gradient's sign times a step size: piecewise constant. Its derivative is 0 as torch's is, at
    0 too, where the step jumps and has none."""
    case = next(c for c in cases.CASES if c.id == "rprop")
    params, grads = start(case)
    tx = case.jopt()
    of_params, of_grads = jax.jit(jax.grad(lambda p, g: final(tx, p, g), argnums=(0, 1)))(params, grads)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(of_grads))
    np.testing.assert_allclose(of_params["minimum"], 0.3)  # it stays 0, under a loss of p^2 + 0.3 p


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.id, marks=[] if c.id == "momentum-scaled" else pytest.mark.slow)
        for c in cases.CASES
        if c.scope == "element"
    ],
)
def test_packed_eager_and_traced_numbers(case, x64):
    """The same from a packed buffer, without jit, and from numbers in the state."""
    tx = case.jopt(**arguments(case))
    params, grads = start(case)
    del params["frozen"]
    h = numbers(tx)

    def steps(tx, params, grads, pack, state=lambda s: s):
        params, s = pack(params), state(tx.init(pack(params)))
        for k in range(3):
            params, s = tx.step(pack({name: g[k] for name, g in grads.items()}), s, params)
        params = params if isinstance(params, dict) else jopt.unpack(params)
        return sum(jnp.sum(x**2 + 0.3 * x) for x in jax.tree.leaves(params))

    def of(pack, state=None):
        def loss(h, params, grads):
            if state is None:
                return steps(made(tx, h), params, grads, pack)
            fixed = made(tx, dict(tx.hyperparameters), hyperparams_in_state=True)
            return steps(fixed, params, grads, pack, lambda s: s._replace(hyperparams=h))

        return jax.grad(loss, argnums=(0, 1, 2))

    expected = jax.jit(of(lambda x: x), compiler_options=QUICK)(h, params, grads)
    tolerance = max(cases.DERIVATIVES["modes"], 10 * cases.STORED.get(case.name, 0))
    alike(jax.jit(of(jopt.pack), compiler_options=QUICK)(h, params, grads), expected, tolerance)
    if case.id in ("adam", "momentum-scaled", "adamax"):
        alike(of(lambda x: x)(h, params, grads), expected, tolerance)
    found = jax.jit(of(lambda x: x, state=True), compiler_options=QUICK)(h, params, grads)
    # What the state starts from, a first rate or accumulator, is made by `init` of the numbers that were given.
    for name in {"asgd": ["lr", "lambd"], "rprop": ["lr"], "adagrad": ["initial_accumulator_value"]}.get(case.name, []):
        del found[0][name], expected[0][name]
    alike(found, expected, tolerance)


TORCH = {  # torch's class: the numbers that it takes as tensors which autograd goes through
    "SGD": ("lr", "weight_decay"),  # without momentum: torch detaches the buffer's first gradient
    "Adam": ("lr", "betas", "eps", "weight_decay"),
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
    "NAdam": ("eps",),
    "RAdam": ("lr", "eps"),
    "RMSprop": ("eps", "momentum"),
    "Adagrad": ("eps",),
    "Adadelta": ("eps",),
    "ASGD": (),  # lambd in the decay, not in eta, which torch makes a number
}
NAN_AT_0 = {"Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"}  # torch's root, infinite times 0
NUMBERS = {
    "lr": 0.02,
    "betas": (0.9, 0.99),
    "alpha": 0.9,
    "rho": 0.9,
    "eps": 0.1,
    "momentum": 0.9,
    "dampening": 0.1,
    "momentum_decay": 0.3,
    "weight_decay": 0.1,
}


def torch_derivatives(name, given, wanted, grads):
    torch = pytest.importorskip("torch", reason="torch is the truth")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # else torch's own step count makes the bias corrections float32
    try:
        start, grads = (torch.tensor(x, requires_grad=True) for x in (np.array([0.5, 0.7, 0.3]), grads))
        tensors = {
            k: torch.tensor(x, requires_grad=True) for k, x in members(given).items() if k.split("/")[0] in wanted
        }
        params = start.clone()
        arguments = grouped(members(given) | tensors)
        optimizer = getattr(torch.optim, name)([params], **arguments, differentiable=True)
        for g in grads:
            params.grad = g * torch.cos(params.clone())
            optimizer.step()
        loss = (params**2 + 0.3 * params).sum()
        found = torch.autograd.grad(loss, [start, grads, *tensors.values()])
    finally:
        torch.set_default_dtype(before)
    found = [x.numpy() for x in found]
    return found[0], found[1], dict(zip(tensors, found[2:], strict=True))


def members(given):
    flat = {}
    for name, x in given.items():
        flat |= {f"{name}/{i}": y for i, y in enumerate(x)} if isinstance(x, tuple) else {name: x}
    return flat


def grouped(flat):
    given = {}
    for name, x in flat.items():
        outer = name.split("/")[0]
        given[outer] = (*given.get(outer, ()), x) if "/" in name else x
    return given


@pytest.mark.parametrize("name", TORCH)
def test_torchs_differentiable(name, x64):
    """Equal where no gradient is 0. Where one is, torch's derivative is nan after a root, jopt's is torch's limit."""
    make = getattr(jopt, name.lower())
    takes = make().hyperparameters.keys() | {"betas" if "beta1" in make().hyperparameters else "lr"}
    given = {k: x for k, x in NUMBERS.items() if k in takes and not (name == "SGD" and k in ("momentum", "dampening"))}
    grads = np.random.default_rng(0).uniform(0.3, 0.9, (STEPS, 3))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def derivatives(start, grads, h):
        def loss(start, grads, h):
            tx = make(**grouped(h))

            def body(carry, g):
                params, state = carry
                return tx.step(g * jnp.cos(params), state, params), None

            (params, _), _ = jax.lax.scan(body, (start, tx.init(start)), grads)
            return jnp.sum(params**2 + 0.3 * params)

        return jax.grad(loss, argnums=(0, 1, 2))(start, grads, h)

    def found(grads, given):
        h = {k: jnp.asarray(x, float) for k, x in members(given).items()}
        start, grads, h = derivatives(jnp.array([0.5, 0.7, 0.3]), jnp.asarray(grads), h)
        return start, grads, {k: x for k, x in h.items() if k.split("/")[0] in TORCH[name]}

    rounded = cases.STORED.get(name.lower(), 0)
    alike(found(grads, given), torch_derivatives(name, given, TORCH[name], grads), cases.DERIVATIVES["torch"] + rounded)
    given["weight_decay"] = 0.0
    zero, tiny = grads.copy(), grads.copy()
    zero[:, 0], tiny[:, 0] = 0, 1e-9
    # 0 is no tensor that torch could take: weight decay is left out
    wanted = tuple(k for k in TORCH[name] if k != "weight_decay")
    at_zero = torch_derivatives(name, given, wanted, zero)
    finite = all(np.isfinite(x).all() for x in (at_zero[0], at_zero[1]))
    assert finite == (name not in NAN_AT_0)
    start, of_grads, h = found(zero, given)
    h.pop("weight_decay", None)
    alike((start, of_grads, h), torch_derivatives(name, given, wanted, tiny), cases.DERIVATIVES["limit"], slack=1e-7)


@pytest.mark.parametrize("name", ["Adamax", "Rprop"])
def test_torch_does_not_go_through(name):
    """Of these torch has `differentiable=True`, and a backward that fails after several steps: no truth to compare."""
    pytest.importorskip("torch", reason="torch is the truth")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch_derivatives(name, {"lr": 0.02}, (), np.full((3, 3), 0.5))


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "adamax", "adagrad", "rmsprop"])
def test_a_tiny_eps_in_float32(name):
    """Its square is 0 in float32, and so would be what JAX divides by in a quotient's derivative."""
    make = getattr(jopt, name)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.grad, argnums=(0, 1))
    def derivatives(lr, eps):
        tx = make(lr=lr, eps=eps)
        params = jnp.array([0.5, 0.7])
        state = tx.init(params)
        for _ in range(2):
            params, state = tx.step(jnp.array([0.0, 1.0]), state, params)
        return jnp.sum(params)

    lr, eps = derivatives(jnp.float32(0.01), jnp.float32(1e-30))
    assert np.isfinite(lr)
    assert np.isfinite(eps)
    assert float(lr) == pytest.approx(float(derivatives(jnp.float32(0.01), jnp.float32(1e-8))[0]), rel=1e-5)


def test_an_eps_of_0_beside_what_is_not_used():
    """RAdam divides by no root in its first steps; the quotient that is not used, 0 / 0, is in no derivative."""

    def loss(lr):
        tx = jopt.radam(lr=lr, eps=0)
        params = jnp.array([0.5, 0.7])
        return jnp.sum(tx.step(jnp.array([0.0, 1.0]), tx.init(params), params)[0])

    assert float(jax.grad(loss)(0.01)) == pytest.approx(-1)


def test_a_root_of_0_beside_a_moment(x64):
    """With a beta2 of 0, v is g^2, and 0 where m is not. There m / (|g| + eps) has no derivative in g but two, whose
    mean jopt takes; in beta2 it is infinite, which jopt leaves out."""

    def loss(g, beta2):
        tx = jopt.adam(lr=0.1, betas=(0.9, beta2), eps=0.1)
        params, state = tx.step(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))
        return jnp.sum(tx.step(g[None], state, params)[0])

    found = jax.grad(loss, argnums=(0, 1))(jnp.float64(0), jnp.float64(0))
    sides = [(loss(jnp.float64(h), jnp.float64(0)) - loss(jnp.float64(0), jnp.float64(0))) / h for h in (1e-7, -1e-7)]
    assert sides[0] - sides[1] > 1
    assert float(found[0]) == pytest.approx(float(sum(sides)) / 2, rel=1e-5)
    assert np.isfinite(found[1])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 0.5, float("inf")])
def test_norms_of_zeros(p, x64):
    """The norm of zeros has no derivative, and is taken to have 0, as torch's does; then nothing is clipped."""

    def loss(max_norm, lr, g):
        tx = jopt.chain(jopt.clip_grad_norm(max_norm, p), jopt.sgd(lr=lr))
        params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        return sum(jnp.sum(x) for x in tx.step(g, tx.init(params), params)[0].values())

    zeros = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    of_norm, of_lr, of_grads = jax.grad(loss, argnums=(0, 1, 2))(jnp.float64(1), jnp.float64(0.1), zeros)
    assert of_norm == 0
    assert of_lr == 0
    alike(of_grads, jax.tree.map(lambda g: jnp.full_like(g, -0.1), zeros), 1e-12)
    # A leaf of zeros beside one that is clipped.
    some = zeros | {"b": jnp.array([3.0, -4.0, 0.0])}
    of_norm, of_lr, of_grads = jax.grad(loss, argnums=(0, 1, 2))(jnp.float64(1), jnp.float64(0.1), some)
    h = 1e-6
    expected = (loss(1 + h, 0.1, some) - loss(1 - h, 0.1, some)) / (2 * h)
    assert float(of_norm) == pytest.approx(float(expected), rel=1e-6)
    assert all(np.isfinite(x).all() for x in (of_lr, *of_grads.values()))


def test_sparse_rows(x64):
    """SparseAdam: a row whose entries are 0, one given twice, one not at all."""
    from jax.experimental.sparse import BCOO

    indices = jnp.array([[0], [2], [2]])
    params = jnp.linspace(0.4, 0.9, 8).reshape(4, 2)
    data = jnp.array([[0.0, 0.0], [0.5, 0.3], [0.1, 0.0]])

    def loss(x):
        (lr, beta1, beta2, eps), params, data = unravel(x)
        tx = jopt.sparse_adam(lr=lr, betas=(beta1, beta2), eps=eps)
        state = tx.init(params)
        for k in range(3):
            params, state = tx.step(BCOO((data * (k + 1), indices), shape=params.shape), state, params)
        return sum(jnp.sum(x**2 + 0.3 * x) for x in jax.tree.leaves((params, state.slots)))

    x, unravel = ravel_pytree(([jnp.array(h) for h in (0.02, 0.9, 0.99, 0.1)], params, data))
    i, shift, weight = stencil(x, 4)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def compute(x):
        losses = jax.lax.map(lambda at: loss(x.at[at[0]].add(at[1])), (i, shift))
        return jax.grad(loss)(x), jax.jacfwd(loss)(x), losses

    reverse, forward, losses = compute(x)
    alike(unravel(forward), unravel(reverse), cases.DERIVATIVES["modes"])
    alike(unravel(reverse), unravel(jnp.asarray(np.bincount(i, weight * losses))), cases.DERIVATIVES["differences"])


@pytest.mark.slow
@cases.parametrize([c for c in cases.CASES if c.matrices])
def test_muon(case, x64, monkeypatch):
    """Its iteration is rounded to bfloat16, piecewise constant; the derivative is that of what is rounded: the same
    iteration in float64, whose derivative is compared with differences."""
    # Not next to nothing, as in `arguments`: the rows of what is near 0 have a derivative that differences show.
    monkeypatch.setattr(NorMuon, "constants", NorMuon.constants | {"eps": 1.0, "tiny": 1.0})
    tx = case.jopt(**arguments(case))
    params, grads = start(case)
    h = numbers(tx)
    x, unravel = ravel_pytree((h, params, grads))

    def loss(x):
        h, params, grads = unravel(x)
        return final(made(tx, h), params, grads)

    derivatives = jax.jit(lambda x: (jax.grad(loss)(x), jax.jacfwd(loss)(x)), compiler_options=QUICK)
    reverse, forward = derivatives(x)
    assert np.isfinite(reverse).all()

    def together(x):
        return [ravel_pytree(part)[0] for part in unravel(x)]  # eps has next to no influence beside lr

    alike(together(forward), together(reverse), cases.DERIVATIVES["muon"])

    monkeypatch.setattr(jnp, "bfloat16", jnp.float64)
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    jax.clear_caches()
    i, shift, weight = stencil(x, len(h), 1e-4)

    def exact(x):
        losses = jax.lax.map(lambda at: loss(x.at[at[0]].add(at[1])), (i, shift))
        return jax.grad(loss)(x), losses

    smooth, losses = jax.jit(exact, compiler_options=QUICK)(x)
    jax.clear_caches()
    alike(unravel(smooth), unravel(jnp.asarray(np.bincount(i, weight * losses))), cases.DERIVATIVES["differences"])
    alike(together(reverse), together(smooth), cases.DERIVATIVES["muon"])
