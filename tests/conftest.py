"""Strictness for the whole suite: types and ranks do not mix by accident, and x64 is off unless a test enters it.

x64 stays off because that is how JAX runs by default; what must be exact all the same (scalars) is tested there, and
float64 leaves inside `jax.enable_x64(True)`.
"""

import gc
import os

import jax
import pytest

from jopt._compat import JAX, enable_x64
from tests import ROOT

collect_ignore = ["data"]  # what tests read, among it programs that are not to be run
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
cache = ROOT / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# Compiling is most of what the suite costs; with these options it is a third. Steps run slower, and round elsewhere: by
# either generator they meet the same tolerances.
QUICK = "--xla_backend_optimization_level=0"
if JAX < (0, 11):  # which has no other generator any more
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help=f"compile in a third of the time, by XLA_FLAGS {QUICK}")
    text = "step the host's memory as a GPU's is stepped: tests/interop/memory/owned.py"
    parser.addoption("--torchs-memory", action="store_true", help=text)


def pytest_configure(config):
    if config.getoption("--quick"):  # before JAX starts
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    if config.getoption("--torchs-memory"):
        os.environ[TORCHS_MEMORY] = "1"
        step_torchs_memory()


TORCHS_MEMORY = "JOPT_TESTS_OF_TORCHS_MEMORY"  # for processes that tests start


def step_torchs_memory():
    from interop import memory
    from tests.interop.memory.owned import OnCpu

    memory.DEVICES[memory.HOST.torch_device] = OnCpu()


try:
    import torch
except ModuleNotFoundError:  # jopt alone is tested on Pythons without it
    torch = None
else:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache.parent / "torch_extensions"))


@pytest.fixture(autouse=True, scope="module")
def collected():
    """Collections pass over what earlier modules left, JAX's caches above all: one takes milliseconds, not a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """float64 as JAX's default float."""
    with enable_x64(True):
        yield


@pytest.fixture
def relaxed():
    """JAX as its users run it: optax mixes types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def native_reader():
    """The compiled reader of gradients; it stays off."""
    from interop.dropin import native

    try:
        native.enable_native_reader()
    except RuntimeError as error:
        pytest.skip(str(error))
    extension, native.extension = native.extension, None
    return extension


@pytest.fixture(params=["Python", "C++"])
def reading(request, monkeypatch):
    """Gradients are read in each of the two languages."""
    extension = request.getfixturevalue("native_reader") if request.param == "C++" else None
    monkeypatch.setattr("interop.dropin.native.extension", extension)
