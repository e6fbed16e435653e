"""Values across the border: tensors, trees of them, and modules, in torch's layout or in flax's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor, nn

from interop.memory import values

Layout = Literal["torch", "flax"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class JaxLeaf(NamedTuple):
    """A tensor's name in JAX, and its axes there in terms of torch's (None: the same)."""

    name: str
    axes: tuple[int, ...] | None = None

    def to_jax(self, x: Tensor) -> Tensor:
        """A view with JAX's axes, of a parameter or a state of its shape."""
        return x if self.axes is None else x.permute(self.axes)

    def to_torch(self, x: Tensor) -> Tensor:
        """A view with torch's axes."""
        return x if self.axes is None else x.permute(*(self.axes.index(i) for i in range(len(self.axes))))

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape in JAX of a tensor that has this shape in torch."""
        return tuple(self.to_jax(x).shape)


def leaves(model: nn.Module, layout: Layout) -> tuple[dict[str, JaxLeaf], dict[str, JaxLeaf]]:
    """What torch's names of the parameters and of the buffers become.

    "flax": the weight of a Linear is a `kernel` (in, out), of a convolution a `kernel` (spatial..., in, out), of a
    transposed one (spatial..., out, in), as `flax.linen.ConvTranspose(transpose_kernel=True)` wants it; the weight of
    a norm is its `scale`, its statistics are `mean` and `var`; the weight of an Embedding is its `embedding`. All
    other tensors keep name and axes.

    Raises:
      ValueError: another layout, or two tensors that would have one name.
    """
    if layout not in ("torch", "flax"):
        raise ValueError(f"layout: expected 'torch' or 'flax', found {layout!r}")
    modules = dict(model.named_modules())

    def leaf(name: str, x: Tensor) -> JaxLeaf:
        path, _, own = name.rpartition(".")
        if layout == "torch":
            return JaxLeaf(name)
        new, axes = _flax(modules[path], own, x.dim())
        return JaxLeaf(f"{path}.{new}" if path else new, axes)

    parameters = {name: leaf(name, x) for name, x in model.named_parameters()}
    buffers = {name: leaf(name, x) for name, x in model.named_buffers()}
    for found in (parameters, buffers):
        first: dict[str, str] = {}
        for name, new in found.items():
            if first.setdefault(new.name, name) != name:
                raise ValueError(f"layout: {first[new.name]!r} and {name!r} would both be {new.name!r} in flax's")
    return parameters, buffers


def _flax(module: nn.Module, name: str, ndim: int) -> tuple[str, tuple[int, ...] | None]:
    if name == "weight":
        if isinstance(module, nn.Linear):
            return "kernel", (1, 0)
        if isinstance(module, _CONVOLUTIONS):
            return "kernel", (*range(2, ndim), 1, 0)
        if isinstance(module, nn.Embedding):
            return "embedding", None
    if isinstance(module, _NORMS):
        return {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(name, name), None
    return name, None


def to_jax(x: Any, *, copy: bool | None = True, layout: Layout = "torch") -> Any:
    """torch tensors as JAX arrays: one tensor, or every tensor of a tree (dicts, lists, tuples, None); and modules.

    A module becomes `{"params": {name: array}, "buffers": {name: array}}`, by the names of `named_parameters` and
    `named_buffers`; a tied parameter is there once.

    >>> import torch, interop
    >>> interop.to_jax({"w": torch.tensor([1.0, 2.0])})["w"] * 2
    Array([2., 4.], dtype=float32)
    >>> module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    >>> arrays = interop.to_jax(module, layout="flax")
    >>> arrays["params"]["0.kernel"].shape, sorted(arrays["buffers"])
    ((3, 2), ['1.mean', '1.num_batches_tracked', '1.var'])

    Args:
      x: a tensor, a module, or a tree of them. Gradients are not carried.
      copy: True, a snapshot. None, share memory where JAX can (aligned to 64 bytes, strided without gaps, a type
        that JAX does not narrow), else copy. False, share or raise ValueError. Memory on a GPU is not shared.
        Sharing has no guard: JAX reads the tensor after the call that uses it has returned, so do not write to,
        resize or free the tensor's storage before `jax.block_until_ready` of every result.
      layout: of modules: "flax" gives flax's names and axes (see `leaves`).

    Returns:
      Arrays of the tensors' types and shapes, on JAX's CPU device or the tensors' GPU. A module's 64-bit integers, such
        as a batch norm's count of batches, are int32 while `jax_enable_x64` is off.

    Raises:
      TypeError: a 64-bit type while `jax_enable_x64` is off (JAX would narrow it), a sparse or quantized tensor, a
        subclass such as DTensor, a device that JAX has not.
      ValueError: see copy and layout; a lazy module that has not run yet.
    """
    return values.to_jax(jax.tree.map(lambda m: _tensors(m, layout) if isinstance(m, nn.Module) else m, x), copy=copy)


def _tensors(model: nn.Module, layout: Layout) -> dict[str, dict[str, Tensor]]:
    for name, x in model.named_parameters():
        if torch.nn.parameter.is_lazy(x):
            raise ValueError(f"{name}: has no shape yet; run the module on a batch before moving it")
    parameters, buffers = leaves(model, layout)
    return {
        "params": {parameters[name].name: parameters[name].to_jax(x.detach()) for name, x in model.named_parameters()},
        "buffers": {buffers[name].name: _narrowed(x) for name, x in model.named_buffers()},
    }


def _narrowed(x: Tensor) -> Tensor:
    """int64 as int32 where JAX has no 64 bits and the values fit."""
    if x.dtype is not torch.int64 or jax.config.read("jax_enable_x64"):
        return x
    narrow = x.to(torch.int32)
    return narrow if torch.equal(narrow.to(torch.int64), x) else x


def to_torch(x: Any, *, copy: bool | None = True, into: nn.Module | None = None, layout: Layout = "torch") -> Any:
    """JAX arrays as torch tensors: one array, or every array of a tree; or written into a module.

    The tensors are on the CPU; on a GPU, if the array is on one that torch has too.

    >>> import jax.numpy as jnp, interop
    >>> interop.to_torch([jnp.arange(3.0)])
    [tensor([0., 1., 2.])]
    >>> module = torch.nn.Linear(2, 1)
    >>> arrays = interop.to_jax(module)
    >>> arrays["params"]["bias"] = jnp.full(1, 7.0)
    >>> interop.to_torch(arrays, into=module).bias
    Parameter containing:
    tensor([7.], requires_grad=True)

    Args:
      x: an array or a tree of them. One on another device, or sharded over several, is fetched. With `into`, what
        `to_jax` makes of a module; "buffers" may be left out, and stay.
      copy: True, a tensor of its own memory. None, share an array's memory where it is on the CPU, else copy. False,
        share or raise ValueError. Do not write to a tensor that shares: JAX takes its arrays to be constant. While
        it lives, donating the array copies.
      into: a module to write to, in place; it is returned.
      layout: that of `to_jax`.

    Raises:
      TypeError: not an array, or of a type that torch has not (a PRNG key, int4), or another than the module's.
      ValueError: missing or unknown names, other shapes; before anything is written.
    """
    if into is None:
        return values.to_torch(x, copy=copy)
    if not isinstance(x, Mapping) or not set(x) <= {"params", "buffers"} or "params" not in x:
        found = sorted(x) if isinstance(x, Mapping) else type(x).__name__
        raise ValueError(
            f"x: expected a dictionary of 'params' and 'buffers', as to_jax makes of a module, found {found}"
        )
    parameters, buffers = leaves(into, layout)
    new = check_arrays("x['params']", x["params"], {p: parameters[name] for name, p in into.named_parameters()})
    if "buffers" in x:
        new |= check_arrays("x['buffers']", x["buffers"], {b: buffers[name] for name, b in into.named_buffers()})
    with torch.no_grad():
        for tensor, value in new.items():
            tensor.copy_(value)
    return into


def check_arrays(name: str, arrays: Mapping[str, Any], expected: Mapping[Tensor, JaxLeaf]) -> dict[Tensor, Tensor]:
    """The arrays as tensors with torch's axes, by the tensor that each is for.

    Raises:
      TypeError, ValueError: missing or unknown names, other shapes or types.
    """
    names = {leaf.name for leaf in expected.values()}
    if set(arrays) != names:
        missing, extra = sorted(names - set(arrays)), sorted(set(arrays) - names)
        raise ValueError(f"{name}: expected the names of to_jax; missing {missing}, unknown {extra}")
    new = {}
    for tensor, leaf in expected.items():
        array, title = arrays[leaf.name], f"{name}[{leaf.name!r}]"
        if np.shape(array) != leaf.shape(tensor):
            raise ValueError(f"{title}: expected shape {leaf.shape(tensor)}, found {np.shape(array)}")
        value = values.array_to_torch(title, array, None)
        if value.dtype != tensor.dtype and (value.dtype, tensor.dtype) != (torch.int32, torch.int64):
            raise TypeError(f"{title}: expected {tensor.dtype}, found {value.dtype}")
        new[tensor] = leaf.to_torch(value)
    return new
