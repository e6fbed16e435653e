"""Damaged files: each is refused with a `CheckpointError`, or holds to the bit what was written."""

import io
import json
import shutil
import struct
import zipfile

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="files of torch's runs")
pytest.importorskip("safetensors", reason="of the files extra")

import interop  # noqa: E402
from interop.runs.files import CheckpointError  # noqa: E402
from interop.runs.files.difference import differences  # noqa: E402
from tests.checkpoints import trained  # noqa: E402

FILES = ["run.pt", "run.safetensors"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    model, optimizer = trained()
    run = interop.Checkpoint.from_torch(model, optimizer, lr_scheduler={"last_epoch": 3, "betas": (0.9, float("inf"))})
    for file in [*FILES, "run.dcp"]:
        interop.save_checkpoint(run, folder / file)
    return run, folder


positions = st.floats(0, 1, exclude_max=True)


def flip(data, draw):
    """One to three bits."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        damaged[int(draw(positions) * len(data))] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


def cut(data, draw):
    return data[: int(draw(positions) * len(data))]


def patch(data, draw):
    """Some bytes are others, more, or gone; small numbers and those that overflow are likelier."""
    at = int(draw(positions) * len(data))
    numbers = st.sampled_from(
        [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, struct.pack("<Q", 2**40), b"9" * 6, b"{", b"\x80\x02"]
    )
    return data[:at] + draw(st.one_of(st.binary(max_size=9), numbers)) + data[at + draw(st.integers(0, 12)) :]


def grow(data, draw):
    """More at the end, or before the beginning."""
    more = draw(st.binary(min_size=1, max_size=40))
    return data + more if draw(st.booleans()) else more + data


def swap_headers(data, draw, other=b""):
    """The beginning of one file, the rest of another of the same format."""
    at = int(draw(positions) * min(len(data), len(other)))
    return other[:at] + data[at:]


def edit_zip(data, draw):
    """Whole entries swapped, doubled, renamed, cut or flipped, with right checksums: their own pickle must tell."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    i, j = (draw(st.integers(0, len(entries) - 1)) for _ in range(2))
    (name, content), (other, another) = entries[i], entries[j]
    match draw(st.sampled_from(["swap names", "rename", "cut", "drop", "compress"])):
        case "swap names":
            entries[i], entries[j] = (other, content), (name, another)
        case "rename":
            entries[i] = (name + "x", content)
        case "cut":
            entries[i] = (name, content[: int(draw(positions) * len(content))])
        case "drop":
            del entries[i]
        case "compress":
            pass
    stream = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


def edit_header(data, draw):
    """A safetensors header with other numbers, of a length that is right."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    match draw(st.sampled_from(["shape", "dtype", "offsets", "name", "metadata"])):
        case "shape":
            header[name]["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 12, -1, 2**40, 2**63]), max_size=3))
        case "dtype":
            header[name]["dtype"] = draw(st.sampled_from(["F32", "I32", "U32", "F16", "F64", "X", ""]))
        case "offsets":
            header[name]["data_offsets"] = draw(st.lists(st.integers(-8, 600), min_size=2, max_size=2))
        case "name":
            header[name + "x"] = header.pop(name)
        case "metadata":
            key = draw(st.sampled_from(sorted(header["__metadata__"])))
            text = header["__metadata__"][key]
            header["__metadata__"][key] = patch(text.encode(), draw).decode(errors="replace")
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def refused(path, use):
    """Whether a file was refused; with an error that names it."""
    message = None
    try:
        use(interop.load_checkpoint(path))
    except CheckpointError as error:
        message = str(error)
    assert message is None or path.name in message
    return message is not None


def equal(run):
    def check(loaded):
        found = differences(run, loaded)
        assert not found, found[0]

    return check


# Hypothesis looks for new damage and does not shrink: what fails is a file, which the assertion shows.
SETTINGS = dict(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def fuzz(written, file, examples, damages):
    run, folder = written
    data = (folder / file).read_bytes()
    path = folder / f"damaged.{file.partition('.')[2]}"
    other = interop.Checkpoint.from_torch(*trained(torch.optim.Adam))
    interop.save_checkpoint(other, folder / f"other-{file}")
    others = (folder / f"other-{file}").read_bytes()
    counts = {"refused": 0, "equal": 0}

    @settings(max_examples=examples, **SETTINGS)
    @given(st.data())
    def damaged(source):
        damage = source.draw(st.sampled_from(damages))
        arguments = (others,) if damage is swap_headers else ()
        path.write_bytes(damage(data, source.draw, *arguments))
        if path.read_bytes() != others:
            counts["refused" if refused(path, equal(run)) else "equal"] += 1

    damaged()
    print(file, counts)
    assert counts["refused"] > counts["equal"]


ANY = [flip, flip, cut, patch, grow, swap_headers]


@pytest.mark.parametrize("file", FILES)
def test_damaged_files(written, file):
    fuzz(written, file, 150, ANY)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_ten_thousand_damaged_files(written, file):
    fuzz(written, file, 5000, ANY)


@pytest.mark.parametrize(("file", "edit", "examples"), [("run.pt", edit_zip, 60), ("run.safetensors", edit_header, 60)])
def test_edited_files(written, file, edit, examples):
    """What was changed with right checksums is another file: it may be read, but nothing breaks."""
    _, folder = written
    data = (folder / file).read_bytes()
    path = folder / f"edited.{file.partition('.')[2]}"

    @settings(max_examples=examples, **SETTINGS)
    @given(st.data())
    def edited(source):
        path.write_bytes(edit(data, source.draw))
        refused(path, interop.Checkpoint.oddities)

    edited()


@pytest.mark.slow
@pytest.mark.parametrize(("file", "edit"), [("run.pt", edit_zip), ("run.safetensors", edit_header)])
def test_thousands_of_edited_files(written, file, edit):
    test_edited_files(written, file, edit, 2000)


def fuzz_folder(written, examples, checked):
    run, folder = written
    counts = {"refused": 0, "equal": 0, "other": 0}
    path = folder / "damaged.dcp"

    @settings(max_examples=examples, **SETTINGS)
    @given(st.data())
    def damaged(source):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder / "run.dcp", path)
        if not checked:
            (path / "jopt-manifest.json").unlink()
        file = source.draw(st.sampled_from(sorted(path.iterdir())))
        damage = source.draw(st.sampled_from([flip, flip, cut, patch, grow]))
        file.write_bytes(damage(file.read_bytes(), source.draw))
        if checked:
            counts["refused" if refused(path, equal(run)) else "equal"] += 1
        else:
            counts["refused" if refused(path, interop.Checkpoint.oddities) else "other"] += 1

    damaged()
    print("run.dcp", counts)
    assert counts["refused"] > counts["equal"] + counts["other"]


@pytest.mark.parametrize("checked", [True, False], ids=["ours", "of others"])
def test_damaged_folders(written, checked):
    fuzz_folder(written, 30, checked)


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False], ids=["ours", "of others"])
def test_thousands_of_damaged_folders(written, checked):
    fuzz_folder(written, 1000, checked)
