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
    pytest.param(("Adafactor", dict(lr=0.01)), id="Adafactor"),
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
    pairs = [
        ("losses", torch.tensor(ours.losses, dtype=torch.float64), torch.tensor(theirs.losses, dtype=torch.float64))
    ]
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
        self.losses: list[float] = []

    def train(self, epochs: int) -> Run:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.mse_loss(self.model(x), y)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
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
    lightning: Any, model: Any, folder: Any, ckpt_path: str | None = None, batch_size: int = 8, **kwargs: Any
) -> Run:
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    kwargs = {"max_epochs": 4, "enable_checkpointing": False} | kwargs
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **kwargs)
    trainer.fit(model, ResumableLoader(dataset(), batch_size), ckpt_path=ckpt_path)
    return Run.of(model.losses, model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [("norm", 0.5), ("value", 0.05), None], ids=str)
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
