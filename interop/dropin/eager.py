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
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interop.dropin.coefficients import columns
from interop.dropin.leaf import EMA, Leaf, real_dtype
from interop.dropin.orthogonal import orthogonalize
from interop.dropin.slots import slot_shapes
from interop.memory import Table
from interop.memory.tensors import DTYPES, TORCH_DTYPES
from jopt import numerics as t
from jopt.rule import Rule

if TYPE_CHECKING:
    from interop.dropin.program import Spec

ROOM = 2**19
"""Elements that a step may pass over more often than a program, which reads and writes each array once."""

RENT = 2**31
"""Elements that steps after a change of shapes may pass over so, all together: in the time that compiling takes."""


@dataclasses.dataclass(eq=False)
class Operand(t.Foreign):
    """What stands for a tensor, or for a number, while a rule is recorded.

    Attributes:
      text: it in the function.
      shape, dtype: of a tensor, where the rule may ask for them.
      last: the operation that reads it last; none does so far.
      slot: whose memory it lies in; None for memory of its own, and for numbers.
      writable: whether it may be overwritten once it is read.
    """

    record: Record
    text: str
    is_number: bool = False
    shape: tuple[int, ...] = ()
    dtype: Any = None
    last: int = -1
    slot: str | None = None
    writable: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def operate(self, name: str, *args: Any, **options: Any) -> Any:
        return self.record.add(name, *args, **options)

    def astype(self, dtype: Any) -> Operand:
        return self if self.is_number or self.dtype == dtype else self.operate("astype", self, dtype)


METHODS = {"absolute": "abs"}  # else torch has the operation's name
CLAMPS = {"maximum": "clamp_min", "minimum": "clamp_max"}
# What torch has in place too.
IN_PLACE = {"add", "mul", "div", "lerp", "addcmul", "addcdiv", "sqrt", "rsqrt", "reciprocal", "absolute", "sign", "neg"}
IN_PLACE |= CLAMPS.keys()


class Record:
    """The operations of a rule, in their order: name, arguments, options, result."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, list[Any], dict[str, Any], Operand]] = []

    def add(self, name: str, *given: Any, **options: Any) -> Any:
        """Take down an operation; returns its result. Numbers are computed where they are used."""
        args = list(given)
        if name == "tied":
            return args
        if name == "cast":  # torch rounds a number itself
            return args[0]
        if name == "orthogonalize":
            c, matrix, *flags = args
            args = [matrix, c["a"], c["b"], c["c"], c["eps"], *flags]
        operands = [x for x in args if isinstance(x, Operand)]
        tensors = [x for x in operands if not x.is_number]
        if not tensors:
            texts = [*map(_text, args), *(_text(x) for x in options.values() if x is not None)]
            return Operand(self, _number(name, texts), is_number=True)
        shape, dtype = tensors[0].shape, tensors[0].dtype
        if name in ("norm", "mean") and len(args) > 1:
            shape = tuple(1 if i == args[1] % len(shape) else n for i, n in enumerate(shape))
        elif len(tensors) > 1:
            shape = tuple(np.broadcast_shapes(*(x.shape for x in tensors)))
        is_number = name in ("norm", "mean") and len(args) == 1
        dtype = args[1] if name == "astype" else dtype
        result = Operand(self, f"v{len(self.operations)}", is_number, shape, dtype)
        for x in (*operands, *options.values()):
            if isinstance(x, Operand):
                x.last = len(self.operations)
        self.operations.append((name, args, options, result))
        return result


def _text(x: Any) -> str:
    return x.text if isinstance(x, Operand) else repr(x)


def _number(name: str, texts: list[str]) -> str:
    """What an operation on numbers gives."""
    match name, texts:
        case "full_like", [_, value]:
            return value
        case "where", [condition, x, y]:
            return f"({x} if {condition} else {y})"
        case "ones_like", _:
            return "1.0"
        case "neg", [x]:
            return f"(-{x})"
        case "add", [x, y, *alpha]:
            return f"({x} + {' * '.join([*alpha, y])})"
        case "mul", [x, y]:
            return f"({x} * {y})"
        case "div", [x, y]:
            return f"({x} / {y})"
        case "maximum" | "minimum", [x, y]:
            return f"{name[:3]}({x}, {y})"
        case _:
            return f"({texts[0]} {name} {texts[1]})"


@functools.lru_cache(maxsize=1024)
def compile_rule(
    rule: Rule | None,
    slots: tuple[str, ...],
    columns: tuple[str, ...],
    shape: tuple[int, ...] = (),
    dtype: np.dtype | None = None,
) -> tuple[Callable[..., None], int]:
    """The function that steps a leaf in place, and how often it passes over a leaf's memory more than it must.

    The function takes the parameter, its gradient, the slots, and the numbers of the columns.

    Args:
      rule: without one, the parameter's average alone is updated.
      slots, columns: the names of the leaf's tensor state and of its coefficients.
      shape, dtype: of the leaf, for a rule that looks at whole tensors.
    """
    record = Record()
    c: Any = {name: Operand(record, f"c[{i}]", is_number=True) for i, name in enumerate(columns)}
    shapes = slot_shapes(rule, shape) if rule is not None else {}
    param, *old = (
        Operand(record, name, shape=shapes.get(name, shape), dtype=dtype, slot=name) for name in ("param", *slots)
    )
    grad, state = Operand(record, "grad", shape=shape, dtype=dtype, writable=False), dict(zip(slots, old, strict=True))
    average = state.pop(EMA, None)
    new_param: Any = param
    new: Any = state
    if rule is not None:
        new_param, new = rule.update(c, grad, state, param)  # type: ignore[arg-type]
    outputs: dict[str, Any] = {"param": new_param} | new
    if average is not None:
        outputs[EMA] = t.lerp(average, new_param, c[EMA])  # type: ignore[arg-type]
    for x in outputs.values():
        x.last = len(record.operations)
    for name, (condition, *chosen), _, result in reversed(record.operations):
        if name == "where" and condition.is_number:  # the result is one of them, not a copy
            for x in chosen:
                x.last = max(x.last, result.last)
    lines, passes = [], 0
    for i, (name, args, options, result) in enumerate(record.operations):
        x, whole = args[0], {id(y) for y in args if isinstance(y, Operand) and not y.is_number and y.shape == shape}
        writes = name in IN_PLACE and x.writable and x.last == i and x.shape == result.shape
        result.slot = x.slot if writes else None
        result.writable = not (name == "where" and x.is_number)
        passes += len(whole) + (result.writable and not result.is_number and result.shape == shape)
        lines.append(f"{result.text} = {_call(name, args, options, writes)}")
    for name, x in outputs.items():
        if x.slot != name:
            lines.append(f"{name}.copy_({x.text})")
            passes += 2 * (x.shape == shape)
    body = "".join(f"    {line}\n" for line in lines)
    source = f"def step({', '.join(['param', 'grad', *slots])}, c):\n{body}"
    scope: dict[str, Any] = {"torch": torch, "orthogonalize": orthogonalize}
    exec(source, scope)
    scope["step"].__doc__ = source
    return scope["step"], passes - 3 - 2 * sum(x.shape == shape for x in old)


def _call(name: str, args: Sequence[Any], options: dict[str, Any], in_place: bool) -> str:
    """An operation on tensors, in torch's words."""
    x, *others = texts = list(map(_text, args))
    match name:
        case "==" | "!=" | "<" | ">" | "*" | "/":
            return f"{x} {name} {others[0]}"
        case "where" if args[0].is_number:
            return f"{others[0]} if {x} else {others[1]}"
        case "where" | "zeros_like" | "ones_like":
            return f"torch.{name}({', '.join(texts)})"
        case "maximum" | "minimum" if isinstance(args[1], Operand) and not args[1].is_number:
            return f"torch.{name}({x}, {others[0]}{f', out={x}' * in_place})"
        case "maximum" | "minimum":
            return f"{x}.{CLAMPS[name]}{'_' * in_place}({others[0]})"
        case "norm" if not others:
            return f"{x}.norm(2).item()"
        case "norm":
            return f"torch.norm({x}, dim={others[0]}, keepdim=True)"
        case "mean" if not others:
            return f"{x}.mean().item()"
        case "mean":
            return f"{x}.mean(dim={others[0]}, keepdim=True)"
        case "astype":
            return f"{x}.to({TORCH_DTYPES[np.dtype(args[1])]})"
        case "orthogonalize":
            return f"orthogonalize({', '.join(texts)})"
        case "addcmul" | "addcdiv":
            others = [*others[:2], f"value={others[2] if len(others) > 2 else 1}"]
    keywords = [f"{key}={_text(value)}" for key, value in options.items() if value is not None]
    return f"{x}.{METHODS.get(name, name)}{'_' * in_place}({', '.join([*others, *keywords])})"


def extra_passes(leaves: Iterable[tuple[Rule, Leaf]]) -> int | None:
    """How many elements the rules' operations pass over more often than programs; None where programs are needed."""
    extra = 0
    for rule, leaf in leaves:
        if not rule.by_operations:
            return None
        # An operation of torch's rounds to the parameter's type, which wider state is to be kept from.
        if {*map(real_dtype, leaf.state_dtypes.values())} - {real_dtype(leaf.dtype)}:
            return None
        if not leaf.size:
            continue
        _, extra_of_one = _compile_for(rule, leaf.state_dtypes, tuple(leaf.shape), DTYPES[leaf.dtype])
        extra += extra_of_one * leaf.size
    return extra


def _compile_for(
    rule: Rule, slots: Iterable[str], shape: tuple[int, ...], dtype: np.dtype
) -> tuple[Callable[..., None], int]:
    """`compile_rule` for a leaf of that shape and type, which matter only to a rule that looks at whole tensors."""
    slots = tuple(slots)
    whole = (shape, dtype) if rule.scope == "tensor" else ()
    return compile_rule(rule, slots, columns(rule, slots), *whole)


def sources(spec: Spec) -> tuple[str, ...]:
    """The functions that step a bucket, as Python's text."""
    shapes = [shape for shape in spec.big if math.prod(shape)] + [()] * bool(spec.n_small)
    functions = (_compile_for(spec.rule, spec.names[1:], shape, spec.dtype)[0] for shape in shapes)
    return tuple(dict.fromkeys(str(f.__doc__) for f in functions))


class Update:
    """Steps a bucket, as `program.Update` compiled does; nothing clips or unscales here.

    It is of one bucket, for it keeps views of its buffers.
    """

    def __init__(self, spec: Spec):
        self._spec = spec
        self._has_elements = [math.prod(shape) > 0 for shape in spec.big]
        self._kept: dict[Any, Any] = {}  # functions, and the tensors that they take

    def __call__(
        self,
        buffers: list[Tensor],
        grads: list[Tensor],
        table: Table,
        leaf_of_row: np.ndarray,
        found: dict[str, Any],
    ) -> list[Tensor]:
        big = len(self._spec.big)
        for begin, end in table.runs:
            c = table.rows[begin].tolist()
            is_active = bool(c[-1])
            if not is_active and EMA not in self._spec.names:
                continue
            for i in range(begin, min(end, big)):
                if not self._has_elements[i]:
                    continue
                step, param, slots = self._kept.get((i, is_active)) or self._keep_big(i, is_active, buffers, grads[i])
                step(param, grads[i], *slots, c)
            if end > big:
                leaves = max(begin - big, 0), end - big
                step, small = self._kept.get((*leaves, is_active)) or self._keep_small(
                    *leaves, is_active, buffers, grads[big], leaf_of_row
                )
                step(*small, c)
        return buffers

    def kept(self) -> tuple[list[Any], Any] | None:
        """What a step of leaves that are all alike calls; None before such a step.

        For each big leaf function, parameter and slots; for the small ones together function and tensors.
        """
        big, small = len(self._spec.big), self._spec.n_small
        found = [self._kept.get((i, True)) for i in range(big)]
        shared = self._kept.get((0, small, True))
        return (found, shared) if all(self._has_elements) and None not in found and (shared or not small) else None

    def _function(self, is_active: bool, shape: tuple[int, ...] = ()) -> Callable[..., None]:
        """The function for a leaf that has a gradient, or the one for its average alone."""
        spec = self._spec
        if not is_active:
            return compile_rule(None, tuple(spec.names[1:]), spec.columns)[0]
        return _compile_for(spec.rule, spec.names[1:], shape, spec.dtype)[0]

    def _keep_big(self, i: int, is_active: bool, buffers: list[Tensor], grad: Tensor) -> Any:
        """In the leaf's shape, which its gradient has too, if it has one."""
        spec = self._spec
        whole = spec.rule.scope == "tensor" and spec.rule.axes
        shapes = spec.buffer_shapes(spec.big[i]) if whole else [grad.shape] * len(spec.names)
        first = i * len(shapes)
        own = buffers[first : first + len(shapes)]
        param, *slots = (x.view(shape) for x, shape in zip(own, shapes, strict=True))
        found = self._kept[i, is_active] = self._function(is_active, spec.big[i]), param, slots
        return found

    def _keep_small(
        self, first: int, last: int, is_active: bool, buffers: list[Tensor], grads: Tensor, leaf_of_row: np.ndarray
    ) -> Any:
        """Of the small leaves from one to another, as one."""
        begin, end = np.searchsorted(leaf_of_row, (first, last))
        param, *slots = buffers[-len(self._spec.names) :]
        small = [x[begin:end].view(-1) for x in (param, grads, *slots)]
        found = self._kept[first, last, is_active] = self._function(is_active), small
        return found
