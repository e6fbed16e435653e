"""Checks that need several devices, which are asked for before JAX starts: a process of its own runs a module's."""

import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest


@functools.cache
def outcomes(module: str, devices: int, *arguments: str) -> dict[str, tuple[str | None, str | None]]:
    """What a module's `main` printed on so many simulated devices: for each check its traceback, why it was skipped."""
    child = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *arguments],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def report(module: str, devices: int, name: str, *arguments: str) -> None:
    """One check's outcome as a test's."""
    error, skipped = outcomes(module, devices, *arguments)[name]
    assert error is None, error
    if skipped:
        pytest.skip(skipped)


def main(checks) -> None:
    """In the process: run them all and print what came of each."""
    import tests.conftest  # noqa: F401  its settings of JAX, and its cache

    results = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = None, None
        except pytest.skip.Exception as skipped:
            results[name] = None, str(skipped)
        except Exception:
            results[name] = traceback.format_exc(), None
    print(json.dumps(results))
