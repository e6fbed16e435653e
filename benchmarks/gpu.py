"""The drop-in on a GPU beside torch's fused and foreach steps: `make bench-gpu`, under four minutes on a large card.

Both sides step the same tensors' shapes in the same stream, back to back; CUDA's events tell the time of a round of
steps, and rounds alternate. Ratios are medians of torch's time over ours: above 1 ours is faster. Writes
benchmarks/results/gpu.md and gpu.json, with the card, the driver and the versions.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import torch

from benchmarks import report
from benchmarks.report import Row, Target
from benchmarks.shapes import MODELS, Shapes
from interop import amp, optim

GPU = torch.device("cuda", 0)
ROUNDS, WARM = 9, 3
OURS = "ours"
FUSED = ("AdamW", "Adam", "SGD", "Adagrad")
OTHERS = ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "Adafactor", "Muon")
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "Muon": {"lr": 1e-3}}


def billion() -> Shapes:
    """290 tensors, 1.0 B parameters: a GPT of 32 blocks of 1536, with a vocabulary of 50257."""
    d = 1536
    block: Shapes = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *itertools.chain.from_iterable(itertools.repeat(block, 32)), (d,), (d,)]


SHAPES: dict[str, Callable[[], Shapes]] = {**MODELS, "billion": billion}


class Side:
    """An optimizer over parameters of its own; the gradients both sides share."""

    def __init__(self, make: Callable[[list[torch.nn.Parameter]], Callable[[], Any]], grads: list[torch.Tensor]):
        self.params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.step = make(self.params)

    def time(self, steps: int) -> float:
        """Seconds a step of the GPU's, back to back."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            self.step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / steps

    def host(self) -> float:
        """Seconds of the call, while the GPU has other work."""
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


def compared(sides: dict[str, Side], steps: int) -> dict[str, list[float]]:
    """The seconds a step of each side, in rounds that alternate."""
    for side in sides.values():
        side.time(WARM)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(ROUNDS):
        order = list(sides.items())
        for name, side in order if i % 2 else order[::-1]:
            found[name].append(side.time(steps))
    return found


def ratio(times: dict[str, list[float]], rival: str) -> float:
    return statistics.median(a / b for a, b in zip(times[rival], times[OURS], strict=True))


def gradients(shapes: Shapes) -> list[torch.Tensor]:
    return [torch.randn(s, device=GPU) for s in shapes]


def makes(name: str, shapes: Shapes) -> dict[str, Any]:
    options = OPTIONS.get(name, {})
    rivals = {"foreach": {"foreach": True}} | ({"fused": {"fused": True}} if name in FUSED else {})
    if name == "Muon":
        rivals = {"foreach": {}}
    found = {OURS: lambda p: getattr(optim, name)(p, **options).step}
    for rival, path in rivals.items():
        found[rival] = lambda p, path=path: getattr(torch.optim, name)(p, **options, **path).step
    return found


def passes_bandwidth() -> float:
    """Bytes a second of torch's copy, read and written."""
    x = torch.zeros(2**28, device=GPU)
    y = torch.empty_like(x)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * x.nbytes / statistics.median(times)


def kernels(step: Callable[[], Any]) -> int | None:
    """How many kernels a step launches, copies included."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in found.events() or [])


def steps_of(n: int) -> int:
    return max(3, min(50, int(2e9 / max(n, 1))))


def models() -> Iterator[tuple[Row, Row]]:
    """For each model and optimizer of which torch has a fused step: times; and what a step costs besides."""
    speed = passes_bandwidth()
    free = torch.cuda.mem_get_info()[0]
    for model, make_shapes in SHAPES.items():
        shapes = make_shapes()
        n = sum(map(math.prod, shapes))
        if model == "tiny" or 4 * n * 14 > free:
            continue
        grads = gradients(shapes)
        for name in FUSED:
            gc.collect()
            torch.cuda.empty_cache()
            begin = torch.cuda.memory_allocated()
            sides = {OURS: Side(makes(name, shapes)[OURS], grads)}
            start = time.perf_counter()
            sides[OURS].step()
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            held = torch.cuda.memory_allocated() - begin
            sides |= {rival: Side(make, grads) for rival, make in makes(name, shapes).items() if rival != OURS}
            times = compared(sides, steps_of(n))
            ours = statistics.median(times[OURS])
            states = {"SGD": 1, "Adagrad": 1}.get(name, 2)
            hosts = {side: statistics.median(sides[side].host() for _ in range(9)) for side in (OURS, "fused")}
            row = {
                "model": model,
                "optimizer": name,
                "ms": 1e3 * ours,
                "over fused": ratio(times, "fused"),
                "over foreach": ratio(times, "foreach"),
                "of copy's speed": 4 * n * (3 + 2 * states) / ours / speed,
            }
            cost = {
                "model": model,
                "optimizer": name,
                "host, ms": 1e3 * hosts[OURS],
                "fused's host, ms": 1e3 * hosts["fused"],
                "kernels": kernels(sides[OURS].step),
                "memory over tensors": held / (4 * n * (1 + states)) - 1,
                "first step, s": first,
            }
            del sides
            yield row, cost


def others() -> Iterator[Row]:
    """The classes of which torch has no fused step."""
    for model, name in itertools.product(("resnet50", "gpt2_small"), OTHERS):
        shapes = [s for s in SHAPES[model]() if name != "Muon" or len(s) == 2]
        if name == "Muon" and model == "resnet50":
            continue
        grads = gradients(shapes)
        times = compared({side: Side(make, grads) for side, make in makes(name, shapes).items()}, 5)
        yield {
            "model": model,
            "optimizer": name,
            "ms": 1e3 * statistics.median(times[OURS]),
            "over foreach": ratio(times, "foreach"),
        }


def composition() -> Iterator[Row]:
    """Unscaling, clipping, AdamW and an average of the weights: one step of ours, and torch's best parts."""
    for model in ("resnet50", "gpt2_small"):
        grads = gradients(SHAPES[model]())

        def ours(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
            optimizer = optim.AdamW(params, max_norm=1.0, ema=0.999)
            scaler = amp.GradScaler("cuda", init_scale=1.0, growth_interval=10**9)
            scaler.scale(torch.ones((), device=GPU))

            def step() -> None:
                scaler.step(optimizer)
                scaler.update()

            return step

        def theirs(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
            optimizer = torch.optim.AdamW(params, fused=True)
            scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=10**9)
            scaler.scale(torch.ones((), device=GPU))
            average = [p.detach().clone() for p in params]

            def step() -> None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
                scaler.step(optimizer)
                scaler.update()
                with torch.no_grad():
                    torch._foreach_lerp_(average, params, 1 - 0.999)  # type: ignore[attr-defined]

            return step

        sides = {OURS: Side(ours, grads), "torch": Side(theirs, grads)}
        times = compared(sides, 10)
        yield {
            "model": model,
            "ms": 1e3 * statistics.median(times[OURS]),
            "over torch's parts": ratio(times, "torch"),
            "kernels": kernels(sides[OURS].step),
            "torch's kernels": kernels(sides["torch"].step),
        }


def targets(speeds: list[Row], costs: list[Row], rest: list[Row], composed: list[Row]) -> Iterator[Target]:
    def least(rows: list[Row], column: str, *models: str) -> float:
        return min((r[column] for r in rows if r["model"] in models), default=math.nan)

    yield Target("over fused, 124 M and 1 B", 1.0, least(speeds, "over fused", "gpt2_small", "billion"))
    yield Target("over fused, ResNet-50", 0.9, least(speeds, "over fused", "resnet50"))
    yield Target("over foreach, a perceptron of 10 tensors", 1.0, least(speeds, "over foreach", "mlp"))
    yield Target("other classes over foreach", 3.0, least(rest, "over foreach", "resnet50", "gpt2_small"))
    yield Target("unscale, clip, AdamW, average", 1.4, least(composed, "over torch's parts", "resnet50", "gpt2_small"))
    yield Target("of the copy's speed, 124 M and 1 B", 0.9, least(speeds, "of copy's speed", "gpt2_small", "billion"))
    host = max((r["host, ms"] / r["fused's host, ms"] for r in costs), default=math.nan)
    yield Target("the host's time over fused's", 1.0, host, at_most=True)
    held = max((r["memory over tensors"] for r in costs if r["model"] != "mlp"), default=math.nan)
    yield Target("memory over the tensors", 0.02, held, at_most=True)


def machine() -> dict[str, Any]:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(GPU),
        "driver": subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0],
        "torch": torch.__version__,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
    }


def main(out: Path) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: expected a GPU that torch has, found none")
    warnings.simplefilter("error", RuntimeWarning)  # a copy that was not to be
    start = time.perf_counter()
    pairs = list(models())
    speeds, costs = [row for row, _ in pairs], [row for _, row in pairs]
    composed, rest = list(composition()), list(others())
    aims = list(targets(speeds, costs, rest, composed))
    tables = {"Steps": speeds, "What a step costs besides": costs, "Around the step": composed, "Other classes": rest}
    verdicts = [
        {"what": x.what, "target": x.target, "reached": x.reached, "": "met" if x.met else "missed"} for x in aims
    ]
    content = {"machine": machine(), "seconds": round(time.perf_counter() - start), "tables": tables}
    content["targets"] = [dataclasses.asdict(x) for x in aims]
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(report.as_json(content) + "\n")
    lines = ["# On a GPU", "", *str(__doc__).split("\n\n")[1].splitlines(), "", *report.table(verdicts), ""]
    for title, rows in tables.items():
        lines += [f"## {title}", "", *report.table(rows), ""]
    page = report.wrapped("\n".join([*lines, *report.about(machine())]) + "\n")
    (out / "gpu.md").write_text(page)
    print(page)
    print(json.dumps(content["seconds"]), "s")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "results")
