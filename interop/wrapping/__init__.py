"""Any optax transformation as a torch optimizer."""

from interop.wrapping.optimizer import WrappedOptimizer, wrap

__all__ = ["WrappedOptimizer", "wrap"]
