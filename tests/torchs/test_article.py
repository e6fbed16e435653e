"""An article that introduces PyTorch's optimizers: its formulas, and its programs.

Formulas 4.1 to 4.4 stand here in NumPy, as printed. Programs 5.1 to 5.4 are run as printed, without their comments, but
for the import; 5.3 and 5.4 also but for the line that reads the state, by a name that no torch has.
docs/optimizers/README.md says what is called otherwise in torch, docs/choosing.md what came of the article's advice.
"""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the programs are torch's")

import jax.numpy as jnp  # noqa: E402

import jopt  # noqa: E402
from interop import optim  # noqa: E402
from tests.cases import TOLERANCES, difference  # noqa: E402

# --- formulas

BETA, BETA2, EPS, STEPS = 0.9, 0.99, 1e-8, 50
START = np.array([1.0, -2.0, 3.0])


def gradient(theta, step):
    """Of |theta|^2 + theta . x, where x is the sample of the step."""
    return 2 * theta + np.random.default_rng(step).standard_normal(3)


def full(theta, step):
    """Of the mean over all samples: the same in each step."""
    return 2 * theta + 0.5


def gradient_descent(theta, g, memory, eta):
    """4.1, and with the gradient of a sample 4.2."""
    return theta - eta * g


def momentum(theta, g, memory, eta):
    """4.3, whose v is that of 4.4."""
    memory["m"] = BETA * memory.get("m", 0) + (1 - BETA) * g
    memory["v"] = BETA2 * memory.get("v", 0) + (1 - BETA2) * g**2
    return theta - eta * memory["m"] / (np.sqrt(memory["v"]) + EPS)


def rmsprop(theta, g, memory, eta):
    """4.4."""
    memory["v"] = BETA2 * memory.get("v", 0) + (1 - BETA2) * g**2
    return theta - eta * g / (np.sqrt(memory["v"]) + EPS)


def average(theta, g, memory, eta):
    """4.3 without its root, as momentum is usually averaged."""
    memory["m"] = BETA * memory.get("m", 0) + (1 - BETA) * g
    return theta - eta * memory["m"]


def by_formula(formula, gradients, eta):
    theta, memory = START, {}
    for step in range(STEPS):
        theta = formula(theta, gradients(theta, step), memory, eta)
    return theta


def by_jopt(tx, gradients):
    theta = jnp.array(START)
    state = tx.init(theta)
    for step in range(STEPS):
        theta, state = tx.step(jnp.array(gradients(np.asarray(theta), step)), state, theta)
    return theta


def by_torch(module, name, gradients, **options):
    theta = torch.tensor(START, requires_grad=True)
    optimizer = getattr(module, name)([theta], **options)
    for step in range(STEPS):
        theta.grad = torch.tensor(gradients(theta.detach().numpy(), step))
        optimizer.step()
    return theta.detach().numpy()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("formula", "gradients", "tx", "name", "options"),
    [
        (gradient_descent, full, lambda: jopt.gradient_descent(0.1), "SGD", dict(lr=0.1)),
        (gradient_descent, gradient, lambda: jopt.gradient_descent(0.1), "SGD", dict(lr=0.1)),
        (
            rmsprop,
            full,
            lambda: jopt.rmsprop(0.01, alpha=BETA2, eps=EPS),
            "RMSprop",
            dict(lr=0.01, alpha=BETA2, eps=EPS),
        ),
        # torch adds gradients up where the average weighs them with 1 - beta: so does its learning rate.
        (average, full, lambda: jopt.momentum(0.1, BETA), "SGD", dict(lr=0.1 * (1 - BETA), momentum=BETA)),
    ],
    ids=["4.1", "4.2", "4.4", "4.3 without its root"],
)
def test_formulas_that_torch_has(formula, gradients, tx, name, options):
    expected = by_formula(formula, gradients, 0.01 if formula is rmsprop else 0.1)
    assert difference(by_jopt(tx(), gradients), expected) <= TOLERANCES["float64"]
    for module in (torch.optim, optim):
        assert difference(by_torch(module, name, gradients, **options), expected) <= TOLERANCES["float64"]


@pytest.mark.usefixtures("x64")
def test_momentum_as_printed_is_not_torchs():
    """It divides by a root, as Adam does. torch's adds gradients up, and divides by nothing."""
    expected = by_formula(momentum, full, 0.01)
    assert difference(by_jopt(jopt.momentum(0.01, BETA, beta2=BETA2, eps=EPS), full), expected) <= TOLERANCES["float64"]

    def torchs(theta, g, memory, eta):
        memory["b"] = BETA * memory.get("b", 0) + g
        return theta - eta * memory["b"]

    summed = by_formula(torchs, full, 0.01)
    for module in (torch.optim, optim):
        found = by_torch(module, "SGD", full, lr=0.01, momentum=BETA)
        assert difference(found, summed) <= TOLERANCES["float64"]
        assert difference(found, expected) > 0.1


# --- programs

IMPORTS = """
import torch
import torch.optim as optim
"""
GRADIENT_DESCENT = (
    IMPORTS
    + """
theta = torch.tensor([1.0], requires_grad=True)
optimizer = optim.SGD(params=[theta], lr=0.01)
for i in range(1000):
    loss = (theta - 2) ** 2
    loss.backward()
    optimizer.step()
"""
)
STOCHASTIC = (
    IMPORTS
    + """
theta = torch.tensor([1.0], requires_grad=True)
optimizer = optim.SGD(params=[theta], lr=0.01)
for i in range(1000):
    x = torch.randn(1)
    loss = (theta - 2 * x) ** 2
    loss.backward()
    optimizer.step()
"""
)
MOMENTUM = (
    IMPORTS
    + """
theta = torch.tensor([1.0], requires_grad=True)
optimizer = optim.SGD(params=[theta], lr=0.01, momentum=0.9)
for i in range(1000):
    loss = (theta - 2) ** 2
    loss.backward()
    m = optimizer.momentum
    optimizer.step()
"""
)
RMSPROP = (
    IMPORTS
    + """
theta = torch.tensor([1.0], requires_grad=True)
optimizer = optim.RMSprop(params=[theta], lr=0.01, alpha=0.9, eps=1e-8)
for i in range(1000):
    loss = (theta - 2) ** 2
    loss.backward()
    v = optimizer.state[theta]['v']
    optimizer.step()
"""
)
CORRECTED = {
    "optimizer.momentum": "optimizer.state[theta].get('momentum_buffer')",
    "optimizer.state[theta]['v']": "optimizer.state[theta].get('square_avg')",
}


def run(program, module, steps=1000, zero_grad=False):
    """The names that a program leaves, with the module's classes for torch.optim's."""
    program = program.replace("import torch.optim as optim", f"from {module} import optim")
    program = program.replace("range(1000)", f"range({steps})")
    for printed, corrected in CORRECTED.items():
        program = program.replace(printed, corrected)
    if zero_grad:
        program = program.replace("    loss.backward()", "    optimizer.zero_grad()\n    loss.backward()")
    torch.manual_seed(0)
    names = {}
    exec(program, names)
    assert type(names["optimizer"]).__module__.startswith("torch" if module == "torch" else "interop")
    return names


PROGRAMS = {"5.1": GRADIENT_DESCENT, "5.2": STOCHASTIC, "5.3": MOMENTUM, "5.4": RMSPROP}


@pytest.mark.parametrize("zero_grad", [False, True], ids=["as printed", "with zero_grad"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_one_import_changed(name, zero_grad):
    theirs, ours = (run(PROGRAMS[name], module, zero_grad=zero_grad) for module in ("torch", "interop"))
    if name == "5.3" and not zero_grad:
        assert theirs["theta"].isnan()
        assert ours["theta"].isnan()
        theirs, ours = (run(PROGRAMS[name], module, steps=100) for module in ("torch", "interop"))
    for found in ("theta", "m", "v"):
        if found in theirs:
            a, b = (names[found].detach().numpy() for names in (ours, theirs))
            assert np.isfinite(b).all()
            # theta begins at 1, and without zero_grad swings on: its ulp is that of such values, wherever it ends.
            assert difference(np.append(a, 1), np.append(b, 1)) <= TOLERANCES["float32"]


@pytest.mark.parametrize(("program", "error"), [(MOMENTUM, AttributeError), (RMSPROP, KeyError)])
@pytest.mark.parametrize("module", ["torch", "interop"])
def test_the_two_lines_that_no_torch_runs(program, error, module):
    program = program.replace("import torch.optim as optim", f"from {module} import optim")
    with pytest.raises(error, match=r"momentum|v"):
        exec(program, {})


def test_without_zero_grad_gradients_add_up():
    """None of the programs calls it. A sum is a momentum that never fades: theta swings about 2."""
    theta, total, largest = 1.0, 0.0, 0.0
    for _ in range(1000):
        total += 2 * (theta - 2)
        theta -= 0.01 * total
        largest = max(largest, abs(theta - 2))
    assert largest == pytest.approx(1, abs=0.01)  # where it began
    assert run(GRADIENT_DESCENT, "interop")["theta"].item() == pytest.approx(theta, rel=TOLERANCES["float32"])
    for program in (GRADIENT_DESCENT, MOMENTUM, RMSPROP):
        assert run(program, "interop", zero_grad=True)["theta"].item() == pytest.approx(2, abs=0.01)
    # The samples' own optimum is 0; noise of 2 x moves theta by 0.2 about it.
    assert math.fabs(run(STOCHASTIC, "interop", zero_grad=True)["theta"].item()) < 0.6
