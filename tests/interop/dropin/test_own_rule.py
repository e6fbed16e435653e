"""A rule of a user's own, by public names alone."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import jax  # noqa: E402

from interop import optim  # noqa: E402
from jopt import numerics as t  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from jopt.rule import Rule, at_least_zero  # noqa: E402
from jopt.transform import optimizer, transform  # noqa: E402
from tests import cases  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Signum(Rule):
    """Momentum's sign, with a step that falls with the root of the count."""

    ascent: bool

    hyperparameters = ("lr", "beta")
    limits = {"lr": at_least_zero("Invalid learning rate: {}")}

    def init(self, h, param):
        return {"momentum": t.zeros_like(param)}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        return {"-lr": -h["lr"] / xp.sqrt(step), "beta": h["beta"], "1-beta": 1 - h["beta"]}, {"step": step}

    def update(self, c, grad, state, param):
        grad = -grad if self.ascent else grad
        momentum = t.add(t.mul(state["momentum"], c["beta"]), grad, alpha=c["1-beta"])
        return t.add(param, t.sign(momentum), alpha=c["-lr"]), {"momentum": momentum}


@optimizer
def signum(lr, beta=0.9, ascent=False, **options):
    return transform(Signum, dict(lr=lr, beta=beta, ascent=ascent), **options)


class SignumOptimizer(optim.Constructed):
    rule, function = Signum, staticmethod(signum)


def loop(x, grads, lr, beta=0.9):
    """In NumPy."""
    momentum = np.zeros_like(x)
    for step, g in enumerate(grads, 1):
        momentum = beta * momentum + (1 - beta) * g
        x = x - lr / np.sqrt(step) * np.sign(momentum)
    return x, momentum


@pytest.mark.parametrize("n", [7, 2_000_000], ids=["torch's operations", "a program"])
@pytest.mark.parametrize("ascent", [False, True])
def test_both_frameworks_step_it(n, ascent):
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(n), rng.standard_normal((6, n))
    expected = loop(start, -grads if ascent else grads, 0.1)
    p = torch.nn.Parameter(torch.from_numpy(start.copy()))
    opt = SignumOptimizer([p], lr=0.1, ascent=ascent)
    for i, g in enumerate(grads):
        if i == 3:  # a checkpoint goes on
            saved = opt.state_dict()
            opt = SignumOptimizer([p], lr=9.0, ascent=ascent)
            opt.load_state_dict(saved)
        p.grad = torch.from_numpy(g)
        opt.step()
    assert opt.state[p]["step"] == len(grads)
    for found, wanted in zip((p, opt.state[p]["momentum"]), expected, strict=True):
        assert cases.difference(found.detach(), torch.from_numpy(wanted)) <= cases.FRONT_ENDS["float64"]
    with enable_x64(True):
        tx = signum(lr=0.1, ascent=ascent)
        params = jax.numpy.asarray(start)
        state, step = tx.init(params), jax.jit(tx.step)
        for g in grads:
            params, state = step(jax.numpy.asarray(g), state, params)
        np.testing.assert_allclose(params, expected[0], rtol=1e-13, atol=1e-13)


def test_its_arguments_are_the_functions():
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        SignumOptimizer([p], lr=-1.0)
    with pytest.raises(TypeError, match="SignumOptimizer: missing a required argument: 'lr'"):
        SignumOptimizer([p])
    with pytest.raises(TypeError, match="signum: learning_rate is optax's name; torch's is lr"):
        signum(learning_rate=0.1)
