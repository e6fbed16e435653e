"""Steps that are too small for a program: the rule's operations on torch's tensors, one after the other.

A program is launched in some 50 us, however little it does. torch's operations on a few thousand elements take a
microsecond or two each, need no compiling, and round as torch rounds, being torch's. The rule is the same: it is
recorded once, with operands that stand for its arguments. From the record comes a Python function, which writes in
place where nobody reads the old values any more. AdamW's:

    def step(param, grad, exp_avg, exp_avg_sq, c):
        v0 = param.mul_(c[0])
        v1 = exp_avg.lerp_(grad, c[2])
        v2 = exp_avg_sq.mul_(c[1])
        v3 = v2.addcmul_(grad, grad, value=c[3])
        ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interop.dropin.coefficients import columns
from interop.dropin.leaf import EMA, Leaf, real_dtype
from jopt import numerics as t
from jopt.rule import Rule

if TYPE_CHECKING:
    from interop.dropin.program import Spec

ROOM = 2**19  # elements that a step may pass over more often than a program, which reads and writes each array once


@dataclasses.dataclass(eq=False)
class Operand(t.Foreign):
    """What stands for a tensor, or for a number, while a rule is recorded.

    Attributes:
      text: it in the function.
      last: the operation that reads it last; none does so far.
      slot: whose memory it lies in; None for memory that is its own, and for numbers.
      writable: whether it may be overwritten once it is read.
    """

    record: Record
    text: str
    is_number: bool = False
    last: int = -1
    slot: str | None = None
    writable: bool = True

    def operate(self, name: str, *args: Any, **options: Any) -> Any:
        return self.record.add(name, *args, **options)

    def __neg__(self) -> Operand:
        return self.operate("neg", self)

    def __eq__(self, other: object) -> Operand:  # type: ignore[override]
        return self.operate("==", self, other)

    def __ne__(self, other: object) -> Operand:  # type: ignore[override]
        return self.operate("!=", self, other)

    def __lt__(self, other: Any) -> Operand:
        return self.operate("<", self, other)

    def __gt__(self, other: Any) -> Operand:
        return self.operate(">", self, other)


METHODS = {"absolute": "abs"}  # else torch has the operation's name
CLAMPS = {"maximum": "clamp_min", "minimum": "clamp_max"}


class Record:
    """The operations of a rule, in their order."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, list[Any], dict[str, Any], Operand]] = []

    def add(self, name: str, *args: Any, **options: Any) -> Any:
        if name == "tied":
            return args
        if name == "cast":  # torch rounds a number itself
            return args[0]
        if all(x.is_number for x in args if isinstance(x, Operand)):
            x, *others = map(_text, args)
            return Operand(self, f"({x} {name} {others[0]})" if others else f"(-{x})", is_number=True)
        result = Operand(self, f"v{len(self.operations)}")
        for x in (*args, *options.values()):
            if isinstance(x, Operand):
                x.last = len(self.operations)
        self.operations.append((name, list(args), options, result))
        return result


def _text(x: Any) -> str:
    return x.text if isinstance(x, Operand) else repr(x)


@functools.lru_cache(maxsize=1024)
def compile_rule(
    rule: Rule | None, slots: tuple[str, ...], columns: tuple[str, ...]
) -> tuple[Callable[..., None], int]:
    """The function that steps a leaf in place, and how often it passes over a leaf's memory more than it must.

    The function takes the parameter, its gradient, the slots, and the numbers of the columns. Without a rule it updates
    the parameter's average alone.
    """
    record = Record()
    c: Any = {name: Operand(record, f"c[{i}]", True) for i, name in enumerate(columns)}
    param, *old = (Operand(record, name, slot=name) for name in ("param", *slots))
    grad, state = Operand(record, "grad", writable=False), dict(zip(slots, old, strict=True))
    average = state.pop(EMA, None)
    new_param: Any = param
    new: Any = state
    if rule is not None:
        new_param, new = rule.update(c, grad, state, param)  # type: ignore[arg-type]
    outputs: dict[str, Any] = {"param": new_param} | new
    if average is not None:
        outputs[EMA] = t.lerp(average, new_param, c[EMA])  # type: ignore[arg-type]
    n = len(record.operations)
    for x in outputs.values():
        x.last = n
    for name, (condition, *chosen), _, result in reversed(record.operations):
        if name == "where" and condition.is_number:  # the result is one of them, not a copy
            for x in chosen:
                x.last = max(x.last, result.last)
    lines, passes = [], 0
    for i, (name, args, options, result) in enumerate(record.operations):
        tensors = [x for x in args if isinstance(x, Operand) and not x.is_number]
        in_place = args[0] is tensors[0] and args[0].writable and args[0].last == i and name in _WRITING
        result.slot = args[0].slot if in_place else None
        result.writable = not (name == "where" and args[0].is_number)
        passes += (len(tensors) + 1) * result.writable
        lines.append(f"{result.text} = {_call(name, args, options, in_place)}")
    for name, x in outputs.items():
        if x.slot != name:
            lines.append(f"{name}.copy_({x.text})")
            passes += 2
    body = "".join(f"    {line}\n" for line in lines)
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def step({', '.join(['param', 'grad', *slots])}, c):\n{body}", scope)
    return scope["step"], passes - 3 - 2 * len(slots)


# What torch has in place too.
_WRITING = {"add", "mul", "div", "lerp", "addcmul", "addcdiv", "sqrt", "rsqrt", "reciprocal", "absolute", "sign", "neg"}
_WRITING |= CLAMPS.keys()


def _call(name: str, args: Sequence[Any], options: dict[str, Any], in_place: bool) -> str:
    x, *others = map(_text, args)
    if name in ("==", "!=", "<", ">"):
        return f"{x} {name} {others[0]}"
    if name == "where":
        a, b = others
        return f"{a} if {x} else {b}" if args[0].is_number else f"torch.where({x}, {a}, {b})"
    if name in ("zeros_like", "ones_like"):
        return f"torch.{name}({x})"
    if name in CLAMPS:
        if isinstance(args[1], Operand) and not args[1].is_number:
            return f"torch.{name}({x}, {others[0]}{f', out={x}' * in_place})"
        return f"{x}.{CLAMPS[name]}{'_' * in_place}({others[0]})"
    if name in ("addcmul", "addcdiv"):
        others = [*others[:2], f"value={others[2]}" if len(others) > 2 else "value=1"]
    keywords = [f"{key}={_text(value)}" for key, value in options.items() if value is not None]
    return f"{x}.{METHODS.get(name, name)}{'_' * in_place}({', '.join([*others, *keywords])})"


def suits(leaves: Iterable[tuple[Rule, Leaf]]) -> bool:
    """Whether the rules' operations on these leaves take no longer than programs."""
    extra = 0
    for rule, leaf in leaves:
        # An operation of torch's rounds to the parameter's type, which wider state is to be kept from.
        if rule.scope != "element" or {*map(real_dtype, leaf.state_dtypes.values())} - {real_dtype(leaf.dtype)}:
            return False
        extra += compile_rule(rule, tuple(leaf.state_dtypes), columns(rule, leaf.state_dtypes))[1] * leaf.size
    return extra <= ROOM


class Update:
    """Steps a bucket, as `program.Update` compiled does; nothing clips or unscales here.

    It is of one bucket, for it keeps the parts of its buffers.
    """

    def __init__(self, spec: Spec):
        self._spec = spec
        slots = tuple(spec.names[1:])
        self._step, _ = compile_rule(spec.rule, slots, spec.columns)
        self._average = compile_rule(None, slots, spec.columns)[0] if EMA in slots else None
        self._parts: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(
        self,
        buffers: list[Tensor],
        grads: list[Tensor],
        table: tuple[np.ndarray, Sequence[tuple[int, int]]],
        leaf_of_row: np.ndarray,
        found: dict[str, Any],
    ) -> list[Tensor]:
        (rows, runs), n, big = table, len(self._spec.names), len(self._spec.big)
        for begin, end in runs:
            c = rows[begin].tolist()
            step = self._step if c[-1] else self._average  # the last says whether it has a gradient
            if step is None:
                continue
            for i in range(begin, min(end, big)):
                step(buffers[n * i], grads[i], *buffers[n * i + 1 : n * i + n], c)
            if end > big:
                part = self._parts.get((begin, end))
                if part is None:
                    first, last = np.searchsorted(leaf_of_row, (max(begin - big, 0), end - big))
                    small = [buffers[n * big], grads[big], *buffers[n * big + 1 :]]
                    part = self._parts[begin, end] = [x[first:last].view(-1) for x in small]
                step(*part, c)
        return buffers
