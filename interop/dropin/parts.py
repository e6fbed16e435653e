"""Rules that look at whole tensors, over the parts that processes have of them: their sums are of all processes.

A rule is run on its leaf's part. Where it takes a norm or a mean over an axis that is divided, each process computes
the sum over its part, and the processes add those up between two programs. What a sum is of may depend on other sums:
Adafactor's last norm is that of a step which its row and column means made. So there are as many rounds of sums as they
depend on each other, and then the program that steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch.distributed as dist
from jax import Array

from interop.dropin import host
from interop.dropin.program import Norms, Spec, Update, compile_on
from interop.dropin.whole import Axes, Whole, slot_whole
from jopt import numerics as t
from jopt.leaf import step_leaf
from jopt.rule import Rule

Vectors = list[Array]  # the sums of a round, in one vector for each set of axes that they are taken over


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum over processes that a rule asks for.

    Attributes:
      round: of which round it is; those of one round do not depend on each other.
      axes: of the mesh, over whose processes is summed.
      of: what this process adds.
    """

    round: int
    axes: Axes
    of: Array


class Sums:
    """The sums that a rule asks for on a leaf, in their order.

    Args:
      known: results, by the place in that order. A sum without is what this process adds, so that a trace can go on.
    """

    def __init__(self, known: Mapping[int, Array]):
        self.asked: list[Sum] = []
        self._known = known

    def take(self, round: int, axes: Axes, of: Array) -> tuple[Array, int]:
        """The sum, and before which round it is not known."""
        if not axes:
            return of, round
        self.asked.append(Sum(round, axes, of))
        return self._known.get(len(self.asked) - 1, of), round + 1


_OPERATORS: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "*": operator.mul,
    "/": operator.truediv,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclasses.dataclass(eq=False)
class Part(t.Foreign):
    """A part of an array, which a rule's operations see as if it were whole.

    Attributes:
      array: the part.
      whole: what it is a part of.
      sums: takes note of the sums.
      round: before which its value is not known.
    """

    array: Array
    whole: Whole
    sums: Sums
    round: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def size(self) -> int:
        return self.whole.size

    @property
    def ndim(self) -> int:
        return len(self.whole.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def astype(self, dtype: Any) -> Part:
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def operate(self, name: str, *args: Any, **options: Any) -> Any:
        if name == "norm":
            axis = args[1] if len(args) > 1 else None
            total, new = self._sum(axis, t.squares(self.array, axis))
            return dataclasses.replace(new, array=t.root(total, self.array))
        if name == "mean":
            axis = args[1] if len(args) > 1 else None
            total, new = self._sum(axis, t.summed(self.array, axis))
            size = self.whole.size if axis is None else self.shape[axis]
            return dataclasses.replace(new, array=t.cast(total / size, self.array))
        f = _OPERATORS.get(name) or getattr(t, name)
        result = f(*map(_array, args), **{key: _array(x) for key, x in options.items()})
        parts = [x for x in (*args, *options.values()) if isinstance(x, Part)]
        return Part(result, _broadcast([x.whole for x in parts]), self.sums, max(x.round for x in parts))

    def _sum(self, axis: int | None, of: Array) -> tuple[Array, Part]:
        """The sum over all axes, or one that is kept, of what this process adds; and a part that is to hold it."""
        axes, whole = self.whole.all_axes, Whole((), ())
        if axis is not None:
            axes, whole = self.whole.axes[axis], self.whole.reduced(axis)
        total, round = self.sums.take(self.round, axes, of)
        return total, Part(total, whole, self.sums, round)


def _array(x: Any) -> Any:
    return x.array if isinstance(x, Part) else x


def _broadcast(wholes: Sequence[Whole]) -> Whole:
    shape = np.broadcast_shapes(*(x.shape for x in wholes))
    axes: list[Axes] = [()] * len(shape)
    for x in wholes:
        for i, of_axis in enumerate(x.axes, start=len(shape) - len(x.shape)):
            axes[i] = of_axis or axes[i]
    return Whole(tuple(map(int, shape)), tuple(axes))


class OnParts:
    """A rule over a leaf's part, for `jopt.leaf.step_leaf`."""

    def __init__(self, rule: Rule, whole: Whole, sums: Sums):
        self._rule, self._whole, self._sums = rule, whole, sums

    def elements(self, _: Array) -> int:
        return self._whole.size

    def update(self, c: Any, grad: Array, state: dict[str, Array], param: Array) -> tuple[Array, dict[str, Array]]:
        def part(x: Array, whole: Whole = self._whole) -> Any:
            return Part(x, whole, self._sums)

        c = {name: part(x) if x.ndim else x for name, x in c.items()}  # what is given in the leaf's shape
        states = {name: part(x, slot_whole(self._rule, name, self._whole)) for name, x in state.items()}
        new, states = self._rule.update(c, part(grad), states, part(param))
        return _array(new), {name: _array(x) for name, x in states.items()}


class UpdateOfParts(Update):
    """`Update` of leaves that are parts. It takes the rounds of sums that are known so far before the rest."""

    def __init__(self, spec: Spec, clip: bool, unscale: bool, norms: Norms):
        super().__init__(spec, clip, unscale, norms)
        # Of each round's sums: the leaf, the place among those that it asks for, over which axes, the shape.
        self.rounds: list[list[tuple[int, int, Axes, tuple[int, ...]]]] = []
        jax.eval_shape(self._find_rounds, *self.arguments())

    def _find_rounds(self, *arguments: Any) -> None:
        for i, sums in enumerate(self._run([], *arguments)[1]):
            for j, x in enumerate(sums.asked):
                self.rounds += [[] for _ in range(x.round + 1 - len(self.rounds))]
                self.rounds[x.round].append((i, j, x.axes, x.of.shape))

    def vectors(self, round: int) -> dict[Axes, int]:
        """The sets of axes over which sums of a round are taken, and how many elements each has."""
        sizes: dict[Axes, int] = {}
        for _, _, axes, shape in self.rounds[round]:
            sizes[axes] = sizes.get(axes, 0) + math.prod(shape)
        return sizes

    def partial(self, known: list[Vectors], *arguments: Any) -> Vectors:
        """What this process adds to the sums of the first round that is not known."""
        asked = self._run(known, *arguments)[1]
        found: dict[Axes, list[Array]] = {axes: [] for axes in self.vectors(len(known))}
        for i, j, axes, _ in self.rounds[len(known)]:
            found[axes].append(asked[i].asked[j].of.reshape(-1))
        return [jnp.concatenate(x) for x in found.values()]

    def last(self, buffers: list[Array], known: list[Vectors], *arguments: Any) -> list[Array]:
        """Step, with all sums known."""
        return self._run(known, buffers, *arguments)[0]

    def _known(self, known: list[Vectors]) -> list[dict[int, Array]]:
        """The sums, by leaf and place."""
        found: list[dict[int, Array]] = [{} for _ in self.spec.big]
        for round, vectors in enumerate(known):
            by_axes, ends = dict(zip(self.vectors(round), vectors, strict=True)), dict.fromkeys(self.vectors(round), 0)
            for i, j, axes, shape in self.rounds[round]:
                begin, ends[axes] = ends[axes], ends[axes] + math.prod(shape)
                found[i][j] = by_axes[axes][begin : ends[axes]].reshape(shape)
        return found

    def _run(self, known: list[Vectors], *arguments: Any) -> tuple[list[Array], list[Sums]]:
        """Step, and what sums were asked for on the way."""
        spec, asked, out = self.spec, [Sums(x) for x in self._known(known)], []
        leaves, judged = self.leaves(*arguments)
        for whole, sums, leaf in zip(spec.wholes, asked, leaves, strict=True):
            inputs, average = self.before(*leaf)
            rule: Any = OnParts(spec.rule, whole, sums)
            out += self._after(step_leaf(rule, *inputs), average)
        return out + ([judged["norm"], judged["found_inf"]] if judged else []), asked


@functools.lru_cache(maxsize=256)
def compile_update(spec: Spec, clip: bool, unscale: bool, norms: Norms) -> Summing:
    """As `program.compile_update`, of leaves that are parts."""
    return compile_sums(UpdateOfParts(spec, clip, unscale, norms))


def compile_sums(update: UpdateOfParts) -> Summing:
    """The programs of an update."""
    spec = update.spec
    with host.own_settings():
        buffers, *rest = update.arguments()
        sizes = [update.vectors(i) for i in range(len(update.rounds))]
        vectors = [[spec.array((n,), spec.compute_dtype) for n in of_round.values()] for of_round in sizes]
        partial = [
            compile_on(spec.device, update.partial, vectors[:i], buffers, *rest) for i in range(len(update.rounds))
        ]
        last = compile_on(spec.device, update.last, buffers, vectors, *rest, donate_argnums=0)
    return Summing(spec, partial, last, [list(x) for x in sizes])


@dataclasses.dataclass(frozen=True)
class Summing:
    """A step: programs that give what this process adds to sums, the sums after each, and the program that steps.

    The first programs give no buffer away, so that nothing is lost if a sum raises.

    Attributes:
      axes: for each round those of the mesh over which its vectors are summed.
    """

    spec: Spec
    partial: list[Any]
    last: Any
    axes: list[list[Axes]]
    mesh: Any = None

    def across(self, mesh: Any) -> Summing:
        """Over the processes of a mesh."""
        return dataclasses.replace(self, mesh=mesh)

    def __call__(self, buffers: list[Array], *arguments: Any) -> list[Array]:
        known: list[Vectors] = []
        for program, axes in zip(self.partial, self.axes, strict=True):
            vectors = program(known, buffers, *arguments)
            self.spec.device.after(vectors)
            known.append([self._sum(x, over) for x, over in zip(vectors, axes, strict=True)])
        out = self.last(buffers, known, *arguments)
        self.spec.device.after(out)  # wait: the program reads the sums, which are freed at the return
        return out

    def _sum(self, vector: Array, axes: Axes) -> Array:
        x = self.spec.device.tensor(vector).clone()
        for i in axes:
            dist.all_reduce(x, group=self.mesh.get_group(i))
        return self.spec.device.array(x)
