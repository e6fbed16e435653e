"""What importing does, and does not."""

import subprocess
import sys
import textwrap


def run(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", textwrap.dedent(code)], capture_output=True, text=True)


def test_jopt_imports_no_torch_and_starts_no_backend():
    result = run(
        """
        import os, sys
        before = dict(os.environ)
        import jopt
        from jax._src import xla_bridge
        assert "torch" not in sys.modules, "torch"
        assert "interop" not in sys.modules, "interop"
        assert not xla_bridge._backends, xla_bridge._backends
        assert {k: v for k, v in os.environ.items() if before.get(k) != v} == {}, "environment"
        jopt.adamw(lr=1e-3)
        assert not xla_bridge._backends, "making an optimizer"
        """
    )
    assert result.returncode == 0, result.stderr


def test_interop_without_torch_says_what_to_install():
    result = run(
        """
        import sys
        sys.modules["torch"] = None
        import interop
        """
    )
    assert result.returncode == 1
    assert "interop needs PyTorch: pip install torch" in result.stderr.splitlines()[-1]


def test_public_names_exist():
    import jopt

    assert all(hasattr(jopt, name) for name in jopt.__all__)
    assert jopt.__all__ == sorted(jopt.__all__)
