"""Front end 3: torch optimizers whose step XLA compiles.

A class here is torch's own class with another `step`. Its parameters and state live in JAX buffers that torch
sees at fixed addresses (`dlpack.Buffer`), so that a step is one compiled program that writes them in place:

    gradients, coefficients -> compiled(buffers) -> the same buffers

Parameters move into such a buffer at the first step in which they have a gradient, and only those that nothing else
refers to: plain, contiguous, of a storage of their own. Every other one, and one whose storage is exchanged
later, is copied in before the step and out after it. Tensors of `BIG` elements and more have buffers of their
own; the rest share one, since dispatch costs by the buffer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax._src import compiler
from torch import Tensor

from interop import dlpack
from jopt import numerics
from jopt.arena import ROW, Layout
from jopt.rule import Rule, init_leaf, step_leaf, step_leaves

BIG = 2**15  # elements


class KeepsWideState:
    """Gives a class of torch.optim a load_state_dict that keeps float32 state of narrower parameters."""

    param_groups: list[dict[str, Any]]
    state: Any

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a state tensor wider than its parameter keeps its type (torch would round it)."""
        loaded: dict[str, Any] = {}  # what the user's hooks make of it

        def widen(_: Any) -> None:
            params = [p for group in self.param_groups for p in group["params"]]
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            for i, p in zip(ids, params, strict=True):
                for name, value in loaded["state"].get(i, {}).items():
                    items = value if isinstance(value, list) else [value]
                    if any(isinstance(x, Tensor) and _is_wide_state(x.dtype, p.dtype) for x in items):
                        copies = [x.to(device=p.device, copy=True) if isinstance(x, Tensor) else x for x in items]
                        self.state[p][name] = copies if isinstance(value, list) else copies[0]

        hooks = (
            self.register_load_state_dict_pre_hook(lambda _, x: loaded.update(x)),  # type: ignore[attr-defined]
            self.register_load_state_dict_post_hook(widen, prepend=True),  # type: ignore[attr-defined]
        )
        try:
            super().load_state_dict(state_dict)  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()


class CompiledStep(KeepsWideState):
    """Gives a class of torch.optim the compiled step. Put it before that class among the bases.

    Everything but `step` is torch's: signature, defaults, errors, parameter groups, state keys, state_dict, hooks,
    schedulers. `foreach`, `fused` and `capturable` choose among torch's own paths and mean nothing here;
    `differentiable=True` is refused.
    """

    rule: ClassVar[type[Rule]]
    hidden_scalars: ClassVar[frozenset[str]] = frozenset()  # of the rule's scalar state, what torch does not keep

    _plan: _Plan | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False, so that GradScaler unscales the gradients itself, and skips the step on inf."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it for fused=True."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        if self.param_groups[-1].get("differentiable"):
            del self.param_groups[-1]
            raise NotImplementedError(
                f"interop.optim.{type(self).__name__}: differentiable=True would need torch's autograd through a "
                "compiled step; differentiate through jopt's step with jax.grad, or use torch.optim"
            )

    def sparse_error(self, group: dict[str, Any]) -> str | None:
        """torch's text for a sparse gradient in the group; None where it takes one."""
        return f"{type(self).__name__} does not support sparse gradients"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a sparse gradient where torch's optimizer takes none, or a forked child process.
            TypeError: a parameter, gradient or state that cannot be stepped; said before anything changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        undynamo(type(self)._step)(self)
        return loss

    def _step(self) -> None:
        check_process()
        with torch.inference_mode(False), torch.no_grad():
            _step(self)


def _is_wide_state(state: torch.dtype, param: torch.dtype) -> bool:
    return state is torch.float32 and param in (torch.bfloat16, torch.float16)


@functools.cache
def undynamo(f: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of f. Lazily, since it imports torch._dynamo."""
    return torch.compiler.disable(f)


_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_mark_forked)


# --- a step ------------------------------------------------------------------------------------------


def check_process() -> None:
    if _forked:
        raise RuntimeError(
            "step() in a forked child process: XLA's threads do not survive a fork; start the process by 'spawn' "
            "or 'forkserver'"
        )


def _step(optimizer: Any) -> None:
    grads = _gradients(optimizer)
    if not grads:
        return
    hyperparameters = [_numbers(optimizer.rule.members(group)) for group in optimizer.param_groups]
    rules = [
        optimizer.rule.shaped_by(group, h) for group, h in zip(optimizer.param_groups, hyperparameters, strict=True)
    ]
    plan = optimizer._plan
    if plan is None or not plan.serves(optimizer, rules, grads):
        plan = optimizer._plan = _Plan(optimizer, rules, hyperparameters, grads, plan)
    for bucket in plan.buckets:
        bucket.step(optimizer.state, grads, hyperparameters)


def _numbers(h: dict[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in h.items()}


def _gradients(optimizer: Any) -> dict[Tensor, Tensor]:
    """The gradients that there are, as plain dense tensors of their parameters' types."""
    grads = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if type(grad) is not Tensor or grad.layout is not torch.strided or grad.dtype is not p.dtype:
                if grad.layout is not torch.strided and type(grad) is Tensor:
                    if (error := optimizer.sparse_error(group)) is not None:
                        raise RuntimeError(error)
                    grad = grad.to_dense()
                dlpack.check_tensor(f"the gradient of {parameter_name(optimizer, index, p)}", grad)
                grad = grad.to(p.dtype)
            grads[p] = grad
    return grads


def parameter_name(optimizer: Any, group: int, p: Tensor) -> str:
    """How messages call a parameter."""
    index = next(i for i, q in enumerate(optimizer.param_groups[group]["params"]) if q is p)
    names = optimizer.param_groups[group].get("param_names")
    return f"param_groups[{group}]['params'][{index}]" + (f" ({names[index]!r})" if names else "")


@dataclasses.dataclass(eq=False, slots=True)
class _Leaf:
    """One parameter: where its values and its state lie in a bucket's buffers."""

    param: Tensor
    group: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    size: int  # in reals
    state_dtypes: dict[str, torch.dtype]
    state_shapes: dict[str, tuple[int, ...]]
    pointer: int = 0  # where the parameter's values are; another one means that its storage was exchanged
    home: Tensor | None = None  # the parameter's place in the buffer, if it does not live there: copied in and out
    stays: bool = False  # its storage was exchanged once: it is left where its user puts it
    moved_before: bool = False  # it lives in a buffer already, of the plan before
    views: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what torch's state holds, by name


class _Plan:
    """Which parameters a step updates, in which buffers.

    Made anew for what it does not know: another parameter with a gradient, another shape, type, flag or group. Not
    for a missing gradient, nor for other numbers.
    """

    def __init__(
        self,
        optimizer: Any,
        rules: Sequence[Rule],
        hyperparameters: Sequence[dict[str, float]],
        grads: dict[Tensor, Tensor],
        previous: _Plan | None,
    ):
        self.rules = list(rules)
        self.leaves: dict[Tensor, _Leaf] = {}
        members: dict[Any, list[_Leaf]] = {}
        known = previous.leaves if previous else {}
        params = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p in grads or (p in known and (optimizer.state.get(p) or not known[p].views))
        ]
        self.waves = _waves(params)
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p not in self.waves or p in self.leaves:
                    continue
                name = parameter_name(optimizer, index, p)
                dlpack.check_parameter(name, p)
                rules[index].check_param(name, tuple(p.shape), dlpack.DTYPES[p.dtype])
                dtypes = _state_dtypes(name, p, rules[index], optimizer.state.get(p) or {})
                shapes = _slots(rules[index], tuple(p.shape))
                size = p.numel() * (2 if p.is_complex() else 1)
                leaf = self.leaves[p] = _Leaf(p, index, p.dtype, p.shape, p.stride(), size, dtypes, shapes)
                if before := known.get(p):
                    leaf.stays = before.stays
                    leaf.moved_before = before.home is None and before.pointer == p.data_ptr()
                real = tuple((slot, _real(dtype)) for slot, dtype in dtypes.items())
                members.setdefault((self.waves[p], rules[index], _real(p.dtype), real), []).append(leaf)
        # Compile all before any memory moves, and move it all: an interrupt finds the old state or the new.
        self.buckets = [
            _Bucket(rule, dtype, dict(slots), leaves)
            for (_, rule, dtype, slots), leaves in sorted(members.items(), key=lambda item: item[0][0])
        ]
        with SignalsWait():
            for bucket in self.buckets:
                bucket.take(optimizer, hyperparameters)

    def serves(self, optimizer: Any, rules: Sequence[Rule], grads: dict[Tensor, Tensor]) -> bool:
        """Whether this plan still fits the optimizer; takes note of parameters that moved."""
        if rules != self.rules:
            return False
        fits, moved = True, False
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p not in grads:
                    continue
                leaf = self.leaves.get(p)
                if leaf is None or leaf.group != index:
                    fits = False
                    continue
                if leaf.dtype is not p.dtype or leaf.shape != p.shape or leaf.strides != p.stride():
                    fits = False
                if p.data_ptr() != leaf.pointer:
                    if leaf.home is None:
                        # Someone may still hold what it left: that memory cannot serve as its place.
                        leaf.stays = True
                        fits = False
                    leaf.pointer = p.data_ptr()
                    moved = True
                state = optimizer.state.get(p)
                if state and any(state.get(slot) is not leaf.views[slot] for slot in leaf.state_dtypes):
                    name = parameter_name(optimizer, index, p)
                    fits = fits and _state_dtypes(name, p, self.rules[index], state) == leaf.state_dtypes
        return fits and not (moved and _waves(list(self.leaves)) != self.waves)


def _waves(params: Sequence[Tensor]) -> dict[Tensor, int]:
    """torch steps parameters one after the other, which shows where two share memory: the turn of each."""
    waves: dict[Tensor, int] = {}
    by_storage: dict[int, list[Tensor]] = {}
    for p in params:
        # A tensor without storage of its own is refused later, by name.
        others = (
            by_storage.setdefault(p.untyped_storage().data_ptr(), []) if type(p) in (Tensor, torch.nn.Parameter) else []
        )
        begin, end = _extent(p)
        waves[p] = 1 + max((waves[q] for q in others if begin < _extent(q)[1] and _extent(q)[0] < end), default=-1)
        others.append(p)
    return waves


def _extent(p: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie."""
    last = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) if p.numel() else -1
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()


def _state_dtypes(name: str, p: Tensor, rule: Rule, state: dict[str, Any]) -> dict[str, torch.dtype]:
    """The type of each slot: the parameter's, or float32 where a narrower parameter's loaded state has it."""
    dtypes = {}
    for slot, shape in _slots(rule, tuple(p.shape)).items():
        value = state.get(slot)
        if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
            whose = "the parameter's shape" if shape == tuple(p.shape) else "shape"
            raise ValueError(f"{name}: expected its state {slot!r} of {whose} {shape}, found {found}")
        dtype = p.dtype if value is None else value.dtype
        if dtype is not p.dtype and not _is_wide_state(dtype, p.dtype):
            raise TypeError(
                f"{name}: expected its state {slot!r} in the parameter's type {p.dtype}, found {dtype}; convert the "
                "model before the optimizer's first step, or its state with it"
            )
        dtypes[slot] = dtype
    return dtypes


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


class _Bucket:
    """The leaves of one rule and one set of types: their buffers, and the program that steps them."""

    def __init__(
        self,
        rule: Rule,
        dtype: torch.dtype,
        slots: dict[str, torch.dtype],
        leaves: list[_Leaf],
    ):
        self.rule = rule
        self.big = [leaf for leaf in leaves if leaf.size >= BIG or rule.scope == "tensor"]
        self.small = [leaf for leaf in leaves if leaf.size < BIG and rule.scope == "element"]
        self.leaves = self.big + self.small
        self.groups = np.array([leaf.group for leaf in self.leaves])
        self.dtypes = {"param": dlpack.DTYPES[dtype]} | {slot: dlpack.DTYPES[d] for slot, d in slots.items()}
        self.dtype = self.dtypes["param"]
        self.compute_dtype = numerics.widest(self.dtypes.values())
        self.layout = Layout(tuple((leaf.size,) for leaf in self.small), ROW)
        self.leaf_of_row = self.layout.leaf_of_row()
        self.program = _compile(
            rule,
            tuple(self.dtypes.items()),
            tuple(tuple(leaf.shape) if rule.scope == "tensor" else (leaf.size,) for leaf in self.big),
            len(self.small),
            self.layout.size,
        )

    # --- memory

    def take(self, optimizer: Any, hyperparameters: Sequence[dict[str, float]]) -> None:
        """Make the buffers, and move parameters and state into them."""
        layout = self.layout
        self.missing = dlpack.aligned_zeros(max((leaf.size for leaf in self.big), default=0), self.dtype)
        self.grads = dlpack.aligned_zeros(layout.size, self.dtype)
        self.grad_views: dict[Tensor, Tensor] = {}  # where the small leaves' gradients are gathered
        self.scalars = self._init_scalars(optimizer, hyperparameters)
        self.buffers: list[dlpack.Buffer] = []
        for leaf in self.big:
            reals = 2 if leaf.dtype.is_complex else 1
            sizes = {name: math.prod(shape) * reals for name, shape in leaf.state_shapes.items()}
            own = {name: dlpack.Buffer(sizes.get(name, leaf.size), d) for name, d in self.dtypes.items()}
            self.buffers += own.values()
            self._place(leaf, own, 0)
        shared = {name: dlpack.Buffer(layout.size, d) for name, d in self.dtypes.items() if self.small}
        self.buffers += shared.values()
        for leaf, offset in zip(self.small, layout.offsets, strict=True):
            self._place(leaf, shared, offset)
            address = self.grads.ctypes.data + offset * self.dtype.itemsize
            self.grad_views[leaf.param] = dlpack.view(address, leaf.dtype, tuple(leaf.shape), owner=self.grads)
        for i, leaf in enumerate(self.leaves):
            scalars = {
                name: dlpack.view(vector[i:].ctypes.data, torch.from_numpy(vector).dtype, (), owner=vector)
                for name, vector in self.scalars.items()
                if name not in optimizer.hidden_scalars
            }
            leaf.views = scalars | leaf.views  # in torch's order
            if leaf.views:
                state = optimizer.state[leaf.param]
                self._take_state(i, leaf, state, dict(state), hyperparameters[leaf.group])
            self._take_param(leaf)

    def _init_scalars(self, optimizer: Any, hyperparameters: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
        """The scalar state, a vector over the leaves; torch's 0-d tensors are views of its entries."""
        vectors = {}
        for name in self.rule.init_scalars(hyperparameters[0]):
            values = [self.rule.init_scalars(hyperparameters[leaf.group])[name] for leaf in self.leaves]
            for i, leaf in enumerate(self.leaves):
                state = optimizer.state.get(leaf.param)
                if (
                    name in optimizer.hidden_scalars
                    and state
                    and any(state.get(s) is not None for s in leaf.state_dtypes)
                ):
                    values[i] = 1.0  # of a hidden step only matters whether there was one
            vectors[name] = np.array(values, _scalar_dtype())
        return vectors

    def _place(self, leaf: _Leaf, buffers: dict[str, dlpack.Buffer], offset: int) -> None:
        """Give a leaf its place `offset` elements into the buffers."""
        for slot, dtype in leaf.state_dtypes.items():
            leaf.views[slot] = buffers[slot].view(dtype, leaf.state_shapes[slot], offset * self.dtypes[slot].itemsize)
        leaf.home = buffers["param"].view(leaf.dtype, tuple(leaf.shape), offset * self.dtype.itemsize)

    def _take_param(self, leaf: _Leaf) -> None:
        """Move a parameter into its place, if nothing else refers to its storage."""
        if leaf.size and not leaf.stays and dlpack.may_move(leaf.param, ours=leaf.moved_before):
            assert leaf.home is not None
            leaf.param.data = leaf.home.copy_(leaf.param)
            leaf.home = None
        leaf.pointer = leaf.param.data_ptr()

    def _take_state(
        self, i: int, leaf: _Leaf, state: dict[str, Any], values: dict[str, Any], h: dict[str, float]
    ) -> None:
        """Make torch's state of a leaf views of the buffers, with the values given, or else the rule's first."""
        first: dict[str, Any] = {}
        if any(values.get(name) is None for name in leaf.views):
            scalars = self.rule.init_scalars(h)
            first = scalars | self._first_slots(leaf, h)
            for name in scalars.keys() - leaf.views.keys():
                self.scalars[name][i] = scalars[name]
        for name, view in leaf.views.items():
            value = first[name] if values.get(name) is None else values[name]
            if isinstance(value, Tensor):
                view.copy_(value.to_dense() if value.is_sparse else value)
            else:
                view.fill_(float(value))
            state[name] = view

    def _first_slots(self, leaf: _Leaf, h: dict[str, float]) -> dict[str, Tensor]:
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            param = dlpack.to_jax(leaf.param)
            slots = init_leaf(self.rule, {name: jnp.asarray(x, self.compute_dtype) for name, x in h.items()}, param)
            return dlpack.to_torch(slots)

    # --- the step

    def step(self, states: Any, grads: dict[Tensor, Tensor], hyperparameters: Sequence[dict[str, float]]) -> None:
        """Step the leaves that have a gradient."""
        active = np.array([leaf.param in grads for leaf in self.leaves])
        stepped = [leaf for leaf in self.leaves if leaf.param in grads]
        if not stepped:
            return
        foreign = []  # state that its user exchanged; all is read before any is written, since it may be other state
        for i, leaf in enumerate(self.leaves):
            if active[i] and leaf.views:
                state = states[leaf.param]
                if any(state.get(name) is not view for name, view in leaf.views.items()):
                    values = {name: x.clone() if isinstance(x, Tensor) else x for name, x in state.items()}
                    foreign.append((i, leaf, state, values))
        for i, leaf, state, values in foreign:
            self._take_state(i, leaf, state, values, hyperparameters[leaf.group])
        copied = [leaf for leaf in stepped if leaf.home is not None]
        for leaf in copied:
            leaf.home.copy_(leaf.param)  # type: ignore[union-attr]

        small = [leaf for leaf in self.small if leaf.param in grads]
        if small:
            torch._foreach_copy_([self.grad_views[leaf.param] for leaf in small], [grads[leaf.param] for leaf in small])  # type: ignore
        kept = [_dense(grads[leaf.param]) if leaf.param in grads else None for leaf in self.big]
        arrays = [
            self.missing[: leaf.size] if grad is None else dlpack.host_array(grad, self.dtype)
            for leaf, grad in zip(self.big, kept, strict=True)
        ]
        coefficients, scalars = self._coefficients(hyperparameters, active)
        run(
            self.program,
            self.buffers,
            [*arrays, self.grads],
            [*coefficients[: len(self.big)], coefficients[len(self.big) :]],
            self.leaf_of_row,
        )
        for name, vector in self.scalars.items():
            np.copyto(vector, scalars[name], where=active, casting="same_kind")
        for leaf in copied:
            leaf.param.copy_(leaf.home)  # type: ignore[arg-type]
        # As torch's own in-place operations do, so that a backward through old values raises.
        torch.autograd.graph.increment_version([leaf.param for leaf in stepped if leaf.home is None])

    def _coefficients(
        self, hyperparameters: Sequence[dict[str, float]], active: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """One row a leaf: the rule's coefficients in `_names`' order, then whether it steps. And the next scalars."""
        h: dict[str, Any] = {}
        for name in self.rule.hyperparameters:
            values = np.array([group.get(name, np.nan) for group in hyperparameters])
            h[name] = values[0] if (values == values[0]).all() else values[self.groups]
        with np.errstate(all="ignore"):
            s = {name: x.astype(np.float64) for name, x in self.scalars.items()}
            c, scalars = self.rule.scalars(h, s, np, lambda x: np.asarray(x).astype(_scalar_dtype()).astype(np.float64))
        table = np.empty((len(self.leaves), len(c) + 1), np.float64)
        for column, value in enumerate((*c.values(), active)):
            table[:, column] = value
        return table.astype(self.compute_dtype), scalars


def _scalar_dtype() -> Any:
    """The type of torch's scalar state."""
    return np.float64 if torch.get_default_dtype() is torch.float64 else np.float32


def _dense(grad: Tensor) -> Tensor:
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    return grad.resolve_neg().contiguous()


# --- the compiled program ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _slots(rule: Rule, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a leaf's tensor state, in torch's order, which a JAX tree would sort."""
    slots: dict[str, tuple[int, ...]] = {}

    def init(param: Array) -> None:
        state = rule.init(dict.fromkeys(rule.hyperparameters, jnp.zeros(())), param)
        slots.update((name, x.shape) for name, x in state.items())

    jax.eval_shape(init, jax.ShapeDtypeStruct(shape, np.float32))
    return slots


def _coefficient_names(rule: Rule) -> tuple[str, ...]:
    with np.errstate(all="ignore"):
        h = dict.fromkeys(rule.hyperparameters, np.float64(0.5))
        s = {name: np.full(1, x) for name, x in rule.init_scalars(h).items()}
        return tuple(rule.scalars(h, s, np, np.asarray)[0])


@functools.lru_cache(maxsize=128)
def _compile(
    rule: Rule,
    dtypes: tuple[tuple[str, np.dtype], ...],
    big: tuple[tuple[int, ...], ...],
    n_small: int,
    small: int,
) -> Any:
    """The program that steps a bucket, for any optimizer with one like it.

    Args:
      rule: what is stepped.
      dtypes: the types of `param` and of each slot.
      big: the shapes of the leaves with buffers of their own; (size,) where the rule does not ask for it.
      n_small, small: how many leaves share buffers, and those buffers' size.

    The program takes and returns the buffers, leaf by leaf, `param` and the slots in the order of `dtypes`,
    those of the small leaves last; then gradients, coefficients (see `_Bucket._coefficients`), and the small buffer's
    rows' leaves. A leaf has a vector of coefficients of its own: sharing one, XLA merges equal sizes into a slow loop.
    """
    names = [name for name, _ in dtypes]
    columns = (*_coefficient_names(rule), "active")

    def step_one(buffers: Sequence[Array], grad: Array, c: dict[str, Array]) -> list[Array]:
        active = c["active"] != 0
        c = {name: x for name, x in c.items() if name != "active"}

        def outputs(buffers: Sequence[Array], grad: Array) -> list[Array]:
            param, *slots = buffers
            state = dict(zip(names[1:], slots, strict=True))
            param, state = step_leaf(rule, c, grad, state, param, active)
            return [param, *(state[name] for name in names[1:])]

        # A subexpression that two outputs share gets a loop and an array of its own. Each output from a copy of the
        # inputs shares none, and XLA makes one loop of them all.
        copies = jax.lax.optimization_barrier(((list(buffers), grad),) * len(names))
        return [outputs(*copy)[k] for k, copy in enumerate(copies)]

    def step_tensors(buffers: list[Array], grads: list[Array], coefficients: list[Array]) -> list[Array]:
        leaves = []
        for i, shape in enumerate(big):
            param, *slots = buffers[i * len(names) : (i + 1) * len(names)]
            shapes = _slots(rule, shape)
            state = {name: x.reshape(shapes[name]) for name, x in zip(names[1:], slots, strict=True)}
            c = {name: coefficients[i][j] for j, name in enumerate(columns)}
            active = c.pop("active") != 0
            leaves.append((c, grads[i].reshape(shape), state, param.reshape(shape), active))
        results = step_leaves(rule, leaves)
        return [x.reshape(-1) for param, state in results for x in (param, *(state[name] for name in names[1:]))]

    def program(buffers: list[Array], grads: list[Array], coefficients: list[Array], leaf_of_row: Array) -> list[Array]:
        if rule.scope == "tensor":
            return step_tensors(buffers, grads, coefficients)
        out: list[Array] = []
        width = len(names)
        for i in range(len(big)):
            c = {name: coefficients[i][j] for j, name in enumerate(columns)}
            out += step_one(buffers[i * width : (i + 1) * width], grads[i], c)
        if n_small:
            rows = [x.reshape(-1, ROW) for x in (*buffers[len(big) * width :], grads[-1])]
            c = {name: coefficients[-1][:, j][leaf_of_row][:, None] for j, name in enumerate(columns)}
            out += [x.reshape(-1) for x in step_one(rows[:-1], rows[-1], c)]
        return out

    def buffer_sizes(shape: tuple[int, ...]) -> list[int]:
        slots = _slots(rule, shape)
        return [math.prod(shape), *(math.prod(slots[name]) for name in names[1:])]

    sizes = [buffer_sizes(shape) for shape in (*big, *([(small,)] if n_small else []))]
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with own_settings():

        def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        compute = numerics.widest(d for _, d in dtypes)
        grad_dtype = dict(dtypes)["param"]
        lowered = jax.jit(program, donate_argnums=0).lower(
            [spec((n,), dtype) for leaf in sizes for n, (_, dtype) in zip(leaf, dtypes, strict=True)],
            [spec((n,), grad_dtype) for n in (*(math.prod(shape) for shape in big), small)],
            [*(spec((len(columns),), compute) for _ in big), spec((n_small, len(columns)), compute)],
            spec((small // ROW,), np.int32),
        )
        with _multi_output_fusion():
            return lowered.compile()


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """The JAX settings that the program needs, whatever the user's: debug_nans raises after buffers were donated."""
    with jax.enable_x64(True), jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        yield


_patching = threading.Lock()
_FLAG = b"xla_cpu_use_multi_output_fusion"


@contextlib.contextmanager
def _multi_output_fusion() -> Iterator[None]:
    """Have XLA on CPU compute several outputs in one loop, in what this thread compiles inside the block.

    XLA has it behind a debug option that is a map, which `compiler_options` cannot set; the other way in, XLA_FLAGS, is
    the user's and global. So the entry is appended to the compile options as they are serialized: fields 3
    (executable_build_options), 3 (debug_options), 500 (xla_backend_extra_options), then 1, the entry's key.
    """
    thread = threading.get_ident()
    with _patching:
        original = compiler.get_compile_options

        def get_compile_options(*args: Any, **kwargs: Any) -> Any:
            options = original(*args, **kwargs)
            if threading.get_ident() != thread:
                return options
            extra = _field(3, _field(3, _field(500, _field(1, _FLAG))))
            return type(options).ParseFromString(options.SerializeAsString() + extra)

        compiler.get_compile_options = get_compile_options  # type: ignore[assignment]
        try:
            yield
        finally:
            compiler.get_compile_options = original


def _field(number: int, content: bytes) -> bytes:
    """A protocol buffer's length-delimited field."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)

    return varint(number << 3 | 2) + varint(len(content)) + content


def run(program: Any, buffers: Sequence[dlpack.Buffer], *arguments: Any) -> list[Any]:
    """Run the program over the buffers, and wait: torch may write to what it reads right after.

    It returns the buffers, and after them what this returns.

    The buffers are donated, so that an exception between the call and the taking of its results would lose the
    memory that torch sees: signals whose handlers could raise one wait.
    """
    with SignalsWait(), own_settings(), jax.transfer_guard("allow"):
        out = program([buffer.array for buffer in buffers], *arguments)
        jax.block_until_ready(out)
        for buffer, array in zip(buffers, out[: len(buffers)], strict=True):
            buffer.replace(array)
    return out[len(buffers) :]


class SignalsWait:
    """Python's signal handlers run after the block rather than inside it."""

    signals = [
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP")
        if hasattr(signal, name)
    ]

    def __enter__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.arrived: list[tuple[int, Any]] = []
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                if callable(handler := signal.getsignal(number)):
                    self.handlers[number] = handler
                    signal.signal(number, lambda *args: self.arrived.append(args))

    def __exit__(self, *_: object) -> None:
        for number in reversed(self.handlers):  # SIGINT last, as it came first: until then it cannot cut this short
            signal.signal(number, self.handlers[number])
        self._deliver()

    def _deliver(self) -> None:
        if self.arrived:
            number, frame = self.arrived.pop(0)
            try:
                self.handlers[number](number, frame)
            finally:
                self._deliver()
