"""One step of a torch optimizer: the drop-in, torch's own paths, and torch.compile of the step."""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from benchmarks import measure
from benchmarks.measure import COMPILE, IN_PYTHON, OURS, PATHS, Add, TorchStep
from benchmarks.report import Figure, Row, Section, Target
from benchmarks.shapes import MODELS
from interop import optim
from interop.dropin import host, program

OPTIMIZERS = {
    "AdamW": dict(),
    "Adam": dict(),
    "SGD": dict(momentum=0.9),
    "Adagrad": dict(),
    "Adadelta": dict(),
    "Adamax": dict(),
    "NAdam": dict(),
    "RAdam": dict(),
    "RMSprop": dict(),
    "Rprop": dict(),
    "ASGD": dict(),
}
# Compiling takes torch more than a minute for a model of 150 tensors.
COMPILED = {"mlp": tuple(OPTIMIZERS), "resnet50": ("AdamW", "SGD"), "gpt2_small": ("AdamW",), "tiny": ()}
SECONDS = {"mlp": 1.5, "resnet50": 5, "gpt2_small": 6, "tiny": 0.1}


def run(short: bool) -> Section:
    rows: list[Row] = []
    for model in ("tiny",) if short else ("mlp", "resnet50", "gpt2_small"):
        for name in ("AdamW", "RMSprop") if short else OPTIMIZERS:
            rows.append(row(model, name))
    labels = [f"{r['optimizer']}, {r['shapes']}" for r in rows]
    series = {name: [r.get(f"{name}, ms") for r in rows] for name in (OURS, IN_PYTHON, *PATHS, COMPILE)}
    models = list(dict.fromkeys(r["shapes"] for r in rows))
    figures = []
    for model in models:
        at = [i for i, r in enumerate(rows) if r["shapes"] == model]
        figures.append(
            Figure(
                f"One step, {model}", "ms (median)", [labels[i] for i in at],
                {k: [v[i] for i in at] for k, v in series.items() if any(v[i] is not None for i in at)},
            )
        )  # fmt: skip
    return Section("A step of the drop-in", __doc__ + NOTE, {"One step": rows}, figures, targets(rows))


NOTE = """
Gradients are fresh tensors and the learning rate changes at every step. `best` is torch's fastest path of default,
foreach and fused. Gradients are read in C++ (`interop.enable_native_reader()`), in `read in Python` without that call.
`programs alone` are the drop-in's compiled programs with their arguments at hand, without all that
a torch optimizer's step does around them. `share of floor` is the time that the passes which the step cannot do without
would take, at the speed of a three-pass add measured in the same rounds (in cache, for the small model), over ours.
torch.compile takes minutes, and is left out where it would take most of the time. The flag is XLA's fusion of several
outputs in the drop-in's programs."""


class Alone:
    """The compiled programs of the drop-in's step, their arguments at hand: what it cannot be faster than."""

    def __init__(self, step: TorchStep):
        step(0)
        self.kept = step  # whose memory they step
        for p, g in zip(step.params, step.grads, strict=True):
            p.grad = g.clone()
        step.optimizer.step()
        optimizer = step.optimizer
        plan = optimizer._plan
        grads = plan.as_before(optimizer, plan.rules)
        self.calls = []
        for work, update in zip(plan.turn.works, plan.programs(optimizer).updates, strict=True):
            bucket = work.bucket
            table = bucket.coefficients.table
            call = update, bucket.buffers, grads.arrays(work), table, bucket.leaf_of_row, {}
            self.calls.append((bucket.device, *call))

    def __call__(self, i: int) -> float:
        for device, *_ in self.calls:
            device.begin()
        with host.settings():
            start = time.perf_counter()
            for call in self.calls:
                call[0].after(program.launch(*call))
            return time.perf_counter() - start


def row(model: str, name: str) -> Row:
    shapes = MODELS[model]()
    grads = measure.gradients(shapes)
    n = sum(math.prod(s) for s in shapes)
    variants = {
        path: TorchStep(make, shapes, grads, **OPTIMIZERS[name], **choice)
        for path, (make, choice) in measure.paths(name).items()
    }
    with measure.reading_in_python():
        variants[IN_PYTHON] = TorchStep(getattr(optim, name), shapes, grads, **OPTIMIZERS[name])
        variants[IN_PYTHON](0)
    if name in COMPILED[model]:
        native = getattr(torch.optim, name)
        lr = torch.tensor(variants["default"].lr)
        variants[COMPILE] = TorchStep(
            native, shapes, grads, lambda o: measure.compiled(o.step), **OPTIMIZERS[name], lr=lr
        )
    add = Add(n)
    others = {"add": add, "alone": Alone(TorchStep(getattr(optim, name), shapes, grads, **OPTIMIZERS[name]))}
    first, times = measure.interleave(f"{name}, {model}", {**variants, **others}, SECONDS[model])
    a_pass = add.seconds_a_pass(times.pop("add")[:, 0], n)
    alone = times.pop("alone")[:, 0]
    # p and g are read, p is written, each state is both.
    state = variants["default"].optimizer.state
    passes = (
        3 + 2 * sum(x.numel() for p in state for x in state[p].values() if isinstance(x, torch.Tensor) and x.dim()) / n
    )
    compared = measure.compare(first, times, PATHS)
    compared[f"best / {IN_PYTHON}"] = measure.ratio(times[compared["best"]][:, 0], times[IN_PYTHON][:, 0])
    detail = compared.pop("detail")
    return {
        "optimizer": name,
        "shapes": model,
        **compared,
        "programs alone, ms": 1e3 * float(np.median(alone)),
        "share of floor": float(np.median(passes * a_pass / times[OURS][:, 0])),
        "first call, ms": 1e3 * first[OURS],
        "flag": measure.flag(own=True),
        "detail": detail | {"passes": passes, "GB/s of the add": 4e-9 * n / float(np.median(a_pass))},
    }  # fmt: skip


def targets(rows: list[Row]) -> list[Target]:
    found = []
    for model in dict.fromkeys(r["shapes"] for r in rows):
        of_model = [r for r in rows if r["shapes"] == model]
        if model in ("mlp", "tiny"):
            default = {r["optimizer"]: r["default, ms"] / r[f"{OURS}, ms"] for r in of_model}
            kinds = [("torch's default over ours", default, 1.0)]
        else:
            fused = {r["optimizer"]: r["best / ours"] for r in of_model if "fused, ms" in r}
            # 2.5 times torch's best, or 85 % of the floor where that is nearer.
            others = {
                r["optimizer"]: max(r["best / ours"], r["share of floor"] / 0.85 * 2.5)
                for r in of_model
                if "fused, ms" not in r
            }
            kinds = [
                ("torch has a fused path: torch's best over ours", fused, 0.9),
                ("torch has none: torch's best over ours, or share of floor / 0.85 * 2.5", others, 2.5),
            ]
        for kind, ratios, aim in kinds:
            worst = min(ratios, key=ratios.__getitem__)
            found.append(Target(f"{model}, where {kind}, the worst ({worst})", aim, ratios[worst]))
    return found
