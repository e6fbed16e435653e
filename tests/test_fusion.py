"""One loop for all of a step's outputs on CPU: turning it on, and what the compiler then makes of each optimizer."""

import os
import subprocess
import sys
import textwrap

import jax
import pytest

from jopt import fusion

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
    if fusion.FLAG not in os.environ.get("XLA_FLAGS", ""):
        assert not fusion.fuses_outputs.__wrapped__(own=False)


def test_a_jax_without_its_private_function(monkeypatch):
    monkeypatch.delattr(fusion.compiler, "get_compile_options")
    with fusion.multi_output_fusion():
        pass
    assert not hasattr(fusion.compiler, "get_compile_options")


def test_the_probe_in_any_setting():
    with jax.disable_jit(), jax.debug_nans(True), jax.enable_x64(True):
        assert fusion.fuses_outputs.__wrapped__(own=True)
    assert jax.jit(lambda x: x if fusion.fuses_outputs.__wrapped__(own=True) else -x)(3.0) == 3
