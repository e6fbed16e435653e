"""Front end 2: many leaves packed into few buffers.

Compiling and dispatching a step over a packed tree does not depend on the number of tensors. The same layout
serves the torch drop-in, which keeps its small tensors in such buffers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes, lax

from jopt import numerics

ROW = 64  # elements: where rows matter, every leaf begins at one, so that a row belongs to one leaf and is aligned
# XLA on CPU divides a long buffer among its threads, and where it does not come out even makes loops that take three to
# six times as long. What `pack` makes that has LONG elements divides by most numbers of threads.
LONG, EVEN = 2**15, 64 * 3 * 5


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each leaf of one type lies in its flat buffer: one after the other, each at a multiple of `row`.

    Behind the last one are `padding` elements that belong to none.
    """

    shapes: tuple[tuple[int, ...], ...]
    row: int = 1
    padding: int = 0

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """How many rows each leaf has."""
        return tuple(-(-size // self.row) for size in self.sizes)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each leaf begins, in elements."""
        return tuple(int(x) * self.row for x in np.cumsum((0, *self.rows))[:-1])

    @property
    def size(self) -> int:
        """The buffer's length in elements."""
        return sum(self.rows) * self.row + self.padding

    def leaf_of_row(self) -> np.ndarray:
        """For each row the index of its leaf, int32."""
        return np.repeat(np.arange(len(self.rows), dtype=np.int32), self.rows)

    def pack(self, leaves: Sequence[Array]) -> Array:
        """One flat buffer, of leaves without gaps between them; the padding is 0."""
        assert self.row == 1
        parts = [leaf.reshape(size) for leaf, size in zip(leaves, self.sizes, strict=True)]
        return jnp.concatenate([*parts, jnp.zeros(self.padding, parts[0].dtype)] if self.padding else parts)

    def unpack(self, buffer: Array) -> list[Array]:
        if self.size > jnp.iinfo(jnp.int32).max:
            ends = [offset + size for offset, size in zip(self.offsets, self.sizes, strict=True)]
            flat = [lax.slice(buffer, (start,), (end,)) for start, end in zip(self.offsets, ends, strict=True)]
        else:
            starts = numerics.positions(self.offsets)
            flat = [lax.dynamic_slice(buffer, (x,), (size,)) for x, size in zip(starts, self.sizes, strict=True)]
        return [x.reshape(shape) for x, shape in zip(flat, self.shapes, strict=True)]

    def split(self, tangent: Array) -> list[Any]:
        """`unpack` of a tangent: compiles longer, but transposes into one concatenation."""
        assert self.row == 1
        if tangent.dtype == dtypes.float0:  # an integer's
            return [np.zeros(shape, dtypes.float0) for shape in self.shapes]
        parts = lax.split(tangent, (*self.sizes, self.padding))
        return [x.reshape(shape) for x, shape in zip(parts, self.shapes, strict=False)]


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A tree's static part: its structure and each buffer's layout."""

    treedef: Any
    layouts: tuple[tuple[str, np.dtype, tuple[int, ...], Layout], ...]  # name, type, the leaves' positions

    def of(self, parts: Iterable[Sequence[Any]]) -> Any:
        """The tree whose leaves these are, buffer by buffer."""
        leaves: list[Any] = [None] * self.treedef.num_leaves
        for part, (_, _, positions, _) in zip(parts, self.layouts, strict=True):
            for i, leaf in zip(positions, part, strict=True):
                leaves[i] = leaf
        return self.treedef.unflatten(leaves)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree of arrays as one flat buffer a type: a pytree whose leaves are the buffers.

    Made by `jopt.pack`, taken apart by `jopt.unpack`. An optimizer takes it as it takes any tree; a rule that
    looks at whole tensors refuses it.
    """

    buffers: tuple[Array, ...]
    tree: _Tree

    def tree_flatten_with_keys(self) -> Any:
        keys = [jax.tree_util.DictKey(name) for name, *_ in self.tree.layouts]
        return tuple(zip(keys, self.buffers, strict=True)), self.tree

    @classmethod
    def tree_unflatten(cls, tree: _Tree, buffers: Any) -> Packed:
        return cls(tuple(buffers), tree)

    def contents(self) -> list[list[tuple[Any, jax.ShapeDtypeStruct]]]:
        """For each buffer the paths and shapes of the leaves in it."""
        whole = self.tree.treedef.unflatten(range(self.tree.treedef.num_leaves))
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(whole)]
        return [
            [(paths[i], jax.ShapeDtypeStruct(shape, dtype)) for i, shape in zip(positions, layout.shapes, strict=True)]
            for _, dtype, positions, layout in self.tree.layouts
        ]


def is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


_VALUE = jax.tree_util.GetAttrKey("value")


def path_name(path: Any) -> str:
    """A leaf's path: keys, indices and attribute names, joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def param_name(path: Any) -> str:
    """A parameter's path as groups and reports call it: without the `value` at the end of a flax nnx variable's."""
    variable = len(path) > 1 and isinstance(path[-2], jax.tree_util.DictKey) and path[-1] == _VALUE
    return path_name(path[:-1] if variable else path)


def pack(tree: Any, *, groups: Any = None) -> Packed:
    """Pack a tree's arrays into one flat buffer a type.

    Compiling a step over the result takes the same time for ten tensors and for a thousand. Gradients with
    respect to it come out packed:

    >>> import jax, jax.numpy as jnp, jopt
    >>> params = jopt.pack({"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})
    >>> loss = lambda packed: (jopt.unpack(packed)["w"] ** 2).sum()
    >>> tx = jopt.adamw(lr=1e-2)
    >>> state = tx.init(params)
    >>> params, state = tx.step(jax.grad(loss)(params), state, params)
    >>> jopt.unpack(params)["w"].shape
    (2, 3)

    Args:
      tree: any pytree of arrays.
      groups: a transformation of `jopt.param_groups`, for whose groups there are buffers apart.

    Returns:
      A `Packed`, a pytree like any other. The optimizer sees one leaf a type: a parameter inside cannot be
      skipped by itself. A long buffer ends in up to 959 zeros, whose gradient is 0.
    """
    with_path, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [jnp.asarray(x) for _, x in with_path]
    kinds = [(0, x.dtype) for x in leaves]
    if groups is not None:
        names = [param_name(path) for path, _ in with_path]
        kinds = [(groups.group_of(name, x), x.dtype) for name, x in zip(names, leaves, strict=True)]
    layouts, buffers = [], []
    for kind in dict.fromkeys(kinds):
        positions = tuple(i for i, x in enumerate(kinds) if x == kind)
        layout = Layout(tuple(leaves[i].shape for i in positions))
        if layout.size >= LONG:
            layout = dataclasses.replace(layout, padding=-layout.size % EVEN)
        group, dtype = kind
        layouts.append((str(dtype) if groups is None else f"{dtype} of group {group}", dtype, positions, layout))
        buffers.append(numerics.laid_out(layout.pack, None, [leaves[i] for i in positions]))
    return Packed(tuple(buffers), _Tree(treedef, tuple(layouts)))


def unpack(packed: Packed) -> Any:
    """The tree that was packed. Its gradient is one concatenation, whatever the number of leaves.

    Slices differentiate into one padded buffer each; hence a rule of its own, in forward and reverse mode.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"packed: expected a jopt.arena.Packed (see jopt.pack), found {type(packed).__name__}")
    return _unpack(packed.tree, packed.buffers)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unpack(tree: _Tree, buffers: tuple[Array, ...]) -> Any:
    return tree.of(layout.unpack(buffer) for buffer, (_, _, _, layout) in zip(buffers, tree.layouts, strict=True))


@_unpack.defjvp
def _(tree: _Tree, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return _unpack(tree, *primals), tree.of(
        layout.split(tangent) for tangent, (_, _, _, layout) in zip(tangents[0], tree.layouts, strict=True)
    )
