"""The wrappings of the world's training loops, and names where a file has none."""

import json
import warnings

import pytest

torch = pytest.importorskip("torch", reason="files of torch's runs")
pytest.importorskip("safetensors", reason="of the files extra")

import interop  # noqa: E402
from interop.runs.files import CheckpointError  # noqa: E402
from interop.runs.files.difference import differences  # noqa: E402
from interop.runs.files.naming import assign, renamed, suggestion  # noqa: E402
from tests.checkpoints import network, trained, two_groups  # noqa: E402


def lightning(model, optimizer):
    return {
        "epoch": 2,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3}],
    }


WRAPPINGS = {
    "model, optimizer": lambda m, o: {"model": m.state_dict(), "optimizer": o.state_dict(), "step": 3},
    "_state_dict": lambda m, o: {"model_state_dict": m.state_dict(), "optimizer_state_dict": o.state_dict()},
    "state_dict": lambda m, o: {"state_dict": m.state_dict(), "optimizer": o.state_dict(), "arch": "resnet"},
    "net, opt": lambda m, o: {"net": m.state_dict(), "opt": o.state_dict(), "iteration": 3, "scaler": {"scale": 2.0}},
    "lightning": lightning,
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(wrapping, tmp_path):
    model, optimizer = trained()
    expected = interop.Checkpoint.from_torch(model, optimizer)
    raw = WRAPPINGS[wrapping](model, optimizer)
    torch.save(raw, tmp_path / "run.ckpt")
    loaded = interop.load_checkpoint(tmp_path / "run.ckpt")
    assert loaded.extra == {key: x for key, x in raw.items() if key in loaded.extra}
    assert not set(loaded.extra) & {"step", "global_step", "iteration"}
    loaded.extra.clear()
    assert not differences(expected, loaded)
    assert list(loaded.buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_bare_state_dicts(tmp_path):
    model, optimizer = trained()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = interop.load_checkpoint(tmp_path / "model.pt")
    assert not differences(interop.Checkpoint.from_torch(model), loaded)
    assert loaded.optimizer is None
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer.pt: .* have numbers instead of names"):
        interop.load_checkpoint(tmp_path / "optimizer.pt")
    names = [name for name, _ in model.named_parameters()]
    for arguments in ({"model": network()}, {"names": names}):
        loaded = interop.load_checkpoint(tmp_path / "optimizer.pt", **arguments)
        assert loaded.optimizer.names == names
        whole = interop.Checkpoint.from_torch(model, optimizer)
        assert not [d for d in differences(whole, loaded) if not d.name.startswith(("params", "buffers"))]
        other, opt = trained(groups=lambda m: m.parameters(), lr=5.0)
        before = {name: x.clone() for name, x in other.state_dict().items()}
        loaded.to_torch(other, opt)
        assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
        assert opt.param_groups[0]["lr"] == 0.01
        with pytest.raises(CheckpointError, match="the model's state_dict: missing"):
            loaded.to_torch(other)
    with pytest.raises(CheckpointError, match="names: expected 6"):
        interop.load_checkpoint(tmp_path / "optimizer.pt", names=names[:2])
    named = torch.optim.AdamW(network().named_parameters())
    torch.save(named.state_dict(), tmp_path / "named.pt")
    assert interop.load_checkpoint(tmp_path / "named.pt").optimizer.names == names
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="it holds no optimizer; give the model alone"):
        interop.load_checkpoint(tmp_path / "model.ckpt").to_torch(model, optimizer)


def trainer_folder(folder, groups, shards=False):
    from safetensors.torch import save_file

    model, optimizer = trained(groups=groups)
    folder.mkdir()
    tensors = model.state_dict()
    if shards:
        halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            save_file(half, folder / file, metadata={"format": "pt"})
        where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "epoch": 1.5, "log_history": []}))
    return model, optimizer


@pytest.mark.parametrize("shards", [False, True])
def test_trainer_folder(shards, tmp_path):
    """Two groups, which the shapes tell apart, and a model in alphabetical order or in shards."""
    folder = tmp_path / "checkpoint-3"
    model, optimizer = trainer_folder(folder, two_groups, shards)
    loaded = interop.load_checkpoint(folder, model=network())
    assert loaded.extra.pop("lr_scheduler") == {"last_epoch": 3}
    assert loaded.extra.pop("epoch") == 1.5
    assert not differences(interop.Checkpoint.from_torch(model, optimizer), loaded)


def test_optimizer_of_a_part(tmp_path):
    """Frozen parameters are in the model and not in the optimizer."""
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    model, optimizer = trained(groups=lambda m: [p for p in m.parameters() if p.requires_grad], model=model)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="the optimizer has 4 parameters, the model 6"):
        interop.load_checkpoint(tmp_path / "run.pt")
    loaded = interop.load_checkpoint(tmp_path / "run.pt", model=model)
    assert not differences(interop.Checkpoint.from_torch(model, optimizer), loaded)


def test_assign():
    names = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (2, 3), "b.bias": (2,)}
    assert assign([[(2, 3), (2,), None, (2,)]], names) == [list(names)]
    assert assign([[(2, 3), (2, 3)], [(2,), (2,)]], names) == [["a.weight", "b.weight"], ["a.bias", "b.bias"]]
    with pytest.raises(CheckpointError, match="several ways"):
        assign([[(2, 3), (2,)], [(2, 3), (2,)]], names)
    with pytest.raises(CheckpointError, match=r"do not follow the model's parameters at 'a.bias'"):
        assign([[(2, 3), (3,), (2, 3), (2,)]], names)
    with pytest.raises(CheckpointError, match="has 1 parameters, the model 4"):
        assign([[(2, 3)]], names)


def test_renamed():
    names = ["module.a.weight", "module.b.weight", "head"]
    assert list(renamed(names, {"module.": ""}).values()) == ["a.weight", "b.weight", "head"]
    assert list(renamed(names, {"module.*": "net.*"}).values()) == ["net.a.weight", "net.b.weight", "head"]
    assert list(renamed(names, {"*.*.weight": "*.w.*"}).values()) == ["module.w.a", "module.w.b", "head"]
    assert list(renamed(names, {"head": "tail"}).values()) == [*names[:2], "tail"]
    with pytest.raises(CheckpointError, match=r"map 'x.': fits none of the names"):
        renamed(names, {"x.": ""})
    with pytest.raises(CheckpointError, match=r"'module.a.weight' and 'module.b.weight' would both be 'w'"):
        renamed(names, {"module.a.weight": "w", "module.b.weight": "w"})
    with pytest.raises(CheckpointError, match="as many"):
        renamed(names, {"*": "x"})


def test_suggestions():
    """A prefix, or name by name: by shape first, then likeness, then order."""
    wanted = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (2, 3)}
    assert suggestion({f"module.{n}": s for n, s in wanted.items()}, wanted) == {"module.": ""}
    assert suggestion(wanted, {f"net.{n}": s for n, s in wanted.items()}) == {"*": "net.*"}
    found = {"x.weight": (2, 3), "x.bias": (2,), "b.w": (2, 3)}
    assert suggestion(found, wanted) == {"x.weight": "a.weight", "x.bias": "a.bias", "b.w": "b.weight"}
    assert suggestion({"x": (5,)}, {"y": (6,)}) == {}


def test_a_renamed_model_is_loaded_by_the_suggested_map(tmp_path):
    model, optimizer = trained()
    wrapped = torch.nn.ModuleDict({"module": model})
    torch.save({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    other, opt = trained(torch.optim.AdamW)
    with pytest.raises(
        CheckpointError, match=r"(?s)'module.0.weight'.*map=, as {'module.': ''}; .*--map module.=$"
    ) as error:
        interop.load_checkpoint(tmp_path / "run.pt").to_torch(other, opt)
    loaded = interop.load_checkpoint(tmp_path / "run.pt", map=error.value.mapping)
    loaded.to_torch(other, opt)
    assert not differences(*(interop.Checkpoint.from_torch(*run) for run in ((model, optimizer), (other, opt))))
    for file in ("run.safetensors", "run.dcp"):
        interop.save_checkpoint(interop.load_checkpoint(tmp_path / "run.pt"), tmp_path / file)
        assert not differences(loaded, interop.load_checkpoint(tmp_path / file, map=error.value.mapping))


def test_a_checkpoint_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="of the frameworks extra: make test-all installs it")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return self.net(batch).square().sum()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    data = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of few workers
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = interop.load_checkpoint(tmp_path / "run.ckpt", map={"net.": ""})
    assert loaded.step == 4
    assert loaded.extra["lr_schedulers"][0]["last_epoch"] == 2
    loaded.extra.clear()
    expected = interop.Checkpoint.from_torch(module.net, trainer.optimizers[0])
    assert not differences(expected, loaded)
