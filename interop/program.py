"""The compiled programs of a torch optimizer's step, and how they run over torch's memory.

`compile_update` steps a bucket of leaves in place: one loop a buffer, each array read and written once. Muon's
iteration is torch's work between two programs (`Orthogonalizing`).
`compile_norms` reads the gradients once before it, where the step clips them by their norm or unscales them; what it
finds enters the update as arrays, and the host looks at neither.
"""

from __future__ import annotations

import _signal  # type: ignore[reportMissingImports]  # signal without its enumerations, which cost more than all else
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array, lax

from interop import dlpack
from jopt import numerics as t
from jopt._compat import device, enable_x64
from jopt.arena import ROW
from jopt.around.clip import clip_factor, total_norm
from jopt.fusion import fuses_outputs, multi_output_fusion
from jopt.leaf import in_step_type, init_leaf, separately, step_leaf, step_leaves
from jopt.optimizers import Muon
from jopt.rule import Rule

EMA = "ema"  # the slot of the parameter's exponential moving average


@dataclasses.dataclass(frozen=True)
class Bucket:
    """What the programs of a bucket depend on.

    Attributes:
      rule: what is stepped.
      dtypes: the types of `param` and of each slot, in the order of a leaf's buffers.
      big: the shapes of the leaves with buffers of their own; (size,) where the rule does not ask for it.
      n_small, rows: how many leaves share buffers, and those buffers' rows of `ROW` elements. Such buffers have two
        axes from the first: reshaped in the program they would not be written in place.
    """

    rule: Rule
    dtypes: tuple[tuple[str, np.dtype], ...]
    big: tuple[tuple[int, ...], ...]
    n_small: int
    rows: int

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.dtypes]

    @property
    def dtype(self) -> np.dtype:
        """The parameters' type."""
        return self.dtypes[0][1]

    @property
    def compute_dtype(self) -> np.dtype:
        return t.widest(dtype for _, dtype in self.dtypes)

    @property
    def columns(self) -> tuple[str, ...]:
        """A leaf's coefficients: the rule's, the weight of its average's news, whether it steps."""
        return (*_coefficient_names(self.rule), *((EMA,) if EMA in self.names else ()), "active")


@functools.lru_cache(maxsize=1024)
def slot_shapes(rule: Rule, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a leaf's tensor state, in torch's order, which a JAX tree would sort."""
    slots: dict[str, tuple[int, ...]] = {}

    def init(param: Array) -> None:
        state = rule.init(dict.fromkeys(rule.hyperparameters, jnp.zeros(())), param)
        slots.update((name, x.shape) for name, x in state.items())

    jax.eval_shape(init, jax.ShapeDtypeStruct(shape, np.float32))
    return slots


@functools.lru_cache(maxsize=1024)
def first_slots(
    rule: Rule, axes: int, dtype: torch.dtype, compute: np.dtype, h: tuple[tuple[str, float], ...]
) -> dict[str, torch.Tensor]:
    """The tensor state before the first step of a leaf of so many axes, in tensors of one element each.

    In each of its slots all elements are equal (`Rule.init`), so that an array of the leaf's size is not needed.
    """
    with own_settings(), jax.default_device(device("cpu")):
        param = jnp.zeros((1,) * axes, dlpack.DTYPES[dtype])
        return dlpack.to_torch(init_leaf(rule, {name: jnp.asarray(x, compute) for name, x in h}, param))


def buffer_shapes(bucket: Bucket, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of a leaf's buffers, in their order."""
    slots = slot_shapes(bucket.rule, shape)
    return [slots.get(name, shape) for name in bucket.names]


@functools.lru_cache(maxsize=1024)
def _coefficient_names(rule: Rule) -> tuple[str, ...]:
    with np.errstate(all="ignore"):
        h = dict.fromkeys(rule.hyperparameters, np.float64(0.5))
        s = {name: np.full(1, x) for name, x in rule.init_scalars(h).items()}
        return tuple(rule.scalars(h, s, np, np.asarray)[0])


@functools.lru_cache(maxsize=256)
def compile_update(
    bucket: Bucket, clip: bool = False, unscale: bool = False, norms: tuple[tuple[int, np.dtype], ...] = ()
) -> Any:
    """The program that steps a bucket, for any optimizer with one like it.

    Args:
      bucket: the leaves.
      clip: scale the gradients so that the norm of all is at most `max_norm`.
      unscale: multiply them by `inverse_scale` before that, and keep what is optimized where one is not finite.
      norms: with `clip` or `unscale`, how many norms each of the optimizer's buckets contributes, and their type.

    The program takes the buffers, which it returns, leaf by leaf, `param` and the slots in the order of `dtypes`, those
    of the small leaves last; the gradients likewise; the table of coefficients, a row a leaf (`columns`); the leaf of
    each row of the small buffers; and, as a dictionary, what the `compile_norms` of each bucket found, `max_norm` and
    `inverse_scale`. Behind the buffers it returns the norm of all gradients, and whether one was not finite.
    Muon's is an `Orthogonalizing`, of the same arguments.
    """
    names = bucket.names
    columns = bucket.columns + (("factor", "inverse_scale", "found_inf") if norms else ())
    iterates = isinstance(bucket.rule, Muon) and math.prod(bucket.big[0]) > 0
    rule: Any = _Moved(**vars(bucket.rule)) if iterates else bucket.rule
    fuses = fuses_outputs(own=True)
    if not fuses:
        _warn_slow()

    def before(buffers: Sequence[Array], grad: Array, row: Array, given: dict[str, Array]) -> Any:
        """`step_leaf`'s arguments, and the leaf's average with the weight of its news."""
        c = {name: row[..., j] for j, name in enumerate(columns)} | given
        active = c.pop("active") != 0
        factors = []
        if unscale:
            factors.append(c.pop("inverse_scale"))
            active = active & (c.pop("found_inf") == 0)
        if clip:
            factors.append(c.pop("factor"))
        grad = t.scale(grad, factors)
        state = dict(zip(names[1:], buffers[1:], strict=True))
        average = (state.pop(EMA), c.pop(EMA)) if EMA in state else None
        return (c, grad, state, buffers[0], active), average

    def after(result: tuple[Array, dict[str, Array]], average: tuple[Array, Array] | None) -> list[Array]:
        param, state = result
        if average is not None:
            state = state | {EMA: t.lerp(average[0], param, average[1])}
        return [param, *(state[name] for name in names[1:])]

    def step_one(*inputs: Any) -> list[Array]:
        leaf, average = before(*inputs)
        return after(step_leaf(rule, *leaf), average)

    def step_elements(leaves: list[Any]) -> list[Array]:
        return [x for leaf in leaves for x in (separately(step_one, len(names), *leaf) if fuses else step_one(*leaf))]

    def step_tensors(leaves: list[Any]) -> list[Array]:
        inputs, averages = [], []
        for shape, (buffers, grad, *rest) in zip(bucket.big, leaves, strict=True):
            shapes = buffer_shapes(bucket, shape)
            buffers = [x.reshape(s) for x, s in zip(buffers, shapes, strict=True)]
            leaf, average = before(buffers, grad.reshape(shape), *rest)
            inputs.append(leaf)
            averages.append(average)
        results = zip(step_leaves(rule, inputs), averages, strict=True)
        return [x.reshape(-1) for result, average in results for x in after(result, average)]

    def inputs(
        buffers: list[Array],
        grads: list[Array],
        table: Array,
        leaf_of_row: Array,
        found: dict[str, Any],
        orthogonal: Sequence[Array] = (),
    ) -> tuple[list[Any], dict[str, Array]]:
        """`before`'s arguments for each leaf, the small ones together, and what is judged of all gradients."""
        judged: dict[str, Array] = {}
        if norms:
            # Into each leaf's row: XLA merges leaves of one size that share a number into one slow loop.
            judged = _judge(found)
            values = jnp.stack([judged[name].astype(table.dtype) for name in columns[len(bucket.columns) :]])
            table = jnp.concatenate([table, jnp.broadcast_to(values, (table.shape[0], len(values)))], axis=1)
        split = len(bucket.big)
        rows = [table[i] for i in range(split)]
        if bucket.n_small:
            rows.append(table[split:][leaf_of_row][:, None])
        own = [buffers[i : i + len(names)] for i in range(0, len(buffers), len(names))]
        given = [{"orthogonal": x, "adjustment": rule.adjustment(bucket.big[0])} for x in orthogonal]
        return list(zip(own, grads, rows, given or [{}] * len(rows), strict=True)), judged

    def direct(*arguments: Any) -> Array:
        """What Muon makes orthogonal."""
        leaves = [before(*leaf)[0] for leaf in inputs(*arguments)[0]]
        matrices = [rule.direct(*in_step_type(*leaf[:4])[:3])[0] for leaf in leaves]
        # XLA on CPU would stack them in float32.
        return jnp.stack([lax.bitcast_convert_type(x, jnp.uint16) for x in matrices])

    def update(*arguments: Any) -> list[Array]:
        leaves, judged = inputs(*arguments)
        step = step_tensors if rule.scope == "tensor" else step_elements
        return step(leaves) + ([judged["norm"], judged["found_inf"]] if judged else [])

    with own_settings():
        compute = bucket.compute_dtype
        sizes = [[(math.prod(s),) for s in buffer_shapes(bucket, shape)] for shape in bucket.big]
        sizes += [[(bucket.rows, ROW)] * len(names)] * bool(bucket.n_small)
        found: dict[str, Any] = {}
        if norms:
            found["norms"] = [_spec((n,), dtype) for n, dtype in norms]
            found["overflows"] = [_spec((), bool) for _ in norms]
            found["max_norm"] = found["inverse_scale"] = _spec((), compute)
        specs = (
            [_spec(s, dtype) for leaf in sizes for s, (_, dtype) in zip(leaf, bucket.dtypes, strict=True)],
            _gradients(bucket),
            _spec((len(bucket.big) + bucket.n_small, len(bucket.columns)), compute),
            _spec((bucket.rows,), np.int32),
            found,
        )
        if iterates:
            orthogonal = [_spec((math.prod(shape),), jnp.bfloat16) for shape in bucket.big]
            move = _compile(update, *specs, orthogonal, donate_argnums=0)
            return Orthogonalizing(bucket, rule.ns_steps, _compile(direct, *specs), move)
        return _compile(update, *specs, donate_argnums=0)


class _Moved(Muon):
    """Muon where what comes of its iteration is among the coefficients: it looks at single elements."""

    scope = "element"

    def update(self, c: Any, grad: Array, state: dict[str, Array], param: Array) -> tuple[Array, dict[str, Array]]:
        _, state = self.direct(c, grad, state)
        return self.move(c, param, c["orthogonal"], c["adjustment"]), state


@dataclasses.dataclass(frozen=True)
class Orthogonalizing:
    """Muon's step: a program, torch's products, and a program.

    XLA on CPU (0.10) runs products of a few hundred rows on one thread, at half the speed of torch's batched
    ones, which are summed as torch.optim.Muon's are. The bucket's matrices are of one shape and one parameter group.
    The first program gives no buffer away, so that nothing is lost if the products raise: the second averages again.
    """

    bucket: Bucket
    ns_steps: int
    direct: Any
    move: Any

    def __call__(
        self, buffers: list[Array], grads: list[Any], table: Array, leaf_of_row: Array, found: dict[str, Any]
    ) -> list[Array]:
        c = dict(zip(self.bucket.columns, np.asarray(table)[0].tolist(), strict=True))
        arguments = (buffers, grads, table, leaf_of_row, found)
        rows, columns = self.bucket.big[0]
        x = dlpack.to_torch(jax.block_until_ready(self.direct(*arguments)), copy=False)
        x = x.view(torch.bfloat16).view(-1, rows, columns)
        if rows > columns:
            x = x.mT
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=c["eps"])
        # Products of 16 rows and less torch sums otherwise for many matrices than for one.
        together = len(x) > 1 and x.shape[1] > 16
        x = self._iterate(x, c) if together else torch.stack([self._iterate(matrix, c) for matrix in x])
        x = (x.mT if rows > columns else x).contiguous()
        pause_openmp()
        # By way of integers, as torch gives NumPy no bfloat16.
        return self.move(*arguments, [*x.view(torch.uint16).flatten(1).numpy().view(jnp.bfloat16)])

    def _iterate(self, x: torch.Tensor, c: dict[str, float]) -> torch.Tensor:
        """The iteration of `jopt.optimizers.muon.orthogonalize` for a matrix or many."""
        addmm = torch.addmm if x.dim() == 2 else torch.baddbmm
        gram, polynomial = (x.new_empty(*x.shape[:-1], x.shape[-2]) for _ in range(2))
        results = itertools.cycle(x.new_empty(x.shape) for _ in range(2))  # not x, which may be a transpose
        for _ in range(self.ns_steps):
            torch.matmul(x, x.mT, out=gram)
            addmm(gram, gram, gram, beta=c["b"], alpha=c["c"], out=polynomial)
            x = addmm(x, polynomial, x, beta=c["a"], out=next(results))
        return x


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
def compile_norms(bucket: Bucket, unscale: bool) -> Any:
    """The program that reads a bucket's gradients: the norm of each, and whether one is not finite.

    It takes the gradients, as `compile_update` does; the leaf of each row of the small ones; for each of these leaves
    where in their buffer its elements end, 0 if they do not count; and `inverse_scale`. Without `unscale` it looks for
    nothing that is not finite.
    """
    compute = t.compute_dtype(bucket.dtype)

    def norms(grads: list[Array], leaf_of_row: Array, ends: Array, inverse_scale: Array) -> tuple[Array, Array]:
        def squares(grad: Array) -> Array:
            grad = grad.astype(compute)
            return grad * grad

        sums = [jnp.sum(squares(grad))[None] for grad in grads[: len(bucket.big)]]
        if bucket.n_small:
            row, column = (lax.broadcasted_iota(np.int32, grads[-1].shape, axis) for axis in (0, 1))
            inside = row * ROW + column < ends[leaf_of_row][:, None]
            grads = [*grads[:-1], jnp.where(inside, grads[-1], jnp.zeros_like(grads[-1]))]
            rows = jnp.sum(squares(grads[-1]), axis=1)
            sums.append(jax.ops.segment_sum(rows, leaf_of_row, bucket.n_small, indices_are_sorted=True))
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
        return t.cast(norms, jnp.zeros((), bucket.dtype)), overflow

    with own_settings():
        grads = _gradients(bucket)
        rows, ends = (_spec((n,), np.int32) for n in (bucket.rows, bucket.n_small))
        return _compile(norms, grads, rows, ends, _spec((), compute))


def _gradients(bucket: Bucket) -> list[jax.ShapeDtypeStruct]:
    shapes = [(math.prod(shape),) for shape in bucket.big] + [(bucket.rows, ROW)] * bool(bucket.n_small)
    return [_spec(shape, bucket.dtype) for shape in shapes]


def _spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(device("cpu"))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _compile(f: Any, *specs: Any, **options: Any) -> Any:
    lowered = jax.jit(f, **options).lower(*specs)
    with multi_output_fusion():
        return lowered.compile()


@functools.cache
def _warn_slow() -> None:
    warnings.warn(
        "interop.optim: this JAX does not take the option that lets XLA on CPU compute several outputs in one loop, "
        "which costs a step half its speed; call jopt.enable_multi_output_fusion() before the first use of JAX",
        RuntimeWarning,
        stacklevel=2,
    )


# --- running -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """The JAX settings that the programs need, whatever the user's: debug_nans raises after buffers were donated."""
    with (
        enable_x64(True),
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
    ):
        yield


def settings() -> Any:
    """The context in which programs run, inside `SignalsWait`: JAX's settings are ours."""
    unusual = any(getattr(jax.config, name) for name in ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs"))
    guarded = getattr(jax.config, "jax_transfer_guard_host_to_device", None) not in (None, "allow")
    # Entering them all costs as much as dispatching a small program.
    return own_settings() if unusual or guarded else enable_x64(True)


def launch(program: Any, buffers: Sequence[dlpack.Buffer], *arguments: Any) -> list[Any]:
    """Start a program over the buffers, inside `settings`; `jax.block_until_ready` the results before leaving them.

    It returns the buffers, and after them what this returns. They are donated, so that an exception between the
    call and the taking of its results would lose the memory that torch sees.
    """
    out = program([buffer.array for buffer in buffers], *arguments)
    dlpack.replace(buffers, out[: len(buffers)])
    return out


def run(program: Any, buffers: Sequence[dlpack.Buffer], *arguments: Any) -> list[Any]:
    """Run a program over the buffers and wait: torch may write right after to what it reads."""
    with SignalsWait(), settings():
        return jax.block_until_ready(launch(program, buffers, *arguments))[len(buffers) :]


def pause_openmp() -> None:
    """End the threads of torch's OpenMP: after a parallel loop they spin, on the processors that XLA needs."""
    if (pause := _omp_pause()) is not None:
        pause(1)  # omp_pause_soft


@functools.cache
def _omp_pause() -> Any:
    """GNU OpenMP's omp_pause_resource_all, if torch runs on that; it ends the calling thread's pool alone."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return None
    for line in maps.read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libgomp" in path:
            return getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
    return None


class Freed:
    """Gives memory that is freed back to the system, which glibc else keeps: a model would be in memory twice.

    A part at a time, for it looks through all that is free.
    """

    def __init__(self, total: int):
        self.part = max(2**24, total // 64)
        self.held = 0
        self.give_back()  # what compiling left

    def add(self, nbytes: int) -> None:
        """Note that so many of the `total` bytes were freed."""
        self.held += nbytes
        if self.held >= self.part:
            self.give_back()

    def give_back(self) -> None:
        self.held = 0
        if (trim := _malloc_trim()) is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """glibc's malloc_trim, if the process runs on that."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


class SignalsWait:
    """Python's signal handlers run after the block rather than inside it."""

    signals = [
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP")
        if hasattr(signal, name)
    ]

    def __enter__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.arrived: list[tuple[int, Any]] = []
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                if callable(handler := _signal.getsignal(number)):
                    self.handlers[number] = handler
                    _signal.signal(number, lambda *args: self.arrived.append(args))

    def __exit__(self, *_: object) -> None:
        for number in reversed(self.handlers):  # SIGINT last, as it came first: until then it cannot cut this short
            _signal.signal(number, self.handlers[number])
        self._deliver()

    def _deliver(self) -> None:
        if self.arrived:
            number, frame = self.arrived.pop(0)
            try:
                self.handlers[number](number, frame)
            finally:
                self._deliver()
