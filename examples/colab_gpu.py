# %% [markdown]
# # PyTorch models, stepped by XLA
#
# One import changes: `from interop import optim` in place of `from torch import optim`.
# The optimizer's step is compiled by XLA and runs where the model is, in its memory. On a GPU there is a second way,
# *offloading*: the step runs on the CPU, and the moments take none of the GPU's memory. (To train in JAX see the TPU
# notebook, which runs on a GPU unchanged.)
#
# The steps on a GPU have not been run on one: their programs were compiled for it, and run on a CPU's memory in its way.
#
# In Colab put `jopt-*.whl` beside the notebook (the folder symbol on the left, *Upload*), or on your Drive and mount that.

# %% [install]

# %%
import time

import torch
from torch import nn

from interop import optim

device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"PyTorch {torch.__version__}; the model is on {device}")

# %% [markdown]
# A network learns a function of 32 numbers.

# %%
WIDTH, STEPS = 128, 60
target = torch.randn(32, generator=torch.Generator().manual_seed(1))


def make():
    torch.manual_seed(0)
    layers = [nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1)]
    return nn.Sequential(*layers).to(device)


def loss_of(model, step):
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(step))
    y = torch.tanh(x @ target)[:, None]
    return (model(x.to(device)) - y.to(device)).square().mean()


# %% [markdown]
# ## PyTorch alone

# %%
model = make()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
expected = []
for step in range(STEPS):
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    expected.append(loss.item())
print(f"loss {expected[0]:.4f} to {expected[-1]:.4f}")

# %% [markdown]
# ## The same, stepped by XLA
#
# `optim.AdamW` is `torch.optim.AdamW` with another `step`; clipping can be part of it. Without a GPU it steps the model on
# the CPU.

# %%


def train(model, optimizer, before=lambda: None, after=lambda: None):
    """Losses, and the milliseconds of a step of the optimizer; the first, which compiles, is left out."""
    found, seconds = [], 0.0
    for step in range(STEPS):
        model.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        found.append(loss.item())
        start = time.perf_counter()
        before()
        optimizer.step()
        after()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start if step else 0
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    print(f"loss {found[0]:.4f} to {found[-1]:.4f}, {1e3 * seconds / (STEPS - 1):.2f} ms a step of the optimizer")
    print(f"largest difference of a loss from PyTorch alone: {difference:.1e}")
    return found, difference


model = make()
optimizer = optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
found, difference = train(model, optimizer)

# %% [markdown]
# Its state is PyTorch's: a checkpoint goes on in `torch.optim`, and the other way round.

# %%
plain = torch.optim.AdamW(model.parameters(), lr=1e-3)
plain.load_state_dict(optimizer.state_dict())
first = next(model.parameters())
print(f"step {int(plain.state[first]['step'])}, {sorted(plain.state[first])}")

# %% [markdown]
# ## Offloading
#
# The optimizer steps copies of the parameters on the CPU, and keeps its moments there.

# %%
model = make()
masters = [p.detach().cpu().clone().requires_grad_() for p in model.parameters()]


def fetch():
    for master, p in zip(masters, model.parameters(), strict=True):
        master.grad = p.grad.cpu()


@torch.no_grad()
def bring():
    for master, p in zip(masters, model.parameters(), strict=True):
        p.copy_(master)


_ = train(model, optim.AdamW(masters, lr=1e-3, max_norm=1.0), fetch, bring)
