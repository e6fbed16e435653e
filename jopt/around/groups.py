"""Parameter groups by patterns over tree paths: other numbers, another optimizer, or none for parts of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jopt import numerics
from jopt.arena import is_packed, param_name
from jopt.around import chaining
from jopt.rule import Rule, Summed
from jopt.transform import Exact, P, Transform, check_params, difference

Tree = Any
Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]
REST = "the rest"


def norms_and_biases(path: str, leaf: Any) -> bool:
    """A pattern for `param_groups`: parameters of at most one axis, which are usually not decayed."""
    del path
    return np.ndim(leaf) <= 1


class GroupsState(NamedTuple):
    """The state of each group's transformation, in the order of the groups, that of the rest last."""

    groups: tuple[Any, ...]


class Groups(Exact[GroupsState]):
    """What `jopt.param_groups` makes: an optax transformation with an exact `step`."""

    patterns: tuple[Pattern, ...]
    transforms: tuple[optax.GradientTransformation | None, ...]  # None: frozen

    def __new__(
        cls, patterns: tuple[Pattern, ...], transforms: tuple[optax.GradientTransformation | None, ...]
    ) -> Self:
        def init(params: Tree) -> GroupsState:
            _, treedef, labels = self._assign(params)
            return GroupsState(
                tuple(
                    () if tx is None else tx.init(_part(treedef, params, labels, i)) for i, tx in enumerate(transforms)
                )
            )

        def update(updates: Tree, state: GroupsState, params: Tree | None = None, **extra: Any) -> Any:
            check_params(params)
            new, state = self.step(updates, state, params, **extra)
            return difference(new, params), state

        summed: dict[type[Summed], list[Transform]] = {}
        for tx in transforms:
            if isinstance(tx, Transform) and isinstance(tx.rule, Summed):
                summed.setdefault(type(tx.rule), []).append(tx)
        for rule, txs in summed.items():
            rule.check_groups([tx.rule for tx in txs], [tx.hyperparameters for tx in txs])
        self = super().__new__(cls, init, update)  # type: ignore[arg-type]
        self.patterns, self.transforms = self._arguments = patterns, transforms
        return self

    def frozen(self, params: Tree) -> list[bool]:
        _, treedef, labels = self._assign(params)
        inside = [
            None if tx is None else iter(chaining.frozen(tx, _part(treedef, params, labels, i)))
            for i, tx in enumerate(self.transforms)
        ]
        return [(own := inside[label]) is None or next(own) for label in labels]

    def assignment(self, params: Tree) -> dict[str, str]:
        """The pattern that each parameter's path falls under; a packed tree's by the paths inside it.

        >>> import jax.numpy as jnp, jopt
        >>> tx = jopt.param_groups(jopt.sgd, {"bias": {"lr": 0.2}}, lr=0.1)
        >>> tx.assignment({"dense": {"bias": jnp.zeros(1), "kernel": jnp.zeros((1, 1))}})
        {'dense.bias': 'bias', 'dense.kernel': 'the rest'}

        Raises:
          ValueError: as `step`.
        """
        names, _, labels = self._assign(params)
        titles = [_title(p) for p in self.patterns] + [REST]
        return {name: titles[label] for inside, label in zip(names, labels, strict=True) for name in inside}

    def mapped(self, f: Callable[[Any, Tree, Any], Tree], params: P, state: GroupsState) -> P:
        """Of each group what a function makes of its transformation, parameters and state; all in one tree."""
        _, treedef, labels = self._assign(params)
        leaves = treedef.flatten_up_to(params)
        for i, (tx, own) in enumerate(zip(self.transforms, state.groups, strict=True)):
            new = treedef.flatten_up_to(f(tx, _part(treedef, params, labels, i), own))
            leaves = [x if label == i else old for x, old, label in zip(new, leaves, labels, strict=True)]
        return treedef.unflatten(leaves)

    def step(
        self,
        grads: Tree,
        state: GroupsState,
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
        **extra_args: Any,
    ) -> tuple[P, GroupsState]:
        """One step of every group: as `Transform.step`.

        Raises:
          ValueError: a pattern matches no parameter; a packed buffer holds parameters of several groups; a state of
            other groups.
        """
        _, treedef, labels = self._assign(params)
        if not isinstance(state, GroupsState) or len(state.groups) != len(self.transforms):
            found = f"of {len(state.groups)}" if isinstance(state, GroupsState) else f"a {type(state).__name__}"
            raise ValueError(
                f"state: expected that of {len(self.transforms)} groups, found {found}; make it by init(params)"
            )
        leaves = treedef.flatten_up_to(params)
        given = [
            (
                *(_part(treedef, grads, labels, i), s, _part(treedef, params, labels, i)),
                *(None if active is None else _part(treedef, active, labels, i), factors, skip),
            )
            for i, s in enumerate(state.groups)
        ]
        sums, states = self._sums(given), []
        for i, (tx, (own, s, part, mask, *_)) in enumerate(zip(self.transforms, given, strict=True)):
            if tx is None:
                states.append(s)
                continue
            if isinstance(tx, Transform) and tx.rule.sums:
                new, s = tx._lift.step(*given[i], sums[type(tx.rule)])
            else:
                new, s = chaining.step(tx, own, s, part, active=mask, factors=factors, skip=skip, **extra_args)
            states.append(s)
            new_leaves = treedef.flatten_up_to(new)
            for j, label in enumerate(labels):
                if label == i:
                    leaves[j] = new_leaves[j]
        return treedef.unflatten(leaves), GroupsState(tuple(states))

    def _sums(self, given: Sequence[tuple[Any, ...]]) -> dict[type[Rule], dict[str, Array]]:
        """The sums that rules ask for, over all groups of one rule, as over those of one torch optimizer."""
        found: dict[type[Rule], list[dict[str, Array]]] = {}
        for tx, arguments in zip(self.transforms, given, strict=True):
            if isinstance(tx, Transform) and tx.rule.sums:
                found.setdefault(type(tx.rule), []).append(tx._lift.sums(*arguments))
        dtype = numerics.widest(x.dtype for parts in found.values() for part in parts for x in part.values())
        return {
            rule: {name: jnp.sum(jnp.stack([part[name].astype(dtype) for part in parts])) for name in rule.sums}
            for rule, parts in found.items()
        }

    def group_of(self, path: str, leaf: Any) -> int:
        """The position of the first pattern that matches; that of the rest for none."""
        for i, pattern in enumerate(self.patterns):
            if isinstance(pattern, str | re.Pattern):
                matches = re.search(pattern, path) is not None
            else:
                matches = pattern(path, leaf)  # type: ignore[arg-type]
            if matches:
                return i
        return len(self.patterns)

    def labels(self, params: Tree) -> list[int]:
        """For each leaf of `params` the position of its group, as `group_of`."""
        return self._assign(params)[2]

    def _assign(self, params: Tree) -> tuple[list[list[str]], Any, list[int]]:
        """For each leaf of `params` the paths in it and their group."""
        names: list[list[str]] = []
        labels: list[int] = []
        for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed):
            for inside in node.contents() if is_packed(node) else [[((), node)]]:
                paths = [param_name((*path, *subpath)) for subpath, _ in inside]
                found = {self.group_of(name, leaf) for name, (_, leaf) in zip(paths, inside, strict=True)}
                if len(found) > 1:
                    raise ValueError(
                        f"params{jax.tree_util.keystr(path)}: a packed buffer holds parameters of {len(found)} groups; "
                        "pack them apart: jopt.pack(params, groups=tx)"
                    )
                names.append(paths)
                labels.append(found.pop())
        missing = set(range(len(self.patterns))) - set(labels)
        if missing:
            every = [name for inside in names for name in inside]
            raise ValueError(
                f"param_groups: pattern {_title(self.patterns[min(missing)])!r} is no parameter's first match; "
                f"the paths are {', '.join(every[:10])}{', ...' if len(every) > 10 else ''}"
            )
        return names, jax.tree.structure(params), labels


def _title(pattern: Any) -> str:
    return pattern if isinstance(pattern, str) else getattr(pattern, "pattern", getattr(pattern, "__name__", "?"))


def _part(treedef: Any, tree: Tree, labels: list[int], group: int) -> Tree:
    leaves = treedef.flatten_up_to(tree)
    return treedef.unflatten(
        [leaf if label == group else optax.MaskedNode() for leaf, label in zip(leaves, labels, strict=True)]
    )


def param_groups(
    optimizer: Callable[..., optax.GradientTransformation],
    groups: Mapping[Any, Mapping[str, Any] | optax.GradientTransformation | None],
    **arguments: Any,
) -> Groups:
    """torch's parameter groups: `optimizer(**arguments)`, with other arguments where a pattern matches.

    No weight decay for norms and biases, a tenth of the learning rate for the embedding, a frozen backbone:

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.param_groups(
    ...     jopt.adamw,
    ...     {
    ...         "^backbone": None,
    ...         jopt.norms_and_biases: {"weight_decay": 0.0},
    ...         "embed": {"lr": jopt.schedules.cosine_annealing_lr(1e-4, T_max=100)},
    ...     },
    ...     lr=1e-3,
    ...     weight_decay=0.1,
    ... )
    >>> head = {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> params = {"backbone": jnp.ones((2, 2)), "embed": jnp.ones((2, 2)), "head": head}
    >>> params, state = tx.step(params, tx.init(params), params)
    >>> params["backbone"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    Args:
      optimizer: a function of jopt (or optax), called with `arguments`.
      groups: pattern -> what differs there: arguments, a whole transformation, or None to freeze. A pattern is a
        regular expression, searched for in the path ("layers.0.bias": keys, indices and attribute names, joined by
        dots), or a function of the path and the parameter. The first that matches counts; what none matches is
        stepped with `arguments` alone.
      arguments: of the optimizer, for all groups.

    Returns:
      A transformation with an exact `step`. Each group has a state of its own, `state.groups[i]`, and so its own
      schedules and hyperparameters; groups of `jopt.prodigy` share the sums that its step size is made of. Works on any
      pytree (flax nnx, equinox), and on what `jopt.pack(params, groups=tx)` packs.

    Raises:
      ValueError: no pattern given. At `init` and `step`: a pattern that is no parameter's first match.
      TypeError: a pattern or group of another type, or what the optimizer says to its arguments.
      RuntimeError: learning rates of `jopt.prodigy` that differ, other than 0.
    """
    if not callable(optimizer):
        raise TypeError(f"optimizer: expected a function such as jopt.adamw, found {optimizer!r:.80}")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"groups: expected a mapping of at least one pattern, found {groups!r:.80}")
    transforms: list[optax.GradientTransformation | None] = []
    for pattern, group in groups.items():
        if not isinstance(pattern, str | re.Pattern) and not callable(pattern):
            raise TypeError(f"groups: expected a regular expression or a function as pattern, found {pattern!r}")
        if group is None:
            transforms.append(None)
        elif isinstance(group, Mapping):
            transforms.append(optimizer(**{**arguments, **group}))
        elif chaining.is_transformation(group):
            transforms.append(group)
        else:
            raise TypeError(
                f"groups[{_title(pattern)!r}]: expected arguments, a transformation or None, found {group!r:.80}"
            )
    return Groups(tuple(groups), (*transforms, optimizer(**arguments)))
