"""The program of a wrapped optimizer's step, for one group."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import jaxpr_as_fun

from interop.dropin.host import own_settings
from interop.dropin.program import compile_on
from interop.wrapping.elsewhere import value_of
from interop.wrapping.layout import Layout
from jopt.around import chaining
from jopt.loops import calls_back, one_loop
from jopt.transform import Exact


def beginning(tx: optax.GradientTransformation, names: Sequence[str], layout: Layout) -> Any:
    """The program that makes a transformation's first state: of the state's arrays, for good, and the parameters."""

    def begin(_: list[Array], params: list[Array]) -> list[Array]:
        return layout.parted(tx.init(dict(zip(names, params, strict=True))))[0]

    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.device.sharding) for x in layout.arrays]
    params = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.device.sharding) for x in layout.specs]
    closed = jax.make_jaxpr(begin)(arrays, params)
    with own_settings():
        return compile_on(
            layout.device, lambda *x: list(jaxpr_as_fun(closed)(*jax.tree.leaves(x))), arrays, params, donate_argnums=0
        )


class Program:
    """A step, compiled.

    It takes the parameters and the state's arrays, in a list, for good; then the gradients, flat; a vector, which of
    the parameters have one; the hyperparameters; and more arguments of `update`. It returns the new parameters, arrays
    and hyperparameters.

    Args:
      tx: the transformation.
      names: of the parameters.
      layout: of its state.
      all_active: every parameter has a gradient.
      evaluate: the loss and its gradients elsewhere, for a step that has a closure.
      functions: arguments of `update` that are no arrays.
      extra: those that are.

    Attributes:
      run: what was compiled.
      calls_back: Python runs inside of it, which may raise there. So it leaves the arrays alone that it takes.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        names: Sequence[str],
        layout: Layout,
        *,
        all_active: bool,
        evaluate: Callable[[Any], Any] | None,
        functions: dict[str, Any],
        extra: dict[str, Array],
    ):
        self.tx, self.names, self.layout = tx, names, layout
        self.all_active, self.evaluate, self.functions = all_active, evaluate, functions
        device = layout.device
        held = [*layout.specs, *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in layout.arrays)]
        grads = [jax.ShapeDtypeStruct((math.prod(x.shape),), x.dtype) for x in layout.specs]
        numbers = [jax.ShapeDtypeStruct((), leaf.dtype) for leaf in layout.numbers]
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device.sharding),
            (held, grads, jax.ShapeDtypeStruct((len(names),), bool), numbers, extra),
        )
        closed = jax.make_jaxpr(self._update)(*arguments)
        self.calls_back = calls_back(closed.jaxpr)
        flat = one_loop(closed) if device.fuses_outputs and not self.calls_back else jaxpr_as_fun(closed)

        def update(*arguments: Any) -> list[Array]:
            return list(flat(*jax.tree.leaves(arguments)))

        with own_settings():  # jopt's numbers have 64 bits, whatever JAX's setting
            self.run = compile_on(device, update, *arguments, donate_argnums=() if self.calls_back else 0)

    def _update(
        self, held: list[Array], grads: list[Array], active: Array, numbers: list[Array], extra: dict[str, Array]
    ) -> list[Array]:
        n = len(self.names)
        params = dict(zip(self.names, held[:n], strict=True))
        shaped = {name: x.reshape(params[name].shape) for name, x in zip(self.names, grads, strict=True)}
        given = None if self.all_active else dict(zip(self.names, active, strict=True))
        params, state = self._stepped(shaped, given, self.layout.joined(held[n:], numbers), params, extra)
        arrays, numbers = self.layout.parted(state)
        results = [*(params[name] for name in self.names), *arrays]
        keys = [*self.names, *(leaf.key for leaf in self.layout.arrays)]
        owners = [*self.names, *(leaf.owner for leaf in self.layout.arrays)]
        for i, (key, owner, x, old) in enumerate(zip(keys, owners, results, held, strict=True)):
            if (x.shape, x.dtype) != (old.shape, old.dtype):
                raise ValueError(
                    f"tx: expected an update that keeps the shape and type of {key!r}, {old.dtype} of shape "
                    f"{old.shape}, found {x.dtype} of shape {x.shape}"
                )
            if given is not None and owner is not None:
                results[i] = jnp.where(given[owner], x, old)
        return results + numbers

    def _stepped(
        self, grads: Any, active: Any, state: Any, params: dict[str, Array], extra: dict[str, Any]
    ) -> tuple[Any, Any]:
        value = {"value": extra.pop("value")} if "value" in extra else {}
        offered: dict[str, Any] = value
        if self.evaluate is not None:
            # optax's line searches refuse arguments that value_fn does not take, of those too that it has no use for.
            def value_fn(params: Any, grad_fn: Any = None) -> Array:
                return value_of(self.evaluate, params)

            offered = value | {"grad": grads, "value_fn": value_fn, "grad_fn": lambda x, _: jax.grad(value_fn)(x)}
        if isinstance(self.tx, Exact):
            given = offered | self.functions | extra
            return chaining.step(self.tx, grads, state, params, active=active, **given)
        update = optax.with_extra_args_support(self.tx).update
        taken = inspect.signature(update).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            offered = {name: x for name, x in offered.items() if name in taken}
        updates, state = update(grads, state, params, **(offered | self.functions | extra))
        return optax.apply_updates(params, updates), state
