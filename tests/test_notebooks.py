"""The Colab notebooks, run by Jupyter as they are: on eight simulated devices, and on the CPU in place of a GPU."""

import json
import os
from pathlib import Path

import pytest

from examples import notebooks

EXAMPLES = Path(notebooks.__file__).parent
README = EXAMPLES.parent / "README.md"
NAMES = ("colab_gpu", "colab_tpu")


def run(name, expression, monkeypatch, **environment):
    """A notebook's outputs as text, and what `expression` is at its end."""
    for package in ("nbclient", "nbformat", "ipykernel", "torch", "sklearn"):
        pytest.importorskip(package, reason="pip install '.[notebook]'")
    import nbclient
    import nbformat

    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    book.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps({expression}))"))
    for key, value in ({"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES.parent)} | environment).items():
        monkeypatch.setenv(key, value)
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
    outputs = ["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in book.cells]
    return "\n".join(outputs), json.loads(outputs[-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source_and_the_readme_opens_it(name):
    written = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    accelerator = name.removeprefix("colab_").upper()
    assert written == notebooks.notebook((EXAMPLES / f"{name}.py").read_text(), accelerator), (
        "python -m examples.notebooks writes it"
    )
    badge = written["cells"][0]["source"].splitlines()[2]
    assert badge in README.read_text()
    assert f"examples/{name}.ipynb" in badge


# Jupyter's own threads and sockets at its end.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.mark.slow
def test_the_tpu_notebook_on_eight_devices(monkeypatch):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    figures = (
        "dict(devices=mesh.size, losses=losses, back=back_equal, apart=difference, yardstick=yardstick, "
        "accuracy=accuracy(model), stayed=accuracy(stayed), here=here, there=there, "
        "part=state.slots['exp_avg']['5.weight'].addressable_shards[0].data.size)"
    )
    text, found = run("colab_tpu", figures, monkeypatch, XLA_FLAGS=flags)
    assert "images a second" in text
    assert found["devices"] == 8
    assert found["part"] == 10 * 1024 // 8
    assert found["back"]
    assert abs(found["here"] - found["there"]) < 1e-5
    losses = found["losses"]
    assert len(losses) == 6 * 12
    assert sum(losses[-12:]) < 0.5 * sum(losses[:12])
    # The run that stayed, up to what an ulp at the start does to PyTorch's own.
    assert found["apart"] <= 10 * found["yardstick"]
    assert found["accuracy"] > 0.85
    assert abs(found["accuracy"] - found["stayed"]) < 0.02


def test_the_gpu_notebook(monkeypatch):
    text, found = run("colab_gpu", "dict(found=found, difference=difference)", monkeypatch)
    assert "step 60" in text
    assert sum(found["found"][-10:]) < 0.5 * sum(found["found"][:10])
    assert found["difference"] < 1e-5
