"""An optimizer is one file: its rule, which is all its mathematics, and its function under torch's name in lower case.

The functions take torch's arguments with torch's defaults. Every number may be a number, a 0-d array (also traced) or a
schedule `step -> value`, evaluated in float64 at the count of calls, from 0. Each takes `jopt.transform.Options` too.
They raise torch's ValueError for a number out of range, TypeError for what is no number.
"""

from jopt.optimizers.adadelta import Adadelta, adadelta
from jopt.optimizers.adafactor import Adafactor, adafactor
from jopt.optimizers.adagrad import Adagrad, adagrad
from jopt.optimizers.adam import Adam, adam, adamw
from jopt.optimizers.adamax import Adamax, adamax
from jopt.optimizers.asgd import ASGD, asgd
from jopt.optimizers.mars import Mars, mars
from jopt.optimizers.momentum import Momentum, momentum
from jopt.optimizers.muon import Muon, muon
from jopt.optimizers.nadam import NAdam, nadam
from jopt.optimizers.radam import RAdam, radam
from jopt.optimizers.rmsprop import RMSprop, rmsprop
from jopt.optimizers.rprop import Rprop, rprop
from jopt.optimizers.sgd import SGD, gradient_descent, sgd
from jopt.optimizers.sparse_adam import SparseAdam, sparse_adam

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "Mars",
    "Momentum",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "gradient_descent",
    "mars",
    "momentum",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sparse_adam",
]
