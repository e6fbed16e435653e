"""The parameter shapes of two models that everyone knows, in their own order, and of a small one."""

import itertools

Shapes = list[tuple[int, ...]]


def mlp() -> Shapes:
    """10 tensors, 0.3 M parameters: a perceptron of 784-256-256-128-64-10."""
    sizes = (784, 256, 256, 128, 64, 10)
    return [s for inp, out in itertools.pairwise(sizes) for s in ((out, inp), (out,))]


def resnet50() -> Shapes:
    """161 tensors, 25.6 M parameters (He et al. 2015, as torchvision builds it)."""

    def conv(out: int, inp: int, k: int) -> Shapes:
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


def gpt2_small() -> Shapes:
    """148 tensors, 124 M parameters (Radford et al. 2019)."""
    d = 768
    block: Shapes = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


def tiny() -> Shapes:
    """For the short form."""
    return [(200, 300), (300,), (10,)]


MODELS = {"mlp": mlp, "resnet50": resnet50, "gpt2_small": gpt2_small, "tiny": tiny}
