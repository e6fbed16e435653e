"""The demo, as its users run it, on less."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the demo steps torch models")
for extra in ("matplotlib", "PIL", "sklearn", "tqdm"):
    pytest.importorskip(extra, reason="of the demo extra")

import jax  # noqa: E402

from examples import digits, porting_a_run, vanishing_gradients  # noqa: E402


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_the_demo_agrees(tmp_path, capsys):
    assert digits.main(["--epochs", "2", "--out", str(tmp_path / "digits.png")]) == 0
    out = capsys.readouterr().out
    assert "interop.optim agrees with torch.optim" in out
    assert "jopt in JAX agrees with torch.optim" in out
    assert (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_notices_a_wrong_optimizer(tmp_path, capsys, monkeypatch):
    """optax's default weight decay instead of torch's: the verdict is no formality."""
    monkeypatch.setattr(
        digits.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.AdamW(p, lr=lr, weight_decay=1e-4)
    )
    assert digits.main(["--out", str(tmp_path / "digits.png")]) == 1
    assert "interop.optim DOES NOT AGREE with torch.optim" in capsys.readouterr().out


def test_the_demo_takes_a_folder_of_images(tmp_path, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(60):
            pixels = np.clip(rng.normal(level, 20, (12, 10, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    digits.main(["--data", str(tmp_path / "images"), "--size", "8", "--epochs", "2", "--out", str(tmp_path / "a.png")])
    assert "96 images to train on, 24 to test on" in capsys.readouterr().out


def make_dataset():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 3
    return torch.utils.data.TensorDataset(torch.randn(100, 8, 8, generator=generator) + labels[:, None, None], labels)


def test_the_demo_takes_a_torch_dataset(tmp_path, capsys):
    digits.main(
        ["--data", "tests.project.test_examples:make_dataset", "--epochs", "1", "--out", str(tmp_path / "a.png")]
    )
    assert "80 images to train on" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["no/such/folder", "empty"])
def test_the_demo_says_what_is_wrong(tmp_path, data):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"--data .*(no such folder|expected images in one subfolder a class)"):
        digits.main(["--data", str(tmp_path / data) if data == "empty" else data])


def short(name, steps):
    (run,) = (r for r in vanishing_gradients.runs() if f"{r.problem}, {r.name}" == name)
    run.train(steps, lambda: None)
    return run


@pytest.mark.slow
def test_the_report_names_what_vanishes_and_explodes():
    """30 layers whose weights have standard deviation 1 / sqrt(3 n): a gradient shrinks by about 0.58 a layer."""
    run = short("30 tanh layers, as it is, sgd", 1)
    weights = [x for x in run.report.vanishing if x.startswith("layer") and x.endswith("weight")]
    assert weights == [f"layer {i:02}.weight" for i in range(len(weights))]
    assert 15 <= len(weights) < 29
    run = short("a tanh recurrence, as it is, sgd", 1)
    assert run.report.vanishing == tuple(f"time {t:02}" for t in range(0, 8 * len(run.report.vanishing), 8))
    assert len(run.report.vanishing) >= 4
    run = short("a ReLU recurrence, as it is, sgd", 5)
    assert "hidden" in run.report.exploding
    assert not np.isfinite(run.losses).all()


@pytest.mark.slow  # compiles eight training steps
def test_the_cures_cure(tmp_path, capsys, monkeypatch):
    done = vanishing_gradients.runs()
    monkeypatch.setattr(vanishing_gradients, "runs", lambda: done)
    assert vanishing_gradients.main(["--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    for run in done:
        assert f"{run.problem:20}{run.name:24}" in out
        chance = np.log(10 if "layers" in run.problem else vanishing_gradients.CLASSES)
        if run.name == "as it is, sgd":
            assert not run.final < 0.95 * chance, run.problem
            assert run.report.vanishing or run.report.exploding
        else:
            assert run.final < 0.95 * chance, (run.problem, run.name)


@pytest.mark.slow  # tests/interop/runs has what it does
def test_a_run_moves_and_comes_back(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("what is found is expected, and what is expected is found; " * 100, encoding="utf-8")
    assert porting_a_run.main(["--text", str(text), "--steps", "12", "--out", str(tmp_path / "a.png")]) == 0
    assert "the run that moved agrees with the one that stayed" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_that_lost_its_state_is_noticed(tmp_path, capsys, monkeypatch):
    """Moments that begin anew in JAX: the verdict is no formality."""

    def forgetful(*args, **kwargs):
        tx, params, _ = move(*args, **kwargs)
        return tx, params, tx.init(params)

    move = porting_a_run.interop.optimizer_to_jax
    monkeypatch.setattr(porting_a_run.interop, "optimizer_to_jax", forgetful)
    monkeypatch.setattr(porting_a_run.interop, "optimizer_to_torch", lambda *args, **kwargs: None)
    assert porting_a_run.main(["--steps", "12", "--out", str(tmp_path / "a.png")]) == 1
    assert "the run that moved DOES NOT AGREE" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "short"])
def test_porting_says_what_is_wrong(tmp_path, text):
    path = tmp_path / "text.txt"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"--text .*(No such file|expected at least 3200 characters, found 5)"):
        porting_a_run.main(["--text", str(path)])
