"""Steps compiled for a TPU and a GPU that are not there: each array read and written once, in place, in one loop.

Needs libtpu and JAX's CUDA plugin, `pip install '.[aot]'`; nothing is run. A process of its own compiles for each,
since the CUDA plugin withdraws from one that has looked for a GPU and found none.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import jopt
from tests import cases

ELEMENTWISE = [case for case in cases.CASES if case.scope == "element"]
SHAPES = [(32768, 1024), (1000,)]  # large, since the scalars in emulated float64 count as 2 MB
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
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


TOPOLOGIES = {
    "tpu": {"topology_name": "v5e:2x2"},
    "cuda": {"topology_name": "", "target_config": H100, "topology": "1x1x1"},
}
PLUGINS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}


def compile_all(platform):
    """By case what jopt.explain finds, and how many loops there are over a whole buffer."""
    device = topologies.get_topology_desc(platform=platform, **TOPOLOGIES[platform]).devices[0]
    params = jax.eval_shape(jopt.pack, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES])
    array = rf"\[{params.buffers[0].size}\]"
    found = {}
    for case in ELEMENTWISE:
        explanation = jopt.explain(case.jopt(), params, device=device)
        entry = explanation.program[explanation.program.find("\nENTRY") :]
        loops = [line for line in entry.splitlines() if re.search(rf"{array}.* fusion\(", line)]
        found[case.id] = dataclasses.asdict(explanation) | {"program": "", "loops": len(loops)}
    return found


@functools.cache
def compiled(platform):
    if importlib.util.find_spec(PLUGINS[platform]) is None:
        pytest.skip(f"compiling for {platform} needs {PLUGINS[platform]}: pip install '.[aot]'")
    child = subprocess.run(
        [sys.executable, "-m", "tests.test_ahead_of_time", platform],
        cwd=Path(__file__).parent.parent,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_on_a_tpu_each_array_is_read_and_written_once():
    for name, found in compiled("tpu").items():
        assert found["platform"].startswith("tpu"), name
        assert found["accessed_bytes"] <= 1.01 * found["minimum_bytes"], (name, found)
        assert found["temporary_bytes"] == 0, name
        assert found["outputs_in_place"] == found["outputs"], name
        assert found["loops"] == 1, name


def test_on_a_gpu_each_buffer_is_one_loop():
    for name, found in compiled("cuda").items():
        assert found["platform"].startswith("gpu"), name
        assert found["temporary_bytes"] <= 2048, name
        assert found["outputs_in_place"] == found["outputs"], name
        assert found["loops"] == 1, name


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
