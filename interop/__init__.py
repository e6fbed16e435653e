"""PyTorch and JAX in one process: tensors across DLPack, torch optimizers that XLA compiles, and runs that move.

from interop import optim              # torch.optim's classes, stepped by jopt
interop.to_jax(x), interop.to_torch(x)
interop.optimizer_to_jax(optimizer, model), interop.optimizer_to_torch(tx, params, state, model, optimizer)
interop.load_checkpoint(path), interop.save_checkpoint(checkpoint, path)  # files of both; python -m interop
interop.wrap(tx, params)               # any optax transformation as a torch optimizer
interop.prefetch(loader)               # a DataLoader's batches as JAX arrays, ahead of use
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("interop needs PyTorch: pip install torch (or pip install 'jopt[torch]')") from error

from interop.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from interop.data import prefetch
from interop.dlpack import to_jax, to_torch
from interop.moving import optimizer_to_jax, optimizer_to_torch
from interop.wrapping import wrap

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_checkpoint",
    "optimizer_to_jax",
    "optimizer_to_torch",
    "prefetch",
    "save_checkpoint",
    "to_jax",
    "to_torch",
    "wrap",
]
