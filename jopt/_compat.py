"""The versions of JAX that are supported, and what differs between them: nothing else asks for a version."""

from __future__ import annotations

import jax

__all__ = ["enable_x64"]

try:
    enable_x64 = jax.enable_x64
except AttributeError:  # until jax 0.8
    from jax.experimental import enable_x64
