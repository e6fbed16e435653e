"""What importing does, and does not."""

import subprocess
import sys
import textwrap

import pytest

from tests import cases


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


def test_interop_imports_torch_and_jax_at_the_first_use():
    """All at once: what there is after it does not depend on which name came first."""
    pytest.importorskip("torch", reason="interop needs it")
    result = run(
        """
        import sys
        import interop
        assert not {"torch", "jax", "jopt"} & sys.modules.keys()
        assert set(interop.__all__) <= set(dir(interop))
        assert not hasattr(interop, "nonsense")
        assert not {"torch", "jax", "jopt"} & sys.modules.keys()
        interop.to_jax
        assert all(name in vars(interop) for name in interop.__all__)
        assert "interop.dropin.step" in sys.modules
        """
    )
    assert result.returncode == 0, result.stderr


WAYS = [
    "from interop import optim; optim.AdamW",
    "import interop; interop.optim.AdamW; interop.amp.GradScaler; interop.wrapping.wrap",
    "from interop import *; assert wrap.__module__ == 'interop.wrapping.optimizer'",
    "import interop.runs.files.description, interop; interop.Checkpoint",
]


@pytest.mark.parametrize("code", cases.mostly_slow(WAYS, WAYS[:1]))
def test_ways_to_interops_names(code):
    pytest.importorskip("torch", reason="interop needs it")
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_a_name_that_interop_lacks():
    pytest.importorskip("torch", reason="interop needs it")
    import interop

    with pytest.raises(AttributeError, match="module 'interop' has no attribute 'nonsense'"):
        _ = interop.nonsense  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'interop'"):
        from interop import nonsense  # type: ignore[attr-defined]  # noqa: F401


def test_public_names_exist():
    import jopt

    assert all(hasattr(jopt, name) for name in jopt.__all__)
    assert jopt.__all__ == sorted(jopt.__all__)
