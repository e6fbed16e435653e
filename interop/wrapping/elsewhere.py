"""A closure of torch's as a function of JAX arrays, for transformations that evaluate the loss themselves."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor


class Elsewhere:
    """The closure's loss and gradients at other parameters than those of the model, from inside a compiled step."""

    def __init__(self, closure: Any, params: dict[str, Tensor]):
        self.closure = closure
        self.params = params
        self.before: dict[str, Tensor] = {}
        self.error: BaseException | None = None

    def __call__(self, arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        try:
            if not self.before:
                self.before = {name: p.detach().clone() for name, p in self.params.items()}
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(_from_bytes(arrays[name], p))
            with torch.enable_grad():
                loss = self.closure()
            grads = {
                name: _to_bytes(torch.zeros_like(p) if p.grad is None else p.grad, arrays[name])
                for name, p in self.params.items()
            }
            return np.asarray(number_of(loss), default_float()), grads
        except BaseException as error:
            self.error = error
            raise

    def restore(self) -> None:
        with torch.no_grad():
            for name, x in self.before.items():
                self.params[name].copy_(x)


def number_of(loss: Any) -> float:
    """What a closure returned, as a number."""
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _from_bytes(x: Any, like: Tensor) -> Tensor:
    """A NumPy array as a tensor, of the types too that torch does not take from NumPy."""
    flat = np.array(x).reshape(-1)
    return torch.from_numpy(flat.view(np.uint8)).view(like.dtype).view(like.shape) if flat.size else like


def _to_bytes(x: Tensor, like: Any) -> np.ndarray:
    flat = x.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return flat.view(torch.uint8).cpu().numpy().view(np.dtype(like.dtype)).reshape(x.shape).copy()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def value_of(evaluate: Any, params: Any) -> jax.Array:
    """The closure's loss at `params`, with the closure's gradient."""
    return _value_forward(evaluate, params)[0]


def _value_forward(evaluate: Any, params: Any) -> Any:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return jax.pure_callback(evaluate, (jax.ShapeDtypeStruct((), default_float()), shapes), params)


def _value_backward(evaluate: Any, grads: Any, cotangent: Any) -> Any:
    # torch's gradient of a complex parameter is the conjugate of JAX's.
    return (jax.tree.map(lambda g: jnp.conj(g) * cotangent.astype(g.dtype), grads),)


value_of.defvjp(_value_forward, _value_backward)


def default_float() -> Any:
    return np.float64 if jax.config.read("jax_enable_x64") else np.float32
