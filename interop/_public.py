"""What `interop` offers, imported: see its `__getattr__`."""

# ruff: noqa: F401
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
