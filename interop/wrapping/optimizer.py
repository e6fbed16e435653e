"""Any optax transformation as a torch optimizer.

Each parameter group is stepped by one compiled call of `update` over a dictionary of its parameters by name. Between
steps the state lies in `optimizer.state` as torch tensors, where torch's checkpoints find it: what belongs to a
parameter with that parameter, the rest (counts, keys) with the group's first one, as torch.optim.LBFGS does. What
`optax.inject_hyperparams` keeps in the state is shown as the group's entries instead, where torch's schedulers are.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import optax
import torch
from optax.contrib import ScheduleFreeState
from torch import Tensor

from interop.dropin.groups import are_same, parameter_name
from interop.dropin.host import SignalsWait, check_process, undynamo
from interop.dropin.leaf import is_lazy
from interop.dropin.reader import objects
from interop.dropin.state import KeepsWideState
from interop.memory import check, check_parameter
from interop.memory.tensors import in_type_of
from interop.wrapping.group import Group, Saved, nodes, settings
from jopt.around.chaining import is_transformation


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
      TypeError: `tx` is none, or a parameter is not a plain floating point or complex tensor in CPU memory or on a
        GPU.
      ValueError: a group sets a hyperparameter that its transformation does not keep in its state.
    """
    return WrappedOptimizer(tx, params)


class WrappedOptimizer(KeepsWideState, torch.optim.Optimizer):
    """What `interop.wrap` makes."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        self.tx = _check(tx)
        self._groups: list[Group] = []
        self._training: dict[Tensor, Tensor] | None = None
        self._seen: tuple[list[Any], list[int]] = [], []  # what the last step left in the state
        super().__init__(params, {})
        # CyclicLR and OneCycleLR look here for what they may cycle.
        self.defaults.update({k: v for k, v in self.param_groups[0].items() if k in self._groups[0].shown})

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, f"interop.wrap of {type(self.tx).__name__}", 1)

    def __getstate__(self) -> dict[str, Any]:
        own = {"tx": Saved(self.tx), "_groups": self._groups, "_training": self._training, "_seen": ([], [])}
        return super().__getstate__() | own

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
            work = Group(tx, tuple(names))
            with settings(group["params"]):
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
        training: dict[Tensor, Tensor] = {}
        for group, work in zip(self.param_groups, self._groups, strict=True):
            with torch.no_grad(), settings(group["params"]):
                state = work.state(self, group)
                for node in nodes(state, ScheduleFreeState):
                    for p, x in work.evaluation(node, group["params"]):
                        training.setdefault(p, p.clone())
                        p.copy_(x)
        self._training = training or None

    def train(self) -> None:
        """Put back the weights that are trained, after `eval()`."""
        with torch.no_grad():
            for p, x in (self._training or {}).items():
                p.copy_(x)
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        self._check_training()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check_training()
        super().load_state_dict(state_dict)

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
        called = f"; call it, as {tx.__name__}(...)" if isinstance(tx, types.FunctionType) else ""
        raise TypeError(f"tx: expected an optax.GradientTransformation, found {type(tx).__name__}{called}")
    return tx  # type: ignore[return-value]


# --- a group -----------------------------------------------------------------------------------------


def _step(optimizer: WrappedOptimizer, closure: Any, loss: Any, extra: dict[str, Any]) -> None:
    check_process()
    optimizer._check_training()
    grads: list[list[Tensor | None]] = []
    for index, (group, work) in enumerate(zip(optimizer.param_groups, optimizer._groups, strict=True)):
        work.check(index, group)
        grads.append(_gradients(optimizer, index, group["params"]))
    found, lengths = objects(optimizer)
    same = lengths == optimizer._seen[1] and are_same(found, optimizer._seen[0])
    optimizer._seen = [], []
    with torch.inference_mode(False), torch.no_grad():
        ready = {
            index: work.prepare(optimizer, index, grads[index], closure, loss, extra, same=same)
            for index, work in enumerate(optimizer._groups)
            if any(grad is not None for grad in grads[index])
        }
        if any(each.program.calls_back for each in ready.values()):  # which may write to the gradients
            grads = [[None if grad is None else grad.clone() for grad in of_group] for of_group in grads]
        with SignalsWait() if closure is None else contextlib.nullcontext():
            for index, each in ready.items():
                optimizer._groups[index].step(optimizer, index, grads[index], closure, each)
    optimizer._seen = (found, lengths) if same else objects(optimizer)


def _gradients(optimizer: WrappedOptimizer, index: int, params: list[Tensor]) -> list[Tensor | None]:
    """A group's gradients as programs take them."""
    grads = [p.grad for p in params]
    pairs = [(grad, p) for grad, p in zip(grads, params, strict=True) if grad is not None]
    if all(type(grad) is Tensor and grad.layout is torch.strided and grad.dtype is p.dtype for grad, p in pairs):
        present = [grad for grad, _ in pairs]
        if all(map(Tensor.is_contiguous, present)) and not any(map(is_lazy, present)):
            return grads
    return [None if grad is None else _plain(optimizer, index, p, grad) for grad, p in zip(grads, params, strict=True)]


def _plain(optimizer: WrappedOptimizer, index: int, p: Tensor, grad: Tensor) -> Tensor:
    name = f"the gradient of {parameter_name(optimizer, index, p)}"
    check(name, grad)
    return in_type_of(name, grad, p.dtype).resolve_conj().resolve_neg().contiguous()
