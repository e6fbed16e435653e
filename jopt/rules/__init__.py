"""The rules, one file a family. Each is the whole mathematics of its optimizer; nothing else repeats it."""

from jopt.rules.adafactor import Adafactor
from jopt.rules.adagrad import Adadelta, Adagrad
from jopt.rules.adam import Adam
from jopt.rules.adamax import Adamax
from jopt.rules.asgd import ASGD
from jopt.rules.mars import Mars
from jopt.rules.momentum import Momentum
from jopt.rules.muon import Muon
from jopt.rules.nadam import NAdam
from jopt.rules.radam import RAdam
from jopt.rules.rmsprop import RMSprop
from jopt.rules.rprop import Rprop
from jopt.rules.sgd import SGD
from jopt.rules.sparse_adam import SparseAdam

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
]
