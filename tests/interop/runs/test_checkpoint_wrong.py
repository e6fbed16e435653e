"""Bad and hostile files: an error that names the file, the key and the remedy; no memory is taken, no code is run."""

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest

torch = pytest.importorskip("torch", reason="files of torch's runs")
pytest.importorskip("safetensors", reason="of the files extra")

import interop  # noqa: E402
from interop.runs.files import CheckpointError  # noqa: E402
from tests.checkpoints import network, trained  # noqa: E402


@pytest.fixture
def run(tmp_path):
    """A run's file, and what a model and an optimizer were before."""
    model, optimizer = trained()
    interop.save_checkpoint(interop.Checkpoint.from_torch(model, optimizer), tmp_path / "run.pt")
    return tmp_path / "run.pt"


# --- a run that does not fit ---------------------------------------------------------------------------------------


def without(key):
    return lambda run: run.params.pop(key)


def wrong_shape(run):
    run.params["2.weight"] = torch.zeros(2, 5)


def wrong_type(run):
    run.params["2.weight"] = run.params["2.weight"].double()


def wrong_state(run):
    run.optimizer.state["0.bias"]["exp_avg"] = torch.zeros(9)


def wrong_class(run):
    run.optimizer.name = "SGD"


def unknown_key(run):
    run.optimizer.state["0.bias"]["exp_max"] = torch.zeros(4)


def lost_key(run):
    del run.optimizer.state["0.bias"]["exp_avg_sq"]


def wrong_step(run):
    run.optimizer.state["0.bias"]["step"] = torch.tensor(float("nan"))


def less(run):
    run.optimizer.groups[0]["params"].remove("0.bias")
    del run.optimizer.state["0.bias"]


def mixed(run):
    group = run.optimizer.groups[0]
    run.optimizer.groups = [
        group | {"params": group["params"][:2]},
        group | {"params": group["params"][2:], "weight_decay": 7.0},
    ]


WRONG = {
    without("2.weight"): r"the model's state_dict: missing '2.weight'",
    wrong_shape: r"the model's state_dict: '2.weight': expected shape \(2, 4\), found \(2, 5\)",
    wrong_type: r"'2.weight': expected torch.float32, found torch.float64; nothing is cast",
    wrong_state: r"the state of '0.bias': 'exp_avg': expected shape \(4,\), found \(9,\)",
    wrong_class: "optimizer: expected one of class SGD, found AdamW",
    unknown_key: "the state of '0.bias': AdamW has no 'exp_max'",
    lost_key: "the state of '0.bias': AdamW needs 'exp_avg_sq'",
    wrong_step: "the state of '0.bias': 'step': expected a number of steps, found nan",
    less: "the optimizer's parameters: missing '0.bias'",
    mixed: "the optimizer's group 0 holds '0.weight' and '1.weight', whose options differ here",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_what_does_not_fit_changes_nothing(wrong, run):
    loaded = interop.load_checkpoint(run)
    wrong(loaded)
    torch.manual_seed(1)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=WRONG[wrong]):
        loaded.to_torch(model, optimizer)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 5.0


def test_oddities(run):
    loaded = interop.load_checkpoint(run)
    assert loaded.oddities() == []
    loaded.params["2.bias"] = torch.tensor([float("nan"), 1.0])
    loaded.optimizer.state["0.bias"]["step"] = torch.tensor(2.0)
    loaded.optimizer.state["0.bias"]["exp_max"] = torch.zeros(4)
    del loaded.optimizer.state["2.weight"]
    loaded.step = 9
    assert loaded.oddities() == [
        "params.2.bias: 1 of 2 values are nan or infinite",
        "steps differ: 2 (1, as '0.bias'), 3 (4, as '0.weight')",
        "step is 9, the state's 3",
        "1 parameters without state, as '2.weight'",
        "unknown keys in the state of AdamW: exp_max",
    ]


def test_what_cannot_be_written_leaves_nothing(run, tmp_path):
    loaded = interop.load_checkpoint(run)
    before = run.read_bytes()
    for extra, file, text in [
        ({"callback": object()}, "new.safetensors", r"'callback': expected tensors, numbers.*found builtins.object"),
        ({"model": 1}, "new.pt", "the key 'model' is the run's own"),
        ({"f": lambda: 0}, "run.pt", None),
    ]:
        loaded.extra = extra
        with pytest.raises(CheckpointError if text else (AttributeError, pickle.PicklingError), match=text):
            interop.save_checkpoint(loaded, tmp_path / file)
    loaded.extra = {}
    loaded.params["sparse"] = torch.eye(3).to_sparse()
    with pytest.raises(CheckpointError, match=r"'params.sparse': expected a dense tensor with its values"):
        interop.save_checkpoint(loaded, tmp_path / "new.safetensors")
    loaded.params["sparse"] = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(CheckpointError, match=r"safetensors has no torch.complex128; write a .pt file"):
        interop.save_checkpoint(loaded, tmp_path / "new.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a suffix of .pt"):
        interop.save_checkpoint(loaded, tmp_path / "new.xyz")
    with pytest.raises(CheckpointError, match="its folder is not there"):
        interop.save_checkpoint(loaded, tmp_path / "none" / "new.pt")
    (tmp_path / "new.pt").mkdir()
    with pytest.raises(CheckpointError, match="expected a file, found a folder"):
        interop.save_checkpoint(loaded, tmp_path / "new.pt")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new.pt", "run.pt"]
    assert run.read_bytes() == before


def test_optimizers_of_others():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(CheckpointError, match=r"expected one of torch.optim's but LBFGS, found LBFGS"):
        interop.Checkpoint.from_torch(model, optimizer)
    optimizer = torch.optim.SGD(network().parameters())
    with pytest.raises(CheckpointError, match=r"its parameter 0 of group 0, .* is none of the model's"):
        interop.Checkpoint.from_torch(model, optimizer)


# --- hostile .pt ---------------------------------------------------------------------------------------------------


class Code:
    """What makes a file where its pickle is run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)


def replaced(run, **changes):
    """The file with other entries; `data_0` stands for data/0."""
    changes = {name.replace("data_", "data/").replace("_pkl", ".pkl"): x for name, x in changes.items()}
    with zipfile.ZipFile(run) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    prefix = next(iter(entries)).partition("/")[0]
    archive(run, entries | {f"{prefix}/{name}": x for name, x in changes.items()})


def test_code_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    for file, raw in [("a.pt", Code(mark)), ("b.ckpt", {"state_dict": {"w": torch.ones(2)}, "hyper": Code(mark)})]:
        torch.save(raw, tmp_path / file)
        with pytest.raises(CheckpointError, match=rf"(?s){file}: its pickle .* is not run: \w+.system\. .*state_dicts"):
            interop.load_checkpoint(tmp_path / file)
    assert not mark.exists()


def pickled(storage=b"0", numel=2, shape=(2,), stride=(1,), function=b"torch._utils\n_rebuild_tensor_v2"):
    """The pickle of {"w": a tensor}, by hand."""

    def integer(n):
        return pickle.BININT + struct.pack("<i", n) if n < 2**31 else pickle.LONG1 + b"\x08" + n.to_bytes(8, "little")

    def text(s):
        return pickle.BINUNICODE + struct.pack("<I", len(s)) + s

    def several(values):
        return pickle.MARK + b"".join(map(integer, values)) + pickle.TUPLE

    pid = pickle.MARK + text(b"storage") + pickle.GLOBAL + b"torch\nFloatStorage\n" + text(storage) + text(b"cpu")
    pid += integer(numel) + pickle.TUPLE + pickle.BINPERSID
    hooks = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    tensor = pickle.GLOBAL + function + b"\n" + pickle.MARK + pid + integer(0) + several(shape) + several(stride)
    tensor += pickle.NEWFALSE + hooks + pickle.TUPLE + pickle.REDUCE
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + text(b"w") + tensor + pickle.SETITEM + pickle.STOP


def sized(call):
    """A pickle that calls something with a size."""
    return (
        pickle.PROTO
        + b"\x02"
        + pickle.GLOBAL
        + call
        + b"\n"
        + pickle.LONG1
        + b"\x06"
        + (2**40).to_bytes(6, "little")
        + pickle.TUPLE1
        + pickle.REDUCE
        + pickle.STOP
    )


HOSTILE_PICKLES = {
    "storage that is not there": (pickled(storage=b"9"), "names the storage '9', which the file does not have"),
    "storage larger than its entry": (pickled(numel=2**40), "storage 0: 1099511627776 numbers of 4 bytes in 8 bytes"),
    "tensor larger than its storage": (pickled(shape=(2**40,)), "reaches beyond its storage of 2 numbers"),
    "negative": (pickled(shape=(-1,)), "a tensor has shape"),
    "one number many times": (pickled(shape=(2**40,), stride=(0,)), "more than 8 times the file's"),
    "bytearray": (sized(b"__builtin__\nbytearray"), "from a size alone"),
    "torch.Tensor": (sized(b"torch\nTensor"), "from a size alone"),
    "parameter": (sized(b"torch.nn.parameter\nParameter"), "from a size alone"),
    "bytearray8": (pickle.PROTO + b"\x05\x96" + struct.pack("<Q", 2**40) + b".", "damaged or not of this format"),
    "memo": (pickle.PROTO + b"\x02Nr" + struct.pack("<I", 2**31) + b".", "numbers more objects than it has"),
    "deep": (pickle.PROTO + b"\x02" + b"]" * 100000 + b"a" * 99999 + b".", "expected a dictionary of state_dicts"),
    "empty": (b"", "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles(name, tmp_path):
    data, text = HOSTILE_PICKLES[name]
    path = tmp_path / "bad.pt"
    archive(path, {"bad/data.pkl": data, "bad/byteorder": "little", "bad/data/0": bytes(8), "bad/version": "3\n"})
    with pytest.raises(CheckpointError, match=rf"bad.pt: .*{text}"):
        interop.load_checkpoint(path)


def test_the_pickle_by_hand_is_one_that_torch_reads(tmp_path):
    """So that the others are refused for what they are."""
    path = tmp_path / "good.pt"
    archive(
        path, {"good/data.pkl": pickled(), "good/byteorder": "little", "good/data/0": bytes(8), "good/version": "3\n"}
    )
    assert interop.load_checkpoint(path).params["w"].tolist() == [0.0, 0.0]


def test_archives_that_torch_does_not_write(run, tmp_path):
    path = tmp_path / "bomb.pt"
    archive(path, {"bomb/data.pkl": pickled(numel=2**24), "bomb/data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match=r"is compressed, which torch.save never does"):
        interop.load_checkpoint(path)
    archive(path, {"readme": b""})
    with pytest.raises(CheckpointError, match=r"expected one entry data.pkl"):
        interop.load_checkpoint(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since torch 1.6; an older one"):
        interop.load_checkpoint(path)
    replaced(run, constants_pkl=b"")
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        interop.load_checkpoint(run)
    with pytest.raises(CheckpointError, match="is not there"):
        interop.load_checkpoint(tmp_path / "no.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"empty.pt: is no zip file"):
        interop.load_checkpoint(tmp_path / "empty.pt")


@pytest.mark.parametrize(
    "raw", [[1], {"epoch": 1}, {"model": {"a": 1}}, {"optimizer": {"lr": 1}}, {3: torch.ones(1), 4: 1}]
)
def test_trees_that_hold_no_run(raw, tmp_path):
    torch.save(raw, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"run.pt: .*expected a? ?"):
        interop.load_checkpoint(tmp_path / "run.pt")


# --- hostile safetensors -------------------------------------------------------------------------------------------


def safetensors(path, header, data=b"", length=None):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE_HEADERS = {
    "longer than the file": (dict(header={}, length=2**60), "its header declares 1152921504606846976 bytes"),
    "beyond the end": (dict(header={"w": entry([2**40], 0, 2**42)}), "its tensors declare 4398046511104 bytes"),
    "of another size": (dict(header={"w": entry([2**40], 0, 8)}, data=bytes(8)), "needs 4398046511104 bytes"),
    "overflowing": (dict(header={"w": entry([2**32, 2**32, 4], 0, 0)}), "needs 295147905179352825856 bytes"),
    "negative": (dict(header={"w": entry([-2], 8, 0)}, data=bytes(8)), "not negative"),
    "overlapping": (dict(header={"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, data=bytes(12)), "begins at byte 4"),
    "with a hole": (dict(header={"a": entry([1], 4, 8)}, data=bytes(8)), "begins at byte 4"),
    "of no type": (dict(header={"a": entry([1], 0, 4, "F31")}, data=bytes(4)), "unknown type 'F31'"),
    "of no form": (dict(header=["a"]), "damaged or not of this format"),
    "our convention without tensors": (
        dict(header={"__metadata__": {"jopt": '{"version":1,"params":["w"],"buffers":[]}'}}),
        "tensor 'params.w' is missing",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_headers(name, tmp_path):
    arguments, text = HOSTILE_HEADERS[name]
    safetensors(tmp_path / "bad.safetensors", **arguments)
    with pytest.raises(CheckpointError, match=rf"bad.safetensors: .*{text}"):
        interop.load_checkpoint(tmp_path / "bad.safetensors", format="safetensors")


@pytest.mark.parametrize("file", ["run.pt", "run.safetensors"])
def test_flipped_and_cut(file, run):
    """The tensor or the entry is named."""
    path = run.parent / file
    interop.save_checkpoint(interop.load_checkpoint(run), path)
    data = path.read_bytes()
    at = data.rindex(struct.pack("<4f", *interop.load_checkpoint(run).params["0.bias"].tolist()))
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    text = {"run.pt": "entry 'archive/data/[0-9]+' is damaged", "run.safetensors": "tensor 'params.0.bias': is damaged"}
    with pytest.raises(CheckpointError, match=rf"{file}: {text[file]}"):
        interop.load_checkpoint(path)
    path.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=rf"{file}: "):
        interop.load_checkpoint(path)


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dcp(run):
    path = run.parent / "run.dcp"
    interop.save_checkpoint(interop.load_checkpoint(run), path)
    return path


def unchecked(path):
    """As another program writes it."""
    (path / "jopt-manifest.json").unlink()
    return path


def test_damaged_folders(dcp):
    file = dcp / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:300] + bytes([data[300] ^ 4]) + data[301:])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: is damaged: its checksum"):
        interop.load_checkpoint(dcp)
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"__0_0.distcp: expected {len(data)} bytes, found {len(data) - 1}"):
        interop.load_checkpoint(dcp)
    with pytest.raises(CheckpointError, match=r"bytes [0-9]+ to [0-9]+ of __0_0.distcp, which has"):
        interop.load_checkpoint(unchecked(dcp))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"names the file '__0_0.distcp', which is not in the folder"):
        interop.load_checkpoint(dcp)
    (dcp / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"run.dcp: expected a folder of torch.distributed.checkpoint"):
        interop.load_checkpoint(dcp)


def test_links_and_ways_out(dcp, tmp_path):
    file = dcp / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: expected files and folders, found a symbolic link"):
        interop.load_checkpoint(unchecked(dcp))
    file.unlink()
    metadata = (dcp / ".metadata").read_bytes()
    (dcp / ".metadata").write_bytes(metadata.replace(b"__0_0.distcp", b"../elsewhere"))
    with pytest.raises(CheckpointError, match=r"names the file '../elsewhere', which is not in the folder"):
        interop.load_checkpoint(dcp)
    folder = tmp_path / "trainer"
    folder.mkdir()
    for name in ("../run.pt", str(tmp_path / "run.pt")):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match=r"run.pt', which is not in the folder"):
            interop.load_checkpoint(folder)


def test_the_metadata_of_dcp_names_no_code(dcp, tmp_path):
    mark = tmp_path / "mark"
    unchecked(dcp)
    (dcp / ".metadata").write_bytes(pickle.dumps(Code(mark)))
    with pytest.raises(CheckpointError, match=r"run.dcp: .metadata: its pickle names posix.system, which .* not run"):
        interop.load_checkpoint(dcp)
    assert not mark.exists()


def test_absurd_sizes_in_dcp(dcp):
    metadata = pickle.loads((dcp / ".metadata").read_bytes())
    item = metadata.state_dict_metadata["model.0.weight"]
    item.size = torch.Size([2**40, 3])
    (unchecked(dcp) / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"'model.0.weight': shape \(1099511627776, 3\) .*, more than"):
        interop.load_checkpoint(dcp)


# --- killed, and large ---------------------------------------------------------------------------------------------


KILLED = """
    import sys, torch, interop
    params = {{str(i): torch.full((1 << 20,), float(i)) for i in range(16)}}
    while True:
        interop.save_checkpoint(interop.Checkpoint(params), {path!r})
        print("saved", flush=True)
"""


@pytest.mark.parametrize("file", ["run.pt", "run.dcp", pytest.param("run.safetensors", marks=pytest.mark.slow)])
def test_a_killed_save_leaves_a_whole_file(file, tmp_path):
    path = tmp_path / file
    command = [sys.executable, "-c", textwrap.dedent(KILLED.format(path=str(path)))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"saved\n"
        while not list(tmp_path.glob(f".{file}.*.tmp")):
            time.sleep(0.001)
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(f".{file}.*.tmp")), "it was killed between two saves"
    loaded = interop.load_checkpoint(path)
    assert [x[0].item() for x in loaded.params.values()] == list(range(16))


MEMORY = """
    import os, re, sys, threading, time, torch, interop

    def anonymous():
        return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

    class Peak:
        def __enter__(self):
            self.base = self.peak = anonymous()
            self.on = True
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
            return self
        def watch(self):
            while self.on:
                self.peak = max(self.peak, anonymous())
                time.sleep(0.001)
        def __exit__(self, *_):
            self.on = False
            self.thread.join()
            print(name, self.peak - self.base, flush=True)

    file, other, count, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    params = {str(i): torch.full((size // 4,), float(i)) for i in range(count)}
    interop.save_checkpoint(interop.Checkpoint({"w": torch.ones(1)}), file)  # what is imported at the first time
    interop.save_checkpoint(interop.load_checkpoint(file), other)
    interop.load_checkpoint(other)
    name = "save"
    with Peak():
        interop.save_checkpoint(interop.Checkpoint(params), file)
    del params
    name = "load"
    with Peak():
        run = interop.load_checkpoint(file)
    name = "convert"
    with Peak():
        interop.save_checkpoint(run, other, verify=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("files", [("run.pt", "run.safetensors"), ("run.safetensors", "run.pt"), ("run.pt", "run.dcp")])
def test_memory(files, tmp_path):
    """400 MB in 16 tensors: no part takes more than one tensor over the state; what is mapped is the file's own."""
    count, size = 16, 25 << 20
    paths = [str(tmp_path / file) for file in files]
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), *paths, str(count), str(size)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    peaks = {name: int(peak) for name, peak in (line.split() for line in lines if line)}
    print(peaks)
    state = count * size if files[1] == "run.dcp" else 0  # its pieces are not mapped: what is read back is in memory
    assert set(peaks) == {"save", "load", "convert"}
    assert max(peaks["save"], peaks["load"], peaks["convert"] - state) <= size + (8 << 20)


def test_a_map_that_is_none(tmp_path):
    torch.save({"model_state_dict": torch.nn.Linear(2, 1).state_dict()}, tmp_path / "run.pt")
    with pytest.raises(TypeError, match=r"map: expected a dictionary, as \{'module.\*': '\*'\}, found '\*=0.\*'"):
        interop.load_checkpoint(tmp_path / "run.pt", map="*=0.*")


def test_a_file_without_an_optimizer_says_what_it_has(tmp_path):
    torch.save({"model_state_dict": torch.nn.Linear(2, 1).state_dict()}, tmp_path / "run.pt")
    with pytest.raises(interop.CheckpointError, match=r"found none; interop.to_jax\(checkpoint.params\)"):
        interop.load_checkpoint(tmp_path / "run.pt").to_jax()
