"""Write tests/data/public.json, the public names and their arguments: `python -m tools.public`.

A test compares the file with the code, so a change of what is public is seen in the diff that makes it, and
docs/releases.md says which version may make it.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "tests" / "data" / "public.json"
MODULES = ("jopt", "jopt.schedules", "interop", "interop.optim", "interop.amp")


def names(module: str) -> dict[str, str | None]:
    """The names of a module's `__all__`, with their arguments if they are functions of ours."""
    imported = importlib.import_module(module)
    return {name: _arguments(getattr(imported, name)) for name in sorted(imported.__all__)}


def _arguments(x: Any) -> str | None:
    """Without types, which stay free to become wider."""
    if not inspect.isfunction(x):
        return None
    untyped = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(x).parameters.values()]
    return str(inspect.Signature(untyped))


if __name__ == "__main__":
    FILE.write_text(json.dumps({module: names(module) for module in MODULES}, indent=1) + "\n")
