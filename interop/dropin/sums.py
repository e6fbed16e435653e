"""What an optimizer's step asks of all its parameters together: the sums that Prodigy's step size is made of.

    program of each bucket -> a number a leaf -> added on the host, and over processes -> coefficients of all buckets

Nothing is given away before they are known, so that nothing is lost if one of them raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interop.dropin import processes
from interop.dropin.bucket import Bucket, Work
from interop.dropin.coefficients import Scalars
from interop.dropin.groups import Groups, Numbers, parameter_name
from interop.dropin.measured import Measured
from interop.dropin.reader import Gradients

if TYPE_CHECKING:
    from interop.dropin.plan import Plan


def check_groups(optimizer: Any, groups: Groups) -> None:
    """Raise what the rule says of groups whose numbers do not go together."""
    if optimizer.rule.sums:
        optimizer.rule.check_groups(groups.rules, groups.numbers)


def shared_scalars(optimizer: Any) -> dict[str, float]:
    """The scalar state that all parameters share, of those that have any: what a new one begins with.

    Raises:
      ValueError: they have different ones.
    """
    found: dict[str, tuple[str, float]] = {}
    groups: list[dict[str, Any]] = optimizer.param_groups if optimizer.rule.shared else []
    for index, group in enumerate(groups):
        for p in group["params"]:
            state: dict[str, Any] = optimizer.state.get(p) or {}
            for key in optimizer.rule.shared & state.keys():
                value = float(state[key])
                name, other = found.setdefault(key, (parameter_name(optimizer, index, p), value))
                if value != other and (value == value or other == other):
                    raise ValueError(
                        f"{parameter_name(optimizer, index, p)}: expected its state {key!r} equal to that of {name}, "
                        f"{other!r}, for {type(optimizer).__name__} has one for all parameters, found {value!r}; set "
                        "both, or load one state_dict"
                    )
    return {key: value for key, (_, value) in found.items()}


def of_all(
    plan: Plan | None, optimizer: Any, meshes: list[Any], grads: Any, numbers: Numbers, measured: Measured | None
) -> dict[str, float] | None:
    """The sums over all parameters, of all processes of the meshes; None for a rule that asks for none."""
    names = optimizer.rule.sums
    if not names:
        return None
    with processes.together(meshes, optimizer):
        found = [] if plan is None else _of_buckets(plan, optimizer, grads, numbers, measured)
    if meshes:
        parts = [(leaf.param, x[:, i].tolist()) for bucket, x in found for i, leaf in enumerate(bucket.leaves)]
        totals = processes.agree(meshes, optimizer, sums=parts)[2]
    else:
        totals = [float(sum(x[j].sum() for _, x in found)) for j in range(len(names))]
    return dict(zip(names, totals, strict=True))


def _of_buckets(
    plan: Plan, optimizer: Any, grads: Gradients, numbers: Numbers, measured: Measured | None
) -> list[tuple[Bucket, np.ndarray]]:
    """For each bucket what its leaves add: a row a sum, a column a leaf."""
    found = []
    for work, summing in zip(plan.works(), plan.programs(optimizer).sums, strict=True):
        if work.is_active:
            judged = {} if measured is None else measured.of(work.bucket)
            found.append((work.bucket, work.bucket.sums(summing, work, numbers, grads, judged)))
    return found


def followed(
    works: Sequence[Work], numbers: Numbers, sums: Mapping[str, float], *, finish: bool
) -> list[tuple[Work, list[Any], Scalars]]:
    """Of buckets that do not step the next scalar state: what all parameters share goes on there too."""
    results = []
    for work in works:
        if not work.is_active:
            scalars = work.bucket.coefficients.fill(numbers, None, sums)
            results.append((work, [], scalars))
            if finish:
                work.bucket.finish(work, scalars)
    return results
