"""The reference: examples and equations of docstrings in blocks of their own, signatures as Python has them.

Griffe reads the source. The options that `@optimizer` adds to each function, and what a class of `interop.optim` takes
from torch's, are known to Python alone.
"""

import importlib
import inspect
import re
import typing

import griffe
import torch

PLACES = ("jopt", "jopt.schedules", "interop", "interop.optim", "interop.amp")


def _public() -> dict[str, typing.Any]:
    """Public functions and classes by the path at which Griffe finds their source."""
    objects = [getattr(module, name) for module in map(importlib.import_module, PLACES) for name in module.__all__]
    return {f"{x.__module__}.{x.__qualname__}": x for x in objects if not inspect.ismodule(x)}


def in_blocks(docstring: str) -> str:
    """Fences around examples, and around paragraphs with equations, whose lines Markdown would run together."""
    paragraphs = re.split(r"\n\n+", docstring)
    for i, paragraph in enumerate(paragraphs):
        if paragraph.startswith(">>>"):
            paragraphs[i] = f"```pycon\n{paragraph}\n```"
        elif i and "<- " in paragraph and not re.match(r"[A-Z]\w+:\n|\s", paragraph):
            paragraphs[i] = f"``` {{.text .equation}}\n{paragraph}\n```"
    return "\n\n".join(paragraphs)


class Readable(griffe.Extension):
    """What mkdocstrings shows of jopt and interop."""

    def __init__(self) -> None:
        self.public = _public()

    def on_package(self, *, pkg: griffe.Module, **kwargs: typing.Any) -> None:
        self._improve(pkg)
        # jopt.explain and jopt.optimizers.adam are modules and functions, of which Griffe takes the modules.
        prefix = f"{pkg.path}."
        found = {
            x.__name__: pkg[path.removeprefix(prefix)]
            for path, x in self.public.items()
            if path.startswith(prefix) and x.__name__ in pkg.members
        }
        for name, target in found.items():
            pkg.set_member(name, griffe.Alias(name, target, parent=pkg))

    def _improve(self, obj: griffe.Object) -> None:
        if obj.docstring:
            obj.docstring.value = in_blocks(obj.docstring.value)
        for member in list(obj.members.values()):
            if isinstance(member, griffe.Object):
                self._improve(member)
        if (public := self.public.get(obj.path)) is None:
            return
        if isinstance(obj, griffe.Function):
            obj.parameters = _parameters(public, obj.parameters)
        elif isinstance(public, type) and issubclass(public, torch.optim.Optimizer):
            parameters = _parameters(public, griffe.Parameters())
            obj.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _parameters(public: typing.Any, written: griffe.Parameters) -> griffe.Parameters:
    """The signature that Python has, with annotations as they are written where they are."""
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
        inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
        inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
        inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
        inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
    }
    known = {p.name: p for p in written}
    return griffe.Parameters(*(known.get(p.name) or _parameter(p, kinds[p.kind]) for p in _signature(public)))


def _signature(public: typing.Any) -> list[inspect.Parameter]:
    return list(inspect.signature(public).parameters.values())


def _parameter(p: inspect.Parameter, kind: griffe.ParameterKind) -> griffe.Parameter:
    annotation = None
    if p.annotation is not p.empty:
        annotation = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
        annotation = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", annotation)  # Iterable, not collections.abc.Iterable
    default = None if p.default is p.empty else repr(p.default)
    return griffe.Parameter(p.name, annotation=annotation, kind=kind, default=default)
