"""Averages of parameters, and the loss scale, from a torch run into JAX and back."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import jax.numpy as jnp
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel

import jopt
from interop.dropin.leaf import EMA
from interop.dropin.step import CompiledStep
from interop.modules import JaxLeaf, check_arrays, to_jax
from interop.runs.moving import names_of
from jopt.around.averages import Average, AverageState
from jopt.around.scaling import LossScale, ScaleState


def average_to_jax(
    average: AveragedModel | torch.optim.Optimizer, model: nn.Module | None = None
) -> tuple[Average, AverageState]:
    """The averaged weights of a torch run, for `jopt.ema` or `jopt.swa` to go on with.

    >>> import torch, interop
    >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    >>> model = torch.nn.Linear(2, 1)
    >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    >>> averaged.update_parameters(model)
    >>> average, state = interop.average_to_jax(averaged)
    >>> average.decay, int(state.n_averaged), sorted(state.params)
    (0.99, 1, ['bias', 'weight'])
    >>> interop.average_to_torch(state, averaged)

    Args:
      average: an AveragedModel, of torch's own averages (`get_ema_multi_avg_fn`, ..., or none: the mean); its
        parameters, and with `use_buffers` its buffers. Or an optimizer of `interop.optim` that has `ema=`.
      model: for an optimizer, the one that it steps.

    Returns:
      `(average, state)`; call `average.update(params, state)` after each step. All is copied.

    Raises:
      TypeError: another average, or an AveragedModel of a function of one's own.
      ValueError: an optimizer without `ema=`, without the model, or of parameters that the model has not.
    """
    tensors = _tensors(average, model)
    params = to_jax({name: x.detach() for name, x in tensors.items()})
    if isinstance(average, AveragedModel):
        return _kind(average), AverageState(jnp.asarray(int(average.n_averaged), jnp.int32), params)
    begun = any(EMA in state for state in average.state.values())
    return jopt.ema(average.ema), AverageState(jnp.asarray(int(begun), jnp.int32), params)  # type: ignore[union-attr]


def average_to_torch(
    state: AverageState, average: AveragedModel | torch.optim.Optimizer, model: nn.Module | None = None
) -> None:
    """Write what `average_to_jax` gave, some updates later, back.

    Raises:
      TypeError, ValueError: as `average_to_jax`; other names, shapes or types; before anything changed.
    """
    tensors = _tensors(average, model)
    new = check_arrays("state.params", state.params, {x: JaxLeaf(name) for name, x in tensors.items()})
    with torch.no_grad():
        if isinstance(average, AveragedModel):
            for tensor, value in new.items():
                tensor.copy_(value)
            average.n_averaged.fill_(int(state.n_averaged))
        elif int(state.n_averaged):
            assert model is not None
            for p, name in names_of(average, model).items():
                average.state[p][EMA] = new[tensors[name]].clone()


def _tensors(average: Any, model: nn.Module | None) -> dict[str, Tensor]:
    if isinstance(average, AveragedModel):
        inner = average.module
        return dict(itertools.chain(inner.named_parameters(), inner.named_buffers() if average.use_buffers else ()))
    if not isinstance(average, CompiledStep):
        raise TypeError(
            "average: expected torch's AveragedModel or an optimizer of interop.optim, found "
            f"{type(average).__module__}.{type(average).__qualname__}"
        )
    if average.ema is None:
        raise ValueError("average: the optimizer keeps none; it has no ema=")
    if model is None:
        raise ValueError("model: expected the model that the optimizer steps, for its parameters' names; found None")
    return {name: average.state.get(p, {}).get(EMA, p) for p, name in names_of(average, model).items()}  # type: ignore[arg-type]


def _kind(averaged: AveragedModel) -> Average:
    functions = [f for f in (averaged.multi_avg_fn, averaged.avg_fn) if f is not None]
    if not functions:
        return jopt.swa()
    made_by = functions[0].__qualname__.partition(".")[0]
    if functions[0].__module__ == "torch.optim.swa_utils":
        if made_by in ("get_swa_avg_fn", "get_swa_multi_avg_fn"):
            return jopt.swa()
        if made_by in ("get_ema_avg_fn", "get_ema_multi_avg_fn"):
            return jopt.ema(inspect.getclosurevars(inspect.unwrap(functions[0])).nonlocals["decay"])
    raise TypeError(
        f"average: its function {functions[0].__module__}.{functions[0].__qualname__} is none of torch's; take the "
        "weights by to_jax(average.module) and average them as it does"
    )


def scaler_to_jax(scaler: GradScaler) -> tuple[LossScale, ScaleState]:
    """`jopt.loss_scale` as a torch GradScaler has it, and its state.

    >>> import torch, interop
    >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    >>> scale, state = interop.scaler_to_jax(scaler)
    >>> scale.growth_interval, state.scale.item()
    (100, 1024.0)
    >>> interop.scaler_to_torch(state, scaler)

    Raises:
      ValueError: it is disabled, and scales nothing.
    """
    _check_scaler(scaler)
    scale = jopt.loss_scale(
        scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    )
    fresh = scale.init()
    return scale, fresh._replace(growth_tracker=jnp.asarray(scaler._get_growth_tracker(), jnp.int32))


def scaler_to_torch(state: ScaleState, scaler: GradScaler) -> None:
    """Write the state of `jopt.loss_scale` into a torch GradScaler; its factors and interval stay."""
    _check_scaler(scaler)
    scaler.load_state_dict(
        scaler.state_dict() | {"scale": float(state.scale), "_growth_tracker": int(state.growth_tracker)}
    )


def _check_scaler(scaler: GradScaler) -> None:
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler, found {type(scaler).__name__}")
    if not scaler.is_enabled():
        raise ValueError("scaler: is disabled, and scales nothing; leave it out")
