"""Look into checkpoints, convert and compare them; report versions: `python -m interop inspect|convert|diff|env`.

docs/files.md has the first three, docs/versions.md `env`. Exit codes: 0, all well (diff: no difference); 1, diff found
one; 2, the arguments are wrong, or the output exists and there is no --force; 3, a file is not what was expected, or
cannot be read or written; or a library is missing or too old. `env` tells of such a library, with 0.

torch and JAX take seconds to import. Help, and an answer about a missing file, do not wait for them: each function here
imports what it needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interop import environment
from interop.runs.formats import FORMATS

if TYPE_CHECKING:
    from interop.runs.files import Checkpoint

OK, DIFFERENT, USAGE, BAD = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        for path in (getattr(options, name) for name in options.reads):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{path}: is not there")
    except OSError as error:
        return _failed(error)
    if options.command is _env:
        return _env(options)
    try:
        from interop import _compat  # noqa: F401  first: it says which version of what is needed
        from interop.runs.files import CheckpointError
    except ImportError as error:
        return _failed(error)
    try:
        return options.command(options)
    except (CheckpointError, ModuleNotFoundError, OSError) as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m interop", description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(
        name: str, function: Any, text: str, *reads: str, writes: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for file in (*reads, *writes):
            sub.add_argument(file, type=Path)
        sub.add_argument("--names", type=Path, metavar="FILE", help="the optimizer's parameters, a name a line")
        sub.add_argument("--from", dest="source", choices=FORMATS, help="the format, if not by the file's signs")
        sub.set_defaults(command=function, reads=(*reads, "names"))
        return sub

    inspect = command("inspect", _inspect, "what a checkpoint holds, and what is odd in it", "file")
    text = "a checkpoint in another format, read back and compared"
    convert = command("convert", _convert, text, "input", writes=["output"])
    diff = command("diff", _diff, "in what two checkpoints differ", "first", "second")
    convert.add_argument("--to", choices=[f for f in FORMATS if f != "trainer"], help="the format, if not by suffix")
    convert.add_argument("--force", action="store_true", help="replace the output")
    convert.add_argument("--map", action="append", default=[], metavar="OLD=NEW", help="other names; * for any text")
    diff.add_argument("--tolerance", type=float, default=0.0, help="of absolute differences (0: every bit)")
    text = "versions, flags and devices, for a report of an error"
    env = commands.add_parser("env", help=text, description=text)
    env.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for JAX and torch to answer")
    env.set_defaults(command=_env, reads=())
    for sub in (inspect, diff, env):
        sub.add_argument("--json", action="store_true", help="JSON on the standard output")
    return parser


def _env(options: Any) -> int:
    found = environment.report(options.timeout)
    print(json.dumps(found, indent=1) if options.json else environment.page(found))
    return OK


def _load(path: Path, options: Any, patterns: dict[str, str] | None = None, numbers: bool = False) -> Checkpoint:
    from interop.runs.files import load_checkpoint

    names: Any = "numbers" if numbers else None
    if options.names is not None:
        names = options.names.read_text().split()
    return load_checkpoint(path, names=names, map=patterns, format=options.source)


def _inspect(options: Any) -> int:
    from interop.runs.files import description, format_of

    run = _load(options.file, options, numbers=True)
    document = description.of(run) | {"file": str(options.file), "format": options.source or format_of(options.file)}
    print(json.dumps(document, indent=1) if options.json else description.page(document))
    return OK


def _convert(options: Any) -> int:
    from interop.runs.files import save_checkpoint

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
    from interop.runs.files.description import plain
    from interop.runs.files.difference import differences

    if not options.tolerance >= 0:
        print(f"error: --tolerance: expected at least 0, found {options.tolerance}", file=sys.stderr)
        return USAGE
    first, second = (_load(path, options, numbers=True) for path in (options.first, options.second))
    found = differences(first, second, options.tolerance)
    if options.json:
        rows = [{"name": d.name, "found": d.found, "largest": plain(d.largest)} for d in found]
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(map(str, found)) or f"no difference in {len(first.tensors())} tensors")
    return DIFFERENT if found else OK


if __name__ == "__main__":
    sys.exit(main())
