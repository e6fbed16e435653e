"""How far jopt and the drop-in are from torch, over torch's own table of configurations: docs/parity.md.

Every configuration of `torch.testing._internal.common_optimizers.optim_db` steps 12 problems 1000 times. A gradient is
computed from the parameters that it steps, so that differences feed back; noise keeps it from dying out.

    python -m benchmarks.parity            all, some 20 minutes on two cores: writes docs/parity.{md,png},
                                           tests/data/parity.json
    python -m benchmarks.parity --short    what the tests compare again: writes the JSON's short part alone
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
from collections.abc import Callable
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
from benchmarks import report
from interop import optim

SEEDS, STEPS, SAMPLES = 12, 1000, 50
DOCS = Path(__file__).parent.parent / "docs"
DATA = DOCS.parent / "tests" / "data"
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
    """torch's 187 on the CPU (191 since 2.14); a tensor learning rate as the number that it holds."""
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


def torch_run(
    c: Configuration, dtype: str, seeds: int, steps: int, module: Any = torch.optim, nudge=False
) -> Trajectory:
    """torch's optimizer or the drop-in, all seeds' parameters in one optimizer. `nudge` starts one ulp away."""
    problem = Problem.of(c, seeds, steps)
    # torch's differentiable path steps only what is no leaf of a graph.
    leaf = not c.path.get("differentiable")
    params = [
        [torch.nn.Parameter(to_torch(x[s], dtype), requires_grad=leaf) for s in range(seeds)] for x in problem.start
    ]
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
                for name in (name for name, x in optimizer.state[ps[0]].items() if isinstance(x, torch.Tensor)):
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
                    values |= {f"{name} {k}": x[k] if x.ndim else x for k in range(len(params))}
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
    return (
        start.astype(np.float32).astype(np.float64),
        target,
        np.logspace(0, 3, 64),
        rng.standard_normal((steps, seeds, 64)),
    )


def lbfgs_value_and_grad(c: Configuration, x: Any, target: Any, scale: Any, noise: Any, m: Any) -> Any:
    """A convex function that moves a little with each step, and its gradient; to be maximized the negative of it."""
    e = x.astype(np.float64) - target - noise / 1000
    sign = -1.0 if c.arguments.get("maximize") else 1.0
    return sign * m.sum(scale * e * e / 2 + m.sqrt(1 + e * e)), sign * (scale * e + e / m.sqrt(1 + e * e))


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
                loss, grad = lbfgs_value_and_grad(c, p.detach().numpy(), target[s], scale, noise[i, s], np)
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
        loss, grad = lbfgs_value_and_grad(c, x, target, scale, noise, jnp)
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


AWAY, SINGLE = "torch, an ulp away", "torch's single-tensor path"


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


def over_steps(a: Trajectory, truth: Trajectory) -> list[float]:
    """The RMS error of the parameters at each sample, over all seeds."""
    names = [name for name in truth if name.startswith("param")]
    total = sum(((a[n] - truth[n]) ** 2).reshape(len(a[n]), -1).sum(1) for n in names)
    return [float(f"{x:.4g}") for x in np.sqrt(total / sum(truth[n][0].size for n in names))]


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


def lbfgs_steps(steps: int) -> int:
    """Each of 20 iterations."""
    return max(steps // 100, 2)


def measure(c: Configuration, seeds: int, steps: int, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """The row of one configuration of its own arguments."""
    torch_run, jax_run = runs(c)
    if c.name == "LBFGS":
        steps, dtypes = lbfgs_steps(steps), tuple(d for d in dtypes if d in ("float64", "float32"))
    # What is chaotic scatters: of 12 seeds the median of a ratio moves by a tenth.
    seeds *= {"Muon": 3, "LBFGS": 12}.get(c.name, 1)
    row: dict[str, Any] = {"configuration": str(c)}
    truth = torch_run(c, "float64", seeds, steps)
    row["float64"] = {
        "jopt": largest_difference(jax_run(c, "float64", seeds, steps), truth),
        "interop": largest_difference(torch_run(c, "float64", seeds, steps, optim), truth),
    }
    if max(row["float64"].values()) > 1e-13:
        row["float64"][AWAY] = largest_difference(torch_run(c, "float64", seeds, steps, nudge=True), truth)
    if "float32" in dtypes:
        reference = torch_run(c, "float32", seeds, steps)
        ours = jax_run(c, "float32", seeds, steps)
        row["float32"] = {
            "jopt": ratio(ours, reference, truth),
            "interop": ratio(torch_run(c, "float32", seeds, steps, optim), reference, truth),
            "torch's error": float(np.median(rms_error(reference, truth))),
        }
        if AWAY in row["float64"]:
            row["float32"][AWAY] = ratio(torch_run(c, "float32", seeds, steps, nudge=True), reference, truth)
        if (tx := nearest_in_optax(c)) is not None:
            nearest = jax_run(c, "float32", seeds, steps, tx)
            row["float32"]["optax"] = ratio(nearest, reference, truth)
            if not c.arguments and steps == STEPS:
                row["over steps"] = {
                    name: over_steps(x, truth) for name, x in (("torch", reference), ("jopt", ours), ("optax", nearest))
                }
    for dtype in dtypes:
        if dtype in ("bfloat16", "float16"):
            reference = torch_run(c, dtype, seeds, steps)
            row[dtype] = dict(
                zip(("equal", "ulps"), ulps(jax_run(c, dtype, seeds, steps), reference, dtype), strict=True)
            )
    return row


def measure_path(c: Configuration, seeds: int, steps: int) -> dict[str, Any]:
    """One of torch's table as it stands, in float64: torch's own path against the drop-in with the same flags."""
    torch_run, _ = runs(c)
    steps = lbfgs_steps(steps) if c.name == "LBFGS" else steps
    ours = dataclasses.replace(c, path={k: v for k, v in c.path.items() if k != "differentiable"})
    expected = torch_run(c, "float64", seeds, steps)
    difference = largest_difference(torch_run(ours, "float64", seeds, steps, optim), expected)
    row = {"configuration": str(c), "path": c.path, "float64": difference}
    if difference > 1e-13 and c.path.get("differentiable"):
        single = torch_run(dataclasses.replace(c, path={}), "float64", seeds, steps)
        row[SINGLE] = largest_difference(single, expected)
    return row


# --- the table ---------------------------------------------------------------------------------------

# What the tests repeat: of each optimizer its defaults and the configuration with most arguments.
SHORT = dict(seeds=4, steps=100, dtypes=("float64", "float32", "bfloat16"))


def short_configurations() -> list[Configuration]:
    by_name: dict[str, list[Configuration]] = {}
    for c in distinct(configurations()):
        by_name.setdefault(c.name, []).append(c)
    return [c for cs in by_name.values() for c in (cs[0], max(cs[1:], key=lambda c: len(c.arguments)))]


def _call(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        return job[0](*job[1])


def all_rows(jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count()) as pool:
        return [
            print(f"{i + 1}/{len(jobs)}", row["configuration"], flush=True) or row
            for i, row in enumerate(pool.imap(_call, jobs))
        ]


def machine() -> str:
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, jax, optax, np))
    return f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, {versions}"


def number(x: float | None) -> str:
    if x is None:
        return "-"
    return "0" if x == 0 else f"{x:.1e}" if x < 1e-3 or x >= 1e4 else f"{x:.3f}" if x < 100 else f"{x:.0f}"


def percent(x: float) -> str:
    return "100 %" if x == 1 else f"{np.floor(x * 1000) / 10:.1f} %"


PAGE = """# Parity with torch

Every configuration of torch's own table of optimizers, stepped {steps} times with feedback on {seeds} problems (LBFGS
{lbfgs} times of 20 iterations). `make parity` writes this page; {machine}.

![The error of float32 over the steps](parity.png)

- **float64**: the drop-in stays within {distance} of torch in {drop_in} of {rows} configurations, jopt in JAX in
  {exact}: largest difference over largest value, of each parameter and each tensor of the state.
- **float32**: our root mean square error against torch's float64 trajectory over torch's own, the median over seeds, is
  {low} to {high}; of the {chaotic_rows} that are chaotic {chaotic_low} to {chaotic_high}, where torch scatters too.
- **bfloat16**: {equal} of {bfloat16} configurations end with every parameter equal to the bit.
- **torch's other paths** (fused, differentiable), {paths} configurations in all: the drop-in is within {followed} of
  {n_followed} of them in float64. The other {n_inexact} are Adam, AdamW and NAdam with `differentiable=True`: there
  torch computes the bias corrections in float32, {single} from its own single-tensor path and {inexact} from the
  drop-in.

optax is its nearest optimizer with the same numbers, by the same measure as ours in float32: about 1 is the same
algorithm, more is another one, less has fewer roundings. (optax's AdamW is nearer to the
float64 trajectory than torch's own float32: torch multiplies by `1 - lr * weight_decay` rounded to float32, whose error
adds up; to have torch's numbers is to have that too.) A dash: there is none.

| configuration | float64: jopt | drop-in | float32: jopt | drop-in | optax | bfloat16 equal | ulp | float16 | ulp |
|---|---|---|---|---|---|---|---|---|---|
{table}

ulp is the largest difference in units of the last place of torch's value.

## What is not equal to rounding, and why

Muon iterates in bfloat16: XLA sums matrix products in another order, which rounds an entry of the update the other way
now and then, by 2^-8 of it; the largest difference in ulp is of the smallest parameters. LBFGS with a step of 1
multiplies differences: torch itself, started one unit in the last place away, ends as far from itself. In float32 the
median of such ratios scatters around 1 for torch too. The drop-in's products and vectors are torch's.

| configuration | float64: jopt | drop-in | torch, an ulp away | float32: jopt | drop-in | torch, an ulp away |
|---|---|---|---|---|---|---|
{chaotic}
"""


def markdown(result: dict[str, Any]) -> str:
    rows, paths = result["rows"], result["paths"]
    chaotic = [r for r in rows if AWAY in r["float64"]]
    exact = [r for r in rows if r not in chaotic]
    inexact = [r for r in paths if SINGLE in r]
    followed = [r for r in paths if r not in inexact]
    ratios = [r["float32"][side] for r in exact for side in ("jopt", "interop")]
    scattered = [r["float32"][side] for r in chaotic for side in ("jopt", "interop")]
    distance = max(r["float64"][side] for r in exact for side in ("jopt", "interop"))
    low = [r["bfloat16"] for r in rows if "bfloat16" in r]

    def line(r: dict[str, Any], *cells: str) -> str:
        return "| " + " | ".join((f"`{r['configuration']}`", *cells)) + " |"

    def cells(r: dict[str, Any]) -> list[str]:
        found = [number(r["float64"][side]) for side in ("jopt", "interop")]
        found += [number(r["float32"].get(side)) for side in ("jopt", "interop", "optax")]
        for dtype in ("bfloat16", "float16"):
            found += [percent(r[dtype]["equal"]), number(r[dtype]["ulps"])] if dtype in r else ["-", "-"]
        return found

    return PAGE.format(
        steps=result["steps"],
        seeds=result["seeds"],
        lbfgs=lbfgs_steps(result["steps"]),
        machine=result["machine"],
        exact=len(exact),
        drop_in=sum(r["float64"]["interop"] <= distance for r in rows),
        rows=len(rows),
        distance=number(distance),
        low=number(min(ratios)),
        high=number(max(ratios)),
        chaotic_rows=len(chaotic),
        chaotic_low=number(min(scattered)),
        chaotic_high=number(max(scattered)),
        equal=sum(x["equal"] == 1 for x in low),
        bfloat16=len(low),
        paths=len(paths),
        followed=number(max(r["float64"] for r in followed)),
        n_followed=len(followed),
        n_inexact=len(inexact),
        single=number(max((r[SINGLE] for r in inexact), default=0)),
        inexact=number(max((r["float64"] for r in inexact), default=0)),
        table="\n".join(line(r, *cells(r)) for r in rows),
        chaotic="\n".join(
            line(r, *(number(r[dtype][k]) for dtype in ("float64", "float32") for k in ("jopt", "interop", AWAY)))
            for r in chaotic
        ),
    )


def picture(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [r for r in result["rows"] if "over steps" in r]
    columns = 4
    height = -(-len(rows) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(13, 2.6 * height), sharex=True, layout="constrained")
    steps = [i + 1 for i in sample_steps(result["steps"])]
    styles = {"torch": dict(color="#d95f02", lw=4, alpha=0.45), "optax": dict(color="#7570b3", lw=1.4, ls="--")}
    styles["jopt"] = dict(color="#1b9e77", lw=1.4)
    for ax in axes.flat[len(rows) :]:
        ax.remove()
    for ax, r in zip(axes.flat, rows, strict=False):
        for name in ("torch", "jopt", "optax"):
            ax.plot(steps, r["over steps"][name], label=name, **styles[name])
        ax.set_yscale("log")
        ax.set_title(r["configuration"].removesuffix("()"), fontsize=10)
        ax.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel("step")
    figure.supylabel("RMS error of float32 parameters against torch in float64")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the short part alone")
    parser.add_argument("--only", default="", help="measure these optimizers again, comma-separated: Adam,SGD")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else []
    file = DATA / "parity.json"
    result = json.loads(file.read_text()) if file.exists() else {}

    def measured(part: str, function: Callable[..., Any], configurations: list[Configuration], *rest: Any) -> None:
        """Put the rows of the part's configurations, measured again where they are wanted."""
        again = [c for c in configurations if not wanted or c.name in wanted]
        rows = iter(all_rows([(function, (c, *rest)) for c in again]))
        old = result.get(part, [None] * len(configurations))
        result[part] = [next(rows) if c in again else row for c, row in zip(configurations, old, strict=True)]

    measured("short", measure, short_configurations(), *SHORT.values())
    if not arguments.short:
        everything = configurations()
        result |= dict(machine=machine(), seeds=SEEDS, steps=STEPS)
        measured("rows", measure, distinct(everything), SEEDS, STEPS, tuple(DTYPES))
        measured("paths", measure_path, everything, SEEDS, STEPS)
    file.write_text(report.as_json(result, digits=None) + "\n")
    if not arguments.short:
        (DOCS / "parity.md").write_text(report.wrapped(markdown(result)))
        picture(result, DOCS / "parity.png")


if __name__ == "__main__":
    main()
