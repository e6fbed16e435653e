"""The versions of torch that are supported, and what differs between them: nothing else here asks for a version.

This runs at `import interop`, so it imports neither torch nor JAX; jopt, which checks its own versions, imports JAX.
"""

from __future__ import annotations

import functools
import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

NEEDED = {"jax": "0.7.2", "jaxlib": "0.7.2", "optax": "0.2.6", "numpy": "2.0", "torch": "2.9"}  # as in pyproject.toml


def numbers(version: str) -> tuple[int, ...]:
    """As `jopt._compat.numbers`."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version)[0])))  # type: ignore[index]


def check_versions() -> None:
    """As `jopt._compat.check_versions`, and for torch."""
    if find_spec("torch") is None:
        raise ModuleNotFoundError("interop needs PyTorch: pip install torch (or pip install 'jopt[torch]')")
    for name, least in NEEDED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or numbers(found) < numbers(least):
            raise ImportError(f"interop needs {name}>={least}, found {found}: pip install -U '{name}>={least}'")


check_versions()

TORCH = numbers(version("torch"))

SEARCH_EVALUATIONS = 25 if TORCH < (2, 10) else None
"""How many evaluations LBFGS's line search has, if not those that are left of max_eval."""


def jax_has_started() -> bool:
    """Whether JAX has threads in this process; where a JAX does not tell, that it has."""
    from jax._src import xla_bridge

    started = getattr(xla_bridge, "backends_are_initialized", lambda: True)()
    return started or own_cpu_device.cache_info().currsize > 0


@functools.cache
def own_cpu_device(*, serial: bool) -> Any:
    """A CPU device beside JAX's; None where that cannot be made, for what makes a client is private.

    So a step needs none of JAX's devices. JAX's client hands a program to another thread, so that its caller can go on.
    The drop-in has nothing to do meanwhile, and a small program takes less time than waking a thread. JAX has the
    choice as an option (`jax_cpu_enable_async_dispatch`), which is the user's and for the whole process.

    Args:
      serial: its programs run in the thread that calls them, and use no other. Programs of several threads leave it
        waiting as JAX's do: it would be one more than there are processors.
    """
    from jax._src.lib import xla_client  # type: ignore[reportPrivateImportUsage]

    before = os.environ.get("NPROC")
    try:
        if serial:
            os.environ["NPROC"] = "1"  # XLA's name for the number of a client's threads; read as it is made
        return xla_client.make_cpu_client(asynchronous=not serial).local_devices()[0]
    except (AttributeError, TypeError):
        return None
    finally:
        if serial:
            os.environ.pop("NPROC")
            os.environ |= {} if before is None else {"NPROC": before}
