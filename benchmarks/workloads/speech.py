"""A network over log-mel features of spoken words."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from scipy import signal
from scipy.io import wavfile
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.workloads.task import Batch, Params, Recipe, Workload, cross_entropy, linear, split

RATE, WINDOW, HOP, FRAMES, BANDS = 8000, 256, 128, 48, 24  # 0.77 s
HIDDEN, BATCH = 128, 64
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("en", "en-us", "en-gb-scotland", *(f"en+m{i}" for i in range(1, 8)), *(f"en+f{i}" for i in range(1, 5)))
# F1, F2, F3 in Hz of men's vowels: Peterson & Barney 1952, table II.
VOWELS = {
    "i": (270, 2290, 3010),
    "I": (390, 1990, 2550),
    "E": (530, 1840, 2480),
    "ae": (660, 1720, 2410),
    "A": (730, 1090, 2440),
    "O": (570, 840, 2410),
    "U": (440, 1020, 2240),
    "u": (300, 870, 2240),
    "V": (640, 1190, 2390),
    "er": (490, 1350, 1690),
}


# --- sounds, where the user has none


def speak(folder: Path) -> None:
    """Each digit by espeak-ng, in its voices, at three speeds and pitches."""
    settings = list(itertools.product(VOICES, ((140, 40), (170, 50), (200, 65))))
    for word in tqdm(WORDS, desc="espeak-ng", leave=False, disable=None):
        (folder / word).mkdir()
        for i, (voice, (speed, pitch)) in enumerate(settings):
            command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch)]
            subprocess.run([*command, "-w", str(folder / word / f"{i:03}.wav"), word], check=True)


def formants(folder: Path) -> None:
    """Ten vowels as pulses through three resonances, of throats from 0.85 to 1.25 times a man's."""
    rng = np.random.default_rng(0)
    for vowel, frequencies in VOWELS.items():
        (folder / vowel).mkdir()
        for i in range(42):
            n = int(rng.uniform(0.25, 0.6) * RATE)
            pitch = rng.uniform(90, 230) * np.exp(0.1 * np.linspace(1, -1, n))
            sound = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0)
            throat = rng.uniform(0.85, 1.25)
            for f in frequencies:
                f, bandwidth = f * throat * rng.normal(1, 0.03), rng.uniform(60, 120)
                r, w = math.exp(-math.pi * bandwidth / RATE), 2 * math.pi * min(f, 0.45 * RATE) / RATE
                sound = signal.lfilter([1 - r], [1, -2 * r * math.cos(w), r * r], sound)
            sound = sound * signal.windows.tukey(n, 0.3)
            sound = sound / np.abs(sound).max() + 10 ** rng.uniform(-2.5, -1) * rng.standard_normal(n)
            wavfile.write(folder / vowel / f"{i:03}.wav", RATE, (sound / np.abs(sound).max() * 32000).astype(np.int16))


def sounds(cache: Path) -> tuple[Path, str]:
    """A folder of them, made once, and what they are."""
    found = shutil.which("espeak-ng")
    folder = cache / ("espeak" if found else "formants")
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            (speak if found else formants)(whole)
            os.replace(whole, folder)  # so that what was interrupted is made again
    return folder, "digits spoken by a synthesiser, espeak-ng" if found else "generated: vowels of formant tones"


# --- features


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-mel features (n, FRAMES * BANDS) of every wav file, and its class, which is the subfolder's name."""
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder")
    classes = sorted(x.name for x in folder.iterdir() if x.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).glob("*.wav"))]
    if len(classes) < 2 or not files:
        sys.exit(f"{folder}: expected wav files in one subfolder a class, found {len(files)} in {len(classes)}")
    features = np.stack([log_mel(*read(path)) for path, _ in files])
    return features, np.array([label for _, label in files], np.int32)


def read(path: Path) -> tuple[np.ndarray, int]:
    """One channel, from -1 to 1."""
    try:
        rate, sound = wavfile.read(path)
    except (ValueError, EOFError, OSError) as error:
        sys.exit(f"{path}: expected a wav file: {error}")
    if not sound.size:
        sys.exit(f"{path}: expected sound, found no sample")
    if sound.dtype == np.uint8:
        sound = (sound.astype(np.float64) - 128) / 128
    elif sound.dtype.kind == "i":
        sound = sound / -float(np.iinfo(sound.dtype).min)
    if not np.isfinite(sound).all():
        sys.exit(f"{path}: expected finite samples, found inf or nan")
    return sound.reshape(len(sound), -1).mean(1), rate


def log_mel(sound: np.ndarray, rate: int) -> np.ndarray:
    """`FRAMES` frames from where the sound is loudest, silence around it; each band around its mean over the frames."""
    if rate != RATE:
        common = math.gcd(rate, RATE)
        sound = signal.resample_poly(sound, RATE // common, rate // common)
    n = (FRAMES - 1) * HOP
    sound = np.pad(sound, n // 2)
    middle = int(np.argmax(signal.oaconvolve(sound**2, np.ones(n), "valid")))
    stft = signal.ShortTimeFFT(signal.windows.hann(WINDOW, sym=False), HOP, RATE)
    power = stft.spectrogram(sound[middle : middle + n], p0=0, p1=FRAMES)
    features = np.log(mel_bands(stft.f) @ power + 1e-6)
    return (features - features.mean(1, keepdims=True)).T.ravel().astype(np.float32)


def mel_bands(f: np.ndarray) -> np.ndarray:
    """Triangles (BANDS, len(f)), equally wide on O'Shaughnessy's scale, 2595 log10(1 + f / 700)."""
    top = 2595 * np.log10(1 + f[-1] / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.maximum(0, np.minimum((f - low) / (middle - low), (high - f) / (high - middle)))


# --- the workload


class Speech(Workload):
    name, title = "speech", "Speech: a network over log-mel features"
    measure, higher, goal = "accuracy", True, 0.9
    steps, grid = 200, True
    recipes = (
        Recipe("AdamW", 1e-3, dict(weight_decay=1e-2)),
        Recipe("SGD", 0.01, dict(momentum=0.9)),
        Recipe("Adam", 1e-3),
        Recipe("Adamax", 2e-3),
        Recipe("NAdam", 1e-3),
        Recipe("RAdam", 2e-3),
        Recipe("Adagrad", 0.01),
        Recipe("Adadelta", 1.0),
        Recipe("RMSprop", 5e-4),
        Recipe("ASGD", 0.05),
        Recipe("Adafactor", 0.02),
        Recipe("Muon", 0.02),
        Recipe("Rprop", 1e-3, full=True),
        Recipe("LBFGS", 1.0, dict(max_iter=5, line_search_fn="strong_wolfe"), full=True),
    )

    def __init__(self, path: str | None = None, cache: Path = Path("out/sounds")):
        folder, kind = sounds(cache) if path is None else (Path(path), str(path))
        x, y = load(folder)
        self.train, self.test = split(x, y, part=0.2)
        if len(self.train[0]) < BATCH:
            sys.exit(f"{folder}: expected at least {BATCH} wav files to train on, found {len(self.train[0])}")
        mean, std = self.train[0].mean(), self.train[0].std()
        self.train, self.test = (((a[0] - mean) / std, a[1]) for a in (self.train, self.test))
        self.classes = int(y.max()) + 1
        self.source = f"{kind}; {len(x)} sounds in {self.classes} classes, a fifth of them to test on"

    def data(self) -> dict[str, np.ndarray]:
        return dict(zip(("x", "y", "test_x", "test_y"), (*self.train, *self.test), strict=True))

    def model(self, recipe: Recipe) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FRAMES * BANDS, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, self.classes),
        )

    def batch(self, step: int) -> Batch:
        at = np.random.default_rng(step).choice(len(self.train[0]), BATCH, replace=False)
        return tuple(x[at] for x in self.train)

    def everything(self) -> Batch:
        return self.train

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        x, y = batch
        return functional.cross_entropy(model(x), y.long())

    def jax_loss(self, params: Params, buffers: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        x, y = batch
        x = jax.nn.relu(linear(params, "2", jax.nn.relu(linear(params, "0", x))))
        return cross_entropy(linear(params, "4", x), y), buffers

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        x, y = map(torch.from_numpy, self.test)
        dtype = next(model.parameters()).dtype
        return float((model(x.to(dtype)).argmax(1) == y).double().mean())
