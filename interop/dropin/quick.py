"""A step by torch's operations that finds all as the last one left it: what is left of it, without the layers between.

Such steps take some tens of microseconds, of which Python's way through plan, buckets and readers would be the half.
Each part is the one that other steps take; whenever one finds a change, the step goes their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interop.dropin import eager, host
from interop.dropin.bucket import Work
from interop.dropin.groups import Groups
from interop.dropin.reader import Reader
from jopt.rule import Rule


class Quick:
    """The step of one bucket all of whose leaves step, and live where the step writes.

    Args:
      reader: tells whether all is as it was.
      rules, formats: of the groups.
      work: what is done with the bucket.
      kept: what `eager.Update` calls.
    """

    def __init__(
        self, reader: Reader, rules: Sequence[Rule], formats: list[Any], work: Work, kept: tuple[list[Any], Any]
    ):
        self._formats = formats
        self._reader, self._rules, self._work, (self._big, self._small) = reader, rules, work, kept
        self._coefficients, self._table = work.bucket.coefficients, work.bucket.coefficients.table

    @classmethod
    def of(
        cls,
        readers: list[Reader],
        rules: Sequence[Rule],
        formats: list[Any],
        works: list[Work],
        updates: list[eager.Update],
    ) -> Quick | None:
        """For a turn; None if that has more to do."""
        if len(works) != 1 or not readers:
            return None
        [work], [update] = works, updates
        copies = work.copied_in or work.copied_out or work.shared_slots or work.shared_scalars
        if copies or not work.active.all() or len(work.bucket.coefficients.table.runs) != 1:
            return None
        return cls(readers[0], rules, formats, work, kept) if (kept := update.kept()) is not None else None

    def __call__(self, optimizer: Any, groups: Groups) -> bool:
        """Step, if nothing has changed; whether it did."""
        around, work = optimizer._around, self._work
        if around.max_norm is not None or around.ema is not None or around.grad_scale is not None:
            return False
        if groups.rules != self._rules or groups.formats != self._formats:
            return False
        grads = self._reader.read(optimizer)
        if grads is None:
            return False
        with host.SignalsWait():
            scalars = self._coefficients.fill(groups.numbers, None)
            if len(self._table.runs) != 1:  # the user set a step count
                return False
            c = self._table.rows[0].tolist()
            if self._big:
                for (function, param, slots), grad in zip(self._big, grads.of_big(work), strict=True):
                    function(param, grad, *slots, c)
            if self._small is not None:
                grads.gather(work)
                function, tensors = self._small
                function(*tensors, c)
            self._coefficients.finish(scalars)
            torch.autograd.graph.increment_version(work.resident)
        around.grad_norm, around.skipped = None, False
        return True
