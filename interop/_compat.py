"""The versions of torch that are supported, and what differs between them: nothing else here asks for a version."""

from __future__ import annotations

from jopt._compat import NEEDED, check_versions, numbers

try:
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("interop needs PyTorch: pip install torch (or pip install 'jopt[torch]')") from error

TORCH = numbers(torch.__version__)
check_versions("interop", NEEDED | {"torch": "2.9"})

SEARCH_EVALUATIONS = 25 if TORCH < (2, 10) else None
"""How many evaluations LBFGS's line search has, if not those that are left of max_eval."""


def jax_has_started() -> bool:
    """Whether JAX has threads in this process; where a JAX does not tell, that it has."""
    from jax._src import xla_bridge

    return getattr(xla_bridge, "backends_are_initialized", lambda: True)()
