"""A run in memory: parameters and optimizer state by name, between torch, JAX and files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from interop.dropin import formats
from interop.dropin.options import EXECUTION
from interop.dropin.slots import shape_of_slot
from interop.dropin.state import KeepsWideState
from interop.memory import HOST
from interop.modules import JaxLeaf
from interop.runs.bridge import NO_ARGUMENTS, OptimizerState, run_to_jax, run_to_torch
from interop.runs.classes import CLASSES, class_of, defaults, state_shapes
from interop.runs.files.errors import CheckpointError
from interop.runs.files.naming import compare, renamed
from interop.runs.moving import names_of, run_of
from jopt import State, Transform
from jopt._compat import enable_x64
from jopt.around.groups import Groups, GroupsState
from jopt.quantized import ABSMAX

EXTRA_STATE = "_extra_state"  # entries of a model's state_dict that are no tensors


@dataclasses.dataclass
class Checkpoint:
    """A run as files hold it, between live runs of torch and JAX.

    >>> import torch, interop
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> checkpoint = interop.Checkpoint.from_torch(model, optimizer)
    >>> checkpoint.step, sorted(checkpoint.optimizer.state["bias"])
    (1, ['exp_avg', 'exp_avg_sq', 'step'])
    >>> tx, params, state = checkpoint.to_jax()
    >>> interop.Checkpoint.from_jax(tx, params, state).to_torch(model, optimizer)

    Attributes:
      params: the parameters by name; tied ones under each of their names.
      buffers: the model's buffers by name.
      optimizer: its state, None if there is none.
      step: steps taken, None if not known.
      extra: what else there is, under the file's keys: schedulers, GradScaler, averages, epochs; tensors, numbers,
        strings, lists, tuples and dictionaries.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    optimizer: OptimizerState | None = None
    step: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_torch(
        cls,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int | None = None,
        **extra: Any,
    ) -> Checkpoint:
        """The run of a live model and optimizer, of torch.optim or interop.optim. Tensors are theirs, not copies.

        Args:
          model: gives the names.
          optimizer: any class of torch.optim but LBFGS, or a subclass.
          step: by default the largest step of the state.
          extra: state_dicts to keep beside, as `lr_scheduler=scheduler.state_dict()`.

        Raises:
          CheckpointError: another optimizer, or one of parameters that the model does not have.
        """
        params, buffers, other = split(model.state_dict(), model)
        if other:
            extra[EXTRA_STATE] = other
        self = cls(params, buffers, None, step, extra)
        if optimizer is not None:
            _class_name(optimizer)
            self.optimizer = run_of(optimizer, _names(optimizer, model))
            if step is None:
                self.step = last_step(self.optimizer)
        return self

    def to_torch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write the run into a live model and, if given, optimizer. All is checked before anything is written.

        Of a file of an optimizer alone the model stays as it is.

        The optimizer's groups take the options of the same parameters here; how it runs (foreach, fused, capturable,
        differentiable) stays its own. Parameters that never stepped lose their state.

        Raises:
          CheckpointError: other names, with a proposed map; other shapes or types; another class of optimizer; groups
            that mix parameters of different options; state that the class does not have.
        """
        others = self.extra.get(EXTRA_STATE, {})
        target = model.state_dict()
        tensors = {name: x for name, x in target.items() if isinstance(x, Tensor)}
        own = self.params | self.buffers
        if own or optimizer is None:
            compare(_shapes(own), _shapes(tensors), "the model's state_dict")
        for name, x in own.items():
            _same_type(name, x, tensors[name].dtype)
        state_dict = self._state_dict_for(optimizer, model) if optimizer is not None else None
        if own:
            model.load_state_dict(own | {name: x for name, x in others.items() if name in target})
        if optimizer is not None and state_dict is not None:
            optimizer.load_state_dict(state_dict)

    def _state_dict_for(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
        """A state_dict in the order of a live optimizer's groups, in tensors of its own."""
        if self.optimizer is None:
            raise CheckpointError("it holds no optimizer; give the model alone")
        names, name = _names(optimizer, model), _class_name(optimizer)
        if self.optimizer.name not in (None, name):
            raise CheckpointError(f"optimizer: expected one of class {self.optimizer.name}, found {name}")
        shapes = {name: tuple(p.shape) for p, name in names.items()}
        compare({n: shapes.get(n, ()) for n in self.optimizer.names}, shapes, "the optimizer's parameters")
        check_state(self.optimizer, name, shapes)
        options = {n: group for group in self.optimizer.groups for n in group["params"]}
        groups, state, i = [], {}, 0
        for g, group in enumerate(optimizer.param_groups):
            members = [names[p] for p in group["params"]]
            given = [{k: v for k, v in options[n].items() if k != "params"} for n in members]
            for n, other in zip(members, given, strict=True):
                if not equal(other, given[0]):
                    raise CheckpointError(
                        f"the optimizer's group {g} holds {members[0]!r} and {n!r}, whose options differ here; make "
                        "its groups as those of the run"
                    )
            old = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            new = old | (given[0] if given else {}) | {k: v for k, v in old.items() if k in EXECUTION}
            if isinstance(old["lr"], Tensor):
                new["lr"] = torch.full_like(old["lr"], float(new["lr"]))
            groups.append(new | {"params": list(range(i, i + len(members)))})
            for p, n in zip(group["params"], members, strict=True):
                if n in self.optimizer.state:
                    state[i] = {k: _for_parameter(n, k, x, p, optimizer) for k, x in self.optimizer.state[n].items()}
                i += 1
        return {"state": state, "param_groups": groups}

    @classmethod
    def from_jax(
        cls,
        tx: Transform | Groups,
        params: Mapping[str, Any],
        state: State | GroupsState,
        *,
        buffers: Mapping[str, Any] | None = None,
        step: int | None = None,
        **extra: Any,
    ) -> Checkpoint:
        """The run of a `jopt` transformation of one of torch's classes, of copies.

        Args:
          tx: of `jopt`, as `jopt.adamw(...)`, or `jopt.param_groups` of such. A schedule becomes its present value.
          params: a flat dictionary by torch's names; as are `buffers`.
          state: of `tx.init(params)`, or later.
          step: by default the state's count.

        Raises:
          CheckpointError: an optimizer that torch does not have, or a state of other parameters.
        """
        from interop.runs.files.jaxrun import torch_groups

        with enable_x64(True):
            name, groups, count = torch_groups(tx, params, state)
            own = {k: tensor(k, x) for k, x in params.items()}
            leaves = {k: JaxLeaf(k) for k in own}
            try:
                members = [group["params"] for group in groups]
                found = run_to_torch(name, tx, dict(params), state, members, own, leaves)
            except (TypeError, ValueError) as error:
                raise CheckpointError(str(error)) from error
            others = {k: tensor(k, x) for k, x in (buffers or {}).items()}
        kept = {n: values for n, values in found.items() if values}
        steps = count if step is None else step
        return cls(own, others, OptimizerState(name, groups, kept), steps, extra)

    def to_jax(self, **arguments: Any) -> tuple[Transform | Groups, dict[str, jax.Array], State | GroupsState]:
        """`(tx, params, state)` as of `interop.optimizer_to_jax`, of copies: the parameters that the optimizer holds.

        Args:
          arguments: as of `optimizer_to_jax`: instead of the optimizer's own, as `lr=` a schedule; or others, as
            `state_dtype=`. `step=` is by default this checkpoint's.

        Raises:
          CheckpointError: no optimizer here, or one of an unknown class; state that the class does not have.
          TypeError: a type that JAX does not have (float64 needs jax_enable_x64).
        """
        if self.optimizer is None or self.optimizer.name not in CLASSES:
            found = "none" if self.optimizer is None else f"one of class {self.optimizer.name or 'unknown'}"
            remedy = "; interop.to_jax(checkpoint.params) gives the parameters alone" if self.optimizer is None else ""
            raise CheckpointError(f"optimizer: expected one of torch.optim's but LBFGS, found {found}{remedy}")
        if lost := [n for n in self.optimizer.names if n not in self.params]:
            raise CheckpointError(f"the optimizer's parameter {lost[0]!r} has no tensor here")
        check_state(self.optimizer, self.optimizer.name, _shapes(self.params))
        params = {n: self.params[n].detach() for n in self.optimizer.names}
        run = dataclasses.replace(self.optimizer, groups=[_completed(self.optimizer, g) for g in self.optimizer.groups])
        step = arguments.pop("step", self.step)
        return run_to_jax(run, params, {n: JaxLeaf(n) for n in params}, step=step, arguments=arguments)

    def renamed(self, patterns: Mapping[str, str]) -> Checkpoint:
        """With other names: `{"module.*": "*"}`, `{"module.": ""}`, or whole names; the rest keeps its own.

        Raises:
          CheckpointError: a pattern that fits no name, or two names that become one.
        """
        known = [*self.params, *self.buffers, *(self.optimizer.names if self.optimizer else [])]
        new = renamed(known, patterns)
        optimizer = self.optimizer
        if optimizer is not None:
            optimizer = OptimizerState(
                optimizer.name,
                [group | {"params": [new[n] for n in group["params"]]} for group in optimizer.groups],
                {new[n]: values for n, values in optimizer.state.items()},
            )
        params, buffers = ({new[n]: x for n, x in tree.items()} for tree in (self.params, self.buffers))
        return dataclasses.replace(self, params=params, buffers=buffers, optimizer=optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but those of `extra`: `params.<name>`, `buffers.<name>`, `state.<name>.<key>`."""
        state = self.optimizer.state if self.optimizer else {}
        return (
            {f"params.{name}": x for name, x in self.params.items()}
            | {f"buffers.{name}": x for name, x in self.buffers.items()}
            | {f"state.{n}.{k}": x for n, values in state.items() for k, x in values.items() if isinstance(x, Tensor)}
        )

    def oddities(self) -> list[str]:
        """What a run can hold, but seldom should: values that are not finite, steps that differ, unknown keys."""
        found = []
        for name, x in self.tensors().items():
            if x.is_floating_point() or x.is_complex():
                bad = sum(int((~torch.isfinite(part)).sum()) for part in x.reshape(-1).split(1 << 22))
                if bad:
                    found.append(f"{name}: {bad} of {x.numel()} values are nan or infinite")
        optimizer = self.optimizer
        if optimizer is None:
            return found
        steps: dict[float, list[str]] = {}
        for name, values in optimizer.state.items():
            if "step" in values:
                steps.setdefault(float(values["step"]), []).append(name)
        if len(steps) > 1:
            counts = ", ".join(f"{step:g} ({len(names)}, as {names[0]!r})" for step, names in sorted(steps.items()))
            found.append(f"steps differ: {counts}")
        if steps and self.step is not None and self.step != max(steps):
            found.append(f"step is {self.step}, the state's {max(steps):g}")
        without = [name for name in optimizer.names if name not in optimizer.state]
        if without and optimizer.state:
            found.append(f"{len(without)} parameters without state, as {without[0]!r}")
        outside = [name for name in self.params if name not in set(optimizer.names)]
        if outside and self.params:
            found.append(f"{len(outside)} parameters outside the optimizer, as {outside[0]!r}")
        if optimizer.name is None:
            found.append("the optimizer's class is not known")
        elif optimizer.name in CLASSES:
            known = CLASSES[optimizer.name].known
            unknown = sorted({k for values in optimizer.state.values() for k in values} - known)
            if unknown:
                found.append(f"unknown keys in the state of {optimizer.name}: {', '.join(unknown)}")
        return found


def _completed(optimizer: OptimizerState, group: dict[str, Any]) -> dict[str, Any]:
    """A group with torch's defaults for what it does not say."""
    known = defaults(str(optimizer.name))
    if unknown := group.keys() - known.keys() - NO_ARGUMENTS - {formats.KEY}:
        raise CheckpointError(
            f"the options of {optimizer.name} are none that torch takes: it has no {', '.join(sorted(unknown))}"
        )
    return {**known, **group}


def _class_name(optimizer: Any) -> str:
    with contextlib.suppress(TypeError):
        if (name := class_of(optimizer)) in CLASSES:
            return name
    raise CheckpointError(f"optimizer: expected one of torch.optim's but LBFGS, found {type(optimizer).__qualname__}")


def _names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[Tensor, str]:
    try:
        return names_of(optimizer, model)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def split(
    state_dict: Mapping[str, Any], model: torch.nn.Module | None, buffers: set[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Parameters, buffers and what is no tensor. Without a model or names, buffers are told by type and name."""
    if model is not None:
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        buffers = {name for name in model.state_dict() if name not in known} if known & set(state_dict) else buffers
    params, rest, other = {}, {}, {}
    for name, x in state_dict.items():
        if not isinstance(x, Tensor):
            other[name] = x
        elif name in buffers if buffers is not None else _looks_like_buffer(name, x):
            rest[name] = x.detach()
        else:
            params[name] = x.detach()
    return params, rest, other


def _looks_like_buffer(name: str, x: Tensor) -> bool:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return not (x.is_floating_point() or x.is_complex()) or name.rsplit(".", 1)[-1] in statistics


def last_step(optimizer: OptimizerState) -> int | None:
    return int(max(optimizer.steps)) if optimizer.steps else None


def check_state(optimizer: OptimizerState, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """That each parameter's state is one that the class steps from."""
    cls, known = CLASSES[name], {}
    for index, group in enumerate(optimizer.groups):
        for parameter in set(group["params"]) & shapes.keys():
            try:
                known[parameter] = state_shapes(name, group, shapes[parameter])
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"groups[{index}]: {error}") from error
    for parameter, values in optimizer.state.items():
        where, shape = f"the state of {parameter!r}", shapes.get(parameter)
        if shape is None:
            raise CheckpointError(f"{where}: the optimizer has no such parameter")
        if lost := cls.lacks(values):
            raise CheckpointError(f"{where}: {name} needs {', '.join(map(repr, sorted(lost)))}")
        if unknown := set(values) - cls.known:
            raise CheckpointError(f"{where}: {name} has no {', '.join(map(repr, sorted(unknown)))}")
        for key, x in values.items():
            expected = shape_of_slot(known[parameter], key, shape)
            if x is None and key in cls.always:
                raise CheckpointError(f"{where}: {key!r}: expected shape {expected}, found None")
            if x is not None and np.shape(x) != expected:
                raise CheckpointError(f"{where}: {key!r}: expected shape {expected}, found {tuple(np.shape(x))}")
            if key == "step" and x is not None and not 0 <= float(x) < 2**53:
                raise CheckpointError(f"{where}: 'step': expected a number of steps, found {float(x)}")


def _for_parameter(name: str, key: str, x: Any, p: Tensor, optimizer: Any) -> Any:
    """A copy of a state tensor, which the optimizer will keep in this type."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    # What is of another format it converts (`load_state_dict`).
    of_format = x.dtype in (torch.uint8, torch.bfloat16) or key.endswith(ABSMAX)
    kept = isinstance(optimizer, KeepsWideState) and (of_format or optimizer.keeps(x.dtype, p.dtype))
    if x.dim() and x.dtype != p.dtype and not kept:
        raise CheckpointError(
            f"the state of {name!r}: {key!r}: expected {p.dtype}, found {x.dtype}, which torch.optim would round; "
            "interop.optim keeps float32 state of bfloat16 and float16 parameters"
        )
    return x.clone()


def _same_type(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise CheckpointError(
            f"the model's state_dict: {name!r}: expected {dtype}, found {x.dtype}; nothing is cast: "
            f"model.to({x.dtype}) first"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}


def tensor(name: str, x: Any) -> Tensor:
    """A tensor of its own of an array of JAX or NumPy."""
    from interop.memory.values import to_torch

    try:
        return to_torch(x if isinstance(x, jax.Array) else jax.numpy.asarray(x), copy=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name!r}: {error}") from error


def bits(x: Tensor) -> Tensor:
    """A tensor's bytes."""
    return x.detach().to(HOST.torch_device).resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same, bit by bit; a 0-d tensor is its number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(bits(a), bits(b)))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = (x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in (a, b))
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return False
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (a != a and b != b)
