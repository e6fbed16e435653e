"""Steps of FSDP2's parameters in 2 and 4 processes on gloo, beside torch's own: time, matrix products, traffic.

Products and bytes are counted from the operations of one step, which a clock does not enter: multiplications of matrix
products in the busiest process, and bytes that it receives from others (an all-reduce as a ring moves it). Processes
share the machine's two processors, so that a time is that of all together, with one thread each."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.measure import OURS
from benchmarks.report import Figure, Row, Section, Target
from interop import optim
from interop.dropin.exchange import products

WORLDS = (2, 4)


def shapes(short: bool) -> list[tuple[int, ...]]:
    """A transformer's matrices: four layers, and a matrix that is alone of its shape."""
    d = 64 if short else 256
    return [*([(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]) * (1 if short else 4), (3 * d, d)]


class Counting(TorchDispatchMode):
    """Counts multiplications of matrix products, and bytes that this process receives."""

    def __init__(self, world: int):
        super().__init__()
        self.world, self.products, self.received = world, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(x, DTensor) for x in types):
            return NotImplemented  # what it is made of comes here
        out = func(*args, **(kwargs or {}))
        name, tensors = func._schema.name, [x for x in args if isinstance(x, torch.Tensor)]
        others = self.world - 1
        if name.startswith("aten::") and name[6:] in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = tensors[-2:]
            self.products += a.numel() * b.shape[-1]
        elif "all_gather" in name or "allgather" in name:
            self.received += others * nbytes(_flat(args[-3:] if name[:6] == "c10d::" else args[0]))
        elif "reduce_scatter" in name:
            self.received += others / self.world * nbytes(_flat(args[0]))
        elif "all_reduce" in name or "allreduce" in name:
            self.received += 2 * others / self.world * nbytes(_flat(args[0]))
        elif "alltoall" in name:
            splits = args[3]
            self.received += nbytes([args[0]]) * (1 - splits[dist.get_rank()] / max(1, sum(splits)))
        return out


def _flat(x: Any) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else [y for part in x for y in _flat(part)] if isinstance(x, list) else []


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


CASES: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "Muon": ("Muon", {"lr": 0.01}, None),
    "Adafactor": ("Adafactor", {"lr": 0.01}, None),
    "AdamW, clipped": ("AdamW", {"lr": 0.01}, 1.0),
}


def stepper(module: Any, case: str, mesh: Any, short: bool) -> Callable[[int], float]:
    """A step with fresh gradients, as a function of the round; it returns the step's seconds."""
    name, arguments, max_norm = CASES[case]
    ours = module is optim

    def part(i: int, shape: tuple[int, ...]) -> torch.Tensor:
        return distribute_tensor(torch.randn(shape, generator=torch.Generator().manual_seed(i)), mesh, [Shard(0)])

    params = [torch.nn.Parameter(part(i, shape)) for i, shape in enumerate(shapes(short))]
    grads = [part(1000 + i, shape) for i, shape in enumerate(shapes(short))]
    opt = getattr(module, name)(params, **arguments, **({"max_norm": max_norm} if ours and max_norm else {}))

    def step(_: int) -> float:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        dist.barrier()
        start = time.perf_counter()
        if max_norm and not ours:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        opt.step()
        dist.barrier()
        return time.perf_counter() - start

    return step


def worker(rank: int, world: int, store: str, short: bool, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    rows: list[Row] = []
    for case in CASES:
        steps = {OURS: stepper(optim, case, mesh, short)}
        if case != "Adafactor":  # torch's does not step DTensors
            steps["torch.optim"] = stepper(torch.optim, case, mesh, short)
        row: Row = {"processes": world, "step": case}
        for name, step in steps.items():
            for i in range(3):
                step(i)
            with Counting(world) as counted:
                step(3)
            most = torch.tensor([counted.products, counted.received], dtype=torch.float64)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            row[f"{name}: products, M"], row[f"{name}: received, kB"] = (most / torch.tensor([1e6, 1e3])).tolist()
        # Not `measure.interleave`, whose number of rounds a clock tells: processes have to step as often as each other.
        shuffle, order = random.Random(0).shuffle, list(steps)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(3 if short else 40):
            shuffle(order)
            for name in order:
                times[name].append(steps[name](i))
        row |= {f"{name}, ms": 1e3 * float(np.median(x)) for name, x in times.items()}
        if len(times) == 2:
            theirs, ours = (np.array(times[name]) for name in ("torch.optim", OURS))
            row["torch.optim / ours"] = measure.ratio(theirs, ours)
        rows.append(row)
    if rank == 0:
        torch.save(rows, path)
    dist.barrier()
    dist.destroy_process_group()


def run(short: bool) -> Section:
    rows: list[Row] = []
    for world in WORLDS[: 1 if short else None]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows"
            arguments = world, f"file://{folder}/store", short, str(path)
            torch.multiprocessing.spawn(worker, arguments, nprocs=world)  # type: ignore[reportPrivateImportUsage]
            rows += torch.load(path)
    sizes = [math.prod(shape) for shape in shapes(short)]
    turns = 5  # of Muon's iteration
    costs = [turns * products(shape) for shape in shapes(short)]
    targets = []
    for row in rows:
        what = f"{row['processes']} processes, {row['step']}"
        if row["step"] == "Muon":
            most = (sum(costs) / row["processes"] + max(costs)) / 1e6
            targets.append(Target(f"{what}: products, M", most, row[f"{OURS}: products, M"], at_most=True))
            most = 2 * 2 * sum(sizes) / 1e3
            targets.append(Target(f"{what}: received, kB", most, row[f"{OURS}: received, kB"], at_most=True))
        if row["step"] == "Adafactor":
            most = 2 * 4 * sum(map(sum, shapes(short))) / 1e3
            targets.append(Target(f"{what}: received, kB", most, row[f"{OURS}: received, kB"], at_most=True))
    labels = [f"{row['step']}, {row['processes']} processes" for row in rows]
    series = {name: [row.get(f"{name}, ms") for row in rows] for name in (OURS, "torch.optim")}
    return Section(
        "Several processes", __doc__ or "", {"Steps": rows}, [Figure("A step", "ms (median)", labels, series)], targets
    )
