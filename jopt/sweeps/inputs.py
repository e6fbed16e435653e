"""What a sweep is given: checked, and in one form."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jopt import optimizers
from jopt.arena import path_name
from jopt.around import chaining
from jopt.lbfgs import LBFGS, lbfgs
from jopt.rule import is_number
from jopt.sweeps.result import Sweep, collect
from jopt.transform import Transform, check_array

Tree = Any
Make = Callable[..., Any]  # hyperparameters by name -> transformation

BLOCK = 2**28  # bytes of batches at once, where a function makes them


# --- what is swept ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every optimizer with every setting and every seed."""

    optimizers: Mapping[str, Make]
    settings: tuple[Mapping[str, Any], ...]
    seeds: tuple[int, ...]
    divergence: float

    def rows(self) -> list[tuple[Mapping[str, Any], int]]:
        """An optimizer's runs: the setting, and the seed's position."""
        return list(itertools.product(self.settings, range(len(self.seeds))))

    def result(self, losses: np.ndarray) -> Sweep:
        """Of losses by optimizer and row, (runs, steps)."""
        pairs = list(itertools.product(self.optimizers, self.settings))
        return collect([name for name, _ in pairs], [s for _, s in pairs], self.seeds, losses, self.divergence)


def make_plan(
    optimizers: Any,
    lr: Sequence[float],
    seeds: int | Sequence[int],
    schedule: Callable[[Any], Any] | None,
    divergence: float,
    chunk: int | None,
    hyperparameters: Mapping[str, Sequence[Any]],
) -> Plan:
    """The checked plan. Makes every optimizer with every setting once: it knows its numbers' ranges."""
    if schedule is not None:
        check_function("schedule", schedule)
    if not is_number(divergence) or not divergence > 1:
        raise ValueError(f"divergence: expected a multiple above 1, found {divergence!r}")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk: expected a number of runs, at least 1, found {chunk!r}")
    grids = {name: grid(name, values) for name, values in {**hyperparameters, "lr": lr}.items()}
    settings = tuple(dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values()))
    makes = named(optimizers)
    for (name, make), setting in itertools.product(makes.items(), settings):
        check_transformation(name, make(**setting))
    return Plan(makes, settings, which_seeds(seeds), float(divergence))


def grid(name: str, values: Any) -> list[Any]:
    """A grid's values, as Python's numbers or tuples of them."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of numbers, found {values!r:.80}")
    result = []
    for value in values:
        members = value if isinstance(value, tuple) else (value,)
        members = tuple(
            x.item() if isinstance(x, np.generic | np.ndarray | Array) and not x.ndim else x for x in members
        )
        for x in members:
            if not is_number(x):
                raise TypeError(
                    f"{name}: expected numbers, or tuples of them, found {x!r:.80}; what is no number is an argument "
                    "of another optimizer: functools.partial(jopt.sgd, nesterov=True)"
                )
            if not math.isfinite(x):
                raise ValueError(f"{name}: expected finite numbers, found {x}")
        result.append(tuple(map(float, members)) if isinstance(value, tuple) else float(members[0]))
    if not result:
        raise ValueError(f"{name}: expected at least one value, found none")
    if len(set(result)) < len(result):
        raise ValueError(f"{name}: expected different values, found {result!r:.80}")
    return result


def named(given: Any) -> dict[str, Make]:
    """The optimizers by label."""
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        several = isinstance(given, list | tuple) and not chaining.is_transformation(given)
        items = given if several else [given]
        pairs = [(_label(item), item) for item in items]
    if not pairs:
        raise ValueError("optimizers: expected at least one, found none")
    makes: dict[str, Make] = {}
    for name, item in pairs:
        if isinstance(item, str):
            if item not in _BY_NAME:
                raise ValueError(f"optimizers: expected one of {', '.join(_BY_NAME)}, or a function, found {item!r}")
            item = _BY_NAME[item]
        if not callable(item) or chaining.is_transformation(item):
            raise TypeError(
                f"optimizers: expected names or functions of lr such as jopt.adamw, found {type(item).__name__} "
                f"{item!r:.60}; functools.partial(jopt.sgd, momentum=0.9) gives arguments"
            )
        if name in makes:
            raise ValueError(f"optimizers: {name!r} is there twice; give a mapping from labels to functions")
        makes[str(name)] = item
    return makes


_BY_NAME = {name: x for name, x in vars(optimizers).items() if isinstance(x, FunctionType)} | {"lbfgs": lbfgs}


def _label(item: Any) -> str:
    if isinstance(item, functools.partial):
        arguments = [*map(str, item.args), *(f"{k}={v}" for k, v in item.keywords.items())]
        return f"{_label(item.func)}({', '.join(arguments)})"
    return item if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)


def check_transformation(name: str, tx: Any) -> None:
    if isinstance(tx, LBFGS):
        raise TypeError(f"optimizers: {name} evaluates the loss as often as it likes, which many runs cannot share")
    if not chaining.is_transformation(tx):
        raise TypeError(f"optimizers: expected {name} to return a gradient transformation, found {type(tx).__name__}")
    if isinstance(tx, Transform) and tx.rule.scope == "rows":
        raise TypeError(f"optimizers: {name} takes sparse gradients, which jax.grad does not give")


def which_seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool):
        if seeds < 1:
            raise ValueError(f"seeds: expected at least one, found {seeds}")
        return tuple(range(seeds))
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        raise TypeError(f"seeds: expected how many or a sequence of integers, found {seeds!r:.80}")
    result = []
    for seed in seeds:
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
            raise TypeError(f"seeds: expected integers, found {seed!r:.80}")
        result.append(int(seed))
    if not result or len(set(result)) < len(result):
        raise ValueError(f"seeds: expected one or more different integers, found {result!r:.80}")
    return tuple(result)


def check_function(name: str, f: Any) -> None:
    if not callable(f):
        raise TypeError(f"{name}: expected a function, found {type(f).__name__} {f!r:.60}")


# --- batches ----------------------------------------------------------------------------------------


class Batches:
    """The data by step, whatever form it came in. Floating leaves are checked to be finite."""

    def __init__(self, given: Any, steps: int | None, convert: Callable[[Any], Any] = np.asarray):
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"steps: expected at least 1, found {steps!r}")
        self._make: Callable[[int], Tree] | None = None
        self._convert = convert
        if isinstance(given, list) or (
            isinstance(given, Iterable) and not hasattr(given, "shape") and jax.tree_util.all_leaves([given])
        ):
            listed = [self._checked(i, batch) for i, batch in enumerate(itertools.islice(given, steps))]
            if not listed:
                raise ValueError("batches: expected at least one, found none")
            self._make, self.steps = listed.__getitem__, self._enough(len(listed), steps)
        elif callable(given):
            if steps is None:
                raise ValueError("steps: expected how many, since batches is a function")
            self._make, self.steps = lambda i: self._checked(i, given(i)), steps
        else:
            stacked = jax.tree.map(convert, given)
            lengths = {
                f"batches{jax.tree_util.keystr(path)}": len(x) if x.ndim else 0
                for path, x in jax.tree_util.tree_leaves_with_path(stacked)
            }
            if len(set(lengths.values())) != 1 or 0 in lengths.values():
                found = ", ".join(f"{n} of {name}" for name, n in lengths.items())
                raise ValueError(
                    "batches: expected arrays stacked along a first axis of steps, as many in each, found "
                    f"{found or 'no array'}; a list has one batch an element"
                )
            self.steps = self._enough(next(iter(lengths.values())), steps)
            self._stacked = jax.tree.map(lambda x: x[: self.steps], stacked)
            _check_finite("batches", self._stacked, stacked=True)

    def __getitem__(self, i: int) -> Tree:
        return jax.tree.map(lambda x: x[i], self._stacked) if self._make is None else self._make(i)

    def blocks(self) -> Iterable[tuple[Tree, int]]:
        """Stacked batches and how many of them count: all that there are, or as many as fit, the last ones padded."""
        if self._make is None:
            yield self._stacked, self.steps
            return
        first = self[0]
        size = max(1, sum(np.asarray(x).nbytes for x in jax.tree.leaves(first)))
        length = min(self.steps, max(1, BLOCK // size))
        for i in range(0, self.steps, length):
            block = [first if j == 0 else self[j] for j in range(i, min(i + length, self.steps))]
            for j, batch in enumerate(block):
                check_same("batches", "at step 0", first, f"at step {i + j}", batch)
            n = len(block)
            block += [block[-1]] * (length - n)
            yield jax.tree.map(lambda *xs: np.stack(xs), *block), n

    def _checked(self, i: int, batch: Tree) -> Tree:
        batch = jax.tree.map(self._convert, batch)
        _check_finite(f"batches at step {i}", batch, stacked=False)
        return batch

    @staticmethod
    def _enough(found: int, steps: int | None) -> int:
        if steps is not None and found < steps:
            raise ValueError(f"batches: expected {steps}, one a step, found {found}")
        return steps or found


def _check_finite(name: str, tree: Tree, *, stacked: bool) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all():
            where = ""
            if stacked:
                where = f" at step {int(np.argmin(np.isfinite(x).reshape(len(x), -1).all(1)))}"
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected finite numbers, found nan or infinity{where}"
            )


def check_same(what: str, name: str, a: Tree, other: str, b: Tree) -> None:
    """Raise ValueError unless both trees have the structure, shapes and types of each other."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            f"{what}: expected one structure, found {jax.tree.structure(a)} {name}, {jax.tree.structure(b)} {other}"
        )
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)}: expected one shape and type, found {x.dtype}{list(x.shape)} "
                f"{name}, {y.dtype}{list(y.shape)} {other}"
            )


# --- parameters and loss ----------------------------------------------------------------------------


def start(init: Callable[[Array], Tree], seed: int) -> Tree:
    params = init(jax.random.key(seed))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"init: expected a tree of arrays, found {params!r:.80}")
    for path, leaf in leaves:
        check_array(f"init's {path_name(path) or 'result'}", leaf)
    params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf).all():
            raise ValueError(f"init's {path_name(path) or 'result'}: expected finite numbers, found nan or infinity")
    return params


def check_loss(loss: Callable[[Tree, Tree], Any], params: Tree, batch: Tree) -> None:
    found = jax.eval_shape(loss, params, batch)
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise TypeError(f"loss: expected one 0-d array, found {jax.tree.structure(found)}; return no auxiliary values")
    if found.shape != () or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"loss: expected a real 0-d array, found {found.dtype} of shape {found.shape}; take its mean")
