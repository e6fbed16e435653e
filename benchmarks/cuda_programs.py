"""Compiles the drop-in's own programs for an H100 that is not there: kernels, bytes, and whether all is in place.

python -m benchmarks.cuda_programs            prints one JSON object

Nothing is run. The parameters are on torch's meta device, for which a device stands in that has the H100's compiler:
plans, buckets and programs are made as for a model on a GPU. Needs JAX's CUDA plugin, `pip install '.[aot]'`.
"""

import json
import re
import sys
import time

import jax
import numpy as np
import torch
from jax.experimental import topologies

from benchmarks.ahead_of_time import TARGETS
from benchmarks.shapes import MODELS
from interop import memory, optim
from interop.dropin.groups import Groups
from interop.dropin.plan import Plan
from interop.memory.owned import TorchOwned
from tests import cases

META = torch.device("meta")
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u16": 2, "pred": 1, "s8": 1, "u8": 1}
SMALL = [(300, 200), (64, 1024), (7,), (5, 3)]


class Absent(TorchOwned):
    """A GPU of which there is only the compiler."""

    dlpack_device = (2, 0)

    def __init__(self):
        self.torch_device = META
        self._jax_device = topologies.get_topology_desc(**TARGETS["H100"][1]).devices[0]

    def check(self):
        pass

    order = wait = bytes_at = staged = finish = check

    def put(self, x):
        return np.asarray(x)


def plan_of(optimizer):
    """The optimizer's plan before any memory moves."""
    groups = Groups(optimizer)
    plan = object.__new__(Plan)
    plan.rules, plan.averages = list(groups.rules), optimizer.ema is not None
    plan.formats, plan.is_summed = groups.formats, bool(optimizer.rule.sums)
    grads = {p: torch.empty_like(p) for group in optimizer.param_groups for p in group["params"]}
    plan.leaves, _ = plan._find_leaves(optimizer, groups.numbers, grads, None)
    plan.passes = dict.fromkeys(plan.leaves, 0)  # at no address, all would seem to be at one
    plan._make_buckets(by_torch=False)
    plan._compiled = {}
    return plan


def look_at(optimizer):
    """What the compiler made of the programs that step an optimizer, all buckets together."""
    plan = plan_of(optimizer)
    start = time.perf_counter()
    updates = plan.programs(optimizer).updates
    found = {"seconds": round(time.perf_counter() - start, 1), "launches": 0, "kernels": 0, "buffers": 0, "in place": 0}
    found |= {"bytes": 0, "least": 0, "temporary": 0, "copied": 0}
    for bucket, update in zip(plan.buckets, updates, strict=True):
        whole, donated = parts(update)
        buffers = list(shapes_of(bucket))
        for part in whole:
            found["launches"] += 1
            text = part.compiled.as_text()
            kernels = kernels_of(text)
            found["kernels"] += len(kernels)
            found["bytes"] += sum(kernel["bytes"] for kernel in kernels)
            found["copied"] += sum(kernel["bytes"] for kernel in kernels if kernel["operation"] == "copy")
            found["temporary"] += part.compiled.memory_analysis().temp_size_in_bytes
        found["buffers"] += len(buffers)
        found["in place"] += len(re.findall(r"(?:may|must)-alias", donated.compiled.as_text().partition("\n")[0]))
        gradients = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in bucket.spec.gradients())
        found["least"] += 2 * sum(buffers) + gradients
    return found


def parts(update):
    """The programs of an update; and which of them is given the buffers."""
    if hasattr(update, "move"):
        return [update.direct, update.move], update.move
    return [update], update


def shapes_of(bucket):
    """The bytes of each of its buffers."""
    spec = bucket.spec
    for shape in spec.big:
        for dims, (_, dtype) in zip(spec.buffer_shapes(shape), spec.dtypes, strict=True):
            yield int(np.prod(dims)) * dtype.itemsize
    if spec.n_small:
        for _, dtype in spec.dtypes:
            yield spec.rows * spec.device.row * dtype.itemsize


OPERATION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
NOT_LAUNCHED = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id"}


def kernels_of(text):
    """What is launched: each operation with the bytes that it takes and gives."""
    entry = text[text.index("\nENTRY") :]
    sizes, found = {}, []
    for line in OPERATION.finditer(entry):
        name, type_, operation, rest = line.groups()
        sizes[name] = size_of(type_)
        if operation in NOT_LAUNCHED:
            continue
        operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
        read = sum(sizes.get(x, 0) for x in dict.fromkeys(operands))
        found.append({"operation": operation, "bytes": read + sizes[name]})
    return found


def size_of(type_):
    return sum(
        BYTES.get(dtype, 0) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", type_)
    )


def parameters(shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=META)) for shape in shapes]


def configurations():
    """By name, optimizers of two models, and of every configuration of each class over small tensors."""
    for model in ("resnet50", "gpt2_small", "mlp"):
        shapes = MODELS[model]()
        yield f"{model}, AdamW", optim.AdamW(parameters(shapes))
        yield f"{model}, SGD", optim.SGD(parameters(shapes), lr=0.1, momentum=0.9)
        yield f"{model}, NAdam", optim.NAdam(parameters(shapes))
        around = optim.AdamW(parameters(shapes), max_norm=1.0, ema=0.999)
        around.grad_scale = torch.empty((), device=META)
        yield f"{model}, AdamW, clipped, unscaled, averaged", around
        yield f"{model}, AdamW, bf16", optim.AdamW(parameters(shapes, torch.bfloat16), state_dtype="float32")
        yield f"{model}, AdamW, int8", optim.AdamW(parameters(shapes), state_dtype="int8")
    for case in cases.TORCH_CASES:
        shapes = [x for x in SMALL if len(x) == 2] if case.matrices else SMALL
        for clipped in (False, True):
            arguments = {"max_norm": 1.0, "ema": 0.9} if clipped else {}
            made = getattr(optim, case.torch)(parameters(shapes), lr=case.lr, **case.arguments, **arguments)
            yield f"{case.id}{', clipped, averaged' if clipped else ''}", made


def main(names):
    jax.config.update("jax_platforms", "cpu")  # a plugin that looks for a GPU and finds none gives no compiler either
    memory.DEVICES[META] = Absent()
    found = {}
    for name, optimizer in configurations():
        if not names or name in names or name.partition(",")[0] in names:
            found[name] = look_at(optimizer)
            print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
