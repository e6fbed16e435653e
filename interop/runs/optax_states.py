"""A torch run into optax's own optimizers and back, where both compute the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch

from interop.modules import Layout
from interop.runs import moving
from interop.runs.classes import CLASSES, class_of
from jopt import State

# torch's class: optax's state, and its fields by the name of torch's slot
_STATES: dict[str, tuple[tuple[type, dict[str, str]], ...]] = {
    "Adam": ((optax.ScaleByAdamState, {"exp_avg": "mu", "exp_avg_sq": "nu"}),),
    "AdamW": ((optax.ScaleByAdamState, {"exp_avg": "mu", "exp_avg_sq": "nu"}),),
    "Adamax": ((optax.ScaleByAdamState, {"exp_avg": "mu", "exp_inf": "nu"}),),
    "Adadelta": ((optax.ScaleByAdaDeltaState, {"square_avg": "e_g", "acc_delta": "e_x"}),),
    "SGD": ((optax.TraceState, {"momentum_buffer": "trace"}),),
    "RMSprop": (
        (optax.ScaleByRmsState, {"square_avg": "nu"}),
        (optax.ScaleByRStdDevState, {"square_avg": "nu", "grad_avg": "mu"}),
        (optax.TraceState, {"momentum_buffer": "trace"}),
    ),
}
_OTHERS = {
    "ASGD": "optax has none, nor its averaged parameters",
    "Adafactor": "optax factors other axes and bounds lr and the second moment otherwise",
    "Adagrad": "optax takes eps into the square root",
    "LBFGS": "optax searches the line otherwise and keeps other vectors",
    "Muon": "optax's Nesterov momentum and orthogonalization are others",
    "NAdam": "optax's has a constant momentum and no mu_product",
    "RAdam": "optax corrects eps too",
    "Rprop": "optax keeps the last update instead of the last gradient",
    "SparseAdam": "optax has no row-sparse optimizer",
}
_FLAGS = {
    "amsgrad": "optax takes the largest of the corrected second moments, torch of the raw ones",
    "dampening": "optax's trace has none: torch's first buffer is the undamped gradient",
}


def optimizer_to_optax(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    *,
    lr: Any = None,
    step: int | None = None,
    layout: Layout = "torch",
) -> tuple[optax.GradientTransformationExtraArgs, dict[str, jax.Array], Any]:
    """The run that a torch optimizer is in the middle of, for optax's own transformations to go on with.

    Adam, AdamW, Adamax, Adadelta, SGD and RMSprop mean the same in both; the others go to `jopt` alone
    (`optimizer_to_jax`). In float64 the steps agree to 1e-14; in float32 optax computes Adam's bias correction in
    float32, which costs 5e-6 over 40 steps.

    >>> import torch, jax.numpy as jnp, optax, interop
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> tx, params, state = interop.optimizer_to_optax(optimizer, model)
    >>> updates, state = tx.update({"weight": jnp.ones((1, 2)), "bias": jnp.ones(1)}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> interop.optimizer_from_optax(params, state, model, optimizer)
    >>> optimizer.state[model.weight]["momentum_buffer"]
    tensor([[1.9000, 1.9000]])

    Args:
      optimizer, model, layout: as for `optimizer_to_jax`; one set of options for all parameters.
      lr: instead of the optimizer's own, a number or a schedule of the step.
      step: the steps taken, at which a schedule goes on; by default as for `optimizer_to_jax`.

    Returns:
      `(tx, params, state)`, a chain of optax's parts in torch's order. Without maximize, and without weight decay that
      is added to the gradient, the state is that of `optax.adam`, `optax.adamw`, `optax.adamax` or `optax.sgd`.

    Raises:
      ValueError: an optimizer or option that optax computes otherwise, which is said; parameters that have taken
        different numbers of steps, for optax counts once for all; and what `optimizer_to_jax` raises.
    """
    cls, options = _same(optimizer)
    _, params, state = moving.optimizer_to_jax(optimizer, model, step=step, layout=layout)
    if not isinstance(state, State):
        raise ValueError(
            f"optimizer: has {len(optimizer.param_groups)} groups of different options, which one transformation of "
            "optax does not have; move it to jopt (optimizer_to_jax)"
        )
    counts = sorted({int(x) for x in state.scalars.get("step", ())})
    if len(counts) > 1:
        raise ValueError(f"optimizer: its parameters have taken {counts} steps, but optax counts once for all")
    chain = _chain(cls, options, float(options["lr"]) if lr is None else lr)
    return chain, params, jax.tree.map(lambda x: _filled(cls, x, state), chain.init(params), is_leaf=_is_known)


def optimizer_from_optax(
    params: dict[str, Any],
    state: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int | None = None,
    layout: Layout = "torch",
) -> None:
    """Write parameters and a state of optax's into the model and the optimizer, whose options stay as they are.

    Args:
      params: flat, by the names of `model.named_parameters()` (in flax's layout, by those of `to_jax`).
      state: of `optimizer_to_optax`, or of the functions of optax that have the same state. Its numbers are in no
        state of optax: give the optimizer the same lr, betas, ....
      step: the steps taken, where optax counts none (SGD, Adadelta, RMSprop); by default the optimizer's own count.
        torch keeps it for Adadelta and RMSprop, and computes nothing from it.

    Raises:
      TypeError: the state has not what the optimizer needs.
      ValueError: an optimizer or option that optax computes otherwise; `optax.rmsprop` with momentum, whose trace
        holds steps times their lr; and what `optimizer_to_torch` raises.
    """
    cls, _ = _same(optimizer)
    tx, _, fresh = moving.optimizer_to_jax(optimizer, model, layout=layout)
    if not isinstance(fresh, State):
        raise ValueError("optimizer: expected one set of options for all parameters, as optax has")
    nodes = [x for x in jax.tree.leaves(state, is_leaf=_is_known) if _fields(cls, x)]
    if cls == "RMSprop" and [type(x) for x in nodes[1:]] == [optax.TraceState] and _scaled_before(state):
        raise ValueError(
            "state: optax.rmsprop multiplies by the learning rate before its momentum, torch after it; use the "
            "transformation of optimizer_to_optax, which does as torch"
        )
    found = {slot: getattr(node, field) for node in nodes for slot, field in _fields(cls, node).items()}
    missing = sorted(set(fresh.slots) - set(found))
    if missing:
        raise TypeError(
            f"state: expected {', '.join(t.__name__ for t, _ in _STATES[cls])} for {cls}; nothing in it is "
            f"{', '.join(missing)}"
        )
    slots = {
        slot: {name: jnp.asarray(found[slot][name], old.dtype) for name, old in tree.items()}
        for slot, tree in fresh.slots.items()
    }
    counts = [int(node.count) for node in nodes if "count" in node._fields]
    taken = counts[0] if counts else step
    scalars = {k: jnp.maximum(x, 1) if taken is None else jnp.full_like(x, taken) for k, x in fresh.scalars.items()}
    moving.optimizer_to_torch(tx, params, fresh._replace(slots=slots, scalars=scalars), model, optimizer, layout=layout)


def _same(optimizer: torch.optim.Optimizer) -> tuple[str, dict[str, Any]]:
    """The class and options of an optimizer that optax computes alike."""
    cls = class_of(optimizer)
    if cls in _OTHERS:
        raise ValueError(
            f"optimizer: {cls} is not the same in optax: {_OTHERS[cls]}; move it to jopt (optimizer_to_jax)"
        )
    for group in optimizer.param_groups:
        for flag, why in _FLAGS.items():
            if group.get(flag):
                raise ValueError(
                    f"optimizer: {cls} with {flag}={group[flag]} is not the same in optax: {why}; move it to jopt "
                    "(optimizer_to_jax)"
                )
    return cls, optimizer.param_groups[0]


def _chain(cls: str, h: dict[str, Any], lr: Any) -> optax.GradientTransformationExtraArgs:
    b1, b2 = map(float, h.get("betas", (0, 0)))
    decay = float(h["weight_decay"])
    parts = [optax.scale(-1.0)] if h["maximize"] else []
    decouples = CLASSES[cls].decouples(h)
    if decay and not decouples:
        parts.append(optax.add_decayed_weights(decay))
    if cls in ("Adam", "AdamW"):
        parts.append(optax.scale_by_adam(b1, b2, h["eps"]))
        parts += [optax.add_decayed_weights(decay)] if decouples else []
    elif cls == "Adamax":
        parts.append(optax.scale_by_adamax(b1, b2, h["eps"]))
    elif cls == "Adadelta":
        parts.append(optax.scale_by_adadelta(h["rho"], h["eps"]))
    elif cls == "RMSprop":
        scale = optax.scale_by_stddev if h["centered"] else optax.scale_by_rms
        parts.append(scale(h["alpha"], h["eps"], eps_in_sqrt=False))
    if h.get("momentum"):
        parts.append(optax.trace(h["momentum"], nesterov=h.get("nesterov", False)))
    elif cls == "SGD":
        parts.append(optax.identity())  # as in optax.sgd
    return optax.chain(*parts, optax.scale_by_learning_rate(lr))


def _is_known(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState) or any(_fields(cls, node) for cls in _STATES)


def _fields(cls: str, node: Any) -> dict[str, str]:
    """The fields of a state of optax's, by the slot of torch's that each is."""
    return next((fields for kind, fields in _STATES[cls] if isinstance(node, kind)), {})


def _filled(cls: str, node: Any, state: State) -> Any:
    """A fresh state of optax's with the values of the run."""
    values: dict[str, Any] = {field: state.slots[slot] for slot, field in _fields(cls, node).items()}
    if isinstance(node, optax.ScaleByScheduleState):
        values["count"] = state.count
    elif "count" in getattr(node, "_fields", ()):
        values["count"] = jnp.asarray(state.scalars["step"].max(initial=0), jnp.int32)
    return node._replace(**values) if values else node


def _scaled_before(state: Any) -> bool:
    """Whether the trace is the chain's last state, after the learning rate's."""
    return isinstance(state, tuple) and isinstance(state[-1], optax.TraceState)
