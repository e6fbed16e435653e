"""The parameter shapes of two models that everyone knows, in their own order."""


def resnet50() -> list[tuple[int, ...]]:
    """161 tensors, 25.6 M parameters (He et al. 2015, as torchvision builds it)."""

    def conv(out: int, inp: int, k: int) -> list[tuple[int, ...]]:
        return [(out, inp, k, k), (out,), (out,)]  # the kernel, and its batch norm's weight and bias

    shapes = conv(64, 3, 7)
    inp = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, inp, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:
                shapes += conv(4 * width, inp, 1)
            inp = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> list[tuple[int, ...]]:
    """148 tensors, 124 M parameters (Radford et al. 2019)."""
    d = 768
    block: list[tuple[int, ...]] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


MODELS = {"resnet50": resnet50, "gpt2_small": gpt2_small}
