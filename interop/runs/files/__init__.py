"""Checkpoint files of runs that move between PyTorch and JAX: docs/files.md.

interop.load_checkpoint(path), interop.save_checkpoint(checkpoint, path)
interop.Checkpoint.from_torch(model, optimizer), checkpoint.to_torch(model, optimizer)
interop.Checkpoint.from_jax(tx, params, state), checkpoint.to_jax()
"""

from interop.runs.files.errors import CheckpointError
from interop.runs.files.files import format_of, load_checkpoint, save_checkpoint
from interop.runs.files.run import Checkpoint, OptimizerState
from interop.runs.formats import FORMATS

__all__ = [
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "OptimizerState",
    "format_of",
    "load_checkpoint",
    "save_checkpoint",
]
