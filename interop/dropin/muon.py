"""Muon's programs: torch's products between two of XLA's.

XLA on CPU (0.10) runs products of a few hundred rows on one thread, at half the speed of torch's batched ones. And
torch's products add up in the order of torch.optim.Muon's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import torch
from jax import Array, lax

from interop.dropin import host
from interop.dropin.exchange import Exchange
from interop.dropin.orthogonal import orthogonalize
from interop.dropin.parts import Summing, UpdateOfParts, compile_sums
from interop.dropin.program import Norms, Spec, Update, compile_on
from interop.dropin.program import compile_update as compile_plain
from interop.memory import Table
from interop.memory.tensors import DTYPES
from jopt import numerics as t
from jopt.leaf import in_step_type
from jopt.optimizers.muon import Orthogonal


@dataclasses.dataclass(frozen=True)
class _Moved:
    """A rule with the result of its iteration given as a coefficient: what is left is its last part."""

    rule: Orthogonal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    @property
    def scope(self) -> str:
        return self.rule.moves

    def update(self, c: Any, grad: Array, state: dict[str, Array], param: Array) -> tuple[Array, dict[str, Array]]:
        return self.rule.move(c, param, c["orthogonal"], self.rule.direct(c, grad, state)[1])


class _Update(Update):
    """The step of what is left. It takes the results of the iteration behind the rest, flat."""

    def arguments(self) -> tuple[Any, ...]:
        flat = [self.spec.array((math.prod(shape),), jnp.bfloat16) for shape in self.spec.big]
        return (*super().arguments(), flat)

    def leaves(
        self,
        buffers: list[Array],
        grads: list[Array],
        table: Array,
        leaf_of_row: Array,
        found: dict[str, Any],
        given: Sequence[Any] = (),
    ) -> tuple[list[Any], dict[str, Array]]:
        rule: Any = self.spec.rule
        shapes = [x.shape for x in self.spec.wholes] or self.spec.big
        given = [
            {"orthogonal": x, "adjustment": rule.adjustment(shape)} for x, shape in zip(given, shapes, strict=True)
        ]
        return super().leaves(buffers, grads, table, leaf_of_row, found, given)


class _UpdateOfParts(_Update, UpdateOfParts):
    """The same, of leaves that are parts."""


@functools.lru_cache(maxsize=256)
def compile_update(spec: Spec, clip: bool = False, unscale: bool = False, norms: Norms = ()) -> Any:
    """As `program.compile_update`. The bucket's matrices are of one parameter group, and of one shape if not parts."""
    if not spec.wholes and not math.prod(spec.big[0]):
        return compile_plain(spec, clip, unscale, norms)
    rule: Any = _Moved(spec.rule)  # type: ignore[arg-type]
    before = Update(spec, clip, unscale, norms)
    after = dataclasses.replace(spec, rule=rule), clip, unscale, norms

    def direct(*arguments: Any) -> Any:
        """The matrices to make orthogonal, or their parts."""
        matrices = []
        for leaf in before.leaves(*arguments)[0]:
            (c, grad, state, param, _, _, factors), _ = before.before(*leaf)
            c, grad, state, _ = in_step_type(c, t.scale(grad, factors), state, param)
            matrices.append(rule.direct(c, grad, state)[0])
        # XLA on CPU would stack them in float32.
        bits = [lax.bitcast_convert_type(x, jnp.uint16) for x in matrices]
        return bits if spec.wholes else jnp.stack(bits)

    with host.own_settings():
        if spec.wholes and rule.moves == "tensor":
            move = compile_sums(_UpdateOfParts(*after))
        else:
            move = _Update(*after)
            move = compile_on(spec.device, move, *move.arguments(), donate_argnums=0)
        return Orthogonalizing(spec, compile_on(spec.device, direct, *before.arguments()), move)


@dataclasses.dataclass(frozen=True)
class Orthogonalizing:
    """A step: a program, torch's products, and a program.

    The first program gives no buffer away, so that nothing is lost if the products raise: the second averages again.

    Attributes:
      exchange: of matrices of which processes have parts.
    """

    spec: Spec
    direct: Any
    move: Any
    exchange: Exchange | None = None

    def across(self, exchange: Exchange) -> Orthogonalizing:
        """Over the processes that have parts."""
        move = self.move.across(exchange.mesh) if isinstance(self.move, Summing) else self.move
        return dataclasses.replace(self, move=move, exchange=exchange)

    def __call__(
        self, buffers: list[Array], grads: list[Any], table: Table, leaf_of_row: Array, found: dict[str, Any]
    ) -> list[Array]:
        device = self.spec.device
        c = dict(zip(self.spec.columns, table.rows[0].tolist(), strict=True))
        arguments = (buffers, grads, table, leaf_of_row, found)
        bits = self.direct(*arguments)
        device.after(bits)
        numbers = {name: c[name] for name in ("a", "b", "c", "eps")}
        rule: Any = self.spec.rule
        iterate = functools.partial(orthogonalize, **numbers, steps=rule.ns_steps, fused=rule.fused)
        if self.exchange is not None:
            x = self.exchange([device.tensor(part).view(torch.bfloat16).view(-1) for part in bits], iterate)
        else:
            x = list(iterate(device.tensor(bits).view(torch.bfloat16).view(-1, *self.spec.big[0])))
        device.begin()  # torch's products have started its threads again
        given = device.elements(x, DTYPES[torch.bfloat16])
        out = self.move(*arguments, given)
        device.after(out)  # wait: the program reads what is freed at the return
        return out
