"""The rules, one file a family. Each is the whole mathematics of its optimizer; nothing else repeats it."""

from jopt.rules.adam import Adam
from jopt.rules.momentum import Momentum
from jopt.rules.rmsprop import RMSprop
from jopt.rules.sgd import SGD

__all__ = ["SGD", "Adam", "Momentum", "RMSprop"]
