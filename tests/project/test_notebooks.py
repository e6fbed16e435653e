"""The notebooks as users get them: in a folder that holds them and the wheel, where the package is not installed.

Jupyter runs them as they are; those for Colab on eight simulated devices, and on the CPU in place of a GPU.
"""

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from examples import notebooks
from tests import ROOT, child, fresh

WRITTEN = {name: path.with_suffix(".ipynb") for name, path in notebooks.COLAB.items()}
WRITTEN |= {name: notebooks.WRITTEN / f"{name}.ipynb" for name in notebooks.TUTORIALS}
COLABS = ("jax", "jaxlib", "optax", "torch", "scikit-learn", "matplotlib", "tqdm", "ipykernel", "nbclient", "nbformat")
OTHERS = ("lightning",)  # which a notebook installs itself; taken if it is here
# An environment's kernel names its own Python, so that the notebook's pip installs there.
RUN = """
import json, sys, nbclient, nbformat
name, expression = sys.argv[1:]
book = nbformat.read(name, as_version=4)
nbformat.validate(book)
book.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps({expression}))"))
nbclient.NotebookClient(book, timeout=900, kernel_name="python3").execute()
nbformat.write(book, "executed.ipynb")
"""


@pytest.fixture(scope="session")
def colab(tmp_path_factory):
    """A folder with the notebooks and the wheel, and a Python that has what Colab has."""
    for package in ("nbclient", "nbformat", "ipykernel", "torch", "sklearn", "build"):
        pytest.importorskip(package, reason="pip install '.[notebook]'")
    folder = tmp_path_factory.mktemp("colab")
    python = fresh.environment(folder / "environment", *COLABS, *OTHERS)
    content = folder / "content"
    content.mkdir()
    fresh.wheel(content)
    for path in WRITTEN.values():
        shutil.copy(path, content)
    return python, content


def run(colab, name, expression, **environment):
    """A notebook's outputs: its text, its pictures, and what `expression` is at its end."""
    python, content = colab
    environment = {"JAX_PLATFORMS": "cpu", "PATH": f"{python.parent}:{os.environ['PATH']}"} | environment
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | environment
    before = sorted(path.name for path in content.iterdir())
    done = subprocess.run(
        [str(python), "-c", RUN, f"{name}.ipynb", expression],
        cwd=content,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    book = json.loads((content / "executed.ipynb").read_text())
    (content / "executed.ipynb").unlink()
    assert sorted(path.name for path in content.iterdir()) == before
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    text = "".join("".join(x.get("text", "")) for x in outputs if x.get("name") == "stdout")
    pictures = [base64.b64decode(x["data"]["image/png"]) for x in outputs if "image/png" in x.get("data", {})]
    return text, pictures, json.loads(text.strip().splitlines()[-1])


@pytest.mark.parametrize("name", WRITTEN)
def test_a_notebook_is_its_source(name):
    written = json.loads(WRITTEN[name].read_text())
    for cell in written["cells"] if name in notebooks.TUTORIALS else ():
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    source = (notebooks.COLAB | notebooks.TUTORIALS)[name]
    assert written == notebooks.notebook(source), f"python -m examples.notebooks {name} writes it"
    index = ROOT / ("README.md" if name in notebooks.COLAB else "docs/tutorials/README.md")
    assert f"{WRITTEN[name].relative_to(index.parent)})" in index.read_text()


@pytest.mark.parametrize("name", notebooks.TUTORIALS)
def test_a_tutorial_shows_what_came_out(name):
    """All cells ran, in order, to the end; a picture is among the outputs, and no warning or path of a machine."""
    cells = [cell for cell in json.loads(WRITTEN[name].read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [x for x in outputs if x["output_type"] == "error" or x.get("name") == "stderr"]
    assert [x for x in outputs if "image/png" in x.get("data", {})]
    assert not re.search(r"/(home|tmp|usr|work|root)/", "".join("".join(x.get("text", "")) for x in outputs))
    links = re.findall(r"\]\(((?:\.\./)*[\w./-]+)", WRITTEN[name].read_text())
    assert len(links) >= 3
    assert all((WRITTEN[name].parent / link).exists() for link in links)


WHERE = "__import__('jopt').__file__"


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("devices", [8, 1])
def test_the_tpu_notebook(colab, devices):
    """On eight devices, and on one, as Colab's v5e-1 and v6e-1 have."""
    figures = (
        "dict(devices=mesh.size, losses=losses, back=back_equal, apart=difference, yardstick=yardstick, "
        "accuracy=accuracy(model), stayed=accuracy(stayed), here=here, there=there, whole=undivided, part=divided, "
        f"eighth=eighth, file={WHERE}, ms=jax_ms)"
    )
    text, pictures, found = run(colab, "colab_tpu", figures, **child.on_devices(devices))
    assert str(colab[0].parent.parent) in found["file"]  # the wheel, not this checkout
    assert "images a second" in text
    assert found["ms"] > 0
    assert found["devices"] == devices
    # Two moments of 29,578 parameters in float32, and what is too small to divide.
    assert found["whole"] > 2 * 4 * 29_000
    assert found["part"] <= found["whole"] / devices + 2 * 4 * 1024
    assert found["part"] == found["eighth" if devices == 8 else "whole"]
    assert ("one core: nothing to divide" in text) == (devices == 1)
    assert found["back"]
    assert abs(found["here"] - found["there"]) < 1e-5
    losses = found["losses"]
    assert len(losses) == 6 * 12
    assert sum(losses[-12:]) < 0.5 * sum(losses[:12])
    # The run that stayed, up to what an ulp at the start does to PyTorch's own.
    assert found["apart"] <= 10 * found["yardstick"]
    assert found["accuracy"] > 0.85
    assert abs(found["accuracy"] - found["stayed"]) < 0.02
    (picture,) = pictures
    assert len(picture) > 10_000


@pytest.mark.slow
@pytest.mark.notebook
def test_the_gpu_notebook(colab):
    text, _, found = run(colab, "colab_gpu", f"dict(found=found, difference=difference, file={WHERE})")
    assert str(colab[0].parent.parent) in found["file"]
    assert "step 60" in text
    assert sum(found["found"][-10:]) < 0.5 * sum(found["found"][:10])
    assert found["difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("name", notebooks.TUTORIALS)
def test_a_tutorial_holds(colab, name):
    """Its assertions check what it says. It draws what the written one shows."""
    if name == "move_a_lightning_run":
        pytest.importorskip("lightning", reason="lightning is of the frameworks extra: pip install '.[frameworks]'")
    _, pictures, file = run(colab, name, WHERE)
    assert str(colab[0].parent.parent) in file  # the wheel, not this checkout
    assert all(len(picture) > 10_000 for picture in pictures)
    assert len(pictures) == WRITTEN[name].read_text().count('"image/png"')


def in_environment(python, cwd, *arguments):
    """What it prints, where this checkout is not on the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


IPYTHON = "import sys; from IPython.core.interactiveshell import InteractiveShell as X; X().run_cell(sys.argv[1])"


@pytest.mark.slow
@pytest.mark.notebook
def test_the_first_cell(colab, tmp_path):
    """It says what is missing, without a traceback; installs what a browser renamed, and what is newer than before."""
    cells = notebooks.notebook(notebooks.COLAB["colab_tpu"])["cells"]
    (cell,) = (cell["source"] for cell in cells if "def install" in cell["source"])
    python, content = colab
    in_environment(python, tmp_path, "-m", "pip", "uninstall", "-q", "-y", "jopt")

    def first_cell():
        return in_environment(python, tmp_path, "-c", IPYTHON, cell)

    def installed():
        return Path(in_environment(python, tmp_path, "-c", f"print({WHERE})").strip()).stat().st_mtime_ns

    out = first_cell()
    assert out.startswith("Put jopt's wheel, jopt-*.whl, beside this notebook")
    assert "Traceback" not in out

    (wheel,) = content.glob("jopt-*.whl")
    (tmp_path / "jopt").mkdir()  # an unpacked repository
    shutil.copy(wheel, tmp_path / f"{wheel.stem} (1).whl")
    assert first_cell() == ""
    first = installed()
    assert first_cell() == ""
    assert installed() == first
    shutil.copy(wheel, tmp_path)
    assert first_cell() == ""
    assert installed() > first
