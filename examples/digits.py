"""One CNN on real images, trained four ways from the same weights and the same batches.

    python -m examples.digits                        # scikit-learn's 1797 handwritten digits
    python -m examples.digits --data FOLDER          # images in one subfolder a class
    python -m examples.digits --data module:name     # a torch Dataset of (image, class), or a function that makes one

torch.optim.AdamW; the same loop with `from interop import optim`; the model's parameters in a pure JAX script with
`jopt.adamw`; and, as the yardstick, torch.optim.AdamW again with each first weight moved by one ulp, up or down at
random. Training is chaotic: two runs agree if they end up no further apart than a run does from itself after the
smallest change there is. That distance scatters, so it is the largest of five, and twice it is allowed; a wrong
weight decay, or an eps of 1e-7 for 1e-8, ends up five times further away (after more epochs everything does, and the
comparison loses its edge).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import interop
import jopt
from interop import optim

LR, WEIGHT_DECAY, BATCH = 2e-3, 1e-2, 64
NUDGES, MARGIN = 5, 2.0


# --- data


def load(source: str | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, channels, height, width) in float32, about 0 to 1, and their classes."""
    if source is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images[:, None] / 16).astype(np.float32), digits.target.astype(np.int32)
    if Path(source).is_dir():
        return load_folder(Path(source), size)
    module, _, name = source.partition(":")
    if not name:
        sys.exit(f"--data {source}: no such folder, and not module:name of a torch Dataset")
    dataset = getattr(importlib.import_module(module), name)
    return load_dataset(dataset() if not hasattr(dataset, "__getitem__") else dataset)


def load_folder(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every image under `folder`, scaled to size x size; the subfolder's name is the class."""
    from PIL import Image

    classes = sorted(x.name for x in folder.iterdir() if x.is_dir())
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}:
                image = Image.open(path).convert("RGB").resize((size, size))
                images.append(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)
                labels.append(label)
    if len(classes) < 2 or not images:
        sys.exit(f"--data {folder}: expected images in one subfolder a class, found {len(images)} in {len(classes)}")
    return np.stack(images), np.array(labels, np.int32)


def load_dataset(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """A torch Dataset of (image tensor, class)."""
    pairs = [dataset[i] for i in range(len(dataset))]
    images = torch.stack([torch.as_tensor(x, dtype=torch.float32) for x, _ in pairs])
    if images.ndim == 3:
        images = images.unsqueeze(1)
    return images.numpy(), np.array([int(y) for _, y in pairs], np.int32)


def batches(n: int, epochs: int, seed: int = 0) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(n)
        yield from (order[i : i + BATCH] for i in range(0, n - BATCH + 1, BATCH))


# --- the model, in PyTorch and in JAX


class CNN(nn.Module):
    def __init__(self, channels: int, size: tuple[int, int], classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * (size[0] // 2) * (size[1] // 2), 128)
        self.out = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(x))
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.out(functional.relu(self.hidden(x.flatten(1))))


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The same network as a function of the PyTorch model's parameters, by their names there."""

    def conv(name: str, x: jax.Array) -> jax.Array:
        y = jax.lax.conv(x, params[f"{name}.weight"], (1, 1), "SAME")
        return jax.nn.relu(y + params[f"{name}.bias"][None, :, None, None])

    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    x = conv("conv2", conv("conv1", x))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return linear("out", jax.nn.relu(linear("hidden", x.reshape(len(x), -1))))


# --- the three ways to train it


def train_torch(
    model: CNN, make: Callable[..., Any], x: np.ndarray, y: np.ndarray, epochs: int, show: Any
) -> dict[str, Any]:
    """The usual loop; `make` is torch.optim.AdamW or interop.optim.AdamW."""
    optimizer = make(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y).long()
    losses, times = [], []
    for batch in batches(len(x), epochs):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs[batch]), targets[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        show()
    params = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return {"losses": losses, "times": times, "params": params}


def train_jax(model: CNN, x: np.ndarray, y: np.ndarray, epochs: int, show: Any) -> dict[str, Any]:
    """The model's parameters, taken over into a JAX script."""
    params = interop.to_jax(dict(model.named_parameters()))
    tx = jopt.adamw(lr=LR, weight_decay=WEIGHT_DECAY)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = jax.nn.log_softmax(apply(params, x))
            return -jnp.mean(jnp.take_along_axis(logits, y[:, None], axis=1))

        value, grads = jax.value_and_grad(loss)(params)
        params, state = tx.step(grads, state, params)
        return params, state, value

    losses, times = [], []
    for batch in batches(len(x), epochs):
        start = time.perf_counter()
        params, state, value = train_step(params, state, x[batch], y[batch])
        losses.append(float(value))
        times.append(time.perf_counter() - start)
        show()
    return {"losses": losses, "times": times, "params": jax.tree.map(np.asarray, params)}


@torch.no_grad()
def nudge(model: nn.Module, seed: int) -> None:
    """Each weight to the next number, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        up = torch.rand(p.shape, generator=generator) < 0.5
        p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf).to(p.dtype)))


# --- what comes out


def accuracy(params: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> float:
    return float((np.asarray(jax.jit(apply)(params, x)).argmax(1) == y).mean())


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in b)


def table(rows: list[dict[str, Any]]) -> str:
    head = ["", "loss", "accuracy", "largest difference", "ms a step"]
    body = [
        [r["name"], f"{r['loss']:.4f}", f"{100 * r['accuracy']:.1f} %", f"{r['gap']:.1e}", f"{r['ms']:.2f}"]
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True)))
        for x in [head, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(runs: dict[str, dict[str, Any]], reference: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    styles = ("-", "--", ":", "-.")
    for i, ((name, run), style) in enumerate(zip(runs.items(), styles, strict=True)):
        left.plot(run["losses"], style, color=f"C{i}", label=name, alpha=0.8)
        if name != reference:
            gap = np.abs(np.array(run["losses"]) - np.array(runs[reference]["losses"]))
            right.plot(np.maximum(gap, 1e-9), style, color=f"C{i}", label=name, alpha=0.8)
    left.set(yscale="log", xlabel="step", ylabel="training loss", title="Four runs")
    right.set(yscale="log", xlabel="step", ylabel="difference of the loss", title=f"Away from {reference}")
    left.legend()
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parser_of(text: str) -> argparse.ArgumentParser:
    """A module's docstring: its first line before the arguments, the rest after them."""
    first, rest = text.split("\n\n", 1)
    return argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--data", help="a folder of images, or module:name of a torch Dataset (default: digits)")
    parser.add_argument("--size", type=int, default=32, help="pixels to which a folder's images are scaled")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="where the plot goes")
    arguments = parser.parse_args(argv)

    x, y = load(arguments.data, arguments.size)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    test = max(1, len(x) // 5)
    train_x, train_y, test_x, test_y = x[test:], y[test:], x[:test], y[:test]
    if len(train_x) < BATCH:
        parser.error(f"--data: {len(train_x)} training images are fewer than a batch of {BATCH}")

    def fresh() -> CNN:
        torch.manual_seed(0)
        return CNN(x.shape[1], x.shape[2:], int(y.max()) + 1)

    def nudged(seed: int) -> CNN:
        model = fresh()
        nudge(model, seed)
        return model

    def run(model: CNN, make: Callable[..., Any] | None) -> dict[str, Any]:
        if make is None:
            return train_jax(model, train_x, train_y, arguments.epochs, bar.update)
        return train_torch(model, make, train_x, train_y, arguments.epochs, bar.update)

    steps = sum(1 for _ in batches(len(train_x), arguments.epochs))
    runs = {}
    with tqdm(total=(3 + NUDGES) * steps, unit="step") as bar:
        for name, make in (("torch.optim", torch.optim.AdamW), ("interop.optim", optim.AdamW), ("jopt in JAX", None)):
            bar.set_description(name)
            runs[name] = run(fresh(), make)
        bar.set_description("torch.optim, one ulp away")
        again = [run(nudged(seed), torch.optim.AdamW) for seed in range(NUDGES)]
    reference = runs["torch.optim"]
    again.sort(key=lambda r: -distance(r["params"], reference["params"]))
    runs["torch.optim, one ulp away"] = again[0]

    rows = [
        {
            "name": name,
            "loss": float(np.mean(r["losses"][-20:])),
            "accuracy": accuracy(r["params"], test_x, test_y),
            "gap": distance(r["params"], reference["params"]),
            "ms": 1e3 * float(np.median(r["times"])),
        }
        for name, r in runs.items()
    ]
    print(f"\n{len(train_x)} images to train on, {len(test_x)} to test on, {steps} steps of {BATCH}\n")
    print(table(rows) + "\n")
    yardstick = rows[-1]["gap"]
    compared = rows[1:-1]
    for row in compared:
        ok = row["gap"] <= MARGIN * yardstick
        print(
            f"{row['name']} {'agrees with' if ok else 'DOES NOT AGREE with'} torch.optim: {row['gap']:.1e} away; "
            f"one ulp takes torch {yardstick:.1e} from itself"
        )
    plot(runs, "torch.optim", arguments.out)
    print(f"curves: {arguments.out}")
    return 0 if all(row["gap"] <= MARGIN * yardstick for row in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
