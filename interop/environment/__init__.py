"""What a report of an error is to say of its machine: versions, flags, devices; `python -m interop env`.

It answers where something is missing, too old or broken, since that is when it is asked. So this imports Python's own
library alone. What only JAX and torch know, processes of their own ask them (`probe.py`): such a process may end, or
never answer.

It says nothing else of the machine: no host, no user, no path. A flag's value is shown where it can be none of these.
"""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "torch")
EXTRAS = ("safetensors", "orbax-checkpoint", "tqdm", "ninja")
FLAGS = ("XLA_", "JAX_", "TORCH_", "PJRT_", "LIBTPU_INIT_ARGS")
PROBES = ("jax", "torch")
ABSENT = "not installed"

Report = dict[str, dict[str, Any]]


def report(timeout: float = 60.0) -> Report:
    """Sections of facts by name.

    Args:
      timeout: seconds that JAX, and torch at the same time, have to answer. What they said until then counts.
    """
    plugins = {point.dist.name for point in metadata.entry_points(group="jax_plugins") if point.dist}
    extras = (*EXTRAS, *sorted(plugins | {"libtpu"}))
    return {
        "versions": {"jopt": _own_version(), "Python": platform.python_version()} | _versions(PACKAGES),
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "CPU": _processor(),
            "cores": _cores(),
        },
        "flags": {name: _shown(name, value) for name, value in sorted(os.environ.items()) if name.startswith(FLAGS)},
        "extras": _versions(extras),
        **_answers(timeout),
    }


def page(report: Report) -> str:
    """The report as text."""
    lines = []
    for section, facts in report.items():
        lines += [section] + [f"  {name:18s}  {_text(fact)}" for name, fact in (facts or {"none": ""}).items()]
    return "\n".join(line.rstrip() for line in lines)


def _text(fact: Any) -> str:
    if isinstance(fact, dict):
        return f"error: {fact['error']}"
    return ", ".join(map(str, fact)) if isinstance(fact, list) else str(fact)


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found


def _own_version() -> str:
    """Of the code that runs, which a checkout beside an older installation is not."""
    source = Path(__file__).parents[2] / "jopt" / "__init__.py"
    found = re.search(r'^__version__ = "(.*)"', source.read_text(), re.MULTILINE) if source.exists() else None
    return found[1] if found else ABSENT


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or "unknown"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()}"


# --- what is not to be said ----------------------------------------------------------------------------


def _shown(name: str, value: str) -> str:
    """A variable's value, but for words that may be a place, an address or a secret."""
    if re.search("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", name):
        return "(set)"
    return re.sub(r"\S+", lambda word: word[0] if _is_plain(word[0]) else _name_of_option(word[0]), value)


def _is_plain(word: str) -> bool:
    """Whether it is an option, a number or some names; a point stands in numbers alone, or it may be an address."""
    return bool(re.fullmatch(r"[\w,=+-]+|[\w=-]+=-?\d+\.\d+|-?\d+\.\d+", word)) and _without_places(word) == word


def _name_of_option(word: str) -> str:
    option, sign, _ = word.partition("=")
    return f"{option}=(set)" if sign and _is_plain(option) else "(set)"


def _without_places(text: str) -> str:
    """A library's message without paths, and without the names of the machine and its user."""
    text = re.sub(r"(?<![\w<])(?:~|[A-Za-z]:)?[/\\][^\s'\"`,;:)]+", "<path>", text)
    text = re.sub(r"\b\d{1,3}(\.\d{1,3}){3}\b", "<address>", text)
    host = socket.gethostname()
    user = Path.home().name
    for name, shown in ((host, "<host>"), (host.partition(".")[0], "<host>"), (user, "<user>")):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", shown, text)
    return text


# --- what JAX and torch say ----------------------------------------------------------------------------


def _answers(timeout: float) -> Report:
    """The probes' facts, by probe."""
    # A report takes no accelerator's memory from whatever else runs there.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        running = []
        for probe in filter(find_spec, PROBES):
            # Files, not pipes: these have an end though the process, or one that it started, has none.
            facts, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            command = [sys.executable, "-m", "interop.environment.probe", probe]
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=facts, stderr=errors, text=True
            )
            running.append((probe, process, facts, errors))
        found: Report = {name: {"imports": ABSENT} for name in PROBES if find_spec(name) is None}
        for probe, process, facts, errors in running:
            ended = _ended(process, timeout - (time.monotonic() - started))
            found[probe] = _facts(facts)
            if not ended:
                found[probe]["stopped"] = f"no answer within {timeout:g} s"
            elif process.returncode:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [""])[-1]
                found[probe]["stopped"] = _without_places(f"ended with exit code {process.returncode}. {last}".strip())
    return {probe: found[probe] for probe in PROBES}


def _ended(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it all the same
            process.wait(5)
        return False
    return True


def _facts(file: Any) -> dict[str, Any]:
    """What a probe wrote: a fact a line; the last may be cut."""
    file.seek(0)
    facts: dict[str, Any] = {}
    for line in file.read().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            for name, fact in json.loads(line).items():
                facts[name] = {"error": _without_places(fact["error"])} if isinstance(fact, dict) else fact
    return facts
