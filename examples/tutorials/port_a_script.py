# %% [markdown]
# # Port a PyTorch training script to JAX
#
# A ported script is right when it computes what the original computes. A loss that also falls is no proof: a wrong
# optimizer trains too. Here a small script moves to JAX with the same weights and the same batches, and its loss curve is
# compared with the original's, step by step. Then the same is tried with optax's optimizers.

# %% [install]

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from sklearn.datasets import load_digits
from torch import nn

import interop
import jopt

jax.config.update("jax_enable_x64", True)  # only so that the last section can use float64; the rest is float32
jax.config.update("jax_platforms", "cpu")  # beside PyTorch's; a TPU has no float64, and multiplies in bfloat16
torch.set_num_threads(1)  # enough for so small a network; more would wait on the cores that JAX's threads need

# %% [markdown]
# ## The script
#
# A small convolutional network learns scikit-learn's handwritten digits. They need no download.

# %%
STEPS, BATCH = 100, 64
digits = load_digits()
images = ((digits.images - digits.images.mean()) / digits.images.std())[:, None].astype(np.float32)
labels = digits.target


def batch(step):
    """The images and labels of a step: the same in both frameworks, because NumPy draws them from the step's number."""
    rows = np.random.default_rng(step).integers(len(images), size=BATCH)
    return images[rows], labels[rows]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def train_in_torch(make_optimizer, model):
    optimizer = make_optimizer(model.parameters())
    losses = []
    for step in range(STEPS):
        x, y = map(torch.from_numpy, batch(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def torch_rmsprop(params):
    return torch.optim.RMSprop(params, lr=1e-3)


in_torch = train_in_torch(torch_rmsprop, make_model())
print(f"loss {in_torch[0]:.4f} at first, {in_torch[-10:].mean():.4f} at the end")
assert in_torch[-10:].mean() < 0.2 * in_torch[0]

# %% [markdown]
# ## The port
#
# **The weights** are copied from the PyTorch model. JAX's random numbers are not torch's, so the same seed would not do.
# They come as a flat dictionary under PyTorch's names.

# %%
start = interop.to_jax(make_model())["params"]
for name, x in start.items():
    print(name, x.shape, x.dtype)

# %% [markdown]
# **The model** is a function of that dictionary. It is the only part that has to be written by hand.


# %%
def conv(x, params, name, stride):
    y = jax.lax.conv_general_dilated(x, params[f"{name}.weight"], (stride, stride), [(1, 1), (1, 1)])
    return jnp.tanh(y + params[f"{name}.bias"][None, :, None, None])


def loss_of(params, x, y):
    h = conv(conv(x, params, "0", 1), params, "2", 2).reshape(len(x), -1)
    logits = h @ params["5.weight"].T + params["5.bias"][None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


# %% [markdown]
# **Check the model before the optimizer.** Loss and gradients of one batch must agree to the rounding of float32, which is
# about seven digits. Otherwise look for another axis order, another default of an activation (`jax.nn.gelu` is an
# approximation unless you say `approximate=False`), or a mean in the place of a sum.

# %%
model = make_model()
x, y = batch(0)
loss = nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
loss.backward()
value, grads = jax.value_and_grad(loss_of)(start, x, y)

print(f"loss: {loss.item():.7f} in PyTorch, {float(value):.7f} in JAX")
assert abs(loss.item() - float(value)) < 1e-6
for name, p in model.named_parameters():
    difference = float(jnp.abs(grads[name] - interop.to_jax(p.grad)).max() / jnp.abs(grads[name]).max())
    print(f"gradient of {name}: relative difference {difference:.0e}")
    assert difference < 1e-5

# %% [markdown]
# **The optimizer** has torch's name in lower case, and torch's arguments and defaults: `torch.optim.RMSprop(params,
# lr=1e-3)` becomes `jopt.rmsprop(lr=1e-3)`. `tx.step` returns the new parameters and the new state.


# %%
def train_in_jax(tx, params):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        if isinstance(tx, jopt.Transform):
            params, state = tx.step(grads, state, params)
        else:  # optax's own, for comparison
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state, loss

    params = jax.tree.map(jnp.array, params)  # a copy, because the step writes over what it is given
    state, losses = tx.init(params), []
    for step in range(STEPS):
        x, y = batch(step)
        params, state, loss = train_step(params, state, x.astype(params["5.bias"].dtype), y)
        losses.append(loss)
    return np.array([float(x) for x in losses])


with_jopt = train_in_jax(jopt.rmsprop(lr=1e-3), start)
print(f"largest difference of a loss: {np.abs(with_jopt - in_torch).max():.1e}")

# %% [markdown]
# Is that small? Float32 rounds, and training amplifies what was rounded, so no two implementations agree to the last digit
# for long. The yardstick is PyTorch itself: the same script, with every first weight moved to the next number that float32
# has (one *ulp*). A port whose difference is of that size is as good as PyTorch is to itself.


# %%
def nudged(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    return model


one_ulp_away = train_in_torch(torch_rmsprop, nudged(make_model()))


def gap(losses, reference):
    """The largest difference of a loss."""
    return np.abs(losses - reference).max()


yardstick = gap(one_ulp_away, in_torch)
print(f"PyTorch from itself, one ulp away: {yardstick:.1e}; the port from PyTorch: {gap(with_jopt, in_torch):.1e}")
assert gap(with_jopt, in_torch) < 10 * yardstick

# %% [markdown]
# ## What goes wrong with optax in its place
#
# `optax.rmsprop` has the same name and another meaning:
#
# - its `decay` is 0.9 by default, where torch's `alpha` is 0.99;
# - it divides by `sqrt(v + eps)`, where torch divides by `sqrt(v) + eps`. With eps = 1e-8 the first is never below 1e-4,
#   which is not small beside a gradient.
#
# The second line below sets what has a name in both. The third also puts eps where torch has it.

# %%
rmsprops = {
    "jopt.rmsprop(1e-3)": jopt.rmsprop(1e-3),
    "optax.rmsprop(1e-3)": optax.rmsprop(1e-3),
    "optax.rmsprop(1e-3, decay=0.99)": optax.rmsprop(1e-3, decay=0.99),
    "... and eps_in_sqrt=False": optax.rmsprop(1e-3, decay=0.99, eps_in_sqrt=False),
}
rmsprop_curves = {name: train_in_jax(tx, start) for name, tx in rmsprops.items()}

# %% [markdown]
# AMSGrad keeps the largest second moment that it has seen. torch takes the maximum of the moments and corrects their bias
# afterwards. optax takes the maximum of the corrected ones. Those of the first steps are corrected most and are noisy, and
# the maximum never forgets one that was too large. No argument of optax changes that.


# %%
def torch_amsgrad(params):
    return torch.optim.Adam(params, lr=1e-3, amsgrad=True)


amsgrads = {
    "jopt.adam(1e-3, amsgrad=True)": jopt.adam(1e-3, amsgrad=True),
    "optax.amsgrad(1e-3)": optax.amsgrad(1e-3),
}
amsgrad_in_torch = train_in_torch(torch_amsgrad, make_model())
amsgrad_one_ulp_away = train_in_torch(torch_amsgrad, nudged(make_model()))
amsgrad_curves = {name: train_in_jax(tx, start) for name, tx in amsgrads.items()}

# %% [markdown]
# The largest difference of a loss from PyTorch's, and how many times the yardstick that is:

# %%
optimizers = {
    "RMSprop": (in_torch, one_ulp_away, rmsprop_curves),
    "AMSGrad": (amsgrad_in_torch, amsgrad_one_ulp_away, amsgrad_curves),
}
times = {}
for name, (reference, moved, curves) in optimizers.items():
    own = gap(moved, reference)
    print(f"{name + ': torch, one ulp away':35} {own:.1e}")
    for label, losses in curves.items():
        times[label] = gap(losses, reference) / own
        print(f"{label:35} {gap(losses, reference):.1e} {times[label]:9.1f} times")

assert all(x < 10 for name, x in times.items() if name.startswith("jopt"))
assert all(
    times[name] > 100 for name in ("optax.rmsprop(1e-3)", "optax.rmsprop(1e-3, decay=0.99)", "optax.amsgrad(1e-3)")
)

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
for (above, below), (name, (reference, moved, curves)) in zip(axes.T, optimizers.items(), strict=True):
    above.plot(reference, color="0.6", lw=4, label="torch.optim")
    below.semilogy(np.maximum(np.abs(moved - reference), 1e-9), color="0.6", lw=3, label="torch.optim, one ulp away")
    for label, losses in curves.items():
        above.plot(losses, lw=1, label=label)
        below.semilogy(np.maximum(np.abs(losses - reference), 1e-9), lw=1, label=label)
    above.set(title=name, ylabel="loss", ylim=(0, None))
    below.set(xlabel="step", ylabel="difference from torch")
    above.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## To the last digits
#
# In float64 the rounding is 2e-16, and what is left of a difference is a difference of the formulas.

# %%
wide = jax.tree.map(lambda x: x.astype(jnp.float64), start)
for name, make_optimizer, txs in (
    ("torch.optim.RMSprop", torch_rmsprop, rmsprops),
    ("torch.optim.Adam, amsgrad", torch_amsgrad, amsgrads),
):
    reference = train_in_torch(make_optimizer, make_model().double())
    print(f"{name}, last loss {reference[-1]:.14f}")
    for label, tx in txs.items():
        losses = train_in_jax(tx, wide)
        print(f"{label:35} {losses[-1]:.14f}   largest difference {gap(losses, reference):.1e}")
        if label.startswith("jopt"):
            assert gap(losses, reference) < 1e-13
        elif "eps_in_sqrt" not in label:
            assert gap(losses, reference) > 1e-4

# %% [markdown]
# jopt's curves are torch's to the last digit or two of float64. optax's RMSprop gets there with the right arguments, if you
# know them; its AMSGrad does not.
#
# ## What to read next
#
# - [Each optimizer's page](../optimizers/README.md) says how torch, optax and the paper differ.
# - [A run that moves in its middle](../porting-a-run.md), with optimizer state, scheduler and groups, and back.
# - [Schedules](../schedules.md): torch's schedulers as functions of the step.
# - [How close](../parity.md): every optimizer and option against torch.
