"""The list of slower ways in docs/drop-in.md: what each takes again, and for how long."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is torch's")

from torch import nn  # noqa: E402

from interop import optim  # noqa: E402
from interop.dropin import reader  # noqa: E402

SHAPE = (4, 3)


class Side:
    """Two parameters, of which the second is the one that is changed."""

    def __init__(self, monkeypatch, make=lambda: nn.Parameter(torch.ones(SHAPE)), **options):
        self.looks = 0
        gradients = reader.checked

        def counted(optimizer):
            self.looks += 1
            return gradients(optimizer)

        monkeypatch.setattr(reader, "checked", counted)
        self.params = [nn.Parameter(torch.ones(SHAPE)), make()]
        self.optimizer = optim.AdamW(self.params, **options)
        self.grad = torch.ones_like  # of a parameter

    def step(self, without=()):
        """Returns whether the step looked at everything again."""
        before = self.looks
        for i, p in enumerate(self.params):
            p.grad = None if i in without else self.grad(p)
        self.optimizer.step()
        return self.looks > before

    @property
    def copied(self):
        return self.optimizer._plan.leaves[self.params[1]].home is not None


kept = []


def aliased():
    p = nn.Parameter(torch.ones(SHAPE))
    kept.append(p.detach())
    return p


def shared():
    p = nn.Parameter(torch.ones(SHAPE))
    p.share_memory_()
    return p


PARAMETERS = {
    "plain": lambda: nn.Parameter(torch.ones(SHAPE)),
    "an alias": aliased,
    "a view": lambda: nn.Parameter(torch.ones(5, 3)[1:]),
    "transposed": lambda: nn.Parameter(torch.ones(SHAPE[::-1]).t()),
    "channels_last": lambda: nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    "share_memory_": shared,
    "of NumPy": lambda: nn.Parameter(torch.from_numpy(torch.ones(SHAPE).numpy().copy())),
    "conjugate view": lambda: nn.Parameter(torch.ones(SHAPE, dtype=torch.complex64).conj()),
}


@pytest.mark.parametrize("what", PARAMETERS)
def test_parameters_that_are_copied_in_and_out(what, monkeypatch):
    side = Side(monkeypatch, PARAMETERS[what])
    side.step()
    assert side.copied == (what != "plain")
    assert not side.step()  # it is not looked at again


def exchange(side):
    side.params[1].data = torch.ones(SHAPE)


def share(side):
    side.params[1].share_memory_()


@pytest.mark.parametrize("change", [exchange, share])
def test_parameters_that_are_copied_in_and_out_from_then_on(change, monkeypatch):
    side = Side(monkeypatch)
    side.step()
    assert not side.copied
    change(side)
    assert side.step()
    assert side.copied
    assert not side.step()
    assert side.copied


def nothing(side):
    pass


def assign_state(side):
    state = side.optimizer.state[side.params[1]]
    state["exp_avg"] = state["exp_avg"].clone()


def load_state(side):
    side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))


def note_in_state(side):
    side.optimizer.state[side.params[1]]["note"] = "mine"


def change_numbers(side):
    side.optimizer.param_groups[0].update(lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)


def set_flag(side):
    side.optimizer.param_groups[0]["maximize"] = True


def average(side):
    side.optimizer.ema = 0.9


def clip(side):
    side.optimizer.max_norm = 1.0


def add_group(side):
    side.params.append(nn.Parameter(torch.ones(SHAPE)))
    side.optimizer.add_param_group({"params": [side.params[-1]]})


def other_strides(side):
    side.params[1].data = torch.ones(SHAPE[::-1]).t()


# What is done before a step, whether the step looks at everything again, and whether it makes its plan anew, which is
# for `_Plan.serves` to decide where only the state was exchanged.
CHANGES = [
    (nothing, False, False),
    (change_numbers, False, False),
    (clip, False, False),
    (assign_state, True, None),
    (load_state, True, None),
    (note_in_state, True, False),
    (set_flag, True, True),
    (average, True, True),
    (add_group, True, True),
    (other_strides, True, True),
    (exchange, True, True),
]


@pytest.mark.parametrize(("change", "looks", "plans"), CHANGES, ids=[change.__name__ for change, *_ in CHANGES])
def test_a_step_after_a_change(change, looks, plans, monkeypatch, stepped_by):
    if change is clip and stepped_by == "operations":  # only programs clip
        looks = plans = True
    side = Side(monkeypatch)
    side.step()
    assert not side.step()
    plan = side.optimizer._plan
    change(side)
    assert side.step() == looks
    assert plans in (None, side.optimizer._plan is not plan)
    assert not side.step()


def test_a_gradient_that_comes_or_goes(monkeypatch):
    side = Side(monkeypatch)
    assert side.step(without=[1])
    assert not side.step(without=[1])
    plan = side.optimizer._plan
    assert side.step()  # its first
    assert side.optimizer._plan is not plan
    plan = side.optimizer._plan
    for without in ([1], [], [0]):
        assert side.step(without=without)
        assert not side.step(without=without)
    assert side.optimizer._plan is plan


def test_gradients_that_are_looked_at_in_each_step(monkeypatch):
    side = Side(monkeypatch)
    side.optimizer = optim.SGD(side.params)  # which takes sparse ones
    side.grad = lambda p: torch.ones(SHAPE).to_sparse()
    assert [side.step() for _ in range(3)] == [True] * 3
    side.grad = torch.ones_like
    assert [side.step() for _ in range(3)] == [True, False, False]
