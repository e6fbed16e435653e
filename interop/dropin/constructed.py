"""Optimizers that torch has not, as torch's optimizers: arguments and defaults of `jopt`'s function of their name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from interop.dropin import heavyball
from interop.dropin.options import EXECUTION
from interop.dropin.step import AROUND, CompiledStep
from interop.dropin.sums import shared_scalars
from jopt.optimizers.prodigy import ESTIMATES
from jopt.rule import PHASE
from jopt.transform import DEFAULTS


class Constructed(CompiledStep, Optimizer):
    """A class with the arguments of a `jopt` function, in its order, and `params` before them.

    So is the class of a rule of one's own made: `rule`, and the `function` that gives its arguments and defaults. A
    flag of the rule is an argument of the function too.

    >>> import dataclasses, torch, jopt
    >>> from interop import optim
    >>> from jopt import numerics as t
    >>> @dataclasses.dataclass(frozen=True)
    ... class SignDescent(jopt.rule.Rule):
    ...     hyperparameters = ("lr",)
    ...     def init(self, h, param):
    ...         return {}
    ...     def scalars(self, h, s, xp, stored):
    ...         return {"-lr": -h["lr"]}, {"step": s["step"] + 1}
    ...     def update(self, c, grad, state, param):
    ...         return t.add(param, t.sign(grad), alpha=c["-lr"]), state
    >>> @jopt.transform.optimizer
    ... def sign_descent(lr=1e-3, **options):
    ...     return jopt.transform.transform(SignDescent, dict(lr=lr), **options)
    >>> class SignOptimizer(optim.Constructed):
    ...     rule, function = SignDescent, staticmethod(sign_descent)
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = SignOptimizer([w], lr=0.5)
    >>> w.sum().backward()
    >>> optimizer.step()
    >>> w.tolist()
    [0.5, 0.5]

    `foreach`, `fused`, `capturable` and `differentiable=False` are taken, as torch's classes take them, and mean
    nothing here. `max_norm` and `ema` are as in `CompiledStep`.

    Raises:
      ValueError: a number out of its range, as the authors' class says it.
    """

    function: ClassVar[Callable[..., Any]]
    fixed: ClassVar[dict[str, Any]] = {}  # what the class is for: in each of its groups, and no argument
    modes: ClassVar[dict[str, Any]] = {}  # what methods of the class set in its groups
    in_groups: ClassVar[dict[str, str]] = {}  # what the authors' class counts in a group, and our state's name of it
    in_two: ClassVar[frozenset[str]] = frozenset()  # of those what our state has in two numbers
    not_here: ClassVar[frozenset[str]] = frozenset()  # what else is in the authors' groups

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "function" not in vars(cls):
            return
        left_out = {*DEFAULTS, *cls.fixed}  # jopt's own options too
        own = [x for x in inspect.signature(cls.function).parameters.values() if x.name not in left_out]
        execution = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in EXECUTION]
        params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([params, *own, *execution, *AROUND])

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                arguments = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}: {error}") from None
            arguments.apply_defaults()
            given = arguments.arguments
            params, around = given.pop("params"), {x.name: given.pop(x.name) for x in AROUND}
            numbers = {name: x for name, x in given.items() if name not in EXECUTION}
            cls.function(**{name: x.item() if isinstance(x, Tensor) else x for name, x in numbers.items()})  # checks
            super(cls, self).__init__(params, given | cls.fixed | cls.modes, **around)  # type: ignore[reportCallIssue]

        init.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()]
        )
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = init  # type: ignore[method-assign]

    @classmethod
    def known_options(cls) -> frozenset[str]:
        return super().known_options() | cls.fixed.keys() | cls.modes.keys()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check_fixed([param_group], len(self.param_groups))
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; also that of the authors' class."""
        self._check_fixed(state_dict["param_groups"])
        super().load_state_dict(self._of_authors(state_dict))

    def _of_authors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state_dict in which what the authors count by the group is in each parameter's state."""
        state, groups = dict(state_dict["state"]), []
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            counted = {ours: float(group[key]) for key, ours in self.in_groups.items() if key in group}
            for name in self.in_two & counted.keys():
                counted[f"{name}_rest"] = counted[name] - torch.tensor(counted[name]).item()
            for i in group["params"] if counted else ():
                if state.get(i):
                    state[i] = {key: torch.tensor(x) for key, x in counted.items()} | state[i]
            numbers = {*self.rule.hyperparameters, *self.rule.tuples, "param_names"}
            lacks = {key: x for key, x in own.items() if key not in group and key not in numbers}
            left_out = {*self.in_groups, *self.not_here}
            groups.append(lacks | {key: x for key, x in group.items() if key not in left_out})
        return {**state_dict, "state": state, "param_groups": groups + state_dict["param_groups"][len(groups) :]}

    def _check_fixed(self, groups: Iterable[Mapping[str, Any]], first: int = 0) -> None:
        for i, group in enumerate(groups, first):
            for name, value in self.fixed.items():
                if group.get(name, value) != value:
                    raise ValueError(
                        f"param_groups[{i}][{name!r}]: expected {value!r} for {type(self).__name__}, found "
                        f"{group[name]!r}; take the class that is for it"
                    )


class PerAxis(Constructed):
    """A class that keeps a matrix for each axis of a tensor, where the authors' has lists of them."""

    lists: ClassVar[tuple[str, ...]]
    uncounted: ClassVar[float] = 0.0  # calls that the authors' step does not count

    def _of_authors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if heavyball.MARK in state_dict:
            state_dict = heavyball.of_authors(state_dict, self.param_groups, self.rule)
        state_dict = super()._of_authors(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        of_key = {key: (i, *x) for i, (key, x) in enumerate(zip(keys, params, strict=False))}
        state = {
            key: self._flat(x, *of_key[key]) if key in of_key and any(name in x for name in self.lists) else x
            for key, x in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def _flat(self, state: dict[str, Any], i: int, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state of the authors' class as ours."""
        rule = self.rule.shaped_by(group, self.rule.members(group))
        found = {name: torch.tensor(x) for name, x in rule.init_scalars(self.rule.members(group)).items()}
        if PHASE in found:
            found[PHASE] = torch.tensor(float(i))
        for key, x in state.items():
            if key in self.lists:
                found |= {f"{key}_{k}": matrix for k, matrix in enumerate(x or ()) if len(matrix)}
            elif (
                isinstance(x, Tensor) and x.dim() and x.numel() == param.numel()
            ):  # theirs has the shape of neighbouring axes in one
                found[key] = x.reshape(param.shape)
        return found | {"step": torch.tensor(state["step"] + self.uncounted)}


class Kron(PerAxis):
    """The class that takes kron_torch's schedule for its own."""

    lists = ("Q",)

    def _of_authors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        key, groups = "preconditioner_update_probability", []
        for i, group in enumerate(state_dict["param_groups"]):
            theirs = group.get(key)
            if hasattr(theirs, "flat_start"):  # kron_torch's schedule, of whose numbers ours has the defaults
                numbers = [round(float(getattr(theirs, x)), 7) for x in ("max_prob", "min_prob", "decay", "flat_start")]
                if numbers != [1.0, 0.03, 0.001, 500.0]:
                    raise ValueError(
                        f"param_groups[{i}][{key!r}]: expected the schedule of kron_torch's defaults, found {numbers}; "
                        "put a function of the steps before there, which may be an array"
                    )
                group = group | {key: None}
            groups.append(group)
        return super()._of_authors({**state_dict, "param_groups": groups})


class ScheduleFree(Constructed):
    """A schedule-free class. Its parameters are those of training, y, or those to evaluate, x, as the user says.

    `train()` before the steps, `eval()` before evaluation and before a checkpoint is deployed, as the authors' have it.
    """

    modes = {"train_mode": False}
    in_groups = {"k": "step", "lr_max": "lr_max", "weight_sum": "weight_sum"}
    in_two = frozenset({"lr_max", "weight_sum"})

    def eval(self) -> None:
        """Put the averages in the parameters' places. A parameter that was never stepped stays."""
        self._turn(False, lambda momentum: 1 - 1 / momentum)

    def train(self) -> None:
        """Put what is trained in the parameters' places."""
        self._turn(True, lambda momentum: 1 - momentum)

    @torch.no_grad()
    def _turn(self, mode: bool, weight: Callable[[float], float]) -> None:
        rule: Any = self.rule
        for group in self.param_groups:
            if group["train_mode"] is mode:
                continue
            momentum = float(rule.members(group)[rule.averaged_by])
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"].to(p.dtype), weight(momentum))
            group["train_mode"] = mode

    def _step(self) -> None:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "Optimizer was not in train mode when step is called. Please insert .train() and .eval() calls on the "
                "optimizer: optimizer.train() before the steps of an epoch, optimizer.eval() before evaluation"
            )
        super()._step()


class Prodigy(Constructed):
    """Prodigy, which keeps in each parameter's state what is of all parameters. Its authors have that in the groups."""

    in_groups = {name: name for name in ("k", *ESTIMATES)}
    in_two = frozenset(ESTIMATES)
    not_here = frozenset({"d_denom", "d_hat", "fsdp_in_use"})

    @property
    def d(self) -> float:
        """The step size that was found so far."""
        found = shared_scalars(self)
        return found["d"] + found["d_rest"] if found.get("k") else float(self.param_groups[0]["d0"])

    def _of_authors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Theirs are flat, and a 0-d zero for the start of a parameter that began with zeros."""
        found = super()._of_authors(state_dict)
        for own, group in zip(self.param_groups, found["param_groups"], strict=False):
            for p, i in zip(own["params"], group["params"], strict=False):
                state = found["state"].get(i) or {}
                for key in ("s", "p0"):
                    x = state.get(key)
                    if isinstance(x, Tensor) and x.numel() in (1, p.numel()) and x.shape != p.shape:
                        x = x.reshape(p.shape) if x.numel() == p.numel() else x.reshape(()).expand(p.shape).clone()
                        found["state"][i] = state = state | {key: x}
        return found
