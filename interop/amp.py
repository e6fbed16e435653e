"""torch.amp's GradScaler, whose unscaling and check for infinities the compiled step does on the way.

>>> import torch
>>> from interop import amp, optim
>>> model = torch.nn.Linear(2, 1)
>>> optimizer, scaler = optim.AdamW(model.parameters(), lr=1e-2, max_norm=1.0), amp.GradScaler("cpu")
>>> scaler.scale(model(torch.ones(1, 2)).sum()).backward()
>>> scaler.step(optimizer)
>>> scaler.update()
>>> optimizer.skipped
False
"""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from interop.dropin.groups import parameters
from interop.dropin.processes import meshes
from interop.dropin.step import CompiledStep

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` that saves the two passes over the gradients that `unscale_` makes.

    A step of an `interop.optim` optimizer multiplies the gradients by 1 / scale as it reads them, and changes nothing
    but its averages (`ema`) where one is not finite; its `skipped` says so. The gradients stay scaled. With other
    optimizers, and after an explicit `unscale_`, all is as in torch. Unlike there, the step's hooks run for a skipped
    step too.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's, in one compiled step.

        Raises:
            ValueError: gradients of float16, as in torch: scale the loss of a float32 model under autocast.
            RuntimeError: a closure, or a second step before `update`.
        """
        if not self._enabled or not isinstance(optimizer, CompiledStep) or args or kwargs:
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:
            return super().step(optimizer)
        self._check_scale_growth_tracker("step")
        grads = [grad for p in parameters(optimizer) if (grad := p.grad) is not None]
        if any(grad.dtype is torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients.")
        if not grads and not meshes(optimizer):  # of DTensors other processes may have some
            raise AssertionError("No inf checks were recorded for this optimizer.")
        optimizer.grad_scale = self._scale
        try:
            result = optimizer.step()
        finally:
            optimizer.grad_scale = None
        assert self._scale is not None
        pending = optimizer._around.pending
        skipped = torch.tensor(optimizer.skipped) if pending is None else pending.flag  # which the host need not know
        found = skipped.to(self._scale.device, torch.float32)
        state["found_inf_per_device"] = {found.device: found}
        state["stage"] = OptState.STEPPED
        return result
