"""A step in a form of which XLA on CPU makes one loop a parameter, where it fuses outputs at all.

XLA gives a subexpression that two outputs share a loop and an array of its own: Lion's momentum and the parameter it
moves are two loops, clipped AdamW's moments wait for the clipped gradient in memory. So each output is computed from
its own copy of what goes into it: then they share nothing. Fusion removes the copies; without `jopt.fusion.FLAG` they
are made, which is slow.

A sum of what takes roots or quotients is no loop that XLA vectorizes, once the terms are computed in it. So `one_loop`
computes a few terms at a time, in a loop of their own that stays in cache, and adds those up.

`separately` does so with a function of one parameter that is elementwise, as rules are; `one_loop` with a step of any
transformation, of which it finds the parts that are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from jopt._compat import bind, own_inputs

ELEMENTWISE = frozenset(
    """abs add and cbrt ceil clamp complex conj convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt imag
    integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow real rem round rsqrt select_n sign sin
    sqrt square sub tanh xor""".split()  # noqa: SIM905
)
INLINED = {"jit": "jaxpr", "pjit": "jaxpr"} | dict.fromkeys(
    ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"
)
"""Equations that stand for those of another jaxpr, and where that is."""
COSTLY = frozenset(
    """cbrt cos div erf exp exp2 expm1 log log1p logistic pow rem rsqrt sin sqrt tanh""".split()  # noqa: SIM905
)
FEW = 4096  # terms at a time


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A value: an input, a literal, or what an equation gives.

    Attributes:
      shape: its shape; () for one that is not an array.
      eqn, inputs: what gives it, of what.
      outputs: all that the equation gives.
      turn: where the equation stands in the order of all.
      is_literal: whether it stands in an equation as a number.
    """

    shape: tuple[int, ...]
    eqn: JaxprEqn | None = None
    inputs: Sequence[Node] = ()
    outputs: Sequence[Node] = ()
    turn: int = -1
    is_literal: bool = False

    @property
    def is_total(self) -> bool:
        """Whether it is the sum of all elements of an array."""
        return self.eqn is not None and self.eqn.primitive.name == "reduce_sum" and self.shape == ()

    @property
    def is_elementwise(self) -> bool:
        """Whether each of its elements, and there are several, is of the elements in the same place, and of numbers."""
        if self.eqn is None or self.shape in ((), (1,)):
            return False
        name = self.eqn.primitive.name
        if name == "broadcast_in_dim":
            return self.inputs[0].shape == ()
        return name in ELEMENTWISE and all(x.shape in ((), self.shape) for x in self.inputs)


def calls_back(jaxpr: Any) -> bool:
    """Whether Python runs inside of a program, which may raise there."""
    return any(
        bool(eqn.effects) or "callback" in eqn.primitive.name or any(map(calls_back, _inner(eqn))) for eqn in jaxpr.eqns
    )


def _inner(eqn: JaxprEqn) -> Iterator[Any]:
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield x


def separately(f: Callable[..., Sequence[Array]], n: int, *inputs: Any) -> list[Array]:
    """`f(*inputs)`, n arrays, each computed from its own copy of the inputs.

    On other platforms than CPU there are no copies, and XLA merges the n computations again.
    """

    def repeat(inputs: Any) -> tuple[Any, ...]:
        return (inputs,) * n

    graph = Graph(jax.make_jaxpr(f)(*inputs))
    copies = lax.platform_dependent(inputs, cpu=lambda x: own_inputs(x, n), default=repeat)
    found = []
    for output, copy in zip(graph.outputs, copies, strict=True):
        values = graph.known | dict(zip(graph.inputs, jax.tree.leaves(copy), strict=True))
        _evaluate(_needed([output], graph.nodes), values)
        found.append(values[output])
    return found


def one_loop(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The jaxpr as a function of its inputs, computing each elementwise output from its own copy of its sources.

    What is not elementwise (norms, products of matrices, random numbers) and what are single numbers (counts, learning
    rates) is computed once, for all.
    """

    def run(*arrays: Any) -> list[Any]:
        graph = Graph(closed)
        outputs, values = graph.outputs, graph.known | dict(zip(graph.inputs, arrays, strict=True))
        families = [Family(cones) for cones in _families(outputs) if len(cones) > 1]
        apart = {cone.output for family in families for cone in family.cones}
        wanted = {x for x in outputs if x not in apart}.union(*(family.operands for family in families))
        _evaluate(_needed(wanted, graph.nodes), values)
        alike: dict[Any, Callable[..., Any]] = {}  # traced once
        for family in families:
            f = alike.setdefault(family.structure(values), jax.jit(functools.partial(family.compute, values)))
            results = f(*([values[x] for x in part] for part in (family.sources, family.numbers)))
            values |= zip([cone.output for cone in family.cones], results, strict=True)
        return [values[x] for x in outputs]

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class Cone:
    """What an output is of: the elementwise nodes, in order, and the arrays of its shape that they begin with."""

    output: Node
    nodes: list[Node]
    sources: list[Node]

    @property
    def is_worth_parts(self) -> bool:
        """Whether its sum is quicker by a few terms at a time, on CPU."""
        costly = any(x.eqn.primitive.name in COSTLY for x in self.nodes)  # type: ignore[union-attr]
        return costly and bool(self.sources) and math.prod(self.output.shape) >= 2 * FEW

    def total(self, values: Mapping[Node, Any]) -> Array:
        """The sum of the output over all its elements."""
        inner = {*self.nodes, *self.sources}
        numbers = {y: values[y] for x in self.nodes for y in x.inputs if y not in inner}

        def terms(sources: Sequence[Array]) -> Array:
            own = numbers | dict(zip(self.sources, sources, strict=True))
            for node in self.nodes:
                operands = [own[x] for x in node.inputs]
                if node.eqn.primitive.name == "broadcast_in_dim":  # type: ignore[union-attr]
                    own[node] = jnp.broadcast_to(operands[0], sources[0].shape)
                else:
                    own[node] = bind(node.eqn, operands)[0]
            return own[self.output]

        def in_parts(sources: Sequence[Array]) -> Array:
            sources = [x.reshape(-1) for x in sources]
            parts, rest = divmod(sources[0].size, FEW)

            def add(i: Array, total: Array) -> Array:
                few = terms([lax.dynamic_slice(x, (i * FEW,), (FEW,)) for x in sources])
                return total + jnp.sum(lax.optimization_barrier(few))

            dtype = self.output.eqn.outvars[0].aval.dtype  # type: ignore[union-attr]
            total = jnp.sum(terms([x[parts * FEW :] for x in sources])) if rest else jnp.zeros((), dtype)
            return lax.fori_loop(0, parts, add, total)

        def at_once(sources: Sequence[Array]) -> Array:
            return jnp.sum(terms(sources))

        return lax.platform_dependent([values[x] for x in self.sources], cpu=in_parts, default=at_once)


class Family:
    """Outputs of one shape that read an array in common, directly or through others.

    Attributes:
      cones: of the outputs.
      sources: the arrays that they begin with.
      numbers: what else goes into them; literals are none.
    """

    def __init__(self, cones: list[Cone]):
        self.cones = cones
        self.sources = list(dict.fromkeys(x for cone in cones for x in cone.sources))
        inner = {x for cone in cones for x in cone.nodes}.union(self.sources)
        operands = dict.fromkeys(x for cone in cones for node in cone.nodes for x in node.inputs)
        self.numbers = [x for x in operands if x not in inner and not x.is_literal]

    @property
    def operands(self) -> list[Node]:
        return self.sources + self.numbers

    def structure(self, values: Mapping[Node, Any]) -> Any:
        """Equal for families that compute the same of operands of the same shapes and types."""
        index = {x: i for i, x in enumerate(self.operands)}
        avals = tuple(jax.typeof(values[x]) for x in self.operands)
        found = []
        for cone in self.cones:
            index |= {x: -i for i, x in enumerate(cone.nodes, 1)}
            for x in cone.nodes:
                of = tuple(repr(values[y]) if y.is_literal else index[y] for y in x.inputs)
                found.append((x.eqn.primitive, str(x.eqn.params), of))  # type: ignore[union-attr]
            found.append(index[cone.output])
        return avals, tuple(found)

    def compute(self, values: Mapping[Node, Any], sources: list[Any], numbers: list[Any]) -> list[Any]:
        """The outputs, of the values of its operands; of `values` it takes the literals."""
        results = []
        for cone, copy in zip(self.cones, own_inputs(sources, len(self.cones)), strict=True):
            own = dict(zip(self.operands, [*copy, *numbers], strict=True))
            own |= {y: values[y] for x in cone.nodes for y in x.inputs if y.is_literal}
            _evaluate(cone.nodes, own)
            results.append(own[cone.output])
        return results


class Graph:
    """A jaxpr's values.

    Attributes:
      inputs, outputs: its own.
      nodes: of each equation the first of its results, in order.
      known: the values of constants and literals.
    """

    def __init__(self, closed: ClosedJaxpr):
        self.known: dict[Node, Any] = {}
        self.nodes: list[Node] = []
        self.inputs = [Node(getattr(x.aval, "shape", ())) for x in closed.jaxpr.invars]
        self.outputs = self._walk(closed, self.inputs)

    def _walk(self, closed: ClosedJaxpr, inputs: Sequence[Node]) -> list[Node]:
        """Add the nodes of a jaxpr's equations, those of the jaxprs that it calls included; returns its outputs."""
        jaxpr = closed.jaxpr
        constants = [Node(getattr(x, "shape", ())) for x in closed.consts]
        self.known.update(zip(constants, closed.consts, strict=True))
        found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

        def node(x: Any) -> Node:
            if not isinstance(x, Literal):
                return found[x]
            literal = Node(getattr(x.aval, "shape", ()), is_literal=True)
            self.known[literal] = np.asarray(x.val, getattr(x.aval, "dtype", None))
            return literal

        for eqn in jaxpr.eqns:
            operands = [node(x) for x in eqn.invars]
            if (where := INLINED.get(eqn.primitive.name)) in eqn.params:
                results = self._walk(eqn.params[where], operands)
            else:
                turn = len(self.nodes)
                results = [Node(getattr(x.aval, "shape", ()), eqn, operands, (), turn) for x in eqn.outvars]
                for x in results:
                    x.outputs = results
                self.nodes.append(results[0] if results else Node((), eqn, operands, (), turn))
            found.update(zip(eqn.outvars, results, strict=True))
        return [node(x) for x in jaxpr.outvars]


def _evaluate(nodes: Iterable[Node], values: dict[Node, Any]) -> None:
    for node in nodes:
        if node.is_total and (cone := _cone(node.inputs[0])).is_worth_parts:
            values[node] = cone.total(values)
            continue
        values.update(zip(node.outputs, bind(node.eqn, [values[x] for x in node.inputs]), strict=True))


def _cone(output: Node) -> Cone:
    nodes: dict[Node, None] = {}
    sources: dict[Node, None] = {}
    waiting = [output]
    while waiting:
        node = waiting.pop()
        if node.shape != output.shape or node in nodes or node in sources:
            continue
        (nodes if node.is_elementwise else sources)[node] = None
        waiting.extend(node.inputs if node.is_elementwise else ())
    return Cone(output, sorted(nodes, key=lambda node: node.turn), list(sources))


def _families(outputs: Iterable[Node]) -> list[list[Cone]]:
    families: dict[int, list[Cone]] = {}
    family_of: dict[Node, int] = {}
    for i, output in enumerate(dict.fromkeys(x for x in outputs if x.is_elementwise)):
        cone = _cone(output)
        joined = {family_of[x] for x in cone.sources if x in family_of}
        families[i] = [x for number in sorted(joined) for x in families.pop(number)] + [cone]
        family_of |= {x: i for member in families[i] for x in member.sources}
    return list(families.values())


def _needed(wanted: Iterable[Node], nodes: list[Node]) -> list[Node]:
    """The nodes whose equations give what is wanted, and those that have effects, in order."""
    needed = {x.turn for x in wanted}
    found = []
    for node in reversed(nodes):
        assert node.eqn is not None
        if node.turn in needed or node.eqn.effects:
            needed |= {x.turn for x in node.inputs}
            found.append(node)
    return found[::-1]
