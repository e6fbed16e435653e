# %% [markdown]
# # Choose a learning rate by a sweep
#
# The learning rate decides more than the choice of the optimizer, and no rule of thumb gives it. So try many. `jopt.sweep`
# trains a small model with all learning rates and seeds at once: one compiled program for each optimizer.

# %% [install]

# %%
import functools
import io
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from sklearn.datasets import load_digits

import jopt

# %% [markdown]
# ## What a sweep needs
#
# Three things: the batches, a function that draws the first parameters from a key, and the loss. The problem is a small
# network on scikit-learn's handwritten digits, which need no download.

# %%
STEPS, BATCH = 200, 64
digits = load_digits()
images = ((digits.data - digits.data.mean()) / digits.data.std()).astype(np.float32)
labels = digits.target.astype(np.int32)
rows = np.random.default_rng(0).integers(1500, size=(STEPS, BATCH))
batches = images[rows], labels[rows]  # stacked along a first axis of steps
held_out = images[1500:], labels[1500:]


def init(key):
    a, b = jax.random.split(key)
    return {
        "hidden": jax.random.normal(a, (64, 32)) / 8,
        "bias": jnp.zeros(32),
        "out": jax.random.normal(b, (32, 10)) / 32**0.5,
    }


def logits(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"][None]) @ params["out"]


def loss(params, batch):
    x, y = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(params, x)), y[:, None], axis=1).mean()


# %% [markdown]
# ## The sweep
#
# Thirteen learning rates from 1e-4 to 100, two optimizers, four seeds: 104 runs. The seeds change the first parameters; the
# batches are the same for all.

# %%
lrs = np.geomspace(1e-4, 100, 13)
optimizers = {"adamw": jopt.adamw, "momentum": functools.partial(jopt.sgd, momentum=0.9)}

result = jopt.sweep(loss, init, batches, lr=lrs, optimizers=optimizers, seeds=4)
print(result)

# %% [markdown]
# A row is a setting, over its seeds. A run *diverged* if its loss was not finite, or if it ended above twice its first loss.
# Either counts as an infinite final loss, and stands as `inf` here; the curve itself may be finite, as those below are.
# In the picture the band is from the lowest seed to the highest, a cross at the top is a learning rate at which a seed
# diverged, and the star is what is recommended.

# %%
picture = io.BytesIO()
result.plot(picture)
display(Image(picture.getvalue(), width=700))

# %% [markdown]
# ## Choose
#
# `best()` does not take the single lowest loss, which luck may have lowered. It takes the lowest median over the seeds of
# the settings none of whose seeds diverged. Then it goes up to the largest learning rate that is as good within the noise
# and has no diverging neighbour. The reason says all that.

# %%
chosen = {name: result.best(name) for name in optimizers}
for best in chosen.values():
    print(best.reason, "\n")
    assert not best.at_edge

assert chosen["adamw"].lr < chosen["momentum"].lr
assert any(run.diverged for run in result.runs)

# %% [markdown]
# Every run's curve is in `result.runs`. Below and above the chosen learning rate the curves show why: too small a one is
# not there yet, too large a one stays high.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for axis, (name, best) in zip(axes, chosen.items(), strict=True):
    for lr, color in ((lrs[0], "tab:blue"), (best.lr, "tab:green"), (lrs[9], "tab:red")):
        for run in result.runs:
            if (run.optimizer, run.lr) == (name, lr):
                axis.semilogy(run.curve, color=color, lw=0.8, label=f"lr {lr:.2g}" if run.seed == 0 else None)
    axis.set(title=name, xlabel="step", ylabel="loss", ylim=(1e-3, 100))
    axis.legend()
plt.show()


def final(name, lr):
    (setting,) = (s for s in result.settings if (s.optimizer, s.lr) == (name, lr))
    return setting.median


for name, best in chosen.items():
    assert final(name, best.lr) < 0.1 * min(final(name, lrs[0]), final(name, lrs[9]))

# %% [markdown]
# ## It is the loop, only faster
#
# The same runs one after the other, as one would write them: a jitted step, compiled once for each optimizer, with the
# learning rate in the state, where it changes without compiling again.


# %%
def loop(seeds):
    curves = []
    for make in optimizers.values():
        tx = make(lr=1.0, hyperparams_in_state=True)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train_step(params, state, batch, tx=tx):
            value, grads = jax.value_and_grad(loss)(params, batch)
            params, state = tx.step(grads, state, params)
            return params, state, value

        for lr in lrs:
            for seed in range(seeds):
                params = init(jax.random.key(seed))
                state = tx.init(params)
                state.hyperparams["lr"] = jnp.asarray(lr, jnp.float32)
                values = []
                for x, y in zip(*batches, strict=True):
                    params, state, value = train_step(params, state, (x, y))
                    values.append(value)
                curves.append(np.array(jax.device_get(values)))
    return curves


seconds = {}
for seeds in (1, 12):
    start = time.perf_counter()
    many = jopt.sweep(loss, init, batches, lr=lrs, optimizers=optimizers, seeds=seeds)
    middle = time.perf_counter()
    curves = loop(seeds)
    seconds[len(curves)] = middle - start, time.perf_counter() - middle
for runs, (sweeping, looping) in seconds.items():
    print(f"{runs:4} runs: sweep {sweeping:4.1f} s, loop {looping:4.1f} s, compiling included in both")
sweeping, looping = (seconds[312][i] / seconds[26][i] for i in (0, 1))
print(f"twelve times as many runs take the sweep {sweeping:.1f} times as long, the loop {looping:.1f} times")
assert seconds[312][0] < seconds[312][1]

# %% [markdown]
# A sweep compiles as long for few runs as for many, so for a handful of runs of a small model the loop is as good. What a
# sweep saves is the time around the steps: a model whose single step fills the machine gains little.
#
# The losses are the same: in the first steps to the rounding of float32. Later that is amplified, most where the learning
# rate is large.

# %%
for steps in (10, STEPS):
    differences = [
        np.max(np.abs(run.curve[:steps] - curve[:steps]) / run.curve[:steps])
        for run, curve in zip(many.runs, curves, strict=True)
        if run.lr <= chosen[run.optimizer].lr
    ]
    print(f"first {steps} steps, up to the chosen learning rate: relative difference of a loss {max(differences):.0e}")
    if steps == 10:
        assert max(differences) < 1e-3

# %% [markdown]
# ## Pitfalls
#
# **The best is at the edge.** Then a better one may lie outside of the grid. `at_edge` and the reason say so: widen it.

# %%
narrow = jopt.sweep(loss, init, batches, lr=[1e-4, 3e-4, 1e-3], seeds=2).best()
print(narrow.reason)
assert narrow.at_edge

# %% [markdown]
# **The training has a schedule and the sweep has none.** A learning rate that falls in the end may be larger before. So give
# the sweep the schedule, as a factor of the learning rate. On a finer grid around the choice:

# %%
fine = np.geomspace(1e-2, 1e-1, 5)
cosine = jopt.schedules.cosine_annealing_lr(1.0, T_max=STEPS)
constant, falling = (jopt.sweep(loss, init, batches, lr=fine, seeds=4, schedule=x).best() for x in (None, cosine))
print(
    f"constant: lr {constant.lr:.3f}, loss {constant.loss:.4f};  cosine: lr {falling.lr:.3f}, loss {falling.loss:.4f}"
)
assert falling.lr > constant.lr
assert falling.loss < constant.loss

# %% [markdown]
# **A low training loss is not what you want.** A sweep compares training losses. Train once with the choice, and look at
# data that it has not seen.

# %%
tx = jopt.adamw(lr=chosen["adamw"].lr)
params = init(jax.random.key(0))
state = tx.init(params)


@jax.jit
def train_step(params, state, batch):
    return tx.step(jax.grad(loss)(params, batch), state, params)


for x, y in zip(*batches, strict=True):
    params, state = train_step(params, state, (x, y))
accuracy = float((logits(params, held_out[0]).argmax(1) == held_out[1]).mean())
print(f"accuracy on images that were held out: {accuracy:.1%}")
assert accuracy > 0.85

# %% [markdown]
# **The learning rate belongs to everything else.** Another batch size, another width, another weight decay: another
# learning rate. Other numbers are swept beside it, as `weight_decay=[0.0, 0.1]`.
#
# ## A PyTorch model
#
# `interop.sweep` takes a torch module in the place of `init`, and a loss of torch. The result is the same kind of object.

# %%
import torch
from torch import nn

import interop

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def torch_loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


torch_batches = torch.from_numpy(batches[0]), torch.from_numpy(batches[1]).long()
in_torch = interop.sweep(model, torch_loss, torch_batches, lr=lrs[3:10], optimizers="adamw", seeds=2)
print(in_torch.best().reason)
optimizer = torch.optim.AdamW(model.parameters(), lr=in_torch.best().lr)
assert 1e-3 < in_torch.best().lr < 0.3

# %% [markdown]
# ## What to read next
#
# - [Sweeps](../sweeps.md): batches, schedules, other numbers, memory, several devices, the range test.
# - [Which optimizer, which learning rate](../choosing.md): what sweeps say to the usual advice.
# - [Schedules](../schedules.md).
