"""A language model begun in PyTorch, continued in JAX, finished in PyTorch: one run, one curve.

    python -m examples.porting_a_run                   # Python's own reference texts, which every installation has
    python -m examples.porting_a_run --text FILE       # any other text

A transformer of characters (350,000 parameters), AdamW with and without weight decay, warm-up and cosine, clipped
gradients. Its first third is a common PyTorch script. Then parameters, optimizer state, schedule and groups move to
JAX, where jopt steps a jitted function for the second third (on a TPU, if there is one); and back.

Beside it the same run that stays in PyTorch, and, as the yardstick, that run again with each first weight moved by one
ulp: training in float32 takes any two runs apart, so the moved one agrees if its losses are no further away than
twice what the smallest change there is does to PyTorch, or than the loss's own rounding.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from tqdm import tqdm

import interop
import jopt
from examples import digits

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 96, 4, 3, 64, 16
LR, MAX_NORM, WARM_UP, SMOOTH = 2e-3, 1.0, 20, 10
NUDGES, MARGIN, ROUNDING = 2, 2.0, 1e-6  # a mean of a thousand logarithms in float32


# --- data


def load(path: Path | None) -> tuple[np.ndarray, int]:
    """The text's characters as integers, and how many different ones there are."""
    if path is None:
        spec = importlib.util.find_spec("pydoc_data.topics")
        if spec is None or spec.origin is None:
            sys.exit("this Python has no pydoc_data; give a text: --text FILE")
        path = Path(spec.origin)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        sys.exit(f"--text {path}: {error.strerror}")
    alphabet = sorted(set(text))
    if len(text) < 50 * CONTEXT:
        sys.exit(f"--text {path}: expected at least {50 * CONTEXT} characters, found {len(text)}")
    numbers = {c: i for i, c in enumerate(alphabet)}
    return np.array([numbers[c] for c in text], np.int32), len(alphabet)


def batch(data: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The characters of a step, and those that follow them."""
    starts = np.random.default_rng(step).integers(0, len(data) - CONTEXT - 1, BATCH)
    at = starts[:, None] + np.arange(CONTEXT)
    return data[at], data[at + 1]


# --- the model, in PyTorch and in JAX


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, characters: int):
        super().__init__()
        self.embed, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.embed.weight  # tied

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The same network as a function of the PyTorch model's parameters, by their names there."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(name: str, x: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * params[f"{name}.weight"] + params[f"{name}.bias"]

    def attention(name: str, x: jax.Array) -> jax.Array:
        qkv = linear(f"{name}.qkv", x).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        return jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), is_causal=True).reshape(x.shape)

    x = params["embed.weight"][x] + params["position.weight"]
    for i in range(LAYERS):
        name = f"blocks.{i}"
        x = x + linear(f"{name}.proj", attention(name, norm(f"{name}.norm1", x)))
        x = x + linear(f"{name}.down", jax.nn.gelu(linear(f"{name}.up", norm(f"{name}.norm2", x)), approximate=False))
    return norm("norm", x) @ params["embed.weight"].T


# --- the run


class Run:
    """A PyTorch training script, and its second third in JAX."""

    def __init__(self, data: np.ndarray, characters: int, steps: int, show: Any, nudge: int | None = None):
        self.data, self.show, self.losses = data, show, []
        torch.manual_seed(0)
        self.model = Transformer(characters)
        if nudge is not None:
            digits.nudge(self.model, nudge)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
        warm_up = lr_scheduler.LinearLR(self.optimizer, 0.05, total_iters=WARM_UP)
        cosine = lr_scheduler.CosineAnnealingLR(self.optimizer, max(steps - WARM_UP, 1), eta_min=LR / 10)
        self.scheduler = lr_scheduler.SequentialLR(self.optimizer, [warm_up, cosine], [WARM_UP])

    def in_torch(self, steps: range) -> None:
        for step in steps:
            x, y = map(torch.from_numpy, batch(self.data, step))
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(x.long()).flatten(0, 1), y.long().flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
            self.show()

    def in_jax(self, steps: range) -> None:
        tx, params, state = interop.optimizer_to_jax(self.optimizer, self.model, scheduler=self.scheduler)
        clip = jopt.clip_grad_norm(MAX_NORM)
        params, state = jax.device_put((params, state), jax.devices()[0])

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train_step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = jax.nn.log_softmax(apply(params, x))
                return -jnp.mean(jnp.take_along_axis(logits, y[..., None], axis=-1))

            value, grads = jax.value_and_grad(loss)(params)
            grads, _ = clip.update(grads, clip.init(params), params)
            params, state = tx.step(grads, state, params)
            return params, state, value

        for step in steps:
            params, state, value = train_step(params, state, *batch(self.data, step))
            self.losses.append(float(value))
            self.show()
        interop.optimizer_to_torch(tx, params, state, self.model, self.optimizer, scheduler=self.scheduler)


# --- what comes out


def smooth(losses: list[float]) -> np.ndarray:
    return np.convolve(losses, np.full(SMOOTH, 1 / SMOOTH), "valid")


def gap(losses: list[float], reference: list[float]) -> float:
    """How far the smoothed losses come apart."""
    return float(np.abs(smooth(losses) - smooth(reference)).max())


def plot(moved: list[float], stayed: list[float], nudged: list[list[float]], leg: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, constrained_layout=True, height_ratios=(2, 1)
    )
    top.plot(stayed, color="0.6", lw=4, label="all in PyTorch")
    for i, name in enumerate(("PyTorch", "JAX", "PyTorch again")):
        steps = range(max(i * leg - 1, 0), (i + 1) * leg)
        top.plot(steps, [moved[s] for s in steps], color=("C3", "C0", "C3")[i], lw=1.2, label=name if i < 2 else None)
    top.set(ylabel="loss (nats a character)", title="A transformer that moved to JAX and back, in its middle")
    top.legend()
    for losses in nudged:
        away = np.abs(np.array(losses) - stayed)
        bottom.plot(
            np.maximum(away, 1e-8),
            color="0.6",
            lw=1,
            label="PyTorch, first weights one ulp away" if losses is nudged[0] else None,
        )
    bottom.plot(np.maximum(np.abs(np.array(moved) - stayed), 1e-8), color="C0", lw=1.2, label="the run that moved")
    bottom.set(yscale="log", xlabel="step", ylabel="difference of the loss")
    bottom.set_ylim(bottom=5e-9)
    bottom.legend(loc="upper left")
    for axes in (top, bottom):
        for seam in (leg, 2 * leg):
            axes.axvline(seam - 0.5, color="0.8", lw=1, zorder=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = digits.parser_of(__doc__)
    parser.add_argument("--text", type=Path, help="a text in UTF-8 (default: the texts of Python's help())")
    parser.add_argument("--steps", type=int, default=100, help="of each third")
    parser.add_argument("--out", type=Path, default=Path("out/porting.png"), help="where the plot goes")
    arguments = parser.parse_args(argv)
    leg = arguments.steps
    if leg < SMOOTH:
        parser.error(f"--steps: expected at least {SMOOTH}, found {leg}")
    data, characters = load(arguments.text)

    with tqdm(total=(2 + NUDGES) * 3 * leg, unit="step") as bar:

        def run(nudge: int | None = None, moves: bool = False) -> Run:
            run = Run(data, characters, 3 * leg, bar.update, nudge)
            run.in_torch(range(leg))
            (run.in_jax if moves else run.in_torch)(range(leg, 2 * leg))
            run.in_torch(range(2 * leg, 3 * leg))
            return run

        bar.set_description("to JAX and back")
        moved = run(moves=True)
        bar.set_description("all in PyTorch")
        stayed = run()
        bar.set_description("one ulp away")
        nudged = [run(nudge=i).losses for i in range(NUDGES)]

    count = sum(p.numel() for p in moved.model.parameters())
    first, last, beside = moved.losses[0], smooth(moved.losses)[-1], smooth(stayed.losses)[-1]
    away, yardstick = gap(moved.losses, stayed.losses), max(gap(losses, stayed.losses) for losses in nudged)
    agrees = away <= MARGIN * max(yardstick, ROUNDING)
    print(f"\n{count} parameters; {len(data)} characters, {characters} different: guessing {math.log(characters):.2f}")
    print(f"loss at first {first:.3f}, at the end {last:.3f} (all in PyTorch {beside:.3f})")
    print(
        f"the run that moved {'agrees with' if agrees else 'DOES NOT AGREE with'} the one that stayed: losses up to "
        f"{away:.1e} apart; one ulp takes PyTorch {yardstick:.1e} from itself"
    )
    plot(moved.losses, stayed.losses, nudged, leg, arguments.out)
    print(f"curve: {arguments.out}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
