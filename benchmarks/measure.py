"""How things are measured here: interleaved rounds, on two threads, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import inspect
import json
import logging
import math
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch
from tqdm import tqdm

import jopt
from benchmarks.shapes import Shapes
from interop import optim
from interop.dropin import native
from jopt.fusion import fuses_outputs

THREADS = 2
OURS, IN_PYTHON, COMPILE = "interop.optim", "read in Python", "torch.compile"
PATHS = ("default", "foreach", "fused")
Times = dict[str, np.ndarray]  # variant -> seconds, (rounds, figures a call)


def prepare() -> None:
    """Two threads each; before JAX starts, which counts the processors that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    torch.set_num_threads(THREADS)
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("torch").setLevel(logging.ERROR)  # torch.compile says that profilers are ignored


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "processors used": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "torch threads": torch.get_num_threads(),
        "gradients read in": "Python" if native.extension is None else "C++",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, jax, optax, np, jopt)},
    }


def read_natively() -> None:
    """Let C++ read the gradients, where it can be compiled."""
    try:
        native.enable_native_reader()
    except RuntimeError as error:
        warnings.warn(str(error), stacklevel=2)


@contextlib.contextmanager
def reading_in_python() -> Iterator[None]:
    """Around the first step of an optimizer: its gradients are then read in Python for as long as nothing changes."""
    extension, native.extension = native.extension, None
    try:
        yield
    finally:
        native.extension = extension


def flag(*, own: bool) -> str:
    """Whether several outputs share a loop: in the drop-in's own programs, or in all of this process."""
    return "on" if fuses_outputs(own=own) else "off"


# --- rounds ------------------------------------------------------------------------------------------


def interleave(label: str, variants: dict[str, Callable[[int], Any]], seconds: float) -> tuple[dict[str, float], Times]:
    """Run every variant once a round, in turn, for about as long as `seconds`; the order is drawn.

    A ratio of a round then holds when the machine's speed drifts.

    Args:
      variants: take the number of the round, prepare what is not counted, and return the seconds that are; or several
        such figures.

    Returns:
      The first call of each, and the rounds after it.
    """
    first = {name: float(np.ravel(run(0))[0]) for name, run in variants.items()}
    for i in (1, 2):  # torch.compile compiles twice where a state begins as None
        start = time.perf_counter()
        for run in variants.values():
            run(i)
    rounds = min(max(5, math.ceil(seconds / (time.perf_counter() - start))), 201)
    times: dict[str, list[Any]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(0).shuffle
    for i in tqdm(range(3, 3 + rounds), desc=label, leave=False, disable=None):
        shuffle(order)  # in a rotation each would follow the same one nearly always
        for name in order:
            times[name].append(variants[name](i))
    gc.collect()
    return first, {name: np.array(x).reshape(rounds, -1) for name, x in times.items()}


def ratio(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The median of the rounds' ratios."""
    return float(np.median(theirs / ours))


def compare(first: dict[str, float], times: Times, rivals: tuple[str, ...], column: int = 0) -> dict[str, Any]:
    """A row: the medians, the rival with the lowest, and its time over ours, which is the first variant."""
    seconds = {name: x[:, column] for name, x in times.items()}
    ours = next(iter(seconds.values()))
    best = min((name for name in rivals if name in seconds), key=lambda name: np.median(seconds[name]))
    row: dict[str, Any] = {f"{name}, ms": 1e3 * float(np.median(x)) for name, x in seconds.items()}
    row |= {"best": best, "best / ours": ratio(seconds[best], ours)}
    if COMPILE in seconds:
        row[f"{COMPILE} / ours"] = ratio(seconds[COMPILE], ours)
    row["detail"] = {
        name: {
            "first_call_ms": 1e3 * first[name],
            "min_ms": 1e3 * float(x.min()),
            "quartiles_ms": [1e3 * float(q) for q in np.quantile(x, (0.25, 0.75))],
            "over_ours": ratio(x, ours),
            "over_ours_quartiles": [float(q) for q in np.quantile(x / ours, (0.25, 0.75))],
            "rounds": len(x),
        }
        for name, x in seconds.items()
    }
    return row


class Add:
    """a += b, three passes over memory, in place as a step: what the machine's memory gives."""

    def __init__(self, n: int):
        self.n = min(n, 2**25)
        self.a, self.b = torch.zeros(self.n), torch.full((self.n,), 1e-3)

    def __call__(self, i: int) -> float:
        start = time.perf_counter()
        self.a.add_(self.b)
        return time.perf_counter() - start

    def seconds_a_pass(self, times: np.ndarray, n: int) -> np.ndarray:
        """For n elements."""
        return times / 3 * n / self.n


# --- torch's optimizers ------------------------------------------------------------------------------


class TorchStep:
    """A torch optimizer over tensors of these shapes, or what `update` makes of it.

    Gradients are fresh tensors at every step, as backward leaves them after zero_grad(set_to_none=True), and the
    learning rate changes. Neither is counted.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        shapes: Shapes,
        grads: list[torch.Tensor],
        update: Callable[[Any], Callable[[], Any]] = lambda optimizer: optimizer.step,
        **arguments: Any,
    ):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in shapes]
        self.grads = grads
        self.optimizer = make(self.params, **arguments)
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.update = update(self.optimizer)

    def __call__(self, i: int) -> float:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g.clone()
        set_lr(self.optimizer, self.lr * (1 + 0.01 * (i % 10)))
        start = time.perf_counter()
        self.update()
        seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        return seconds


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def gradients(shapes: Shapes, scale: float = 1e-3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator) * scale for s in shapes]


def paths(name: str) -> dict[str, tuple[type, dict[str, Any]]]:
    """Ours and torch's own paths of an optimizer: the class, and the argument that chooses the path."""
    native = getattr(torch.optim, name)
    choices = inspect.signature(native).parameters
    found = {OURS: (getattr(optim, name), {}), "default": (native, {})}
    return found | {path: (native, {path: True}) for path in ("foreach", "fused") if path in choices}


def compiled(f: Callable[[], Any]) -> Callable[[], Any]:
    """torch.compile of a step. Give its optimizer lr as a tensor, or it compiles again for every value."""
    torch._dynamo.reset()  # or the programs before count against its limit
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(f)


# --- processes ---------------------------------------------------------------------------------------


def in_own_process(function: Callable[..., Any], *arguments: Any, **environment: str | None) -> Any:
    """What a module's function returns in a process of its own; None takes a variable out of the environment."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    call = json.dumps([function.__module__, function.__name__, arguments])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", call], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name, arguments = json.loads(sys.argv[1])
    prepare()
    read_natively()
    print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
