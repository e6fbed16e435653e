"""Steps that torch's operations take in a program's place: when, and to which bit."""

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import interop  # noqa: E402
from interop import optim  # noqa: E402
from tests import cases  # noqa: E402

# torch divides by a number where these rules multiply by its reciprocal, which is a digit's difference at most.
DIVIDING = ("Adam", "AdamW", "NAdam", "RAdam")
CASES = [case for case in cases.TORCH_CASES if case.torch not in ("LBFGS", "SparseAdam")]
# The gradient becomes state; the average is the parameter until it begins, which torch copies too.
COPIES = {"Rprop": 1, "ASGD": 1}
SIZES = ((64, 32), (64,), (96, 96))  # the last has buffers of its own
# torch.optim.Muon writes to the momentum of a parameter in bfloat16, where that is what it makes orthogonal.
TO_THE_BIT = [
    pytest.param(case, dtype, id=f"{case.id}-{dtype}")
    for case in CASES
    for dtype in ("float32", "float64", "bfloat16")
    if case.torch not in DIVIDING and not (case.matrices and dtype == "bfloat16")
]


@pytest.fixture
def stepped_by():
    """Not by programs: what is asked here is of torch's operations alone."""


def pair(case, shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in shapes if len(shape) == 2 or not case.matrices]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    found = []
    for module in (torch.optim, optim):
        params = [torch.nn.Parameter(x.clone()) for x in values]
        found.append((params, getattr(module, case.torch)(params, lr=case.lr, **case.arguments)))
    return found, generator


@pytest.mark.parametrize(("case", "dtype"), TO_THE_BIT)
def test_a_step_is_torchs_to_the_bit(case, dtype):
    dtype = getattr(torch, dtype)
    ((theirs, a), (ours, b)), generator = pair(case, SIZES, dtype)
    for _ in range(5):
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        assert b._plan.uses_torch
        for p, q in zip(theirs, ours, strict=True):
            assert torch.equal(p, q)
            for name, x in a.state[p].items():
                assert torch.equal(x, b.state[q][name]), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_stay_as_they_are(case):
    (_, (params, optimizer)), generator = pair(case, SIZES)
    for _ in range(3):
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        assert optimizer._plan.uses_torch
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))


def test_which_steps_they_take():
    def steps(name, size, **arguments):
        p = torch.nn.Parameter(torch.ones(size))
        optimizer = getattr(optim, name)([p], **arguments)
        p.grad = torch.ones(size)
        optimizer.step()
        return optimizer._plan.uses_torch

    assert steps("AdamW", 10_000)
    assert not steps("AdamW", 10**6)  # more passes over memory than a program makes
    assert steps("SGD", 10**6, lr=0.1)  # one operation, one pass
    assert not steps("SGD", 10**6, lr=0.1, momentum=0.9)
    assert steps("Adafactor", 100)
    assert not steps("Adafactor", 10**5)
    assert not steps("SGD", 10, lr=0.1, max_norm=1.0)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_state_is_written_where_it_lies(case):
    """Without a copy at the end, but for what a rule reads once more after it has the new value."""
    [_, (params, optimizer)], _ = pair(case, ((64, 32),))
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    [part] = interop.explain(optimizer).parts
    copied = [line for source in part.operations for line in source.split("\n") if ".copy_(" in line]
    assert len(copied) == COPIES.get(case.torch, 0), copied


def test_state_wider_than_its_parameter_keeps_its_digits():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = optim.Adam([p])
    state = {"step": torch.tensor(1.0), "exp_avg": torch.full((3,), 1e-3), "exp_avg_sq": torch.full((3,), 1e-6)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    p.grad = torch.zeros(3, dtype=torch.bfloat16)
    optimizer.step()
    assert not optimizer._plan.uses_torch
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((3,), 1e-3) * 0.9)


def test_extras_that_come_and_go():
    """A norm needs programs; without it again they stay, and numbers and state go on."""
    theirs, ours = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    a, b = torch.optim.Adagrad([theirs], lr=0.1), optim.Adagrad([ours], lr=0.1)
    for i in range(6):
        theirs.grad, ours.grad = torch.full((5,), i + 1.0), torch.full((5,), i + 1.0)
        b.max_norm = 1.0 if i in (2, 3) else None
        if b.max_norm:
            torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        a.step()
        b.step()
        assert b._plan.uses_torch == (i < 2)
        torch.testing.assert_close(ours, theirs, rtol=cases.UPDATES, atol=0)
