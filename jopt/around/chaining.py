"""Transformations one after the other, with the exact step of the last one; and a step of any transformation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import tree_flatten_with_path, tree_map_with_path

from jopt.around.clip import ClipGradNorm, scaled
from jopt.transform import Exact, P, S, State, Transform, check_factors, difference, keep

Tree = Any


def is_transformation(x: Any) -> bool:
    return isinstance(x, tuple) and callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))


class Chain(Exact[tuple[Any, ...]]):
    """`jopt.chain`'s transformation: optax's chain, and a `step` whose last link takes its exact one.

    What the last link freezes, the others do not see: in gradients, parameters and their state is
    `optax.MaskedNode` there.
    """

    transforms: tuple[optax.GradientTransformation, ...]

    def __new__(cls, *transforms: optax.GradientTransformation) -> Self:
        def init(params: Tree) -> tuple[Any, ...]:
            seen = without(self.frozen(params), params, params)
            return (*(tx.init(seen) for tx in transforms[:-1]), transforms[-1].init(params))

        def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
            self._check(state)
            seen = params
            if params is not None:
                frozen = self.frozen(params)
                updates, seen = without(frozen, params, updates), without(frozen, params, params)
            new = []
            for i, (tx, s) in enumerate(zip(transforms, state, strict=True)):
                given = params if i == len(transforms) - 1 else seen
                updates, s = optax.with_extra_args_support(tx).update(updates, s, given, **extra)
                new.append(s)
            return updates, tuple(new)

        self = super().__new__(cls, init, update)  # type: ignore[arg-type]
        self.transforms = self._arguments = transforms
        return self

    def frozen(self, params: Tree) -> list[bool]:
        return frozen(self.transforms[-1], params)

    def step(
        self,
        grads: Tree,
        state: tuple[Any, ...],
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
        **extra: Any,
    ) -> tuple[P, tuple[Any, ...]]:
        """One step: the new parameters and state. All that is said of it goes to the links.

        Raises:
          ValueError: the state is not of this chain; and whatever the links raise.
        """
        self._check(state)
        still = self.frozen(params)
        grads, seen = (without(still, params, tree) for tree in (grads, params))
        links_active = None if active is None else without(still, params, active)
        new = []
        for tx, s in zip(self.transforms[:-1], state, strict=False):
            if isinstance(tx, ClipGradNorm):
                # Multiplied by in the pass of the step: the clipped gradients would be arrays of their own.
                factor, clipped = tx.factor(of_active(links_active, grads, seen), factors, s)
                factors, s = (*factors, factor), keep(skip, s, clipped)
            else:
                grads, s = _link(tx, grads, s, seen, links_active, factors, skip, extra)
                factors = ()
            new.append(s)
        params, last = step(
            self.transforms[-1], grads, state[-1], params, active=active, factors=factors, skip=skip, **extra
        )
        return params, (*new, last)

    def _check(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != len(self.transforms):
            found = f"{len(state)} states" if type(state) is tuple else f"a {type(state).__name__}"
            raise ValueError(
                f"state: expected the {len(self.transforms)} states of this chain in a tuple, found {found}; make it "
                "by the chain's init(params)"
            )


def chain(*transforms: optax.GradientTransformation) -> Chain:
    """Transformations one after the other, as `optax.chain`, with an exact `step`.

    `tx.step(grads, state, params)` takes the gradients through all but the last, which steps: exactly if it is jopt's.
    What the last one freezes (`jopt.param_groups`) the others do not see: it counts in no norm, as in torch.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.chain(jopt.clip_grad_value(0.1), jopt.adamw(lr=1e-2))
    >>> params, state = tx.step(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2))

    Raises:
      ValueError: no transformation.
      TypeError: something that is none.
    """
    if not transforms:
        raise ValueError("chain: expected at least one transformation, found none")
    for i, tx in enumerate(transforms):
        if not is_transformation(tx):
            raise TypeError(f"chain: expected gradient transformations, found {tx!r:.80} at position {i}")
    return Chain(*transforms)


def takes_extra_args(tx: Any) -> bool:
    """Whether a step's further arguments are for it."""
    return isinstance(tx, optax.GradientTransformationExtraArgs) and not isinstance(tx, Transform)


def step(
    tx: optax.GradientTransformation,
    grads: Tree,
    state: Any,
    params: Tree,
    *,
    active: Tree | None = None,
    factors: Sequence[Array] = (),
    skip: Array | None = None,
    **extra: Any,
) -> tuple[Tree, Any]:
    """A transformation's exact `step` if it has one, else its update, applied, with what `Exact` says of a step."""
    if isinstance(tx, Exact):
        extra = extra if takes_extra_args(tx) else {}
        return tx.step(grads, state, params, active=active, factors=factors, skip=skip, **extra)
    check_factors(factors)
    given = active_where(grads, params, active)
    updates, new_state = _updated(tx, grads, state, params, given, factors, extra)

    def applied(p: Any, u: Any, a: Any) -> Any:
        new: Any = p if absent(u) else optax.apply_updates(p, u)
        return new if a is None else p if a is False else jnp.where(a, new, p)

    treedef = jax.tree.structure(params)
    leaves = map(applied, jax.tree.leaves(params), treedef.flatten_up_to(updates), given)
    return keep(skip, params, treedef.unflatten(leaves)), keep(skip, state, new_state)


def _link(
    tx: optax.GradientTransformation,
    grads: Tree,
    state: Any,
    params: Tree,
    active: Tree | None,
    factors: Sequence[Array],
    skip: Array | None,
    extra: Mapping[str, Any],
) -> tuple[Tree, Any]:
    """The updates, for another transformation to go on with, and the state. No gradient is no update."""
    if isinstance(tx, Exact):
        new, state = step(tx, grads, state, params, active=active, factors=factors, skip=skip, **extra)
        updates = difference(new, params)
    else:
        given = active_where(grads, params, active)
        updates, new_state = _updated(tx, grads, state, params, given, factors, extra)
        state = keep(skip, state, new_state)
    treedef = jax.tree.structure(params)
    pairs = zip(treedef.flatten_up_to(grads), treedef.flatten_up_to(updates), strict=True)
    return treedef.unflatten([g if absent(g) else u for g, u in pairs]), state


def _updated(
    tx: optax.GradientTransformation,
    grads: Tree,
    state: Any,
    params: Tree,
    active: Sequence[Any],
    factors: Sequence[Array],
    extra: Mapping[str, Any],
) -> tuple[Tree, Any]:
    """An optax transformation's update. What is not active has a gradient of 0, and its state is kept."""
    treedef = jax.tree.structure(params)
    leaves = treedef.flatten_up_to(scaled(grads, factors))
    pairs = zip(leaves, jax.tree.leaves(params), active, strict=True)
    grads = treedef.unflatten([g if a is None else _masked(p if a is False else g, a) for g, p, a in pairs])
    updates, new = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
    return updates, new if all(a is None for a in active) else _kept(active, params, state, new)


def _masked(x: Any, active: Any) -> Any:
    return jnp.where(active, x, jnp.zeros((), jnp.result_type(x)))


def of_active(active: Tree | None, grads: Tree, params: Tree) -> Tree:
    """The gradients, with zeros for those that are not active."""
    if active is None:
        return grads
    treedef = jax.tree.structure(params)
    pairs = zip(treedef.flatten_up_to(grads), treedef.flatten_up_to(active), strict=False)
    return treedef.unflatten(
        [g if absent(g) or absent(a) else jax.tree.map(lambda x, a=a: _masked(x, a), g) for g, a in pairs]
    )


def absent(x: Any) -> bool:
    """Whether this stands for a gradient or an update that is missing."""
    return x is None or isinstance(x, optax.MaskedNode)


def active_where(grads: Tree, params: Tree, active: Tree | None) -> list[Any]:
    """For each leaf whether it steps: None if it surely does, False if it has no gradient, or a bool, traced or not."""
    treedef = jax.tree.structure(params)
    flags = [None] * treedef.num_leaves if active is None else treedef.flatten_up_to(active)
    return [False if absent(g) else a for g, a in zip(treedef.flatten_up_to(grads), flags, strict=True)]


def _kept(active: Sequence[Any], params: Tree, old: Tree, new: Tree) -> Tree:
    """A state after an update, the old one where it belongs to a leaf that is not active."""
    paths = [path for path, _ in tree_flatten_with_path(params)[0]]
    shapes = dict(zip(paths, map(np.shape, jax.tree.leaves(params)), strict=True))
    flags = dict(zip(paths, active, strict=True))

    def leaf(path: Any, old: Any, new: Any) -> Any:
        flag = flags.get(owner(path, np.shape(new), shapes))
        return new if flag is None else jnp.where(flag, new, old)

    def node(path: Any, old: Any, new: Any) -> Any:
        if not isinstance(new, State):
            return leaf(path, old, new)
        chosen = tree_map_with_path(lambda sub, x, y: leaf((*path, *sub), x, y), old, new)
        for tree in new.slots.values():  # each parameter has an entry in a vector of scalars
            slots = tree_flatten_with_path(tree)[0]
            own = [flags.get(owner((*path, *sub), np.shape(x), shapes)) for sub, x in slots]
            steps = jnp.stack([jnp.asarray(True if a is None else a) for a in own]) if own else None
            scalars = {
                k: x if steps is None or x.shape != steps.shape else jnp.where(steps, x, old.scalars[k])
                for k, x in new.scalars.items()
            }
            return chosen._replace(scalars=scalars)
        return chosen

    return tree_map_with_path(node, old, new, is_leaf=lambda x: isinstance(x, State))


def owner(path: Any, shape: tuple[int, ...], params: Mapping[Any, tuple[int, ...]]) -> Any:
    """The path of the parameter that state at `path` is of: what the path ends with. None for counts and scalars."""
    ends = (path[start:] for start in range(len(path) + 1))
    return next((end for end in ends if end in params and len(params[end]) == len(shape)), None)


def frozen(tx: optax.GradientTransformation, params: Tree) -> list[bool]:
    """For each leaf of the parameters, in their order, whether the transformation never steps it."""
    return tx.frozen(params) if isinstance(tx, Exact) else [False] * len(jax.tree.leaves(params))


class Around(Exact[S]):
    """The base of what wraps one transformation: it freezes what that freezes."""

    _tx: optax.GradientTransformation

    def frozen(self, params: Tree) -> list[bool]:
        return frozen(self._tx, params)


def without(still: Sequence[bool], params: Tree, tree: Tree) -> Tree:
    """A tree like the parameters with `optax.MaskedNode` in place of what is frozen."""
    if not any(still):
        return tree
    treedef = jax.tree.structure(params)
    leaves = zip(still, treedef.flatten_up_to(tree), strict=True)
    return treedef.unflatten([optax.MaskedNode() if f else x for f, x in leaves])
