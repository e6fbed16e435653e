"""Which parameters a step updates, in which buffers, and when that has to be made anew."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from interop.dropin import dtensor, eager, formats, host, native, processes, program, reader, sums
from interop.dropin.arranging import passes_of, shelves
from interop.dropin.bucket import Bucket, Work
from interop.dropin.coefficients import Scalars
from interop.dropin.groups import Numbers, parameter_name, parameters
from interop.dropin.leaf import EMA, Leaf, is_lazy, real_dtype
from interop.dropin.measured import Measured, measures
from interop.dropin.quick import Quick
from interop.dropin.skipping import Pending
from interop.dropin.state import averages_begun, check_state, is_shared, state_dtypes
from interop.dropin.updates import update_for
from interop.dropin.whole import Whole, own_slots
from interop.memory import Buffer, Device, Staging, check_parameter
from interop.memory.tensors import DTYPES, address, is_alone
from jopt.rule import Rule

BESIDE = 2**28
"""Bytes of state whose buffers are made while programs are compiled, which itself takes some 100 MB."""


@dataclasses.dataclass
class Turn:
    """What stays the same from step to step, until a reader finds a change."""

    readers: list[reader.Reader]
    works: list[Work]
    quick: Quick | None = None


def plan_for(optimizer: Any, rules: list[Rule], numbers: Numbers) -> tuple[Plan | None, Any]:
    """The optimizer's plan, as before or made anew, and the gradients to step by; (None, None) if there are none."""
    plan: Plan | None = optimizer._plan
    if plan is not None and (grads := plan.as_before(optimizer, rules)) is not None:
        return plan, grads
    present = reader.checked(optimizer)
    if not present and (plan is None or not plan.averages):
        return None, None
    sums.shared_scalars(optimizer)  # which it checks
    if plan is None or not plan.serves(optimizer, rules, numbers, present):
        plan = optimizer._plan = Plan(optimizer, rules, numbers, present, plan)
    return plan, plan.begin(optimizer, numbers, present)


class Plan:
    """Which parameters a step updates, in which buffers.

    It is made anew for a parameter that has its first gradient, and for another shape, type, flag or group; not for a
    gradient that is missing, nor for other numbers.
    """

    def __init__(
        self,
        optimizer: Any,
        rules: Sequence[Rule],
        numbers: Numbers,
        grads: Mapping[Tensor, Tensor],
        previous: Plan | None,
    ):
        self.rules, self.averages = list(rules), optimizer.ema is not None
        self.formats = [formats.of(group) for group in optimizer.param_groups]
        self.is_summed = bool(optimizer.rule.sums)
        self.turn: Turn | None = None
        self.leaves, self.passes = self._find_leaves(optimizer, numbers, grads, previous)
        # Compile all before any memory moves, and move it all: an interrupt finds the old state or the new.
        extra = None
        if not measures(optimizer) and not self.is_summed and all(leaf.whole is None for leaf in self.leaves.values()):
            extra = eager.extra_passes((rules[x.group], x) for x in self.leaves.values())
        self._make_buckets(by_torch=extra is not None and extra <= eager.ROOM)
        self.rent: int | None = None
        if extra and previous is not None and not self.uses_torch and self._rents(previous):
            self.rent = eager.RENT // extra
            self._make_buckets(by_torch=self.rent > 0)
        if not self.uses_torch:
            host.check_process()
        self._compiled: dict[tuple[bool, bool], program.Programs] = {}
        states: Iterable[Any] = [bucket.state_buffers() for bucket in self.buckets]
        size = sum(bucket.state_bytes for bucket in self.buckets)
        waits = any(device.asynchronous for device in self.devices)  # of torch's current stream, which a thread has not
        if self.uses_torch or waits or size > BESIDE or any(map(optimizer.state.get, self.leaves)):
            self.programs(optimizer)
        else:  # beside compiling, where that adds little to its memory: no large ones, none in memory already
            with ThreadPoolExecutor(1) as thread:
                states = thread.map(lambda bucket: list(bucket.state_buffers()), self.buckets)
                self.programs(optimizer)
        with host.SignalsWait():
            self._take(optimizer, numbers, states)
        self.views = self._state_views()
        self.addresses = list(map(address, self.views))

    def _find_leaves(
        self, optimizer: Any, numbers: Numbers, grads: Mapping[Tensor, Tensor], previous: Plan | None
    ) -> tuple[dict[Tensor, Leaf], dict[Tensor, int]]:
        """Check everything; returns the leaves, and the pass of each."""
        before = previous.leaves if previous else {}
        params = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p in grads
            or (p in before and (optimizer.state.get(p) or not before[p].views))
            or (self.is_summed and optimizer.state.get(p))
        ]
        passes = passes_of(params)
        leaves: dict[Tensor, Leaf] = {}
        everywhere = [(index, p) for index, group in enumerate(optimizer.param_groups) for p in group["params"]]
        for number, (index, p) in enumerate(everywhere):
            if p in passes and p not in leaves:
                leaves[p] = self._leaf(optimizer, index, number, p, numbers[index], before.get(p))
        return leaves, passes

    def _make_buckets(self, *, by_torch: bool) -> None:
        """Put the leaves that one program may step together into a bucket; by torch's operations, where it can."""
        size = sum(leaf.size for leaf in self.leaves.values())
        by_torch = by_torch and all(leaf.device.by_torch is not None for leaf in self.leaves.values())
        members: dict[Any, list[Leaf]] = {}
        for p, leaf in self.leaves.items():
            device = (leaf.device.by_torch if by_torch else None) or leaf.device.of_size(size)
            real = tuple((slot, real_dtype(dtype)) for slot, dtype in leaf.state_dtypes.items())
            mesh = leaf.placement[0] if leaf.whole is not None else None
            key = self.passes[p], device, self.rules[leaf.group], real_dtype(p.dtype), real, mesh
            members.setdefault(key, []).append(leaf)
        parts = [
            (device, rule, dtype, dict(slots), part)
            for (_, device, rule, dtype, slots, _), leaves in sorted(members.items(), key=lambda item: item[0][0])
            for part in shelves(device, rule, leaves)
        ]
        self.buckets = [Bucket(i, *part) for i, part in enumerate(parts)]
        self.devices = {bucket.device for bucket in self.buckets}
        self.uses_torch = any(device.uses_torch for device in self.devices)

    def _rents(self, previous: Plan) -> bool:
        """Whether torch's operations take the first steps, for shapes changed, and might change again before long.

        When what they cost more is as much as compiling, the next plan is by programs.
        """
        exchanged = any(p not in self.leaves or self.leaves[p].shape != x.shape for p, x in previous.leaves.items())
        made = all(program.is_made(bucket.spec) for bucket in self.buckets)
        return exchanged and not made and previous.rent != 0

    def _leaf(
        self, optimizer: Any, index: int, number: int, p: Tensor, h: dict[str, float], before: Leaf | None
    ) -> Leaf:
        name, rule = parameter_name(optimizer, index, p), self.rules[index]
        x = dtensor.local(p)
        device = check_parameter(name, x)
        placement, lazy = dtensor.placement(p), is_lazy(x)
        whole = Whole.of(placement) if placement is not None and rule.scope == "tensor" else None
        rule.check_param(name, tuple(p.shape), DTYPES[x.dtype])
        form = self.formats[index]
        formats.check_part(name, form, placement)
        shapes = formats.names(rule, form, x, own_slots(rule, placement, tuple(x.shape)))
        shapes |= {EMA: tuple(x.shape)} if self.averages else {}
        state = optimizer.state.get(p) or {}
        check_state(optimizer, name, rule, h, shapes, state)
        return Leaf(
            param=p,
            device=device,
            local=x,
            placement=placement,
            whole=whole,
            group=index,
            number=number,
            dtype=x.dtype,
            shape=x.shape,
            strides=x.stride(),
            size=x.numel() * (2 if x.is_complex() else 1),
            state_dtypes=state_dtypes(device, name, rule, form, p, shapes, state),
            state_shapes=shapes,
            lazy=lazy,
            # FSDP gathers from the memory that it keeps itself: the parameter may not move.
            exchanged=0 if before is None else before.exchanged,
            stays=(before is not None and before.stays) or lazy or placement is not None,
        )

    def _take(self, optimizer: Any, numbers: Numbers, states: Iterable[Iterable[dict[str, Buffer]]]) -> None:
        """Move parameters and state into the buckets' buffers, of which those of the state may be there already."""
        sizes: dict[tuple[Device, np.dtype], int] = {}
        for bucket in self.buckets:
            key = bucket.device, bucket.dtype
            sizes[key] = max(sizes.get(key, 0), bucket.layout.size)
        staging: dict[Any, Staging] = {key: key[0].staging(size, key[1]) for key, size in sizes.items()}
        begun, shared = averages_begun(optimizer), sums.shared_scalars(optimizer)
        for leaf in self.leaves.values():
            scalars = self.rules[leaf.group].init_scalars(numbers[leaf.group]).keys() - optimizer.hidden_scalars
            if leaf.state_dtypes or scalars:
                optimizer.state[leaf.param]  # in the order in which torch makes them
        freed = {
            device: device.freeing(
                sum(leaf.local.nbytes for bucket in self.buckets if bucket.device is device for leaf in bucket.leaves)
            )
            for device, _ in sizes
        }
        for bucket, buffers in zip(self.buckets, states, strict=True):
            place = staging[bucket.device, bucket.dtype]
            bucket.take(optimizer, numbers, place, begun, shared, freed[bucket.device], buffers)

    def _state_views(self) -> list[Tensor]:
        return [dtensor.local(view) for leaf in self.leaves.values() for view in leaf.views.values()]

    def programs(self, optimizer: Any) -> program.Programs:
        """What is compiled for the optimizer as it is now."""
        clip, unscale = optimizer.max_norm is not None, optimizer.grad_scale is not None
        if (clip, unscale) not in self._compiled:
            measures: list[Any] = []
            norms: tuple[Any, ...] = ()
            if clip or unscale:
                norms = tuple((len(bucket.leaves), bucket.dtype) for bucket in self.buckets)
                measures = [
                    None if bucket.device.measures_by_torch else program.compile_norms(bucket.spec, unscale)
                    for bucket in self.buckets
                ]
            summing = [program.compile_sums(x.spec, clip, unscale, norms) for x in self.buckets if self.is_summed]
            updates = [update_for(optimizer, bucket, clip, unscale, norms) for bucket in self.buckets]
            self._compiled[clip, unscale] = program.Programs(measures, summing, updates)
        return self._compiled[clip, unscale]

    # --- whether it still fits

    def as_before(self, optimizer: Any, rules: Sequence[Rule]) -> reader.Gradients | None:
        """The gradients, if all is as the last step left it, so that nothing needs to be checked or planned again."""
        if self.turn is None or not self._is_for(optimizer, rules):
            return None
        for each in self.turn.readers:
            if (grads := each.read(optimizer)) is not None:
                return grads
        return None

    def _is_for(self, optimizer: Any, rules: Sequence[Rule]) -> bool:
        return (
            rules == self.rules
            and optimizer._groups.formats == self.formats
            and self.averages == (optimizer.ema is not None)
            and not (self.uses_torch and (measures(optimizer) or self.rent == 0))
        )

    def serves(
        self,
        optimizer: Any,
        rules: Sequence[Rule],
        numbers: Numbers,
        grads: Mapping[Tensor, Tensor],
    ) -> bool:
        """Whether this plan still fits the optimizer; takes note of parameters that moved."""
        if not self._is_for(optimizer, rules):
            return False
        fits, moved = list(map(address, self.views)) == self.addresses, False
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                follows = self.is_summed and optimizer.state.get(p)
                if p not in grads and not (self.averages and p in self.leaves) and not follows:
                    continue
                leaf = self.leaves.get(p)
                if leaf is None or leaf.group != index:
                    fits = False
                    continue
                x = leaf.local = dtensor.local(p)
                if leaf.dtype is not x.dtype or leaf.shape != x.shape or leaf.strides != x.stride():
                    fits = False
                if leaf.placement != dtensor.placement(p) or (leaf.home is not None and leaf.home.device != x.device):
                    fits = False
                if leaf.lazy != is_lazy(x):
                    leaf.stays = True
                    fits = False
                if address(x) != leaf.address:
                    if leaf.home is None:
                        # Someone may still hold the memory that it left: that cannot be its place any more.
                        leaf.stays = True
                        leaf.exchanged += 1
                        fits = False
                    leaf.address = address(x)
                    moved = True
                state = optimizer.state.get(p) or {}
                if exchanged := [slot for slot, view in leaf.views.items() if state.get(slot) is not view]:
                    name = parameter_name(optimizer, index, p)
                    check_state(optimizer, name, rules[index], numbers[index], leaf.state_shapes, state)
                    fits = (
                        state_dtypes(leaf.device, name, rules[index], self.formats[index], p, leaf.state_shapes, state)
                        == leaf.state_dtypes
                        and fits
                    )
                    moves = leaf.placement is not None or leaf.homes or any(map(is_shared, state.values()))
                    # An array over the old state has to show the old values.
                    fits = fits and not moves and all(is_alone(leaf.views[slot]) for slot in exchanged)
        return fits and not (moved and passes_of(list(self.leaves)) != self.passes)

    def begin(self, optimizer: Any, numbers: Numbers, present: Mapping[Tensor, Tensor]) -> reader.Gradients:
        """Note which parameters step, and take in state that its user exchanged; returns the gradients."""
        self.turn = None
        params = parameters(optimizer)
        places = {p: i for i, p in enumerate(params)}
        begun, shared = averages_begun(optimizer), sums.shared_scalars(optimizer)
        works = [
            bucket.begin(optimizer.state, numbers, present, places, begun, shared, self.averages)
            for bucket in self.buckets
        ]
        self.views = self._state_views()
        plain = all(leaf.placement is None for leaf in self.leaves.values())
        readers: list[reader.Reader] = []
        if plain and all(g is None or g is present.get(p) for p in params for g in [p.grad]):
            asks = native.extension is not None and all(isinstance(p, Tensor) for p in params)
            asks = asks and all(device.reads_addresses for device in self.devices)
            kinds = [native.NativeReader] * asks + [reader.PythonReader]
            readers += [kind(optimizer, list(self.leaves.values()), self.views, works) for kind in kinds]
        self.turn = Turn(readers, works)
        return reader.ListedGradients([present.get(p) for p in params])

    # --- a step

    def measure(self, optimizer: Any, grads: reader.Gradients) -> Measured:
        """The norms of the gradients, for a step that clips or unscales them."""
        measures = self.programs(optimizer).measures
        scale = optimizer.grad_scale
        # As torch.amp.GradScaler.unscale_
        inverse = None if scale is None else scale.double().reciprocal().float()
        if inverse is not None and not any(device.asynchronous for device in self.devices):
            inverse = inverse.item()
        found = Measured(optimizer.max_norm or 0.0, inverse)
        works = self.works()
        users = collections.Counter(id(work.bucket.staging) for work in works)
        try:
            for work, measure in zip(works, measures, strict=True):
                found.take(work, measure, grads)
                if users[id(work.bucket.staging)] > 1:
                    found.wait()  # another bucket's gradients are gathered there next
            return found
        except BaseException:
            found.wait()
            raise

    def agree(self, optimizer: Any, meshes: list[Any], found: Measured | None) -> None:
        """Let processes find out together what `processes.agree` says, and put it into what this one measured."""
        if found is None:
            processes.agree(meshes, optimizer)
        else:
            found.wait()
            found.agree(optimizer, meshes, self.buckets)

    def update(
        self,
        optimizer: Any,
        grads: reader.Gradients,
        numbers: Numbers,
        measured: Measured | None,
        added: Mapping[str, float] | None,
    ) -> tuple[Tensor | None, bool | Pending]:
        """Step the parameters; returns the norm of their gradients, if it was measured, and whether nothing changed."""
        updates = self.programs(optimizer).updates
        results: list[tuple[Work, list[Any], Scalars]] = []
        works = self.works()
        try:
            for work, update in zip(works, updates, strict=True):
                if self.averages or work.is_active:
                    found = {} if measured is None else measured.of(work.bucket)
                    results.append((work, *work.bucket.step(update, work, numbers, grads, found, optimizer.ema, added)))
        finally:
            if measured is not None:
                measured.wait()
        if added is not None and not self.averages:
            results += sums.followed(works, numbers, added, finish=measured is None)
        if self.rent:
            self.rent -= 1
        elif self.uses_torch and self.turn is not None and self.rent is None:
            self.turn.quick = Quick.of(self.turn.readers, self.rules, self.formats, self.turn.works, updates)
        if measured is None:
            return None, False
        first, (norm, found_inf), _ = results[0]
        device, steps = first.bucket.device, [(work, scalars) for work, _, scalars in results]
        norm = device.tensor(norm).clone()
        if optimizer.grad_scale is not None and device.asynchronous:
            return norm, Pending.finishing(device.tensor(found_inf), device, steps)
        skipped = optimizer.grad_scale is not None and bool(found_inf)
        if not skipped:
            for work, scalars in steps:
                work.bucket.finish(work, scalars)
        return norm, skipped

    def works(self) -> list[Work]:
        assert self.turn is not None, "begin comes before a step"
        return self.turn.works
