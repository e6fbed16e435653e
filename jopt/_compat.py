"""The versions that are supported, and what differs between them: nothing else in this package asks for a version."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["JAX", "NEEDED", "check_versions", "device", "enable_x64", "undivided"]

NEEDED = {"jax": "0.7.2", "jaxlib": "0.7.2", "optax": "0.2.6", "numpy": "2.0"}  # as in pyproject.toml


def numbers(version: str) -> tuple[int, ...]:
    """The part of a version that can be compared: (2, 9, 0) of "2.9.0+cpu"."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version)[0])))  # type: ignore[index]


def check_versions(package: str, needed: Mapping[str, str]) -> None:
    """Raise ImportError, in one line, for what is not installed or too old."""
    for name, least in needed.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or numbers(found) < numbers(least):
            raise ImportError(f"{package} needs {name}>={least}, found {found}: pip install -U '{name}>={least}'")


check_versions("jopt", NEEDED)

try:
    import jax
except (ImportError, RuntimeError) as error:
    raise ImportError(
        f"jopt needs a jaxlib that goes with its jax {version('jax')}, found {version('jaxlib')}: "
        f"pip install -U jax jaxlib ({error})"
    ) from error

import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax._src import core  # noqa: E402
from jax.core import Tracer  # noqa: E402

JAX = numbers(jax.__version__)

# Whether nothing is traced, differentiated or mapped. Private to JAX; without it we take the way that is always right.
trace_state_clean: Callable[[], bool] = getattr(core, "trace_state_clean", lambda: False)

if JAX >= (0, 8):
    enable_x64: Callable[[bool], AbstractContextManager[None]] = jax.enable_x64

    def undivided(f: Callable[..., Any]) -> Callable[..., Any]:
        """f, of which no part is evaluated outside of the x64 scope that it is called in."""
        return f

else:
    from jax.experimental import enable_x64  # type: ignore[no-redef]

    def undivided(f: Callable[..., Any]) -> Callable[..., Any]:
        """As above. Linearizing a scan moves what is the same in each turn out of the scope, but no part of a jit."""

        def call(*args: Any) -> Any:
            traced = any(isinstance(x, Tracer) for x in args)
            return (jax.jit(f) if traced else f)(*args)

        return call


def manual_axes() -> tuple[str, ...]:
    """The axes of the shard_map that is traced."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varying(x: Any) -> frozenset[str]:
    """The axes of shard_map that an array varies over. JAX 0.11 gave them another name."""
    kind = x if isinstance(x, core.ShapedArray) else jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma  # type: ignore[attr-defined]


def vary(x: Any, axes: Iterable[str]) -> Any:
    """An array as one that varies over these axes too. JAX 0.9 gave the function another name."""
    axes = tuple(axes)
    if not axes:
        return x
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)  # type: ignore[attr-defined]


if JAX >= (0, 11):

    def own_inputs(inputs: Any, n: int) -> tuple[Any, ...]:
        """The inputs n times, each with operations of its own, so that what is computed of them shares nothing.

        XLA on CPU then merges the loops, since they read the same arrays. Behind a barrier they would read others: this
        XLA drops it only later. So each copy is chosen by a flag, which is always true, but XLA cannot know that.
        """
        made = lax.optimization_barrier([jnp.asarray(True)] * (n - 1))  # one of n needs none

        def chosen(x: Any, flag: Any) -> Any:
            return lax.select(jnp.broadcast_to(flag, x.shape), x, jnp.zeros_like(x))

        return inputs, *(jax.tree.map(lambda x, flag=flag: chosen(x, flag), inputs) for flag in made)

else:

    def own_inputs(inputs: Any, n: int) -> tuple[Any, ...]:
        """The inputs n times, each with operations of its own, so that what is computed of them shares nothing.

        XLA on CPU then merges the loops, since they read the same arrays: it has dropped the barrier by then.
        """
        return lax.optimization_barrier((inputs,) * n)


def bind(eqn: Any, operands: list[Any]) -> list[Any]:
    """What an equation of a jaxpr gives for other operands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *operands, **params)
    return results if eqn.primitive.multiple_results else [results]


def device(platform: str | None = None) -> Any:
    """JAX's first device of the platform, or of its own choice; JAX starts, if it has not.

    Raises:
      RuntimeError: there is none, with what to do. JAX itself may raise an AssertionError without a word.
    """
    try:
        return jax.local_devices(backend=platform)[0]
    except (RuntimeError, AssertionError) as error:
        chosen = os.environ.get("JAX_PLATFORMS")
        others = "cpu" if platform is None else f"{chosen},{platform}"
        remedy = f"JAX_PLATFORMS is {chosen!r}: unset it, or set it to {others!r}" if chosen else "reinstall jaxlib"
        what = "CPU device" if platform == "cpu" else "device"
        raise RuntimeError(
            f"JAX finds no {what} here. {remedy}; or install what its platform needs, as pip install 'jax[cuda12]' "
            f"on a machine with a GPU. JAX said: {str(error) or type(error).__name__}"
        ) from error
