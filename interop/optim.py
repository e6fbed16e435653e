"""torch.optim's classes with a compiled step: change `from torch import optim` to `from interop import optim`.

Same names, signatures, defaults, errors, state keys and state_dict, since each class is torch's own with another
`step`; torch's schedulers, hooks and checkpoints work on them unchanged.

>>> import torch
>>> from interop import optim
>>> model = torch.nn.Linear(2, 1)
>>> optimizer = optim.AdamW(model.parameters(), lr=1e-2)
>>> model(torch.ones(1, 2)).sum().backward()
>>> optimizer.step()
"""

import torch

from interop.optimizer import CompiledStep
from jopt import rules

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]


class SGD(CompiledStep, torch.optim.SGD):
    """`torch.optim.SGD`, stepped by `jopt.rules.SGD`. A sparse gradient is made dense."""

    rule = rules.SGD
    hidden_scalars = frozenset({"step"})


class Adam(CompiledStep, torch.optim.Adam):
    """`torch.optim.Adam`, stepped by `jopt.rules.Adam`."""

    rule = rules.Adam
    sparse_error = "Adam does not support sparse gradients, please consider SparseAdam instead"


class AdamW(CompiledStep, torch.optim.AdamW):
    """`torch.optim.AdamW`, stepped by `jopt.rules.Adam`."""

    rule = rules.Adam
    sparse_error = Adam.sparse_error


class RMSprop(CompiledStep, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, stepped by `jopt.rules.RMSprop`."""

    rule = rules.RMSprop
    sparse_error = "RMSprop does not support sparse gradients"
