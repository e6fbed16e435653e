"""A group of a wrapped optimizer: its transformation, and where its state lies among torch's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from optax.contrib import ScheduleFreeState, schedule_free_eval_params
from torch import Tensor

from interop.dropin.groups import as_number
from interop.memory import HOST, Device, device_of, number_array
from interop.memory.values import to_jax, to_torch
from interop.wrapping.elsewhere import Elsewhere, number_of
from interop.wrapping.held import Held
from interop.wrapping.layout import Layout, Leaf, is_wide
from interop.wrapping.program import Program, beginning
from jopt._compat import enable_x64

PAIRS = [("b1", "b2"), ("beta1", "beta2")]  # shown as torch's "betas"
# What is not for the transformation: torch's own, and what its schedulers keep in the groups.
UNREAD = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")


def nodes(tree: Any, kind: type) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]


@contextlib.contextmanager
def settings(params: Iterable[Tensor]) -> Iterator[None]:
    """JAX's settings for optax's code: on their device, types and ranks may mix, 64 bits only where such arrays are."""
    params = list(params)
    device = (device_of(params[0].device) if params else None) or HOST
    with (
        enable_x64(is_wide(p.dtype for p in params) or jax.config.read("jax_enable_x64")),
        jax.default_device(device.jax_device),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield


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


@dataclasses.dataclass
class Ready:
    """What a step of a group needs.

    Attributes:
      program: that steps it.
      held: the places, if they have all that torch has; else they take it first.
      tensors: torch's state then; None if there is none.
      active: which parameters have a gradient.
      numbers, arrays: hyperparameters, and more arguments of `update`.
    """

    program: Program
    held: Held | None
    tensors: list[Tensor] | None
    active: np.ndarray
    numbers: list[Any]
    arrays: dict[str, Any]


class Group:
    """A parameter group's transformation: its compiled functions and the shape of its state."""

    def __init__(self, tx: optax.GradientTransformation, names: tuple[str, ...]):
        self.tx = tx
        self.names = names
        self.shown: set[str] = set()  # the group's entries that are hyperparameters
        self.scheduled: dict[str, Any] = {}  # those that a schedule sets, as they were last shown; unknown after a load
        self._start()

    def _start(self) -> None:
        self._begin: Any = None  # the program that makes the first state
        self._layout: Layout | None = None
        self._held: Held | None = None  # for that layout, and the programs too
        self._programs: dict[Any, Program] = {}
        self.last: Program | None = None  # that of the last step
        # The loss and gradients elsewhere, while a step runs; apart, so that programs do not keep the group alive.
        self._elsewhere: list[Elsewhere] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"tx": Saved(self.tx), "names": self.names, "shown": self.shown}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"tx": state["tx"].tx, "scheduled": {}})
        self._start()

    # --- what the state looks like

    def layout(self, params: Sequence[Tensor]) -> Layout:
        """Of the state for these parameters."""
        if self._layout is None or not self._layout.is_for(params):
            self._layout = Layout(self.tx, self.names, params)
            self._held, self._programs, self.last, self._begin = None, {}, None, None
        return self._layout

    def show(self, group: dict[str, Any]) -> None:
        """Put the hyperparameters of a fresh state into the group, where it does not set them itself."""
        layout = self.layout(group["params"])
        shared = self._shared(group["params"], layout)
        values = jax.jit(lambda params: layout.parted(self.tx.init(params))[1])(shared)
        layout.device.after(values)
        self._show(group, list(zip(layout.numbers, values, strict=True)), fresh=True)

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

    def _shared(self, params: Sequence[Tensor], layout: Layout) -> dict[str, jax.Array]:
        """The parameters as JAX reads them, in place where it can."""
        if not layout.device.asynchronous:
            return self.arrays(params)
        return {name: layout.device.array(x) for name, x in zip(self.names, params, strict=True)}

    def _tensors(self, optimizer: Any, params: list[Tensor], layout: Layout) -> list[Tensor] | None:
        """torch's state, array by array; None if the group has none yet."""
        states: dict[str | None, dict[str, Any]] = {
            name: optimizer.state.get(p) or {} for name, p in zip(self.names, params, strict=True)
        }
        if not any(states.values()):
            return None
        states[None] = states[self.names[0]]
        found: list[Tensor] = []
        for leaf in layout.arrays:
            x = states[leaf.owner].get(leaf.key)
            if not isinstance(x, Tensor) or x.shape != leaf.shape or x.dtype is not leaf.torch_dtype:
                what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
                raise ValueError(
                    f"the state of parameter {leaf.owner or self.names[0]!r}: expected {leaf.key!r} of "
                    f"{leaf.torch_dtype}, shape {leaf.shape}, found {what}; load a state that the same transformation "
                    "made of the same parameters"
                )
            found.append(x)
        return found

    def state(self, optimizer: Any, group: dict[str, Any]) -> Any:
        """The transformation's own state; None before the first step."""
        layout = self.layout(group["params"])
        tensors = self._tensors(optimizer, group["params"], layout)
        if tensors is None:
            return None
        return layout.joined([to_jax(x, copy=None) for x in tensors], self._numbers(layout.device, group, layout))

    def _numbers(self, device: Device, group: dict[str, Any], layout: Layout) -> list[Any]:
        """The group's hyperparameters as programs take them."""
        given = self._given(group)
        for leaf in layout.numbers:
            value = given[str(leaf.hyperparameter)]
            if leaf.dtype.kind in "iu" and value != int(value):
                raise ValueError(
                    f"{leaf.hyperparameter}: expected an integer, for the transformation was made with one and keeps "
                    f"{leaf.dtype}, found {value}; make it with {float(value)!r} or another number with a point"
                )
        return [number_array(device, given[str(leaf.hyperparameter)], leaf.dtype) for leaf in layout.numbers]

    def evaluation(self, state: ScheduleFreeState, params: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        y = self.arrays(params)
        x = schedule_free_eval_params(state, y)
        for name, p in zip(self.names, params, strict=True):
            yield p, to_torch(x[name].astype(y[name].dtype))

    # --- the step

    def prepare(
        self,
        optimizer: Any,
        index: int,
        grads: list[Tensor | None],
        closure: Any,
        loss: Any,
        extra: dict[str, Any],
        *,
        same: bool,
    ) -> Ready:
        """Check and compile what a step needs; nothing that torch sees changes.

        `same`: the state holds the objects that the last step left in it.
        """
        group = optimizer.param_groups[index]
        params: list[Tensor] = group["params"]
        held = self._held if same and closure is None and not extra else None
        if held is not None and not (held.layout.is_for(params) and held.has_state()):
            held = None
        with contextlib.nullcontext() if held is not None else settings(params):
            layout = self.layout(params)
            layout.device.check()
            tensors = None if held is not None else self._tensors(optimizer, params, layout)
            functions = {k: x for k, x in extra.items() if callable(x)}
            arrays = _arrays(layout.device, {k: x for k, x in extra.items() if k not in functions}, loss)
            active = np.array([grad is not None for grad in grads])
            program = self._program(params, bool(active.all()), closure is not None, functions, arrays)
            numbers = self._numbers(layout.device, group, layout)
        return Ready(program, held, tensors, active, numbers, arrays)

    def step(self, optimizer: Any, index: int, grads: list[Tensor | None], closure: Any, ready: Ready) -> None:
        """Step as prepared."""
        group = optimizer.param_groups[index]
        params: list[Tensor] = group["params"]
        layout = ready.program.layout
        elsewhere = Elsewhere(closure, dict(zip(self.names, params, strict=True)))
        with contextlib.nullcontext() if ready.held is not None else settings(params):
            held = ready.held or self._hold(layout, params, ready.tensors)
            copied = held.take_params(params)

            def finish(shown: list[Any]) -> None:
                for i in copied:
                    if grads[i] is not None or elsewhere.before:
                        params[i].copy_(held.params[i].view)
                stepped = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
                torch.autograd.graph.increment_version(stepped)
                if ready.held is None:
                    owners = dict(zip(self.names, params, strict=True)) | {None: params[0]}
                    for leaf, place in zip(layout.arrays, held.state, strict=True):
                        optimizer.state[owners[leaf.owner]][leaf.key] = place.view
                if shown:
                    self._show(group, list(zip(layout.numbers, shown, strict=True)))
                self.last = ready.program

            self._elsewhere.append(elsewhere)
            try:
                arguments = held.gradients(grads), ready.active, ready.numbers, ready.arrays
                held.step(ready.program, finish, *arguments)
            except BaseException as error:
                elsewhere.restore()
                if elsewhere.error is not None:
                    raise elsewhere.error from error
                raise
            finally:
                self._elsewhere.clear()

    def _program(
        self,
        params: list[Tensor],
        all_active: bool,
        has_closure: bool,
        functions: dict[str, Any],
        arrays: dict[str, Any],
    ) -> Program:
        key = all_active, has_closure, tuple(functions.items()), _types(arrays)
        if key not in self._programs:
            self._programs = dict(list(self._programs.items())[-15:])  # a function may be a new one each step
            now = self._elsewhere
            with settings(params):
                self._programs[key] = Program(
                    self.tx,
                    self.names,
                    self.layout(params),
                    all_active=all_active,
                    evaluate=(lambda x: now[0](x)) if has_closure else None,
                    functions=functions,
                    extra=arrays,
                )
        return self._programs[key]

    def _hold(self, layout: Layout, params: list[Tensor], tensors: list[Tensor] | None) -> Held:
        """The group's parameters and state in buffers, as they are, or else as the transformation begins."""
        shown = self._held is not None
        if self._held is None:
            self._held = Held(layout, params)
        if tensors is None:
            if self._begin is None:
                self._begin = beginning(self.tx, self.names, layout)
            self._held.begin_state(self._begin, params, shown)
        else:
            self._held.take_state(tensors)
        return self._held


def _arrays(device: Device, extra: dict[str, Any], loss: Any) -> dict[str, Any]:
    """More arguments of `update`, and the loss, as programs take them."""
    if loss is not None:
        extra = {"value": number_of(loss)} | extra
    if not extra:
        return {}
    arrays = jax.tree.map(lambda x: to_jax(x) if isinstance(x, Tensor) else jnp.asarray(x), extra)
    return jax.device_put(arrays, device.program_device)


def _types(arrays: dict[str, Any]) -> Any:
    """What tells the arrays' tree, shapes and types from others."""
    if not arrays:
        return ()
    leaves, treedef = jax.tree.flatten(arrays)
    return treedef, tuple((x.shape, x.dtype) for x in leaves)


def _is_numeric(x: Any) -> bool:
    """Whether it is a number, or some, as betas are."""
    if isinstance(x, tuple | list):
        return any(map(_is_numeric, x))
    return isinstance(x, float | int | Tensor | jax.Array | np.ndarray | np.number) and not isinstance(x, bool)


def _number(x: Any) -> float:
    """A hyperparameter as the shortest number that is the same in its type."""
    number = float(str(np.asarray(x).astype(np.float32))) if x.dtype == jnp.float32 else np.asarray(x).item()
    return number.real  # optax makes it complex beside complex parameters
