"""Many learning rates, optimizers and seeds at once: one compiled program an optimizer."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jopt.around import chaining
from jopt.sweeps.inputs import Batches, Make, Plan, check_function, check_loss, check_same, make_plan, start
from jopt.sweeps.result import Sweep

Tree = Any

MEMORY = 2**30  # bytes of parameters, gradients and state at once


def sweep(
    loss: Callable[[Tree, Tree], Any],
    init: Callable[[Array], Tree],
    batches: Any,
    *,
    lr: Sequence[float],
    optimizers: Any = "adamw",
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    schedule: Callable[[Any], Any] | None = None,
    divergence: float = 2.0,
    chunk: int | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    **hyperparameters: Sequence[Any],
) -> Sweep:
    """Train with every learning rate, optimizer, setting and seed; the results side by side, and which to use.

    All runs of an optimizer are one compiled program, vectorized over them, in which learning rate and other swept
    numbers are inputs in float64: each run has the numbers of a separate one with `tx.step`.

    >>> import jax, jax.numpy as jnp, jopt
    >>> x = jax.random.normal(jax.random.key(0), (100, 32, 3))        # 100 batches
    >>> y = x @ jnp.array([1.0, -2.0, 3.0])
    >>> def loss(params, batch):
    ...     x, y = batch
    ...     return jnp.mean((x @ params["w"] - y) ** 2)
    >>> def init(key):
    ...     return {"w": jax.random.normal(key, (3,))}
    >>> result = jopt.sweep(loss, init, (x, y), lr=[1e-3, 1e-2, 1e-1, 1.0], optimizers=["adamw", jopt.sgd])
    >>> len(result.runs), result.best("sgd").lr
    (24, 0.1)
    >>> print(result.best("sgd").reason)  # doctest: +ELLIPSIS
    sgd, lr 0.1: final loss ..., the median over 3 seeds. ...

    Args:
      loss: `loss(params, batch)`, a real 0-d array, what `jax.grad` and `jax.vmap` can take.
      init: `init(key)`, the parameters for a key of `jax.random`: a tree of floating or complex arrays. Called once a
        seed with `jax.random.key(seed)`, outside of jit; its results are kept in host memory.
      batches: every run sees the same, one a step. A dict, a tuple or an array (any tree): stacked along a first axis
        of steps. A list or another iterable: one batch each; it is read once and kept. A function: `batches(step)` is
        called for every step of every chunk, and what it returns is not kept.
      lr: the learning rates; `np.geomspace(1e-5, 1, 11)` for a range.
      optimizers: a name ("adamw"), a function that takes `lr` and the other hyperparameters as numbers or schedules
        (`jopt.adamw`, `functools.partial(jopt.sgd, momentum=0.9)`, `lambda lr: jopt.chain(...)`, `lambda lr:
        optax.lion(lr)`), a sequence of these, or a mapping from labels to them.
      seeds: how many, from 0, or which.
      steps: how many, where `batches` is longer or a function.
      schedule: step -> what the learning rate is multiplied by, in float64: `jopt.schedules.cosine_annealing_lr(1.0,
        T_max=100)`.
      divergence: a run diverged if a loss was not finite or its last tenth is above this multiple of its first loss.
      chunk: how many runs at once. By default as many as keep parameters, gradients and state within 1 GiB (what the
        loss keeps for its gradient comes on top: give a smaller one for a model of large activations). A multiple of
        the devices is taken: runs are sharded over all of them. On one device `chunk=1` spares SOAP and Kron the work
        of a refresh at every step, for which vectorized runs pay.
      progress: wraps the sequence of chunks: `tqdm.tqdm`.
      hyperparameters: other numbers to sweep, by the optimizers' names: `weight_decay=[0.0, 0.1]`, `betas=[(0.9, 0.95),
        (0.9, 0.999)]`. All combinations are run. A swept term is computed even where its number is 0.

    Raises:
      ValueError: an empty or repeated grid, what an optimizer says to a number out of its range, batches of unequal
        length, nan or infinity in them, a loss that is no scalar.
      TypeError: an argument of another type; parameters that are no floating arrays; an optimizer that is not
        stepped by gradients (`lbfgs`) or takes sparse ones (`sparse_adam`).
    """
    check_function("loss", loss)
    check_function("init", init)
    plan = make_plan(optimizers, lr, seeds, schedule, divergence, chunk, hyperparameters)
    data = Batches(batches, steps)
    starts = [start(init, seed) for seed in plan.seeds]
    for seed, params in zip(plan.seeds, starts, strict=True):
        check_same("init", f"of seed {plan.seeds[0]}", starts[0], f"of seed {seed}", params)
    check_loss(loss, starts[0], data[0])

    def program(make: Make) -> Program:
        return LoopProgram(make, schedule, loss)

    return run_all(plan, program, chunk, starts, data, progress)


def run_all(
    plan: Plan,
    program_of: Callable[[Make], Program],
    chunk: int | None,
    starts: Sequence[Tree],
    data: Batches,
    progress: Callable[[Sequence[Any]], Iterable[Any]],
) -> Sweep:
    """Every optimizer's runs, chunk by chunk."""
    jobs, rows = [], plan.rows()
    for make in plan.optimizers.values():
        program = program_of(make)
        size = chunk_size(plan, chunk, program, starts[0])
        jobs += [(program, rows[i : i + size], size) for i in range(0, len(rows), size)]
    return plan.result(
        np.concatenate([program.run(part, size, starts, data) for program, part, size in progress(jobs)])
    )


# --- the programs -----------------------------------------------------------------------------------


class Program(ABC):
    """An optimizer's runs. `numbers` are the swept numbers of each, as `_parts`."""

    devices: Sequence[Any]

    def __init__(self, make: Make, schedule: Callable[[Any], Any] | None):
        self._make, self._schedule = make, schedule
        self._begin = jax.jit(functools.partial(each_run, self.state))

    @abstractmethod
    def train(self, params: Tree, state: Any, numbers: Any, data: Batches) -> np.ndarray:
        """The losses of all steps, (steps, runs). May donate parameters and state."""

    def state(self, params: Tree, numbers: Any) -> Any:
        """One run's, before the first step."""
        return self._transformation(numbers).init(params)

    def step(self, params: Tree, state: Any, grads: Tree, numbers: Any) -> tuple[Tree, Any]:
        """One run's."""
        return chaining.step(self._transformation(numbers), grads, state, params)

    def run(
        self, rows: Sequence[tuple[Mapping[str, Any], int]], size: int, starts: Sequence[Tree], data: Batches
    ) -> np.ndarray:
        """The losses of the rows, (rows, steps), float64; `size` runs are computed, the last one several times."""
        padded = [*rows, *[rows[-1]] * (size - len(rows))]
        params = jax.tree.map(lambda *xs: np.stack(xs), *(starts[i] for _, i in padded))
        numbers = jax.tree.map(_parts, *(setting for setting, _ in padded))
        params, numbers = jax.device_put((params, numbers), self._sharding(size))
        losses = self.train(params, self._begin(params, numbers), numbers, data)
        return losses.astype(np.float64).T[: len(rows)]

    def _sharding(self, size: int) -> Sharding:
        """Runs over all devices, where they divide."""
        if len(self.devices) == 1 or size % len(self.devices):
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(Mesh(np.array(self.devices), ("runs",)), PartitionSpec("runs"))

    def _transformation(self, numbers: Any) -> optax.GradientTransformation:
        """With schedules for numbers: what jopt evaluates in float64."""

        def constant(parts: Array) -> Callable[[Any], Array]:
            def value(step: Any) -> Array:
                wide = parts.astype(float)  # float64 in the double scope
                return wide[0] + wide[1] + wide[2]

            return value

        arguments = jax.tree.map(constant, numbers)
        if self._schedule is not None:
            lr, factor = arguments["lr"], self._schedule
            arguments["lr"] = lambda step: lr(step) * factor(step)
        return self._make(**arguments)


class LoopProgram(Program):
    """One compiled loop over steps, vectorized over runs."""

    def __init__(self, make: Make, schedule: Callable[[Any], Any] | None, loss: Callable[[Tree, Tree], Any]):
        super().__init__(make, schedule)
        self.devices = jax.devices()
        self._loss = loss
        self._advance = jax.jit(self._loop, donate_argnums=(0, 1))

    def train(self, params: Tree, state: Any, numbers: Any, data: Batches) -> np.ndarray:
        losses = []
        for block, n in data.blocks():
            params, state, values = self._advance(params, state, numbers, block, n)
            losses.append(np.asarray(values)[:n])
        return np.concatenate(losses)

    def _loop(self, params: Tree, state: Any, numbers: Any, block: Tree, n: Array) -> tuple[Tree, Any, Array]:
        """`n` steps on the batches of the block; new parameters and states, and the losses before each step."""

        def advance(i: Array, carry: Any) -> Any:
            params, state, losses = carry
            batch = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), block)
            one_step = functools.partial(self._one_step, batch)
            params, state, values = each_run(one_step, params, state, numbers)
            return params, state, losses.at[i].set(values)

        length, runs = len(jax.tree.leaves(block)[0]), len(jax.tree.leaves(params)[0])
        dtype = jax.eval_shape(self._loss, *jax.tree.map(lambda x: x[0], (params, block))).dtype
        return lax.fori_loop(0, n, advance, (params, state, jnp.zeros((length, runs), dtype)))

    def _one_step(self, batch: Tree, params: Tree, state: Any, numbers: Any) -> tuple[Tree, Any, Array]:
        value, grads = jax.value_and_grad(self._loss)(params, batch)
        grads = jax.tree.map(lambda g: g.conj() if jnp.iscomplexobj(g) else g, grads)
        return *self.step(params, state, grads, numbers), value


def each_run(f: Callable[..., Any], *inputs: Tree) -> Any:
    """`f` of each run's inputs, which are stacked along a first axis, and so is what it returns.

    A run that is alone is not vectorized. Over several a branch is a select, which computes both of its sides.
    """
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return jax.vmap(f)(*inputs)
    return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], inputs)))


def _parts(*values: float) -> np.ndarray:
    """(n, 3) float32 whose sums over the second axis are the n float64 numbers: JAX without x64 carries no float64."""
    x = np.array(values, np.float64)
    parts = []
    for _ in range(3):
        parts.append(x.astype(np.float32))
        x = x - parts[-1]
    return np.stack(parts, axis=1)


def chunk_size(plan: Plan, chunk: int | None, program: Program, params: Tree, memory: int = MEMORY) -> int:
    """How many runs at once: chunks of about one size, a multiple of the devices."""
    rows, devices = plan.rows(), len(program.devices)
    numbers = jax.tree.map(lambda x: _parts(x)[0], rows[0][0])
    if chunk is None:
        state = jax.eval_shape(program.state, params, numbers)
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((params, params, state)))
        chunk = max(1, memory * devices // max(size, 1))
    chunk = -(-len(rows) // -(-len(rows) // chunk))
    return -(-chunk // devices) * devices
