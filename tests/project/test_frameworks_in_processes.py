"""The drop-in under the frameworks' own FSDP2, two processes each: trained, saved, killed, resumed, as torch.optim.

Each test starts the real package, `pip install '.[frameworks]'`, under torchrun. Accelerate, and transformers through
it, turn FSDP on only where processes have GPUs; here they are told that these have. Lightning's `FSDPStrategy` refuses
CPUs; its `ModelParallelStrategy` is FSDP2 too.
"""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from torch import nn  # noqa: E402

from interop import optim  # noqa: E402
from tests import ROOT, cases  # noqa: E402

pytestmark = pytest.mark.slow

STEPS = {"whole": range(8), "first half": range(4), "second half": range(4, 8)}
MODULES = {"torch": torch.optim, "ours": optim}


class Block(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.linear = nn.Linear(*sizes, bias=False)

    def forward(self, x):
        return self.linear(x).tanh()


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(16, 64), Block(64, 64), Block(64, 7))


def loss_of(model, step):
    g = torch.Generator().manual_seed(2 * step + int(os.environ["RANK"]))
    x, y = torch.randn(8, 16, generator=g), torch.randn(8, 7, generator=g)
    return (model(x) - y).square().mean()


def make(module, name):
    return functools.partial(getattr(MODULES[module], name), lr=0.02)


def assert_divided(model):
    assert all(hasattr(p, "placements") for p in model.parameters())


def killed():
    """As by a machine that goes away: nothing of the process is finished."""
    torch.distributed.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def as_on_gpus():
    """What accelerate asks before it turns FSDP on."""
    from accelerate import DistributedType, PartialState

    PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerate(module, name, phase, folder):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState

    PartialState(cpu=True, backend="gloo")
    as_on_gpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = network()
    model, optimizer = accelerator.prepare(model, make(module, name)(model.parameters()))
    assert_divided(model)
    if phase == "second half":
        accelerator.load_state(folder)
    losses = []
    for step in STEPS[phase]:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    if phase == "first half":
        accelerator.save_state(folder)
        killed()
    return losses


def lightning(module, name, phase, folder):
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    losses = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def configure_model(self):
            mesh = self.device_mesh["data_parallel"]
            for part in (*self.network, self.network):
                fully_shard(part, mesh=mesh)

        def training_step(self, _):
            loss = loss_of(self.network, self.global_step)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            assert_divided(self.network)
            return make(module, name)(self.parameters())

    path = f"{folder}/lightning"
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=True
        ),
        max_steps=STEPS[phase].stop,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    batches = torch.utils.data.DataLoader(range(100))
    trainer.fit(Module(), batches, ckpt_path=path if phase == "second half" else None, weights_only=False)
    if phase == "first half":
        trainer.save_checkpoint(path)
        killed()
    return losses


def transformers(module, name, phase, folder):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, tie_word_embeddings=False)
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    sentences = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        fsdp="full_shard auto_wrap",
        fsdp_config={
            "fsdp_version": 2,
            "transformer_layer_cls_to_wrap": ["GPT2Block"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
        per_device_train_batch_size=4,
        max_steps=STEPS[phase].stop,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=4,
        save_strategy="no" if phase == "whole" else "steps",
        report_to=[],
        disable_tqdm=True,
    )
    assert arguments.device.type == "cpu"
    as_on_gpus()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": x, "labels": x} for x in sentences],
        optimizer_cls_and_kwargs=(getattr(MODULES[module], name), {"lr": 0.02}),
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if phase == "second half" else None)
    assert_divided(trainer.model)
    if phase == "first half":
        killed()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[4:] if phase == "second half" else losses


FRAMEWORKS = {f.__name__: f for f in (accelerate, lightning, transformers)}


def run(framework, module, name, phase, folder):
    """What process 0 found."""
    out = folder / f"{module}, {phase}.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__]
    child = subprocess.run(
        [sys.executable, *command, framework, module, name, phase, str(folder / "saved"), str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if phase == "first half":
        assert "SIGKILL" in child.stderr, child.stderr
        return None
    assert child.returncode == 0, child.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("accelerate", "AdamW"),
        ("accelerate", "Muon"),
        ("lightning", "AdamW"),
        ("lightning", "Adafactor"),
        ("transformers", "AdamW"),
        ("transformers", "Adafactor"),
    ],
)
def test_a_run_is_saved_killed_and_resumed(framework, name, tmp_path):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is of the frameworks extra: pip install '.[frameworks]'")
    ours = run(framework, "ours", name, "whole", tmp_path)
    run(framework, "ours", name, "first half", tmp_path)
    resumed = run(framework, "ours", name, "second half", tmp_path)
    assert resumed == ours[4:]
    if name != "Adafactor":  # torch's does not step DTensors
        theirs = run(framework, "torch", name, "whole", tmp_path)
        tolerance = cases.MUON["float32"] if name == "Muon" else cases.NETWORK["float32"]
        assert cases.difference(torch.tensor(ours), torch.tensor(theirs)) <= tolerance


if __name__ == "__main__":
    framework, module, name, phase, folder, out = sys.argv[1:]
    losses = FRAMEWORKS[framework](module, name, phase, folder)
    if os.environ["RANK"] == "0":
        with open(out, "w") as file:
            json.dump(losses, file)
