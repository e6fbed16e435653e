"""torch's arithmetic in JAX: scalars in double, tensor operations that round where torch rounds.

torch computes an optimizer's coefficients (bias corrections, effective learning rates) in Python's
float64 and its tensor operations in the tensor's type; in bfloat16 and float16 every operation computes
in float32 and rounds its result. `in_double` is the one place that evaluates scalars in float64 whatever
`jax_enable_x64` says; the operations below are the only arithmetic that the rules use.

Source of the operations: torch 2.13, aten/src/ATen/native/cpu/{BinaryOps,PointwiseOps,Lerp}Kernel.cpp.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jopt._compat import enable_x64, manual_axes, trace_state_clean, undivided, vary, varying

LOW_PRECISION = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def compute_dtype(dtype: Any) -> np.dtype:
    """The real type in which torch computes an operation on `dtype`: float32 for bfloat16 and float16."""
    dtype = jnp.dtype(dtype)
    if dtype in LOW_PRECISION:
        return jnp.dtype(jnp.float32)
    return jnp.finfo(dtype).dtype  # complex64 -> float32, complex128 -> float64


def widest(dtypes: Iterable[Any]) -> np.dtype:
    """The real type that all of these compute in: float64 only where one needs it, float32 for none."""
    return max(map(compute_dtype, dtypes), key=lambda d: d.itemsize, default=np.dtype(np.float32))


# --- scalars -----------------------------------------------------------------------------------------


def in_double(f: Callable[..., Any], elementwise: Any, scalars: Any = (), *, dtype: Any) -> Any:
    """Evaluate `f(elementwise, scalars)` in float64 and return its leaves as `dtype`.

    Works eagerly and inside jit, vmap, scan, grad and export, with `jax_enable_x64` on or off. Floating
    leaves of both arguments reach `f` as float64, integer ones as int64 (so that `count / 1000` is
    float64 too). `f` may close over tracers; a Python number that should stay exact is closed over as well,
    since as an argument JAX would round it.

    Outside the scope a float64 value is illegal while x64 is off, and differentiation re-evaluates the
    operations of `f` there. So the derivative is taken inside, entry by entry, and crosses the border as
    numbers: `f` must act on `elementwise` elementwise (outputs have its shape or are 0-d), on `scalars`
    and on what it closes over in any way.
    """
    dtype = jnp.dtype(dtype)
    leaves, treedef = jax.tree.flatten((elementwise, scalars))
    n_elementwise = len(jax.tree.leaves(elementwise))
    leaves = [jnp.asarray(x) for x in leaves]
    if trace_state_clean():  # nothing is differentiated: what is below would leave its traces in JAX's caches
        with enable_x64(True), jax.numpy_dtype_promotion("standard"):
            out = f(*jax.tree.unflatten(treedef, list(map(_widen, leaves))))
            return jax.tree.map(
                lambda y: lax.convert_element_type(lax.convert_element_type(y, jnp.float64), dtype), out
            )
    out_tree = None

    def flat(*leaves: Any) -> tuple[Any, ...]:
        nonlocal out_tree
        out, out_tree = jax.tree.flatten(f(*jax.tree.unflatten(treedef, leaves)))
        return tuple(lax.convert_element_type(y, jnp.float64) for y in out)

    with enable_x64(True), jax.numpy_dtype_promotion("standard"):
        closed, consts = jax.closure_convert(flat, *map(_widen, leaves))
    # What is differentiated may be a Python number, which jax 0.7 hands on as such.
    consts = [lax.convert_element_type(x, jnp.result_type(x)) for x in consts]
    out = _evaluate(closed, n_elementwise, dtype, *leaves, *consts)
    return jax.tree.unflatten(out_tree, out)


def _widen(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return lax.convert_element_type(x, jnp.float64)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return lax.convert_element_type(x, jnp.int64)
    return x


def _evaluate(f: Callable[..., Any], n_elementwise: int, dtype: np.dtype, *args: Any) -> tuple[Array, ...]:
    """f(*args) in the double scope; differentiable to any order (the derivative is such a call again)."""

    def narrowed(*args: Any) -> tuple[Array, ...]:
        return tuple(lax.convert_element_type(y, dtype) for y in f(*map(_widen, args)))

    @jax.custom_jvp
    def call(*args: Any) -> tuple[Array, ...]:
        with enable_x64(True), jax.numpy_dtype_promotion("standard"):
            return undivided(narrowed)(*args)

    def jvp(primals: Any, tangents: Any) -> Any:
        out = call(*primals)
        terms: list[list[Array]] = [[] for _ in out]
        for i, tangent in enumerate(tangents):
            # Of these JAX itself sees that no output changes with them.
            if isinstance(tangent, SymbolicZero) or not jnp.issubdtype(tangent.dtype, jnp.floating):
                continue
            partials = _evaluate(_partial(f, i, i < n_elementwise), n_elementwise, dtype, *primals)
            tangent = lax.convert_element_type(tangent, dtype)
            for j in _dependents(f, i, primals):
                if i >= n_elementwise and jnp.ndim(tangent):
                    terms[j].append(jnp.tensordot(partials[j], tangent, jnp.ndim(tangent)))
                else:
                    terms[j].append(partials[j] * tangent)
        # Not zeros of numbers: those would be multiplied by what is infinite, as a root's derivative at 0.
        zeros = [SymbolicZero(jax.typeof(y)) for y in out]
        return out, tuple(sum(x[1:], x[0]) if x else zero for x, zero in zip(terms, zeros, strict=True))

    call.defjvp(jvp, symbolic_zeros=True)
    return call(*args)


def _dependents(f: Callable[..., Any], i: int, args: Sequence[Any]) -> list[int]:
    """The outputs of f in which argument i appears."""
    from jax.extend.core import Literal  # slow to import

    with enable_x64(True), jax.numpy_dtype_promotion("standard"):
        jaxpr = jax.make_jaxpr(lambda *args: f(*map(_widen, args)))(*args).jaxpr
    changing = {jaxpr.invars[i]}
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in changing for x in equation.invars):
            changing.update(equation.outvars)
    return [j for j, x in enumerate(jaxpr.outvars) if not isinstance(x, Literal) and x in changing]


def _partial(f: Callable[..., Any], i: int, elementwise: bool) -> Callable[..., Any]:
    """The derivative of f's outputs in argument i, as a function of all arguments."""

    def partial(*args: Any) -> Any:
        def of(x: Any) -> Any:
            return f(*args[:i], x, *args[i + 1 :])

        if elementwise or jnp.ndim(args[i]) == 0:
            return jax.jvp(of, (args[i],), (jnp.ones_like(args[i]),))[1]
        return jax.jacfwd(of)(args[i])

    return partial


def as_float32(x: Array) -> Array:
    """Round a float64 scalar to float32's values.

    Not by reduce_precision, which XLA on TPU has not for float64. The barrier keeps the conversions from being dropped.
    """
    rounded = lax.optimization_barrier(lax.convert_element_type(x, jnp.float32))
    return lax.convert_element_type(rounded, jnp.float64)


def is_sparse(x: Any) -> bool:
    """Whether it is a BCOO. One has imported its module; nothing here does, for that takes longer than all of jopt."""
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(x, module.BCOO)


# --- torch's tensor operations -----------------------------------------------------------------------
# Each takes arrays of one type and 0-d (or broadcastable) scalars of that type's compute type, computes
# in the compute type and rounds the result once. XLA may keep the excess precision of a bfloat16 value
# that is converted and converted back; reduce_precision is the rounding it must not drop.


class Foreign(ABC):
    """An operand that is no array of JAX, on which the operations below do something else: `operate`."""

    @abstractmethod
    def operate(self, name: str, *args: Any, **options: Any) -> Any:
        """What the operation of this name gives for these arguments, of which this is one.

        Python's operators have names of their own: "neg" and those below.
        """

    def __neg__(self) -> Any:
        return self.operate("neg", self)

    def __mul__(self, other: Any) -> Any:
        return self.operate("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.operate("*", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self.operate("/", self, other)

    def __eq__(self, other: object) -> Any:
        return self.operate("==", self, other)

    def __ne__(self, other: object) -> Any:
        return self.operate("!=", self, other)

    def __lt__(self, other: Any) -> Any:
        return self.operate("<", self, other)

    def __gt__(self, other: Any) -> Any:
        return self.operate(">", self, other)

    __hash__ = object.__hash__


def operation(f: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of the rules: of JAX's arrays, or of what a `Foreign` operand says."""

    @functools.wraps(f)
    def call(*args: Any, **options: Any) -> Any:
        for x in args:
            if isinstance(x, Foreign):
                return x.operate(f.__name__, *args, **options)
        return f(*args, **options)

    return call


def _round(x: Array, dtype: np.dtype) -> Array:
    if dtype in LOW_PRECISION and x.dtype != dtype:
        info = jnp.finfo(dtype)
        rounded = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
        if dtype == jnp.float16:
            # reduce_precision flushes subnormals, which torch keeps and second moments reach. Beside 0.75 a float32
            # has the spacing of float16's subnormals, so that adding it rounds to them.
            rounded = jnp.where(jnp.abs(x) < float(info.tiny), (x + 0.75) - 0.75, rounded)
        x = rounded
    return x.astype(dtype)


def round_at_random(key: Array, x: Array) -> Array:
    """float32 as bfloat16, up or down with probabilities that make the mean x. What is not finite stays."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _up(*arrays: Array) -> list[Array]:
    return [a.astype(compute_dtype(a.dtype)) for a in arrays]


@operation
def add(x: Array, y: Array, alpha: Array | None = None) -> Array:
    """torch.add: x + alpha * y (alpha 1 if absent); y an array, or a scalar of the compute type.

    In bfloat16 and float16 torch rounds a scalar y and alpha to that type first, in this operation alone. Its
    last elements, fewer than a vector of the processor's, also round alpha * y; that is not repeated here.
    """
    a, b = _up(x, _round(y, x.dtype))
    return _round(a + b if alpha is None else a + _up(_round(alpha, x.dtype))[0] * b, x.dtype)


@operation
def mul(x: Array, y: Array) -> Array:
    """torch.mul: x * y."""
    a, b = _up(x, y)
    return _round(a * b, x.dtype)


def scale(x: Array, factors: Iterable[Array]) -> Array:
    """x times each real factor, one after the other."""
    factors = list(factors)
    if jnp.iscomplexobj(x):
        return lax.complex(scale(x.real, factors), scale(x.imag, factors))
    for factor in factors:
        x = mul(x, factor.astype(compute_dtype(x.dtype)))
    return x


@jax.custom_jvp
def _quotient(x: Array, y: Array) -> Array:
    """x / y. JAX's own derivative divides by y^2, which underflows beside an eps of 1e-20: 0 / 0 where x is 0."""
    return x / y


@_quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> Any:
    quotient = _quotient(*primals)
    return quotient, (tangents[0] - quotient * tangents[1]) / primals[1]


@operation
def div(x: Array, y: Array) -> Array:
    """torch.div: x / y."""
    a, b = _up(x, y)
    return _round(_quotient(a, b), x.dtype)


@operation
def reciprocal(x: Array) -> Array:
    """torch.reciprocal: 1 / x, which is also what torch makes of a number divided by a tensor."""
    (a,) = _up(x)
    return _round(_quotient(jnp.ones((), a.dtype), a), x.dtype)


@operation
def cast(scalar: Array, like: Array) -> Array:
    """A scalar of the compute type as an entry of a tensor of `like`'s type."""
    return _round(scalar, like.dtype)


@jax.custom_jvp
def _root(x: Array) -> Array:
    """The square root, with a derivative of 0 at 0.

    What is 0 is a second moment or a norm, because its gradients are 0. The chain rule multiplies the root's derivative
    by those, and infinite times 0 would be nan.
    """
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals: Any, tangents: Any) -> Any:
    y = _root(*primals)
    positive = y > 0
    return y, tangents[0] * jnp.where(positive, 0.5 / jnp.where(positive, y, 1), 0)


@jax.custom_jvp
def _absolute(x: Array) -> Array:
    """|x|. Its derivative at 0 is 0 as torch's is, the mean of both sides'; JAX's own is 1."""
    return jnp.abs(x)


@_absolute.defjvp
def _absolute_jvp(primals: Any, tangents: Any) -> Any:
    return _absolute(*primals), tangents[0] * jnp.sign(primals[0])


@operation
def absolute(x: Array) -> Array:
    """torch.abs."""
    return _absolute(x)


# torch's of the same names: these round nothing.
where, maximum, minimum, sign = map(operation, (jnp.where, jnp.maximum, jnp.minimum, jnp.sign))
zeros_like, ones_like, full_like = map(operation, (jnp.zeros_like, jnp.ones_like, jnp.full_like))


@operation
def zeros(like: Array, shape: tuple[int, ...]) -> Array:
    """Of a shape, in the compute type of an array."""
    return jnp.zeros(shape, compute_dtype(like.dtype))


@operation
def sqrt(x: Array) -> Array:
    """torch.sqrt."""
    (a,) = _up(x)
    return _round(_root(a), x.dtype)


@operation
def rsqrt(x: Array) -> Array:
    """torch.rsqrt: 1 / sqrt(x)."""
    (a,) = _up(x)
    return _round(_quotient(jnp.ones((), a.dtype), _root(a)), x.dtype)


@operation
def norm(x: Array, axis: int | None = None) -> Array:
    """torch.norm: the Euclidean norm over one axis, which is kept, or over all; a real number of complex ones too."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag]) if axis is None else jnp.abs(x)
    return root(squares(x, axis), x)


def squares(x: Array, axis: int | None = None) -> Array:
    """The sum of the squares of real numbers, as `norm` takes it, in the compute type."""
    (a,) = _up(x)
    return jnp.sum(a * a, axis=axis, keepdims=axis is not None)


def root(total: Array, like: Array) -> Array:
    """The root of a sum in the compute type, in the type of `like`."""
    return _round(_root(total), like.dtype)


@operation
def mean(x: Array, axis: int | None = None) -> Array:
    """torch.mean over an axis, which is kept, or over all."""
    return cast(summed(x, axis) / (x.size if axis is None else x.shape[axis]), x)


def summed(x: Array, axis: int | None) -> Array:
    """The sum over an axis, which is kept, or over all, in the compute type."""
    (a,) = _up(x)
    return jnp.sum(a, axis=axis, keepdims=axis is not None)


@operation
def product(x: Array, y: Array) -> Array:
    """x * y in the compute type, of which torch.dot takes the sum."""
    a, b = _up(x, y)
    return a * b


def addmm(x: Array, t1: Array, t2: Array, beta: Array | float, alpha: Array | float = 1) -> Array:
    """torch.addmm: beta * x + alpha * (t1 @ t2), summed in the compute type and rounded once."""
    product = jnp.matmul(t1, t2, preferred_element_type=compute_dtype(x.dtype))
    return _round(beta * _up(x)[0] + alpha * product, x.dtype)


def matmul(t1: Array, t2: Array) -> Array:
    """torch.matmul, summed in the compute type and rounded once."""
    return _round(jnp.matmul(t1, t2, preferred_element_type=compute_dtype(t1.dtype)), t1.dtype)


LARGE = 2**28  # elements of a matrix that no device computes alone: 0.5 GB in bfloat16


def gathered(x: Array) -> Array:
    """x, gathered if it lies on a mesh: what follows needs all of it, and a loop would gather in each turn."""
    return constrain(x, PartitionSpec()) if on_mesh() else x


def on_mesh() -> bool:
    """Whether what is traced is for a mesh on which XLA chooses how arrays lie."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(mesh.axis_types) == {AxisType.Auto}


def each_once(f: Callable[..., Array], x: Array, others: Any) -> Array:
    """`f(x, others)` of a matrix. Under `vmap` and on a mesh each device computes some of the batch, and none twice.

    The batch is filled up with zeros to a multiple of the number of devices. A matrix of more than `LARGE` elements is
    divided itself.
    """
    if not on_mesh():
        return f(x, others)
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(mesh.axis_names)
    if x.size > LARGE and max(x.shape) % mesh.size == 0:
        longer = PartitionSpec(mesh.axis_names) if x.shape[0] > x.shape[1] else PartitionSpec(None, mesh.axis_names)
        return constrain(f(constrain(x, longer), others), longer)

    @jax.custom_batching.custom_vmap
    def alone(x: Array, others: Any) -> Array:
        return gathered(f(gathered(x), others))  # after it too: else XLA computes it as its result lies

    @alone.def_vmap
    def batched(size: int, in_batched: Any, x: Array, others: Any) -> tuple[Array, bool]:
        def filled(x: Array, is_batched: bool) -> Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return jnp.concatenate([x, jnp.zeros((-size % mesh.size, *x.shape[1:]), x.dtype)])

        # Before and after it arrays lie as their matrices do: else XLA divides all that is stacked by the batch.
        free = PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - in_batched[0]))
        x, others = jax.tree.map(filled, (constrain(x, free), others), tuple(in_batched))
        others = jax.tree.map(gathered, others)  # numbers, which XLA would send in turn
        return constrain(constrain(jax.vmap(f)(constrain(x, spec), others), spec)[:size], free), True

    return alone(x, others)


def constrain(x: Array, spec: PartitionSpec) -> Array:
    """x, laid out by the spec on the mesh of the context. (jax 0.7 takes a bare spec only under `jax.set_mesh`.)"""
    return lax.with_sharding_constraint(x, NamedSharding(jax.sharding.get_abstract_mesh(), spec))


def laid_out(f: Callable[..., Any], like: Any, *args: Any) -> Any:
    """`f(*args)`. Inside, XLA chooses how arrays lie, also if arguments lie on a mesh with explicit axes.

    Those would refuse a rule that multiplies arrays which lie differently, as a row's mean and its matrix. The results
    lie as the arrays of `like` do, a tree of their structure; with None they are whole on every device.
    """
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, Array)]
    explicit = [x for x in arrays if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types]
    if not explicit:
        return f(*args)
    specs = PartitionSpec() if like is None else jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    with _under(explicit[0]):
        return jax.sharding.auto_axes(f, out_sharding=specs)(*args)


def _under(x: Array) -> AbstractContextManager[Any]:
    """A context with the mesh that the array lies on."""
    mesh: Any = jax.typeof(x).sharding.mesh
    if jax.sharding.get_abstract_mesh() == mesh:
        return contextlib.nullcontext()
    if isinstance(x, Tracer) or not isinstance(x.sharding, NamedSharding):
        return jax.sharding.use_abstract_mesh(mesh)
    concrete: Any = x.sharding.mesh
    return jax.set_mesh(concrete)


def varying_alike(tree: Any, outcome: Callable[[], Any]) -> Any:
    """The arrays; in shard_map made to vary over each axis that any of them, or a result of `outcome()`, varies over.

    A loop needs that of what it carries.
    """
    if not manual_axes():
        return tree
    axes = frozenset().union(*map(varying, [*jax.tree.leaves(tree), *jax.make_jaxpr(outcome)().out_avals]))
    return jax.tree.map(lambda x: vary(x, axes - varying(x)), tree)


@operation
def lerp(start: Array, end: Array, weight: Array) -> Array:
    """torch.lerp: start + w * (end - start) for |w| < 0.5, else end - (end - start) * (1 - w)."""
    a, b = _up(start, end)
    near = jnp.abs(weight) < 0.5
    base = jnp.where(near, a, b)
    return _round(base + jnp.where(near, weight, weight - 1) * (b - a), start.dtype)


@operation
def addcmul(x: Array, t1: Array, t2: Array, value: Array | float = 1) -> Array:
    """torch.addcmul: x + (value * t1) * t2."""
    a, b, c = _up(x, t1, t2)
    return _round(a + value * b * c, x.dtype)


@operation
def addcdiv(x: Array, t1: Array, t2: Array, value: Array | float = 1) -> Array:
    """torch.addcdiv: x + (value * t1) / t2."""
    a, b, c = _up(x, t1, t2)
    return _round(a + _quotient(value * b, c), x.dtype)


@operation
def tied(*outputs: Array) -> tuple[Array, ...]:
    """The arrays as they are, tied together on TPU.

    There XLA makes one loop of several outputs only if they share something, or are tied.
    """
    return lax.platform_dependent(*outputs, tpu=lambda *x: lax.optimization_barrier(x), default=lambda *x: x)


def positions(values: Sequence[int]) -> list[Array]:
    """These numbers as int32 scalars, to index with where each is used in a loop of its own.

    XLA on CPU writes a scalar constant into each loop, so that loops which differ in it alone are compiled each for
    itself; an array's it leaves outside, if no optimization has seen that it is constant.
    """
    table = [np.array([x, 0], np.int32) for x in values]
    pairs = lax.platform_dependent(
        cpu=lambda: lax.optimization_barrier([jnp.asarray(x) for x in table]),
        default=lambda: [jnp.asarray(x) for x in table],
    )
    return [lax.index_in_dim(x, 0, keepdims=False) for x in pairs]
