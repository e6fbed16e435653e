"""torch.optim's optimizers in JAX, exactly, as optax-compatible gradient transformations."""

from jopt.arena import Packed, pack, unpack
from jopt.optimizers import adam, adamw, gradient_descent, momentum, rmsprop, sgd
from jopt.transform import State, Transform

__all__ = [
    "Packed",
    "State",
    "Transform",
    "adam",
    "adamw",
    "gradient_descent",
    "momentum",
    "pack",
    "rmsprop",
    "sgd",
    "unpack",
]
__version__ = "0.1.0"
