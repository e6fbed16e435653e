"""The compiled programs of a bucket. They know its shapes, types and rule, and no optimizer by name.

`compile_update` steps the leaves in place: one loop a buffer, each array read and written once. `compile_norms` reads
the gradients once before it, where the step clips them by their norm or unscales them. What that finds enters the
update as arrays, and the host looks at neither.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from interop.dropin.coefficients import columns
from interop.dropin.host import own_settings
from interop.dropin.leaf import EMA
from interop.dropin.slots import shape_of_slot, slot_shapes
from interop.dropin.whole import Whole
from interop.memory import Buffer, Device, Table
from jopt import numerics as t
from jopt.around.clip import clip_factor, total_norm
from jopt.leaf import leaf_sums, leaf_terms, step_leaf, step_leaves
from jopt.loops import separately
from jopt.quantized import holds_codes
from jopt.rule import Rule, Summed

Norms = tuple[tuple[int, np.dtype], ...]  # for each bucket how many norms it contributes, and their type


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the programs of a bucket depend on.

    Attributes:
      device: where they run.
      rule: what is stepped.
      dtypes: the types of `param` and of each slot, in the order of a leaf's buffers.
      big: the shapes of the leaves with buffers of their own; (size,) where the rule does not ask for it.
      n_small, rows: how many leaves share buffers, and those buffers' rows of `device.row` elements.

    Buffers have these shapes from the first: what a program reshapes it does not write in place, but copies.

      wholes: where the rule looks at whole tensors, and leaves are parts of some, these.
    """

    device: Device
    rule: Rule
    dtypes: tuple[tuple[str, np.dtype], ...]
    big: tuple[tuple[int, ...], ...]
    n_small: int
    rows: int
    wholes: tuple[Whole, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.dtypes]

    @property
    def dtype(self) -> np.dtype:
        """The parameters' type."""
        return self.dtypes[0][1]

    @property
    def compute_dtype(self) -> np.dtype:
        return t.widest(dtype for _, dtype in self.dtypes if dtype != np.uint8)  # codes are no numbers

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a leaf's coefficients: the rule's, the parameter's weight in its average, whether it steps."""
        return columns(self.rule, self.names)

    def buffer_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of a leaf's buffers, in their order."""
        slots = slot_shapes(self.rule, shape)
        return [shape_of_slot(slots, name, shape) for name in self.names]

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array that a program takes."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.device.sharding)

    def gradients(self) -> list[jax.ShapeDtypeStruct]:
        shapes = [(math.prod(shape),) for shape in self.big] + [(self.rows, self.device.row)] * bool(self.n_small)
        return [self.array(shape, self.dtype) for shape in shapes]


class Programs(NamedTuple):
    """For each bucket the programs that measure its gradients and that sum, if the step does, and that step."""

    measures: list[Any]
    sums: list[Any]
    updates: list[Any]


_made: set[Spec] = set()


def is_made(spec: Spec) -> bool:
    """Whether the program that steps a bucket, and no more, was compiled in this process."""
    return spec in _made


@functools.lru_cache(maxsize=256)
def compile_update(spec: Spec, clip: bool = False, unscale: bool = False, norms: Norms = ()) -> Any:
    """The program that steps a bucket, for any optimizer with one like it: an `Update`, compiled."""
    update = Update(spec, clip, unscale, norms)
    with own_settings():
        compiled = compile_on(spec.device, update, *update.arguments(), donate_argnums=0)
    _made.add(spec)
    return compiled


class Update:
    """Steps a bucket: the function that is compiled.

    It takes the buffers, which it returns, leaf by leaf, `param` and the slots in the order of `dtypes`, those of the
    small leaves last; the gradients likewise; the table of coefficients, a row a leaf (`columns`); the leaf of each row
    of the small buffers; and, as a dictionary, what the `compile_norms` of each bucket found, `max_norm` and
    `inverse_scale`. Behind the buffers it returns the norm of all gradients, and whether one was not finite.

    Args:
      spec: the leaves.
      clip: scale the gradients so that the norm of all is at most `max_norm`.
      unscale: multiply them by `inverse_scale` before that, and keep what is optimized where one is not finite.
      norms: with `clip` or `unscale`, what each of the optimizer's buckets contributes.
    """

    def __init__(self, spec: Spec, clip: bool, unscale: bool, norms: Norms):
        self.spec, self.clip, self.unscale, self.norms = spec, clip, unscale, norms
        self.columns = spec.columns + (("factor", "inverse_scale", "found_inf") if norms else ())
        self.separates = spec.device.fuses_outputs
        self.__name__ = "update"

    def arguments(self) -> tuple[Any, ...]:
        """What it takes, in shapes and types."""
        spec = self.spec
        sizes = [spec.buffer_shapes(shape) for shape in spec.big]
        sizes += [[(spec.rows, spec.device.row)] * len(spec.names)] * bool(spec.n_small)
        found: dict[str, Any] = {}
        if self.norms:
            found["norms"] = [spec.array((n,), dtype) for n, dtype in self.norms]
            found["overflows"] = [spec.array((), bool) for _ in self.norms]
            found["max_norm"] = found["inverse_scale"] = spec.array((), spec.compute_dtype)
        return (
            [spec.array(s, dtype) for leaf in sizes for s, (_, dtype) in zip(leaf, spec.dtypes, strict=True)],
            spec.gradients(),
            spec.array((len(spec.big) + spec.n_small, len(spec.columns)), spec.compute_dtype),
            spec.array((spec.rows,), np.int32),
            found,
        )

    def __call__(self, *arguments: Any) -> list[Array]:
        leaves, judged = self.leaves(*arguments)
        step = self._step_tensors if self.spec.rule.scope == "tensor" else self._step_elements
        return step(leaves) + ([judged["norm"], judged["found_inf"]] if judged else [])

    def leaves(
        self,
        buffers: list[Array],
        grads: list[Array],
        table: Array,
        leaf_of_row: Array,
        found: dict[str, Any],
        given: Sequence[dict[str, Any]] = (),
    ) -> tuple[list[Any], dict[str, Array]]:
        """The arguments of `before` for each leaf, the small ones as one; and what `_judge` says of all gradients.

        `given`: for each leaf coefficients that are not in the table.
        """
        spec, judged = self.spec, {}
        if self.norms:
            # In each leaf's row, not shared: XLA merges leaves of one size that share a number into one slow loop.
            judged = _judge(found)
            values = jnp.stack([judged[name].astype(table.dtype) for name in self.columns[len(spec.columns) :]])
            table = jnp.concatenate([table, jnp.broadcast_to(values, (table.shape[0], len(values)))], axis=1)
        split, n = len(spec.big), len(spec.names)
        rows = [table[i] for i in range(split)]
        if spec.n_small:
            rows.append(table[split:][leaf_of_row][:, None])
        own = [buffers[i : i + n] for i in range(0, len(buffers), n)]
        grads = [x.reshape(leaf[0].shape) for x, leaf in zip(grads, own, strict=True)]
        beside = [
            {name: x.reshape(leaf[0].shape) if jnp.ndim(x) else x for name, x in of_leaf.items()}
            for of_leaf, leaf in zip(given or [{}] * len(own), own, strict=True)
        ]
        return list(zip(own, grads, rows, beside, strict=True)), judged

    def before(self, buffers: Sequence[Array], grad: Array, row: Array, given: dict[str, Array]) -> Any:
        """The arguments of `step_leaf` after the rule; and the leaf's average, with the parameter's weight in it."""
        c = {name: row[..., j] for j, name in enumerate(self.columns)} | given
        active, factors = c.pop("active") != 0, []
        if self.unscale:
            factors.append(c.pop("inverse_scale"))
            active = active & (c.pop("found_inf") == 0)
        if self.clip:
            factors.append(c.pop("factor"))
        state = dict(zip(self.spec.names[1:], buffers[1:], strict=True))
        average = (state.pop(EMA), c.pop(EMA)) if EMA in state else None
        return (c, grad, state, buffers[0], active, None, factors), average

    def _after(self, result: tuple[Array, dict[str, Array]], average: tuple[Array, Array] | None) -> list[Array]:
        param, state = result
        if average is not None:
            state = state | {EMA: t.lerp(average[0], param, average[1])}
        return [param, *(state[name] for name in self.spec.names[1:])]

    def _step_one(self, *leaf: Any) -> list[Array]:
        inputs, average = self.before(*leaf)
        return self._after(step_leaf(self.spec.rule, *inputs), average)

    def _step_elements(self, leaves: list[Any]) -> list[Array]:
        separate = self.separates and not holds_codes(self.spec.names)
        # Under jit, leaves of one size are traced once.
        one = functools.partial(separately, self._step_one, len(self.spec.names)) if separate else self._step_one
        step = jax.jit(one)
        return [x for leaf in leaves for x in step(*leaf)]

    def _step_tensors(self, leaves: list[Any]) -> list[Array]:
        if not leaves:  # as where each is another process's
            return []
        inputs, averages = zip(*(self.before(*leaf) for leaf in leaves), strict=True)
        results = zip(step_leaves(self.spec.rule, inputs, separate=self.separates), averages, strict=True)
        return [x for result, average in results for x in self._after(result, average)]


@functools.lru_cache(maxsize=256)
def compile_sums(spec: Spec, clip: bool, unscale: bool, norms: Norms) -> Any:
    """The program that computes what each leaf adds to the sums that its rule asks for: a row a sum, a column a leaf.

    It takes what an `Update` takes, and gives none of it away; and for each of the small leaves where in their buffer
    its elements end, 0 if they do not count.
    """
    update, rule = Update(spec, clip, unscale, norms), spec.rule
    assert isinstance(rule, Summed)

    def sums(ends: Array, *arguments: Any) -> Array:
        found = []
        for i, leaf in enumerate(update.leaves(*arguments)[0]):
            inputs, _ = update.before(*leaf)
            if i < len(spec.big):
                of_leaf = leaf_sums(rule, *inputs)
                found.append(jnp.stack([of_leaf[name][None] for name in rule.sums]))
            else:  # of those that are not active nothing is before the end
                terms = leaf_terms(rule, *inputs)
                inside = [_inside(spec, terms[name], arguments[3], ends) for name in rule.sums]
                found.append(jnp.stack([_of_leaves(spec, x, arguments[3]) for x in inside]))
        return jnp.concatenate([x.astype(spec.compute_dtype) for x in found], axis=1)

    with own_settings():
        return compile_on(spec.device, sums, spec.array((spec.n_small,), np.int32), *update.arguments())


def _inside(spec: Spec, x: Array, leaf_of_row: Array, ends: Array) -> Array:
    """Of the small leaves' buffer what lies before each one's end; 0 elsewhere."""
    row, column = (lax.broadcasted_iota(np.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(row * spec.device.row + column < ends[leaf_of_row][:, None], x, jnp.zeros_like(x))


def _of_leaves(spec: Spec, x: Array, leaf_of_row: Array) -> Array:
    """The sum over each small leaf's rows of their buffer."""
    return jax.ops.segment_sum(jnp.sum(x, axis=1), leaf_of_row, spec.n_small, indices_are_sorted=True)


def _judge(found: dict[str, Any]) -> dict[str, Array]:
    """The norm of all gradients and torch's factor for it, as `torch.nn.utils.clip_grad_norm_` computes them."""
    norm = total_norm(found["norms"])
    return {
        "norm": norm,
        "factor": clip_factor(norm, found["max_norm"]),
        "found_inf": functools.reduce(jnp.logical_or, found["overflows"]),
        "inverse_scale": found["inverse_scale"],
    }


@functools.lru_cache(maxsize=256)
def compile_norms(spec: Spec, unscale: bool) -> Any:
    """The program that reads a bucket's gradients: the norm of each, and whether one is not finite.

    It takes the gradients, as `Update` does; the leaf of each row of the small ones; for each of these leaves where in
    their buffer its elements end, 0 if they do not count; and `inverse_scale`. Without `unscale` it looks for nothing
    that is not finite.
    """
    compute = t.compute_dtype(spec.dtype)

    def norms(grads: list[Array], leaf_of_row: Array, ends: Array, inverse_scale: Array) -> tuple[Array, Array]:
        def squares(grad: Array) -> Array:
            grad = grad.astype(compute)
            return grad * grad

        sums = [jnp.sum(squares(grad))[None] for grad in grads[: len(spec.big)]]
        if spec.n_small:
            grads = [*grads[:-1], _inside(spec, grads[-1], leaf_of_row, ends)]
            sums.append(_of_leaves(spec, squares(grads[-1]), leaf_of_row))
        norms = jnp.sqrt(jnp.concatenate(sums))
        overflow = jnp.zeros((), bool)
        if unscale:
            # The norm of the products is the product, rounding aside. Squares can overflow where no gradient does: only
            # then each is looked at.
            norms = norms * inverse_scale
            overflow = lax.cond(
                jnp.isfinite(norms).all(),
                lambda _: overflow,
                lambda grads: ~functools.reduce(jnp.logical_and, [jnp.isfinite(jnp.sum(x - x)) for x in grads]),
                grads,
            )
        return t.cast(norms, jnp.zeros((), spec.dtype)), overflow

    with own_settings():
        rows, ends = (spec.array((n,), np.int32) for n in (spec.rows, spec.n_small))
        return compile_on(spec.device, norms, spec.gradients(), rows, ends, spec.array((), compute))


def compile_on(device: Device, f: Any, *arguments: Any, **options: Any) -> Any:
    """A function compiled for a device, inside `own_settings`.

    It takes what it does not read too: JAX gives a donated array to the next result of its shape and type, which is the
    one of its own place only if none is left out. And behind all it takes what orders it.
    """

    @functools.wraps(f, updated=())
    def ordered(*arguments: Any) -> Any:
        return f(*arguments[:-1])

    lowered = jax.jit(ordered, keep_unused=True, **options).lower(*arguments, device.along)
    with device.compiling():
        return Program(device, lowered.compile())


class Program:
    """What was compiled for a device.

    A call is a launch: it sees what torch has written before, and tables as they are.

    Attributes:
      compiled: as JAX gives it.
    """

    __slots__ = ("_device", "compiled")

    def __init__(self, device: Device, compiled: Any):
        self._device, self.compiled = device, compiled

    def __call__(self, *arguments: Any) -> Any:
        given = [x.array() if isinstance(x, Table) else x for x in arguments]
        return self.compiled(*given, self._device.before())


def launch(device: Device, program: Any, buffers: Sequence[Buffer], *arguments: Any) -> list[Any]:
    """Start a program over the buffers, inside `host.settings`; `device.after` the results before leaving them.

    It returns the buffers, and after them what this returns. They are donated, so that an exception between the
    call and the taking of its results would lose the memory that torch sees.
    """
    try:
        try:
            out = program([buffer.array for buffer in buffers], *arguments)
        except RuntimeError as error:
            device.recover(buffers)
            if not device.make_room(error):
                raise
            out = program([buffer.array for buffer in buffers], *arguments)
        device.replace(buffers, out[: len(buffers)])
    except BaseException:
        device.recover(buffers)
        raise
    return out
