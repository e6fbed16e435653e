"""The parameters to evaluate, where what is trained is not that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jopt import numerics as t
from jopt.around.chaining import Chain
from jopt.around.groups import Groups, GroupsState
from jopt.optimizers.schedule_free import ScheduleFree
from jopt.rule import at_count
from jopt.transform import State, Transform

Tree = Any


def schedule_free_eval(tx: Any, params: Tree, state: Any) -> Tree:
    """The averages to evaluate, x, of parameters that are trained, y: y + (1 - 1 / beta1) (z - y).

    As the authors' `eval()`; a parameter that was never stepped is its own average.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.schedule_free_adamw(lr=0.1)
    >>> params = {"w": jnp.ones(2)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     params, state = tx.step({"w": jnp.ones(2)}, state, params)
    >>> [round(x, 5) for x in jopt.schedule_free_eval(tx, params, state)["w"].tolist()]
    [0.85, 0.85]

    Args:
      tx: `jopt.schedule_free_adamw` or `schedule_free_sgd`; a `jopt.chain` that ends with it; `jopt.param_groups` of
        it, where groups of other optimizers stay.
      params: what is trained.
      state: of `tx`. What stands in a state of optax, as that of `optax.MultiSteps`, is given with its own `tx`.

    Raises:
      TypeError: another optimizer, or no state of it.
    """
    if isinstance(tx, Chain) and isinstance(state, tuple) and len(state) == len(tx.transforms):
        return schedule_free_eval(tx.transforms[-1], params, state[-1])
    if isinstance(tx, Groups) and isinstance(state, GroupsState):
        return tx.mapped(_of_group, params, state)
    rule = getattr(tx, "rule", None)
    if not isinstance(tx, Transform) or not isinstance(rule, ScheduleFree) or not isinstance(state, State):
        raise TypeError(
            "tx: expected jopt.schedule_free_adamw or schedule_free_sgd and its state, found "
            f"{type(rule or tx).__name__} and {type(state).__name__}; of a chain of optax's take the part"
        )
    name = rule.averaged_by
    given: Any = state.hyperparams.get(name, state.scheduled.get(name, tx.hyperparameters[name]))
    momentum = at_count(name, given, jnp.maximum(state.count - 1, 0)) if callable(given) else given
    leaves, treedef = jax.tree.flatten(params)
    found = []
    for y, z, step in zip(leaves, treedef.flatten_up_to(state.slots["z"]), state.scalars["step"], strict=True):
        weight = jnp.asarray(1 - 1 / momentum).astype(t.compute_dtype(y.dtype))
        found.append(jnp.where(step > 0, t.lerp(y, z.astype(y.dtype), weight), y))
    return treedef.unflatten(found)


def _of_group(tx: Any, params: Tree, state: Any) -> Tree:
    end = tx.transforms[-1] if isinstance(tx, Chain) else tx
    averages = isinstance(end, Transform) and isinstance(end.rule, ScheduleFree)
    return schedule_free_eval(tx, params, state) if averages else params
