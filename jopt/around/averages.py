"""Averages of parameters over steps, as torch.optim.swa_utils keeps them.

Source: torch/optim/swa_utils.py.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jopt import numerics
from jopt.valued import by_value

Tree = Any


class AverageState(NamedTuple):
    """How many parameters were averaged, int32, and their average, a tree like them."""

    n_averaged: Array
    params: Tree


@by_value
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Average:
    """What `jopt.ema` and `jopt.swa` make: `init(params)` and `update(params, state)`, pure and jittable."""

    decay: float | Array | None  # None: every update counts the same

    def init(self, params: Tree) -> AverageState:
        """A copy of the parameters, averaged over none."""
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.array(x, copy=True), params))

    def update(self, params: Tree, state: AverageState) -> AverageState:
        """The average with these parameters in it. The first update is the parameters themselves.

        Raises:
          ValueError: `params` is not like the parameters of `init`.
        """
        treedef = jax.tree.structure(state.params)
        if jax.tree.structure(params) != treedef:
            raise ValueError(f"params: expected the structure {treedef}, found {jax.tree.structure(params)}")
        averages = jax.tree_util.tree_leaves_with_path(state.params)
        for (path, a), p in zip(averages, jax.tree.leaves(params), strict=True):
            if a.shape != jnp.shape(p) or a.dtype != jnp.result_type(p):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)}: expected {a.dtype} of shape {a.shape}, as its average is, "
                    f"found {jnp.result_type(p)} of shape {jnp.shape(p)}; init begins an average anew"
                )
        params = jax.tree.map(jnp.asarray, params)
        dtypes = [x.dtype for x in jax.tree.leaves(state.params) if jnp.issubdtype(x.dtype, jnp.inexact)]
        number = numerics.in_double(self._number, (), state.n_averaged, dtype=numerics.widest(dtypes))
        first = state.n_averaged == 0
        return AverageState(
            state.n_averaged + 1,
            jax.tree.map(lambda a, p: jnp.where(first, p, self._towards(a, p, number)), state.params, params),
        )

    def _number(self, _: Any, n_averaged: Array) -> Array:
        """The weight of the new parameters; for a plain mean, the number that their difference is divided by."""
        return n_averaged + 1 if self.decay is None else 1 - jnp.asarray(self.decay, jnp.float64)

    def _towards(self, average: Array, param: Array, number: Array) -> Array:
        if not jnp.issubdtype(average.dtype, jnp.inexact):
            weight = 1 / number if self.decay is None else number
            mean = average.astype(weight.dtype) * (1 - weight) + param.astype(weight.dtype) * weight
            return jnp.trunc(mean).astype(average.dtype)
        number = number.astype(numerics.compute_dtype(average.dtype))
        if self.decay is None:
            difference = numerics.add(param, average, -jnp.ones_like(number))
            return numerics.add(average, numerics.div(difference, number))
        return numerics.lerp(average, param, number)


def ema(decay: float | Array = 0.999) -> Average:
    """average + (1 - decay) * (params - average): `AveragedModel` with `get_ema_multi_avg_fn(decay)`.

    >>> import jax.numpy as jnp, jopt
    >>> average = jopt.ema(0.75)
    >>> state = average.init(jnp.zeros(()))
    >>> for value in (1.0, 2.0):
    ...     state = average.update(jnp.asarray(value), state)
    >>> state.params.item()
    1.25

    In a training step call it after `tx.step`, in the same jitted function: XLA then makes one pass of the two.

    Raises:
      ValueError: a decay outside 0 to 1, with torch's text.
    """
    if isinstance(decay, numbers.Real) and not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")
    return Average(decay)


def swa() -> Average:
    """The mean of all parameters that it was updated with: stochastic weight averaging, `AveragedModel` as it comes.

    >>> import jax.numpy as jnp, jopt
    >>> average = jopt.swa()
    >>> state = average.init(jnp.zeros(()))
    >>> for value in (1.0, 2.0, 6.0):
    ...     state = average.update(jnp.asarray(value), state)
    >>> state.params.item()
    3.0
    """
    return Average(None)


def update_bn(statistics: Callable[[Any], Tree], batches: Iterable[Any]) -> Tree:
    """Batch norm's running statistics for averaged weights: the mean of each batch's, as torch's `update_bn`.

    Args:
      statistics: from a batch to a tree of its statistics under the averaged weights (for each batch norm the mean
        and the unbiased variance of its input over the batch). Jit it.
      batches: at least one.

    >>> import jax.numpy as jnp, jopt
    >>> stats = lambda x: {"mean": x.mean(0), "var": x.var(0, ddof=1)}
    >>> jopt.update_bn(stats, [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])])["mean"].item()
    4.0

    Raises:
      ValueError: no batch.
    """
    mean: Tree = None
    n = 0
    for n, batch in enumerate(batches, 1):
        found = statistics(batch)
        mean = found if n == 1 else jax.tree.map(lambda m, x, w=1 / n: w * x + (1 - w) * m, mean, found)
    if not n:
        raise ValueError("batches: expected at least one, found none")
    return mean
