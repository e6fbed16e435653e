"""The workloads, as their users run them, on less."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the workloads are compared with torch")
for extra in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(extra, reason="of the workloads extra")

import jax  # noqa: E402
from scipy.io import wavfile  # noqa: E402

from benchmarks.workloads import __main__ as command  # noqa: E402
from benchmarks.workloads import images, ratings, speech, training  # noqa: E402
from tests import cases  # noqa: E402


@pytest.fixture(autouse=True)
def as_users_have_it():
    """JAX as it is, and torch as the command sets it: more threads than processors would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    speech.formants(folder)
    return folder


def workloads(folder, *arguments):
    return command.main(["--short", "--out", str(folder), *arguments])


@pytest.mark.slow
def test_all_ways_agree_and_a_page_says_so(tmp_path, sounds, capsys):
    assert workloads(tmp_path, "--only", "ratings,speech", "--data-speech", str(sounds), "--steps", "60") == 0
    assert "4 of 4 agree with torch.optim" in capsys.readouterr().out
    content = json.loads((tmp_path / "workloads.json").read_text())
    assert {"date", "torch", "jax"} <= content["machine"].keys()
    assert {run["optimizer"] for run in content["runs"]} == {"SparseAdam", "Adam", "AdamW", "SGD"}
    for run in content["runs"]:
        assert max(run["float64"].values()) <= cases.TOLERANCES["float64"]
        # Better than guessing, and than the mean.
        if run["optimizer"] == "AdamW":
            assert run["ways"]["jopt in JAX"]["accuracy"] > 0.2
        elif run["workload"] == "ratings":
            assert run["ways"]["jopt in JAX"]["RMSE"] < ratings.Ratings().test[2].std()
    page = (tmp_path / "workloads.md").read_text()
    assert "generated: rank 4 and noise of 0.5" in page
    for title in content["tables"]:
        assert f"## {title}" in page
    assert (tmp_path / "workloads.png").stat().st_size > 10_000
    assert "| [workloads](workloads.md) |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_wrong_optimizer_is_noticed(tmp_path, sounds, capsys, monkeypatch):
    """optax's epsilon of 1e-8 as 1e-4: the verdict is no formality."""

    class Wrong:
        @staticmethod
        def AdamW(params, **arguments):  # noqa: N802
            return torch.optim.AdamW(params, eps=1e-4, **arguments)

        SGD = torch.optim.SGD

    monkeypatch.setitem(training.MODULES, training.DROP_IN, Wrong)
    assert workloads(tmp_path, "--only", "speech", "--data-speech", str(sounds)) == 1
    out = capsys.readouterr().out
    assert "1 of 2 agree" in out
    assert "speech, AdamW: DOES NOT AGREE" in out


def test_what_was_killed_goes_on_and_what_changed_starts_anew(tmp_path, monkeypatch):
    made = []
    dead = [5]

    def run(workload, recipe, way, *, dtype, steps, seed, **_):
        if len(made) == dead[0]:
            raise KeyboardInterrupt
        made.append((str(recipe), way, dtype, seed))
        return {"losses": [1.0] * steps, "seconds": [0.1] * steps, "qualities": [[steps, 0.5]], "buffers": {}}

    monkeypatch.setattr(training, "run", run)
    only = ("--only", "ratings")
    with pytest.raises(KeyboardInterrupt):
        workloads(tmp_path, *only)
    dead[0] = None
    assert workloads(tmp_path, *only) == 0
    everything = len(made)
    assert (
        everything == len(set(made)) == 2 * (3 + 3 + 2 + 3)
    )  # two optimizers: three ways, nudged at first and always, float64
    assert workloads(tmp_path, *only) == 0
    assert len(made) == everything
    next((tmp_path / "workloads").glob("*.json")).write_text('{"configuration": {')  # killed while writing, by another
    assert workloads(tmp_path, *only) == 0
    assert len(made) == everything + 1
    assert workloads(tmp_path, *only, "--steps", "30") == 0
    assert len(made) == 2 * everything + 1 - 2 * 3  # the first steps in float64 are as they were


def test_batch_norm_is_torchs():
    """Losses, weights' effect on quality and running statistics, in float64."""
    workload = images.Images()
    runs = [
        training.run(workload, workload.recipes[0], way, dtype="float64", steps=4, every=2)
        for way in (training.TORCH, training.JAX)
    ]
    np.testing.assert_allclose(runs[1]["losses"], runs[0]["losses"], rtol=cases.TOLERANCES["float64"])
    assert runs[1]["qualities"] == runs[0]["qualities"]
    assert runs[0]["buffers"]["1.num_batches_tracked"] == [4]
    assert runs[1]["buffers"].keys() == runs[0]["buffers"].keys()
    for name, expected in runs[0]["buffers"].items():
        np.testing.assert_allclose(
            runs[1]["buffers"][name], expected, rtol=0, atol=cases.TOLERANCES["float64"] * np.abs(expected).max()
        )


def test_every_optimizer_of_torch_is_tried():
    tried = {recipe.optimizer for workload in command.WORKLOADS.values() for recipe in workload.recipes}
    assert tried == {
        name
        for name, x in vars(torch.optim).items()
        if isinstance(x, type) and issubclass(x, torch.optim.Optimizer) and x is not torch.optim.Optimizer
    }


def test_both_of_movielens_files_are_read(tmp_path):
    rows = [(3 + i % 40, 5 * (i % 25), 1 + i % 5) for i in range(2 * ratings.BATCH)]
    (tmp_path / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t88\n" for u, i, r in rows))
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r}.0,88\n" for u, i, r in rows)
    )
    expected = [x - 3 for x, _, _ in rows], [x // 5 for _, x, _ in rows], [x for _, _, x in rows]
    for name in ("u.data", "ratings.csv"):
        for x, y in zip(ratings.load(tmp_path / name), expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rate", [speech.RATE, 16000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_tone_is_in_its_band(tmp_path, rate, channels):
    f = speech.RATE / speech.WINDOW * 40
    t = np.arange(rate) / rate
    sound = np.sin(2 * np.pi * f * t) * np.exp(-(((t - 0.5) / 0.05) ** 2))  # silence around it, and no click
    wavfile.write(tmp_path / "a.wav", rate, np.stack([(sound * 2**14).astype(np.int16)] * channels, 1))
    found, found_rate = speech.read(tmp_path / "a.wav")
    assert found_rate == rate
    np.testing.assert_allclose(found, sound / 2, rtol=0, atol=2**-15)
    loudest = speech.log_mel(found, rate).reshape(speech.FRAMES, speech.BANDS).max(0).argmax()
    edges = 700 * (10 ** (np.linspace(0, np.log10(1 + speech.RATE / 1400), speech.BANDS + 2)) - 1)
    assert edges[loudest] < f < edges[loudest + 2]


BAD = {
    "images": [(None, "no such folder"), ("folder", "expected images in one subfolder a class, found 0 in 0")],
    "text": [(None, "No such file"), ("short", "expected at least 3200 characters, found 5")],
    "ratings": [
        (None, "No such file"),
        ("1\t2\t3\t4\n1\t2\n", r"line 2: expected user, item, rating, timestamp, separated by tabs, found '1\\t2'"),
        ("userId,movieId,rating,timestamp\n1,2,good,4\n", "line 2: .* separated by commas, found '1,2,good,4'"),
        ("1,2,nan,4\n", "line 1: expected user, item, rating"),
        ("1,2,3,4\n", "expected at least 1024 ratings, found 1"),
        ("", "expected at least 1024 ratings, found 0"),
        (b"\xff\xfe", "expected text"),
    ],
    "speech": [(None, "no such folder"), ("folder", "expected wav files in one subfolder a class, found 0 in 0")],
}


@pytest.mark.parametrize(("name", "content", "message"), [(n, *case) for n, found in BAD.items() for case in found])
def test_bad_data_are_named(tmp_path, name, content, message):
    path = tmp_path / "data"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=rf"--data-{name}: .*data.*{message}"):
        workloads(tmp_path / "out", "--only", name, f"--data-{name}", str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no sound", "expected a wav file"),
        (b"", "expected a wav file"),
        ("empty", "expected sound"),
        ("nan", "expected finite"),
    ],
)
def test_bad_sounds_are_named(tmp_path, content, message):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        wavfile.write(tmp_path / name / "a.wav", 8000, np.zeros(8000, np.int16))
    bad = tmp_path / "two" / "b.wav"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        wavfile.write(bad, 8000, np.full(100 if content == "nan" else 0, np.nan, np.float32))
    with pytest.raises(SystemExit, match=rf"--data-speech: .*b\.wav: {message}"):
        workloads(tmp_path / "out", "--only", "speech", "--data-speech", str(tmp_path))


def test_bad_arguments_are_named(capsys):
    for arguments, message in ((("--only", "song"), "found song"), (("--steps", "3"), "expected at least 10")):
        with pytest.raises(SystemExit):
            command.main([*arguments])
        assert message in capsys.readouterr().err
