"""Reading a step's gradients in C++: `reader.cpp`, compiled where its user asks for it.

In Python a step looks at each parameter, its gradient and its state. A backward leaves the caches cold, and then that
is most of what a step costs beside its program. This reader compares the same in one call. If anything is not as before
it returns None, and Python looks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interop.dropin import reader
from interop.dropin.groups import parameters

if TYPE_CHECKING:
    from interop.dropin.bucket import Work
    from interop.dropin.leaf import Leaf

extension: Any = None  # the compiled module


def enable_native_reader() -> None:
    """Let the steps of `interop.optim` read their gradients in C++.

    Numbers and checks are the same. A step of many tensors starts sooner: by 0.5 to 1 ms with the 161 of a ResNet-50,
    by 2 ms with 1000 small ones (docs/performance.md). Call it before the optimizers' first step.

    The first time for a version of torch it compiles for 20 seconds, into torch's folder for extensions
    (`TORCH_EXTENSIONS_DIR`, or ~/.cache/torch_extensions); from then on it loads what is there.

    Raises:
      RuntimeError: it does not compile: there is no C++ compiler, or no Ninja. Steps work all the same, in Python.

    >>> import interop
    >>> interop.enable_native_reader()  # doctest: +SKIP
    """
    global extension
    if extension is not None:
        return
    source = Path(__file__).with_name("reader.cpp")
    # torch has one folder for all its versions, and compares dates: it would miss a newer source of an older date.
    version = re.sub(r"\W", "_", torch.__version__) + "_" + hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    try:
        from torch.utils.cpp_extension import load

        with _ninja_in_path():
            extension = load("jopt_reader_" + version, [str(source)], extra_cflags=["-O2"])
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            "enable_native_reader: expected a C++ compiler that torch takes (c++, or what CXX names) and Ninja "
            f"(pip install 'jopt[native]'); steps work without, in Python. Found: {error}"
        ) from error


def lacking() -> list[str]:
    """What compiling it needs and this machine has not."""
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    with _ninja_in_path():
        found = {f"a C++ compiler ({compiler})": shutil.which(compiler), "Ninja": cpp_extension.is_ninja_available()}
    return [name for name, there in found.items() if not there]


@contextlib.contextmanager
def _ninja_in_path() -> Iterator[None]:
    """torch looks for Ninja in PATH, which has pip's folder of programs only if the environment is activated."""
    path = os.environ.get("PATH")
    with contextlib.suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join([path or os.defpath, ninja.BIN_DIR])
    try:
        yield
    finally:
        if path is None:
            os.environ.pop("PATH", None)
        else:
            os.environ["PATH"] = path


class NativeReader(reader.Reader):
    """`reader.PythonReader` in C++. It serves fewer cases: gradients have to be contiguous, for one."""

    def __init__(self, optimizer: Any, leaves: Sequence[Leaf], views: Sequence[Tensor], works: Sequence[Work]):
        params, stepped = parameters(optimizer), {leaf.param for leaf in leaves}
        places = [(work.places, work.small_places, work.small_views) for work in works]
        (self._objects, self._lengths), self._views = reader.objects(optimizer), list(views)
        self._reader = extension.Reader(params, [p in stepped for p in params], self._views, places)

    def read(self, optimizer: Any) -> reader.Gradients | None:
        found = self._reader.read(optimizer.param_groups, optimizer.state, self._objects, self._lengths, self._views)
        return None if found is None else ReadGradients(found)


class ReadGradients(reader.Gradients):
    """Gradients as the extension found them."""

    def __init__(self, grads: Any):
        super().__init__()
        self._grads = grads

    def of_big(self, work: Work) -> list[Any]:
        bucket = work.bucket
        if bucket.device.uses_torch:
            grads = self._grads.tensors(bucket.index)
            return [x if x is None or not x.is_complex() else torch.view_as_real(x) for x in grads]
        addresses = self._grads.addresses(bucket.index)
        places = [
            None if address is None else (address, leaf.size)
            for leaf, address in zip(bucket.big, addresses, strict=True)
        ]
        return bucket.device.elements_at(places, bucket.dtype)

    def gather(self, work: Work) -> None:
        self._grads.gather(work.bucket.index)
