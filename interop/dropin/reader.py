"""Reading a step's gradients, and whether all is as the last step left it.

A step checks its parameters, gradients and state once. After that a `Reader` compares what those checks depend on, and
hands out the gradients if nothing changed. `PythonReader` is always there; `native.NativeReader` asks in C++.
"""

from __future__ import annotations

import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interop.dropin import dtensor
from interop.dropin.groups import are_same, parameter_name, parameters
from interop.dropin.leaf import Leaf, is_lazy
from interop.memory import Staging, check
from interop.memory.tensors import address, in_type_of

if TYPE_CHECKING:
    from interop.dropin.bucket import Work


class Gradients(ABC):
    """One step's gradients. It is kept until the step is over, for programs read them."""

    def __init__(self) -> None:
        self._big: dict[int, list[Any]] = {}  # by bucket
        self._lie: dict[Staging, Work] = {}  # by staging: whose gradients lie in it

    def arrays(self, work: Work) -> list[Any]:
        """A bucket's gradients as its programs take them; the small leaves' are gathered, if they are not yet."""
        bucket, arrays = work.bucket, []
        if bucket.big:
            if bucket.index not in self._big:
                self._big[bucket.index] = [
                    bucket.missing[: leaf.size] if grad is None else grad
                    for leaf, grad in zip(bucket.big, self.of_big(work), strict=True)
                ]
            arrays += self._big[bucket.index]
        if bucket.small:
            if self._lie.get(bucket.staging) is not work:
                self.gather(work)
                self._lie[bucket.staging] = work
            arrays.append(bucket.gathered)
        return arrays

    @abstractmethod
    def of_big(self, work: Work) -> list[Any]:
        """Those of its big leaves, flat; None for a leaf without."""

    def tensors(self, work: Work) -> list[Tensor | None]:
        """Those of its leaves as torch has them."""
        raise NotImplementedError

    @abstractmethod
    def gather(self, work: Work) -> None:
        """Copy those of its small leaves to `work.small_views`."""


class Reader(ABC):
    """Knows what a step's checks depended on when it was made."""

    @abstractmethod
    def read(self, optimizer: Any) -> Gradients | None:
        """The gradients, if all that is as it was; else None.

        Compared are: which parameters, in which groups; whether each gradient is there, its class, type and layout; of
        each stepped parameter the address, type, shape and strides, and whether it is a conjugate or negative view;
        which objects the state holds, under which keys; the address of each stepped state tensor.
        """


class PythonReader(Reader):
    def __init__(self, optimizer: Any, leaves: Sequence[Leaf], views: Sequence[Tensor], works: Sequence[Work]):
        self._params = parameters(optimizer)
        self._stepped = [leaf.param for leaf in leaves]
        self._may_be_lazy = [leaf.param for leaf in leaves if leaf.dtype.is_complex or leaf.lazy]
        self._views = views
        grads = list(map(_grad_of, self._params))
        self._looks = self._look(grads)
        self._are_dense = all(g is None or _is_dense(g) for g in grads)
        self._objects, self._lengths = objects(optimizer)

    def read(self, optimizer: Any) -> Gradients | None:
        found, lengths = objects(optimizer)
        if lengths != self._lengths or not are_same(found, self._objects):
            return None
        grads = list(map(_grad_of, self._params))
        return ListedGradients(grads, self._are_dense) if self._looks == self._look(grads) else None

    def _look(self, grads: list[Any]) -> Any:
        present = [g for g in grads if g is not None]
        return (
            list(map(type, grads)),
            list(map(_dtype_of, present)),
            list(map(_layout_of, present)),
            list(map(Tensor.is_contiguous, present)),
            list(map(Tensor.is_neg, present)),
            list(map(address, self._stepped)),
            list(map(_dtype_of, self._stepped)),
            list(map(_shape_of, self._stepped)),
            list(map(Tensor.stride, self._stepped)),
            list(map(is_lazy, self._may_be_lazy)),
            list(map(address, self._views)),
        )


class ListedGradients(Gradients):
    """Gradients as a list, in the order of their parameters."""

    def __init__(self, grads: Sequence[Any], are_dense: bool = False):
        super().__init__()
        self._grads, self._are_dense = grads, are_dense
        self._dense: list[Tensor] = []  # copies that were made to be read

    def of_big(self, work: Work) -> list[Any]:
        grads = [None if i is None else self._grads[i] for i in work.places]
        if not self._are_dense:
            grads = [None if x is None else _dense(x) for x in grads]
            self._dense += [x for x in grads if x is not None]
        return work.bucket.device.elements(grads, work.bucket.dtype)

    def tensors(self, work: Work) -> list[Tensor | None]:
        return [None if i is None else self._grads[i] for i in work.leaf_places]

    def gather(self, work: Work) -> None:
        if work.small_views:
            torch._foreach_copy_(work.small_views, list(map(self._grads.__getitem__, work.small_places)))  # type: ignore[attr-defined]


def checked(optimizer: Any) -> dict[Tensor, Tensor]:
    """The gradients that there are, as plain dense tensors of their parameters' types; of a DTensor the local one."""
    grads = {}
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if dtensor.placement(p) is not None or dtensor.placement(grad) is not None:
                if (error := dtensor.error(p, grad)) is not None:
                    raise TypeError(f"{parameter_name(optimizer, index, p)}: {error}")
                grad = dtensor.local(grad)
            if type(grad) is not Tensor or grad.layout is not torch.strided or grad.dtype is not p.dtype:
                if grad.layout is not torch.strided and type(grad) is Tensor:
                    if (error := optimizer.sparse_error(group)) is not None:
                        raise RuntimeError(error)
                    grad = grad.to_dense()
                name = f"the gradient of {parameter_name(optimizer, index, p)}"
                check(name, grad)
                grad = in_type_of(name, grad, p.dtype)
            grads[p] = grad
    return grads


def objects(optimizer: Any) -> tuple[list[Any], list[int]]:
    """What is compared by identity: parameters, group by group, and all that the state holds; and how many each has."""
    params = [group["params"] for group in optimizer.param_groups]
    states: Any = optimizer.state.values()
    flat = itertools.chain.from_iterable
    try:
        values = [*flat(map(dict.values, states))]
    except TypeError:  # what its user puts beside the parameters' states may be anything
        states = [x if isinstance(x, dict) else {None: x} for x in states]
        values = [*flat(map(dict.values, states))]
    return [*flat(params), *optimizer.state, *flat(states), *values], [*map(len, params), *map(len, states)]


_grad_of, _dtype_of, _layout_of, _shape_of = map(operator.attrgetter, ("grad", "dtype", "layout", "shape"))


def _is_dense(grad: Tensor) -> bool:
    """Whether its elements are its memory, as `_dense` makes it."""
    return grad.is_contiguous() and not grad.is_complex() and not grad.is_neg()


def _dense(grad: Tensor) -> Tensor:
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    return grad.resolve_neg().contiguous()
