"""Look into checkpoints, convert and compare them: `python -m interop inspect|convert|diff`; docs/files.md.

Exit codes: 0, all well (diff: no difference); 1, diff found one; 2, the arguments are wrong, or the output exists and
there is no --force; 3, a file is not what was expected, or cannot be read or written; or a library is missing.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from interop.checkpoint import (
    FORMATS,
    Checkpoint,
    CheckpointError,
    OptimizerState,
    format_of,
    load_checkpoint,
    save_checkpoint,
)
from interop.checkpoint.difference import differences
from interop.options import HOW

OK, DIFFERENT, USAGE, BAD = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (CheckpointError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interop", description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, function: Any, text: str, *files: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for file in files:
            sub.add_argument(file, type=Path)
        sub.add_argument("--names", type=Path, metavar="FILE", help="the optimizer's parameters, a name a line")
        sub.add_argument("--from", dest="source", choices=FORMATS, help="the format, if not by the file's signs")
        sub.set_defaults(command=function)
        return sub

    inspect = command("inspect", _inspect, "what a checkpoint holds, and what is odd in it", "file")
    convert = command("convert", _convert, "a checkpoint in another format, read back and compared", "input", "output")
    diff = command("diff", _diff, "in what two checkpoints differ", "first", "second")
    convert.add_argument("--to", choices=[f for f in FORMATS if f != "trainer"], help="the format, if not by suffix")
    convert.add_argument("--force", action="store_true", help="replace the output")
    convert.add_argument("--map", action="append", default=[], metavar="OLD=NEW", help="other names; * for any text")
    diff.add_argument("--tolerance", type=float, default=0.0, help="of absolute differences (0: every bit)")
    for sub in (inspect, diff):
        sub.add_argument("--json", action="store_true", help="JSON on the standard output")
    return parser


def _load(path: Path, options: Any, patterns: dict[str, str] | None = None, numbers: bool = False) -> Checkpoint:
    names: Any = "numbers" if numbers else None
    if options.names is not None:
        names = options.names.read_text().split()
    return load_checkpoint(path, names=names, map=patterns, format=options.source)


def _inspect(options: Any) -> int:
    run = _load(options.file, options, numbers=True)
    document = description(run) | {"file": str(options.file), "format": options.source or format_of(options.file)}
    print(json.dumps(document, indent=1) if options.json else _page(document))
    return OK


def description(run: Checkpoint) -> dict[str, Any]:
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
        "groups": [_plain(group) for group in optimizer.groups],
        "state": _plain(optimizer.state),
    }


def _tensor(x: Tensor) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "bytes": _size(x)}


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _plain(x: Any) -> Any:
    """As JSON has it: tensors of one number become it, others their shapes; numbers that JSON lacks, strings."""
    if isinstance(x, Tensor):
        return _tensor(x) if x.dim() else _plain(x.item())
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x if x is None or isinstance(x, bool | int | float | str) else repr(x)


def _page(d: dict[str, Any]) -> str:
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
            text = ", ".join(f"{k}={v}" for k, v in group.items() if k not in ("params", *HOW) and v is not None)
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


def _convert(options: Any) -> int:
    patterns = {}
    for pair in options.map:
        old, sign, new = pair.partition("=")
        if not sign or not old:
            print(f"error: --map {pair!r}: expected OLD=NEW", file=sys.stderr)
            return USAGE
        patterns[old] = new
    if options.output.exists() and not options.force:
        print(f"error: {options.output} exists; --force replaces it", file=sys.stderr)
        return USAGE
    run = _load(options.input, options, patterns)
    for text in run.oddities():
        print(f"odd: {text}", file=sys.stderr)
    save_checkpoint(run, options.output, format=options.to, verify=True)
    print(f"{options.output}: {len(run.tensors())} tensors, read back and equal")
    return OK


def _diff(options: Any) -> int:
    if not options.tolerance >= 0:
        print(f"error: --tolerance: expected at least 0, found {options.tolerance}", file=sys.stderr)
        return USAGE
    first, second = (_load(path, options, numbers=True) for path in (options.first, options.second))
    found = differences(first, second, options.tolerance)
    if options.json:
        rows = [{"name": d.name, "found": d.found, "largest": _plain(d.largest)} for d in found]
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(map(str, found)) or f"no difference in {len(first.tensors())} tensors")
    return DIFFERENT if found else OK


if __name__ == "__main__":
    sys.exit(main())
