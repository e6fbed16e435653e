"""Checks that need several devices, which are asked for before JAX starts: a process of its own runs a module's."""

import fcntl
import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tests import ROOT


def on_devices(n: int) -> dict[str, str]:
    """The environment of a process on so many simulated devices, beside the options of this one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def run(devices: int, *arguments: str, timeout: float | None = None) -> str:
    """What Python prints with these arguments, in a process on so many simulated devices."""
    child = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | on_devices(devices),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def report(tmp_path_factory, module: str, devices: int, name: str, *arguments: str) -> None:
    """One check's outcome, of a process on so many simulated devices, as a test's."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the workers share
    error, skipped = _outcomes(folder / f"{'-'.join((module, *arguments))}.json", module, devices, *arguments)[name]
    assert error is None, error
    if skipped:
        pytest.skip(skipped)


@functools.cache
def _outcomes(path: Path, module: str, devices: int, *arguments: str) -> dict[str, tuple[str | None, str | None]]:
    """What a module's `main` printed: for each check its traceback, why it was skipped. The first to ask runs it."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()):
            text = run(devices, "-W", "error", "-m", module, *arguments)
            file.write(text)
    return json.loads(text)


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


def train(name, model, state) -> None:
    """Two steps of Adam on this state. Here, for a process that is spawned imports what its function's module does."""
    import torch

    from interop import optim

    opt = (optim if name == "interop" else torch.optim).Adam(model.parameters(), lr=0.01)
    opt.state.update(zip(model.parameters(), state, strict=True))
    for _ in range(2):
        opt.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
