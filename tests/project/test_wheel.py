"""The wheel as a stranger installs it: what is in it, README's examples, and types, from another folder."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build", reason="pip install '.[test]' brings what builds the wheel")

import jopt
from tests import ROOT, fresh


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return fresh.wheel(tmp_path_factory.mktemp("wheel"))


def installed(wheel, folder, *names):
    """The Python of an environment with the wheel and what it and `names` need."""
    python = fresh.environment(folder / "environment", "jax", "jaxlib", "optax", "numpy", *names)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-index", "--no-deps", str(wheel)], check=True)
    return python


def run(python, folder, *arguments):
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=outside | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def readme(heading=None):
    """README's text, or that under a heading."""
    text = (ROOT / "README.md").read_text()
    return text if heading is None else re.search(rf"^## {heading}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]


DOCTEST = ("-m", "doctest", "-o", "NORMALIZE_WHITESPACE", "-o", "ELLIPSIS", "example.md")


def test_what_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"jopt", "interop", f"jopt-{jopt.__version__}.dist-info"}
    assert {"jopt/py.typed", "interop/py.typed", "interop/dropin/reader.cpp"} <= names
    sources = {str(path.relative_to(ROOT)) for top in ("jopt", "interop") for path in (ROOT / top).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_without_torch(wheel, tmp_path):
    """README's examples in JAX, where torch is not installed; and its own version."""
    python = installed(wheel, tmp_path)
    (tmp_path / "example.md").write_text(readme("In a JAX script"))
    run(python, tmp_path, *DOCTEST)
    code = """
        import importlib.metadata, importlib.util, jopt
        assert importlib.util.find_spec("torch") is None
        print(jopt.__version__, importlib.metadata.version("jopt"), jopt.__file__)
    """
    version, metadata, file = run(python, tmp_path, "-c", "\n".join(x.strip() for x in code.splitlines())).split()
    assert version == metadata == jopt.__version__
    assert Path(file).is_relative_to(tmp_path)
    failed = subprocess.run([str(python), "-c", "import interop"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.stderr.splitlines()[-1].startswith("ModuleNotFoundError: interop needs PyTorch: pip install torch")
    found = json.loads(run(python, tmp_path, "-m", "interop", "env", "--json"))
    assert found["versions"]["torch"] == "not installed"
    assert found["versions"]["jopt"] == jopt.__version__
    assert found["jax"]["imports"] == "yes"
    assert found["torch"] == {"imports": "not installed"}
    assert found["jax"]["output fusion"].startswith(("on", "off"))


@pytest.mark.slow
def test_with_torch(wheel, tmp_path):
    """All of README's examples, and the command line."""
    pytest.importorskip("torch", reason="README's other examples are in PyTorch")
    python = installed(wheel, tmp_path, "torch")
    (tmp_path / "example.md").write_text(readme())
    run(python, tmp_path, *DOCTEST)
    assert "inspect" in run(python, tmp_path, "-m", "interop", "--help")


@pytest.mark.slow
def test_types(wheel, tmp_path):
    """A program that uses the public names passes pyright --strict, outside of this checkout."""
    pyright = Path(sys.executable).parent / "pyright"
    if not pyright.exists():
        pytest.skip("pip install '.[dev]' brings pyright")
    pytest.importorskip("torch", reason="the program uses interop too")
    python = installed(wheel, tmp_path, "torch")
    (tmp_path / "program.py").write_text((ROOT / "tests" / "data" / "typed.py").read_text())
    settings = {"typeCheckingMode": "strict", "include": ["program.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    run(sys.executable, tmp_path, str(pyright), "--pythonpath", str(python))
