"""`interop.explain`: which way a step goes, and what it is made of."""

import optax
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import interop  # noqa: E402
from interop import optim  # noqa: E402


def stepped(name, *shapes, **arguments):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = getattr(optim, name)(params, **arguments)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_operations_are_shown():
    optimizer = stepped("Adagrad", (3, 4), (5,))
    [part] = interop.explain(optimizer).parts
    assert (part.by, part.tensors, part.elements, part.device) == ("torch's operations", 2, 17, "cpu")
    [source] = part.operations
    # What it shows is what ran: run it beside the optimizer.
    p, total = torch.full((5,), 2.0), torch.full((5,), 0.5)
    scope = {"torch": torch}
    exec(source, scope)
    theirs = torch.nn.Parameter(p.clone())
    reference = torch.optim.Adagrad([theirs], lr=0.1)
    reference.state[theirs]["sum"].fill_(0.5)
    theirs.grad = torch.full((5,), 3.0)
    reference.step()
    numbers = {"decay": 0.0, "eps": 1e-10, "-clr": -0.1}
    scope["step"](p, torch.full((5,), 3.0), total, [*numbers.values(), 1.0])
    assert torch.equal(p, theirs)
    assert torch.equal(total, reference.state[theirs]["sum"])


@pytest.mark.parametrize(
    ("name", "size", "by"),
    [
        ("AdamW", 1000, "torch's operations"),
        ("AdamW", 10**5, "a program of one thread"),
        ("AdamW", 3 * 10**6, "a program"),
        ("SGD", 3 * 10**6, "torch's operations"),
    ],
)
def test_what_steps(name, size, by):
    explanation = interop.explain(stepped(name, (size,), lr=0.1))
    assert [part.by for part in explanation.parts] == [by]
    assert f"1 tensors, {size} elements, on cpu, by {by}" in str(explanation)


def test_a_wrapped_transformation_is_a_program_a_group():
    p, q, r = (torch.nn.Parameter(torch.ones(n)) for n in (3, 4, 5))
    optimizer = interop.wrap(optax.sgd(0.1), [{"params": [p, q]}, {"params": [r], "tx": optax.lbfgs()}])

    def closure():
        optimizer.zero_grad()
        loss = p.sum() + q.sum() + r.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    first, second = interop.explain(optimizer).parts
    assert (first.by, first.tensors, first.elements) == ("a program of one thread", 2, 7)
    assert (second.by, second.elements) == ("a program of one thread, and Python inside of it", 5)


def test_what_is_not_explained():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="has made a step"):
        interop.explain(optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match="has made a step"):
        interop.explain(interop.wrap(optax.sgd(0.1), [p]))
    for other in (torch.optim.SGD([p], lr=0.1), optim.LBFGS([p])):
        with pytest.raises(TypeError, match=r"one of interop.optim but LBFGS and SparseAdam, or of interop.wrap"):
            interop.explain(other)
