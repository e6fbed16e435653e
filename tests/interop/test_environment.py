"""`python -m interop env`: what it tells, that it answers whatever is broken, and what it keeps to itself."""

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="in an environment without torch tests/project/test_wheel.py asks for it")

from interop.__main__ import BAD, OK
from interop.dropin import native
from interop.environment import page
from tests import ROOT


def run(*arguments, first=None, **environment):
    """The command in a process of its own; modules and metadata in the folder `first` hide others of their names."""
    path = os.pathsep.join(map(str, [first, ROOT] if first else [ROOT]))
    command = [sys.executable, "-W", "error", "-m", "interop", *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path} | environment, cwd="/", capture_output=True, text=True
    )


def report(*arguments, **keywords):
    done = run("env", "--json", *arguments, **keywords)
    assert (done.returncode, done.stderr) == (OK, "")
    return json.loads(done.stdout)


@pytest.fixture
def broken(tmp_path):
    """A folder with a jax and a torch of the given code."""

    def write(jax="raise ImportError('broken')", torch="raise ImportError('broken')"):
        for name, code in (("jax", jax), ("torch", torch)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(code)
        return tmp_path

    return write


def test_what_is_there():
    found = report(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_backend_optimization_level=1", JAX_ENABLE_X64="1")
    for name in ("jax", "jaxlib", "optax", "numpy", "torch"):
        assert found["versions"][name] == metadata.version(name)
    assert found["versions"]["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["flags"]["XLA_FLAGS"] == "--xla_backend_optimization_level=1"
    assert found["flags"]["JAX_ENABLE_X64"] == "1"
    assert found["jax"] == {
        "imports": "yes",
        "devices": ["1 x cpu"],
        "output fusion": "off; jopt.enable_multi_output_fusion() turns it on",
    }
    assert found["torch"]["imports"] == "yes"
    assert isinstance(found["torch"]["devices"], list)
    lines = page(found).splitlines()
    assert f"  torch               {metadata.version('torch')}" in lines
    assert "  devices             1 x cpu" in lines


@pytest.mark.slow
def test_fusion_that_is_on_and_a_platform_that_is_not_there():
    flag = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
    found = report(JAX_PLATFORMS="cuda", XLA_FLAGS=flag)
    assert found["jax"]["devices"]["error"].startswith("RuntimeError: ")
    assert found["jax"]["output fusion"] == "on"
    assert found["flags"]["XLA_FLAGS"] == flag


@pytest.mark.slow
def test_a_flag_that_ends_the_process():
    found = report(XLA_FLAGS="--xla_no_such_flag=1")
    assert "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1" in found["jax"]["stopped"]
    assert found["torch"]["imports"] == "yes"


@pytest.mark.parametrize(("name", "old"), [("torch", "2.8.1"), ("jax", "0.6.2")])
def test_what_is_too_old(name, old, broken):
    first = broken()
    (first / f"{name}-{old}.dist-info").mkdir()
    (first / f"{name}-{old}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {old}\n")
    found = report(first=first)
    assert found["versions"][name] == old
    assert f"needs {name}>=" in found["torch"]["imports"]["error"]
    assert f"found {old}" in found["torch"]["imports"]["error"]
    assert f"  imports             error: {found['torch']['imports']['error']}" in page(found).splitlines()
    (first / "some.pt").touch()
    other = run("inspect", first / "some.pt", first=first)
    assert other.returncode == BAD
    assert other.stderr.startswith(f"error: interop needs {name}>=")
    assert len(other.stderr.splitlines()) == 1


def test_a_backend_that_never_starts(broken):
    hangs = "def local_devices():\n    import time\n    time.sleep(600)"
    found = report("--timeout", 3, first=broken(jax=hangs))
    assert found["jax"]["stopped"] == "no answer within 3 s"
    assert "imports" in found["jax"]
    assert found["torch"]["devices"] == {"error": "ImportError: broken"}


def test_a_backend_that_ends_the_process(broken):
    dies = (
        "import os, sys\ndef local_devices():\n    print('no such chip', file=sys.stderr, flush=True)\n    os._exit(9)"
    )
    assert report(first=broken(jax=dies))["jax"]["stopped"] == "ended with exit code 9. no such chip"


def test_what_it_keeps_to_itself(broken):
    """The host, the user, the home folder, addresses and what is secret: in flags and in errors."""
    home, host = Path.home(), socket.gethostname()
    says = f"raise ImportError({f'{home}/lib/x.so: {host} at 10.0.0.7 lacks it'!r})"
    found = report(
        first=broken(jax=says),
        XLA_FLAGS=f"--xla_dump_to={home}/dump --xla_cpu_enable_fast_math=false {home}/flags",
        JAX_COORDINATOR_ADDRESS=f"{host}:1234",
        JAX_COMPILATION_CACHE_DIR="gs://bucket/cache",
        JAX_PLATFORMS="cpu",
        JAX_SOME_TOKEN="abc",
        TORCH_HOME="~/models",
        TORCH_LOGS="+dynamo,recompiles",
        PJRT_NAMES_AND_LIBRARY_PATHS=f"chip:{home}/libchip.so",
        PJRT_HOST=host,
        PJRT_PEER="10.0.0.7",
    )
    flags = {
        "XLA_FLAGS": "--xla_dump_to=(set) --xla_cpu_enable_fast_math=false (set)",
        "JAX_COORDINATOR_ADDRESS": "(set)",
        "JAX_COMPILATION_CACHE_DIR": "(set)",
        "JAX_PLATFORMS": "cpu",
        "JAX_SOME_TOKEN": "(set)",
        "TORCH_HOME": "(set)",
        "TORCH_LOGS": "+dynamo,recompiles",
        "PJRT_NAMES_AND_LIBRARY_PATHS": "(set)",
        "PJRT_HOST": "(set)",
        "PJRT_PEER": "(set)",
    }
    assert {name: found["flags"][name] for name in flags} == flags
    assert found["jax"]["devices"]["error"] == "ImportError: <path>: <host> at <address> lacks it"
    text = json.dumps(found)
    assert not any(secret in text for secret in (f"{home}/", host, "10.0.0.7", "bucket", "abc", "1234"))


def test_a_compiler_that_is_not_there(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.lacking()[:1] == ["a C++ compiler (no-such-compiler)"]
    monkeypatch.setenv("CXX", sys.executable)  # any program
    assert "a C++ compiler" not in " ".join(native.lacking())
