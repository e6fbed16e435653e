"""What jopt.explain says of a step, against counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from tests import cases
from tests.jopt.test_fusion import OPTION, run


@pytest.mark.parametrize(
    ("tx", "passes"),
    [(jopt.sgd(), 3), (jopt.sgd(momentum=0.9), 5), (jopt.adamw(), 7), (jopt.adam(amsgrad=True), 9)],
    ids=["sgd", "momentum", "adamw", "amsgrad"],
)
def test_the_least_that_a_step_can_do(tx, passes):
    n = 3 * 2**20
    found = jopt.explain(tx, {"w": jax.ShapeDtypeStruct((3, 2**20), jnp.float32)})
    assert (found.parameters, found.buffers, found.pass_bytes) == (n, 1, 4 * n)
    assert found.minimum_passes == pytest.approx(passes, rel=1e-5)
    assert found.passes >= passes * (1 - 1e-5)
    assert found.outputs == found.outputs_in_place
    assert found.temporary_bytes < 4096


def test_nothing_is_allocated():
    found = jopt.explain(jopt.adamw(), [jax.ShapeDtypeStruct((2**40,), jnp.float32)])
    assert found.parameters == 2**40
    assert found.compile_seconds < 60


@cases.parametrize([c for c in cases.CASES if c.scope != "rows"], fast=cases.FEW)
def test_every_optimizer(case):
    found = jopt.explain(case.jopt(), {"w": jnp.ones((8, 16)), "v": jnp.ones((4, 2))})
    assert found.outputs == found.outputs_in_place
    in_loops = case.name in ("muon", "nor_muon", "kron")  # of which the compiler counts one turn
    assert found.accessed_bytes is None if in_loops else found.accessed_bytes >= found.minimum_bytes


def test_a_packed_tree_is_its_buffers():
    tree = {"w": jnp.ones((8, 4)), "v": jnp.ones(5), "low": jnp.ones(7, jnp.bfloat16)}
    found = jopt.explain(jopt.adamw(), jopt.pack(tree))
    assert (found.parameters, found.buffers, found.pass_bytes) == (44, 2, 4 * 37 + 2 * 7)


def test_shardings_are_kept():
    mesh = jax.make_mesh((1,), ("x",))
    sharded = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
    assert jopt.explain(jopt.adamw(), sharded).outputs == 5
    placed = jopt.explain(jopt.adamw(), sharded, device=jax.devices("cpu")[0])
    assert placed.platform == "cpu"


def test_it_reads_as_text():
    found = jopt.explain(jopt.adamw(), jnp.ones(1000))
    off = str(
        dataclasses.replace(found, platform="cpu", fuses_outputs=False, compile_seconds=0.5, accessed_bytes=40000)
    )
    assert "Adam on cpu: 1,000 parameters in 1 buffer\n" in off
    assert "10.00; at least 7.00" in off
    assert "off; jopt.enable_multi_output_fusion() before the first use of JAX" in off
    elsewhere = str(dataclasses.replace(found, fuses_outputs=None, accessed_bytes=None))
    assert "not counted; at least 7.00" in elsewhere
    assert "one loop" not in elsewhere
    assert "HloModule" in found.program


def test_the_option_is_seen_and_reaches_the_minimum():
    code = """
        import jax, jax.numpy as jnp, jopt
        found = jopt.explain(jopt.adamw(), jax.ShapeDtypeStruct((2**20,), jnp.float32))
        print(found.fuses_outputs, round(found.passes, 2))
        """
    assert run(code, OPTION) == "True 7.0"
    assert run(code).startswith("False")


def test_bad_arguments():
    with pytest.raises(TypeError, match="tx: expected an optimizer, chain or groups of jopt's, found str"):
        jopt.explain("adamw", jnp.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tx: SparseAdam takes sparse gradients"):
        jopt.explain(jopt.sparse_adam(), jnp.ones(2))
    with pytest.raises(TypeError, match=r"params\['w'\]: expected a floating point or complex type, found int32"):
        jopt.explain(jopt.adamw(), {"w": jax.ShapeDtypeStruct((2,), jnp.int32)})


def test_a_chain_and_groups():
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    tx = jopt.chain(
        jopt.clip_grad_norm(1.0), jopt.param_groups(jopt.adamw, {jopt.norms_and_biases: {"weight_decay": 0.0}})
    )
    found = jopt.explain(tx, params)
    assert found.optimizer == "Chain"
    assert found.outputs == len(jax.tree.leaves((params, tx.init(params))))
    assert found.accessed_bytes >= found.minimum_bytes
