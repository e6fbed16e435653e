"""PyTorch and JAX in one process: tensors across DLPack, torch optimizers that XLA compiles, and runs that move.

from interop import optim              # torch.optim's classes, stepped by jopt
interop.to_jax(x), interop.to_torch(x)
interop.optimizer_to_jax(optimizer, model), interop.optimizer_to_torch(tx, params, state, model, optimizer)
interop.wrap(tx, params)               # any optax transformation as a torch optimizer
interop.sweep(model, loss, batches, lr=...)   # many learning rates, optimizers and seeds at once
interop.prefetch(loader)               # a DataLoader's batches as JAX arrays, ahead of use
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("interop needs PyTorch: pip install torch (or pip install 'jopt[torch]')") from error

from interop.data import prefetch
from interop.dlpack import to_jax, to_torch
from interop.moving import optimizer_to_jax, optimizer_to_torch
from interop.sweeping import sweep
from interop.wrapping import wrap

__all__ = ["optimizer_to_jax", "optimizer_to_torch", "prefetch", "sweep", "to_jax", "to_torch", "wrap"]
