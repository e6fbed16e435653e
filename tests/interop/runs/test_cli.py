"""`python -m interop`: what it prints, writes and returns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="files of torch's runs")
pytest.importorskip("safetensors", reason="of the files extra")

import interop  # noqa: E402
from interop.__main__ import BAD, DIFFERENT, OK, USAGE, main  # noqa: E402
from interop.runs.files.difference import differences  # noqa: E402
from tests.checkpoints import trained  # noqa: E402


@pytest.fixture
def run(tmp_path):
    model, optimizer = trained()
    raw = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(raw, tmp_path / "run.pt")
    return tmp_path / "run.pt"


def test_inspect(run, capsys):
    assert main(["inspect", str(run)]) == OK
    page = capsys.readouterr().out
    for line in (
        "step       3",
        "params     34 numbers in 6 tensors (6 of float32), 136 bytes",
        "buffers    9 numbers in 3 tensors (2 of float32, 1 of int64), 40 bytes",
        "extra      epoch",
        "  0.weight               float32[4, 3]  step exp_avg exp_avg_sq",
    ):
        assert line in page.splitlines()
    assert main(["inspect", str(run), "--json"]) == OK
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "torch"
    assert document["params"][0] == {"name": "0.weight", "shape": [4, 3], "dtype": "float32", "bytes": 48}
    assert document["optimizer"]["name"] == "AdamW"
    assert document["optimizer"]["groups"][0]["betas"] == [0.9, 0.999]
    assert document["optimizer"]["state"]["0.bias"]["step"] == 3.0
    assert document["oddities"] == []


def test_inspect_tells_what_is_odd(run, capsys):
    raw = torch.load(run, weights_only=True)
    raw["model"]["2.bias"][0] = float("nan")
    raw["optimizer"]["state"][1]["step"] = torch.tensor(9.0)
    raw["optimizer"]["param_groups"][0]["lr"] = float("inf")
    torch.save(raw, run)
    assert main(["inspect", str(run)]) == OK
    page = capsys.readouterr().out
    assert "odd        params.2.bias: 1 of 2 values are nan or infinite" in page
    assert "odd        steps differ: 3 (5, as '0.weight'), 9 (1, as '0.bias')" in page
    assert main(["inspect", str(run), "--json"]) == OK
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["optimizer"]["groups"][0]["lr"] == "inf"


def test_an_optimizer_without_names(run, capsys, tmp_path):
    path = tmp_path / "optimizer.pt"
    torch.save(torch.load(run, weights_only=True)["optimizer"], path)
    assert main(["inspect", str(path)]) == OK
    assert "  #0    step exp_avg exp_avg_sq" in capsys.readouterr().out.splitlines()
    output = str(tmp_path / "out.safetensors")
    assert main(["convert", str(path), output]) == BAD
    assert "optimizer.pt: the optimizer's parameters have numbers instead of names" in capsys.readouterr().err
    names = list(interop.load_checkpoint(run).optimizer.names)
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert main(["convert", str(path), output, "--names", str(tmp_path / "names.txt")]) == OK
    assert interop.load_checkpoint(output).optimizer.names == names
    assert main(["convert", str(path), output, "--force", "--names", str(tmp_path / "none.txt")]) == BAD
    assert "none.txt" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["out.safetensors", "out.dcp", "out.pt"])
def test_convert(run, file, capsys, tmp_path):
    output = tmp_path / file
    assert main(["convert", str(run), str(output), "--map", "0.*=first.*", "--map", "1.=norm."]) == OK
    assert "27 tensors, read back and equal" in capsys.readouterr().out
    expected = interop.load_checkpoint(run, map={"0.*": "first.*", "1.": "norm."})
    assert {"first.weight", "norm.weight", "2.weight"} <= set(expected.params)
    assert not differences(expected, interop.load_checkpoint(output))
    assert main(["convert", str(run), str(output)]) == USAGE
    assert f"{output} exists; --force replaces it" in capsys.readouterr().err
    assert not differences(expected, interop.load_checkpoint(output))
    assert main(["convert", str(run), str(output), "--force"]) == OK
    assert not differences(interop.load_checkpoint(run), interop.load_checkpoint(output))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([file, "run.pt"])


def test_convert_to_orbax(run, tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="of the ecosystem and files extras: make test-all installs them")
    assert main(["convert", str(run), str(tmp_path / "run"), "--to", "orbax"]) == OK
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "back.pt")]) == OK
    assert main(["diff", str(run), str(tmp_path / "back.pt")]) == OK


def test_convert_that_fails_leaves_nothing(run, capsys, tmp_path):
    assert main(["convert", str(run), str(tmp_path / "out.xyz")]) == BAD
    assert "expected a suffix of .pt" in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "out.pt"), "--map", "nonsense=x"]) == BAD
    assert "map 'nonsense': fits none of the names" in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "out.pt"), "--map", "nonsense"]) == USAGE
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(run.read_bytes()[:-9])
    assert main(["convert", str(damaged), str(tmp_path / "out.pt")]) == BAD
    assert f"error: {damaged}: " in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["damaged.pt", "run.pt"]


def test_diff(run, capsys, tmp_path):
    raw = torch.load(run, weights_only=True)
    raw["model"]["2.bias"][0] += 0.25
    raw["model"]["0.bias"][0] = float("nan")
    raw["optimizer"]["param_groups"][0]["lr"] = 0.5
    del raw["epoch"]
    other = tmp_path / "other.pt"
    torch.save(raw, other)
    assert main(["diff", str(run), str(run)]) == OK
    assert capsys.readouterr().out == "no difference in 27 tensors\n"
    assert main(["diff", str(run), str(other)]) == DIFFERENT
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["params.0.bias: largest difference inf", "params.2.bias: largest difference 0.25"]
    assert "options.2.bias.lr: 0.01 and 0.5" in lines
    assert "extra.epoch: 3 and nothing" in lines
    assert main(["diff", str(run), str(other), "--json", "--tolerance", "0.3"]) == DIFFERENT
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["params.0.bias"]["largest"] == "inf"
    assert "params.2.bias" not in rows
    assert main(["diff", str(run), str(run), "--tolerance", "-1"]) == USAGE


def test_as_a_program(tmp_path):
    """The exit codes that a shell sees."""
    command = [sys.executable, "-m", "interop", "inspect", str(tmp_path / "none.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (BAD, f"error: {tmp_path / 'none.pt'}: is not there\n")
    with pytest.raises(SystemExit) as exit_:
        main(["explode"])
    assert exit_.value.code == USAGE


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], OK, "{inspect,convert,diff,env}"),
        (["convert", "--help"], OK, "safetensors"),
        ([], USAGE, "required"),
        (["inspect", "none.pt"], BAD, "error: none.pt: is not there\n"),
        (["inspect", "none.pt", "--from", "dcp"], BAD, "error: none.pt: is not there\n"),
        (["convert", "none.pt", "out.pt"], BAD, "error: none.pt: is not there\n"),
        (["diff", "some.pt", "none.pt"], BAD, "error: none.pt: is not there\n"),
        (["inspect", "some.pt", "--names", "none.txt"], BAD, "error: none.txt: is not there\n"),
    ],
)
def test_what_needs_no_tensors_does_not_wait_for_torch_and_jax(arguments, code, says, tmp_path):
    (tmp_path / "some.pt").touch()
    environment = os.environ | {"PYTHONPATH": str(Path(interop.__file__).parent.parent)}
    command = [sys.executable, "-X", "importtime", "-m", "interop", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert result.returncode == code
    assert says in result.stdout + result.stderr
    assert "interop" in imported
    assert not imported & {"torch", "jax", "jopt", "numpy"}


def test_the_bar(run, capsys):
    pytest.importorskip("tqdm", reason="of the files extra")
    interop.load_checkpoint(run, progress=True)
    assert "checking run.pt" in capsys.readouterr().err
    interop.load_checkpoint(run)
    assert capsys.readouterr().err == ""
