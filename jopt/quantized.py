"""State in eight bits: codes of a dynamic map, and for each block of elements the largest absolute value.

The format is bitsandbytes' (functional.py, `create_dynamic_map`; Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization"): 256 values between -1 and 1, or 0 and 1 for what is never negative, in each of seven powers of ten twice
as many as in the one below. A leaf's slot `exp_avg` is then `exp_avg_int8`, codes of the leaf's shape, and
`exp_avg_absmax`, a float32 for each 256 of its elements in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jopt import numerics

BLOCK = 256  # elements that share a largest value
SMALLEST = 4096  # elements: the state of smaller leaves stays in float32, as bitsandbytes' does
CODES, ABSMAX = "_int8", "_absmax"  # the ends of the names
INT8, BFLOAT16 = np.dtype(np.int8), jnp.dtype(jnp.bfloat16)
NARROW = (INT8, BFLOAT16)  # what state may be narrower than its parameter in
PIECE = 2**18  # elements that CPU steps at once: what is computed of them stays in a cache until it is encoded


# --- the map


@functools.cache
def magnitudes(signed: bool) -> np.ndarray:
    """The values from 0 to 1, ascending, in float32: all 256, or those of the upper half of the signed map."""
    found = [0.0]
    for decade in range(7):
        n = 2**decade if signed else 2 ** (decade + 1)
        found += [10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / n) for i in range(n)]
    return np.array([*found, 1.0], np.float32)


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The value of each of the 256 codes. That of -1 is not among them."""
    upper = magnitudes(signed)
    return np.concatenate([-upper[-2:0:-1], upper]) if signed else upper


# A float32's upper 16 bits tell its place among sorted numbers but for one of these, to be compared by the lower bits:
# there is at most one such number for each upper half. So finding a place is to read one table, of 12 kB.
_LOWEST = (127 - 24) << 7  # the upper half of 2^-24, below which every value is nearest to 0


@functools.cache
def _places(signed: bool, *, below: bool) -> np.ndarray:
    """For each upper half of a number in [2^-24, 1]: the index of its magnitude, and from which lower half the next.

    Args:
      signed: the map.
      below: of the magnitudes the next one below; else the nearest, of two the lower.
    """
    values = magnitudes(signed).astype(np.float64)
    # At its limit a number still belongs to the lower index.
    limits = values[1:] if below else (values[1:] + values[:-1]) / 2
    limits = limits.astype(np.float32).view(np.uint32).astype(np.int64)
    starts = (np.arange(24 * 128 + 1, dtype=np.int64) + _LOWEST) << 16
    index = np.searchsorted(limits, starts, side="left")
    last = np.append(limits, 2**32)[index] - starts  # the largest lower half that still has this index
    return (index << 16 | np.clip(last, 0, 0xFFFF)).astype(np.int32)


def _place(x: Array, signed: bool, *, below: bool) -> Array:
    """The index of a magnitude for each float32; of nan the last."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    upper = jnp.clip((bits >> 16) - _LOWEST, 0, 24 * 128)
    entry = _entries(_places(signed, below=below), upper)
    return (entry >> 16) + ((bits & 0xFFFF) > (entry & 0xFFFF)).astype(jnp.int32)


def _entries(table: np.ndarray, index: Array) -> Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


# --- arrays


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def decode(codes: Array, absmax: Array, signed: bool) -> Array:
    """The numbers, in float32."""
    return _entries(dynamic_map(signed), codes) * _spread(absmax, codes.shape)


def encode(x: Array, signed: bool, key: Array | None = None) -> tuple[Array, Array]:
    """The codes of real numbers, and the largest absolute value of each block.

    A block with a number that is nan or infinite has no finite one when decoded. What is never negative becomes 0 only
    if it is 0: rules divide by its root, and of bitsandbytes' and torchao's zeros a step of 1 / eps times the momentum
    comes.

    Args:
      signed: whether a number may be negative.
      key: choose between the values above and below a number at random, so that the mean is the number; else the
        nearest, of two the one nearer to 0.
    """
    x = jnp.asarray(x, jnp.float32)
    absmax = _largest(x)
    scaled = x * _spread(jnp.where(absmax == 0, 0, 1 / absmax), x.shape)
    index = _place(scaled, signed, below=key is not None)
    if key is not None:
        values = magnitudes(signed)
        low, high = (_entries(values, jnp.minimum(index + i, len(values) - 1)) for i in (0, 1))
        part = jax.random.uniform(key, x.shape, jnp.float32) * (high - low)
        index += (part < jnp.abs(scaled) - low).astype(jnp.int32)
    if signed:
        index = jnp.where(scaled < 0, 127 - jnp.minimum(index, 127), 127 + index)
    else:
        index = jnp.maximum(index, (x > 0).astype(jnp.int32))
    return index.astype(jnp.uint8), absmax


def _largest(x: Array) -> Array:
    x = jnp.abs(x.reshape(-1))
    return jnp.max(jnp.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK), axis=1)


def _spread(absmax: Array, shape: tuple[int, ...]) -> Array:
    """For each element its block's."""
    n = int(np.prod(shape))
    return jnp.broadcast_to(absmax[:, None], (absmax.size, BLOCK)).reshape(-1)[:n].reshape(shape)


# --- a leaf's state


def holds_codes(state: Iterable[str]) -> bool:
    return any(name.endswith(CODES) for name in state)


def narrowed(state: Mapping[str, Array], signs: Mapping[str, bool], dtype: np.dtype) -> dict[str, Array]:
    """A leaf's state in a narrow type: of the slots in `signs` (`Rule.signs`) their codes, or they in bfloat16."""
    found: dict[str, Array] = {}
    for name, x in state.items():
        if name not in signs:
            found[name] = x
        elif dtype == BFLOAT16:
            found[name] = x.astype(dtype)
        elif x.size < SMALLEST:
            found[name] = x
        else:
            found[name + CODES], found[name + ABSMAX] = encode(x, signs[name])
    return found


def widened(state: Mapping[str, Array], signs: Mapping[str, bool]) -> dict[str, Array]:
    """A leaf's state with the numbers that its codes stand for."""
    found: dict[str, Array] = {}
    for name, x in state.items():
        if name.endswith(CODES):
            slot = name.removesuffix(CODES)
            found[slot] = decode(x, state[slot + ABSMAX], signs[slot])
        elif not name.endswith(ABSMAX):
            found[name] = x
    return found


def encoded_like(
    old: Mapping[str, Array], state: Mapping[str, Array], signs: Mapping[str, bool], key: Array | None
) -> dict[str, Array]:
    """A leaf's new state, as `widened` gives it, in the form of its old one."""
    found: dict[str, Array] = {}
    for i, name in enumerate(old):
        if name.endswith(CODES):
            slot = name.removesuffix(CODES)
            own = None if key is None else jax.random.fold_in(key, i)
            found[name], found[slot + ABSMAX] = encode(state[slot], signs[slot], own)
        elif not name.endswith(ABSMAX):
            found[name] = state[name]
    return {name: found[name] for name in old}


Step = Callable[[Array, dict[str, Array], Array, Array | None], tuple[Array, dict[str, Array]]]


def in_pieces(step: Step, grad: Array, state: dict[str, Array], param: Array, key: Array | None) -> tuple[Array, dict]:
    """`step(grad, state, param, key)` of a leaf, elementwise but for the blocks: on CPU piece by piece, in place.

    XLA would write the new state, which codes are made of, to memory and read it again.
    """
    n = param.size
    if n <= PIECE or numerics.on_mesh():
        return step(grad, state, param, key)
    size = _piece(n)

    def pieces(grad: Array, state: dict[str, Array], param: Array, key: Array | None) -> tuple[Array, dict]:
        arrays = {"": param} | state
        flat = {name: x.reshape(-1) for name, x in arrays.items()}
        grad = grad.reshape(-1)

        def one(i: Array | int, flat: dict[str, Array], size: int) -> dict[str, Array]:
            def part(name: str, x: Array) -> tuple[Array | int, int]:
                of_blocks = name.endswith(ABSMAX)
                return (i * (first // BLOCK), blocks(size)) if of_blocks else (i * first, size)

            cut = {name: lax.dynamic_slice_in_dim(x, *part(name, x)) for name, x in flat.items()}
            g = lax.dynamic_slice_in_dim(grad, i * first, size)
            new, new_state = step(g, cut, cut.pop(""), None if key is None else jax.random.fold_in(key, i))
            found = {"": new} | new_state
            return {
                name: lax.dynamic_update_slice_in_dim(x, found[name], part(name, x)[0], 0) for name, x in flat.items()
            }

        first = size
        flat = lax.fori_loop(0, n // size, lambda i, x: one(i, x, size), flat)
        if n % size:
            flat = one(n // size, flat, n % size)
        found = {name: x.reshape(arrays[name].shape) for name, x in flat.items()}
        return found.pop(""), found

    return lax.platform_dependent(grad, state, param, key, cpu=pieces, default=step)


def _piece(n: int) -> int:
    """How many of n elements CPU steps at once: as many each time, if blocks allow it."""
    few = -(-n // PIECE)
    even = (n // k for k in range(few, 2 * few) if n % (k * BLOCK) == 0)
    return next(even, PIECE)
