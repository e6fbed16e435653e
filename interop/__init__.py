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
"""

from interop import _compat  # noqa: F401  first: it says which version of what is needed
from interop.averages import average_to_jax, average_to_torch, scaler_to_jax, scaler_to_torch
from interop.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from interop.data import prefetch
from interop.modules import to_jax, to_torch
from interop.moving import optimizer_to_jax, optimizer_to_torch
from interop.optax_states import optimizer_from_optax, optimizer_to_optax
from interop.reader import enable_native_reader
from interop.schedulers import plateau_to_jax, plateau_to_torch, scheduler_to_jax
from interop.sweeping import sweep
from interop.wrapping import WrappedOptimizer, wrap

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "WrappedOptimizer",
    "average_to_jax",
    "average_to_torch",
    "enable_native_reader",
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
