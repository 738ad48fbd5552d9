"""The errors that rmcore raises, by their public name."""

from __future__ import annotations

from rmcore._base.errors import (
    BackendError,
    CheckpointError,
    DataError,
    FactorizationError,
    InputError,
    JudgeError,
    MissingPackageError,
    NonFiniteError,
    RankError,
    RmcoreError,
)

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
]
