# %% [markdown]
# # Write an optimizer of your own, for JAX and PyTorch
#
# An optimizer of jopt is a *rule*: what it keeps of each parameter, which numbers a step needs, and what the step does to
# one array. The rest is lifted from it: trees, `jit`, schedules, low precision, a class for PyTorch. Here AdaBelief (Zhuang
# et al. 2020) is written in twenty lines, compared with a NumPy loop, and used in both frameworks.

# %% [install]

# %%
import dataclasses
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

import interop
import jopt
from interop import optim
from jopt import numerics as t
from jopt.rule import Rule, at_least_zero, fraction
from jopt.transform import optimizer, transform

jax.config.update("jax_enable_x64", True)  # to compare in float64,
jax.config.update("jax_platforms", "cpu")  # which a TPU has not

# %% [markdown]
# ## The rule
#
# AdaBelief divides by how far the gradient was from what the momentum expected, where Adam divides by its size:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1) g \qquad s \leftarrow \beta_2 s + (1 - \beta_2)(g - m)^2 + \epsilon$$
#
# $$p \leftarrow p - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}$$
#
# A rule has three methods:
#
# - `init` gives the state of one parameter, by name.
# - `scalars` computes the numbers of a step from the hyperparameters `h` and the step count. It runs in float64, whatever
#   the parameters are in, because `1 - beta2**t` loses half its digits in float32.
# - `update` is one step of one array. It uses `jopt.numerics`, whose operations have torch's names and round as torch's do;
#   so the same lines run on JAX's arrays and on torch's tensors.


# %%
@dataclasses.dataclass(frozen=True)
class Belief(Rule):
    hyperparameters = ("lr", "beta1", "beta2", "eps")
    tuples = {"betas": ("beta1", "beta2")}
    limits = {"lr": at_least_zero("Invalid learning rate: {}"), "beta1": fraction("Invalid beta1: {}")}

    def init(self, h, param):
        return {"exp_avg": t.zeros_like(param), "exp_avg_var": t.zeros_like(param)}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {"1-beta1": 1 - h["beta1"], "beta2": h["beta2"], "1-beta2": 1 - h["beta2"], "eps": h["eps"]}
        c |= {"-lr": -h["lr"] / (1 - h["beta1"] ** step), "root": xp.sqrt(1 - h["beta2"] ** step)}
        return c, {"step": step}

    def update(self, c, grad, state, param):
        m = t.lerp(state["exp_avg"], grad, c["1-beta1"])
        error = t.add(grad, -m)
        v = t.add(t.addcmul(t.mul(state["exp_avg_var"], c["beta2"]), error, error, c["1-beta2"]), c["eps"])
        denominator = t.add(t.div(t.sqrt(v), c["root"]), c["eps"])
        return t.addcdiv(param, m, denominator, c["-lr"]), {"exp_avg": m, "exp_avg_var": v}


@optimizer
def adabelief(lr=1e-3, betas=(0.9, 0.999), eps=1e-16, **options):
    return transform(Belief, dict(lr=lr, betas=betas, eps=eps), **options)


print(adabelief(lr=0.01))

# %% [markdown]
# ## The truth
#
# A loop in NumPy, in float64, written from the equations alone. The problem is softmax regression on scikit-learn's
# handwritten digits, whose gradient one can write down.

# %%
digits = load_digits()
x = (digits.data - digits.data.mean()) / digits.data.std()
onehot = np.eye(10)[digits.target]
STEPS, LR = 100, 0.02


def loss_and_gradient(w):
    logits = x @ w
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return -np.log((p * onehot).sum(1)).mean(), x.T @ (p - onehot) / len(x)


def in_numpy(w, steps, beta1=0.9, beta2=0.999, eps=1e-16):
    m, s, losses = np.zeros_like(w), np.zeros_like(w), []
    for step in range(1, steps + 1):
        loss, g = loss_and_gradient(w)
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
        w = w - LR * (m / (1 - beta1**step)) / (np.sqrt(s / (1 - beta2**step)) + eps)
        losses.append(loss)
    return w, np.array(losses)


begin = 0.01 * np.random.default_rng(0).standard_normal((64, 10))
truth, true_losses = in_numpy(begin, STEPS)
print(f"loss {true_losses[0]:.4f} to {true_losses[-1]:.4f}")
assert true_losses[-1] < 0.1 * true_losses[0]

# %% [markdown]
# ## In JAX
#
# `adabelief(...)` is what `jopt.adamw(...)` is: `init`, an exact `step`, and an optax transformation.


# %%
def jax_loss(params, x, onehot):
    return -(jax.nn.log_softmax(x @ params["weight"].T) * onehot).sum(1).mean()


def in_jax(tx, params, state, steps):
    @jax.jit
    def train_step(params, state, x, onehot):
        loss, grads = jax.value_and_grad(jax_loss)(params, x, onehot)
        params, state = tx.step(grads, state, params)
        return params, state, loss

    data = jnp.asarray(x, params["weight"].dtype), jnp.asarray(onehot, params["weight"].dtype)
    losses = []
    for _ in range(steps):
        params, state, loss = train_step(params, state, *data)
        losses.append(float(loss))
    return params, state, np.array(losses)


def difference(found, expected):
    """The largest, over the largest value."""
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


tx, jax_losses = adabelief(lr=LR), {}
for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5)):
    params = {"weight": jnp.asarray(begin.T, dtype)}
    params, state, jax_losses[dtype] = in_jax(tx, params, tx.init(params), STEPS)
    print(f"{dtype}: weights differ from NumPy's by {difference(params['weight'].T, truth):.0e}")
    assert difference(params["weight"].T, truth) < tolerance

# %% [markdown]
# What jopt does for its own optimizers it does for this one. Any number may be a schedule, the range of numbers is checked,
# optax's names are explained, and a sweep takes it:

# %%
scheduled = adabelief(lr=jopt.schedules.cosine_annealing_lr(LR, T_max=STEPS))
clipped = jopt.chain(jopt.clip_grad_norm(1.0), scheduled)
params = {"weight": jnp.asarray(begin.T)}
_, _, losses = in_jax(clipped, params, clipped.init(params), STEPS)
print(f"clipped, with a cosine schedule: loss {losses[-1]:.4f}")

for wrong in ({"lr": -1.0}, {"learning_rate": 0.1}):
    try:
        adabelief(**wrong)
    except (ValueError, TypeError) as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError(wrong)

result = jopt.sweep(
    lambda params, batch: jax_loss(params, *batch),
    lambda key: {"weight": 0.01 * jax.random.normal(key, (10, 64))},
    lambda step: (x, onehot),
    steps=STEPS,
    lr=np.geomspace(1e-3, 100, 11),
    optimizers={"adabelief": adabelief, "adamw": jopt.adamw},
    seeds=2,
)
print(result.best("adabelief").reason)
assert not result.best("adabelief").at_edge

# %% [markdown]
# ## In PyTorch
#
# Two lines make a class: the rule, and the function whose arguments it takes. It is a `torch.optim.Optimizer` with a
# compiled step, in place; schedulers, hooks, parameter groups and `state_dict` are torch's.


# %%
class AdaBelief(optim.Constructed):
    rule, function = Belief, staticmethod(adabelief)


print(inspect.signature(AdaBelief))


def make():
    model = torch.nn.Linear(64, 10, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(begin.T))
    return model


def in_torch(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(digits.target))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


model = make()
torch_optimizer = AdaBelief(model.parameters(), lr=LR)
torch_losses = in_torch(model, torch_optimizer, STEPS)
print(f"weights differ from NumPy's by {difference(model.weight.detach().T, truth):.0e}")
print({name: tuple(value.shape) for name, value in torch_optimizer.state[model.weight].items()})
assert difference(model.weight.detach().T, truth) < 1e-12

# %% [markdown]
# A transformation also steps a PyTorch model without a class. `interop.wrap` takes any of optax's; yours is one.

# %%
model = make()
in_torch(model, interop.wrap(adabelief(lr=LR), model.named_parameters()), STEPS)
print(f"wrapped: weights differ from NumPy's by {difference(model.weight.detach().T, truth):.0e}")
assert difference(model.weight.detach().T, truth) < 1e-12

# %% [markdown]
# ## From PyTorch to JAX, in the middle
#
# `interop.optimizer_to_jax` knows torch's classes and jopt's, not yours. Since both sides keep the same state under the same
# names, a few lines do it: take the state that JAX begins with, and put torch's values into it.


# %%
def to_jax(tx, model, optimizer):
    params = interop.to_jax(dict(model.named_parameters()))
    tensors = dict(model.named_parameters())
    state = tx.init(params)
    slots = {
        slot: {name: interop.to_jax(optimizer.state[tensors[name]][slot]) for name in params} for slot in state.slots
    }
    # One entry for each parameter, in JAX's order, which is that of the sorted names.
    scalars = {
        name: jnp.array([optimizer.state[tensors[p]][name].item() for p in sorted(params)], jnp.float32)
        for name in state.scalars
    }
    count = jnp.array(int(scalars["step"].max()), jnp.int32)
    return params, state._replace(count=count, scalars=scalars, slots=slots)


model = make()
torch_optimizer = AdaBelief(model.parameters(), lr=LR)
before = in_torch(model, torch_optimizer, STEPS // 2)
params, state = to_jax(tx, model, torch_optimizer)
params, state, after = in_jax(tx, params, state, STEPS // 2)
moved = np.concatenate([before, after])
print(f"half in PyTorch, half in JAX: weights differ from NumPy's by {difference(params['weight'].T, truth):.0e}")
assert difference(params["weight"].T, truth) < 1e-12
assert difference(moved, true_losses) < 1e-12

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogy(true_losses, color="0.6", lw=4, label="NumPy, from the equations")
for name, losses, color in (
    ("JAX, float32", jax_losses["float32"], "C3"),
    ("JAX, float64", jax_losses["float64"], "C2"),
    ("PyTorch, float64", torch_losses, "C0"),
    ("half in PyTorch, half in JAX, float64", moved, "C1"),
):
    left.plot(losses, color=color, lw=1, label=name)
    right.semilogy(np.maximum(np.abs(losses - true_losses), 1e-17), color=color, lw=1, label=name)
left.set(xlabel="step", ylabel="loss")
right.set(xlabel="step", ylabel="difference of the loss from NumPy's")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## What to read next
#
# - [Any optax transformation in PyTorch](../optax-in-pytorch.md): `interop.wrap`.
# - [Moving from torch.optim](../moving-from-torch.md): what such a class does as torch's do, and what it does not.
# - [A run that moves in its middle](../porting-a-run.md), with one of the library's own optimizers.
# - [Each optimizer's page](../optimizers/README.md).
