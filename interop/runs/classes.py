"""What torch's optimizers and ours beside them are like: the one table that all that moves or stores runs asks."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import jopt
from interop import optim
from interop.dropin.leaf import EMA
from interop.dropin.slots import slot_shapes
from jopt.quantized import ABSMAX, CODES
from jopt.rule import Rule


@dataclasses.dataclass(frozen=True)
class TorchClass:
    """A class of torch.optim, or one that `interop.optim` has beside those, that is one rule.

    Attributes:
      name: torch's.
      make: jopt's function.
      always, sometimes: the state of a stepped parameter: what is always there, and what by the options.
      looks_at_axes: with its axes exchanged a matrix would be stepped differently.
      counts_in_integers: its step is a Python integer, where the others' is a tensor.
      keeps_unstepped: a parameter has its state before its first step too.
    """

    name: str
    make: Callable[..., jopt.Transform]
    always: frozenset[str]
    sometimes: frozenset[str] = frozenset()
    looks_at_axes: bool = False
    counts_in_integers: bool = False
    keeps_unstepped: bool = False

    @property
    def rule(self) -> type[Rule]:
        return getattr(optim, self.name).rule

    @property
    def counts(self) -> bool:
        """Whether its state has the step count. Without one, a momentum buffer shows that there was a step."""
        return "step" in self.always

    @property
    def known(self) -> frozenset[str]:
        """All keys that the state of a parameter may have."""
        slots = self.always | self.sometimes
        return slots | {EMA} | {slot + end for slot in slots - SCALARS for end in (CODES, ABSMAX)}

    def lacks(self, values: Iterable[str]) -> set[str]:
        """What is always there and is not among these keys, in codes neither."""
        return set(self.always) - {key.removesuffix(CODES) for key in values}

    @property
    def fixed(self) -> Mapping[str, Any]:
        """What its groups say of it, beside its options."""
        return getattr(getattr(optim, self.name), "fixed", {})

    def decouples(self, options: Mapping[str, Any]) -> bool:
        """Whether its weight decay is decoupled, as these options of a group say, or its name."""
        return bool(options.get("decoupled_weight_decay", self.name in ("AdamW", "CautiousAdamW")))


def _of(name: str, make: Callable[..., jopt.Transform], always: str, sometimes: str = "", **rest: bool) -> TorchClass:
    return TorchClass(name, make, frozenset(always.split()), frozenset(sometimes.split()), **rest)


MOMENTS = "step exp_avg exp_avg_sq"
ESTIMATES = "k d d_rest d_max d_max_rest d_numerator d_numerator_rest"  # of Prodigy
SUMS = "step lr_max lr_max_rest weight_sum weight_sum_rest"  # of a schedule-free class
MATRICES = " ".join(f"{name}_{axis}" for name in ("GG", "Q") for axis in range(8))
CLASSES = {
    x.name: x
    for x in (
        _of("ASGD", jopt.asgd, "step eta mu ax"),
        _of("Adadelta", jopt.adadelta, "step square_avg acc_delta"),
        _of("Adafactor", jopt.adafactor, "step", "row_var col_var variance", looks_at_axes=True),
        _of("Adagrad", jopt.adagrad, "step sum", keeps_unstepped=True),
        _of("Adam", jopt.adam, MOMENTS, "max_exp_avg_sq"),
        _of("AdamW", jopt.adamw, MOMENTS, "max_exp_avg_sq"),
        _of("Adamax", jopt.adamax, "step exp_avg exp_inf"),
        _of("Muon", jopt.muon, "momentum_buffer", looks_at_axes=True),
        _of("NAdam", jopt.nadam, f"{MOMENTS} mu_product"),
        _of("RAdam", jopt.radam, MOMENTS),
        _of("RMSprop", jopt.rmsprop, "step square_avg", "momentum_buffer grad_avg"),
        _of("Rprop", jopt.rprop, "step prev step_size"),
        _of("SGD", jopt.sgd, "", "momentum_buffer"),
        _of("SparseAdam", jopt.sparse_adam, MOMENTS, counts_in_integers=True),
        # Those of interop.optim that torch has not.
        _of("ADOPT", jopt.adopt, MOMENTS),
        _of("AdEMAMix", jopt.ademamix, "step exp_avg_slow exp_avg_sq", "exp_avg_fast"),
        _of("Adan", jopt.adan, f"{MOMENTS} exp_avg_diff neg_pre_grad"),
        _of("AdamWScheduleFree", jopt.schedule_free_adamw, f"{SUMS} z exp_avg_sq"),
        _of("Prodigy", jopt.prodigy, f"step {ESTIMATES} s p0 exp_avg_sq", "exp_avg"),
        _of("SGDScheduleFree", jopt.schedule_free_sgd, f"{SUMS} z"),
        _of("CautiousAdamW", functools.partial(jopt.adamw, cautious=True), MOMENTS, "max_exp_avg_sq"),
        _of("CautiousLion", functools.partial(jopt.lion, cautious=True), "exp_avg"),
        _of("Kron", jopt.kron, "step waited refreshes phase momentum_buffer", MATRICES, looks_at_axes=True),
        _of("LAMB", jopt.lamb, MOMENTS),
        _of("LARS", jopt.lars, "", "momentum_buffer"),
        _of("Lion", jopt.lion, "exp_avg"),
        _of("SOAP", jopt.soap, MOMENTS, f"phase {MATRICES}", looks_at_axes=True),
        _of("Mars", jopt.mars, MOMENTS, "max_exp_avg_sq last_grad"),
        _of("NorMuon", jopt.nor_muon, "momentum_buffer second_momentum_buffer", looks_at_axes=True),
    )
}
LINE_SEARCHING = "LBFGS"  # torch's one class that is no rule: `interop.dropin.lbfgs` moves it
# Of the state, what is one number.
SCALARS = frozenset(f"step mu_product eta mu phase waited refreshes {SUMS} {ESTIMATES}".split())


def state_shapes(name: str, options: Mapping[str, Any], shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a parameter's state where they are not the parameter's, as a group's options have it."""
    rule, given = CLASSES[name].rule, {**defaults(name), **options}
    return slot_shapes(rule.shaped_by(given, rule.members(given)), shape) | dict.fromkeys(SCALARS, ())


def class_of(optimizer: Any) -> str:
    """The name of the class of torch.optim that an optimizer, native or of `interop.optim`, is of.

    Raises:
      TypeError: of none.
    """
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in optim.CLASSES:
            return cls.__name__
        if cls.__module__ == optim.__name__ and cls.__name__ in optim.OTHERS:
            return cls.__name__
    raise TypeError(
        "optimizer: expected one of torch.optim's or interop.optim's, found "
        f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    )


def classes_of(rule: type[Rule]) -> list[TorchClass]:
    """Those that a rule steps: Adam and AdamW share one."""
    return [x for x in CLASSES.values() if x.rule is rule]


@functools.cache
def defaults(name: str) -> Mapping[str, Any]:
    """The options of a class in torch's order, and their defaults; only the constructor knows them all."""
    where = optim if name in optim.OTHERS else torch.optim
    return types.MappingProxyType(getattr(where, name)([torch.nn.Parameter(torch.zeros(1, 1))]).defaults)
