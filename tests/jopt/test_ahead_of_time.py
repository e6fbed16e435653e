"""Steps compiled for TPUs and a GPU that are not there: what is read and written, in place, and between devices.

Needs libtpu and JAX's CUDA plugin, `pip install '.[aot]'`; nothing is run. benchmarks/ahead_of_time.py compiles, and
writes the same figures to docs/ahead-of-time.md.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

import jopt
from benchmarks.ahead_of_time import (
    COLAB,
    DEVICES,
    ENVIRONMENT,
    FSDP,
    NOTEBOOK,
    OPTIMIZERS,
    ROWS,
    SHAPES,
    TARGETS,
    ZERO,
    compiled_elsewhere,
)
from jopt.rule import Batched
from tests import ROOT, cases

pytestmark = pytest.mark.slow  # minutes of compiling

ELEMENTWISE = [case for case in cases.CASES if case.scope == "element"]
PACKED = [SHAPES["a"], (1000,)]
PLATFORMS = {"tpu": "TPU v5e", "cuda": "H100"}
SCALARS = 2e6  # bytes that scalars in emulated float64 and small vectors may take
SMALL = 65536  # bytes of what is not divided: counts, Adafactor's columns
FORMS = ("tree", ZERO, FSDP, "packed", f"packed, {ZERO}")
RULES = {name: tx.rule for name, tx in OPTIMIZERS.items()}


def skip_without(target):
    plugin = (TARGETS | COLAB)[target][0]
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"compiling for {target} needs {plugin}: pip install '.[aot]'")


# --- every configuration, packed -----------------------------------------------------------------------


def explain_all(platform):
    """By case what jopt.explain finds, and how many loops there are over a whole buffer."""
    device = topologies.get_topology_desc(**TARGETS[PLATFORMS[platform]][1]).devices[0]
    params = jax.eval_shape(jopt.pack, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in PACKED])
    array = rf"\[{params.buffers[0].size}\]"
    found = {}
    for case in ELEMENTWISE:
        explanation = jopt.explain(case.jopt(), params, device=device)
        entry = explanation.program[explanation.program.find("\nENTRY") :]
        loops = [line for line in entry.splitlines() if re.search(rf"{array}.* fusion\(", line)]
        found[case.id] = dataclasses.asdict(explanation) | {"program": "", "loops": len(loops)}
    return found


def explained(platform):
    skip_without(PLATFORMS[platform])
    child = subprocess.run(
        [sys.executable, "-m", "tests.jopt.test_ahead_of_time", platform],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_on_a_tpu_each_array_is_read_and_written_once():
    for name, found in explained("tpu").items():
        assert found["platform"].startswith("tpu"), name
        assert found["accessed_bytes"] <= 1.01 * found["minimum_bytes"], (name, found)
        assert found["temporary_bytes"] == 0, name
        assert found["outputs_in_place"] == found["outputs"], name
        assert found["loops"] == 1, name


def test_on_a_gpu_each_buffer_is_one_loop():
    for name, found in explained("cuda").items():
        assert found["platform"].startswith("gpu"), name
        assert found["temporary_bytes"] <= 2048, name
        assert found["outputs_in_place"] == found["outputs"], name
        assert found["loops"] == 1, name


# --- every optimizer, in every form ----------------------------------------------------------------------


@functools.cache
def compiled(target):
    skip_without(target)
    return compiled_elsewhere(target, ())


def programs(target, *forms):
    for name, rule in RULES.items():
        for form in forms:
            if f"{name}, {form}" in compiled(target):
                yield f"{name}, {form}", rule, compiled(target)[f"{name}, {form}"]


def params_bytes(rule):
    vectors = rule.scope == "element" or "beta2_decay" in rule.hyperparameters  # Adafactor; others are given matrices
    return sum(4 * math.prod(s) for s in SHAPES.values() if vectors or len(s) == 2)


everywhere = pytest.mark.parametrize("target", TARGETS)


@everywhere
def test_everything_lies_where_it_lay_and_no_array_is_float64(target):
    for program, _, found in programs(target, *FORMS):
        assert found["in place"] == found["outputs"], program
        assert found["longest float64"] <= len(SHAPES), program  # the scalars of each leaf


@everywhere
def test_on_one_device(target):
    for program, rule, found in programs(target, "tree", "packed"):
        assert found["collectives"] == {}, program
        size = params_bytes(rule)
        # Norms read a tensor up to three times more. SparseAdam takes rows; Muon's room is for bfloat16 matrices.
        again = 0 if rule.scope == "element" else 3 * size
        if found["accessed"] is not None and not isinstance(rule, Batched):
            assert found["accessed"] <= 1.01 * found["minimum"] + again, program
        assert found["temporary"] <= (again if rule.scope == "tensor" else 10 * SCALARS) + SCALARS, program


@everywhere
def test_divided_state_is_an_eighth_and_parameters_are_gathered_once(target):
    for program, rule, found in programs(target, ZERO, f"packed, {ZERO}"):
        alone = compiled(target)[program.removesuffix(f", {ZERO}") + ("" if "packed" in program else ", tree")]
        assert found["state"] <= alone["state"] / DEVICES + SMALL, program
        size, moved = params_bytes(rule), found["collectives"]
        gathered, summed = moved.get("all-gather", 0), moved.get("all-reduce", 0)
        if alone["state"] < SMALL and rule.scope == "element":
            assert moved == {}, program  # plain SGD: there is nothing to divide
        elif rule.scope == "rows":
            assert moved == {"all-reduce": 2 * 2 * 4 * ROWS * SHAPES["a"][1]}, program  # two tables, two slots
        elif isinstance(rule, Batched):  # in bfloat16 each of two matrices to one device, both from there to all
            assert moved == {"all-to-all": size // 4, "all-reduce": size // 2}, program
        elif "packed" in program:
            assert size <= gathered + summed <= 1.001 * size, program
        else:
            assert gathered == size, program
            assert summed <= (0 if rule.scope == "element" else 2 * 4 * (SHAPES["a"][1] + 8)), program
        # The parts before they are gathered. A packed buffer on a TPU is gathered first; Muon's matrices are bfloat16.
        room = 1.25 * size if "packed" in program and target != "H100" else size / 2
        if isinstance(rule, Batched):
            room = 2 * size
        else:
            assert set(moved) <= {"all-gather", "all-reduce"}, program
        assert found["temporary"] <= room + 10 * SCALARS, program


@everywhere
def test_divided_parameters_are_stepped_where_they_lie(target):
    for program, rule, found in programs(target, FSDP):
        size, moved = params_bytes(rule), found["collectives"]
        if rule.scope == "element":
            # What is read and written is not compared: parts this small are copied to a TPU's VMEM and counted again.
            assert moved == {}, program
            assert found["temporary"] <= SCALARS, program
        elif isinstance(rule, Batched):
            assert moved == {"all-to-all": 2 * size // 4}, program
        elif rule.scope == "tensor":
            assert moved.keys() == {"all-reduce"}, program
            assert moved["all-reduce"] <= 2 * 4 * (SHAPES["a"][1] + 8), program
        else:  # SparseAdam's rows: state's and the table's
            assert sum(moved.values()) <= 2 * 3 * 4 * ROWS * SHAPES["a"][1], program


# --- Colab's TPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", COLAB)
def test_on_colabs_tpus(target):
    """With the compiler at hand; tests/versions.sh runs this with Colab's own."""
    for program, rule, found in programs(target, *FORMS):
        assert found["in place"] == found["outputs"], program
        assert found["longest float64"] <= len(SHAPES), program
        assert found["temporary"] <= (3 * params_bytes(rule) if isinstance(rule, Batched) else 0) + 2 * SCALARS, program
        if rule.scope == "element":
            assert found["accessed"] <= 1.01 * found["minimum"], program
    step = compiled(target)[NOTEBOOK]
    assert step["in place"] == step["outputs"] == 6 + 2 * 6 + 2
    assert step["longest float64"] <= 6


if __name__ == "__main__":
    print(json.dumps(explain_all(sys.argv[1])))
