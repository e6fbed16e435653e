"""Names: maps from a file's to a model's, suggestions where they differ, and those of an optimizer's numbered state."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from interop.runs.files.errors import CheckpointError

Shape = tuple[int, ...]


def renamed(names: Iterable[str], patterns: Mapping[str, str]) -> dict[str, str]:
    """Each name under the first pattern that fits it: a name, a prefix that ends in a dot, or one with `*`.

    >>> renamed(["net.0.weight", "head.bias"], {"net.*.weight": "layers.*.w", "head.": ""})
    {'net.0.weight': 'layers.0.w', 'head.bias': 'bias'}

    Raises:
      CheckpointError: a pattern that fits no name, or two names that become one.
    """
    rules = [(old, *_compiled(old, new)) for old, new in patterns.items()]
    used, result = set(), {}
    for name in dict.fromkeys(names):
        result[name] = name
        for old, expression, template in rules:
            if match := expression.fullmatch(name):
                used.add(old)
                result[name] = match.expand(template)
                break
    if idle := [old for old in patterns if old not in used]:
        raise CheckpointError(f"map {idle[0]!r}: fits none of the names, such as {_some(result)}")
    taken: dict[str, str] = {}
    for name, new in result.items():
        if new in taken:
            raise CheckpointError(f"map: {taken[new]!r} and {name!r} would both be {new!r}")
        taken[new] = name
    return result


def _compiled(old: str, new: str) -> tuple[re.Pattern[str], str]:
    if "*" not in old and old.endswith("."):
        old, new = old + "*", new + "*"
    if old.count("*") != new.count("*"):
        raise CheckpointError(f"map {old!r}={new!r}: expected as many * on both sides")
    pieces = new.split("*")
    template = pieces[0].replace("\\", r"\\")
    for i, piece in enumerate(pieces[1:], 1):
        template += rf"\g<{i}>" + piece.replace("\\", r"\\")
    return re.compile("(.*)".join(map(re.escape, old.split("*"))), re.DOTALL), template


def compare(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """That the names and shapes found are those expected.

    Raises:
      CheckpointError: with a proposed map, by prefix, or by shape, order and likeness.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        mapping = suggestion({name: found[name] for name in extra}, {name: expected[name] for name in missing})
        parts = [f"{word} {_some(names)}" for word, names in (("missing", missing), ("unknown", extra)) if names]
        shown = dict(list(mapping.items())[:12])
        hint = f" {shown}; on the command line" + "".join(f"\n  --map {old}={new}" for old, new in shown.items())
        more = f"\n  and {len(mapping) - 12} more" if len(mapping) > 12 else ""
        raise CheckpointError(
            f"{what}: {'; '.join(parts)}" + (f". Perhaps renamed: give map=, as{hint}{more}" if mapping else ""),
            mapping=mapping,
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{what}: {name!r}: expected shape {shape}, found {found[name]}")


def suggestion(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, str]:
    """A map of names in a file to those wanted: one prefix for all, else name by name at equal shape."""
    if not found or not wanted:
        return {}
    for name, other in ((next(iter(found)), w) for w in wanted):
        if name.endswith(other) or other.endswith(name):
            old = name.removesuffix(other) if name.endswith(other) else ""
            new = other.removesuffix(name) if other.endswith(name) else ""
            moved = {n: new + n.removeprefix(old) for n in found}
            if all(n.startswith(old) and wanted.get(m) == found[n] for n, m in moved.items()):
                return {old: new} if old.endswith(".") else {old + "*": new + "*"}
    result: dict[str, str] = {}
    left = dict(found)
    for position, (name, shape) in enumerate(wanted.items()):
        candidates = [old for old, other in left.items() if other == shape]
        if candidates:
            order = {old: -abs(i - position) for i, old in enumerate(found)}
            best = max(candidates, key=lambda old: (round(_likeness(old, name), 1), order[old]))
            result[best] = name
            del left[best]
    return result


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.split("."), b.split("."), autojunk=False).ratio()


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(map(repr, every[:5])) + (f" and {len(every) - 5} more" if len(every) > 5 else "")


def assign(groups: Sequence[Sequence[Shape | None]], names: Mapping[str, Shape]) -> list[list[str]]:
    """The names of an optimizer's numbered parameters.

    Each group is taken to hold its parameters in the model's order, as `[p for p in model.parameters() if ...]` makes
    them; among several groups the shapes say which holds what.

    Args:
      groups: for each the shapes that the state has; None where it says nothing.
      names: the model's parameters in its order.

    Raises:
      CheckpointError: no assignment of these shapes, or more than one.
    """
    order = list(names.items())
    total = sum(map(len, groups))
    if total != len(order):
        raise _unnamed(f"the optimizer has {total} parameters, the model {len(order)}")
    # Positions in the groups reached after each name; with the group of the last name, and whether another way exists.
    front: dict[tuple[int, ...], tuple[tuple[int, ...] | None, int, bool]] = {(0,) * len(groups): (None, -1, False)}
    steps = [front]
    for name, shape in order:
        new: dict[tuple[int, ...], tuple[tuple[int, ...] | None, int, bool]] = {}
        for at, (_, _, several) in front.items():
            for g, group in enumerate(groups):
                if at[g] < len(group) and group[at[g]] in (None, shape):
                    to = (*at[:g], at[g] + 1, *at[g + 1 :])
                    new[to] = (at, g, several or to in new)
        if not new:
            raise _unnamed(f"the shapes of its state do not follow the model's parameters at {name!r}")
        if len(new) > 100_000:
            raise _unnamed("its groups could hold the model's parameters in too many ways")
        front = new
        steps.append(front)
    ((at, (_, _, several)),) = front.items()
    if several:
        raise _unnamed("its groups could hold the model's parameters in several ways of these shapes")
    found: list[list[str]] = [[] for _ in groups]
    for (name, _), step in zip(reversed(order), reversed(steps[1:]), strict=True):
        before, g, _ = step[at]
        found[g].insert(0, name)
        assert before is not None
        at = before
    return found


def _unnamed(why: str) -> CheckpointError:
    return CheckpointError(
        f"the optimizer's parameters have numbers instead of names, and {why}. Give names= (their names, in the "
        "optimizer's order), or model= if the file has no model; or save from an optimizer made with "
        "model.named_parameters()"
    )
