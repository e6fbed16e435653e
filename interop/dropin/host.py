"""What a step needs of the process: signals, threads, JAX's settings."""

from __future__ import annotations

import _signal  # type: ignore[reportMissingImports]  # signal without its enumerations, which cost more than all else
import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback  # type: ignore[reportMissingImports]

from interop import _compat
from jopt._compat import enable_x64

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = _forked or _compat.jax_has_started()


os.register_at_fork(after_in_child=_mark_forked)


def check_process() -> None:
    """Raise RuntimeError in a process in which XLA would hang."""
    if _forked:
        raise RuntimeError(
            "step() in a forked child process: XLA's threads do not survive a fork; start the process by 'spawn' "
            "or 'forkserver', or before anything uses JAX"
        )


def undynamo(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, out of the reach of torch.compile where that traces this call, or compiles what is called below it."""
    is_near = torch.compiler.is_compiling() or get_eval_frame_callback() is not None
    return _disabled(f) if is_near else f


_disabled = functools.cache(torch.compiler.disable)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """The JAX settings that the programs need. The user's would harm: debug_nans raises after buffers were donated."""
    with (
        enable_x64(True),
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
    ):
        yield


def settings() -> Any:
    """The context in which programs run, inside `SignalsWait`: JAX's settings are ours.

    Raises:
      RuntimeError: as `check_process`.
    """
    check_process()
    unusual = any(getattr(jax.config, name) for name in ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs"))
    guarded = getattr(jax.config, "jax_transfer_guard_host_to_device", None) not in (None, "allow")
    # Entering them all costs as much as dispatching a small program.
    return own_settings() if unusual or guarded else enable_x64(True)


class SignalsWait:
    """Python's signal handlers run after the block rather than inside it."""

    __slots__ = ("arrived", "waiting")

    signals = [
        int(getattr(signal, name))
        for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP")
        if hasattr(signal, name)
    ]

    def __enter__(self) -> None:
        self.arrived: list[tuple[int, Any]] = []
        self.waiting: tuple[tuple[int, Any], ...] = ()
        if threading.get_ident() == threading.main_thread().ident:
            self.waiting = _pythons(tuple(map(_signal.getsignal, self.signals)))
            for number, _ in self.waiting:
                _signal.signal(number, self._arrive)

    def _arrive(self, *args: Any) -> None:
        self.arrived.append(args)

    def __exit__(self, *_: object) -> None:
        for number, handler in reversed(self.waiting):  # SIGINT last, as it came first: until then none cuts this short
            _signal.signal(number, handler)
        if self.arrived:
            self._deliver()

    def _deliver(self) -> None:
        if self.arrived:
            number, frame = self.arrived.pop(0)
            try:
                dict(self.waiting)[number](number, frame)
            finally:
                self._deliver()


@functools.lru_cache(maxsize=16)
def _pythons(handlers: tuple[Any, ...]) -> tuple[tuple[int, Any], ...]:
    """The signals that have a handler in Python; 0, 1 and None are the system's own, or none."""
    return tuple((number, x) for number, x in zip(SignalsWait.signals, handlers, strict=True) if x and callable(x))
