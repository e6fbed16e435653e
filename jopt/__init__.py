"""torch.optim's optimizers in JAX, exactly, as optax-compatible gradient transformations."""

from jopt import schedules
from jopt.arena import Packed, pack, unpack
from jopt.explain import Explanation, explain
from jopt.fusion import enable_multi_output_fusion
from jopt.lbfgs import lbfgs
from jopt.optimizers import (
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    adamw,
    asgd,
    gradient_descent,
    mars,
    momentum,
    muon,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
    sparse_adam,
)
from jopt.transform import State, Transform

__all__ = [
    "Explanation",
    "Packed",
    "State",
    "Transform",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "enable_multi_output_fusion",
    "explain",
    "gradient_descent",
    "lbfgs",
    "mars",
    "momentum",
    "muon",
    "nadam",
    "pack",
    "radam",
    "rmsprop",
    "rprop",
    "schedules",
    "sgd",
    "sparse_adam",
    "unpack",
]
__version__ = "0.1.0"
