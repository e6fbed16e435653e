"""jax.grad through several steps, with respect to initial parameters and every hyperparameter.

The truth are differences of fourth order of torch's own forward, in float64, and torch's `differentiable=True`.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.transform import transform
from tests import cases

torch = pytest.importorskip("torch", reason="torch is the truth")

START = np.array([1.0, -0.5, 0.3, 0.8])
STEPS = 7
# Muon's iteration is rounded to bfloat16: piecewise constant, without differences to compare with.
SMOOTH = [case for case in cases.TORCH_CASES if not case.matrices]


def arguments(case):
    """The case's, with an eps that can be differentiated by, and Adafactor's d off its limit."""
    takes = inspect.signature(getattr(torch.optim, case.torch)).parameters
    eps = {"eps": (1e-2, 1e-2) if case.name == "adafactor" else 1e-2} if "eps" in takes else {}
    d = {"d": 1.5} if "d" in takes else {}
    return {"lr": case.lr} | case.arguments | eps | d


def torch_final(case, start, given):
    p = torch.tensor(start, requires_grad=True)
    optimizer = getattr(torch.optim, case.torch)([p], **given)
    for _ in range(STEPS):
        p.grad = torch.sin(p.detach()) + 0.2
        optimizer.step()
    return float((p.detach() ** 2).sum())


def jax_final(tx, start):
    def body(carry, _):
        params, state = carry
        return tx.step(jnp.sin(params) + 0.2, state, params), None

    (params, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=STEPS)
    return jnp.sum(params**2)


def derivative(f, x, h):
    return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)


@cases.parametrize(SMOOTH, fast=cases.FEW)
def test_with_respect_to_the_start(case, x64):
    given = arguments(case)
    tx = case.jopt(**given)
    found = jax.jit(jax.grad(lambda start: jax_final(tx, start)))(jnp.asarray(START))
    for i in range(len(START)):

        def final(x, i=i):
            return torch_final(case, np.where(np.arange(4) == i, x, START), given)

        assert float(found[i]) == pytest.approx(derivative(final, START[i], 1e-3), rel=1e-6, abs=1e-8)


@cases.parametrize(SMOOTH, fast=cases.FEW)
def test_with_respect_to_every_hyperparameter(case, x64):
    given = arguments(case)
    tx = case.jopt(**given)
    rule = type(tx.rule)
    numbers = {name: float(x) for name, x in tx.hyperparameters.items() if x}
    of_tuple = {member: (name, i) for name, members in rule.tuples.items() for i, member in enumerate(members)}

    def put(name, x):
        """torch's arguments with one number exchanged."""
        if name not in of_tuple:
            return given | {name: x}
        outer, i = of_tuple[name]
        values = list(given.get(outer) or inspect.signature(getattr(torch.optim, case.torch)).parameters[outer].default)
        values[i] = x
        return given | {outer: tuple(values)}

    flags = {k: v for k, v in vars(tx.rule).items() if k not in rule.hyperparameters}

    def loss(h):
        h = dict(tx.hyperparameters) | h
        grouped = {name: tuple(h.get(m) for m in members) for name, members in rule.tuples.items()}
        return jax_final(transform(rule, h | grouped | flags), jnp.asarray(START))

    found = jax.jit(jax.grad(loss))({name: jnp.float64(x) for name, x in numbers.items()})
    for name, x in numbers.items():
        if name == "t0":
            continue  # a threshold
        h = 2e-3 * (min(x, 1 - x) if 0 < x < 1 else abs(x))
        expected = derivative(lambda x, name=name: torch_final(case, START, put(name, x)), x, h)
        slack = cases.STORED.get(case.name, 0) / h
        assert float(found[name]) == pytest.approx(expected, rel=1e-5, abs=1e-8 + slack), name


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_hypergradients_are_torchs(name, x64):
    """Of lr, betas and the start at once, by torch's autograd: those classes take tensors with differentiable=True."""
    torch.set_default_dtype(torch.float64)  # else torch's own step count makes the bias corrections float32
    try:
        start = torch.tensor(START, requires_grad=True)
        lr, *betas = (torch.tensor(x, requires_grad=True) for x in (0.05, 0.8, 0.95))
        given = {} if name == "SGD" else {"betas": tuple(betas)}
        p = start.clone()
        optimizer = getattr(torch.optim, name)([p], lr=lr, **given, differentiable=True)
        for _ in range(STEPS):
            p.grad = torch.sin(p.clone()) + 0.2
            optimizer.step()
        wanted = (start, lr, *(betas if given else ()))
        expected = [x.numpy() for x in torch.autograd.grad((p**2).sum(), wanted)]
    finally:
        torch.set_default_dtype(torch.float32)
    case = next(c for c in cases.TORCH_CASES if c.torch == name)

    def final(start, lr, *betas):
        return jax_final(case.jopt(lr=lr, **({"betas": betas} if betas else {})), start)

    at = (START, 0.05, 0.8, 0.95)[: len(wanted)]
    found = jax.grad(final, argnums=tuple(range(len(at))))(*map(jnp.asarray, at))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
