"""The Colab notebooks as users get them: in a folder that holds them and the wheel, where the package is not installed.

Jupyter runs them as they are, on eight simulated devices, and on the CPU in place of a GPU.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from examples import notebooks
from tests import child, fresh

EXAMPLES = Path(notebooks.__file__).parent
NAMES = ("colab_gpu", "colab_tpu")
COLABS = ("jax", "jaxlib", "optax", "torch", "scikit-learn", "matplotlib", "tqdm", "ipykernel", "nbclient", "nbformat")
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
    python = fresh.environment(folder / "environment", *COLABS)
    content = folder / "content"
    content.mkdir()
    fresh.wheel(content)
    for name in NAMES:
        shutil.copy(EXAMPLES / f"{name}.ipynb", content)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source(name):
    written = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    accelerator = name.removeprefix("colab_").upper()
    assert written == notebooks.notebook((EXAMPLES / f"{name}.py").read_text(), accelerator), (
        "python -m examples.notebooks writes it"
    )
    assert f"examples/{name}.ipynb" in (EXAMPLES.parent / "README.md").read_text()


WHERE = "__import__('jopt').__file__"


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("devices", [8, 1])
def test_the_tpu_notebook(colab, devices):
    """On eight devices, and on one, as Colab's v5e-1 and v6e-1 have."""
    figures = (
        "dict(devices=mesh.size, losses=losses, back=back_equal, apart=difference, yardstick=yardstick, "
        "accuracy=accuracy(model), stayed=accuracy(stayed), here=here, there=there, whole=undivided, part=divided, "
        f"file={WHERE}, ms=[torch_ms, jax_ms])"
    )
    text, pictures, found = run(colab, "colab_tpu", figures, **child.on_devices(devices))
    assert str(colab[0].parent.parent) in found["file"]  # the wheel, not this checkout
    assert "images a second" in text
    assert min(found["ms"]) > 0
    assert found["devices"] == devices
    # Two moments of 29,578 parameters in float32, and what is too small to divide.
    assert found["whole"] > 2 * 4 * 29_000
    assert found["part"] <= found["whole"] / devices + 2 * 4 * 1024
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
def test_without_a_wheel_a_notebook_says_what_to_do(colab, tmp_path):
    """The package index has none, or cannot be reached."""
    python, content = colab
    book = json.loads((content / "colab_tpu.ipynb").read_text())
    cell = next(cell["source"] for cell in book["cells"] if cell["cell_type"] == "code")
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "jopt"], check=True)
    done = subprocess.run([str(python), "-c", cell], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Put jopt's wheel, jopt-*.whl, beside this notebook")
