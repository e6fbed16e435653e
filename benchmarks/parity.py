"""How far jopt and the drop-in are from torch, over torch's own table of configurations: docs/parity.md.

Every configuration of `torch.testing._internal.common_optimizers.optim_db` steps 12 problems 1000 times. A gradient is
computed from the parameters that it steps, so that differences feed back; noise keeps it from dying out.

    python -m benchmarks.parity            all, some 25 minutes: writes docs/parity.{md,json,png}
    python -m benchmarks.parity --short    what the tests compare again: writes the JSON's short part alone
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import torch
from jax.experimental.sparse import BCOO
from torch.testing._internal import common_optimizers

import jopt
from interop import optim

SEEDS, STEPS, SAMPLES = 12, 1000, 50
DOCS = Path(__file__).parent.parent / "docs"
DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")  # torch's choice among its own paths


# --- configurations ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A row: an optimizer, its mathematical arguments, and torch's choice of a path."""

    name: str
    arguments: dict[str, Any]
    path: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.arguments.items())})"

    @property
    def lower(self) -> str:
        return "sparse_adam" if self.name == "SparseAdam" else self.name.lower()

    def torch(self, params: Any, module: Any = torch.optim, **path: Any) -> torch.optim.Optimizer:
        return getattr(module, self.name)(params, **self.arguments, **path)

    def jopt(self) -> Any:
        return getattr(jopt, self.lower)(**self.arguments)


def configurations() -> list[Configuration]:
    """torch's 187 on the CPU; a tensor learning rate as the number that it holds."""
    found = []
    for info in common_optimizers.optim_db:
        inputs = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float64, info, skip=()
        )
        for item in inputs:
            kwargs = {k: x.item() if isinstance(x, torch.Tensor) else x for k, x in item.kwargs.items()}
            path = {k: kwargs.pop(k) for k in IMPLEMENTATION if k in kwargs}
            found.append(Configuration(info.optim_cls.__name__, kwargs, path))
    return found


def distinct(all_of: list[Configuration]) -> list[Configuration]:
    """Those of different arguments, on torch's own single-tensor path: the judge."""
    seen = {}
    for c in all_of:
        seen.setdefault(str(c), dataclasses.replace(c, path={}))
    return list(seen.values())


# --- problems ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """`SEEDS` noisy quadratics of two tensors each, with the seed as the first axis.

    A gradient is (p - target + noise) / 2: its products are exact, whatever is contracted. Sizes are multiples of 64,
    which torch's vector loops take whole.
    """

    shapes: tuple[tuple[int, ...], ...]
    start: list[np.ndarray]
    target: list[np.ndarray]
    noise: list[np.ndarray]  # (steps, seeds, *shape)
    sign: float

    @classmethod
    def of(cls, c: Configuration, seeds: int, steps: int) -> Problem:
        shapes = ((16, 12), (8, 24)) if c.name == "Muon" else ((64,), (16, 12))
        rng = np.random.default_rng(0)
        start, target = ([rng.standard_normal((seeds, *s)) for s in shapes] for _ in range(2))
        start = [x.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float64) for x in start]
        noise = [rng.standard_normal((steps, seeds, *s)) for s in shapes]
        return cls(shapes, start, target, noise, -1.0 if c.arguments.get("maximize") else 1.0)

    def grad(self, i: int, k: int, p: Any, target: Any, noise: Any) -> Any:
        return self.sign * 0.5 * ((p - target) + noise)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy().copy()


def to_torch(x: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).to(getattr(torch, dtype))


Trajectory = dict[str, np.ndarray]  # name -> (samples, seeds, ...), float64


def sample_steps(steps: int) -> range:
    return range(steps // SAMPLES - 1 if steps >= SAMPLES else 0, steps, max(1, steps // SAMPLES))


def torch_run(c: Configuration, dtype: str, seeds: int, steps: int, module: Any = torch.optim, nudge=False) -> Trajectory:
    """torch's optimizer or the drop-in, all seeds' parameters in one optimizer. `nudge` starts one ulp away."""
    problem = Problem.of(c, seeds, steps)
    params = [[torch.nn.Parameter(to_torch(x[s], dtype)) for s in range(seeds)] for x in problem.start]
    if nudge:
        for p in (p for ps in params for p in ps):
            p.data = torch.nextafter(p.data, torch.full_like(p.data, 9))
    flat = [p for ps in params for p in ps]
    optimizer = c.torch(flat, module, **c.path)
    samples: dict[str, list[Any]] = {}
    wanted = set(sample_steps(steps))
    for i in range(steps):
        for ps, target, noise in zip(params, problem.target, problem.noise, strict=True):
            values = np.stack([to_numpy(p) for p in ps])
            for p, g in zip(ps, problem.grad(i, 0, values, target, noise[i]), strict=True):
                p.grad = to_torch(g, dtype)
        optimizer.step()
        if i in wanted:
            for k, ps in enumerate(params):
                samples.setdefault(f"param {k}", []).append([to_numpy(p) for p in ps])
                for name in optimizer.state[ps[0]]:
                    samples.setdefault(f"{name} {k}", []).append([to_numpy(optimizer.state[p][name]) for p in ps])
    return {name: np.array(x) for name, x in samples.items()}


def jax_run(c: Configuration, dtype: str, seeds: int, steps: int, tx: Any = None) -> Trajectory:
    """jopt, or the optax transformation given: one program, `vmap` over seeds of `scan` over steps."""
    problem = Problem.of(c, seeds, steps)
    exact = tx is None
    tx = c.jopt() if exact else tx
    wanted = jnp.zeros(steps, bool).at[jnp.array(sample_steps(steps))].set(True)

    def run(start: Any, target: Any, noise: Any) -> Any:
        def body(carry: Any, noise: Any) -> Any:
            params, state = carry
            grads = [
                problem.grad(0, 0, p.astype(jnp.float64), t, n).astype(p.dtype)
                for p, t, n in zip(params, target, noise, strict=True)
            ]
            if exact:
                params, state = tx.step(grads, state, params)
            else:
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
            values = {f"param {k}": p for k, p in enumerate(params)}
            if exact:
                for name, xs in state.slots.items():
                    values |= {f"{name} {k}": x for k, x in enumerate(xs) if x is not None}
                for name, x in state.scalars.items():
                    values |= {f"{name} {k}": x[k] for k in range(len(params))}
            return (params, state), values

        return jax.lax.scan(body, (start, tx.init(start)), noise)[1]

    start = [jnp.asarray(x).astype(DTYPES[dtype]) for x in problem.start]
    noise = [jnp.asarray(x) for x in problem.noise]
    values = jax.jit(jax.vmap(run, in_axes=(0, 0, 1)))(start, [jnp.asarray(x) for x in problem.target], noise)
    return {k: np.swapaxes(np.asarray(x)[:, np.asarray(wanted)].astype(np.float64), 0, 1) for k, x in values.items()}


# --- the two whose step takes something else ---------------------------------------------------------


def sparse_rows(seeds: int, steps: int) -> Any:
    rng = np.random.default_rng(0)
    start, target = (rng.standard_normal((seeds, 32, 4)) for _ in range(2))
    indices, noise = rng.integers(0, 32, (steps, seeds, 16)), rng.standard_normal((steps, seeds, 16, 4))
    return start.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float64), target, indices, noise


def sparse_torch_run(c: Configuration, dtype: str, seeds: int, steps: int, module: Any = torch.optim, nudge=False):
    start, target, indices, noise = sparse_rows(seeds, steps)
    sign = -1.0 if c.arguments.get("maximize") else 1.0
    params = [torch.nn.Parameter(to_torch(x, dtype)) for x in start]
    if nudge:
        for p in params:
            p.data = torch.nextafter(p.data, torch.full_like(p.data, 9))
    optimizer = c.torch(params, module)
    samples: dict[str, list[Any]] = {}
    wanted = set(sample_steps(steps))
    for i in range(steps):
        for s, p in enumerate(params):
            at = indices[i, s]
            g = sign * 0.5 * ((to_numpy(p)[at] - target[s][at]) + noise[i, s])
            rows = to_torch(g, dtype)
            p.grad = torch.sparse_coo_tensor(torch.from_numpy(at)[None], rows, p.shape, check_invariants=False)
        optimizer.step()
        if i in wanted:
            samples.setdefault("param 0", []).append([to_numpy(p) for p in params])
            for name in ("exp_avg", "exp_avg_sq"):
                samples.setdefault(f"{name} 0", []).append([to_numpy(optimizer.state[p][name]) for p in params])
    return {name: np.array(x) for name, x in samples.items()}


def sparse_jax_run(c: Configuration, dtype: str, seeds: int, steps: int):
    start, target, indices, noise = (jnp.asarray(x) for x in sparse_rows(seeds, steps))
    sign = -1.0 if c.arguments.get("maximize") else 1.0
    tx = c.jopt()

    def run(start: Any, target: Any, indices: Any, noise: Any) -> Any:
        def body(carry: Any, data: Any) -> Any:
            (table, state), (at, n) = carry, data
            rows = (sign * 0.5 * ((table.astype(jnp.float64)[at] - target[at]) + n)).astype(table.dtype)
            table, state = tx.step(BCOO((rows, at[:, None]), shape=table.shape), state, table)
            return (table, state), {"param 0": table} | {f"{name} 0": x for name, x in state.slots.items()}

        return jax.lax.scan(body, (start, tx.init(start)), (indices, noise))[1]

    values = jax.jit(jax.vmap(run, in_axes=(0, 0, 1, 1)))(start.astype(DTYPES[dtype]), target, indices, noise)
    samples = np.array(sample_steps(steps))
    return {k: np.swapaxes(np.asarray(x)[:, samples].astype(np.float64), 0, 1) for k, x in values.items()}


def lbfgs_data(seeds: int, steps: int) -> Any:
    rng = np.random.default_rng(0)
    start, target = (rng.standard_normal((seeds, 64)) for _ in range(2))
    return start.astype(np.float32).astype(np.float64), target, np.linspace(1, 20, 64), rng.standard_normal((steps, seeds, 64))


def lbfgs_value_and_grad(x: Any, target: Any, scale: Any, noise: Any, m: Any) -> Any:
    """A convex function that moves a little with each step; its gradient by hand, so that both sides compute the same."""
    e = x.astype(np.float64) - target - noise / 1000
    return m.sum(scale * e * e / 2 + m.sqrt(1 + e * e)), scale * e + e / m.sqrt(1 + e * e)


def lbfgs_torch_run(c: Configuration, dtype: str, seeds: int, steps: int, module: Any = torch.optim, nudge=False):
    start, target, scale, noise = lbfgs_data(seeds, steps)
    samples: list[Any] = []
    for s in range(seeds):
        p = torch.nn.Parameter(to_torch(start[s], dtype))
        if nudge:
            p.data = torch.nextafter(p.data, torch.full_like(p.data, 9))
        optimizer = c.torch([p], module)
        run = []
        for i in range(steps):

            def closure(p=p, s=s, i=i) -> Any:
                loss, grad = lbfgs_value_and_grad(p.detach().numpy(), target[s], scale, noise[i, s], np)
                p.grad = to_torch(grad, dtype)
                return float(np.asarray(loss).astype(DTYPES[dtype]))

            optimizer.step(closure)
            run.append(to_numpy(p))
        samples.append(run)
    return {"param 0": np.swapaxes(np.array(samples), 0, 1)[np.array(sample_steps(steps))]}


def lbfgs_jax_run(c: Configuration, dtype: str, seeds: int, steps: int):
    start, target, scale, noise = (jnp.asarray(x) for x in lbfgs_data(seeds, steps))
    solver = c.jopt()

    def value_and_grad(x: Any, target: Any, noise: Any) -> Any:
        loss, grad = lbfgs_value_and_grad(x, target, scale, noise, jnp)
        return loss.astype(x.dtype), grad.astype(x.dtype)

    def run(start: Any, target: Any, noise: Any) -> Any:
        def body(carry: Any, noise: Any) -> Any:
            x, state, _ = solver.step(value_and_grad, carry[1], carry[0], target, noise)
            return (x, state), x

        return jax.lax.scan(body, (start, solver.init(start)), noise)[1]

    values = jax.jit(jax.vmap(run, in_axes=(0, 0, 1)))(start.astype(DTYPES[dtype]), target, noise)
    return {"param 0": np.swapaxes(np.asarray(values).astype(np.float64), 0, 1)[np.array(sample_steps(steps))]}


def runs(c: Configuration) -> tuple[Callable[..., Trajectory], Callable[..., Trajectory]]:
    special = {"SparseAdam": (sparse_torch_run, sparse_jax_run), "LBFGS": (lbfgs_torch_run, lbfgs_jax_run)}
    return special.get(c.name, (torch_run, jax_run))


# --- optax's nearest ---------------------------------------------------------------------------------


def nearest_in_optax(c: Configuration) -> optax.GradientTransformation | None:
    """What a user of optax would write for the same arguments; None where there is nothing near."""
    a = dict(c.arguments)
    defaults = {"SGD": 1e-3, "Adam": 1e-3, "AdamW": 1e-3, "RAdam": 1e-3, "Adadelta": 1.0, "Adamax": 2e-3, "NAdam": 2e-3}
    lr = a.pop("lr", defaults.get(c.name, 1e-2))
    wd = a.pop("weight_decay", 0.01 if c.name == "AdamW" else 0)
    ascends = a.pop("maximize", False)
    decoupled = a.pop("decoupled_weight_decay", c.name == "AdamW")
    if c.name == "SGD" and not a.get("dampening"):
        tx = optax.sgd(lr, a.get("momentum") or None, a.get("nesterov", False))
    elif c.name in ("Adam", "AdamW"):
        tx = (optax.amsgrad if a.get("amsgrad") else optax.adam)(lr)
    elif c.name == "Adamax":
        tx = optax.adamax(lr)
    elif c.name == "NAdam":
        tx = optax.nadam(lr)
    elif c.name == "RAdam":
        tx = optax.radam(lr, eps=a.get("eps", 1e-8))
    elif c.name == "Adagrad" and not a.get("lr_decay"):
        tx = optax.adagrad(lr, a.get("initial_accumulator_value", 0.0), 1e-10)
    elif c.name == "Adadelta":
        tx = optax.adadelta(lr, a.get("rho", 0.9), 1e-6)
    elif c.name == "RMSprop":
        tx = optax.rmsprop(lr, 0.99, 1e-8, centered=a.get("centered", False), momentum=a.get("momentum"))
    elif c.name == "Rprop":
        low, high = a.get("etas", (0.5, 1.2))
        smallest, largest = a.get("step_sizes", (1e-6, 50))
        tx = optax.rprop(lr, low, high, smallest, largest)
    elif c.name == "Adafactor":
        tx = optax.adafactor(lr, min_dim_size_to_factor=1, decay_rate=-a.get("beta2_decay", -0.8))
    elif c.name == "Muon":
        wd = c.arguments.get("weight_decay", 0.1)
        lr = c.arguments.get("lr", 1e-3)
        return optax.contrib.muon(
            lr,
            a.get("ns_coefficients", (3.4445, -4.775, 2.0315)),
            a.get("ns_steps", 5),
            a.get("momentum", 0.95),
            weight_decay=wd,
        )
    else:
        return None
    if wd:
        # Decoupled: between the direction and the learning rate, which the aliases do not open; p * lr * wd beside it.
        decay = optax.add_decayed_weights(-lr * wd) if decoupled else optax.add_decayed_weights(wd)
        tx = optax.chain(tx, decay) if decoupled else optax.chain(decay, tx)
    return optax.chain(optax.scale(-1.0), tx) if ascends else tx


# --- figures -----------------------------------------------------------------------------------------


def largest_difference(a: Trajectory, b: Trajectory) -> float:
    """Largest difference over largest value: of each tensor at each sample and seed, the worst."""
    worst = 0.0
    tiny = np.finfo(np.float32).tiny  # NAdam's mu_product goes under it; XLA on the CPU flushes what is below
    for name, y in b.items():
        x = a[name]
        axes = tuple(range(2, y.ndim))
        x, y = (np.where(np.abs(z) < tiny, 0, z) for z in (x, y))
        difference = np.abs(x - y).max(axes, initial=0)
        worst = max(worst, (difference / np.maximum(np.abs(y).max(axes, initial=0), tiny)).max())
    return float(worst)


def rms_error(a: Trajectory, truth: Trajectory) -> np.ndarray:
    """Of the parameters, over all samples: one for each seed."""
    names = [name for name in truth if name.startswith("param")]
    total = sum(((a[n] - truth[n]) ** 2).sum(axis=(0, *range(2, truth[n].ndim))) for n in names)
    return np.sqrt(total / sum(truth[n][:, 0].size for n in names))


def ratio(a: Trajectory, reference: Trajectory, truth: Trajectory) -> float:
    ours, theirs = rms_error(a, truth), rms_error(reference, truth)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.median(np.where(ours == theirs, 1, ours / theirs)))


def ulps(a: Trajectory, b: Trajectory, dtype: str) -> tuple[float, float]:
    """The share of equal parameters at the last sample, and the largest difference in units of the last place."""
    info = ml_dtypes.finfo(DTYPES[dtype])
    equal, size, worst = 0, 0, 0.0
    for name, y in ((n, y[-1]) for n, y in b.items() if n.startswith("param")):
        x = a[name][-1]
        equal, size = equal + ((x == y) | (np.isnan(x) & np.isnan(y))).sum(), size + y.size
        exponent = np.floor(np.log2(np.maximum(np.abs(y), float(info.smallest_normal))))
        worst = max(worst, np.nan_to_num(np.abs(x - y) / 2.0 ** (exponent - info.nmant)).max())
    return float(equal / size), float(worst)


def measure(c: Configuration, seeds: int, steps: int, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """The row of one configuration of its own arguments."""
    torch_run, jax_run = runs(c)
    if c.name == "LBFGS":
        steps, dtypes = max(steps // 10, 1), tuple(d for d in dtypes if d in ("float64", "float32"))
    row: dict[str, Any] = {"configuration": str(c)}
    truth = torch_run(c, "float64", seeds, steps)
    row["float64"] = {
        "jopt": largest_difference(jax_run(c, "float64", seeds, steps), truth),
        "interop": largest_difference(torch_run(c, "float64", seeds, steps, optim), truth),
    }
    if max(row["float64"].values()) > 1e-13:
        row["float64"]["torch, an ulp away"] = largest_difference(torch_run(c, "float64", seeds, steps, nudge=True), truth)
    if "float32" in dtypes:
        reference = torch_run(c, "float32", seeds, steps)
        ours = jax_run(c, "float32", seeds, steps)
        row["float32"] = {
            "jopt": ratio(ours, reference, truth),
            "interop": ratio(torch_run(c, "float32", seeds, steps, optim), reference, truth),
            "torch's error": float(np.median(rms_error(reference, truth))),
        }
        if (tx := nearest_in_optax(c)) is not None:
            row["float32"]["optax"] = ratio(jax_run(c, "float32", seeds, steps, tx), reference, truth)
    for dtype in dtypes:
        if dtype in ("bfloat16", "float16"):
            reference = torch_run(c, dtype, seeds, steps)
            row[dtype] = dict(zip(("equal", "ulps"), ulps(jax_run(c, dtype, seeds, steps), reference, dtype), strict=True))
    return row


def measure_paths(all_of: list[Configuration], seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """All of torch's table in float64 as it stands: torch's own path against the drop-in with the same flags."""
    for c in all_of:
        torch_run, _ = runs(c)
        n = max(steps // 10, 1) if c.name == "LBFGS" else steps
        ours = dataclasses.replace(c, path={k: v for k, v in c.path.items() if k != "differentiable"})
        yield {
            "configuration": str(c),
            "path": c.path,
            "float64": largest_difference(torch_run(ours, "float64", seeds, n, optim), torch_run(c, "float64", seeds, n)),
        }
