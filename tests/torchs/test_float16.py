"""float16, where eps and the squares of small gradients are 0: torch's nan and infinities, and what avoids them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="what it is compared with")

import jax.numpy as jnp  # noqa: E402

import jopt  # noqa: E402
from interop import optim  # noqa: E402

GRADIENT = np.array([0, 1e-4, 1, -1e-4], np.float16)
# What docs/optimizers/README.md says of each after a step: nan at the zero, infinities at the small gradients.
INFINITE = ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"]
NAN = ["Adamax"]
FINITE = ["SGD", "Rprop", "ASGD", "Adadelta", "Adafactor"]


def in_torch(module, name, steps, **options):
    p = torch.nn.Parameter(torch.ones(len(GRADIENT), dtype=torch.float16))
    p.grad = torch.tensor(GRADIENT)
    optimizer = getattr(module, name)([p], **options)
    for _ in range(steps):
        optimizer.step()
    return p.detach().numpy()


def in_jax(name, steps, **options):
    tx = getattr(jopt, name.lower())(**options)
    params = jnp.ones(len(GRADIENT), jnp.float16)
    state = tx.init(params)
    for _ in range(steps):
        params, state = tx.step(jnp.array(GRADIENT), state, params)
    return np.asarray(params)


@pytest.mark.parametrize("name", [*INFINITE, "RAdam", *NAN, *FINITE])
def test_nan_and_infinities_are_torchs(name):
    steps = 6 if name == "RAdam" else 1  # which divides by the root of the moment from its sixth step on
    theirs = in_torch(torch.optim, name, steps, foreach=False)
    np.testing.assert_array_equal(in_torch(optim, name, steps), theirs)
    np.testing.assert_array_equal(in_jax(name, steps), theirs)
    assert np.isnan(theirs).tolist() == [name not in FINITE, False, False, False]
    assert np.isinf(theirs).tolist() == [False, name in [*INFINITE, "RAdam"], False, name in [*INFINITE, "RAdam"]]


@pytest.mark.parametrize("name", [*INFINITE, "RAdam", *NAN])
def test_remedies(name):
    for options in ({"eps": 1e-4}, {"state_dtype": jnp.float32}, {"master_copy": True}):
        found = in_jax(name, 6, **options)
        assert np.isfinite(found).all(), options
        assert found[0] == 1
        assert found[2] < 1
    np.testing.assert_array_equal(in_torch(optim, name, 6, eps=1e-4), in_torch(torch.optim, name, 6, eps=1e-4))
    assert np.isfinite(in_torch(optim, name, 6, eps=1e-4)).all()
