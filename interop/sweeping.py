"""`jopt.sweep` for PyTorch models: torch.func vectorizes loss and gradients over the runs, the rule steps them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from interop.memory import HOST, check_parameter
from interop.memory.values import to_jax, to_torch
from jopt._compat import enable_x64
from jopt.sweeps.inputs import Batches, Make, check_function, make_plan
from jopt.sweeps.result import Sweep
from jopt.sweeps.sweep import Program, each_run, run_all

Params = dict[str, Tensor]


def sweep(
    model: nn.Module,
    loss: Callable[[Callable[..., Any], Any], Tensor],
    batches: Any,
    *,
    lr: Sequence[float],
    optimizers: Any = "adamw",
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    schedule: Callable[[Any], Any] | None = None,
    divergence: float = 2.0,
    chunk: int | None = None,
    randomness: str = "error",
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    **hyperparameters: Sequence[Any],
) -> Sweep:
    """Train a PyTorch model with every learning rate, optimizer, setting and seed at once; as `jopt.sweep`.

    >>> import torch, interop
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> def loss(model, batch):
    ...     x, y = batch
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> x = torch.randn(40, 16, 3)                                       # 40 batches
    >>> result = interop.sweep(model, loss, (x, x.sum(2, keepdim=True)), lr=[1e-3, 1e-2, 1e-1])
    >>> len(result.runs), result.best().optimizer
    (9, 'adamw')

    Args:
      model: a module on the CPU whose forward `torch.func.vmap` takes; it is not changed. A seed's parameters are
        `torch.manual_seed(seed)`, then `reset_parameters()` of every module, inner ones first, as
        `model.apply` goes; torch's own random state is left alone. Parameters without `requires_grad` stay as they are,
        as do those that get no gradient.
      loss: `loss(model, batch)`, a real 0-d tensor; the `model` that it gets calls the module with a run's parameters.
      batches: of tensors or arrays, in the forms that `jopt.sweep` takes; or a DataLoader, which is read once and kept.
      optimizers: of jopt: names, functions, a mapping. They step the runs in one program compiled by XLA.
      randomness: `torch.func.vmap`'s: "different" lets dropout draw for each run (other draws than a run alone has),
        "same" once for all.
      chunk, and the rest: as `jopt.sweep`.

    Raises:
      TypeError: `model` is no module, or a parameter is no dense floating tensor on the CPU.
      ValueError: a module with parameters has no `reset_parameters`; a batch norm would update its statistics.
      RuntimeError: torch.func cannot vectorize the model: random numbers with randomness="error", control flow that
        depends on data, tensors written in place.

    Else it raises as `jopt.sweep`.
    """
    _check_model(model)
    check_function("loss", loss)
    if randomness not in ("error", "different", "same"):
        raise ValueError(f"randomness: expected 'error', 'different' or 'same', found {randomness!r}")
    plan = make_plan(optimizers, lr, seeds, schedule, divergence, chunk, hyperparameters)
    data = Batches(batches, steps, _to_numpy)
    names = _trained(model, loss, _to_tensors(data[0]))
    value = _vectorized(copy.deepcopy(model), loss, randomness)

    def program(make: Make) -> Program:
        return TorchProgram(make, schedule, value)

    with enable_x64(any(p.dtype in (torch.float64, torch.complex128) for p in model.parameters())):
        starts = [_start(model, seed, names) for seed in plan.seeds]
        return run_all(plan, program, chunk, starts, data, progress)


class TorchProgram(Program):
    """Losses and gradients by torch, vectorized over the runs; the step by XLA, in the stacked tensors' memory."""

    def __init__(self, make: Make, schedule: Callable[[Any], Any] | None, value: Callable[[Params, Any], Any]):
        super().__init__(make, schedule)
        self.devices = [HOST.jax_device]
        self._value = value
        self._advance = jax.jit(functools.partial(each_run, self.step), donate_argnums=(0, 1))

    def train(self, params: Any, state: Any, numbers: Any, data: Batches) -> np.ndarray:
        losses = []
        for i in range(data.steps):
            # XLA donates the parameters' memory only when no tensor shares it: these tensors end with this call.
            grads, values = self._value(to_torch(params, copy=None), _to_tensors(data[i]))
            params, state = self._advance(params, state, to_jax(grads, copy=None), numbers)
            jax.block_until_ready(params)  # wait: the step reads the gradients, which the next round frees
            losses.append(values.numpy())
        return np.stack(losses)


def _vectorized(model: nn.Module, loss: Callable[..., Any], randomness: str) -> Callable[[Params, Any], Any]:
    """Gradients and losses of stacked parameters on one batch."""
    model.requires_grad_(False)

    def one(params: Params, batch: Any) -> Any:
        return loss(lambda *args, **kwargs: functional_call(model, params, args, kwargs), batch)

    runs = vmap(grad_and_value(one), in_dims=(0, None), randomness=randomness)

    def value(params: Params, batch: Any) -> Any:
        try:
            return runs(params, batch)
        except RuntimeError as error:
            raise RuntimeError(
                f"model: torch.func cannot vectorize it over runs: {error} (Dropout needs randomness='different' or "
                ".eval(); control flow that depends on data and in-place updates have no remedy here: train one by one)"
            ) from error

    return value


# --- the model --------------------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    for name, p in model.named_parameters():
        if check_parameter(name, p) is not HOST:
            raise TypeError(
                f"{name}: expected a parameter in CPU memory, where the runs are, found {p.device}; use .cpu()"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            raise ValueError(
                f"model: {name or type(module).__name__} would update its running statistics, which the runs share; "
                "use model.eval(), track_running_stats=False, or another norm"
            )
        if next(module.parameters(recurse=False), None) is not None and _reset_of(module) is None:
            raise ValueError(
                f"model: {name or 'it'} ({type(module).__name__}) has parameters and no reset_parameters(), with which "
                "each seed draws them; define it"
            )


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """MultiheadAttention calls it by another name."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _start(model: nn.Module, seed: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The trained parameters that a seed draws."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.apply(lambda module: None if (reset := _reset_of(module)) is None else reset())
    params = dict(model.named_parameters())
    arrays = to_jax({name: params[name] for name in names})
    return {name: np.asarray(x) for name, x in arrays.items()}


def _trained(model: nn.Module, loss: Callable[..., Any], batch: Any) -> list[str]:
    """The parameters that get a gradient: torch's optimizers skip the others."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        value = loss(model, batch)
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a real 0-d tensor, found {found}; take its mean")
    if not value.requires_grad:
        raise ValueError("loss: expected it to depend on a parameter with requires_grad, found none")
    model.zero_grad()
    value.backward()
    return [name for name, p in model.named_parameters() if p.grad is not None]


def _to_numpy(x: Any) -> np.ndarray:
    if isinstance(x, Tensor) and x.dtype is torch.bfloat16:
        raise TypeError("batches: expected types that numpy has, found torch.bfloat16; convert to it in the loss")
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _to_tensors(batch: Any) -> Any:
    return jax.tree.map(torch.tensor, batch)
