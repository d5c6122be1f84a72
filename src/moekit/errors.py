"""Every error moekit raises on purpose.

    MoekitError
    ├── ConfigError (ValueError)        a setting is wrong; the message names the field
    │   └── UnknownNameError            a name that no registry knows; the message lists the choices
    ├── FileError (OSError)             a file or folder is missing, or cannot be written
    │   ├── FormatError                 the file lies about itself: truncated, wrong shape, missing tensor
    │   └── UnsafeFileError             a pickle, or a path that leaves its folder
    ├── DataError (ValueError)          the corpus has nothing to learn from
    ├── ContextLengthError (ValueError) more tokens than the model's context holds
    ├── BudgetError (MemoryError)       the memory that was allowed is too little; the message has the least that works
    ├── DivergenceError (ArithmeticError) training produced nan or infinity; the message names the step and a remedy
    ├── BackendError (RuntimeError)     a forced kernel backend is missing or does not have the op
    ├── UnsupportedError                a thing moekit does not do; the message says what does
    └── MissingExtraError (ImportError) an optional dependency is absent; the message is the pip command

The command line prints the message alone and exits with code 2; with `--debug` the traceback follows.
"""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = [
    "BackendError",
    "BudgetError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "DivergenceError",
    "FileError",
    "FormatError",
    "MissingExtraError",
    "MoekitError",
    "UnknownNameError",
    "UnsafeFileError",
    "UnsupportedError",
    "shown",
]


class MoekitError(Exception):
    """Root of the tree: catch this to catch everything moekit raises on purpose."""


class ConfigError(MoekitError, ValueError):
    """A setting is out of range, of the wrong kind, or unknown."""


class UnknownNameError(ConfigError):
    """A name is not in its registry."""


class FileError(MoekitError, OSError):
    """A file or folder is missing, unreadable, or could not be written."""


class FormatError(FileError):
    """A file's content contradicts itself or the model: truncated, wrong shape, tensor missing."""


class UnsafeFileError(FileError):
    """A file that moekit refuses to open: a pickle, or a path that leaves its folder."""


class DataError(MoekitError, ValueError):
    """The corpus is empty or holds nothing that can be trained on."""


class ContextLengthError(MoekitError, ValueError):
    """A prompt or a row of tokens is longer than the model's context."""


class BudgetError(MoekitError, MemoryError):
    """A model, or a conversation, needs more memory than it was allowed."""


class DivergenceError(MoekitError, ArithmeticError):
    """A loss or a gradient became nan or infinite."""


class BackendError(MoekitError, RuntimeError):
    """A kernel backend that was asked for is missing or lacks the op."""


class UnsupportedError(MoekitError):
    """A combination that moekit does not do, said before any work starts."""


class MissingExtraError(MoekitError, ImportError):
    """An optional dependency is not installed.

    >>> print(MissingExtraError("tensorboard", extra="train"))
    tensorboard is not installed: pip install 'moekit[train]'
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'moekit[{extra}]'")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160


def shown(value: Any) -> str:
    """What a file says, for a message: its `repr`, cut to the length of a line.

    >>> shown("model.norm.weight"), len(shown("x" * 1_000_000)), shown(list(range(1000)))
    ("'model.norm.weight'", 160, '[0, 1, 2, 3, 4, 5, ...]')
    """
    return _SHORT.repr(value)
