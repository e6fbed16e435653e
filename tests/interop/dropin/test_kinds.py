"""Coefficients are computed once for groups of equal numbers, and stay each group's own where those differ."""

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from interop import optim  # noqa: E402
from tests import cases  # noqa: E402


def parameters(groups):
    generator = torch.Generator().manual_seed(0)
    return [
        [
            torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator)),
            torch.nn.Parameter(torch.randn(4, dtype=torch.float64, generator=generator)),
        ]
        for _ in range(groups)
    ]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
@pytest.mark.parametrize("groups", [2, 3, 12])
def test_groups_become_equal_and_different(name, groups):
    """By a user who sets learning rates: all equal, some equal, none; and a parameter that misses a step."""
    ours, theirs = parameters(groups), parameters(groups)
    options = {"momentum": 0.9} if name == "SGD" else {}
    a, b = (
        getattr(module, name)([{"params": p} for p in params], lr=0.1, weight_decay=0.01, **options)
        for module, params in ((optim, ours), (torch.optim, theirs))
    )
    for step in range(24):
        for optimizer in (a, b):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = (0.1, 0.1 + 0.01 * (i % 2), 0.1 + 0.01 * i, 0.05)[step // 3 % 4]
        for i, (ps, qs) in enumerate(zip(ours, theirs, strict=True)):
            for p, q in zip(ps, qs, strict=True):
                missing = step == 10 and i == 0
                p.grad, q.grad = (
                    (None, None) if missing else (torch.cos(q.detach() + step), torch.cos(q.detach() + step))
                )
        a.step(), b.step()
    for ps, qs in zip(ours, theirs, strict=True):
        for p, q in zip(ps, qs, strict=True):
            assert cases.difference(p.detach(), q.detach()) <= cases.FRONT_ENDS["float64"]


def test_equal_groups_are_one_kind():
    """Also where a group says a number itself that another has by default, in another order."""
    ps = parameters(2)
    optimizer = optim.SGD([{"params": ps[0]}, {"weight_decay": 0.0, "lr": 0.1, "params": ps[1]}], lr=0.1, momentum=0.9)
    for lr, kinds in ((0.1, 1), (0.2, 2), (0.1, 1)):
        optimizer.param_groups[1]["lr"] = lr
        for p in (p for group in ps for p in group):
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert len(optimizer._plan.buckets[0].coefficients.table.runs) == kinds
