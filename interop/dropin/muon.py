"""Muon's programs: torch's products between two of XLA's.

XLA on CPU (0.10) runs products of a few hundred rows on one thread, at half the speed of torch's batched ones. And
torch's products add up in the order of torch.optim.Muon's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import Array, lax

from interop.dropin import host
from interop.dropin.orthogonal import orthogonalize
from interop.dropin.program import Norms, Spec, Update, compile_on
from interop.dropin.program import compile_update as compile_plain
from interop.memory.tensors import DTYPES
from jopt import numerics as t
from jopt.leaf import in_step_type
from jopt.optimizers import Muon


class _Moved(Muon):
    """Muon with the result of its iteration given as a coefficient: what is left looks at single elements."""

    scope = "element"

    def update(self, c: Any, grad: Array, state: dict[str, Array], param: Array) -> tuple[Array, dict[str, Array]]:
        _, state = self.direct(c, grad, state)
        return self.move(c, param, c["orthogonal"], c["adjustment"]), state


@functools.lru_cache(maxsize=256)
def compile_update(spec: Spec, clip: bool = False, unscale: bool = False, norms: Norms = ()) -> Any:
    """As `program.compile_update`. The bucket's matrices are of one shape and one parameter group."""
    [shape] = set(spec.big)
    if not math.prod(shape):
        return compile_plain(spec, clip, unscale, norms)
    rule: Any = _Moved(**vars(spec.rule))
    step = Update(dataclasses.replace(spec, rule=rule), clip, unscale, norms)

    def direct(*arguments: Any) -> Array:
        """The matrices to make orthogonal."""
        matrices = []
        for leaf in step.leaves(*arguments)[0]:
            (c, grad, state, param, _, _, factors), _ = step.before(*leaf)
            c, grad, state, _ = in_step_type(c, t.scale(grad, factors), state, param)
            matrices.append(rule.direct(c, grad, state)[0])
        # XLA on CPU would stack them in float32.
        return jnp.stack([lax.bitcast_convert_type(x, jnp.uint16) for x in matrices])

    def move(orthogonal: list[Array], *arguments: Any) -> list[Array]:
        given = [{"orthogonal": x, "adjustment": rule.adjustment(shape)} for x in orthogonal]
        return step(*arguments, given=given)

    with host.own_settings():
        arguments = step.arguments()
        orthogonal = [spec.array((math.prod(shape),), jnp.bfloat16) for _ in spec.big]
        return Orthogonalizing(
            spec,
            rule.ns_steps,
            compile_on(spec.device, direct, *arguments),
            compile_on(spec.device, move, orthogonal, *arguments, donate_argnums=1),
        )


@dataclasses.dataclass(frozen=True)
class Orthogonalizing:
    """A step: a program, torch's products, and a program.

    The first program gives no buffer away, so that nothing is lost if the products raise: the second averages again.
    """

    spec: Spec
    ns_steps: int
    direct: Any
    move: Any

    def __call__(
        self, buffers: list[Array], grads: list[Any], table: Array, leaf_of_row: Array, found: dict[str, Any]
    ) -> list[Array]:
        device = self.spec.device
        c = dict(zip(self.spec.columns, np.asarray(table)[0].tolist(), strict=True))
        arguments = (buffers, grads, table, leaf_of_row, found)
        bits = self.direct(*arguments)
        device.after(bits)
        x = device.tensor(bits).view(torch.bfloat16).view(-1, *self.spec.big[0])
        x = orthogonalize(x, c["a"], c["b"], c["c"], c["eps"], self.ns_steps)
        device.begin()  # torch's products have started its threads again
        device.before()
        out = self.move(device.elements(list(x), DTYPES[x.dtype]), *arguments)
        device.after(out)  # wait: the program reads x, which is freed at the return
        return out
