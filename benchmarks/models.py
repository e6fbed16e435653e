"""Two models to train: a residual network for images of 32x32, and a transformer that predicts the next token."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015)."""

    def __init__(self, inp: int, out: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inp, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.inner(x) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """62 tensors, 11.2 M parameters, as for CIFAR; `width` 64 and 2 blocks a stage."""

    def __init__(self, width: int = 64):
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        stages = []
        for stage, (inp, out) in enumerate(itertools.pairwise(widths)):
            stages += [Residual(inp, out, 1 if stage == 0 else 2), Residual(out, out, 1)]
        super().__init__(
            nn.Conv2d(3, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )


class Transformer(nn.Module):
    """90 tensors, 26.3 M parameters: 7 layers before which norms stand, of width 512, for a vocabulary of 4096."""

    def __init__(self, width: int = 512, layers: int = 7, vocabulary: int = 4096, context: int = 64):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.out(self.layers(h, mask, is_causal=True)).transpose(1, 2)


def cnn(short: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, a batch of images and their classes."""
    n = 2 if short else 8
    return ResNet18(8 if short else 64), torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def transformer(short: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, a batch of token sequences, and the same one token on."""
    model = Transformer(32, 1, 64) if short else Transformer()
    tokens = torch.randint(64 if short else 4096, (2, 65))
    return model, tokens[:, :-1], tokens[:, 1:]


MODELS = {"ResNet-18, 8 images of 32x32": cnn, "transformer, 2 sequences of 64": transformer}
