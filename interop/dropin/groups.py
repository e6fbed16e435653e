"""A torch optimizer's groups: their numbers, and how messages call what is in them."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from interop.dropin import options
from jopt.rule import Rule, flags_of

Numbers = Sequence[dict[str, float]]  # the hyperparameters of each group
_FIXED = frozenset((float, int, bool, str, type(None)))  # types whose values cannot change


class Groups:
    """What a step reads in an optimizer's groups. It is read again only if one of them holds another object.

    Another learning rate, or what else is a number of its own and no flag, is taken over without the rest.

    Attributes:
      numbers: the hyperparameters of each group, tuples taken apart. It is the same object as long as they are.
      rules: the rule that each group's flags make.
      formats: the format of each group's state.
    """

    def __init__(self, optimizer: Any):
        groups = optimizer.param_groups
        options.check_groups(type(optimizer), groups)
        self.numbers, self.rules = hyperparameters(optimizer)
        self.formats = [group.get("state_dtype") for group in groups]
        self._objects = _objects(groups) if all(map(_is_fixed, groups)) else None
        plain = set(optimizer.rule.hyperparameters) - {name for name, _ in flags_of(optimizer.rule)}
        # Of each object where it belongs, if another number there changes nothing else.
        self._places: list[tuple[int, str] | None] = [None for group in groups for _ in group]
        self._places += [(i, name) if name in plain else None for i, group in enumerate(groups) for name in group]

    def still_hold(self, optimizer: Any) -> bool:
        """Whether the groups hold what was read, now that other numbers are taken over.

        Never where they hold what may have changed in itself, such as a tensor.
        """
        if self._objects is None or are_same(self._objects, found := _objects(optimizer.param_groups)):
            return self._objects is not None
        if len(found) != len(self._objects):
            return False
        numbers = [*map(dict, self.numbers)]
        for place in itertools.compress(self._places, map(operator.is_not, self._objects, found)):
            if place is None:
                return False
            index, name = place
            value = optimizer.param_groups[index][name]
            if type(value) is not float:
                return False
            numbers[index][name] = value
        self._objects, self.numbers = found, numbers
        return True


def are_same(a: list[Any], b: list[Any]) -> bool:
    """Whether they hold the same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _objects(groups: list[dict[str, Any]]) -> list[Any]:
    return [*itertools.chain.from_iterable(groups), *itertools.chain.from_iterable(map(dict.values, groups))]


def _is_fixed(group: dict[str, Any]) -> bool:
    names = group.get("param_names")
    others = [x for x in group.values() if type(x) not in _FIXED and x is not group["params"] and x is not names]
    return all(type(x) is tuple and all(type(y) in _FIXED for y in x) for x in others)


def hyperparameters(optimizer: Any) -> tuple[Numbers, list[Rule]]:
    """The numbers of each group, tuples taken apart, and the rule that its flags make.

    Raises:
      KeyError, TypeError, ValueError: as torch's step, for what is not there, no number, or not as many.
    """
    rule = optimizer.rule
    hyperparameters, rules = [], []
    for index, group in enumerate(optimizer.param_groups):
        try:
            if not _names(rule) <= group.keys():
                raise KeyError
            h = {name: x if type(x) is float else as_number(x) for name, x in rule.members(group).items()}
            rules.append(rule.shaped_by(group, h))
        except (KeyError, TypeError, ValueError) as error:
            raise _group_error(optimizer, index, error) from error
        hyperparameters.append(h)
    return hyperparameters, rules


@functools.cache
def _owners(rule: type[Rule]) -> dict[str, str]:
    """The group's key for each of the rule's numbers: its own name, or that of the tuple that it is in."""
    owners = {name: name for name in rule.hyperparameters}
    return owners | {name: owner for owner, names in rule.tuples.items() for name in names}


@functools.cache
def _names(rule: type[Rule]) -> frozenset[str]:
    return frozenset(_owners(rule).values())


def as_number(x: Any) -> float:
    """A group's value as a number; TypeError if it is none."""
    try:
        if not isinstance(x, str | bytes):  # float() would parse it
            return float(x)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"expected a number, or a tensor of one, found {x!r}")


def _group_error(optimizer: Any, index: int, error: Exception) -> Exception:
    """What is wrong with a group, in the type of torch's error."""
    group, rule = optimizer.param_groups[index], optimizer.rule
    for name in dict.fromkeys(_owners(rule).values()):
        if name not in group:
            return lacks(optimizer, index, name)
        if (members := rule.tuples.get(name)) is not None:
            n = len(group[name]) if isinstance(group[name], tuple | list) else None
            if n != len(members):
                # Muon's rule has torch's own words.
                own = f"expected {len(members)} numbers ({', '.join(members)}), found {group[name]!r}"
                text = error if isinstance(error, ValueError) else own
                return (TypeError if n is None else ValueError)(f"param_groups[{index}][{name!r}]: {text}")
    for name, x in rule.members(group).items():
        try:
            as_number(x)
        except TypeError as wrong:
            return TypeError(f"param_groups[{index}][{_owners(rule)[name]!r}]: {wrong}")
    if isinstance(error, KeyError):
        return lacks(optimizer, index, error.args[0])
    return type(error)(f"param_groups[{index}]: {error}")


def lacks(optimizer: Any, index: int, name: str) -> KeyError:
    """The error for a key that a group does not have."""
    return KeyError(
        f"param_groups[{index}][{name!r}]: {type(optimizer).__name__} reads it, found "
        f"{sorted(optimizer.param_groups[index])}; set it, or load the state_dict of an optimizer of this class"
    )


def parameters(optimizer: Any) -> list[Tensor]:
    """The parameters of all groups, in their order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameter_name(optimizer: Any, group: int, p: Tensor) -> str:
    """How messages call a parameter."""
    index = next(i for i, q in enumerate(optimizer.param_groups[group]["params"]) if q is p)
    names = optimizer.param_groups[group].get("param_names")
    return f"param_groups[{group}]['params'][{index}]" + (f" ({names[index]!r})" if names else "")
