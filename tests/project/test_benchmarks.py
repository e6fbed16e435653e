"""The benchmarks on small shapes: that they run and write what they should; nothing about times."""

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is what is compared with")
for extra in ("matplotlib", "tqdm"):
    pytest.importorskip(extra, reason="of the bench extra")

from benchmarks import models, report, shapes  # noqa: E402

SECTIONS = ("dropin", "training", "update", "jax", "compile", "memory", "special", "loading", "sweep")


@pytest.mark.slow  # torch.compile calls a compiler
def test_every_section_writes_figures_page_and_plot(tmp_path):
    """In a process of its own: it chooses threads, processors and XLA's flags."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--short", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "README.md").read_text()
    for name in SECTIONS:
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"date", "torch", "jax", "XLA_FLAGS"} <= content["machine"].keys()
        assert content["tables"]
        page = (tmp_path / f"{name}.md").read_text()
        for title, rows in content["tables"].items():
            assert f"## {title}" in page
            assert rows
            numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
            assert np.isfinite(numbers).all()
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert f"| [{name}]({name}.md) |" in summary


def test_the_summary_says_what_was_missed(tmp_path):
    found = [
        report.Target("a ratio", 1.0, 1.5),
        report.Target("another", 1.0, 0.5),
        report.Target("percent", 10.0, 3.0, at_most=True),
    ]
    figure = report.Figure("A figure", "ms", ["one", "two"], {"ours": [1.0, None]})
    section = report.Section("A title", "Text.", {"Rows": [{"name": "one", "ms": 1.0}]}, [figure], found)
    report.write("part", section, {"date": "2026-01-01"}, 1.0, tmp_path)
    report.summary(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "| [part](part.md) | a ratio | at least 1.00 | 1.50 | met |" in lines
    assert "| [part](part.md) | another | at least 1.00 | 0.500 | missed |" in lines
    assert "| [part](part.md) | percent | at most 10.0 | 3.00 | met |" in lines


def test_shapes_are_the_models():
    """Tensors and parameters of torchvision's resnet50, of GPT-2 small, and of the perceptron by hand."""
    mlp = 784 * 256 + 256 * 256 + 256 * 128 + 128 * 64 + 64 * 10 + 256 + 256 + 128 + 64 + 10
    for model, tensors, parameters in (
        (shapes.resnet50, 161, 25_557_032),
        (shapes.gpt2_small, 148, 124_439_808),
        (shapes.mlp, 10, mlp),
    ):
        assert len(model()) == tensors
        assert sum(int(np.prod(s)) for s in model()) == parameters


def test_models_to_train_are_as_large_as_said():
    """ResNet-18 for CIFAR has 11,173,962 parameters in 62 tensors."""
    for make, tensors, parameters in ((models.ResNet18, 62, 11_173_962), (models.Transformer, 90, 26_298_880)):
        found = list(make().parameters())
        assert len(found) == tensors
        assert sum(p.numel() for p in found) == parameters
