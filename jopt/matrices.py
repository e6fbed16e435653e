"""Products of arrays and matrices along an axis."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def product(x: Array, y: Array, axes: Any = 1) -> Array:
    """A product in the full precision of its type, which a TPU has to be asked for."""
    return jnp.tensordot(x, y, axes, precision=lax.Precision.HIGHEST)


def along(x: Array, matrix: Array, axis: int) -> Array:
    """Every vector along an axis of x, times the matrix."""
    return jnp.moveaxis(product(matrix, x, ((1,), (axis,))), 0, axis)


def outer(x: Array, axis: int) -> Array:
    """The products of all pairs of x's slices along an axis."""
    others = [i for i in range(x.ndim) if i != axis]
    return product(x, x, (others, others))
