"""Checkpoint files of runs that move between PyTorch and JAX: docs/files.md.

interop.load_checkpoint(path), interop.save_checkpoint(checkpoint, path)
interop.Checkpoint.from_torch(model, optimizer), checkpoint.to_torch(model, optimizer)
interop.Checkpoint.from_jax(tx, params, state), checkpoint.to_jax()
"""

from interop.checkpoint.errors import CheckpointError
from interop.checkpoint.files import format_of, load_checkpoint, save_checkpoint
from interop.checkpoint.run import Checkpoint, OptimizerState
from interop.formats import FORMATS

__all__ = [
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "OptimizerState",
    "format_of",
    "load_checkpoint",
    "save_checkpoint",
]
