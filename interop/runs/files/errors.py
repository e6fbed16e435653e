"""The one exception of checkpoint files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any


class CheckpointError(ValueError):
    """A file or a run that does not hold what was expected: names the file, the key, the expected and the remedy.

    Attributes:
      mapping: where names did not match, a proposed `{name in the file: name in the model}`; else empty.
    """

    def __init__(self, message: str, *, mapping: dict[str, str] | None = None):
        super().__init__(message)
        self.mapping = mapping or {}


@contextlib.contextmanager
def reading(path: Any, what: str) -> Iterator[None]:
    """Turns whatever a reader makes of a damaged file into a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}", mapping=error.mapping) from error
    except (FileNotFoundError, PermissionError) as error:
        raise CheckpointError(f"{path}: {error.filename or what}: {error.strerror}") from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers, unpicklers and Rust's panics raise anything at damaged bytes
        lines = str(error).strip().splitlines()
        text = f": {lines[0]:.300}" if lines else ""
        raise CheckpointError(
            f"{os.fspath(path)}: {what} is damaged or not of this format ({type(error).__name__}{text})"
        ) from error
