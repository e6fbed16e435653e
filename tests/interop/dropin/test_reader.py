"""The reader of gradients in C++: that it reads, that it says nothing where anything is other, and how it is got.

What the steps compute after each of a table of changes is compared in test_safety.py, in both languages.
"""

import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from interop import optim  # noqa: E402
from interop.dropin import native as native_module  # noqa: E402
from tests.interop.dropin.test_optimizer import backward, network, subprocess_run  # noqa: E402


@pytest.fixture
def native(native_reader, monkeypatch):
    """Optimizers that take their first step are read by C++."""
    monkeypatch.setattr(native_module, "extension", native_reader)


@pytest.fixture
def stepped(native):
    """A model and an optimizer of two groups, stepped twice, with gradients for a third; one parameter has none."""
    model = network()
    spare = torch.nn.Parameter(torch.ones(3))
    first, *others = model.parameters()
    opt = optim.AdamW([{"params": [first, spare]}, {"params": others, "lr": 0.1}])
    for i in range(3):
        opt.zero_grad()
        backward(model, i)
        if i < 2:
            opt.step()
    model.spare = spare
    return model, opt


def read(opt):
    """The gradients, which C++ has read."""
    grads = opt._plan.as_before(opt, opt._plan.rules)
    assert isinstance(grads, native_module.ReadGradients)
    return grads


def answers(opt):
    """Whether C++ finds all as it was."""
    return readers(opt)[0].read(opt) is not None


def readers(opt):
    """Those in C++."""
    return [reader for reader in opt._plan.turn.readers if isinstance(reader, native_module.NativeReader)]


def test_it_reads_every_gradient(stepped):
    model, opt = stepped
    grads = read(opt)
    [work] = opt._plan.turn.works
    [big] = grads.of_big(work)
    assert big.ctypes.data == model[0].weight.grad.data_ptr()
    np.testing.assert_array_equal(big, model[0].weight.grad.flatten())
    for view in work.small_views:
        view.fill_(np.nan)
    grads.gather(work)
    for leaf, view in zip(work.bucket.small, work.bucket.grad_views, strict=True):
        assert torch.equal(view, leaf.param.grad)


def _grad(change):
    """Exchange the gradient of the first weight."""

    def edit(model, opt):
        p = model[0].weight
        grad = change(p.grad)
        p.grad = None
        p.grad = grad

    return edit


class Sub(torch.Tensor):
    pass


def _regroup(model, opt):
    a, b = opt.param_groups
    a["params"].append(b["params"].pop(0))


def _data(i, change):
    def edit(model, opt):
        model[i].weight.data = change(model[i].weight.detach())

    return edit


def _state(change):
    def edit(model, opt):
        change(opt.state[model[0].weight])

    return edit


ones = torch.ones
CHANGES = {
    "no gradient": lambda model, opt: setattr(model[2].bias, "grad", None),
    "one gradient more": lambda model, opt: setattr(model.spare, "grad", ones(3)),
    "strides of the gradient": _grad(lambda g: g.t().contiguous().t()),
    "negative view": _grad(lambda g: torch._neg_view(g)),
    "subclass": _grad(lambda g: g.as_subclass(Sub)),
    "sparse gradient": _grad(lambda g: g.to_sparse()),
    "gradient of another shape": lambda model, opt: model[2].weight.grad.resize_(200, 3),
    "gradient without memory": lambda model, opt: model[0].weight.grad.untyped_storage().resize_(0),
    "resized gradient": lambda model, opt: model[2].weight.grad.resize_(1),
    "another type of the gradient": lambda model, opt: setattr(
        model[2].weight.grad, "data", model[2].weight.grad.double()
    ),
    "values elsewhere": _data(2, lambda x: x.clone()),
    "another type": lambda model, opt: model.double(),
    "another shape": _data(2, lambda x: x.t().contiguous()),
    "a smaller shape, same memory": _data(2, lambda x: x[:2]),
    "other strides, same memory": _data(0, lambda x: x.as_strided((200, 300), (1, 200))),
    "negative parameter": _data(0, lambda x: torch._neg_view(x)),
    "tensors swapped": lambda model, opt: torch.utils.swap_tensors(
        model[2].weight, torch.nn.Parameter(model[2].weight.detach().clone())
    ),
    "another parameter": lambda model, opt: opt.param_groups[1]["params"].__setitem__(0, torch.nn.Parameter(ones(200))),
    "parameters regrouped": _regroup,
    "a group more": lambda model, opt: opt.add_param_group({"params": [torch.nn.Parameter(ones(2))]}),
    "groups as a tuple": lambda model, opt: setattr(opt, "param_groups", tuple(opt.param_groups)),
    "parameters as a tuple": lambda model, opt: opt.param_groups[0].update(params=tuple(opt.param_groups[0]["params"])),
    "state exchanged": _state(lambda s: s.update(exp_avg=s["exp_avg"].clone())),
    "state elsewhere": _state(lambda s: s["exp_avg"].set_(s["exp_avg"].clone())),
    "state added": _state(lambda s: s.update(mine=1)),
    "state removed": _state(lambda s: s.pop("exp_avg")),
    "state of another name": _state(lambda s: s.update(mine=s.pop("exp_avg_sq"))),
    "state cleared": lambda model, opt: opt.state.clear(),
    "state of another parameter": lambda model, opt: opt.state.update({ones(3): opt.state.popitem()[1]}),
    "state of a stranger": lambda model, opt: opt.state.update({"mine": 1}),
    "no mapping": lambda model, opt: setattr(opt, "state", list(opt.state)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_says_nothing_where_something_is_other(change, stepped):
    model, opt = stepped
    assert answers(opt)
    with torch.no_grad():
        CHANGES[change](model, opt)
    assert not answers(opt)


def test_another_type_in_the_same_memory(native):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = optim.SGD([p], lr=0.5)
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    opt.step()
    assert answers(opt)
    p.data = p.detach().view(torch.float16)
    assert not answers(opt)


@pytest.mark.parametrize("of", ["parameter", "gradient"])
def test_conjugate_views(of, native):
    """Their values are not those in their memory, which is where it was."""
    both = []
    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        opt = module.SGD([p], lr=0.5)
        for i in range(4):
            p.grad = torch.tensor([1 + 1j, 2 + 3j]) * (i + 1)
            if i == 2 and of == "gradient":
                p.grad = p.grad.conj()
            if i == 2 and of == "parameter":
                p.data = p.data.conj()
            opt.step()
        both.append(p.detach().resolve_conj())
    assert readers(opt)
    assert torch.equal(*both)


def test_gradients_of_a_transform_are_left_to_python(stepped):
    """They have no memory of their own, which the reader finds out from an exception of torch's."""
    model, opt = stepped

    def loss(x):
        model[2].bias.grad = x
        assert not answers(opt)
        model[2].bias.grad = None
        return x.sum()

    torch.func.grad(loss)(ones(3))


def test_parameters_that_are_no_tensors_are_left_to_python(stepped):
    """As whatever stands in for a parameter without gradient, torch's step does not look at them."""
    model, opt = stepped

    class Parameter:
        grad = None

    opt.param_groups[1]["params"].append(Parameter())
    for i in range(2):
        opt.zero_grad()
        backward(model, i)
        opt.step()
    assert not readers(opt)


def test_a_resized_gradient_is_not_read_past_its_end(stepped):
    model, opt = stepped
    with torch.no_grad():
        model[0].weight.grad.resize_(1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="float32"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_it_holds_the_gradients_that_a_step_reads(stepped):
    model, opt = stepped
    grads = read(opt)
    address, value = model[0].weight.grad.data_ptr(), model[0].weight.grad.clone()
    opt.zero_grad()
    kept = [torch.full((200, 300), float("nan")) for _ in range(20)]
    assert all(x.data_ptr() != address for x in kept)
    [big] = grads.of_big(opt._plan.turn.works[0])
    np.testing.assert_array_equal(big, value.flatten())


def test_it_is_in_no_cycle_that_the_garbage_collector_does_not_see(native):
    model = network()
    opt = optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.optimizer = opt
    for i in range(3):
        opt.zero_grad()
        backward(model, i)
        opt.step()
    assert readers(opt)
    alive = weakref.ref(opt._plan.buckets[0]), weakref.ref(model[0])
    del model, opt, p
    gc.collect()
    assert [x() for x in alive] == [None, None]


def test_without_a_compiler_it_says_what_is_missing_and_steps_go_on(tmp_path):
    done = subprocess_run(
        """
        import torch, interop
        from interop import optim
        try:
            interop.enable_native_reader()
        except RuntimeError as error:
            print(error)
        p = torch.nn.Parameter(torch.ones(3))
        opt = optim.SGD([p], lr=0.5)
        for _ in range(3):
            p.grad = torch.ones(3)
            opt.step()
        print(p.tolist())
        """,
        CXX=str(tmp_path / "none"),
        TORCH_EXTENSIONS_DIR=str(tmp_path),
    )
    assert "expected a C++ compiler" in done.stdout, done.stderr
    assert "jopt[native]" in done.stdout
    assert done.stdout.endswith("[-0.5, -0.5, -0.5]\n")
