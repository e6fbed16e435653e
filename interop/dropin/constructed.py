"""Optimizers that torch has not, as torch's optimizers: arguments and defaults of `jopt`'s function of their name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from interop.dropin.options import EXECUTION
from interop.dropin.step import CompiledStep

SHARED = ("state_dtype", "master_copy", "stochastic_rounding", "hyperparams_in_state")  # jopt's own options


class Constructed(CompiledStep, Optimizer):
    """A class with the arguments of a `jopt` function, in its order, and `params` before them.

    `foreach`, `fused`, `capturable` and `differentiable=False` are taken, as torch's classes take them, and mean
    nothing here. `max_norm` and `ema` are as in `CompiledStep`.

    Raises:
      ValueError: a number out of its range, as the authors' class says it.
    """

    function: ClassVar[Callable[..., Any]]
    fixed: ClassVar[dict[str, Any]] = {}  # what the class is for: in each of its groups, and no argument

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        left_out = {*SHARED, *cls.fixed}
        own = [x for x in inspect.signature(cls.function).parameters.values() if x.name not in left_out]
        keyword = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("max_norm", "ema")
        ]
        execution = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in EXECUTION]
        params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([params, *own, *execution, *keyword])

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                arguments = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}: {error}") from None
            arguments.apply_defaults()
            given = arguments.arguments
            params, around = given.pop("params"), {name: given.pop(name) for name in ("max_norm", "ema")}
            numbers = {name: x for name, x in given.items() if name not in EXECUTION}
            cls.function(**{name: x.item() if isinstance(x, Tensor) else x for name, x in numbers.items()})  # checks
            super(cls, self).__init__(params, given | cls.fixed, **around)  # type: ignore[reportCallIssue]

        init.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()]
        )
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = init  # type: ignore[method-assign]

    @classmethod
    def known_options(cls) -> frozenset[str]:
        return super().known_options() | cls.fixed.keys()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check_fixed([param_group], len(self.param_groups))
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check_fixed(state_dict["param_groups"])
        super().load_state_dict(state_dict)

    def _check_fixed(self, groups: Iterable[Mapping[str, Any]], first: int = 0) -> None:
        for i, group in enumerate(groups, first):
            for name, value in self.fixed.items():
                if group.get(name, value) != value:
                    raise ValueError(
                        f"param_groups[{i}][{name!r}]: expected {value!r} for {type(self).__name__}, found "
                        f"{group[name]!r}; take the class that is for it"
                    )
