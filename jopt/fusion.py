"""One loop for all of a step's outputs: what XLA on CPU does only when told.

A step of AdamW reads p, g, m, v and writes p, m, v: 7 passes over memory at least. By default XLA on CPU makes a loop
of each output, and each reads its inputs again: 10 to 11 passes. With `FLAG` it makes one loop of them all, if no two
share a subexpression (see `jopt.loops.separately`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import compiler, xla_bridge

from jopt.loops import separately

FLAG = "xla_cpu_use_multi_output_fusion"
_EXTRA_OPTIONS = "--xla_backend_extra_options="


def enable_multi_output_fusion() -> None:
    """Let XLA on CPU compute all outputs of a step in one loop, in this process and those it starts.

    A step of AdamW then makes 7 passes over memory instead of 10 to 11. It adds
    `--xla_backend_extra_options=xla_cpu_use_multi_output_fusion` to `XLA_FLAGS` in the environment, once, beside
    what is set there. Call it before the first JAX operation, since XLA reads the variable when it starts:

    >>> import jopt
    >>> jopt.enable_multi_output_fusion()  # doctest: +SKIP

    Warns:
      RuntimeWarning: a backend has started already, or `XLA_FLAGS` names a file, and the option is not set.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if flags.strip() and not flags.lstrip().startswith("-"):
        with contextlib.suppress(OSError), open(flags.strip()) as file:
            if FLAG in file.read():
                return
        _warn(f"XLA_FLAGS names the file {flags!r}, which is left as it is: add {_EXTRA_OPTIONS}{FLAG} to it")
        return
    if FLAG in flags:
        value = flags
    elif _EXTRA_OPTIONS in flags:
        # The user's options follow, perhaps in quotes.
        value = re.sub(rf"({_EXTRA_OPTIONS}[\"']?)(?=(\S?))", lambda m: _join(m[1], m[2]), flags, count=1)
    else:
        value = f"{flags} {_EXTRA_OPTIONS}{FLAG}".strip()
    started = getattr(xla_bridge, "backends_are_initialized", None)
    if started is not None and started():
        if not fuses_outputs(own=False):
            _warn(
                "a JAX backend has started already, so that XLA will not read XLA_FLAGS again: call "
                "jopt.enable_multi_output_fusion() before the first JAX operation, or start the process with "
                f"XLA_FLAGS='{value}'"
            )
        return
    os.environ["XLA_FLAGS"] = value


def _join(option: str, following: str) -> str:
    return f"{option}{FLAG}," if following.strip("\"'") else f"{option}{FLAG}"


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


_patching = threading.RLock()  # blocks of one thread may nest


@contextlib.contextmanager
def multi_output_fusion() -> Iterator[None]:
    """Have XLA on CPU compute several outputs in one loop, in what this thread compiles inside the block.

    XLA has it behind a debug option that is a map, which `compiler_options` cannot set; the other way in, XLA_FLAGS, is
    the user's and global. So the entry is appended to the compile options as they are serialized: fields 3
    (executable_build_options), 3 (debug_options), 500 (xla_backend_extra_options), then 1, the entry's key. What makes
    the options is private to JAX; where it is not found, the block changes nothing.
    """
    thread = threading.get_ident()
    with _patching:
        original = getattr(compiler, "get_compile_options", None)
        if original is None:
            yield
            return

        def get_compile_options(*args: Any, **kwargs: Any) -> Any:
            options = original(*args, **kwargs)
            if threading.get_ident() != thread:
                return options
            extra = _field(3, _field(3, _field(500, _field(1, FLAG.encode()))))
            return type(options).ParseFromString(options.SerializeAsString() + extra)

        compiler.get_compile_options = get_compile_options
        try:
            yield
        finally:
            compiler.get_compile_options = original


def _field(number: int, content: bytes) -> bytes:
    """A protocol buffer's length-delimited field."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)

    return varint(number << 3 | 2) + varint(len(content)) + content


@functools.cache
def fuses_outputs(*, own: bool, device: Any = None) -> bool:
    """Whether XLA on CPU makes one loop of several outputs: of a program of three, compiled to see.

    Args:
      own: in what is compiled inside `multi_output_fusion()`; else by the process's XLA_FLAGS.
      device: where; else JAX's CPU.
    """
    try:
        device = device or jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS has no cpu
        return False

    def program(x: Any, y: Any) -> list[Any]:
        return separately(lambda x, y: [x * y + x, x * y - y, jnp.sqrt(x * y)], 3, x, y)

    x = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    # In a thread of its own, which is under no mesh, trace or other context of the caller's.
    with ThreadPoolExecutor(1) as thread:
        lowered = thread.submit(jax.jit(program).lower, x, x).result()
    with multi_output_fusion() if own else contextlib.nullcontext():
        # What becomes one loop is decided before LLVM, whose work is half of the time.
        text = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"}).as_text() or ""
    entry = text[text.find("ENTRY") :]
    return entry.count(" fusion(") == 1 and " copy(" not in entry
