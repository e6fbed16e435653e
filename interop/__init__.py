"""PyTorch and JAX in one process: tensors across DLPack, and torch optimizers that XLA compiles.

from interop import optim              # torch.optim's classes, stepped by jopt
interop.to_jax(x), interop.to_torch(x)
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("interop needs PyTorch: pip install torch (or pip install 'jopt[torch]')") from error

from interop.dlpack import to_jax, to_torch

__all__ = ["to_jax", "to_torch"]
