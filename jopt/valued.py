"""Transformations as values: equal if made of the same arguments, hashable, to be pickled, of one readable line."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

T = TypeVar("T")


class Valued(optax.GradientTransformationExtraArgs):
    """A transformation that is a value: another made of the same arguments is equal, and steps the same.

    It can be hashed (static arguments of jit), pickled and copied, and as a pytree it has no leaves, as in a field of
    an equinox module. Of arrays among the arguments the elements count; of functions and tracers, which one it is.
    """

    _arguments: tuple[Any, ...]  # of __new__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def __reduce__(self) -> Any:
        return type(self), self._arguments

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @functools.cached_property
    def _token(self) -> Any:
        return value(self._arguments)

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._token == other._token)  # type: ignore[attr-defined]

    def __ne__(self, other: object) -> bool:  # a tuple's own is in the way
        return not self == other

    def __hash__(self) -> int:
        return hash(self._token)

    def __repr__(self) -> str:
        return call(type(self).__name__, self._arguments)


class _Itself:
    """Equal to the same object alone."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


def by_value(cls: type[T]) -> type[T]:
    """A decorator for frozen dataclasses (`eq=False`) that are values as transformations are."""

    def fields(self: Any) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    methods = {
        "__eq__": lambda self, other: self is other or (type(self) is type(other) and value(self) == value(other)),
        "__hash__": lambda self: hash(value(self)),
        "__repr__": lambda self: call(cls.__name__, (), fields(self)),
        "__copy__": lambda self: self,
        "__deepcopy__": lambda self, memo: self,
    }
    for name, method in methods.items():
        setattr(cls, name, method)
    return jax.tree_util.register_static(cls)


def value(x: Any) -> Hashable:
    """Something hashable that is equal for equal arguments: arrays by what is in them, tracers by being the same."""
    if isinstance(x, Tracer):
        return _Itself(x)
    if isinstance(x, Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return "key", str(jax.random.key_impl(x)), value(jax.random.key_data(x))
    if isinstance(x, Array | np.ndarray):
        return "array", str(x.dtype), x.shape, np.asarray(x).tobytes()
    if isinstance(x, Mapping):
        return "mapping", tuple((value(k), value(v)) for k, v in x.items())
    if type(x) in (tuple, list):
        return type(x), tuple(map(value, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type) and not callable(x):
        return type(x), tuple(value(getattr(x, field.name)) for field in dataclasses.fields(x))
    try:
        hash(x)
    except TypeError:
        return _Itself(x)
    return type(x), x


def call(name: str, arguments: Sequence[Any], named: Mapping[str, Any] | None = None) -> str:
    """One line that shows a call."""
    texts = [_shown(x) for x in arguments] + [f"{k}={_shown(v)}" for k, v in (named or {}).items()]
    return f"{name}({', '.join(texts)})"


def _shown(x: Any) -> str:
    if isinstance(x, Tracer):
        return f"<traced {x.dtype}>"
    if isinstance(x, Array) and not x.ndim and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return repr(x.item())
    if isinstance(x, Array | np.ndarray):
        return f"<{x.dtype} {list(x.shape)}>"
    if isinstance(x, re.Pattern):
        return repr(x.pattern)
    if isinstance(x, np.dtype):
        return str(x)
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{_shown(k)}: {_shown(v)}" for k, v in x.items()) + "}"
    if type(x) is tuple:
        return "(" + ", ".join(map(_shown, x)) + ("," if len(x) == 1 else "") + ")"
    if isinstance(x, Callable) and hasattr(x, "__name__"):
        return x.__name__
    return " ".join(repr(x).split())
