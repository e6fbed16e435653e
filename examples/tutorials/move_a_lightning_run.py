# %% [markdown]
# # A Lightning run, to a TPU and back
#
# A run that Lightning began and saved goes on in JAX, on a TPU if there is one, and comes back into a Lightning checkpoint,
# which a Trainer resumes as if nothing had happened. The proof is a second run that stays in Lightning all the time: both
# have the same losses.
#
# In Colab: *Runtime, Change runtime type*, a TPU. Without one this runs on whatever JAX finds, a CPU too.

# %% [install]

# %%
if importlib.util.find_spec("lightning") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lightning"], check=True)

# %%
import copy
import functools
import logging
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import lightning
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import interop

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
jax.config.update("jax_default_matmul_precision", "highest")  # float32 as in PyTorch; leave it out for speed
folder = Path(tempfile.mkdtemp())
print(
    f"Lightning {lightning.__version__}, PyTorch {torch.__version__}, JAX {jax.__version__} on {jax.devices()[0].device_kind}"
)

# %% [markdown]
# ## In Lightning
#
# A small convolutional network on scikit-learn's handwritten digits, which need no download. The order of the images
# depends on the epoch alone, so that every run here sees the same batches.

# %%
digits = load_digits()
images = torch.tensor((digits.images - digits.images.mean()) / digits.images.std(), dtype=torch.float32)[:, None]
dataset = TensorDataset(images[:1536], torch.tensor(digits.target[:1536]))


class ByEpoch(Sampler):
    """Lightning tells a sampler the epoch where it has a `set_epoch`."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self):
        return len(dataset)


def loader():
    return DataLoader(dataset, batch_size=64, sampler=ByEpoch())


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def fit(module, epochs, ckpt_path=None):
    """The losses, and the Trainer. It trains until so many epochs are complete, those in the checkpoint included."""
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **quiet)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module.losses, trainer


losses, trainer = fit(Digits(), 2)
trainer.save_checkpoint(folder / "begun.ckpt")
print(f"{len(losses)} steps in two epochs, loss {losses[0]:.3f} to {losses[-1]:.3f}")
assert len(losses) == 48

# %% [markdown]
# ## The checkpoint, into JAX
#
# `load_checkpoint` knows Lightning's files: the model, the optimizer with its state by name, the step. `to_jax` gives jopt's
# transformation with the options that the file has, the parameters, and the state. The file's other entries are in `extra`.

# %%
checkpoint = interop.load_checkpoint(folder / "begun.ckpt")
print(f"step {checkpoint.step}, {checkpoint.optimizer.name}, and {', '.join(checkpoint.extra)}")

tx, params, state = checkpoint.to_jax()
params, state = jax.device_put((params, state), jax.devices()[0])  # to the TPU
print(tx)
for name, x in params.items():
    print(f"{name:13} {x.shape!s:14} exp_avg {state.slots['exp_avg'][name].shape}")
assert checkpoint.step == int(state.count) == 48

# %% [markdown]
# The model is a function of the parameters under their names in Lightning. Check it on one batch before going on.


# %%
def conv(x, params, name, stride):
    y = jax.lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride), [(1, 1), (1, 1)])
    return jax.nn.relu(y + params[f"{name}.bias"][None, :, None, None])


def loss_of(params, x, y):
    h = conv(conv(x, params, "net.0", 1), params, "net.2", 2).reshape(len(x), -1)
    logits = h @ params["net.5.weight"].T + params["net.5.bias"][None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


begun = Digits()
checkpoint.to_torch(begun)
x, y = next(iter(loader()))
here, there = nn.functional.cross_entropy(begun.net(x), y).item(), float(loss_of(params, x.numpy(), y.numpy()))
print(f"one batch: loss {here:.6f} in PyTorch, {there:.6f} in JAX")
assert abs(here - there) < 1e-5

# %% [markdown]
# ## Two epochs in JAX


# %%
@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_of)(params, x, y)
    params, state = tx.step(grads, state, params)
    return params, state, loss


found = []
for epoch in (2, 3):
    batches = loader()
    batches.sampler.set_epoch(epoch)
    for x, y in interop.prefetch(batches):
        params, state, loss = train_step(params, state, x, y)
        found.append(loss)
losses += [float(loss) for loss in found]
print(f"step {int(state.count)}, loss {losses[-1]:.3f}")
assert int(state.count) == 96

# %% [markdown]
# ## Back into a Lightning checkpoint
#
# `Checkpoint.from_jax(...).to_torch(module, optimizer)` writes weights and state into live objects of PyTorch. A Lightning
# checkpoint has two things more. What did not change, as the version, is taken from the file that the run came from. And
# Lightning counts epochs, batches and steps of its loops: those go on by what was trained in JAX.


# %%
def later(loops, epochs, steps):
    """Lightning's progress, which was saved at an epoch's end, some whole epochs later."""
    loops = copy.deepcopy(loops)
    fit = loops["fit_loop"]
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] += steps
    by_step = (fit["epoch_loop.batch_progress"], optimizer["step"], optimizer["zero_grad"])
    totals = [(progress["total"], steps) for progress in by_step]
    for counts, n in [*totals, *((counts, epochs) for counts in fit["epoch_progress"].values())]:
        for key in counts:
            counts[key] += n
    return loops


def to_lightning(tx, params, state, original, epochs, path):
    raw = torch.load(original, weights_only=True)
    module = Digits()
    optimizer = module.configure_optimizers()
    interop.Checkpoint.from_jax(tx, params, state).to_torch(module, optimizer)
    steps = int(state.count) - raw["global_step"]
    raw |= {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "loops": later(raw["loops"], epochs, steps),
        "epoch": raw["epoch"] + epochs,
        "global_step": raw["global_step"] + steps,
    }
    torch.save(raw, path)


to_lightning(tx, params, state, folder / "begun.ckpt", 2, folder / "back.ckpt")
resumed, trainer = fit(Digits(), 6, ckpt_path=folder / "back.ckpt")
losses += resumed
print(f"Lightning went on for {len(resumed)} steps, to step {trainer.global_step}, loss {losses[-1]:.3f}")
assert len(resumed) == 48
assert (trainer.global_step, trainer.current_epoch) == (144, 6)

# %% [markdown]
# ## The run that stayed
#
# The same six epochs in Lightning alone. JAX rounds a sum in another order than PyTorch, so the losses agree up to the
# rounding of float32, which training amplifies. How far it does is shown by a third run: Lightning again, its first weights
# moved to the next number that float32 has (one *ulp*).

# %%
stayed, stayed_trainer = fit(Digits(), 6)

nudged_module = Digits()
with torch.no_grad():
    for p in nudged_module.parameters():
        p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
nudged, _ = fit(nudged_module, 6)

stayed, nudged, losses = map(np.array, (stayed, nudged, losses))
difference, yardstick = np.abs(losses - stayed).max(), np.abs(nudged - stayed).max()
print(f"largest difference of a loss: {difference:.1e}; of Lightning from itself, one ulp away: {yardstick:.1e}")
assert len(losses) == len(stayed) == 144
assert (losses[:48] == stayed[:48]).all()
assert difference < 10 * yardstick
assert stayed[-12:].mean() < 0.3 * stayed[:12].mean()

# %% [markdown]
# The way itself changes no bit. A checkpoint that goes to JAX and back without a step there resumes with exactly the losses
# of the run that stayed.

# %%
to_lightning(*checkpoint.to_jax(), folder / "begun.ckpt", 0, folder / "unchanged.ckpt")
exact, _ = fit(Digits(), 6, ckpt_path=folder / "unchanged.ckpt")
print(f"{sum(exact == stayed[48:])} of {len(exact)} losses are equal to the last bit")
assert (np.array(exact) == stayed[48:]).all()

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
for axes in (above, below):
    axes.axvspan(48, 96, color="0.92", label="in JAX" if axes is above else None)
above.plot(stayed, lw=3, color="0.6", label="stayed in Lightning")
above.plot(losses, lw=1, color="tab:red", label="moved")
above.set(ylabel="loss", yscale="log", title="One run, in Lightning, in JAX, and in Lightning again")
below.semilogy(np.maximum(np.abs(losses - stayed), 1e-9), lw=1, color="tab:red", label="moved")
below.semilogy(
    np.maximum(np.abs(nudged - stayed), 1e-9), lw=1, color="0.4", label="Lightning, one ulp away at the start"
)
below.set(xlabel="step", ylabel="difference of the loss", ylim=(5e-10, 1e-4))
above.legend()
below.legend()
plt.show()

# %% [markdown]
# ## A run of your own
#
# - **A scheduler** moves with a live optimizer: `interop.optimizer_to_jax(optimizer, model, scheduler=scheduler)`, after
#   `checkpoint.to_torch(module, optimizer)` and `scheduler.load_state_dict(checkpoint.extra["lr_schedulers"][0])`.
# - **Gradients clipped by the Trainer** are clipped in JAX by `jopt.chain(jopt.clip_grad_norm(1.0), ...)`.
# - **Save at the end of an epoch**, as here. In its middle Lightning needs a loader that knows its place, and `later` would
#   have to count the batches of the epoch too.
#
# ## What to read next
#
# - [Checkpoint files](../files.md): which are read and written, the command line, what is refused.
# - [Moving a run in its middle](../porting-a-run.md): groups, schedulers, averages, flax's layout.
# - [In the training frameworks](../frameworks.md): the compiled optimizers inside of Lightning itself.
# - [Many devices](../many-devices.md): the optimizer's state divided over the cores of a TPU.
