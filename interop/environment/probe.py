"""What only JAX or torch knows: a process of its own that says a fact a line; see `interop.environment`.

A fact that cannot be had is {"error": why}, and the next is asked all the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def probe_jax() -> dict[str, Callable[[], Any]]:
    def devices() -> Any:
        import jax

        try:
            names = [" ".join(dict.fromkeys((d.platform, d.device_kind))) for d in jax.local_devices()]
            return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
        except AssertionError as error:  # so JAX says that none of JAX_PLATFORMS is there
            raise RuntimeError(str(error) or "JAX finds no device") from error

    def fusion() -> Any:
        from jopt.fusion import fuses_outputs

        if importlib.util.find_spec("torch") is None:
            device = None
        else:
            from interop._compat import own_cpu_device  # which is there whatever JAX_PLATFORMS is

            device = own_cpu_device(serial=False)
        if fuses_outputs(own=False, device=device):
            return "on"
        can = fuses_outputs(own=True, device=device)
        return "off; jopt.enable_multi_output_fusion() turns it on" if can else "off; this XLA cannot"

    return {"imports": lambda: _imports("jopt"), "devices": devices, "output fusion": fusion}


def probe_torch() -> dict[str, Callable[[], Any]]:
    def devices() -> Any:
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return ["no accelerator"]
        names = torch.get_device_module(accelerator)
        return [f"{accelerator.type} {names.get_device_name(i)}" for i in range(torch.accelerator.device_count())]

    def threads() -> Any:
        import torch

        return torch.get_num_threads()

    def instructions() -> Any:
        import torch

        return torch.backends.cpu.get_cpu_capability()

    def native() -> Any:
        from interop.dropin import native

        lacking = native.lacking()
        return f"lacks {' and '.join(lacking)}" if lacking else "can be compiled"

    return {
        "imports": lambda: _imports("interop._compat", "interop.optim"),
        "devices": devices,
        "threads": threads,
        "instructions": instructions,
        "native reader": native,
    }


def _imports(*names: str) -> str:
    for name in names:
        importlib.import_module(name)
    return "yes"


def main(name: str) -> None:
    # What libraries print goes elsewhere.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as facts:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for fact, ask in {"jax": probe_jax, "torch": probe_torch}[name]().items():
            try:
                found = ask()
            except Exception as error:
                found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
            print(json.dumps({fact: found}), file=facts, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
