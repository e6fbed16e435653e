"""PyTorch and JAX in one process: tensors across DLPack, torch optimizers that XLA compiles, and runs that move.

from interop import optim              # torch.optim's classes, stepped by jopt
interop.to_jax(x), interop.to_torch(x)  # tensors, trees, modules
interop.optimizer_to_jax(optimizer, model), interop.optimizer_to_torch(tx, params, state, model, optimizer)
interop.{scheduler,plateau,scaler,average}_to_jax  # what else a run has; and back
interop.load_checkpoint(path), interop.save_checkpoint(checkpoint, path)  # files of both; python -m interop
interop.wrap(tx, params)               # any optax transformation as a torch optimizer
interop.sweep(model, loss, batches, lr=...)   # many learning rates, optimizers and seeds at once
interop.prefetch(loader)               # a DataLoader's batches as JAX arrays, ahead of use
interop.enable_native_reader()         # steps that read their gradients in C++
interop.explain(optimizer)             # what a step is made of
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] != ["-m"]:  # `python -m interop` is being found: its `env` answers where something is too old as well
    from interop import _compat  # noqa: F401  it says which version of what is needed

if TYPE_CHECKING:
    from interop.data import prefetch
    from interop.dropin.native import enable_native_reader
    from interop.explaining import StepExplanation, explain
    from interop.modules import to_jax, to_torch
    from interop.runs.averages import average_to_jax, average_to_torch, scaler_to_jax, scaler_to_torch
    from interop.runs.files import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
    from interop.runs.moving import optimizer_to_jax, optimizer_to_torch
    from interop.runs.optax_states import optimizer_from_optax, optimizer_to_optax
    from interop.runs.schedulers import plateau_to_jax, plateau_to_torch, scheduler_to_jax
    from interop.sweeping import sweep
    from interop.wrapping import WrappedOptimizer, wrap

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "StepExplanation",
    "WrappedOptimizer",
    "average_to_jax",
    "average_to_torch",
    "enable_native_reader",
    "explain",
    "load_checkpoint",
    "optimizer_from_optax",
    "optimizer_to_jax",
    "optimizer_to_optax",
    "optimizer_to_torch",
    "plateau_to_jax",
    "plateau_to_torch",
    "prefetch",
    "save_checkpoint",
    "scaler_to_jax",
    "scaler_to_torch",
    "scheduler_to_jax",
    "sweep",
    "to_jax",
    "to_torch",
    "wrap",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package, at its first use.

        torch and JAX take seconds to import, for which `python -m interop --help` would wait. The first public name
        imports all, so that what there is after it does not depend on which name it was.
        """
        if name in __all__:
            public = importlib.import_module("interop._public")
            globals().update({name: getattr(public, name) for name in __all__})
            return globals()[name]
        try:
            return importlib.import_module(f"interop.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"interop.{name}":
                raise
            raise AttributeError(f"module 'interop' has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
