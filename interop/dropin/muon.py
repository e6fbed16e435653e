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
from interop.dropin.exchange import Exchange
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
    """As `program.compile_update`. The bucket's matrices are of one parameter group, and of one shape if not parts."""
    if not spec.wholes and not math.prod(spec.big[0]):
        return compile_plain(spec, clip, unscale, norms)
    rule: Any = _Moved(**vars(spec.rule))
    step = Update(dataclasses.replace(spec, rule=rule), clip, unscale, norms)

    def direct(*arguments: Any) -> Any:
        """The matrices to make orthogonal, or their parts."""
        matrices = []
        for leaf in step.leaves(*arguments)[0]:
            (c, grad, state, param, _, _, factors), _ = step.before(*leaf)
            c, grad, state, _ = in_step_type(c, t.scale(grad, factors), state, param)
            matrices.append(rule.direct(c, grad, state)[0])
        # XLA on CPU would stack them in float32.
        bits = [lax.bitcast_convert_type(x, jnp.uint16) for x in matrices]
        return bits if spec.wholes else jnp.stack(bits)

    adjustments = [rule.adjustment(shape) for shape in ([x.shape for x in spec.wholes] or spec.big)]

    def move(orthogonal: list[Array], *arguments: Any) -> list[Array]:
        given = [{"orthogonal": x, "adjustment": y} for x, y in zip(orthogonal, adjustments, strict=True)]
        return step(*arguments, given=given)

    with host.own_settings():
        arguments = step.arguments()
        orthogonal = [spec.array((math.prod(shape),), jnp.bfloat16) for shape in spec.big]
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

    Attributes:
      exchange: of matrices of which processes have parts.
    """

    spec: Spec
    ns_steps: int
    direct: Any
    move: Any
    exchange: Exchange | None = None

    def across(self, exchange: Exchange) -> Orthogonalizing:
        """Over the processes that have parts."""
        return dataclasses.replace(self, exchange=exchange)

    def __call__(
        self, buffers: list[Array], grads: list[Any], table: Array, leaf_of_row: Array, found: dict[str, Any]
    ) -> list[Array]:
        device = self.spec.device
        c = dict(zip(self.spec.columns, np.asarray(table)[0].tolist(), strict=True))
        arguments = (buffers, grads, table, leaf_of_row, found)
        bits = self.direct(*arguments)
        device.after(bits)
        iterate = functools.partial(orthogonalize, a=c["a"], b=c["b"], c=c["c"], eps=c["eps"], steps=self.ns_steps)
        if self.exchange is not None:
            x = self.exchange([device.tensor(part).view(torch.bfloat16) for part in bits], iterate)
        else:
            x = list(iterate(device.tensor(bits).view(torch.bfloat16).view(-1, *self.spec.big[0])))
        device.begin()  # torch's products have started its threads again
        device.before()
        out = self.move(device.elements(x, DTYPES[torch.bfloat16]), *arguments)
        device.after(out)  # wait: the program reads x, which is freed at the return
        return out
