"""What a checkpoint holds, as JSON and as a page."""

from __future__ import annotations

import collections
import math
from typing import Any

from torch import Tensor

from interop.dropin.options import EXECUTION
from interop.runs.files.run import Checkpoint, OptimizerState


def of(run: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds, as JSON."""
    return {
        "step": run.step,
        "params": [_tensor(x) | {"name": name} for name, x in run.params.items()],
        "buffers": [_tensor(x) | {"name": name} for name, x in run.buffers.items()],
        "optimizer": None if run.optimizer is None else _optimizer(run.optimizer),
        "extra": list(run.extra),
        "oddities": run.oddities(),
    }


def _optimizer(optimizer: OptimizerState) -> dict[str, Any]:
    tensors = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
    return {
        "name": optimizer.name,
        "bytes": sum(map(_size, tensors)),
        "groups": [plain(group) for group in optimizer.groups],
        "state": plain(optimizer.state),
    }


def _tensor(x: Tensor) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "bytes": _size(x)}


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def plain(x: Any) -> Any:
    """As JSON has it: tensors of one number become it, others their shapes; numbers that JSON lacks, strings."""
    if isinstance(x, Tensor):
        return _tensor(x) if x.dim() else plain(x.item())
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x if x is None or isinstance(x, bool | int | float | str) else repr(x)


def page(d: dict[str, Any]) -> str:
    """For people."""
    rows = [("file", f"{d['file']} ({d['format']})"), ("step", "not known" if d["step"] is None else d["step"])]
    rows += [(kind, _count(d[kind])) for kind in ("params", "buffers")]
    optimizer, state = d["optimizer"], {}
    if optimizer is None:
        rows.append(("optimizer", "none"))
    else:
        state = optimizer["state"]
        rows.append(("optimizer", f"{optimizer['name'] or 'unknown'}, {_bytes(optimizer['bytes'])}"))
        for i, group in enumerate(optimizer["groups"]):
            text = ", ".join(f"{k}={v}" for k, v in group.items() if k not in ("params", *EXECUTION) and v is not None)
            rows.append((f"group {i}", f"{len(group['params'])} parameters, {text}"))
    rows.append(("extra", ", ".join(d["extra"]) or "none"))
    rows += [("odd", text) for text in d["oddities"]]
    named = [*d["params"], *d["buffers"]]
    table = [(x["name"], f"{x['dtype']}{x['shape']}", " ".join(state.get(x["name"], {}))) for x in named]
    table += [(name, "", " ".join(values)) for name, values in state.items() if not d["params"]]
    widths = [max((len(row[i]) for row in table), default=0) for i in range(2)]
    lines = [f"{key:<10} {value}" for key, value in rows]
    lines += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in table]
    return "\n".join(lines)


def _count(tensors: list[dict[str, Any]]) -> str:
    if not tensors:
        return "none"
    total = sum(math.prod(x["shape"]) for x in tensors)
    types = collections.Counter(x["dtype"] for x in tensors)
    kinds = ", ".join(f"{n} of {dtype}" for dtype, n in types.items())
    return f"{total:,} numbers in {len(tensors)} tensors ({kinds}), {_bytes(sum(x['bytes'] for x in tensors))}"


def _bytes(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
