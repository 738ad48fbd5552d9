"""The errors rmcore raises: one small hierarchy, each message saying which argument, what came, what was expected.

Every class derives from :class:`RmcoreError` and, where Python has a fitting builtin, from that too, so that
``except ValueError`` keeps working for callers who do not know this library.
"""

from __future__ import annotations

from typing import Literal, NoReturn

__all__ = [
    "BackendError",
    "CheckpointError",
    "DataError",
    "FactorizationError",
    "InputError",
    "JudgeError",
    "MissingPackageError",
    "NonFiniteError",
    "RankError",
    "RmcoreError",
    "reject",
]


class RmcoreError(Exception):
    """Base class of every error this library raises on purpose."""


class InputError(RmcoreError, ValueError):
    """An argument has the wrong shape, dtype, device, nesting or value."""


class NonFiniteError(InputError):
    """A tensor holds NaN or Inf. ``rows`` names the offending rows (all of them, in order)."""

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class DataError(InputError):
    """A line of a data file cannot be used. ``line`` is its 1-based number, ``source`` the file's name.

    Where there are no lines (an array, a table), ``unit`` is ``row`` and ``line`` counts these.
    """

    def __init__(self, message: str, *, source: str = "", line: int = 0, unit: Literal["line", "row"] = "line") -> None:
        name = source or "<input>"
        where = "" if not line else f"{name}:{line}: " if unit == "line" else f"{name}, row {line}: "
        super().__init__(f"{where}{message}")
        self.source = source
        self.line = line


class CheckpointError(RmcoreError, ValueError):
    """A saved head or model is truncated, foreign, of another format version, or does not fit together."""


class FactorizationError(RmcoreError, ArithmeticError):
    """The posterior precision is not positive definite in the arithmetic at hand. ``condition`` is an estimate."""

    def __init__(self, message: str, condition: float = float("nan")) -> None:
        super().__init__(message)
        self.condition = condition


class BackendError(RmcoreError, RuntimeError):
    """A backend asked for by name cannot run these arguments on this machine. The message says why."""


class RankError(RmcoreError, RuntimeError):
    """Another process of a distributed job died or failed, so this one stopped too. ``ranks`` says which."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class MissingPackageError(RmcoreError, ImportError):
    """A package of one of rmcore's extras is not installed; the message names the extra."""


class JudgeError(RmcoreError, RuntimeError):
    """A judge is misconfigured. (A judge that *fails on a pair* never raises: it returns a verdict with a reason.)"""


def reject(argument: str, got: object, expected: str, remedy: str = "") -> NoReturn:
    """Raise :class:`InputError` in the library's one form: argument, got, expected, remedy."""
    raise InputError(f"{argument}: got {got}, expected {expected}" + (f". {remedy}" if remedy else ""))
