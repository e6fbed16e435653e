"""Measures what a device holds of a step on eight devices, and writes the table of docs/many-devices.md.

make ahead-of-time

Nothing is run: the steps are compiled for eight CPU devices, and `memory_analysis()` tells.
"""

import os
import re
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX starts

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jopt
from benchmarks.shapes import gpt2_small

PAGE = Path(__file__).parent.parent / "docs" / "many-devices.md"
OPTIMIZERS = {
    "AdamW": jopt.adamw(),
    "SGD with momentum": jopt.sgd(momentum=0.9),
    "MARS": jopt.mars(),
    "Adafactor": jopt.adafactor(),
    "Muon and AdamW for vectors": jopt.param_groups(jopt.muon, {jopt.norms_and_biases: jopt.adamw()}),
}


def placed(tree, shardings):
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def measure(tx, where) -> tuple[float, float, float]:
    """MB of one device: the state, all that the step takes, and what it needs beside."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    one, whole = SingleDeviceSharding(jax.devices()[0]), NamedSharding(mesh, P())
    shapes = {f"p{i:03}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(gpt2_small())}
    params = placed(shapes, jax.tree.map(lambda _: one if where == "alone" else whole, shapes))
    if where == "parts":  # as their state would be
        params = placed(
            shapes, jopt.shard_state(jopt.sgd(momentum=0.9), params, mesh).shardings.slots["momentum_buffer"]
        )
    state = jax.eval_shape(tx.init, shapes)
    if where == "alone":
        state = placed(state, jax.tree.map(lambda _: one, state))
    else:
        tx = jopt.shard_state(tx, params, mesh)
        state = placed(state, tx.shardings)
    held = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    compiled = jax.jit(tx.step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    found = compiled.memory_analysis()
    return held / 1e6, found.argument_size_in_bytes / 1e6, found.temp_size_in_bytes / 1e6


def number(mb: float) -> str:
    return f"{mb:.1f}" if 0.05 < mb < 2 else f"{mb:.0f}"


def main() -> None:
    jopt.enable_multi_output_fusion()
    rows = []
    for name, tx in OPTIMIZERS.items():
        alone, whole, parts = (measure(tx, where) for where in ("alone", "whole", "parts"))
        columns = [alone[0], whole[0], *(x[1] for x in (alone, whole, parts)), *(x[2] for x in (alone, whole, parts))]
        rows.append(f"| {name} | " + " | ".join(map(number, columns)) + " |")
        print(rows[-1], flush=True)
    page = PAGE.read_text()
    table = re.compile(r"(\| \| state alone .*\n\|---.*\n)(?:\| .*\n)+")
    assert table.search(page)
    PAGE.write_text(table.sub(lambda m: m[1] + "\n".join(rows) + "\n", page))


if __name__ == "__main__":
    main()
