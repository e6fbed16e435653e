"""The drop-in optimizers in the training frameworks: each run ends where the same run with torch.optim ends.

Each test runs the real package, `pip install '.[frameworks]'`, and the same code twice: with torch.optim's class and
with interop.optim's.
"""

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from interop import optim  # noqa: E402
from tests import cases  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Lightning asks torch in a way that torch has deprecated, and advises on what a small test leaves out.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]

MODULES = {"torch": torch.optim, "ours": optim}
OPTIMIZERS = [
    pytest.param(("SGD", dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)), id="SGD"),
    pytest.param(("AdamW", dict(lr=0.01)), id="AdamW"),
    pytest.param(("NAdam", dict(lr=0.01, decoupled_weight_decay=True, weight_decay=1e-2)), id="NAdam"),
    pytest.param(("Adafactor", dict(lr=0.1)), id="Adafactor"),
]
ADAMW = ("AdamW", dict(lr=0.01))


def needed(package: str) -> Any:
    return pytest.importorskip(package, reason=f"{package} is of the frameworks extra: pip install '.[frameworks]'")


@dataclasses.dataclass
class Run:
    """What is compared: the loss of each batch, and the parameters at the end."""

    losses: list[float]
    params: dict[str, torch.Tensor]

    @classmethod
    def of(cls, losses: list[float], model: nn.Module) -> "Run":
        return cls(losses, {name: p.detach().clone() for name, p in model.named_parameters()})


def assert_same_run(ours: Run, theirs: Run, tolerance: float | None = None) -> None:
    """To the tolerance; without one, to the bit."""
    assert len(ours.losses) == len(theirs.losses) > 0
    pairs = [("losses", *(torch.tensor(run.losses, dtype=torch.float64) for run in (ours, theirs)))]
    pairs += [(name, ours.params[name], theirs.params[name]) for name in theirs.params]
    for name, a, b in pairs:
        assert torch.equal(a, b) if tolerance is None else cases.difference(a, b) <= tolerance, name


def assert_learned(run: Run) -> None:
    """Enough for a step that was left out, or taken twice, to show."""
    third = len(run.losses) // 3
    assert sum(run.losses[-third:]) < 0.9 * sum(run.losses[:third])


def network(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 1))


def dataset(rows: int = 80) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, generator=generator)
    return TensorDataset(x, x.pow(2).mean(1, keepdim=True) + x[:, :1])


# --- accelerate --------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    """The package, without what an Accelerator or a Trainer before has set for the process."""
    package = needed("accelerate")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    package.state.GradientState._reset_state()
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    package.state.GradientState._reset_state()


class Accelerated:
    """A run under Accelerator: accumulation over 3 of an epoch's 10 batches, clipping, a scheduler."""

    def __init__(self, accelerate: Any, module: Any, optimizer: Any, seed: int = 0, **kwargs: Any):
        name, arguments = optimizer
        model = network(seed, dropout=0.1)
        opt = getattr(module, name)(model.parameters(), **arguments)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 3, gamma=0.7)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=3, step_scheduler_with_optimizer=False, **kwargs
        )
        loader = DataLoader(dataset(), batch_size=8, shuffle=True)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, opt, loader, scheduler
        )
        self.clips = "max_norm" not in arguments
        self.losses: list[float] = []

    def train(self, epochs: int) -> Run:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.mse_loss(self.model(x), y)
                    self.accelerator.backward(loss)
                    if self.clips and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 2.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.losses.append(loss.item())
            self.scheduler.step()
        return Run.of(self.losses, self.model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accelerate_accumulates_clips_and_schedules(accelerate, optimizer):
    theirs, ours = (Accelerated(accelerate, module, optimizer).train(5) for module in MODULES.values())
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])


def test_accelerate_in_mixed_precision(accelerate):
    theirs, ours = (
        Accelerated(accelerate, module, ADAMW, mixed_precision="bf16").train(5) for module in MODULES.values()
    )
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.AUTOCAST)


def test_accelerate_leaves_clipping_to_the_step(accelerate):
    theirs = Accelerated(accelerate, torch.optim, ADAMW).train(5)
    ours = Accelerated(accelerate, optim, ("AdamW", dict(lr=0.01, max_norm=2.0)))
    assert_same_run(ours.train(5), theirs, cases.FRONT_ENDS["float32"])
    assert ours.optimizer.optimizer.grad_norm > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("saved_by", MODULES)
def test_accelerate_resumes(accelerate, optimizer, saved_by, tmp_path):
    """With the generators' states: the shuffling and the dropout go on as well."""
    whole = Accelerated(accelerate, optim, optimizer).train(5)
    before = Accelerated(accelerate, MODULES[saved_by], optimizer)
    before.train(2)
    before.accelerator.save_state(str(tmp_path))
    after = Accelerated(accelerate, optim, optimizer, seed=7)
    after.accelerator.load_state(str(tmp_path))
    after.losses = before.losses
    assert after.scheduler.get_last_lr() == before.scheduler.get_last_lr()
    assert_same_run(after.train(3), whole, None if saved_by == "ours" else cases.FRONT_ENDS["float32"])


# --- Lightning ---------------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    return needed("lightning")


class ResumableLoader(DataLoader):
    """Goes on in the middle of an epoch, as Lightning asks for."""

    position = 0

    def __iter__(self) -> Any:
        start = self.position % len(self)
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.position = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def lit_module(lightning: Any) -> type:
    """Made here, for its base class is the package's."""

    class Module(lightning.LightningModule):
        """Automatic optimization, with a scheduler by the step."""

        def __init__(self, module: Any, optimizer: Any, seed: int = 0):
            super().__init__()
            self.module, self.optimizer = module, optimizer
            self.net = network(seed)
            self.losses: list[float] = []

        def configure_optimizers(self) -> Any:
            name, arguments = self.optimizer
            opt = getattr(self.module, name)(self.net.parameters(), **arguments)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 60)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            self.losses.append(outputs["loss"].item())

    return Module


def fit(
    lightning: Any,
    model: Any,
    folder: Any,
    ckpt_path: str | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    **kwargs: Any,
) -> Run:
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    kwargs = {"max_epochs": 4, "enable_checkpointing": False} | kwargs
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **kwargs)
    trainer.fit(model, ResumableLoader(dataset(), batch_size, num_workers=num_workers), ckpt_path=ckpt_path)
    return Run.of(model.losses, model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [("norm", 2.0), ("value", 0.2), None], ids=str)
def test_lightning_clips_and_schedules(lightning, optimizer, clip, tmp_path):
    options = {} if clip is None else dict(gradient_clip_algorithm=clip[0], gradient_clip_val=clip[1])
    make = lit_module(lightning)
    theirs, ours = (fit(lightning, make(module, optimizer), tmp_path, **options) for module in MODULES.values())
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("64-true", cases.FRONT_ENDS["float64"]), ("bf16-mixed", cases.AUTOCAST)]
)
def test_lightning_in_other_precisions(lightning, precision, tolerance, tmp_path):
    make = lit_module(lightning)
    theirs, ours = (fit(lightning, make(m, ADAMW), tmp_path, precision=precision) for m in MODULES.values())
    assert_learned(ours)
    assert_same_run(ours, theirs, tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("saved_by", MODULES)
def test_lightning_resumes_in_an_epochs_middle(lightning, optimizer, saved_by, tmp_path):
    make = lit_module(lightning)
    whole = fit(lightning, make(optim, optimizer), tmp_path)
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=13)
    keep: Any = dict(enable_checkpointing=True, callbacks=[checkpoint])
    before, after = make(MODULES[saved_by], optimizer), make(optim, optimizer, seed=7)
    fit(lightning, before, tmp_path, max_steps=13, **keep)
    after.losses = before.losses
    resumed = fit(lightning, after, tmp_path, str(tmp_path / "step=13.ckpt"), **keep)
    assert_same_run(resumed, whole, None if saved_by == "ours" else cases.FRONT_ENDS["float32"])


def test_lightning_with_workers(lightning, tmp_path):
    """Which fork in each epoch, from a process that has stepped."""
    make, options = lit_module(lightning), dict(num_workers=1, max_epochs=3)
    theirs, ours = (fit(lightning, make(module, ADAMW), tmp_path, **options) for module in MODULES.values())
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])


def test_lightning_accumulates(lightning, tmp_path):
    make, options = lit_module(lightning), dict(accumulate_grad_batches=3, max_epochs=6)
    theirs, ours = (fit(lightning, make(module, ADAMW), tmp_path, **options) for module in MODULES.values())
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])


def adversaries(lightning: Any) -> type:
    class Adversaries(lightning.LightningModule):
        """Manual optimization: two networks against each other, an optimizer and a scheduler each."""

        def __init__(self, module: Any):
            super().__init__()
            self.automatic_optimization = False
            self.module = module
            self.one, self.other = network(0), network(1)
            self.losses: list[float] = []

        def configure_optimizers(self) -> Any:
            opts = [
                self.module.Adam(self.one.parameters(), lr=0.01, betas=(0.5, 0.9)),
                self.module.SGD(self.other.parameters(), lr=0.02, momentum=0.9),
            ]
            return opts, [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in opts]

        def training_step(self, batch: Any, index: int) -> None:
            x, y = batch
            first, second = self.optimizers()
            with first.toggle_model():  # without a closure
                loss = nn.functional.mse_loss(self.one(x), y) - 0.1 * nn.functional.mse_loss(self.other(x), self.one(x))
                first.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(first, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                first.step()

            def closure() -> Any:
                loss = nn.functional.mse_loss(self.other(x), self.one(x))
                second.zero_grad()
                self.manual_backward(loss)
                self.losses.append(loss.item())
                return loss

            with second.toggle_model():
                second.step(closure)
            self.losses.append(loss.item())

        def on_train_epoch_end(self) -> None:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    return Adversaries


def test_lightning_manual_optimization_of_two(lightning, tmp_path):
    make = adversaries(lightning)
    theirs, ours = (fit(lightning, make(module), tmp_path) for module in MODULES.values())
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])


def test_lightning_lbfgs(lightning, tmp_path):
    """Whose step calls Lightning's closure more than once. All data in one batch, or the line search means little."""
    make, optimizer = lit_module(lightning), ("LBFGS", dict(lr=1, max_iter=4, line_search_fn="strong_wolfe"))
    options = dict(batch_size=80, precision="64-true", max_epochs=9)
    theirs, ours = (fit(lightning, make(module, optimizer), tmp_path, **options) for module in MODULES.values())
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.NETWORK["float64"])


def test_lightning_reaches_max_norm_and_grad_norm(lightning, tmp_path):
    """Through the wrapper that `self.optimizers()` gives; equal to Lightning's clipping of torch.optim's."""
    Module = lit_module(lightning)

    class Manual(Module):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.automatic_optimization = False
            self.norms: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            opt, loss = self.optimizers(), super().training_step(batch, index)
            opt.max_norm = 2.0
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            self.norms.append(opt.grad_norm.item())
            self.lr_schedulers().step()
            return loss

    model = Manual(optim, ADAMW)
    ours = fit(lightning, model, tmp_path)
    theirs = fit(lightning, Module(torch.optim, ADAMW), tmp_path, gradient_clip_val=2.0)
    assert min(model.norms) < 2.0 < max(model.norms)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])


class Fabricated:
    """A run under Lightning Fabric, with clipping."""

    def __init__(self, lightning: Any, module: Any, seed: int = 0):
        self.fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = network(seed)
        self.model, self.optimizer = self.fabric.setup(model, module.AdamW(model.parameters(), lr=0.01))
        self.losses: list[float] = []

    def train(self, epochs: int) -> Run:
        for _ in range(epochs):
            for x, y in self.fabric.setup_dataloaders(DataLoader(dataset(), batch_size=8)):
                self.optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.model(x), y)
                self.fabric.backward(loss)
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=2.0)
                self.optimizer.step()
                self.losses.append(loss.item())
        return Run.of(self.losses, self.model.module)


@pytest.mark.parametrize("saved_by", MODULES)
def test_fabric(lightning, saved_by, tmp_path):
    theirs = Fabricated(lightning, torch.optim).train(4)
    before, after = Fabricated(lightning, MODULES[saved_by]), Fabricated(lightning, optim, seed=7)
    before.train(2)
    before.fabric.save(tmp_path / "state.ckpt", {"model": before.model, "optimizer": before.optimizer})
    after.fabric.load(tmp_path / "state.ckpt", {"model": after.model, "optimizer": after.optimizer})
    after.losses = before.losses
    ours = after.train(2)
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])


# --- transformers ------------------------------------------------------------------------------------


@pytest.fixture
def transformers(accelerate, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return needed("transformers")


def language_model(transformers: Any, seed: int) -> Any:
    """A Llama in small, its embeddings tied and its dropout on.

    Without biases: that of the keys has no gradient but rounding, which Adam divides by rounding.
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def sentences(rows: int = 48) -> list[dict[str, torch.Tensor]]:
    """Counting, from anywhere, by ones or twos."""
    numbers = [(torch.arange(16) * (1 + i % 2) + 5 * i) % 32 for i in range(rows)]
    return [dict(input_ids=x, labels=x) for x in numbers]


def arguments(transformers: Any, folder: Any, **kwargs: Any) -> Any:
    """Six steps an epoch; a checkpoint after the seventh."""
    options = dict(
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=7,
        save_strategy="steps",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=11,
    )
    return transformers.TrainingArguments(str(folder), **(options | kwargs))


def trainer(transformers: Any, folder: Any, module: Any, optimizer: Any, seed: int = 0) -> Any:
    name, options = optimizer
    model = language_model(transformers, seed)
    opt = getattr(module, name)(model.parameters(), **options)
    scheduler = transformers.get_cosine_schedule_with_warmup(opt, num_warmup_steps=3, num_training_steps=18)
    args = arguments(transformers, folder)
    return transformers.Trainer(model, args, train_dataset=sentences(), optimizers=(opt, scheduler))


def trained(trainer: Any, **kwargs: Any) -> Run:
    trainer.train(**kwargs)
    return Run.of([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("saved_by", MODULES)
def test_transformers_trains_and_resumes(transformers, optimizer, saved_by, tmp_path):
    """From a checkpoint in an epoch's middle, in a new Trainer, with the generators' states."""
    theirs, ours = (
        trained(trainer(transformers, tmp_path / which, module, optimizer)) for which, module in MODULES.items()
    )
    assert_learned(ours)
    assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])
    resumed = trainer(transformers, tmp_path / "resumed", optim, optimizer, seed=7)
    resumed = trained(resumed, resume_from_checkpoint=str(tmp_path / saved_by / "checkpoint-7"))
    assert_same_run(resumed, ours, None if saved_by == "ours" else cases.FRONT_ENDS["float32"])


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_makes_the_optimizer(transformers, bf16, tmp_path):
    """By its class: the Trainer's own groups, without decay for the norms, and its own scheduler."""
    theirs, ours = (
        trained(
            transformers.Trainer(
                language_model(transformers, 0),
                arguments(transformers, tmp_path, bf16=bf16, save_strategy="no", lr_scheduler_type="linear"),
                train_dataset=sentences(),
                optimizer_cls_and_kwargs=(module.AdamW, dict(lr=0.01)),
            )
        )
        for module in MODULES.values()
    )
    assert_learned(ours)
    if bf16:  # torch's own parameters are 7e-2 away from those of a start an ulp away, its losses 2e-4
        assert cases.difference(ours.losses, theirs.losses) <= cases.AUTOCAST
    else:
        assert_same_run(ours, theirs, cases.FRONT_ENDS["float32"])
