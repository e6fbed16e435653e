# %% [markdown]
# # A PyTorch run, on a TPU in its middle
#
# A PyTorch model and its `torch.optim.AdamW` begin in PyTorch, go on in JAX on a TPU, and come back to PyTorch, which
# continues the same run. At the end it is compared with the run that stayed in PyTorch.
#
# Colab's TPUs, a v5e-1 and a v6e-1, have one core. Where there are more, the same cells divide the optimizer's state and
# each batch among them.
#
# In Colab: *Runtime, Change runtime type*, a TPU; then put `jopt-*.whl` beside the notebook (the folder symbol on the left,
# *Upload*), or on your Drive and mount that. Without a TPU this runs on whatever JAX finds, a CPU too.

# %% [install]

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm  # not tqdm.auto's, which begins a pass of its own: then another order is drawn

import interop
import jopt

jax.config.update("jax_default_matmul_precision", "highest")  # float32 as in PyTorch; leave it out for speed
mesh = Mesh(np.array(jax.devices()), ("data",))
print(f"JAX {jax.__version__} on {mesh.size} x {jax.devices()[0].device_kind}, PyTorch {torch.__version__}")

# %% [markdown]
# ## In PyTorch
#
# A small network on scikit-learn's handwritten digits, which need no download: 1797 images of 8 x 8, kept as bytes.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.uint8)[:, None]
labels = torch.tensor(digits.target)
train_set, (test_images, test_labels) = TensorDataset(images[:1536], labels[:1536]), (images[1536:], labels[1536:])
MEAN, STD, BATCH = 4.88, 6.02, 128


def batches(epoch):
    order = torch.Generator().manual_seed(epoch)
    return DataLoader(train_set, batch_size=BATCH, shuffle=True, drop_last=True, generator=order)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    return model, torch.optim.AdamW(model.parameters(), lr=2e-3)


def torch_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def torch_epoch(model, optimizer, epoch):
    found = []
    for x, y in tqdm(batches(epoch), desc=f"PyTorch, epoch {epoch}"):
        found.append(torch_step(model, optimizer, (x.float() - MEAN) / STD, y))
    return found


def accuracy(model):
    with torch.no_grad():
        return (model((test_images.float() - MEAN) / STD).argmax(1) == test_labels).float().mean().item()


model, optimizer = make()
losses = torch_epoch(model, optimizer, 0)
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, accuracy {accuracy(model):.1%}")

# %% [markdown]
# ## To the TPU
#
# `optimizer_to_jax` takes parameters, moments, step counts and numbers out of the live optimizer, onto JAX's CPU.
# `jax.device_put` takes them to the TPU. `shard_state` divides the state over its cores; the parameters are on each of
# them. On one core nothing is divided, and the numbers and the cells below are the same.

# %%
tx, params, state = interop.optimizer_to_jax(optimizer, model)
everywhere = NamedSharding(mesh, P())
params, whole = jax.device_put((jax.device_get(params), jax.device_get(state)), everywhere)
sharded = jopt.shard_state(tx, params, mesh, "data")
state = jax.device_put(jax.device_get(state), sharded.shardings)

for name, x in state.slots["exp_avg"].items():
    print(f"{name:9} {x.shape!s:16} each core holds {x.addressable_shards[0].data.shape}")


def held(tree):
    """Bytes of a tree on the first device."""
    first = mesh.devices.flat[0]
    shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first]
    return sum(shard.data.nbytes for shard in shards)


undivided, divided = held(whole), held(state)
eighth = sum(x.nbytes if x.size < 1024 else x.nbytes // 8 for x in jax.tree.leaves(whole))  # 1024 is min_size's default
print(f"on a core: parameters {held(params):,} bytes; AdamW's state {divided:,}, of {undivided:,} in all")
if mesh.size == 1:
    print(f"one core: nothing to divide; each of eight would hold {eighth:,}, for tensors below min_size stay whole")
del whole

# %% [markdown]
# The forward pass in JAX, under the parameters' PyTorch names; both give the same loss before going on.


# %%
def conv(x, params, name, stride=1):
    y = jax.lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride), [(1, 1), (1, 1)])
    return jax.nn.relu(y + params[f"{name}.bias"][None, :, None, None])


def loss_of(params, x, y):
    x = conv(conv(x, params, "0"), params, "2", stride=2).reshape(len(x), -1)
    logits = x @ params["5.weight"].T + params["5.bias"][None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


@jax.jit
def preprocess(key, images):
    """Normalise, and shift each image by up to a pixel to the side."""
    shifts = jax.random.randint(key, (len(images),), -1, 2)
    x = jax.vmap(lambda image, shift: jnp.roll(image, shift, 2))(images, shifts)
    return (x.astype(jnp.float32) - MEAN) / STD


def step_of(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_of)(params, x, y)
    params, state = sharded.step(grads, state, params)
    return params, state, loss


train_step = jax.jit(step_of, donate_argnums=(0, 1))  # parameters and state are written in place

x, y = next(iter(batches(0)))
x = (x.float() - MEAN) / STD
here, there = (
    nn.functional.cross_entropy(model(x), y).item(),
    float(loss_of(params, x.numpy(), y.numpy().astype("int32"))),
)
print(f"one batch: loss {here:.6f} in PyTorch, {there:.6f} in JAX")

# %% [markdown]
# ## On the TPU
#
# A thread reads the `DataLoader`, and puts each batch on the TPU ahead of its use, a part of it on each core. Bytes cross;
# normalising and augmenting happen there.

# %%
JAX_EPOCHS = range(1, 5)
key = jax.random.key(0)
step = 0
for epoch in JAX_EPOCHS:
    start, found = time.perf_counter(), []
    arriving = interop.prefetch(batches(epoch), NamedSharding(mesh, P("data")))
    for x, y in tqdm(arriving, desc=f"JAX, epoch {epoch}"):
        params, state, loss = train_step(params, state, preprocess(jax.random.fold_in(key, step), x), y)
        found.append(loss)
        step += 1
    losses += [float(loss) for loss in found]
    jax_ms = 1e3 * (time.perf_counter() - start) / len(found)
    rate = f"{jax_ms:.1f} ms a step with its loading, {BATCH / jax_ms * 1e3:,.0f} images a second"
    print(f"loss {losses[-1]:.3f}, {rate}")

where = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"

# %% [markdown]
# The first epoch includes compiling. So small a network does not need a TPU; what is around it stays the same for a large one.
#
# ## Back in PyTorch
#
# The same model and optimizer objects go on.

# %%
interop.optimizer_to_torch(tx, params, state, model, optimizer)
back_equal = all(np.array_equal(p.detach(), params[name]) for name, p in model.named_parameters())
print(f"parameters arrived: {back_equal}; AdamW's step count: {int(optimizer.state[model[0].weight]['step'])}")
losses += torch_epoch(model, optimizer, JAX_EPOCHS.stop)
print(f"PyTorch, epoch {JAX_EPOCHS.stop}: loss {losses[-1]:.3f}, accuracy {accuracy(model):.1%}")

# %% [markdown]
# ## The run that stayed
#
# The same batches, all in PyTorch. The two differ by the rounding of float32, which training amplifies; a third run in
# PyTorch, whose first weights are moved by one unit in the last place, shows by how much.


# %%
def all_in_torch(nudge=False):
    model, optimizer = make()
    if nudge:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    found = torch_epoch(model, optimizer, 0)
    step = 0
    for epoch in JAX_EPOCHS:
        for x, y in tqdm(batches(epoch), desc=f"PyTorch, epoch {epoch}"):
            x = torch.tensor(np.array(preprocess(jax.random.fold_in(key, step), x.numpy())))
            found.append(torch_step(model, optimizer, x, y))
            step += 1
    return model, found + torch_epoch(model, optimizer, JAX_EPOCHS.stop)


stayed, stayed_losses = all_in_torch()
nudged, nudged_losses = all_in_torch(nudge=True)
difference = max(abs(a - b) for a, b in zip(losses, stayed_losses, strict=True))
yardstick = max(abs(a - b) for a, b in zip(nudged_losses, stayed_losses, strict=True))
print(f"largest difference of a loss: {difference:.1e}; of PyTorch from itself, started one ulp away: {yardstick:.1e}")
print(f"accuracy {accuracy(model):.1%}; the run that stayed {accuracy(stayed):.1%}")

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
first = len(batches(0))
for axes in (above, below):
    axes.axvspan(first, len(losses) - first, color="0.92", label="in JAX" if axes is above else None)
above.plot(stayed_losses, lw=3, color="0.6", label="stayed in PyTorch")
above.plot(losses, lw=1, color="tab:red", label="moved")
above.set(ylabel="loss", yscale="log", title=f"One run, in PyTorch and on {where}")
above.legend()
for other, color, name in ((losses, "tab:red", "moved"), (nudged_losses, "0.4", "PyTorch, one ulp away at the start")):
    gaps = np.abs(np.subtract(other, stayed_losses))
    below.semilogy(np.maximum(gaps, 1e-9), lw=1, color=color, label=name)
below.set(xlabel="step", ylabel="difference of the loss")
below.legend()
plt.show()

# %% [markdown]
# ## A model of your own
#
# 1. **Load it** and the optimizer as you do in PyTorch, from your checkpoint: `model.load_state_dict(...)`,
#    `optimizer.load_state_dict(...)`. Every optimizer of `torch.optim` moves, with its parameter groups; a learning rate
#    scheduler too: `interop.optimizer_to_jax(optimizer, model, scheduler=scheduler)`. A run in a file alone moves by
#    `interop.load_checkpoint("run.pt").to_jax()`.
# 2. **Write the loss in JAX** over a dictionary of the parameters' PyTorch names, as `loss_of` above. Check it on one batch
#    against PyTorch before going on, as above. For a model in flax, `optimizer_to_jax(..., layout="flax")` turns weights and
#    moments along. Batch statistics and other buffers cross by `interop.to_jax(model)["buffers"]`. They arrive on JAX's CPU
#    too: `buffers = jax.device_put(buffers, everywhere)`, or the step fails with *incompatible devices*.
# 3. **A model that does not fit a core**: give the parameters a sharding first (`jax.device_put(params, ...)` with a
#    `NamedSharding` that divides them) and then call `shard_state`: their state lies beside them.
# 4. **Save on the TPU** with orbax, or back in PyTorch by `interop.optimizer_to_torch` and `torch.save`.
#
# In jopt's documentation: `docs/porting-a-run.md` says what moves, and what is exact on a TPU; `docs/files.md` has the
# checkpoints of others, `docs/many-devices.md` how state is divided, `docs/troubleshooting.md` the errors by their words.
