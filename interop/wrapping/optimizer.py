"""Any optax transformation as a torch optimizer.

Each parameter group is stepped by one compiled call of `update` over a dictionary of its parameters by name. Between
steps the state lies in `optimizer.state` as torch tensors, where torch's checkpoints find it: what belongs to a
parameter with that parameter, the rest (counts, keys) with the group's first one, as torch.optim.LBFGS does. What
`optax.inject_hyperparams` keeps in the state is shown as the group's entries instead, where torch's schedulers are.
"""

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

from interop.dropin.groups import as_number, parameter_name
from interop.dropin.host import check_process, undynamo
from interop.dropin.state import KeepsWideState
from interop.memory import HOST, check, check_parameter
from interop.memory.tensors import in_type_of
from interop.memory.values import Apart, to_jax, to_torch
from jopt._compat import enable_x64
from jopt.arena import path_name
from jopt.around import chaining
from jopt.around.chaining import is_transformation
from jopt.transform import Exact

NAMES = {"learning_rate": "lr"}  # optax's names of hyperparameters -> torch's
PAIRS = [("b1", "b2"), ("beta1", "beta2")]  # shown as torch's "betas"
# What is not for the transformation: torch's own, and what its schedulers keep in the groups.
UNREAD = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")


def wrap(
    tx: optax.GradientTransformation, params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
) -> WrappedOptimizer:
    """A torch optimizer that steps its parameters by an optax transformation: p + tx.update(gradients, state, p).

    >>> import optax, torch, interop
    >>> model = torch.nn.Linear(2, 1)
    >>> tx = optax.inject_hyperparams(optax.lion)(learning_rate=1e-3)
    >>> optimizer = interop.wrap(tx, model.named_parameters())
    >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> scheduler.step()
    >>> optimizer.param_groups[0]["lr"], list(optimizer.state[model.weight])
    (0.0005, ['count', 'inner_state.0.count', 'inner_state.0.mu'])

    Args:
      tx: any `optax.GradientTransformation`; one of jopt is stepped by its exact `step`.
      params: tensors, (name, tensor) pairs, or dicts of parameter groups. A group may have a transformation of its own
        under "tx", and its own values of the hyperparameters that `inject_hyperparams` (or jopt's
        `hyperparams_in_state=True`) keeps: `{"params": ..., "lr": 1e-4}`. The transformation sees the group as a flat
        dictionary by name ("param_0", "param_1", ... without names); masks and labels are functions of that.

    Each group has a state of its own, and a norm over all parameters is one over the group.

    A parameter without gradient is left as it is, and so is its part of the state, its step count included where the
    transformation is jopt's. To one of optax its gradient is zero, and the group's counts go on. A group without any
    gradient is not stepped.

    Raises:
      TypeError: `tx` is none, or a parameter is not a plain floating point or complex tensor in CPU memory.
      ValueError: a group sets a hyperparameter that its transformation does not keep in its state.
    """
    return WrappedOptimizer(tx, params)


class WrappedOptimizer(KeepsWideState, torch.optim.Optimizer):
    """What `interop.wrap` makes."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        self.tx = _check(tx)
        self._groups: list[_Group] = []
        self._training: dict[Tensor, Tensor] | None = None
        super().__init__(params, {})
        # CyclicLR and OneCycleLR look here for what they may cycle.
        self.defaults.update({k: v for k, v in self.param_groups[0].items() if k in self._groups[0].shown})

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, f"interop.wrap of {type(self.tx).__name__}", 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "tx": _Saved(self.tx), "_groups": self._groups, "_training": self._training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = [_ParamGroup(group) for group in state["param_groups"]]
        super().__setstate__(state | {"param_groups": groups} | ({"tx": state["tx"].tx} if "tx" in state else {}))
        for work in self._groups:  # of a state_dict too, whose numbers are those of its schedules
            work.scheduled = {}

    @staticmethod
    def keeps(state: torch.dtype, param: torch.dtype) -> bool:
        """optax chooses its state's types; none is changed on load."""
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; "tx" gives the group a transformation of its own, instead of the optimizer's."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        given = dict(param_group)
        tx = _check(given.pop("tx", self.tx))
        super().add_param_group(given)
        index = len(self.param_groups) - 1
        group = self.param_groups[index] = _ParamGroup(self.param_groups[index])
        try:
            for p in group["params"]:
                check_parameter(parameter_name(self, index, p), p)
            names = group.get("param_names") or [f"param_{i}" for i in range(len(group["params"]))]
            work = _Group(tx, tuple(names))
            with _settings(group["params"]):
                work.show(group)
            work.check(index, group)
        except BaseException:
            del self.param_groups[index]
            raise
        self._groups.append(work)

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """Perform a single optimization step.

        Args:
          closure: reevaluates the model and returns the loss. Its loss is given to the transformation as `value`, its
            gradient as `grad`; and where the transformation asks for the loss elsewhere (line searches, SAM's
            `grad_fn`), the closure is called with the parameters there.
          extra: more arguments of the transformation's `update`: tensors, numbers, and functions of JAX arrays.

        Returns:
          The closure's loss.

        Raises:
          RuntimeError: a forked child process, or after `eval()`.
          TypeError: a gradient that is sparse or of a tensor subclass; said before anything changes.
          ValueError: a state that does not fit the transformation, or a number in a group that it does not keep; said
            before anything changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        undynamo(_step)(self, closure, loss, extra)
        return loss

    def eval(self) -> None:
        """Put Schedule-Free's averaged weights into the parameters, until `train()`; nothing for others."""
        if self._training is not None:
            return
        self._training = {}
        for group, work in zip(self.param_groups, self._groups, strict=True):
            with torch.no_grad(), _settings(group["params"]):
                state = work.state(self, group, work.arrays(group["params"]))
                for node in _nodes(state, ScheduleFreeState):
                    for p, x in work.evaluation(node, group["params"]):
                        self._training.setdefault(p, p.clone())
                        p.copy_(x)

    def train(self) -> None:
        """Put back the weights that are trained, after `eval()`."""
        with torch.no_grad():
            for p, x in (self._training or {}).items():
                p.copy_(x)
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        self._check_training()
        return super().state_dict()

    def _check_training(self) -> None:
        if self._training:
            raise RuntimeError("the parameters hold the weights for evaluation since eval(); call train() first")


class _ParamGroup(dict[str, Any]):
    """A group that says, to torch's schedulers too, how it comes to have a number."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(
            f"{name!r}: the group has no such entry (it has {sorted(self)}); wrap the transformation as "
            "optax.inject_hyperparams(...)(...), which keeps its numbers where a group shows them and a scheduler sets "
            "them"
        )


def _check(tx: Any) -> optax.GradientTransformation:
    if not is_transformation(tx):
        raise TypeError(f"tx: expected an optax.GradientTransformation, found {type(tx).__name__}")
    return tx  # type: ignore[return-value]


def _nodes(tree: Any, kind: type) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]


@contextlib.contextmanager
def _settings(params: Iterable[Tensor]) -> Iterator[None]:
    """JAX's settings for optax's code: on the CPU, types and ranks mixed as it mixes them, 64 bits where they are."""
    wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
    with (
        enable_x64(wide or jax.config.read("jax_enable_x64")),
        jax.default_device(HOST.jax_device),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield


# --- a group -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array of a transformation's state, and where torch finds it."""

    key: str
    owner: str | None  # the parameter that it belongs to; None for the group
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


class _Group:
    """A parameter group's transformation: its compiled functions and the shape of its state."""

    def __init__(self, tx: optax.GradientTransformation, names: tuple[str, ...]):
        self.tx = tx
        self.names = names
        self.shown: set[str] = set()  # the group's entries that are hyperparameters
        self.scheduled: dict[str, Any] = {}  # those that a schedule sets, as they were last shown; unknown after a load
        self._start()

    def _start(self) -> None:
        self._layouts: dict[Any, tuple[list[_Leaf], Any]] = {}
        self._init = jax.jit(self.tx.init)
        self._update = jax.jit(self._updated, static_argnums=(0, 1))
        self._evaluate: Callable[..., Any] | None = None  # the loss and gradients elsewhere, while a step runs

    def __getstate__(self) -> dict[str, Any]:
        return {"tx": _Saved(self.tx), "names": self.names, "shown": self.shown}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"tx": state["tx"].tx, "scheduled": {}})
        self._start()

    # --- what the state looks like

    def layout(self, params: dict[str, Any]) -> tuple[list[_Leaf], Any]:
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

    def _leaves(self, state: Any) -> Iterator[_Leaf]:
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
                yield _Leaf(key, None, node, None, NAMES.get(name, name) or None, name in scheduled)
                continue
            for owner in sorted(node):
                for subpath, leaf in jax.tree_util.tree_leaves_with_path(node[owner]):
                    yield _Leaf(path_name((*path, *subpath)), owner, leaf)

    def show(self, group: dict[str, Any]) -> None:
        """Put the hyperparameters of a fresh state into the group, where it does not set them itself."""
        params = self.arrays(group["params"])
        leaves, _ = self.layout(params)
        wanted = [i for i, leaf in enumerate(leaves) if leaf.hyperparameter]
        values = jax.jit(lambda params: [jax.tree.leaves(self.tx.init(params))[i] for i in wanted])(params)
        self._show(group, [(leaves[i], x) for i, x in zip(wanted, values, strict=True)], fresh=True)

    def _show(self, group: dict[str, Any], values: list[tuple[_Leaf, Any]], *, fresh: bool = False) -> None:
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

    def _tensors(self, optimizer: Any, group: dict[str, Any], leaves: list[_Leaf]) -> list[Tensor | None] | None:
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

    def _joined(self, group: dict[str, Any], leaves: list[_Leaf], treedef: Any, arrays: Iterable[Any]) -> Any:
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
        elsewhere = _Elsewhere(closure, dict(zip(self.names, group["params"], strict=True)))
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
                return _value(lambda x: self._evaluate(x), params)  # type: ignore[misc]

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
        leaves: list[_Leaf],
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


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A transformation on its way into a copy, where it may be the same, or a file, which takes few of them."""

    tx: Any

    def __deepcopy__(self, memo: Any) -> _Saved:
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
        return _Saved, (self.tx,)


def _number(x: Any) -> float:
    """A hyperparameter as the shortest number that is the same in its type."""
    return float(str(np.asarray(x).astype(np.float32))) if x.dtype == jnp.float32 else np.asarray(x).item()


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@functools.cache
def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return to_torch(jnp.zeros((), dtype)).dtype


class _Elsewhere:
    """The closure's loss and gradients at other parameters than those of the model, from inside a compiled step."""

    def __init__(self, closure: Any, params: dict[str, Tensor]):
        self.closure = closure
        self.params = params
        self.before: dict[str, Tensor] = {}
        self.error: BaseException | None = None

    def __call__(self, arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        try:
            if not self.before:
                self.before = {name: p.detach().clone() for name, p in self.params.items()}
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(_from_bytes(arrays[name], p))
            with torch.enable_grad():
                loss = self.closure()
            grads = {
                name: _to_bytes(torch.zeros_like(p) if p.grad is None else p.grad, arrays[name])
                for name, p in self.params.items()
            }
            return np.asarray(float(loss), _default_float()), grads
        except BaseException as error:
            self.error = error
            raise

    def restore(self) -> None:
        with torch.no_grad():
            for name, x in self.before.items():
                self.params[name].copy_(x)


def _default_float() -> Any:
    return np.float64 if jax.config.read("jax_enable_x64") else np.float32


def _from_bytes(x: Any, like: Tensor) -> Tensor:
    """A NumPy array as a tensor, of the types too that torch does not take from NumPy."""
    flat = np.array(x).reshape(-1)
    return torch.from_numpy(flat.view(np.uint8)).view(like.dtype).view(like.shape) if flat.size else like


def _to_bytes(x: Tensor, like: Any) -> np.ndarray:
    flat = x.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().view(np.dtype(like.dtype)).reshape(x.shape).copy()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value(evaluate: Any, params: Any) -> jax.Array:
    """The closure's loss at `params`, with the closure's gradient."""
    return _value_forward(evaluate, params)[0]


def _value_forward(evaluate: Any, params: Any) -> Any:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return jax.pure_callback(evaluate, (jax.ShapeDtypeStruct((), _default_float()), shapes), params)


def _value_backward(evaluate: Any, grads: Any, cotangent: Any) -> Any:
    # torch's gradient of a complex parameter is the conjugate of JAX's.
    return (jax.tree.map(lambda g: jnp.conj(g) * cotangent.astype(g.dtype), grads),)


_value.defvjp(_value_forward, _value_backward)


def _step(optimizer: WrappedOptimizer, closure: Any, loss: Any, extra: dict[str, Any]) -> None:
    check_process()
    optimizer._check_training()
    grads: list[list[Tensor | None]] = []
    for index, (group, work) in enumerate(zip(optimizer.param_groups, optimizer._groups, strict=True)):
        work.check(index, group)
        grads.append([])
        for p in group["params"]:
            grad = p.grad
            if grad is not None:
                check(f"the gradient of {parameter_name(optimizer, index, p)}", grad)
                grad = in_type_of(f"the gradient of {parameter_name(optimizer, index, p)}", grad, p.dtype)
            grads[-1].append(grad)
    with torch.inference_mode(False), torch.no_grad():
        for index, work in enumerate(optimizer._groups):
            if any(grad is not None for grad in grads[index]):
                with _settings(optimizer.param_groups[index]["params"]):
                    work.step(optimizer, index, grads[index], closure, loss, extra)
