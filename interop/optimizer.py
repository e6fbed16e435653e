"""Front end 3: torch optimizers whose step XLA compiles.

A class here is torch's own class with another `step`. Its parameters and state live in JAX buffers that torch
sees at fixed addresses (`dlpack.Buffer`), so that a step is one compiled program that writes them in place:

    gradients, coefficients -> compiled(buffers) -> the same buffers      (interop/program.py)

Parameters move into such a buffer at the first step in which they have a gradient, and only those that nothing else
refers to: plain, contiguous, of a storage of their own. Every other one, and one whose storage is exchanged
later, is copied in before the step and out after it. Tensors of `BIG` elements and more have buffers of their
own; the rest share some, since dispatch costs by the buffer.

What a step finds as the last one left it is not checked again: see `_Plan.look`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import jax
import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from interop import _compat, dlpack, dtensor, options, program, reader
from interop.program import EMA
from jopt.arena import ROW, Layout
from jopt.leaf import stack_size
from jopt.rule import Rule, is_number

L = TypeVar("L")  # a loss
BIG = 2**15  # elements
SHELF = 2**20  # elements: of small tensors in one buffer, whose gradients are gathered in as much memory


class KeepsWideState:
    """Gives a class of torch.optim a load_state_dict that keeps float32 state of narrower parameters."""

    param_groups: list[dict[str, Any]]
    state: Any

    @staticmethod
    def keeps(state: torch.dtype, param: torch.dtype) -> bool:
        """Whether a state tensor of one type stays as it is beside a parameter of another."""
        return state is torch.float32 and param in (torch.bfloat16, torch.float16)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but a state tensor wider than its parameter keeps its type (torch would round it)."""
        loaded: dict[str, Any] = {}  # what the user's hooks make of it

        def widen(_: Any) -> None:
            params = parameters(self)
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            for i, p in zip(ids, params, strict=True):
                for name, value in loaded["state"].get(i, {}).items():
                    items = value if isinstance(value, list) else [value]
                    if any(isinstance(x, Tensor) and self.keeps(x.dtype, p.dtype) for x in items):
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


class OfTorch(KeepsWideState):
    """Gives a class of torch.optim what the step that replaces its own knows of its options."""

    defaults: dict[str, Any]

    @classmethod
    def known_options(cls) -> frozenset[str]:
        """The names of torch's arguments whose meaning the step knows."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        try:
            if len(self.param_groups) == 1:  # torch's constructor is at work: nobody else has put anything there
                options.check_defaults(type(self), self.defaults)
            options.check_groups(type(self), self.param_groups)
        except NotImplementedError:
            del self.param_groups[-1]
            raise


class Stepped(OfTorch):
    """Gives a class of torch.optim another step: `_step`, which sees gradients and parameters and changes them."""

    rule: ClassVar[type[Rule]]
    hidden_scalars: ClassVar[frozenset[str]] = frozenset()  # of the rule's scalar state, what torch does not keep
    late_slots: ClassVar[frozenset[str]] = frozenset()  # what torch makes where it is missing from a state

    @classmethod
    def known_options(cls) -> frozenset[str]:
        return cls.rule.options()

    def _quiet_step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: a sparse gradient where torch's optimizer takes none, or a forked child process.
            TypeError: a parameter, gradient or state that cannot be stepped; said before anything changes.
            KeyError: a number or a state that torch's step reads and that is not there; likewise.
        """
        if args or kwargs:
            _like_torchs(type(self))(self, closure, *args, **kwargs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        undynamo(_guarded)(self)
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_quiet_step)

    if TYPE_CHECKING:

        @overload
        def step(self, closure: None = None) -> None: ...
        @overload
        def step(self, closure: Callable[[], L]) -> L: ...
        def step(self, closure: Any = None) -> Any: ...

    else:

        @functools.wraps(_quiet_step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            # torch puts its wrapper around every step, which takes as long as a small step: here where it has work.
            return (self._watched_step if _is_watched(self) else self._quiet_step)(*args, **kwargs)

        step.__name__, step.__qualname__ = "step", "Stepped.step"
        step.hooked = True  # so that torch does not wrap it

    def _step(self) -> None:
        raise NotImplementedError


def _is_watched(optimizer: Any) -> bool:
    """Whether somebody hooks or profiles its step, and no subclass's step around it, which torch has wrapped."""
    return type(optimizer).step is Stepped.step and bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # type: ignore[reportPrivateImportUsage]
    )


def _like_torchs(cls: type) -> Callable[..., None]:
    """A function that takes what torch's step takes: for Python's own words about other arguments."""

    def step(self: Any, closure: Any = None) -> None: ...

    step.__qualname__ = options.torch_base(cls).step.__qualname__
    return step


def _guarded(optimizer: Stepped) -> None:
    check_process()
    options.check_groups(type(optimizer), optimizer.param_groups)
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with inference, torch.no_grad():
        optimizer._step()


@dataclasses.dataclass(eq=False, slots=True, weakref_slot=True)
class _Around:
    """What a step does around itself, and what it found.

    One object, for Lightning and Fabric wrap an optimizer in an object of a subclass of its class, which has the
    optimizer's attributes only until one is assigned.
    """

    max_norm: float | None = None
    ema: float | None = None
    grad_scale: Tensor | None = None
    grad_norm: Tensor | None = None
    skipped: bool = False


class CompiledStep(Stepped):
    """Gives a class of torch.optim the compiled step. Put it before that class among the bases.

    Everything but `step` is torch's: signature, defaults, errors, parameter groups, state keys, state_dict, hooks,
    schedulers. `foreach`, `fused` and `capturable` choose among torch's own paths and mean nothing here;
    `differentiable=True` is refused.

    Two keyword arguments more put into the compiled step what a training loop does around it:

    Args:
        max_norm: clip the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_(params, max_norm)` before
            the step would. The gradients themselves stay as they are; their norm is `grad_norm`.
        ema: the decay of an exponential moving average of the parameters, as `torch.optim.swa_utils.AveragedModel` with
            `get_ema_multi_avg_fn(ema)` keeps it when updated after each step: `optimizer.state[p]["ema"]`.

    Both are attributes too, and may be changed at any time. With `interop.amp.GradScaler` the step also unscales.
    """

    _plan: _Plan | None = None
    _around: _Around

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients, unscaled and before clipping, if the step clips or unscales."""
        return self._around.grad_norm

    @property
    def skipped(self) -> bool:
        """Whether the last step changed nothing, for an unscaled gradient was not finite."""
        return self._around.skipped

    @property
    def grad_scale(self) -> Tensor | None:
        """What the gradients are divided by, set by `interop.amp.GradScaler` for the step."""
        return self._around.grad_scale

    @grad_scale.setter
    def grad_scale(self, value: Tensor | None) -> None:
        self._around.grad_scale = value

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        base = options.torch_base(cls)
        if "__init__" in cls.__dict__ or base not in cls.__bases__:
            return

        @functools.wraps(base.__init__)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            super(cls, self).__init__(*args, **kwargs)

        # Of its own, so that the signatures of the class and of its constructor tell the arguments.
        signature = inspect.signature(base.__init__)
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="float | None")
            for name in ("max_norm", "ema")
        ]
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = init  # type: ignore[method-assign]

    def __init__(self, *args: Any, max_norm: float | None = None, ema: float | None = None, **kwargs: Any):
        self._around = _Around()
        self.max_norm, self.ema = max_norm, ema
        super().__init__(*args, **kwargs)

    @property
    def max_norm(self) -> float | None:
        return self._around.max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self._around.max_norm = _number("max_norm", value, lambda x: x >= 0, "a number of at least 0, or None")

    @property
    def ema(self) -> float | None:
        return self._around.ema

    @ema.setter
    def ema(self, value: float | None) -> None:
        self._around.ema = _number("ema", value, lambda x: 0 <= x <= 1, "a decay between 0 and 1, or None")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_around": _Around(self.max_norm, self.ema)}  # type: ignore[misc]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False, so that GradScaler unscales the gradients itself, and skips the step on inf."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it for fused=True."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        if "max_norm" in self.param_groups[-1]:
            del self.param_groups[-1]
            raise ValueError(
                "max_norm: expected an argument of the optimizer, found one of a parameter group: the norm is of all "
                "gradients together. Under ZeroRedundancyOptimizer, whose processes have a part each, call "
                "torch.nn.utils.clip_grad_norm_ before the step instead"
            )
        if self.param_groups[-1].get("differentiable"):
            del self.param_groups[-1]
            raise NotImplementedError(
                f"interop.optim.{type(self).__name__}: differentiable=True would need torch's autograd through a "
                "compiled step; differentiate through jopt's step with jax.grad, or use torch.optim"
            )

    def sparse_error(self, group: dict[str, Any]) -> str | None:
        """torch's text for a sparse gradient in the group; None where it takes one."""
        return f"{type(self).__name__} does not support sparse gradients"

    def _step(self) -> None:
        _step(self)


def _number(name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not accepts(float(value)):
        raise ValueError(f"{name}: expected {expected}, found {value!r}")
    return float(value)


@functools.cache
def undynamo(f: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of f. Lazily, since it imports torch._dynamo."""
    return torch.compiler.disable(f)


_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = _forked or _compat.jax_has_started()


os.register_at_fork(after_in_child=_mark_forked)


# --- a step ------------------------------------------------------------------------------------------


def check_process() -> None:
    if _forked:
        raise RuntimeError(
            "step() in a forked child process: XLA's threads do not survive a fork; start the process by 'spawn' "
            "or 'forkserver', or before anything uses JAX"
        )


def _step(optimizer: Any) -> None:
    program.pause_openmp()  # before all else: it slows Python too
    hyperparameters, rules = group_numbers(optimizer)
    plan = optimizer._plan
    if plan is None or (grads := plan.as_before(optimizer, rules)) is None:
        present = _gradients(optimizer)
        if not present and (plan is None or not plan.averages):
            optimizer._around.grad_norm, optimizer._around.skipped = None, False
            return
        if plan is None or not plan.serves(optimizer, rules, hyperparameters, present):
            plan = optimizer._plan = _Plan(optimizer, rules, hyperparameters, present, plan)
        grads = plan.begin(optimizer, hyperparameters, present)
    plan.step(optimizer, hyperparameters, grads)


def group_numbers(optimizer: Any) -> tuple[list[dict[str, float]], list[Rule]]:
    """The numbers of each group, its tuples taken apart, and the rule that its flags make.

    Raises:
      KeyError, TypeError, ValueError: as torch's step, for what is not there, no number, or not as many.
    """
    rule = optimizer.rule
    hyperparameters, rules = [], []
    for index, group in enumerate(optimizer.param_groups):
        try:
            if not _names(rule) <= group.keys():
                raise KeyError
            h = {name: x if type(x) is float else as_number(x) for name, x in rule.members(group).items()}
            rules.append(rule.shaped_by(group, h))
        except (KeyError, TypeError, ValueError) as error:
            raise _group_error(optimizer, index, error) from error
        hyperparameters.append(h)
    return hyperparameters, rules


@functools.cache
def _owners(rule: type[Rule]) -> dict[str, str]:
    """What the rule's numbers are called in a group, or the tuples that they are in."""
    owners = {name: name for name in rule.hyperparameters}
    return owners | {name: owner for owner, names in rule.tuples.items() for name in names}


@functools.cache
def _names(rule: type[Rule]) -> frozenset[str]:
    return frozenset(_owners(rule).values())


def as_number(x: Any) -> float:
    """What a group holds for a number; TypeError for what is none."""
    try:
        if not isinstance(x, str | bytes):  # which Python would read
            return float(x)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"expected a number, or a tensor of one, found {x!r}")


def _group_error(optimizer: Any, index: int, error: Exception) -> Exception:
    """What is wrong with a group, in the type of torch's error."""
    group, rule = optimizer.param_groups[index], optimizer.rule
    for name in dict.fromkeys(_owners(rule).values()):
        if name not in group:
            return missing(optimizer, index, name)
        if (members := rule.tuples.get(name)) is not None:
            n = len(group[name]) if isinstance(group[name], tuple | list) else None
            if n != len(members):
                # Muon's rule has torch's own words.
                own = f"expected {len(members)} numbers ({', '.join(members)}), found {group[name]!r}"
                text = error if isinstance(error, ValueError) else own
                return (TypeError if n is None else ValueError)(f"param_groups[{index}][{name!r}]: {text}")
    for name, x in rule.members(group).items():
        try:
            as_number(x)
        except TypeError as wrong:
            return TypeError(f"param_groups[{index}][{_owners(rule)[name]!r}]: {wrong}")
    if isinstance(error, KeyError):
        return missing(optimizer, index, error.args[0])
    return type(error)(f"param_groups[{index}]: {error}")


def missing(optimizer: Any, index: int, name: str) -> KeyError:
    """The error for what a group does not have."""
    return KeyError(
        f"param_groups[{index}][{name!r}]: {type(optimizer).__name__} reads it, found "
        f"{sorted(optimizer.param_groups[index])}; set it, or load the state_dict of an optimizer of this class"
    )


def _gradients(optimizer: Any) -> dict[Tensor, Tensor]:
    """The gradients that there are, as plain dense tensors of their parameters' types; of a DTensor the local one."""
    grads = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if dtensor.placement(p) is not None or dtensor.placement(grad) is not None:
                if (error := dtensor.error(optimizer, p, grad)) is not None:
                    raise TypeError(f"{parameter_name(optimizer, index, p)}: {error}")
                grad = dtensor.local(grad)
            if type(grad) is not Tensor or grad.layout is not torch.strided or grad.dtype is not p.dtype:
                if grad.layout is not torch.strided and type(grad) is Tensor:
                    if (error := optimizer.sparse_error(group)) is not None:
                        raise RuntimeError(error)
                    grad = grad.to_dense()
                dlpack.check_tensor(f"the gradient of {parameter_name(optimizer, index, p)}", grad)
                grad = dlpack.in_type_of(f"the gradient of {parameter_name(optimizer, index, p)}", grad, p.dtype)
            grads[p] = grad
    return grads


def parameters(optimizer: Any) -> list[Tensor]:
    """Those of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameter_name(optimizer: Any, group: int, p: Tensor) -> str:
    """How messages call a parameter."""
    index = next(i for i, q in enumerate(optimizer.param_groups[group]["params"]) if q is p)
    names = optimizer.param_groups[group].get("param_names")
    return f"param_groups[{group}]['params'][{index}]" + (f" ({names[index]!r})" if names else "")


@dataclasses.dataclass(eq=False, slots=True)
class _Leaf:
    """One parameter: where its values and its state lie in a bucket's buffers. Of a DTensor, the local tensor's."""

    param: Tensor
    local: Tensor  # a DTensor's; else the parameter itself
    placement: Any  # a DTensor's
    group: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    size: int  # in reals
    state_dtypes: dict[str, torch.dtype]
    state_shapes: dict[str, tuple[int, ...]]
    lazy: bool  # a conjugate or negative view
    pointer: int = 0  # where the parameter's values are; another one means that its storage was exchanged
    home: Tensor | None = None  # the parameter's place in the buffer, if it does not live there: copied in and out
    stays: bool = False  # its storage was exchanged once: it is left where its user puts it
    views: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what torch's state holds, by name
    # Where of it in the buffers belongs what does not live there: copied in and out, as a parameter with a home.
    homes: dict[str, Tensor] = dataclasses.field(default_factory=dict)


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
        self.averages = optimizer.ema is not None
        self.seen: Any = None
        self.objects: list[Any] = []
        self.reader: Any = None
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
                x = dtensor.local(p)
                dlpack.check_parameter(name, x)
                rules[index].check_param(name, tuple(x.shape), dlpack.DTYPES[x.dtype])
                shapes = self._slots(rules[index], tuple(x.shape))
                state = optimizer.state.get(p) or {}
                check_state(optimizer, name, rules[index], hyperparameters[index], shapes, state)
                dtypes = _state_dtypes(name, p, shapes, state)
                size = x.numel() * (2 if x.is_complex() else 1)
                leaf = self.leaves[p] = _Leaf(
                    param=p,
                    local=x,
                    placement=dtensor.placement(p),
                    group=index,
                    dtype=x.dtype,
                    shape=x.shape,
                    strides=x.stride(),
                    size=size,
                    state_dtypes=dtypes,
                    state_shapes=shapes,
                    lazy=_is_lazy(x),
                )
                if before := known.get(p):
                    leaf.stays = before.stays
                leaf.stays |= leaf.lazy or leaf.placement is not None  # FSDP gathers from memory that it holds
                real = tuple((slot, _real(dtype)) for slot, dtype in dtypes.items())
                members.setdefault((self.waves[p], rules[index], _real(p.dtype), real), []).append(leaf)
        self.may_be_lazy = [p for p, leaf in self.leaves.items() if leaf.dtype.is_complex or leaf.lazy]
        # Compile all before any memory moves, and move it all: an interrupt finds the old state or the new.
        parts = [
            (rule, dtype, dict(slots), part)
            for (_, rule, dtype, slots), leaves in sorted(members.items(), key=lambda item: item[0][0])
            for part in _shelves(rule, leaves)
        ]
        self.buckets = [_Bucket(i, *part) for i, part in enumerate(parts)]
        self.programs: dict[tuple[bool, bool], tuple[list[Any], list[Any]]] = {}
        self._programs(optimizer)
        hidden = optimizer.hidden_scalars
        with program.SignalsWait():
            staging: dict[np.dtype, _Staging] = {}
            for dtype in {bucket.dtype for bucket in self.buckets}:
                sizes = [bucket.layout.size for bucket in self.buckets if bucket.dtype == dtype]
                staging[dtype] = _Staging(dlpack.aligned_zeros(max(sizes), dtype), shared=len(sizes) > 1)
            self.staging = list(staging.values())
            begun = _averages_begun(optimizer)
            for leaf in self.leaves.values():
                if leaf.state_dtypes or rules[leaf.group].init_scalars(hyperparameters[leaf.group]).keys() - hidden:
                    optimizer.state[leaf.param]  # in the order in which torch makes them
            freed = program.Freed(sum(leaf.local.nbytes for leaf in self.leaves.values()))
            for bucket in self.buckets:
                bucket.take(optimizer, hyperparameters, staging, begun, freed)
        self.views = self._state_views()
        self.addresses = list(map(_pointer_of, self.views))

    def _state_views(self) -> list[Tensor]:
        return [dtensor.local(view) for leaf in self.leaves.values() for view in leaf.views.values()]

    def _slots(self, rule: Rule, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return program.slot_shapes(rule, shape) | ({EMA: shape} if self.averages else {})

    def _programs(self, optimizer: Any) -> tuple[list[Any], list[Any]]:
        """For each bucket what measures its gradients, if they are measured, and what steps it."""
        clip, unscale = optimizer.max_norm is not None, optimizer.grad_scale is not None
        if (clip, unscale) not in self.programs:
            measures: list[Any] = []
            norms: tuple[Any, ...] = ()
            if clip or unscale:
                norms = tuple((len(bucket.leaves), bucket.dtype) for bucket in self.buckets)
                measures = [program.compile_norms(bucket.spec, unscale) for bucket in self.buckets]
            updates = [program.compile_update(bucket.spec, clip, unscale, norms) for bucket in self.buckets]
            self.programs[clip, unscale] = measures, updates
        return self.programs[clip, unscale]

    # --- what a step depends on

    def as_before(self, optimizer: Any, rules: Sequence[Rule]) -> _Gradients | _ReadGradients | None:
        """The gradients, if all is as the last step left it, so that nothing needs to be checked or planned again."""
        if self.seen is None or rules != self.rules or self.averages != (optimizer.ema is not None):
            return None
        if self.reader is not None:
            found = self.reader.read(optimizer.param_groups, optimizer.state, self.objects, self.views)
            if found is not None:
                return _ReadGradients(found)
        grads = [p.grad for p in parameters(optimizer)]
        if self.seen != self.look(grads) or not _are_same(self.objects, _objects(optimizer)):
            return None
        return _Gradients(grads, self.buckets)

    def look(self, grads: list[Any]) -> Any:
        """What the checks depend on, beside `_objects`; `reader.cpp` compares the same."""
        present = [g for g in grads if g is not None]
        stepped = list(self.leaves)
        return (
            list(map(type, grads)),
            list(map(_dtype_of, present)),
            list(map(_layout_of, present)),
            list(map(_pointer_of, stepped)),
            list(map(_dtype_of, stepped)),
            list(map(_shape_of, stepped)),
            list(map(Tensor.stride, stepped)),
            list(map(_is_lazy, self.may_be_lazy)),
            list(map(_pointer_of, self.views)),
        )

    def serves(
        self,
        optimizer: Any,
        rules: Sequence[Rule],
        hyperparameters: Sequence[dict[str, float]],
        grads: dict[Tensor, Tensor],
    ) -> bool:
        """Whether this plan still fits the optimizer; takes note of parameters that moved."""
        if rules != self.rules or self.averages != (optimizer.ema is not None):
            return False
        fits, moved = list(map(_pointer_of, self.views)) == self.addresses, False
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p not in grads and not (self.averages and p in self.leaves):
                    continue
                leaf = self.leaves.get(p)
                if leaf is None or leaf.group != index:
                    fits = False
                    continue
                x = leaf.local = dtensor.local(p)
                if leaf.dtype is not x.dtype or leaf.shape != x.shape or leaf.strides != x.stride():
                    fits = False
                if leaf.placement != dtensor.placement(p):
                    fits = False
                if leaf.lazy != _is_lazy(x):
                    leaf.stays = True
                    fits = False
                if x.data_ptr() != leaf.pointer:
                    if leaf.home is None:
                        # Someone may still hold what it left: that memory cannot serve as its place.
                        leaf.stays = True
                        fits = False
                    leaf.pointer = x.data_ptr()
                    moved = True
                state = optimizer.state.get(p) or {}
                if exchanged := [slot for slot, view in leaf.views.items() if state.get(slot) is not view]:
                    name = parameter_name(optimizer, index, p)
                    check_state(optimizer, name, rules[index], hyperparameters[index], leaf.state_shapes, state)
                    fits = _state_dtypes(name, p, leaf.state_shapes, state) == leaf.state_dtypes and fits
                    moves = leaf.placement is not None or leaf.homes or any(map(_is_shared, state.values()))
                    # An array over the old state has to show the old values.
                    fits = fits and not moves and all(dlpack.is_alone(leaf.views[slot]) for slot in exchanged)
        return fits and not (moved and _waves(list(self.leaves)) != self.waves)

    def begin(
        self,
        optimizer: Any,
        hyperparameters: Sequence[dict[str, float]],
        present: dict[Tensor, Tensor],
    ) -> _Gradients:
        """Note which parameters step, and take in state that its user exchanged; returns the gradients."""
        self.seen = self.reader = None
        params = parameters(optimizer)
        places = {p: i for i, p in enumerate(params)}
        begun = _averages_begun(optimizer)
        for bucket in self.buckets:
            bucket.begin(optimizer.state, hyperparameters, present, places, begun, self.averages)
        self.views = self._state_views()
        plain = all(leaf.placement is None for leaf in self.leaves.values())
        grads = [p.grad for p in params]
        if plain and all(g is None or g is present.get(p) for p, g in zip(params, grads, strict=True)):
            self.seen, self.objects = self.look(grads), _objects(optimizer)
            if reader.extension is not None and all(isinstance(p, Tensor) for p in params):
                stepped = [p in self.leaves for p in params]
                places_of = [(bucket.places, bucket.small_places, bucket.small_views) for bucket in self.buckets]
                self.reader = reader.extension.Reader(params, stepped, self.views, places_of)
        return _Gradients([present.get(p) for p in params], self.buckets)

    def step(
        self, optimizer: Any, hyperparameters: Sequence[dict[str, float]], grads: _Gradients | _ReadGradients
    ) -> None:
        """Step the parameters that `begin` noted, by their gradients."""
        measures, updates = self._programs(optimizer)
        found: dict[str, Any] = {}
        results: list[Any] = []
        with program.SignalsWait(), program.settings():
            for staging in self.staging:
                staging.holder = None
            try:
                if measures:
                    scale = optimizer.grad_scale
                    # In float32, as torch.amp.GradScaler.unscale_
                    inverse = 1.0 if scale is None else float(np.float32(1 / float(scale)))
                    found = {
                        "norms": [],
                        "overflows": [],
                        "max_norm": optimizer.max_norm or 0.0,
                        "inverse_scale": inverse,
                    }
                    for bucket, measure in zip(self.buckets, measures, strict=True):
                        norms, overflow = bucket.measure(measure, grads, inverse)
                        found["norms"].append(norms)
                        found["overflows"].append(overflow)
                for bucket, update in zip(self.buckets, updates, strict=True):
                    if self.averages or bucket.is_active:
                        rest, scalars = bucket.step(update, hyperparameters, grads, found, optimizer.ema)
                        results.append((bucket, rest, scalars))
            finally:
                if measures:  # before torch writes to the gradients that they are computed from
                    jax.block_until_ready(found)
            skipped, norm = False, None
            if measures:
                norm, found_inf = results[0][1]
                skipped = bool(found_inf)
                if not skipped:
                    for bucket, _, scalars in results:
                        bucket.finish(scalars)
        around = optimizer._around
        around.skipped, around.grad_norm = skipped, None if norm is None else dlpack.to_torch(norm)


class _Gradients:
    """A step's gradients, in the order of their parameters; kept until it is over, for programs read them."""

    def __init__(self, grads: Sequence[Any], buckets: Sequence[_Bucket]):
        self.grads = grads
        self.big = [[None if i is None else _dense(grads[i]) for i in bucket.places] for bucket in buckets]

    def of_big(self, bucket: _Bucket) -> list[np.ndarray | None]:
        """Those of its big leaves, flat."""
        return [None if x is None else dlpack.host_array(x, bucket.dtype) for x in self.big[bucket.index]]

    def gather(self, bucket: _Bucket) -> None:
        """Copy those of its small leaves to `small_views`."""
        if bucket.small_views:
            torch._foreach_copy_(bucket.small_views, [self.grads[i] for i in bucket.small_places])  # type: ignore[attr-defined]


class _ReadGradients:
    """The same, as `reader.cpp` found them."""

    def __init__(self, grads: Any):
        self.grads = grads

    def of_big(self, bucket: _Bucket) -> list[np.ndarray | None]:
        return [
            None if address is None else dlpack.array_at(address, leaf.size, bucket.dtype)
            for leaf, address in zip(bucket.big, self.grads.addresses(bucket.index), strict=True)
        ]

    def gather(self, bucket: _Bucket) -> None:
        self.grads.gather(bucket.index)


def _objects(optimizer: Any) -> list[Any]:
    """What a step's checks compare by identity: parameters, group by group, and all that the state holds."""
    objects: list[Any] = []
    for group in optimizer.param_groups:
        objects += group["params"]
        objects.append(None)  # where the group ends
    objects += optimizer.state
    for state in optimizer.state.values():
        if isinstance(state, dict):  # what its user puts beside the parameters' may be anything
            objects += state
            objects += state.values()
            objects.append(None)  # where it ends
        else:
            objects.append(state)
    return objects


def _are_same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _averages_begun(optimizer: Any) -> bool:
    """Whether a new leaf's average begins before the step, as it would had it been averaged from the first step on."""
    return any(isinstance(state, dict) and EMA in state for state in optimizer.state.values())


_dtype_of, _layout_of, _shape_of = map(operator.attrgetter, ("dtype", "layout", "shape"))
_pointer_of = Tensor.data_ptr


def _is_lazy(p: Tensor) -> bool:
    """Whether its values are not those in its memory: a conjugate or negative view of them."""
    return p.is_conj() or p.is_neg()


def _shelves(rule: Rule, leaves: list[_Leaf]) -> list[list[_Leaf]]:
    """The leaves in parts: the small ones of a part fit into buffers of `SHELF` elements; the big are in the first.

    Those that are stepped together are of one shape and group, and of as many elements as caches hold.
    """
    if rule.batched:
        alike: dict[Any, list[list[_Leaf]]] = {}
        for leaf in leaves:
            found = alike.setdefault((leaf.shape, leaf.group), [[]])
            if len(found[-1]) == stack_size(leaf.size):
                found.append([])
            found[-1].append(leaf)
        return [part for found in alike.values() for part in found]
    parts, room = [[leaf for leaf in leaves if is_big(rule, leaf.size)]], SHELF
    for leaf in leaves:
        if not is_big(rule, leaf.size):
            if leaf.size > room:
                parts.append([])
                room = SHELF
            parts[-1].append(leaf)
            room -= -(-leaf.size // ROW) * ROW
    return parts


def is_big(rule: Rule, size: int) -> bool:
    """Whether a leaf has buffers of its own."""
    return size >= BIG or rule.scope == "tensor"


def _waves(params: Sequence[Tensor]) -> dict[Tensor, int]:
    """torch steps parameters one after the other, which shows where two share memory: the turn of each."""
    extents = [_extent(dtensor.local(p)) for p in params]
    overlapping: list[list[int]] = [[] for _ in params]  # the earlier parameters in the memory of each
    still: list[int] = []
    for i in sorted(range(len(params)), key=extents.__getitem__):
        begin, end = extents[i]
        still = [j for j in still if extents[j][1] > begin]
        if end > begin:
            for j in still:
                overlapping[max(i, j)].append(min(i, j))
            still.append(i)
    waves: list[int] = []
    for earlier in overlapping:
        waves.append(1 + max((waves[j] for j in earlier), default=-1))
    return dict(zip(params, waves, strict=True))


def _extent(p: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie; one without memory of its own is refused later, by name."""
    if not dlpack.is_plain(p):
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) if p.numel() else -1
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()


def check_state(
    optimizer: Any,
    name: str,
    rule: Rule,
    h: dict[str, float],
    shapes: dict[str, tuple[int, ...]],
    state: dict[str, Any],
) -> None:
    """Raise torch's KeyError for a state that lacks something, unless there is none yet; ValueError for no number."""
    scalars = rule.init_scalars(h).keys() - optimizer.hidden_scalars
    if not state.keys() - {EMA}:
        return
    for key in (*scalars, *(shapes.keys() - optimizer.late_slots - {EMA})):
        if key not in state:
            raise KeyError(
                f"{name}: {type(optimizer).__name__} reads its state {key!r}, found {sorted(map(str, state))}; load "
                "the state_dict of an optimizer of this class, or clear the state, which then begins anew"
            )
        value = state[key]
        if value is None:
            raise TypeError(f"{name}: expected its state {key!r}, found None; clear the state, which then begins anew")
        if key in scalars:
            check_number(name, key, value)


def check_number(name: str, key: str, value: Any) -> None:
    """Raise ValueError unless a value of a parameter's state is a number, or a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            found = f"shape {tuple(value.shape)}" if value.numel() != 1 else f"a {value.dtype} on {value.device}"
            raise ValueError(f"{name}: expected a number, or a tensor of one, for its state {key!r}, found {found}")
    elif not is_number(value):
        raise ValueError(f"{name}: expected a number, or a tensor of one, for its state {key!r}, found {value!r}")


def check_slot(name: str, key: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError or TypeError unless a value of a parameter's state is a tensor of the shape, with values."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{name}: expected its state {key!r} of shape {shape}, found {found}")
    dlpack.check_tensor(f"the state {key!r} of {name}", value)
    if value.dtype.is_complex or value.dtype not in dlpack.DTYPES:
        raise TypeError(f"{name}: expected its state {key!r} in a real floating type, found {value.dtype}")


def _is_shared(value: Any) -> bool:
    """Whether a state tensor stays where it is: in memory of other processes too."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:  # a sparse one has no storage to ask
        return False
    return dtensor.placement(value) is None and value.is_shared()


def _state_dtypes(
    name: str, p: Tensor, shapes: dict[str, tuple[int, ...]], state: dict[str, Any]
) -> dict[str, torch.dtype]:
    """The type of each slot: the parameter's, or float32 where a narrower parameter's loaded state has it."""
    dtypes = {}
    for slot, shape in shapes.items():
        value = state.get(slot)
        if value is not None and dtensor.placement(value) != dtensor.placement(p):
            raise TypeError(
                f"{name}: expected its state {slot!r} placed as the parameter, {dtensor.describe(p)}, found "
                f"{dtensor.describe(value)}; torch.distributed.checkpoint.state_dict.set_state_dict places it"
            )
        value = dtensor.local(value)
        if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
            whose = "the parameter's shape" if shape == tuple(dtensor.local(p).shape) else "shape"
            raise ValueError(f"{name}: expected its state {slot!r} of {whose} {shape}, found {found}")
        if value is not None and not value.is_sparse and (value.layout is not torch.strided or value.is_meta):
            dlpack.check_tensor(f"the state {slot!r} of {name}", value)
        dtype = p.dtype if value is None else value.dtype
        if dtype is not p.dtype and not KeepsWideState.keeps(dtype, p.dtype):
            raise TypeError(
                f"{name}: expected its state {slot!r} in the parameter's type {p.dtype}, found {dtype}; convert the "
                "model before the optimizer's first step, or its state with it"
            )
        dtypes[slot] = dtype
    return dtypes


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


_leaves_of_rows: weakref.WeakValueDictionary[tuple[int, ...], jax.Array] = weakref.WeakValueDictionary()


def _leaf_of_row(layout: Layout) -> jax.Array:
    """For each row its leaf: one array for all buckets with such rows."""
    found = _leaves_of_rows.get(layout.rows)
    if found is None:
        found = _leaves_of_rows[layout.rows] = dlpack.put(layout.leaf_of_row())
    return found


@dataclasses.dataclass
class _Staging:
    """Where the gradients of small leaves are gathered, one bucket's after the other's."""

    array: np.ndarray
    shared: bool = False  # by several buckets
    holder: int | None = None  # the bucket whose gradients lie there; its number, for it refers to this


class _Bucket:
    """The leaves of one rule and one set of types: their buffers, and the programs that step them."""

    def __init__(self, index: int, rule: Rule, dtype: torch.dtype, slots: dict[str, torch.dtype], leaves: list[_Leaf]):
        self.index = index  # among the plan's
        self.rule = rule
        self.big = [leaf for leaf in leaves if is_big(rule, leaf.size)]
        self.small = [leaf for leaf in leaves if not is_big(rule, leaf.size)]
        self.leaves = self.big + self.small
        self.dtypes = {"param": dlpack.DTYPES[dtype]} | {slot: dlpack.DTYPES[d] for slot, d in slots.items()}
        self.dtype = self.dtypes["param"]
        self.layout = Layout(tuple((leaf.size,) for leaf in self.small), ROW)
        self.leaf_of_row = _leaf_of_row(self.layout)
        self.ends = np.array(self.layout.offsets, np.int32) + np.array(self.layout.sizes, np.int32)
        self.spec = program.Bucket(
            rule,
            tuple(self.dtypes.items()),
            tuple(tuple(leaf.shape) if rule.scope == "tensor" else (leaf.size,) for leaf in self.big),
            len(self.small),
            len(self.leaf_of_row),
        )

    # --- memory

    def take(
        self,
        optimizer: Any,
        hyperparameters: Sequence[dict[str, float]],
        staging: dict[Any, _Staging],
        begun: bool,
        freed: program.Freed,
    ) -> None:
        """Make the buffers, and move parameters and state into them."""
        layout = self.layout
        self.missing = dlpack.aligned_zeros(max((leaf.size for leaf in self.big), default=0), self.dtype)
        self.staging = staging[self.dtype]
        # What programs take each time; the table and the gradients are written anew before.
        shape = len(self.leaves), len(self.spec.columns)
        self.table = dlpack.aligned_zeros(math.prod(shape), self.spec.compute_dtype).reshape(shape)
        self.table_array = dlpack.alias(self.table)
        self.grads = dlpack.alias(self.staging.array[: layout.size].reshape(-1, ROW))
        self.grad_views: list[Tensor] = []  # where the small leaves' gradients are gathered
        self.new = np.zeros(len(self.leaves), bool)  # whose averages begin with the step's result
        self.scalars = self._init_scalars(optimizer, hyperparameters)
        # Parameters first: what they leave is given back before the state takes as much and more.
        shelves = [([leaf], [0]) for leaf in self.big] + [(self.small, list(layout.offsets))] * bool(self.small)
        owned: list[dict[str, dlpack.Buffer]] = []
        for leaves, offsets in shelves:
            owned.append({"param": self._buffer("param", leaves)})
            for leaf, offset in zip(leaves, offsets, strict=True):
                self._take_param(leaf, owned[-1]["param"], offset, optimizer._around)
                freed.add(0 if leaf.home is not None else leaf.local.nbytes)
        rows = iter(range(len(self.leaves)))
        for own, (leaves, offsets) in zip(owned, shelves, strict=True):
            own |= {slot: self._buffer(slot, leaves) for slot in self.spec.names[1:]}
            for leaf, offset in zip(leaves, offsets, strict=True):
                loaded = optimizer.state.get(leaf.param)
                self._take_slots(next(rows), leaf, own, offset, optimizer, hyperparameters[leaf.group], begun)
                freed.add(leaf.local.nbytes * len(leaf.state_dtypes) if loaded else 0)
        self.buffers = [buffer for own in owned for buffer in own.values()]
        gathered = self.staging.array.view(np.uint8)
        for leaf, offset in zip(self.small, layout.offsets, strict=True):
            self.grad_views.append(dlpack.view(gathered, leaf.dtype, tuple(leaf.shape), offset * self.dtype.itemsize))

    def _buffer(self, name: str, leaves: list[_Leaf]) -> dlpack.Buffer:
        """For the parameter or a slot of a big leaf, or of all small ones."""
        shape: int | tuple[int, int] = (self.spec.rows, ROW)
        if leaves is not self.small:
            [leaf] = leaves
            reals = 2 if leaf.dtype.is_complex else 1
            shape = leaf.size if name == "param" else math.prod(leaf.state_shapes[name]) * reals
        return dlpack.Buffer(shape, self.dtypes[name])

    def _take_param(self, leaf: _Leaf, buffer: dlpack.Buffer, offset: int, owner: Any) -> None:
        """Move a parameter to its place `offset` elements into a buffer, if nothing else refers to its storage."""
        leaf.home = buffer.view(leaf.dtype, tuple(leaf.shape), offset * self.dtype.itemsize)
        if leaf.size and not leaf.stays and dlpack.may_move(leaf.param, owner):
            leaf.param.data = dlpack.owned(leaf.home.copy_(leaf.param), owner)
            leaf.home = None
        leaf.pointer = leaf.local.data_ptr()

    def _take_slots(
        self,
        i: int,
        leaf: _Leaf,
        buffers: dict[str, dlpack.Buffer],
        offset: int,
        optimizer: Any,
        h: dict[str, float],
        begun: bool,
    ) -> None:
        """Move a leaf's state to its places."""
        leaf.views = {
            name: dlpack.view(vector, torch.from_numpy(vector).dtype, (), i * vector.itemsize)
            for name, vector in self.scalars.items()
            if name not in optimizer.hidden_scalars
        }
        for slot, dtype in leaf.state_dtypes.items():
            view = buffers[slot].view(dtype, leaf.state_shapes[slot], offset * self.dtypes[slot].itemsize)
            leaf.views[slot] = dtensor.like(view, leaf.param)
        if leaf.views:
            state = optimizer.state[leaf.param]
            for name, value in state.items():
                if name in leaf.views and _is_shared(value):
                    leaf.homes[name], leaf.views[name] = leaf.views[name], value
            self._take_state(i, leaf, state, dict(state), h, begun)

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
                    and any(state.get(s) is not None for s in leaf.state_dtypes if s != EMA)
                ):
                    values[i] = 1.0  # of a hidden step only matters whether there was one
            vectors[name] = np.array(values, _scalar_dtype())
        return vectors

    def _take_state(
        self, i: int, leaf: _Leaf, state: dict[str, Any], values: dict[str, Any], h: dict[str, float], begun: bool
    ) -> None:
        """Make torch's state of a leaf views of the buffers, with the values given, or else the rule's first."""
        first: dict[str, Any] = {}
        if any(values.get(name) is None for name in leaf.views):
            scalars = self.rule.init_scalars(h)
            slots = program.first_slots(
                self.rule, len(leaf.shape), leaf.dtype, self.spec.compute_dtype, tuple(h.items())
            )
            first = scalars | slots | {EMA: leaf.local}
            for name in scalars.keys() - leaf.views.keys():
                self.scalars[name][i] = scalars[name]
        self.new[i] = EMA in leaf.views and values.get(EMA) is None and not begun
        for name, view in leaf.views.items():
            value = first[name] if values.get(name) is None else values[name]
            value, place = dtensor.local(value), dtensor.local(leaf.homes.get(name, view))
            if isinstance(value, Tensor):
                value = value.to_dense() if value.is_sparse else value
                place.copy_(value if place.dim() else value.reshape(()))
            else:
                place.fill_(float(value))
            state[name] = view

    # --- the step

    def begin(
        self,
        states: Any,
        hyperparameters: Sequence[dict[str, float]],
        grads: dict[Tensor, Tensor],
        places: dict[Tensor, int],
        begun: bool,
        averages: bool,
    ) -> None:
        """Note the leaves that have a gradient, and take in state that its user exchanged."""
        self.active = np.array([leaf.param in grads for leaf in self.leaves], bool)
        self.is_active = bool(self.active.any())
        self.table[:, -1] = self.active
        stepped = [leaf for leaf in self.leaves if leaf.param in grads]
        foreign = []  # all is read before any is written, since it may be other state
        for i, leaf in enumerate(self.leaves):
            if (self.active[i] or (averages and states.get(leaf.param))) and leaf.views:
                state = states[leaf.param]
                if any(state.get(name) is not view for name, view in leaf.views.items()):
                    values = {name: x.clone() if isinstance(x, Tensor) else x for name, x in state.items()}
                    foreign.append((i, leaf, state, values))
        for i, leaf, state, values in foreign:
            for name, view in leaf.views.items():
                if state.get(name) is not view:
                    leaf.views[name] = dlpack.leave(view)  # to its user, who may have kept it
            self._take_state(i, leaf, state, values, hyperparameters[leaf.group], begun)
        self.copied_in = [leaf for leaf in (self.leaves if averages else stepped) if leaf.home is not None]
        self.copied_out = [leaf for leaf in stepped if leaf.home is not None]
        shared = [
            (leaf, name)
            for leaf in self.leaves
            for name in leaf.homes
            if leaf.param in grads or (averages and name == EMA)
        ]
        self.shared_slots, self.shared_scalars = (
            [
                (leaf.homes[name], leaf.views[name].view(leaf.homes[name].shape))
                for leaf, name in shared
                if (name in self.scalars) is scalar
            ]
            for scalar in (False, True)
        )
        # A DTensor's own counter does not see that its local tensor was written to.
        self.resident = [leaf.param for leaf in stepped if leaf.home is None or leaf.placement is not None]
        self.places = [places[leaf.param] if leaf.param in grads else None for leaf in self.big]
        small = [i for i, leaf in enumerate(self.small) if leaf.param in grads]
        self.small_views = [self.grad_views[i] for i in small]
        self.small_places = [places[self.small[i].param] for i in small]
        self._find_kinds()
        self.counted = dlpack.put(np.where(self.active[len(self.big) :], self.ends, 0).astype(np.int32))

    def _arrays(self, grads: _Gradients | _ReadGradients) -> list[Any]:
        """The gradients as the programs take them; those of the small leaves are gathered, if they are not yet."""
        arrays: list[Any] = [
            self.missing[: leaf.size] if grad is None else grad
            for leaf, grad in zip(self.big, grads.of_big(self), strict=True)
        ]
        if self.small:
            if self.staging.holder != self.index:
                grads.gather(self)
            self.staging.holder = self.index
            arrays.append(self.grads)
        return arrays

    def measure(self, measure: Any, grads: _Gradients | _ReadGradients, inverse_scale: float) -> tuple[Any, Any]:
        """The norms of the gradients, and whether one is not finite, as arrays that may not be computed yet."""
        scale = _number_array(inverse_scale, self.spec.compute_dtype)
        found = measure(self._arrays(grads), self.leaf_of_row, self.counted, scale)
        if self.staging.shared:
            jax.block_until_ready(found)  # before another bucket's gradients come to lie there
        return found

    def step(
        self,
        update: Any,
        hyperparameters: Sequence[dict[str, float]],
        grads: _Gradients | _ReadGradients,
        found: dict[str, Any],
        ema: float | None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Step the leaves. Returns what the program found, and for `finish`, if that is to come, the scalar state."""
        for leaf in self.copied_in:
            leaf.home.copy_(leaf.local)  # type: ignore[union-attr]
        for place, value in (*self.shared_slots, *self.shared_scalars):
            place.copy_(value)
        scalars = self._coefficients(hyperparameters, ema)
        found = {
            name: x if isinstance(x, list) else _number_array(x, self.spec.compute_dtype) for name, x in found.items()
        }
        arrays = self._arrays(grads)
        out = program.launch(update, self.buffers, arrays, self.table_array, self.leaf_of_row, found)
        try:
            if not found:  # then it is not skipped, and this is done while it runs
                self.finish(scalars)
        finally:
            jax.block_until_ready(out)
        for leaf in self.copied_out:
            leaf.local.copy_(leaf.home)  # type: ignore[arg-type]
        for place, value in self.shared_slots:
            value.copy_(place)
        if ema is not None:
            self.new[:] = False
        return out[len(self.buffers) :], scalars

    def finish(self, scalars: dict[str, Any]) -> None:
        """After a step that was not skipped: the scalar state and torch's version counters."""
        for name, vector in self.scalars.items():
            np.copyto(vector, scalars[name], where=self.active, casting="same_kind")
        for place, value in self.shared_scalars:
            value.copy_(place)
        self.known = self._scalar_bytes()
        # As torch's own in-place operations do, so that a backward through old values raises.
        torch.autograd.graph.increment_version(self.resident)

    def _coefficients(self, hyperparameters: Sequence[dict[str, float]], ema: float | None) -> dict[str, Any]:
        """Fill the table, one row a leaf; returns the next scalar state."""
        if self.known != self._scalar_bytes():  # its user wrote to one
            self._find_kinds()

        def of_kinds(values: list[Any]) -> Any:
            # One kind's are numbers: several times as fast as arrays, and powers are the C library's, as torch's are.
            return np.float64(values[0]) if len(values) == 1 else np.array(values, np.float64)

        groups = [hyperparameters[self.leaves[i].group] for i in self.kinds]
        h = {name: of_kinds([group.get(name, math.nan) for group in groups]) for name in self.rule.hyperparameters}
        s = {name: of_kinds([x[i] for i in self.kinds]) for name, x in self.scalars.items()}
        with np.errstate(all="ignore"):
            c, scalars = self.rule.scalars(h, s, np, lambda x: np.asarray(x).astype(_scalar_dtype()).astype(np.float64))
        if len(self.kinds) > 1:
            c, scalars = (
                {k: np.broadcast_to(x, len(self.kinds))[self.kind_of] for k, x in d.items()} for d in (c, scalars)
            )
        for column, value in enumerate(c.values()):
            self.table[:, column] = value
        if ema is not None:
            self.table[:, len(c)] = np.where(self.new, 1.0, 1 - ema)
        return scalars

    def _find_kinds(self) -> None:
        """Which leaves share all that their coefficients depend on: mostly all of a group."""
        keys = list(zip((leaf.group for leaf in self.leaves), self.active, *self.scalars.values(), strict=True))
        numbers: dict[Any, int] = {}
        self.kind_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        self.kinds = np.unique(self.kind_of, return_index=True)[1].tolist()  # the first leaf of each
        self.known = self._scalar_bytes()

    def _scalar_bytes(self) -> list[bytes]:
        return [x.tobytes() for x in self.scalars.values()]


@functools.lru_cache(maxsize=64)
def _number_array(x: float, dtype: np.dtype) -> jax.Array:
    return dlpack.put(np.asarray(x, dtype))


def _scalar_dtype() -> Any:
    """The type of torch's scalar state."""
    return np.float64 if torch.get_default_dtype() is torch.float64 else np.float32


def _dense(grad: Tensor) -> Tensor:
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    return grad.resolve_neg().contiguous()
