"""What a transformation's state looks like, and where torch finds each of its arrays."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor

from interop.memory import HOST, Device, device_of
from interop.memory.tensors import DTYPES, torch_dtype
from jopt.arena import path_name

NAMES = {"learning_rate": "lr"}  # optax's names of hyperparameters -> torch's


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a transformation's state.

    Attributes:
      key: its path in the state, under which torch finds it.
      owner: the parameter that it belongs to; None if it is the group's.
      shape, dtype, torch_dtype: of what torch sees.
      hyperparameter: the group's entry that shows it, in the state's place.
      scheduled: it is a hyperparameter that a schedule sets.
      impl: of a random key, of which torch sees the data.
    """

    key: str
    owner: str | None
    shape: tuple[int, ...]
    dtype: np.dtype
    torch_dtype: torch.dtype
    hyperparameter: str | None
    scheduled: bool
    impl: Any = None


class Layout:
    """Of a transformation's state, for parameters of certain shapes and types.

    Attributes:
      device: where the parameters are stepped.
      specs: the parameters' shapes and types.
      by_dtype: of each type, the indices of the parameters that have elements.
      leaves: the state's, in order.
      arrays, numbers: those of them that are torch's state, and that are hyperparameters.
    """

    def __init__(self, tx: optax.GradientTransformation, names: Sequence[str], params: Sequence[Tensor]):
        self._seen = _look(params)
        device = _device(params)
        self.device = device.of_size(sum(x.numel() for x in params))
        self.specs = [jax.ShapeDtypeStruct(tuple(x.shape), DTYPES[x.dtype]) for x in params]
        self.by_dtype: dict[np.dtype, list[int]] = {}
        for i, spec in enumerate(self.specs):
            if spec.size:
                self.by_dtype.setdefault(spec.dtype, []).append(i)
        impls: list[Any] = []  # which shapes do not tell

        def init(params: Any) -> Any:
            state = tx.init(params)
            impls.extend(jax.random.key_impl(x) if _is_key(x) else None for x in jax.tree.leaves(state))
            return state

        state = jax.eval_shape(init, dict(zip(names, self.specs, strict=True)))
        self._treedef = jax.tree.structure(state)
        leaves = zip(_leaves(state, set(names)), impls, strict=True)
        self.leaves = [dataclasses.replace(leaf, impl=impl) for leaf, impl in leaves]
        self.arrays = [leaf for leaf in self.leaves if not leaf.hyperparameter]
        self.numbers = [leaf for leaf in self.leaves if leaf.hyperparameter]
        shown = [leaf.hyperparameter for leaf in self.numbers]
        if twice := {str(name) for name in shown if shown.count(name) > 1}:
            raise ValueError(f"tx: hyperparameter {min(twice)!r} is in its state twice; inject each name in one place")

    def is_for(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters have these shapes and types, and JAX its setting of 64 bits."""
        return self._seen == _look(params)

    def parted(self, state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """A state's arrays, as torch sees them, and its hyperparameters."""
        arrays, numbers = [], []
        for leaf, x in zip(self.leaves, jax.tree.leaves(state), strict=True):
            x = x if leaf.impl is None else jax.random.key_data(x)
            (numbers if leaf.hyperparameter else arrays).append(x)
        return arrays, numbers

    def joined(self, arrays: Iterable[Any], numbers: Iterable[Any]) -> Any:
        """The state that these are the parts of."""
        array, number = iter(arrays), iter(numbers)
        found = []
        for leaf in self.leaves:
            x = next(number if leaf.hyperparameter else array)
            found.append(x if leaf.impl is None else jax.random.wrap_key_data(x, impl=leaf.impl))
        return self._treedef.unflatten(found)


def _device(params: Sequence[Tensor]) -> Device:
    """The one device that they lie on."""
    found = list(dict.fromkeys(x.device for x in params))
    if len(found) > 1:
        raise TypeError(
            f"params: expected the parameters of a group on one device, found {found}; give each device a group of its "
            "own"
        )
    return (device_of(found[0]) if found else None) or HOST


def _look(params: Sequence[Tensor]) -> Any:
    dtypes = list(map(_dtype_of, params))
    return (
        list(map(_shape_of, params)),
        dtypes,
        list(map(_device_of, params)),
        is_wide(dtypes) or jax.config.read("jax_enable_x64"),
    )


def is_wide(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether JAX has to have its 64 bits on for them."""
    return not _WIDE.isdisjoint(dtypes)


_WIDE = frozenset((torch.float64, torch.complex128))


_shape_of, _dtype_of, _device_of = map(operator.attrgetter, ("shape", "dtype", "device"))


def _leaves(state: Any, names: set[str]) -> Iterator[Leaf]:
    def by_parameter(x: Any) -> bool:
        return type(x) is dict and x.keys() == names

    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=by_parameter)
    # jopt's states keep what a schedule sets apart; optax's keep a state of each schedule.
    scheduled = {
        str(name.key)
        for path, _ in nodes
        for field, name in itertools.pairwise(path)
        if getattr(field, "name", None) in ("scheduled", "hyperparams_states")
    }
    for path, node in nodes:
        if not by_parameter(node):
            parents = [getattr(entry, "name", None) for entry in path[-2:-1]]
            numeric = node.shape == () and jnp.issubdtype(node.dtype, jnp.number)
            shown = numeric and parents in (["hyperparams"], ["scheduled"])
            name = str(path[-1].key) if shown else ""
            yield _leaf(path, None, node, NAMES.get(name, name) or None, name in scheduled)
            continue
        for owner in sorted(node):
            for subpath, x in jax.tree_util.tree_leaves_with_path(node[owner]):
                yield _leaf((*path, *subpath), owner, x)


def _leaf(path: Any, owner: str | None, x: Any, hyperparameter: str | None = None, scheduled: bool = False) -> Leaf:
    x = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    dtype = np.dtype(x.dtype)
    return Leaf(path_name(path), owner, tuple(x.shape), dtype, torch_dtype(dtype), hyperparameter, scheduled)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
