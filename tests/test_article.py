"""Gradient descent, momentum, RMSprop and Adam as a textbook prints them, and the loops that go with them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loops are torch's")

import jax.numpy as jnp  # noqa: E402
from torch import nn  # noqa: E402

import jopt  # noqa: E402
from interop import optim  # noqa: E402

# --- formulas 4.1 to 4.4 in plain NumPy, float32 at the end


def minimize(update, steps=50):
    theta, memory = np.array([1.0, -2.0, 3.0]), {}
    for t in range(1, steps + 1):
        theta = update(theta, 2 * theta + 0.5, t, memory)
    return theta


def run(tx, steps=50):
    params = jnp.array([1.0, -2.0, 3.0])
    state = tx.init(params)
    for _ in range(steps):
        params, state = tx.step(2 * params + 0.5, state, params)
    return params


def gradient_descent(theta, g, t, memory):
    return theta - 0.1 * g


def momentum(theta, g, t, memory):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    return theta - 0.1 * memory["m"]


def scaled_momentum(theta, g, t, memory):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * g**2
    return theta - 0.01 * memory["m"] / (np.sqrt(memory["v"]) + 1e-8)


def rmsprop(theta, g, t, memory):
    memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * g**2
    return theta - 0.01 * g / (np.sqrt(memory["v"]) + 1e-8)


def adam(theta, g, t, memory):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
    return theta - 0.01 * m / (np.sqrt(v) + 1e-8)


@pytest.mark.parametrize(
    ("tx", "formula"),
    [
        (jopt.gradient_descent(0.1), gradient_descent),
        (jopt.momentum(0.1), momentum),
        (jopt.momentum(0.01, beta2=0.99), scaled_momentum),
        (jopt.rmsprop(0.01), rmsprop),
        (jopt.adam(0.01), adam),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_formulas(tx, formula):
    np.testing.assert_allclose(run(tx), minimize(formula), rtol=2e-5, atol=2e-6)


# --- the loops, as written for torch.optim, with the optimizer's module as the only change


def line():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 64).unsqueeze(1)
    return x, 3 * x + 0.5


def loop_sgd(optim):
    """5.1: linear regression by gradient descent."""
    x, y = line()
    model = nn.Linear(1, 1)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    return model, loss


def loop_optimizers(optim):
    """5.2: a small network by momentum, RMSprop, then Adam."""
    x, y = line()
    model = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
    criterion = nn.MSELoss()
    for optimizer in (
        optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        optim.RMSprop(model.parameters(), lr=0.001),
        optim.Adam(model.parameters(), lr=0.01),
    ):
        for _ in range(50):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    return model, loss


def loop_data(optim):
    """5.3: batches from a DataLoader."""
    x, y = line()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    model = nn.Linear(1, 1)
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
    return model, loss


def loop_device(optim):
    """5.4: the model on the device there is, in parallel where there are several."""
    x, y = line()
    device = torch.device("cpu")
    model = nn.DataParallel(nn.Linear(1, 1)).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
    return model, loss


@pytest.mark.parametrize("loop", [loop_sgd, loop_optimizers, loop_data, loop_device], ids=lambda f: f.__name__)
def test_loops_with_one_import_changed(loop):
    results = []
    for module in (torch.optim, optim):
        torch.manual_seed(1)
        results.append(loop(module))
    (theirs, their_loss), (ours, our_loss) = results
    assert our_loss.item() < 0.05
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-3, abs=1e-9)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4)
