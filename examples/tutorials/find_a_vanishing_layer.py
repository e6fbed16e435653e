# %% [markdown]
# # Find a layer whose gradient vanishes
#
# A network does not learn, and the loss does not say why. Often the gradient that reaches some layers is so small that they
# stay as they were drawn. `jopt.monitor` measures every layer inside the compiled step, and `jopt.health_report` names the
# layers that stand out. Here a deep network fails, the report says where, and two cures are tried, and one that is none.

# %% [install]

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import jopt

# %% [markdown]
# ## A network that does not learn
#
# Twenty-four tanh layers on scikit-learn's handwritten digits, started as `torch.nn.Linear` starts: uniformly between
# -1/sqrt(n) and 1/sqrt(n).

# %%
DEPTH, WIDTH, STEPS = 24, 64, 300
digits = load_digits()
images = ((digits.data - digits.data.mean()) / digits.data.std()).astype(np.float32)
labels = digits.target.astype(np.int32)


def batch(step):
    rows = np.random.default_rng(step).integers(len(images), size=128)
    return images[rows], labels[rows]


def as_torch_starts(key, shape):
    return jax.random.uniform(key, shape, minval=-(shape[0] ** -0.5), maxval=shape[0] ** -0.5)


def orthogonal(key, shape):
    """Without biases at first."""
    matrix = jax.nn.initializers.orthogonal()(key, (shape[0] - 1, shape[1]))
    return jnp.concatenate([matrix, jnp.zeros((1, shape[1]))])


def make(initializer):
    """A layer's biases are the last row of its matrix, so that the report has one line for each layer."""
    keys = jax.random.split(jax.random.key(0), DEPTH + 1)
    params = {f"layer {i:02}": initializer(keys[i], (WIDTH + 1, WIDTH)) for i in range(DEPTH)}
    return params | {"out": as_torch_starts(keys[-1], (WIDTH, 10))}


def loss_of(params, x, y, residual=False):
    def layer(h, w):
        new = jnp.tanh(h @ w[:-1] + w[-1:])
        return (h + new if residual else new), None

    # A scan compiles one layer, not 24.
    h, _ = jax.lax.scan(layer, x, jnp.stack([params[f"layer {i:02}"] for i in range(DEPTH)]))
    return -jnp.take_along_axis(jax.nn.log_softmax(h @ params["out"]), y[:, None], axis=1).mean()


# %% [markdown]
# `jopt.monitor` goes around the optimizer. Its state has a `health` more; the steps are the same.


# %%
def train(params, tx, loss_of=loss_of, steps=STEPS):
    """The losses, and the report of the first step."""
    tx = jopt.monitor(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        params, state = tx.step(grads, state, params)
        return params, state, loss

    params = jax.tree.map(jnp.array, params)  # a copy, because the step writes over what it is given
    state, losses, report = tx.init(params), [], None
    for step in range(steps):
        params, state, loss = train_step(params, state, *batch(step))
        losses.append(loss)
        report = report or jopt.health_report(state.health, params)
    return np.array([float(x) for x in losses]), report


sgd = jopt.sgd(lr=0.01, momentum=0.9)
stuck, report = train(make(as_torch_starts), sgd)
print(
    f"loss {stuck[0]:.3f} at first, {stuck[-20:].mean():.3f} at the end; guessing one of ten digits has {np.log(10):.3f}"
)
assert stuck[-20:].mean() > 0.98 * np.log(10)

# %% [markdown]
# ## The report
#
# A layer is named *vanishing* if the root mean square of its gradient is below 1e-4 of the largest one of any layer. Here
# is the report of the first step. One step is enough, and it is the cheapest look: before anything is learnt, the gradients
# show what the start of the network does to them.

# %%
print(report)
print(f"\nvanishing: {report.vanishing[0]} to {report.vanishing[-1]}, {len(report.vanishing)} of {DEPTH} layers")
assert report.vanishing[0] == "layer 00"
assert len(report.vanishing) > DEPTH // 3
assert "layer 23" not in report.vanishing
assert not report.exploding

# %% [markdown]
# Each layer passes on about the same part of the gradient. The numbers uniform in (-1/sqrt(n), 1/sqrt(n)) have a standard
# deviation of 1/sqrt(3n). A matrix of such numbers keeps 1/sqrt(3) = 0.58 of a vector's size. So from layer 23 back to
# layer 8 the gradient falls like a power of that number.
#
# The first six layers are about equal. A layer's gradient is the product of what comes back to it and of what went into it.
# The images are large, and fade by the same factor on the way forward, until what the biases add is all that is left. Over
# these layers the one falls as much as the other grows.


# %%
def sizes(report):
    return np.array([x.grad_rms for x in report.layers if x.name.startswith("layer")])


kept = (sizes(report)[8] / sizes(report)[23]) ** (1 / 15)  # from layer 23 back to layer 8
print(f"a layer keeps {kept:.2f} of the gradient's size; 1/sqrt(3) is {3**-0.5:.2f}")
assert abs(kept - 3**-0.5) < 0.06
print(f"layers 00 to 05: {sizes(report)[:6].min():.1e} to {sizes(report)[:6].max():.1e}")
assert sizes(report)[:6].max() < 2 * sizes(report)[:6].min()

# %% [markdown]
# ## The cures
#
# - **Another start.** An orthogonal matrix keeps the size of a vector.
# - **A way around.** A residual connection, `h + tanh(h @ w)`, carries the gradient past every layer.
#
# **AdamW is no cure.** It divides by the gradient's size, so the first layers move too, and the loss leaves the value of
# guessing. But they move in the direction of tiny and noisy gradients, and the loss does not come far. Where exactly it
# ends is chance: on another version of JAX, which rounds otherwise, it ends elsewhere, with a larger learning rate even
# where it began.

# %%
runs = {
    "as it was": (stuck, report),
    "AdamW": train(make(as_torch_starts), jopt.adamw(lr=3e-4)),
    "orthogonal start": train(make(orthogonal), sgd),
    "residual": train(make(as_torch_starts), sgd, functools.partial(loss_of, residual=True)),
}
means = {name: np.convolve(losses, np.ones(20) / 20, "valid") for name, (losses, _) in runs.items()}  # of 20 steps
for name, (_, found) in runs.items():
    vanish = f"{len(found.vanishing):2} layers vanish at the first step"
    print(f"{name:18} {vanish}; loss at best {means[name].min():.3f}, at the end {means[name][-1]:.3f}")

for name in ("orthogonal start", "residual"):
    assert not runs[name][1].vanishing
    assert means[name][-1] < 0.1
assert means["as it was"].min() > 0.98 * np.log(10)
assert 1.5 < means["AdamW"].min() < 0.95 * np.log(10)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, (losses, found) in runs.items():
    right.plot(np.convolve(losses, np.ones(10) / 10, "valid"), label=name)
    if name == "AdamW":
        continue  # the same network, so the same first gradients
    color = {"as it was": "C0", "orthogonal start": "C2", "residual": "C3"}[name]  # as on the right
    left.semilogy(sizes(found), ".-", color=color, label=name)
    marked = [i for i in range(DEPTH) if f"layer {i:02}" in found.vanishing]
    left.plot(marked, sizes(found)[marked], "x", color="black", label="named by the report" if marked else None)
left.set(xlabel="layer", ylabel="gradient at the first step (rms)", title="What reaches the layers")
right.set(xlabel="step", ylabel="loss, mean of ten steps", title="What comes of it", ylim=(0, 3))
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## One bad layer in the middle
#
# It is not always the first ones. Here one matrix of the orthogonal network was made a million times too small. All layers
# before it are cut off from the gradient, so all of them are named. So is `out`, because next to nothing reaches it on the
# way forward. The first layer that is not named is the culprit: it gets its gradient, and passes nothing on.

# %%
broken = make(orthogonal)
broken["layer 15"] *= 1e-6
_, found = train(broken, sgd, steps=1)
culprit = next(x.name for x in found.layers if x.name not in found.vanishing)
print(f"vanishing: {found.vanishing[0]} to {found.vanishing[-2]}, and {found.vanishing[-1]}; look at {culprit}")
assert found.vanishing == (*(f"layer {i:02}" for i in range(15)), "out")
assert culprit == "layer 15"

# %% [markdown]
# ## What the report does not name
#
# It compares layers with each other. Without biases the signal fades on the way forward as the gradient does on the way
# back, and each layer's gradient is the product of both: equally tiny in all layers. None stands out, so none is named. Then
# look at the column *update / param*: a step of a healthy layer is 1e-4 to 1e-2 of the layer, not 1e-8.


# %%
def without_biases(params, x, y):
    return loss_of({name: w if name == "out" else w.at[-1].set(0.0) for name, w in params.items()}, x, y)


_, found = train(make(as_torch_starts), sgd, without_biases, steps=1)
ratios = np.array([x.update_ratio for x in found.layers])
print(f"named: {len(found.vanishing)}; update / param: {ratios.min():.0e} to {ratios.max():.0e}")
assert not found.vanishing
assert ratios.max() < 1e-6

# %% [markdown]
# ## A PyTorch model
#
# The report takes any tree of gradients, so also those that `backward()` left in a torch module.

# %%
import torch
from torch import nn

import interop

torch.manual_seed(0)
model = nn.Sequential(
    *(layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())), nn.Linear(WIDTH, 10)
)
x, y = batch(0)
nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long()).backward()

params = interop.to_jax(dict(model.named_parameters()))
grads = interop.to_jax({name: p.grad for name, p in model.named_parameters()})
tx = jopt.monitor(jopt.sgd(lr=0.05))
_, state = tx.step(grads, tx.init(params), params)
found = jopt.health_report(state.health, params)
weights = [name for name in found.vanishing if name.endswith("weight")]
weights.sort(key=lambda name: int(name.split(".")[0]))  # JAX sorts names by letters, 10 before 2
print(f"vanishing: {weights[0]} to {weights[-1]}, {len(weights)} of {DEPTH} layers")
assert weights[0] == "0.weight"
assert len(weights) > DEPTH // 3

# %% [markdown]
# ## What to read next
#
# - [Vanishing and exploding gradients](../vanishing-gradients.md): recurrences, explosions and clipping too.
# - [Gradient health](../training-tools.md#gradient-health): what is measured, and the other tools around a step.
# - [Choose a learning rate by a sweep](sweep_learning_rates.ipynb).
