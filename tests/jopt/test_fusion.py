"""One loop for all of a step's outputs on CPU: turning it on, and what the compiler then makes of each optimizer."""

import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

import jopt
from jopt import fusion
from jopt._compat import JAX, enable_x64
from tests import cases

OPTION = f"--xla_backend_extra_options={fusion.FLAG}"


def run(code, flags=None):
    """What a fresh process with these XLA_FLAGS prints."""
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    if flags is not None:
        environment["XLA_FLAGS"] = flags
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, OPTION),
        ("", OPTION),
        ("--xla_cpu_max_isa=AVX2", f"--xla_cpu_max_isa=AVX2 {OPTION}"),
        (OPTION, OPTION),
        (f"{OPTION}=false", f"{OPTION}=false"),
        ("--xla_backend_extra_options=a=b,c", f"{OPTION},a=b,c"),
        ("--xla_backend_extra_options='a,b' --xla_x=1", f"--xla_backend_extra_options='{fusion.FLAG},a,b' --xla_x=1"),
        ("--xla_backend_extra_options= --xla_x=1", f"{OPTION} --xla_x=1"),
        (f"--xla_backend_extra_options=a,{fusion.FLAG}", f"--xla_backend_extra_options=a,{fusion.FLAG}"),
    ],
)
def test_the_option_joins_what_the_user_set(monkeypatch, before, after):
    monkeypatch.setattr(fusion.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    for _ in range(2):
        fusion.enable_multi_output_fusion()
        assert os.environ["XLA_FLAGS"] == after


def test_a_file_of_flags_is_left_alone(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    file.write_text("--xla_cpu_max_isa=AVX2")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    with pytest.warns(RuntimeWarning, match=f"XLA_FLAGS names the file .*: add {OPTION} to it"):
        fusion.enable_multi_output_fusion()
    file.write_text(OPTION)
    fusion.enable_multi_output_fusion()
    assert os.environ["XLA_FLAGS"] == str(file)


def test_enabled_in_time_and_too_late():
    found = run(
        """
        import warnings
        import jax, jopt
        from jopt.fusion import fuses_outputs
        jopt.enable_multi_output_fusion()
        jax.numpy.ones(2).block_until_ready()
        jopt.enable_multi_output_fusion()
        print(fuses_outputs(own=False))
        """
    )
    assert found == "True"
    found = run(
        """
        import os, warnings
        import jax, jopt
        from jopt.fusion import fuses_outputs
        jax.numpy.ones(2).block_until_ready()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jopt.enable_multi_output_fusion()
        print(fuses_outputs(own=False), os.environ.get("XLA_FLAGS"), len(caught), caught[0].category.__name__)
        print(caught[0].message)
        """
    )
    assert found.startswith("False None 1 RuntimeWarning")
    assert "before the first JAX operation" in found
    assert f"XLA_FLAGS='{OPTION}'" in found


def test_the_block_alone_fuses():
    assert fusion.fuses_outputs(own=True)
    with fusion.multi_output_fusion():  # blocks nest
        assert fusion.fuses_outputs.__wrapped__(own=True)
        assert fusion.fuses_outputs.__wrapped__(own=False)
    if fusion.FLAG not in os.environ.get("XLA_FLAGS", ""):
        assert not fusion.fuses_outputs.__wrapped__(own=False)


def test_a_jax_without_its_private_function(monkeypatch):
    monkeypatch.delattr(fusion.compiler, "get_compile_options")
    with fusion.multi_output_fusion():
        pass
    assert not hasattr(fusion.compiler, "get_compile_options")


def test_the_probe_in_any_setting():
    with jax.disable_jit(), jax.debug_nans(True), enable_x64(True):
        assert fusion.fuses_outputs.__wrapped__(own=True)
    assert jax.jit(lambda x: x if fusion.fuses_outputs.__wrapped__(own=True) else -x)(3.0) == 3


# --- what the compiler makes of a step

ELEMENTWISE = [case for case in cases.CASES if case.scope == "element"]
SIZES = {"float32": 9000, "bfloat16": 7000}


def packed():
    return jopt.pack({name: jnp.ones(size, name) for name, size in SIZES.items()})


def loops(program, size):
    """What makes an array of that size."""
    entry = program[program.find("\nENTRY") :].splitlines()
    made = [line for line in entry if " = " in line and f"[{size}]" in line.partition("metadata")[0]]
    return [line for line in made if not re.search(r" (parameter|get-tuple-element|tuple)\(", line)]


@cases.parametrize(ELEMENTWISE, fast=cases.FEW)
def test_one_loop_a_buffer_in_place(case, monkeypatch, request):
    """With the option, of this compilation alone: no array but those that come and go, each read and written once."""
    if JAX >= (0, 11) and case.id in ("radam-l2", "radam-decoupled"):
        reason = "XLA merges no loop of so many numbers: exp_avg has one of its own, and a copy"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    monkeypatch.setattr(jopt.transform, "fuses_outputs", fusion.fuses_outputs.__wrapped__)
    tx, params = case.jopt(), packed()
    with fusion.multi_output_fusion():
        found = jopt.explain(tx, params)
    assert found.outputs_in_place == found.outputs
    assert found.temporary_bytes < 4096
    # Prodigy's two sums come before: of gradient, parameter and p0, and of gradient and s.
    before = 5 * found.pass_bytes if tx.rule.sums else 0
    assert found.accessed_bytes <= found.minimum_bytes + before + 4096
    for size in SIZES.values():
        assert len(loops(found.program, size)) == 1


@pytest.mark.parametrize("flags", [OPTION, None])
def test_in_the_users_jit(flags):
    """AdamW of a tree in plain jit, and through optax's interface: 7 passes with the option, and right without."""
    found = run(
        """
        import jax, jax.numpy as jnp, numpy as np, optax, jopt
        tx, params = jopt.adamw(0.1), [jnp.ones((64, 33)), jnp.ones(4096)]
        state = tx.init(params)

        def update(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        eager, _ = tx.step(params, state, params)
        n = 4 * sum(x.size for x in params)
        for f in (lambda params, state, grads: tx.step(grads, state, params), update):
            compiled = jax.jit(f, donate_argnums=(0, 1)).lower(params, state, params).compile()
            passes = compiled.cost_analysis()["bytes accessed"] / n
            new, _ = jax.jit(f)(params, state, params)
            assert all(np.allclose(x, y, rtol=1e-6) for x, y in zip(new, eager))
            assert compiled.memory_analysis().temp_size_in_bytes < 1024
            print(passes < 7.05)
        """,
        flags,
    )
    assert found.split() == ["True" if flags else "False"] * 2


def test_clipped_gradients_are_no_arrays_of_their_own():
    """Clipping and unscaling are factors in the step's own loop: no temporary memory that grows with the parameters."""
    code = """
        import jax, jax.numpy as jnp, jopt
        jopt.enable_multi_output_fusion()
        tx, scaler = jopt.chain(jopt.clip_grad_norm(1.0), jopt.adamw(lr=0.1)), jopt.loss_scale()
        params = {f"p{i}": jnp.ones((256, 128 + i)) for i in range(3)}
        def clip(params, state, scale, grads):
            return (*tx.step(grads, state, params), scale)
        def unscale_and_clip(params, state, scale, grads):
            return scaler.step(tx, grads, state, params, scale)
        for f in (clip, unscale_and_clip):
            step = jax.jit(f, donate_argnums=(0, 1))
            compiled = step.lower(params, tx.init(params), scaler.init(), params).compile()
            print(compiled.memory_analysis().temp_size_in_bytes)
    """
    clip, unscale_and_clip = map(int, run(code).split())
    gradients = 4 * 256 * (128 + 129 + 130)
    # Before jax 0.10 what is summed is written first: the squares of all, and what says whether all are finite.
    sums = 0 if JAX >= (0, 10) else gradients
    assert clip < 4096 + sums
    assert unscale_and_clip < 4096 + 2 * sums


def test_row_sparse_steps_compile_with_the_option():
    """Three scatters in one loop would end the process; Adam's first step moves each row by the learning rate."""
    found = run(
        """
        import jax, jax.numpy as jnp, jopt
        from jax.experimental.sparse import BCOO
        jopt.enable_multi_output_fusion()
        tx, params = jopt.sparse_adam(lr=0.5), jnp.zeros((100, 4))
        grad = BCOO((jnp.ones((3, 4)), jnp.array([[1], [2], [2]])), shape=(100, 4))
        params, state = jax.jit(tx.step, donate_argnums=(1, 2))(grad, tx.init(params), params)
        print(params[:4, 0].round(3).tolist(), params[4:].sum().item())
        """
    )
    assert found == "[0.0, -0.5, -0.5, 0.0] 0.0"
