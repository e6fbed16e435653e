"""A group of a wrapped optimizer: its transformation, and where its state lies among torch's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from optax.contrib import ScheduleFreeState, schedule_free_eval_params
from torch import Tensor

from interop.dropin.groups import as_number
from interop.memory import HOST
from interop.memory.values import Apart, to_jax, to_torch
from interop.wrapping.elsewhere import Elsewhere, value_of
from jopt._compat import enable_x64
from jopt.arena import path_name
from jopt.around import chaining
from jopt.transform import Exact

NAMES = {"learning_rate": "lr"}  # optax's names of hyperparameters -> torch's
PAIRS = [("b1", "b2"), ("beta1", "beta2")]  # shown as torch's "betas"
# What is not for the transformation: torch's own, and what its schedulers keep in the groups.
UNREAD = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")


def nodes(tree: Any, kind: type) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]


@contextlib.contextmanager
def settings(params: Iterable[Tensor]) -> Iterator[None]:
    """JAX's settings for optax's code: on the CPU, types and ranks may mix, 64 bits only where such arrays are."""
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
    with (
        enable_x64(wide or jax.config.read("jax_enable_x64")),
        jax.default_device(HOST.jax_device),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a transformation's state, and where torch finds it."""

    key: str
    owner: str | None  # the parameter that it belongs to; None if it is the group's
    spec: jax.ShapeDtypeStruct
    impl: Any = None  # of a random key, of which torch sees the data
    hyperparameter: str | None = None
    scheduled: bool = False  # a hyperparameter that a schedule sets

    @property
    def stored(self) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and type of torch's tensor for it."""
        spec = self.spec if self.impl is None else jax.eval_shape(jax.random.key_data, self.spec)
        return tuple(spec.shape), _torch_dtype(np.dtype(spec.dtype))

    def array(self, x: Tensor) -> jax.Array:
        array = to_jax(x, copy=None)
        return array if self.impl is None else jax.random.wrap_key_data(array, impl=self.impl)

    def tensor(self, x: jax.Array) -> Tensor:
        return to_torch(x if self.impl is None else jax.random.key_data(x), copy=None)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A transformation, for copying and pickling its optimizer: a copy shares it, and few can be pickled."""

    tx: Any

    def __deepcopy__(self, memo: Any) -> Saved:
        return self

    def __reduce__(self) -> Any:
        try:
            pickle.dumps(self.tx)
        except Exception as error:
            raise TypeError(
                f"an optimizer of interop.wrap cannot be saved whole: its transformation is made of functions that "
                f"Python does not save ({error}). Save its state_dict(); to go on, wrap the same transformation around "
                "the parameters and call load_state_dict()"
            ) from error
        return Saved, (self.tx,)


class Group:
    """A parameter group's transformation: its compiled functions and the shape of its state."""

    def __init__(self, tx: optax.GradientTransformation, names: tuple[str, ...]):
        self.tx = tx
        self.names = names
        self.shown: set[str] = set()  # the group's entries that are hyperparameters
        self.scheduled: dict[str, Any] = {}  # those that a schedule sets, as they were last shown; unknown after a load
        self._start()

    def _start(self) -> None:
        self._layouts: dict[Any, tuple[list[Leaf], Any]] = {}
        self._init = jax.jit(self.tx.init)
        self._update = jax.jit(self._updated, static_argnums=(0, 1))
        self._evaluate: Callable[..., Any] | None = None  # the loss and gradients elsewhere, while a step runs

    def __getstate__(self) -> dict[str, Any]:
        return {"tx": Saved(self.tx), "names": self.names, "shown": self.shown}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"tx": state["tx"].tx, "scheduled": {}})
        self._start()

    # --- what the state looks like

    def layout(self, params: dict[str, Any]) -> tuple[list[Leaf], Any]:
        """The state's leaves in order, and its structure, for parameters of these shapes."""
        signature = tuple((name, x.shape, x.dtype) for name, x in params.items()), jax.config.read("jax_enable_x64")
        if signature not in self._layouts:
            impls: list[Any] = []

            def init(params: Any) -> Any:
                state = self.tx.init(params)
                impls.extend(jax.random.key_impl(x) if _is_key(x) else None for x in jax.tree.leaves(state))
                return state

            state = jax.eval_shape(init, params)
            leaves = [
                dataclasses.replace(leaf, impl=impl) for leaf, impl in zip(self._leaves(state), impls, strict=True)
            ]
            shown = [leaf.hyperparameter for leaf in leaves if leaf.hyperparameter]
            if twice := {name for name in shown if shown.count(name) > 1}:
                raise ValueError(
                    f"tx: hyperparameter {sorted(twice)[0]!r} is in its state twice; inject each name in one place"
                )
            self._layouts[signature] = leaves, jax.tree.structure(state)
        return self._layouts[signature]

    def _leaves(self, state: Any) -> Iterator[Leaf]:
        names = set(self.names)

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
                key = path_name(path)
                parents = [getattr(entry, "name", None) for entry in path[-2:-1]]
                numeric = node.shape == () and jnp.issubdtype(node.dtype, jnp.number)
                shown = numeric and parents in (["hyperparams"], ["scheduled"])
                name = str(path[-1].key) if shown else ""
                yield Leaf(key, None, node, None, NAMES.get(name, name) or None, name in scheduled)
                continue
            for owner in sorted(node):
                for subpath, leaf in jax.tree_util.tree_leaves_with_path(node[owner]):
                    yield Leaf(path_name((*path, *subpath)), owner, leaf)

    def show(self, group: dict[str, Any]) -> None:
        """Put the hyperparameters of a fresh state into the group, where it does not set them itself."""
        params = self.arrays(group["params"])
        leaves, _ = self.layout(params)
        wanted = [i for i, leaf in enumerate(leaves) if leaf.hyperparameter]
        values = jax.jit(lambda params: [jax.tree.leaves(self.tx.init(params))[i] for i in wanted])(params)
        self._show(group, [(leaves[i], x) for i, x in zip(wanted, values, strict=True)], fresh=True)

    def _show(self, group: dict[str, Any], values: list[tuple[Leaf, Any]], *, fresh: bool = False) -> None:
        shown: dict[str, Any] = {str(leaf.hyperparameter): _number(x) for leaf, x in values}
        self.scheduled = {str(leaf.hyperparameter): _number(x) for leaf, x in values if leaf.scheduled}
        for pair in PAIRS:
            if all(name in shown for name in pair):
                shown["betas"] = tuple(shown.pop(name) for name in pair)
        self.shown = set(shown)
        for name, value in shown.items():
            if fresh:
                group.setdefault(name, value)
            elif isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = value

    def check(self, index: int, group: dict[str, Any]) -> None:
        """Raise ValueError for a number that nothing would read, or that is missing; TypeError for what is none."""
        for name, value in group.items():
            if name not in self.shown and name not in UNREAD and _is_numeric(value):
                raise ValueError(
                    f"param_groups[{index}][{name!r}]: found {value!r}, which the transformation does not keep in its "
                    f"state, so that nothing would read it (it keeps {sorted(self.shown) or 'no hyperparameters'}); "
                    f"wrap it as optax.inject_hyperparams(...)(...), or give the group a 'tx' of its own"
                )
        given = self._given(group, f"param_groups[{index}]")
        for name, value in self.scheduled.items():
            if not math.isclose(given[name], value, rel_tol=1e-6):  # a tensor's type may be narrower
                raise ValueError(
                    f"param_groups[{index}]: found {name} of {given[name]}, which the transformation's own schedule "
                    f"sets, to {value} now, so that nothing would read it; wrap a transformation made with a number, "
                    "and let a torch scheduler set it, or give the group a 'tx' of its own"
                )

    def _given(self, group: dict[str, Any], place: str = "param_groups") -> dict[str, float]:
        """The hyperparameters that the group sets, taken apart."""
        given: dict[str, float] = {}
        for name in self.shown:
            if name not in group:
                raise ValueError(f"{place}: expected {name!r}, which the transformation keeps, found {sorted(group)}")
            value, parts = group[name], [(name,)]
            if name == "betas":
                parts = PAIRS
                if not isinstance(value, tuple | list) or len(value) != 2:
                    raise ValueError(f"{place}['betas']: expected 2 numbers, found {value!r}")
            try:
                for part in parts:
                    given |= zip(part, map(as_number, value if name == "betas" else [value]), strict=True)
            except TypeError as error:
                raise TypeError(f"{place}[{name!r}]: {error}") from error
        return given

    # --- values

    def arrays(self, tensors: Iterable[Tensor], copy: bool | None = None) -> dict[str, jax.Array]:
        return {name: to_jax(x, copy=copy) for name, x in zip(self.names, tensors, strict=True)}

    def _tensors(self, optimizer: Any, group: dict[str, Any], leaves: list[Leaf]) -> list[Tensor | None] | None:
        """torch's state, leaf by leaf; None in place of hyperparameters; None if the group has none yet."""
        states = {name: optimizer.state.get(p, {}) for name, p in zip(self.names, group["params"], strict=True)}
        if not any(states.values()):
            return None
        found: list[Tensor | None] = []
        for leaf in leaves:
            if leaf.hyperparameter:
                found.append(None)
                continue
            owner = self.names[0] if leaf.owner is None else leaf.owner
            x = states[owner].get(leaf.key)
            shape, dtype = leaf.stored
            if not isinstance(x, Tensor) or tuple(x.shape) != shape or x.dtype is not dtype:
                what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
                raise ValueError(
                    f"the state of parameter {owner!r}: expected {leaf.key!r} of {dtype}, shape {shape}, found {what}; "
                    "load a state that the same transformation made of the same parameters"
                )
            found.append(x)
        return found

    def state(self, optimizer: Any, group: dict[str, Any], params: dict[str, jax.Array]) -> Any:
        """The transformation's own state; None before the first step."""
        leaves, treedef = self.layout(params)
        tensors = self._tensors(optimizer, group, leaves)
        if tensors is None:
            return None
        return self._joined(
            group, leaves, treedef, [x if x is None else leaf.array(x) for leaf, x in zip(leaves, tensors, strict=True)]
        )

    def _joined(self, group: dict[str, Any], leaves: list[Leaf], treedef: Any, arrays: Iterable[Any]) -> Any:
        """The state of these arrays, with the group's hyperparameters."""
        given = self._given(group)
        return treedef.unflatten(
            [
                jnp.asarray(given[leaf.hyperparameter], leaf.spec.dtype) if leaf.hyperparameter else x
                for leaf, x in zip(leaves, arrays, strict=True)
            ]
        )

    def evaluation(self, state: ScheduleFreeState, params: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        y = self.arrays(params)
        x = schedule_free_eval_params(state, y)
        for name, p in zip(self.names, params, strict=True):
            yield p, to_torch(x[name].astype(y[name].dtype))

    # --- the step

    def step(
        self, optimizer: Any, index: int, grads: list[Tensor | None], closure: Any, loss: Any, extra: dict[str, Any]
    ) -> None:
        group = optimizer.param_groups[index]
        copy = True if closure is not None else None  # the closure, called from inside, writes parameters and gradients
        params = self.arrays(group["params"], copy)
        leaves, treedef = self.layout(params)
        state = self.state(optimizer, group, params)
        if state is None:
            state = self._joined(group, leaves, treedef, jax.tree.leaves(self._init(params)))
        gradients = {
            name: jnp.zeros_like(params[name]) if grad is None else to_jax(grad, copy=copy)
            for name, grad in zip(self.names, grads, strict=True)
        }
        given = {name: grad is not None for name, grad in zip(self.names, grads, strict=True)}
        active = None if all(given.values()) else given
        functions = {k: x for k, x in extra.items() if callable(x)}
        arrays = {
            k: jax.tree.map(lambda x: to_jax(x) if isinstance(x, Tensor) else jnp.asarray(x), x)
            for k, x in extra.items()
            if k not in functions
        }
        if loss is not None:
            arrays.setdefault("value", jnp.asarray(float(loss)))
        elsewhere = Elsewhere(closure, dict(zip(self.names, group["params"], strict=True)))
        self._evaluate = elsewhere
        try:
            new_params, new_state = jax.block_until_ready(
                self._update(closure is not None, tuple(functions.items()), gradients, active, state, params, arrays)
            )
        except BaseException as error:
            elsewhere.restore()
            if elsewhere.error is not None:
                raise elsewhere.error from error
            raise
        finally:
            self._evaluate = None
        self._put(optimizer, group, grads, params, new_params, leaves, jax.tree.leaves(new_state))

    def _updated(
        self, has_closure: bool, functions: Any, grads: Any, active: Any, state: Any, params: Any, arrays: Any
    ) -> tuple[Any, Any]:
        """One update, to be compiled. `active` is None where every parameter has a gradient."""
        value = {"value": arrays.pop("value")} if "value" in arrays else {}
        offered = value
        if has_closure:
            # optax's line searches refuse arguments that value_fn does not take, of those too that it has no use for.
            def value_fn(params: Any, grad_fn: Any = None) -> jax.Array:
                return value_of(lambda x: self._evaluate(x), params)  # type: ignore[misc]

            offered = value | {"grad": grads, "value_fn": value_fn, "grad_fn": lambda x, _: jax.grad(value_fn)(x)}
        if isinstance(self.tx, Exact):
            extra = offered | dict(functions) | arrays
            return chaining.step(self.tx, grads, state, params, active=active, **extra)
        update = optax.with_extra_args_support(self.tx).update
        taken = inspect.signature(update).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            offered = {name: x for name, x in offered.items() if name in taken}
        updates, state = update(grads, state, params, **(offered | dict(functions) | arrays))
        return optax.apply_updates(params, updates), state

    def _put(
        self,
        optimizer: Any,
        group: dict[str, Any],
        grads: list[Tensor | None],
        old_params: dict[str, jax.Array],
        params: Any,
        leaves: list[Leaf],
        state: list[jax.Array],
    ) -> None:
        """Write a step's results into torch's parameters, state and group."""
        stepped = {name for name, grad in zip(self.names, grads, strict=True) if grad is not None}
        first_time = not any(optimizer.state.get(p) for p in group["params"])
        by_name = dict(zip(self.names, group["params"], strict=True))
        apart = Apart(old_params.values())
        values = []
        for leaf, x in zip(leaves, state, strict=True):
            if leaf.hyperparameter:
                values.append((leaf, x))
            elif leaf.owner is None or leaf.owner in stepped or first_time:
                owner = by_name[self.names[0] if leaf.owner is None else leaf.owner]
                optimizer.state[owner][leaf.key] = apart(leaf.tensor(x))
        for name in stepped:
            by_name[name].copy_(to_torch(params[name], copy=None))
        if values:
            self._show(group, values)


def _is_numeric(x: Any) -> bool:
    """Whether it is a number, or some, as betas are."""
    if isinstance(x, tuple | list):
        return any(map(_is_numeric, x))
    return isinstance(x, float | int | Tensor | jax.Array | np.ndarray | np.number) and not isinstance(x, bool)


def _number(x: Any) -> float:
    """A hyperparameter as the shortest number that is the same in its type."""
    return float(str(np.asarray(x).astype(np.float32))) if x.dtype == jnp.float32 else np.asarray(x).item()


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@functools.cache
def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return to_torch(jnp.zeros((), dtype)).dtype
