"""The classes of `interop.optim`: torch's own with another `step`, one that XLA compiled.

Their parameters and state live in buffers that a compiled program writes in place and torch sees (`interop.memory`):

    gradients, coefficients -> compiled(buffers) -> the same buffers      (program.py)

Parameters move into a buffer at the first step in which they have a gradient (bucket.py). A plan says which lie where
(plan.py). What a step finds as the last one left it is not checked again (reader.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from interop.dropin import formats, host, options, processes, program, sums
from interop.dropin.groups import Groups, parameters
from interop.dropin.measured import measures
from interop.dropin.plan import Plan, plan_for
from interop.dropin.skipping import Pending
from interop.dropin.state import KeepsWideState, placed
from jopt.rule import Rule

L = TypeVar("L")  # a loss


# The arguments that `CompiledStep` adds to a class's.
AROUND = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=f"{kind} | None")
    for name, kind in (("max_norm", "float"), ("ema", "float"), ("state_dtype", "str"))
)


def step(optimizer: Any) -> None:
    """A step of `CompiledStep`."""
    optimizer._around.settle()
    groups: Groups | None = optimizer._groups
    if groups is None or not groups.still_hold(optimizer):
        groups = optimizer._groups = Groups(optimizer)
    sums.check_groups(optimizer, groups)
    plan: Plan | None = optimizer._plan
    if plan is not None:
        if plan.turn is not None and plan.turn.quick is not None and plan.turn.quick(optimizer, groups):
            return
        for device in plan.devices:
            device.begin()
    measured, meshes = None, _meshes(optimizer)
    with processes.together(meshes, optimizer):
        plan, grads = plan_for(optimizer, groups.rules, groups.numbers)
    norm, skipped = None, False
    if plan is None and meshes:  # the others wait for what this process has: nothing
        total, skipped, _ = processes.agree(meshes, optimizer)
        sums.of_all(None, optimizer, meshes, None, groups.numbers, None)
        norm = torch.tensor(total, dtype=parameters(optimizer)[0].dtype) if measures(optimizer) else None
    if plan is not None:
        with host.SignalsWait(), contextlib.nullcontext() if plan.uses_torch else host.settings():
            with processes.together(meshes, optimizer):
                measured = plan.measure(optimizer, grads) if measures(optimizer) else None
            if meshes:
                plan.agree(optimizer, meshes, measured)
            added = sums.of_all(plan, optimizer, meshes, grads, groups.numbers, measured)
            norm, skipped = plan.update(optimizer, grads, groups.numbers, measured, added)
    optimizer._around.found(norm, skipped)


def _meshes(optimizer: Any) -> list[Any]:
    """Those whose processes have to find out something together for a step."""
    if not optimizer._around.compared:
        processes.compare(optimizer)
        optimizer._around.compared = True
    if measures(optimizer) or optimizer.rule.sums:
        return processes.meshes(optimizer, with_plain=False)
    return processes.meshes(optimizer) if optimizer.rule.scope == "tensor" else []


class OfTorch(KeepsWideState):
    """Gives a class of torch.optim the list of options that the step in place of its own knows."""

    defaults: dict[str, Any]

    @classmethod
    def known_options(cls) -> frozenset[str]:
        """The names of torch's arguments whose meaning the step knows."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        try:
            if len(self.param_groups) == 1:  # called by torch's constructor, so the groups are still torch's own
                options.check_defaults(type(self), self.defaults)
            options.check_groups(type(self), self.param_groups)
        except NotImplementedError:
            del self.param_groups[-1]
            raise


class Stepped(OfTorch):
    """Gives a class of torch.optim another step: `_step`, which sees gradients and parameters and changes them."""

    rule: ClassVar[type[Rule]]
    hidden_scalars: ClassVar[frozenset[str]] = frozenset()  # scalar state of the rule that torch does not keep
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
        host.undynamo(_guarded)(self)
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
            # torch wraps every step, which costs as much as a small step: called here only if it has something to do.
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
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            optimizer._step()
        return
    enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # as no_grad does, which takes as long as a small step's arithmetic
    try:
        optimizer._step()
    finally:
        torch._C._set_grad_enabled(enabled)


@dataclasses.dataclass(eq=False, slots=True, weakref_slot=True)
class Around:
    """What a step does around itself, and what it found.

    One object, for Lightning and Fabric wrap an optimizer in an object of a subclass of its class, which has the
    optimizer's attributes only until one is assigned.
    """

    max_norm: float | None = None
    ema: float | None = None
    state_dtype: str | None = None  # of groups that do not say their own
    grad_scale: Tensor | None = None
    grad_norm: Tensor | None = None
    skipped: bool = False
    pending: Pending | None = None  # the last step, if the host does not know yet whether it was skipped
    compared: bool = False  # with what other processes step

    def found(self, norm: Tensor | None, skipped: bool | Pending) -> None:
        """Keep what a step found."""
        self.grad_norm = norm
        if isinstance(skipped, Pending):
            self.pending = skipped
        else:
            self.skipped = skipped

    def settle(self) -> None:
        """Wait for what is not known yet."""
        if self.pending is not None:
            self.skipped, self.pending = self.pending.settle(), None


class CompiledStep(Stepped):
    """Gives a class of torch.optim the compiled step. Put it before that class among the bases.

    Everything but `step` is torch's: signature, defaults, errors, parameter groups, state keys, state_dict, hooks,
    schedulers. `foreach`, `fused` and `capturable` choose among torch's own paths and mean nothing here;
    `differentiable=True` is refused.

    Keyword arguments more put into the compiled step what a training loop does around it, and say how state is kept:

    Args:
        max_norm: clip the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_(params, max_norm)` before
            the step would. The gradients themselves stay as they are; their norm is `grad_norm`.
        ema: the decay of an exponential moving average of the parameters, as `torch.optim.swa_utils.AveragedModel` with
            `get_ema_multi_avg_fn(ema)` keeps it when updated after each step: `optimizer.state[p]["ema"]`.

        state_dtype: "int8", "bfloat16" or "float32", as in `jopt.transform.Options`, for state in fewer bits than the
            parameters', or in more; rounded to nearest. A group may have its own. In eight bits state has other names,
            `exp_avg_int8` and `exp_avg_absmax`, which torch.optim does not take for numbers; `load_state_dict` converts
            from any format to the optimizer's.

    `max_norm` and `ema` are attributes too, and may be changed at any time. With `interop.amp.GradScaler` the step also
    unscales.
    """

    _groups: Groups | None = None
    _plan: Plan | None = None
    compile_update: ClassVar[Callable[..., Any]] = staticmethod(program.compile_update)
    _around: Around

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients, unscaled and before clipping, if the step clips or unscales."""
        return self._around.grad_norm

    @property
    def skipped(self) -> bool:
        """Whether the last step changed nothing, for an unscaled gradient was not finite."""
        self._around.settle()
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
        init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *AROUND])  # type: ignore[attr-defined]
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = init  # type: ignore[method-assign]

    def __init__(
        self,
        *args: Any,
        max_norm: float | None = None,
        ema: float | None = None,
        state_dtype: str | None = None,
        **kwargs: Any,
    ):
        self._around = Around(state_dtype=state_dtype)
        self.max_norm, self.ema = max_norm, ema
        super().__init__(*args, **kwargs)
        self.state.update(formats.adapt(self, self.state))  # type: ignore[attr-defined]  # Adagrad makes it here

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

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        self._around.settle()
        return placed(self, super().state_dict())  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        self._around.settle()
        return {**super().__getstate__(), "_around": Around(self.max_norm, self.ema, self._around.state_dtype)}  # type: ignore[misc]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False, so that GradScaler unscales the gradients itself, and skips the step on inf."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it for fused=True."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        group = self.param_groups[-1]
        form = group.pop(formats.KEY, None) or self._around.state_dtype
        if form is not None:
            group[formats.KEY] = form
            try:
                formats.check(self, group)
            except (TypeError, ValueError):
                del self.param_groups[-1]
                raise
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
        step(self)


def _number(name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not accepts(float(value)):
        raise ValueError(f"{name}: expected {expected}, found {value!r}")
    return float(value)
