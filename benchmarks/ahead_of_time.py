"""Compiles every optimizer for TPUs and a GPU that are not there, and writes what it finds to docs/ahead-of-time.md.

make ahead-of-time

Needs libtpu and JAX's CUDA plugin, `pip install '.[aot]'`, and an environment with the jax and libtpu of Colab's TPUs;
nothing is run. A process of its own compiles for each, since the CUDA plugin withdraws from one that has looked for a
GPU and found none.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import pxla
from jax.experimental import topologies
from jax.experimental.sparse import BCOO
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jopt
from benchmarks import report
from jopt._compat import JAX
from tests import cases

# Large, since the scalars in emulated float64 count as 2 MB.
SHAPES = {"a": (32768, 1024), "b": (32768, 1024), "bias": (1024,)}
ROWS = 512  # of a sparse gradient
DEVICES = 8
ZERO, FSDP = "state divided", "all divided"
NOTEBOOK = "the notebook's train step"
ROOT = Path(__file__).parent.parent
OPTIMIZERS = {case.name: case.jopt() for case in reversed(cases.CASES)}  # the first configuration of each
OPTIMIZERS = dict(sorted(OPTIMIZERS.items())) | {"sparse_adam": jopt.sparse_adam()}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Of an H100, as in openxla/xla#25919.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ONE_CHIP = {"chips_per_host_bounds": (1, 1, 1)}
# Colab's TPUs, of one chip each.
COLAB = {
    "TPU v5e-1": ("libtpu", {"platform": "tpu", "topology_name": "v5e:1x1"} | ONE_CHIP),
    "TPU v6e-1": ("libtpu", {"platform": "tpu", "topology_name": "v6e:1x1"} | ONE_CHIP),
}
TARGETS = {
    "TPU v5e": ("libtpu", {"platform": "tpu", "topology_name": "v5e:2x4"}),
    "TPU v6e": ("libtpu", {"platform": "tpu", "topology_name": "v6e:2x4"}),
    "H100": (
        "jax_cuda12_plugin",
        {"platform": "cuda", "topology_name": "", "target_config": H100, "topology": "1x1x8"},
    ),
}


def compile_all(target, names):
    """By optimizer and form what the compiled step does to memory and between devices."""
    if JAX < (0, 8):  # which crashes where it asks a device that is not there for its layouts
        pxla.is_default_layout = lambda *_: True
    devices = topologies.get_topology_desc(**(TARGETS | COLAB)[target][1]).devices
    mesh = Mesh(np.array(devices[:DEVICES]), ("data",))
    found = {NOTEBOOK: look_at(*notebook_step(mesh))} if target in COLAB else {}
    for name in names:
        for form, compiled in programs(name, devices[0], mesh):
            found[f"{name}, {form}"] = look_at(*compiled)
    return found


def programs(name, device, mesh):
    """The forms: a tree, on one device; divided, its parameters whole or divided too; and the same packed."""
    tx = OPTIMIZERS[name]
    shapes = {k: s for k, s in SHAPES.items() if len(s) == 2 or tx.rule.scope == "element" or name == "adafactor"}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    rows = tx.rule.scope == "rows"
    one, whole, parts = SingleDeviceSharding(device), NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    yield "tree", lower(tx, placed(params, one), one, rows)
    yield ZERO, lower(jopt.shard_state(tx, params, mesh), placed(params, whole), whole, rows)
    divided = placed(params, parts)
    yield FSDP, lower(jopt.shard_state(tx, divided, mesh), divided, whole, rows)
    if tx.rule.scope == "element":
        packed = jax.eval_shape(jopt.pack, params)
        yield "packed", lower(tx, placed(packed, one), one)
        yield f"packed, {ZERO}", lower(jopt.shard_state(tx, packed, mesh), placed(packed, whole), whole)


def notebook_step(mesh):
    """examples/colab_tpu.ipynb's own train step, compiled, and what it takes."""
    source = ast.parse((ROOT / "examples" / "colab_tpu.py").read_text())
    wanted = ("conv", "loss_of", "step_of")
    functions = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    whole, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shapes = {"0.weight": (32, 1, 3, 3), "0.bias": (32,), "2.weight": (64, 32, 3, 3), "2.bias": (64,)}
    shapes |= {"5.weight": (10, 1024), "5.bias": (10,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for name, shape in shapes.items()}
    tx = jopt.adamw(lr=2e-3)
    names = {"jax": jax, "jnp": jnp, "sharded": jopt.shard_state(tx, params, mesh, "data")}
    exec(compile(ast.Module(functions, []), "colab_tpu.py", "exec"), names)
    state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        jax.eval_shape(tx.init, params),
        names["sharded"].shardings,
    )
    x = jax.ShapeDtypeStruct((128, 1, 8, 8), jnp.float32, sharding=parts)
    y = jax.ShapeDtypeStruct((128,), jnp.int32, sharding=parts)
    with jax.default_matmul_precision("highest"):
        step = jax.jit(names["step_of"], donate_argnums=(0, 1)).lower(params, state, x, y).compile()
    return step, params, state, (x, y)


def placed(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def sparse(param, sharding):
    rows = (jnp.zeros((ROWS, param.shape[1])), jnp.zeros((ROWS, 1), jnp.int32))
    return placed(jax.eval_shape(lambda: BCOO(rows, shape=param.shape)), sharding)


def lower(tx, params, elsewhere, rows=False):
    """The step compiled, in place, and what it takes."""
    grads = jax.tree.map(lambda x: sparse(x, elsewhere), params) if rows else params
    state = jax.eval_shape(tx.init, params)
    places = getattr(tx, "shardings", jax.tree.map(lambda _: elsewhere, state))
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, places)
    step = jax.jit(lambda params, state, grads: tx.step(grads, state, params), donate_argnums=(0, 1))
    return step.lower(params, state, grads).compile(), params, state, grads


def look_at(compiled, params, state, grads):
    """Bytes are of one device."""
    program = compiled.as_text()
    memory = compiled.memory_analysis()
    inputs = jax.tree.leaves((params, state))
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return {
        "minimum": 2 * held(inputs) + held(jax.tree.leaves(grads)),
        "accessed": None if accessed is None else int(accessed),
        "arguments": memory.argument_size_in_bytes,
        "state": held(jax.tree.leaves(state)),
        "temporary": memory.temp_size_in_bytes,
        "outputs": len(inputs),
        "in place": len(re.findall(r"(?:may|must)-alias", program.partition("\n")[0])),
        "collectives": collectives(program),
        "longest float64": max([0, *(elements(dims) for dims in re.findall(r"f64\[([\d,]*)\]", program))]),
    }


def held(arrays):
    """What a device holds of these arrays."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in arrays)


def elements(dims):
    return int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))


def collectives(program):
    """What each kind of operation between devices gives, in bytes; what is asynchronous is counted where it ends.

    What a loop gives is counted as often as it turns: the number that its condition compares with.
    """
    kinds = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    computations = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*\{\n((?:  .*\n)*)", program, re.MULTILINE))
    turns = {}
    for condition, body in re.findall(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", program):
        turns[body] = int(*re.findall(r"s32\[\]\S* constant\((\d+)\)", computations[condition]))
    found = {}
    for name, text in computations.items():
        for shapes, kind in re.findall(rf" = (.+?) ({kinds})(?:-done)?\(", text):
            sizes = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            given = sum(sizes[dtype] * elements(dims) for dtype, dims in arrays)
            found[kind] = found.get(kind, 0) + turns.get(name, 1) * given
    return found


def compiled_elsewhere(target, names, python=sys.executable):
    """compile_all in a process of its own."""
    child = subprocess.run(
        [python, "-m", "benchmarks.ahead_of_time", target, *names],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(child.stderr)
    return json.loads(child.stdout)


# --- the page ------------------------------------------------------------------------------------------

TEXT = f"""# Compiled for what is not there

What XLA makes of each optimizer's step, compiled for a TPU v5e, a TPU v6e and an H100 without any of them: nothing is
run, and these are the compiler's counts, not times. `make ahead-of-time` writes this page,
`tests/jopt/test_ahead_of_time.py` holds the compiler to it. Two matrices of 32768 x 1024 and, for optimizers that take
one, a vector of 1024, in float32: 268 MB. MB are millions of bytes, of one device.

## On one device

`tree`, the parameters as they are; `packed`, in one buffer (`jopt.pack`). *Least*: gradients read once, parameters
and state read once and written once (all of a table's state for SparseAdam, whose step is for its rows). *Read and
written*: what the TPU compiler counts, copies to its fast memory included; on CUDA it does not count. Parameters and
state are donated, and each lies where it lay.

{{one}}

Adafactor, MARS and Muon read a tensor again for its norms; Muon's products need room for bfloat16 matrices.
Adafactor's 1615 MB are three sweeps over 268 MB, and none can be left out: the second needs all sums of rows and
columns of the first (gradient and parameter), the third the norm of what the second scaled (gradient), and it alone
writes (gradient and parameter read, parameter written). It is six times the parameters' bytes.

## On eight devices

`jopt.shard_state` over an axis of 8, on a v5e-8, a v6e-8 and 8 H100s. *{ZERO}*: the parameters are on every device
(ZeRO's first stage); *{FSDP}*: they are in parts too. *State*: on each device, of how much undivided. *Between
devices*: what each collective operation gives, on each device.

{{four}}

- Parameters on every device are gathered after the step. On a TPU XLA 0.10.2 does so into memory of its own and
  copies from there: a temporary as large as the parameter, as a program of plain `p - 0.1 * g` has it too. Those of
  32 MB and more are gathered in pieces of 16 MB, each of which is written where the parameter lies.
- Packed buffers of a length that the TPU's tiles do not divide are gathered by an all-reduce of parts beside zeros:
  no temporary, twice the traffic. Where state is divided, leave the tree as it is: XLA joins the collectives of its
  arrays.
- Muon sends each matrix to one device, which iterates it, and back from it, in bfloat16: half the bytes of the
  parameter that others gather. Two matrices are here on eight devices: six have nothing to do. Adafactor sums a row
  and four scalars for each matrix, MARS a scalar. SparseAdam sums the rows that have a gradient. Plain SGD has nothing
  to divide, and moves nothing.

## On Colab's TPUs, with Colab's compiler

Colab's TPUs are a v5e-1 and a v6e-1, of one chip, and its packages are older: {{versions}}. Compiled by
those, every step, as a tree, packed and by `jopt.shard_state` over the one device, has all its buffers in place and no
array of float64 longer than its leaves are many. {{beside}}

{{colab}}

The train step of [the notebook](../examples/colab_tpu.ipynb), forward and backward pass included: {{notebook}}.
"""


def colab_rows(old, new):
    """The steps on Colab's TPUs: what its own compiler makes of them, and where a newer one differs."""

    def shown(key, what):
        x, y = old[key][what], new[key][what]
        differs = abs(x - y) > 0.01 * y and max(x, y) > 2e6
        return megabytes(x) + (f" [{megabytes(y)}]" if differs else "")

    for name in OPTIMIZERS:
        for form in ("tree", "packed", ZERO):
            if (key := f"{name}, {form}") in old:
                yield [name, form, megabytes(old[key]["minimum"]), shown(key, "accessed"), shown(key, "temporary")]


def page(found, colab, versions):
    """`found`: by target and program; `colab`: the same by Colab's compiler, of these versions."""
    first = found["TPU v5e"]
    one, four = [], []
    for name in OPTIMIZERS:
        for form in ("tree", "packed"):
            key = f"{name}, {form}"
            if key in first:
                at = [found[target][key] for target in TARGETS]
                accessed = [megabytes(x["accessed"]) for x in at if x["accessed"] is not None]
                temporary = [megabytes(x["temporary"]) for x in at]
                one.append([name, form, megabytes(first[key]["minimum"]), *accessed, *temporary])
        for form in (ZERO, FSDP):
            key = f"{name}, {form}"
            at = [found[target][key] for target in TARGETS]
            state = f"{megabytes(first[key]['state'])} of {megabytes(first[f'{name}, tree']['state'])}"
            between = [", ".join(f"{kind} {megabytes(n)}" for kind, n in x["collectives"].items()) for x in at[::2]]
            four.append([name, form, state, *between, *(megabytes(x["temporary"]) for x in at)])
    headers = [
        ["optimizer", "form", "least", *(f"read and written, {t}" for t in ("v5e", "v6e"))],
        ["optimizer", "form", "state", *(f"between devices, {t}" for t in ("v5e", "H100"))],
    ]
    temporary = [f"temporary, {t}" for t in ("v5e", "v6e", "H100")]
    tables = [table([*header, *temporary], rows) for header, rows in zip(headers, (one, four), strict=True)]
    rows = zip(*(list(colab_rows(colab[target], found[target])) for target in COLAB), strict=True)
    columns = [f"{what}, {target}" for target in COLAB for what in ("read and written", "temporary")]
    tables.append(table(["optimizer", "form", "least", *columns], [[*a, *b[3:]] for a, b in rows]))
    beside = "The compiler of the tables above is nowhere more than 1 % better or worse."
    if "[" in tables[2]:
        beside = "In brackets the compiler of the tables above, where it differs by more than 1 %."
    notebook = "; ".join(
        f"{target} {x['in place']} of {x['outputs']} buffers in place, temporaries of {megabytes(x['temporary'])} MB"
        for target, x in ((target, colab[target][NOTEBOOK]) for target in COLAB)
    )
    texts = {"colab": tables[2], "beside": beside, "versions": versions, "notebook": notebook}
    return TEXT.format(one=tables[0], four=tables[1], **texts)


def megabytes(n):
    return "0" if n == 0 else "< 0.01" if n < 1e4 else f"{n / 1e6:.2f}" if n < 1e7 else f"{n / 1e6:.0f}"


def table(header, rows):
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--colab"]:
        python = sys.argv[2]
        found = {target: compiled_elsewhere(target, ()) for target in TARGETS | COLAB}
        colab = {target: compiled_elsewhere(target, (), python) for target in COLAB}
        code = "from importlib.metadata import version as v; print('jax', v('jax') + ', libtpu', v('libtpu'))"
        versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        (ROOT / "docs" / "ahead-of-time.md").write_text(report.wrapped(page(found, colab, versions)))
    else:
        print(json.dumps(compile_all(sys.argv[1], sys.argv[2:] or OPTIMIZERS)))
