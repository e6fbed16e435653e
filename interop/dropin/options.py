"""What a newer torch adds to its optimizers is refused by name while nothing here knows what it does.

An option that this project does not know may stay at its default: torch's defaults keep to what was computed before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

EXECUTION = ("foreach", "fused", "capturable", "differentiable")  # how torch runs a step, not what it computes


@functools.cache
def torch_base(cls: type) -> Any:
    """The class of torch.optim that a class is made of."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch."))


@functools.cache
def _added(cls: Any) -> dict[str, Any]:
    """The options of torch's class that are not known to ours, and their defaults."""
    _, _, *parameters = inspect.signature(torch_base(cls).__init__).parameters.values()  # without self and params
    known = cls.known_options() | set(EXECUTION)
    return {x.name: x.default for x in parameters if x.name not in known}


def check_groups(cls: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise NotImplementedError for a parameter group that sets an option that our class does not know."""
    for name, default in _added(cls).items():
        for i, group in enumerate(groups):
            value = group.get(name, default)
            if value is not default and not (type(value) is type(default) and value == default):
                raise NotImplementedError(
                    f"param_groups[{i}][{name!r}]: found {value!r}, an option of torch {torch.__version__} that this "
                    f"version of jopt does not know; leave it at its default {default!r}, take "
                    f"torch.optim.{torch_base(cls).__name__}, or upgrade jopt"
                )


def check_defaults(cls: Any, defaults: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for what torch's class puts into every group, if our class does not know it."""
    known = cls.known_options() | set(EXECUTION) | _added(cls).keys()
    for name in defaults:
        if name not in known:
            raise NotImplementedError(
                f"defaults[{name!r}]: torch {torch.__version__} puts it into each group of "
                f"{torch_base(cls).__name__}, and this version of jopt does not know what it does; take "
                f"torch.optim.{torch_base(cls).__name__}, or upgrade jopt"
            )
