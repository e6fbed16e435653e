"""A whole update: clip the global norm, step with AdamW, keep an average of the weights; and with a gradient scaler.

Ours is `optim.AdamW(params, max_norm=1.0, ema=0.999)` and one call; torch's are `clip_grad_norm_`, the fused step and a
foreach lerp, each the fastest that torch has, or torch.compile of the three. The scaler's `unscale_`, `step` and
`update` are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import COMPILE, OURS, TorchStep
from benchmarks.report import Figure, Section, Target
from benchmarks.shapes import MODELS
from interop import amp, optim

MAX_NORM, DECAY, SCALE = 1.0, 0.999, 1024.0
CLIPS = {"clip, fused, lerp": None, "foreach clip, fused, lerp": True}


def composition(foreach: bool | None, scaler: Any = None) -> Callable[[Any], Callable[[], Any]]:
    """torch's three calls, in the order of a training loop."""

    def of(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        params = optimizer.param_groups[0]["params"]
        averages = [p.detach().clone() for p in params]

        @torch.no_grad()
        def update() -> None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            torch._foreach_lerp_(averages, params, 1 - DECAY)

        return update

    return of


def scaled(scaler: Any) -> Callable[[Any], Callable[[], Any]]:
    def of(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def update() -> None:
            scaler.step(optimizer)
            scaler.update()

        return update

    return of


def make_scaler(make: Any) -> Any:
    scaler = make("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))  # it makes its tensors when it scales the first loss
    return scaler


def run(short: bool) -> Section:
    tables: dict[str, list[Any]] = {"Clip, step, average": [], "The same with a gradient scaler": []}
    for model in ("tiny",) if short else ("mlp", "resnet50", "gpt2_small"):
        shapes = MODELS[model]()
        for title, rows in tables.items():
            amps = "scaler" in title
            grads = measure.gradients(shapes, 1e-3 * (SCALE if amps else 1))
            ours = scaled(make_scaler(amp.GradScaler)) if amps else (lambda optimizer: optimizer.step)
            variants = {OURS: TorchStep(optim.AdamW, shapes, grads, ours, max_norm=MAX_NORM, ema=DECAY)}
            for name, foreach in CLIPS.items():
                theirs = composition(foreach, make_scaler(torch.amp.GradScaler) if amps else None)
                variants[name] = TorchStep(torch.optim.AdamW, shapes, grads, theirs, fused=True)
            if model in ("mlp", "resnet50") and not amps:  # a scaler asks the host whether to step; GPT-2 takes minutes
                variants[COMPILE] = TorchStep(
                    torch.optim.AdamW,
                    shapes,
                    grads,
                    lambda o: measure.compiled(composition(None)(o)),
                    lr=torch.tensor(1e-3),
                )
            seconds = {"tiny": 0.1, "mlp": 2, "resnet50": 10, "gpt2_small": 15}[model]
            compared = measure.compare(*measure.interleave(f"{title}, {model}", variants, seconds), tuple(CLIPS))
            rows.append({"shapes": model} | compared | {"flag": measure.flag(own=True)})
            del variants
    figures = [
        Figure(title, "ms (median)", [r["shapes"] for r in rows],
               {n: [r.get(f"{n}, ms") for r in rows] for n in (OURS, *CLIPS, COMPILE) if f"{n}, ms" in rows[0]})
        for title, rows in tables.items()
    ]  # fmt: skip
    targets = [
        Target(f"{title}, {r['shapes']}: torch's best composition over ours", aim, r["best / ours"])
        for (title, rows), aim in zip(tables.items(), (1.2, 1.35), strict=True)
        for r in rows
    ]
    return Section("A whole update", __doc__, tables, figures, targets)
