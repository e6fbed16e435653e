"""Optimizer state over the devices of a mesh: the first stage of ZeRO, and beside parameters that are sharded (FSDP).

XLA does the work, from shardings alone. Sources: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models"; Xu et al. 2020, "Automatic Cross-Replica Sharding of Weight Update in Data-Parallel
Training".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

from jopt import numerics
from jopt.around import chaining
from jopt.around.chaining import Chain
from jopt.around.groups import Groups
from jopt.rule import Batched
from jopt.transform import P, Transform, check_array, check_params

Tree = Any

IN_PIECES = {"tpu"}  # the platforms on which large parameters are gathered in pieces
PIECE = 2**24  # bytes of such a piece


def shard_state(
    tx: optax.GradientTransformation,
    params: Tree,
    mesh: Mesh,
    axis: str | tuple[str, ...] | None = "data",
    *,
    min_size: int = 1024,
) -> Sharded:
    """`tx` with its state divided among the devices along a mesh axis, each of which steps its part.

    Parameters that are replicated stay so (ZeRO's first stage): each device steps its part, and the parts are gathered.
    Parameters that are sharded stay where they are (FSDP, tensor parallelism), and their state lies beside them.

    >>> import jax, jax.numpy as jnp, jopt
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> mesh = Mesh(jax.devices(), ("data",))
    >>> params = jax.device_put({"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}, NamedSharding(mesh, P()))
    >>> tx = jopt.shard_state(jopt.adamw(lr=1e-3), params, mesh, "data")
    >>> state = tx.init(params)
    >>> state.slots["exp_avg"]["kernel"].sharding.spec == P("data", None)
    True
    >>> step = jax.jit(tx.step, donate_argnums=(1, 2))
    >>> params, state = step({"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}, state, params)

    Where each array lies:

    - A parameter's state is divided along the largest dimension that the axis' size divides (the first of equals),
      beside what the parameter's own sharding divides. One that is sharded along the axis already, that has fewer than
      `min_size` elements, or that the size divides nowhere, keeps the parameter's sharding.
    - Of state of another shape (Adafactor's `row_var`, `col_var`) the dimensions that are the parameter's are divided.
    - Counts, hyperparameters and whatever else is no parameter's are replicated. A parameter without state of its own
      (frozen, or of plain SGD) is stepped where it lies.

    Gradients are taken as they come: those of a batch that is sharded along the axis are reduced to each device's part.

    Args:
      tx: any transformation: jopt's optimizers, `jopt.chain`, `jopt.param_groups`, optax's.
      params: the parameters, or `jax.ShapeDtypeStruct`s of them. Their shardings are looked at: those of this mesh are
        kept; what is on one device is taken as replicated.
      mesh: a `jax.sharding.Mesh`, with explicit or automatic axes; also of devices that are not there, to compile for.
      axis: the name of the mesh's axis, or several; None: state lies as its parameters do.
      min_size: the least number of elements of a parameter whose state is divided.

    Returns:
      A `Sharded`: `init` gives the sharded state and `step` keeps it so, in a jitted function or alone; `shardings` has
      the state's; `shard(tree)` lays out an average of the parameters, or accumulated gradients, like it.

    The steps' numbers are those of `tx`: bit for bit, how XLA vectorizes an array's end aside, where elements are
    independent, and for Muon, whose matrices go to one device each and back. Norms (clipping, Adafactor, MARS), Muon's
    matrices of more than 2^28 elements and the gradients' own sum over devices add in another order.

    Raises:
      TypeError: a mesh, axis or parameter that is none.
      ValueError: an axis that the mesh has not, or that divides no parameter; devices of several platforms; parameters
        on other devices or in a sharding that names no axes. At `init`, devices that this process does not see. At
        `step`, a state or parameters of other devices, structure or shapes.
    """
    axes = _axes(mesh, axis)
    layout = _Layout(tx, params, mesh, axes, min_size)
    if axes and layout.spread == layout.own and not any(_divided(axes, spec) for spec in layout.own):
        sizes = sorted(layout.shapes.items(), key=lambda item: -math.prod(item[1]))
        raise ValueError(
            f"axis: {', '.join(map(repr, axes))} of size {_size(mesh, axes)} divides no dimension of a parameter of at "
            f"least {min_size} elements (min_size), so that all state would be replicated; the largest are "
            + ", ".join(f"params{path} {shape}" for path, shape in sizes[:3])
        )
    return Sharded(tx, layout)


class Sharded(chaining.Around[Any]):
    """What `jopt.shard_state` makes: an optax transformation with an exact `step`, whose state lies on a mesh.

    Attributes:
      shardings: the state's, a tree of `NamedSharding`s like it: what a checkpoint is restored to.
      param_shardings: those in which the parameters come and go.
    """

    shardings: Tree
    param_shardings: Tree
    _layout: _Layout
    _run: Callable[..., Any]

    def __new__(cls, tx: optax.GradientTransformation, layout: _Layout) -> Self:
        update_of = optax.with_extra_args_support(tx).update

        def run(grads: Tree, state: Any, params: Tree, arguments: Mapping[str, Any], exact: bool) -> Any:
            def step(grads: Tree, state: Any, params: Tree, arguments: Mapping[str, Any]) -> Any:
                args = layout.constrained(grads, layout.grads), state, layout.constrained(params, layout.work)
                if not exact:
                    return update_of(*args, **arguments)
                new, state = chaining.step(tx, *args, **arguments)
                return layout.gathered(new, params), state

            return layout.on_mesh(step, (self.param_shardings, self.shardings), grads, state, params, arguments)

        def init(params: Tree) -> Any:
            layout.check_params(params)
            if not any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
                layout.check_present()
            return initialize(params)

        def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
            layout.check_step(updates, state, params)
            return self._run(updates, state, params, extra, False)

        self = super().__new__(cls, init, update)  # type: ignore[arg-type]
        self._tx, self._layout, self._arguments = tx, layout, (tx, layout)
        self.param_shardings, self.shardings = layout.named(layout.own), layout.named(layout.state)
        initialize = jax.jit(lambda p: layout.on_mesh(tx.init, self.shardings, p), out_shardings=self.shardings)
        self._run = jax.jit(run, static_argnums=4, out_shardings=(self.param_shardings, self.shardings))
        return self

    def step(
        self,
        grads: Tree,
        state: Any,
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
        **extra: Any,
    ) -> tuple[P, Any]:
        """One step: as `Transform.step`. The parameters come back in their own sharding, the state in its.

        Raises:
          ValueError: gradients, parameters or a state of other structure or shapes than `shard_state` was given;
            parameters or a state on other devices.
        """
        self._layout.check_step(grads, state, params)
        return self._run(grads, state, params, dict(extra, active=active, factors=tuple(factors), skip=skip), True)

    def shard(self, tree: Tree) -> Tree:
        """A tree like the parameters, laid out as state is: an average of them, accumulated gradients.

        Raises:
          ValueError: a tree of other devices, structure or shapes.
        """
        layout = self._layout
        layout.check_params(tree, "tree")
        shardings = layout.named(layout.spread)
        return jax.jit(lambda x: layout.on_mesh(lambda x: x, shardings, x), out_shardings=shardings)(tree)


class _Layout:
    """Where everything lies: a `PartitionSpec` for each leaf of the parameters and of the state.

    `own` is the parameters', `spread` their own divided further, as their state is; `grads` and `work` are those in
    which gradients and parameters enter the step.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Tree, mesh: Mesh, axes: tuple[str, ...], small: int):
        self.mesh = mesh
        leaves, self.treedef = tree_flatten_with_path(params)
        for path, x in leaves:
            check_array(f"params{keystr(path)}", x)
        self.shapes = {keystr(path): np.shape(x) for path, x in leaves}
        self.own = [_own_spec(f"params{keystr(path)}", x, mesh) for path, x in leaves]
        self.spread = [
            _spread(np.shape(x), spec, mesh, axes, small) for (_, x), spec in zip(leaves, self.own, strict=True)
        ]
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), params)
        state, self.state_treedef = tree_flatten_with_path(jax.eval_shape(tx.init, like))
        self.state_shapes = {keystr(path): x.shape for path, x in state}
        known = {path: (np.shape(x), spec) for (path, x), spec in zip(leaves, self.spread, strict=True)}
        shapes = {path: shape for path, (shape, _) in known.items()}
        owners = [chaining.owner(path, x.shape, shapes) for path, x in state]
        self.state = [
            _state_spec(x.shape, *known.get(owner, ((), ()))) for (_, x), owner in zip(state, owners, strict=True)
        ]
        # A parameter without divided state (frozen, or of plain SGD) is stepped where it lies: nothing to gather then.
        holders = {owner for owner, spec in zip(owners, self.state, strict=True) if _divided(axes, spec)}
        holds = [path in holders for path, _ in leaves]
        whole = _stepped_whole(tx, params)
        choices = list(zip(self.own, self.spread, holds, whole, strict=True))
        self.grads = [spread if held else own for own, spread, held, _ in choices]
        self.work = [spread if held and not w else own for own, spread, held, w in choices]

    def named(self, specs: Sequence[PartitionSpec]) -> Tree:
        """These specs as shardings of the mesh, in the tree that they are of."""
        treedef = self.state_treedef if specs is self.state else self.treedef
        return treedef.unflatten([NamedSharding(self.mesh, spec) for spec in specs])

    def constrained(self, tree: Tree, specs: Sequence[PartitionSpec]) -> Tree:
        """A tree like the parameters, in the trace of a step, its arrays laid out so."""
        leaves = [
            x if x is None or numerics.is_sparse(x) else numerics.constrain(x, spec)
            for x, spec in zip(self.treedef.flatten_up_to(tree), specs, strict=True)
        ]
        return self.treedef.unflatten(leaves)

    def on_mesh(self, f: Callable[..., Any], shardings: Tree, *args: Any) -> Any:
        """`f(*args)`, whose results lie in these shardings; inside, XLA chooses, on explicit axes too."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            if AxisType.Explicit in self.mesh.axis_types:
                f = jax.sharding.auto_axes(f, out_sharding=jax.tree.map(lambda s: s.spec, shardings))
            return jax.tree.map(lambda x, s: numerics.constrain(x, s.spec), f(*args), shardings)

    def gathered(self, new: Tree, old: Tree) -> Tree:
        """The stepped parameters. On a TPU large ones that were divided for the step are gathered in `old`'s memory.

        XLA for TPUs would gather them into memory of their own, and copy from there.
        """
        if self.mesh.devices.flat[0].platform not in IN_PIECES:
            return new
        leaves = [
            _in_pieces(x, whole, work, own, self.mesh) if work != own and x.ndim > 1 and x.nbytes >= 2 * PIECE else x
            for x, whole, work, own in zip(
                self.treedef.flatten_up_to(new), self.treedef.flatten_up_to(old), self.work, self.own, strict=True
            )
        ]
        return self.treedef.unflatten(leaves)

    # --- what is refused

    def check_present(self) -> None:
        platform = self.mesh.devices.flat[0].platform
        try:
            present = set(jax.devices(platform))
        except RuntimeError:
            present = set()
        missing = [d for d in self.mesh.devices.flat if d not in present]
        if missing:
            raise ValueError(
                f"mesh: {missing[0]} of its {self.mesh.size} devices is none that this process sees "
                f"({len(present)} of platform {platform!r}); such a mesh is to compile for, by jax.jit(...).lower"
            )

    def check_params(self, tree: Tree | None, name: str = "params") -> None:
        check_params(tree)
        self._check(name, tree, self.treedef, self.shapes)

    def check_step(self, grads: Tree, state: Any, params: Tree | None) -> None:
        self.check_params(params)
        self._check("state", state, self.state_treedef, self.state_shapes)
        try:
            leaves = self.treedef.flatten_up_to(grads)
        except ValueError as error:
            raise ValueError(f"grads: expected the structure of params, {self.treedef}; {error}") from None
        for (path, shape), x in zip(self.shapes.items(), leaves, strict=True):
            if x is not None and np.shape(x) != shape:
                raise ValueError(f"grads{path}: expected the parameter's shape {shape}, found {np.shape(x)}")

    def _check(self, name: str, tree: Any, treedef: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        leaves, found = tree_flatten_with_path(tree)
        if found != treedef:
            raise ValueError(f"{name}: expected the structure {treedef} of shard_state's parameters, found {found}")
        for path, x in leaves:
            at = f"{name}{keystr(path)}"
            if np.shape(x) != shapes[keystr(path)]:
                raise ValueError(f"{at}: expected shape {shapes[keystr(path)]}, found {np.shape(x)}")
            if isinstance(x, Array) and not isinstance(x, Tracer):
                _check_place(at, x, self.mesh)


def _in_pieces(part: Array, whole: Array, spread: PartitionSpec, own: PartitionSpec, mesh: Mesh) -> Array:
    """`part`, divided as `spread` says, gathered to how `own` says, piece after piece, in the memory of `whole`."""
    axis = next(i for i, (a, b) in enumerate(zip(spread, own, strict=True)) if a != b)
    names = _names(spread[axis])[len(_names(own[axis])) :]
    n = _size(mesh, names)
    if n == 1:
        return part

    def fill(part: Array, whole: Array) -> Array:
        # Pieces are of rows. A device's rows lie apart where the first dimension is the one that was divided.
        along = 1 if axis == 0 else 0
        if axis == 0:
            part, filled = part[None], whole.reshape(n, *part.shape)
        else:
            filled = whole
        rows = part.shape[along]
        some = min(rows, max(8, PIECE * rows // whole.nbytes // 8 * 8))  # whole tiles of a TPU

        def piece(i: Array, filled: Array) -> Array:
            # The last may begin before the end of the one before it, and writes the same there.
            start = jnp.minimum(i * some, rows - some)
            x = jax.lax.dynamic_slice_in_dim(part, start, some, along)
            x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
            return jax.lax.dynamic_update_slice_in_dim(filled, x, start, along)

        return jax.lax.fori_loop(0, -(-rows // some), piece, filled).reshape(whole.shape)

    return jax.shard_map(fill, in_specs=(spread, own), out_specs=own, check_vma=False)(part, whole)


def _axes(mesh: Any, axis: Any) -> tuple[str, ...]:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, found {type(mesh).__name__}")
    platforms = sorted({d.platform for d in mesh.devices.flat})
    if len(platforms) > 1:
        raise ValueError(f"mesh: expected devices of one platform, found {', '.join(platforms)}")
    axes = () if axis is None else (axis,) if isinstance(axis, str) else axis
    if not isinstance(axes, tuple) or not all(isinstance(x, str) for x in axes):
        raise TypeError(f"axis: expected a name, a tuple of names or None, found {axis!r}")
    for name in axes:
        if name not in mesh.shape or axes.count(name) > 1:
            sizes = ", ".join(f"{k!r} of size {v}" for k, v in mesh.shape.items())
            raise ValueError(
                f"axis: expected different axes of the mesh, which has {sizes}; found {name!r} in {axis!r}"
            )
    return axes


def _check_place(name: str, x: Any, mesh: Mesh) -> None:
    """Raise ValueError for an array, or what describes one, on other devices, unless JAX may move it."""
    sharding = getattr(x, "sharding", None)
    if sharding is None or not getattr(x, "committed", True):
        return
    devices = getattr(sharding, "device_set", None)
    if devices is not None and devices != set(mesh.devices.flat):
        where = ", ".join(map(str, sorted(devices, key=lambda d: d.id)[:4])) + (", ..." if len(devices) > 4 else "")
        raise ValueError(
            f"{name}: expected it on the {mesh.size} devices of the mesh {dict(mesh.shape)}, found shape {np.shape(x)} "
            f"on {len(devices)} ({where}); move it: jax.device_put(tree, shardings), with param_shardings or shardings "
            "of what shard_state returns, or jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())"
        )


def _own_spec(name: str, x: Any, mesh: Mesh) -> PartitionSpec:
    """How a parameter lies on the mesh: a spec with an entry for each dimension."""
    _check_place(name, x, mesh)
    sharding = getattr(x, "sharding", None)
    ndim = len(np.shape(x))
    if isinstance(sharding, NamedSharding):
        if dict(sharding.mesh.shape) != dict(mesh.shape) and not sharding.is_fully_replicated:
            raise ValueError(
                f"{name}: expected a sharding over the mesh {dict(mesh.shape)}, found one over "
                f"{dict(sharding.mesh.shape)} for shape {np.shape(x)}; move it: jax.device_put"
            )
        if not sharding.is_fully_replicated:
            return PartitionSpec(*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    elif sharding is not None and len(sharding.device_set) > 1 and not sharding.is_fully_replicated:
        raise ValueError(f"{name}: expected a jax.sharding.NamedSharding of the mesh, found {sharding}")
    return PartitionSpec(*[None] * ndim)


def _names(entry: Any) -> tuple[str, ...]:
    """The axes that an entry of a spec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _size(mesh: Mesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _divided(axes: tuple[str, ...], spec: PartitionSpec) -> bool:
    return any(name in axes for entry in spec for name in _names(entry))


def _spread(shape: tuple[int, ...], own: PartitionSpec, mesh: Mesh, axes: tuple[str, ...], least: int) -> PartitionSpec:
    """The parameter's own spec, with its largest dimension that can be divided by the axes divided by them."""
    if not axes or _divided(axes, own) or math.prod(shape) < least:
        return own
    parts = [n // _size(mesh, _names(entry)) for n, entry in zip(shape, own, strict=True)]
    able = [i for i, n in enumerate(parts) if n and n % _size(mesh, axes) == 0]
    if not able:
        return own
    chosen = max(able, key=lambda i: parts[i])  # the first of equals
    names = (*_names(own[chosen]), *axes)
    entries: list[Any] = list(own)
    entries[chosen] = names[0] if len(names) == 1 else names
    return PartitionSpec(*entries)


def _state_spec(shape: tuple[int, ...], of: tuple[int, ...], spec: Any) -> PartitionSpec:
    """The entries of a parameter's spec for those dimensions that state has of it."""
    return PartitionSpec(*[entry if n == m else None for n, m, entry in zip(shape, of, spec, strict=False)])


def _stepped_whole(tx: Any, params: Tree) -> list[bool]:
    """Which parameters are stepped where they lie: those whose step gathers something smaller than they are.

    Muon moves its update, in bfloat16; SparseAdam its rows.
    """
    n = len(jax.tree.leaves(params))
    if isinstance(tx, Transform):
        return [isinstance(tx.rule, Batched) or tx.rule.scope == "rows"] * n
    if isinstance(tx, Chain):
        return _stepped_whole(tx.transforms[-1], params)
    if isinstance(tx, Groups):
        by_group = [_stepped_whole(group, params) for group in tx.transforms]
        return [by_group[label][i] for i, label in enumerate(tx.labels(params))]
    inner = getattr(tx, "_tx", None)  # skip_nonfinite, monitor
    return [False] * n if inner is None else _stepped_whole(inner, params)
