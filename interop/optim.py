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

import sys
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils

from interop.dropin import constructed, muon, sparse
from interop.dropin.constructed import Constructed, PerAxis, ScheduleFree
from interop.dropin.lbfgs import LBFGS
from interop.dropin.step import CompiledStep, Stepped
from jopt import optimizers

__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "LBFGS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Adamax",
    "Adan",
    "CautiousAdamW",
    "CautiousLion",
    "Constructed",
    "Kron",
    "Lion",
    "Mars",
    "Muon",
    "NAdam",
    "NorMuon",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGDScheduleFree",
    "SparseAdam",
    "lr_scheduler",
    "swa_utils",
]

# What torch has not.
OTHERS = (
    *("ADOPT", "AdEMAMix", "AdamWScheduleFree", "Adan", "CautiousAdamW", "CautiousLion", "Kron", "LAMB", "LARS"),
    *("Lion", "Mars", "NorMuon", "Prodigy", "SGDScheduleFree", "SOAP"),
)
CLASSES = tuple(
    name for name in __all__ if name not in ("Constructed", "Optimizer", "lr_scheduler", "swa_utils", *OTHERS)
)

# What torch.optim has beside its classes is torch's, `from interop.optim.lr_scheduler import StepLR` too.
sys.modules |= {f"{__name__}.{module.__name__.rpartition('.')[2]}": module for module in (lr_scheduler, swa_utils)}


def __getattr__(name: str) -> Any:
    found = getattr(torch.optim, name, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        raise AttributeError(
            f"interop.optim has no {name}, which torch {torch.__version__} has and this version of jopt does not know; "
            f"take torch.optim.{name}, or upgrade jopt"
        )
    if name.startswith("_") or found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


class SGD(CompiledStep, torch.optim.SGD):
    """`torch.optim.SGD`, stepped by `jopt.optimizers.SGD`. A sparse gradient is made dense."""

    rule = optimizers.SGD
    hidden_scalars = frozenset({"step"})
    late_slots = frozenset({"momentum_buffer"})

    def sparse_error(self, group: dict[str, Any]) -> None:
        return None


class Adam(CompiledStep, torch.optim.Adam):
    """`torch.optim.Adam`, stepped by `jopt.optimizers.Adam`."""

    rule = optimizers.Adam

    def sparse_error(self, group: dict[str, Any]) -> str:
        return "Adam does not support sparse gradients, please consider SparseAdam instead"


class AdamW(CompiledStep, torch.optim.AdamW):
    """`torch.optim.AdamW`, stepped by `jopt.optimizers.Adam`."""

    rule = optimizers.Adam
    sparse_error = Adam.sparse_error


class Adamax(CompiledStep, torch.optim.Adamax):
    """`torch.optim.Adamax`, stepped by `jopt.optimizers.Adamax`."""

    rule = optimizers.Adamax


class NAdam(CompiledStep, torch.optim.NAdam):
    """`torch.optim.NAdam`, stepped by `jopt.optimizers.NAdam`."""

    rule = optimizers.NAdam


class RAdam(CompiledStep, torch.optim.RAdam):
    """`torch.optim.RAdam`, stepped by `jopt.optimizers.RAdam`."""

    rule = optimizers.RAdam


class Adagrad(CompiledStep, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, stepped by `jopt.optimizers.Adagrad`.

    A sparse gradient is made dense: a row without gradient stays as it is either way.
    """

    rule = optimizers.Adagrad

    def sparse_error(self, group: dict[str, Any]) -> str | None:
        return "weight_decay option is not compatible with sparse gradients" if group["weight_decay"] != 0 else None


class Adadelta(CompiledStep, torch.optim.Adadelta):
    """`torch.optim.Adadelta`, stepped by `jopt.optimizers.Adadelta`."""

    rule = optimizers.Adadelta


class RMSprop(CompiledStep, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, stepped by `jopt.optimizers.RMSprop`."""

    rule = optimizers.RMSprop


class Rprop(CompiledStep, torch.optim.Rprop):
    """`torch.optim.Rprop`, stepped by `jopt.optimizers.Rprop`."""

    rule = optimizers.Rprop


class ASGD(CompiledStep, torch.optim.ASGD):
    """`torch.optim.ASGD`, stepped by `jopt.optimizers.ASGD`."""

    rule = optimizers.ASGD


class Adafactor(CompiledStep, torch.optim.Adafactor):
    """`torch.optim.Adafactor`, stepped by `jopt.optimizers.Adafactor`."""

    rule = optimizers.Adafactor


class Muon(CompiledStep, torch.optim.Muon):
    """`torch.optim.Muon`, stepped by `jopt.optimizers.Muon` around torch's batched products."""

    rule = optimizers.Muon
    compile_update = staticmethod(muon.compile_update)
    late_slots = frozenset({"momentum_buffer"})


class CautiousAdamW(Constructed):
    """AdamW that takes only what of its momentum goes with the gradient: `jopt.adamw` with `cautious=True`."""

    rule, function = optimizers.CautiousAdam, staticmethod(optimizers.adamw)
    fixed = {"cautious": True, "decoupled_weight_decay": True}


class ADOPT(Constructed):
    """`jopt.adopt` as a torch optimizer."""

    rule, function = optimizers.ADOPT, staticmethod(optimizers.adopt)


class Adan(Constructed):
    """`jopt.adan` as a torch optimizer."""

    rule, function = optimizers.Adan, staticmethod(optimizers.adan)
    in_groups = {"step": "step"}


class AdEMAMix(Constructed):
    """`jopt.ademamix` as a torch optimizer."""

    rule, function = optimizers.AdEMAMix, staticmethod(optimizers.ademamix)


class LAMB(Constructed):
    """`jopt.lamb` as a torch optimizer."""

    rule, function = optimizers.LAMB, staticmethod(optimizers.lamb)
    in_groups = {"step": "step"}


class LARS(Constructed):
    """`jopt.lars` as a torch optimizer."""

    rule, function = optimizers.LARS, staticmethod(optimizers.lars)
    hidden_scalars = frozenset({"step"})
    late_slots = frozenset({"momentum_buffer"})


class AdamWScheduleFree(ScheduleFree):
    """`jopt.schedule_free_adamw` as a torch optimizer, with the authors' `train()` and `eval()`."""

    rule, function = optimizers.ScheduleFreeAdamW, staticmethod(optimizers.schedule_free_adamw)


class SGDScheduleFree(ScheduleFree):
    """`jopt.schedule_free_sgd` as a torch optimizer, with the authors' `train()` and `eval()`."""

    rule, function = optimizers.ScheduleFreeSGD, staticmethod(optimizers.schedule_free_sgd)


class SOAP(PerAxis):
    """`jopt.soap` as a torch optimizer. Its `step` counts the first call too, in which no parameter moves."""

    rule, function = optimizers.SOAP, staticmethod(optimizers.soap)
    lists, uncounted = ("GG", "Q"), 1.0


class Kron(constructed.Kron):
    """`jopt.kron` as a torch optimizer."""

    rule, function = optimizers.Kron, staticmethod(optimizers.kron)


class Lion(Constructed):
    """`jopt.lion` as a torch optimizer."""

    rule, function = optimizers.Lion, staticmethod(optimizers.lion)
    fixed = {"cautious": False}


class CautiousLion(Constructed):
    """`jopt.lion` with `cautious=True` as a torch optimizer."""

    rule, function = optimizers.CautiousLion, staticmethod(optimizers.lion)
    fixed = {"cautious": True}


class Mars(Constructed):
    """`jopt.mars` as a torch optimizer."""

    rule, function = optimizers.Mars, staticmethod(optimizers.mars)


class NorMuon(Constructed):
    """`jopt.nor_muon` as a torch optimizer, for matrices alone; its products are torch's, as `Muon`'s are."""

    rule, function = optimizers.NorMuon, staticmethod(optimizers.nor_muon)
    compile_update = staticmethod(muon.compile_update)


class Prodigy(constructed.Prodigy):
    """`jopt.prodigy` as a torch optimizer. Its groups share the step size, `optimizer.d`."""

    rule, function = optimizers.Prodigy, staticmethod(optimizers.prodigy)


class SparseAdam(Stepped, torch.optim.SparseAdam):
    """`torch.optim.SparseAdam`, whose rows are stepped by `jopt.optimizers.SparseAdam`; its state is torch's own."""

    rule = optimizers.SparseAdam
    _work: Any = None

    def _step(self) -> None:
        sparse.step(self)
