"""An optimizer is one file: its rule, which is all its mathematics, and its function under torch's name in lower case.

The functions take torch's arguments with torch's defaults. Every number may be a number, a 0-d array (also traced) or a
schedule `step -> value`, evaluated in float64 at the count of calls, from 0. Each takes `jopt.transform.Options` too.
They raise torch's ValueError for a number out of range, TypeError for what is no number.
"""

from jopt.optimizers.adadelta import Adadelta, adadelta
from jopt.optimizers.adafactor import Adafactor, adafactor
from jopt.optimizers.adagrad import Adagrad, adagrad
from jopt.optimizers.adam import Adam, CautiousAdam, adam, adamw
from jopt.optimizers.adamax import Adamax, adamax
from jopt.optimizers.adan import Adan, adan
from jopt.optimizers.ademamix import AdEMAMix, ademamix
from jopt.optimizers.adopt import ADOPT, adopt
from jopt.optimizers.asgd import ASGD, asgd
from jopt.optimizers.kron import Kron, kron
from jopt.optimizers.lamb import LAMB, lamb
from jopt.optimizers.lars import LARS, lars
from jopt.optimizers.lion import CautiousLion, Lion, lion
from jopt.optimizers.mars import Mars, mars
from jopt.optimizers.momentum import Momentum, momentum
from jopt.optimizers.muon import Muon, muon
from jopt.optimizers.nadam import NAdam, nadam
from jopt.optimizers.nor_muon import NorMuon, nor_muon
from jopt.optimizers.prodigy import Prodigy, prodigy
from jopt.optimizers.radam import RAdam, radam
from jopt.optimizers.rmsprop import RMSprop, rmsprop
from jopt.optimizers.rprop import Rprop, rprop
from jopt.optimizers.schedule_free import (
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    schedule_free_adamw,
    schedule_free_sgd,
)
from jopt.optimizers.sgd import SGD, gradient_descent, sgd
from jopt.optimizers.soap import SOAP, soap
from jopt.optimizers.sparse_adam import SparseAdam, sparse_adam

__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "Adan",
    "CautiousAdam",
    "CautiousLion",
    "Kron",
    "Lion",
    "Mars",
    "Momentum",
    "Muon",
    "NAdam",
    "NorMuon",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "SparseAdam",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "asgd",
    "gradient_descent",
    "kron",
    "lamb",
    "lars",
    "lion",
    "mars",
    "momentum",
    "muon",
    "nadam",
    "nor_muon",
    "prodigy",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "soap",
    "sparse_adam",
]
