"""torch.optim's optimizers in JAX, exactly, as optax-compatible gradient transformations."""

from jopt.arena import Packed, pack, unpack
from jopt.optimizers import (
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    asgd,
    gradient_descent,
    momentum,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
)
from jopt.transform import State, Transform

__all__ = [
    "Packed",
    "State",
    "Transform",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "gradient_descent",
    "momentum",
    "nadam",
    "pack",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "unpack",
]
__version__ = "0.1.0"
