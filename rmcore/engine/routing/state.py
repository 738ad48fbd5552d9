"""State that survives a restart: JSON, written whole or not at all; :mod:`rmcore.engine.routing.schema` checks it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rmcore._base.errors import CheckpointError
from rmcore._base.files import write_atomic
from rmcore._base.json_members import unique_members
from rmcore.engine.routing.routers import Router

__all__ = ["StatefulRouter", "generator_of", "keep_spent", "plain", "read_state", "write_state"]


@runtime_checkable
class StatefulRouter(Router, Protocol):
    """A router whose next choice depends on what it chose before, or whose budget is part spent."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, JSON values."""
        ...

    def load_state_dict(self, state: object) -> None:
        """Continue from a state; raise CheckpointError where it does not fit, and change nothing then."""
        ...


def plain(value: float | None) -> float | str | None:
    """A number that may be infinite, as JSON."""
    return value if value is None or math.isfinite(value) else "inf" if value > 0 else "-inf"


def generator_of(state: Any, where: str) -> np.random.Generator:
    """The numpy generator that a state of a PCG64 describes; raises CheckpointError, naming ``where``."""
    bits = np.random.PCG64()
    try:
        bits.state = state
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{where}: not the state of a PCG64 generator ({error})") from error
    return np.random.Generator(bits)


def keep_spent(state: Any, later: Any) -> Any:
    """A router's state whose budgets per run have spent what a later state of the same run says, if that is more.

    For a run that goes back to an earlier state: what was bought in between is paid. Anything that is no state of a
    router with the same budgets is left to whoever loads it.
    """
    earlier, since = (one.get("budgets") if isinstance(one, Mapping) else None for one in (state, later))
    if not isinstance(earlier, list) or not isinstance(since, list) or len(earlier) != len(since):
        return state
    return {**state, "budgets": [_spent(one, other) for one, other in zip(earlier, since, strict=True)]}


def _spent(budget: Any, later: Any) -> Any:
    kinds = [(b.get("unit"), b.get("per")) if isinstance(b, Mapping) else None for b in (budget, later)]
    if kinds[0] != kinds[1] or kinds[0] is None or kinds[0][1] != "run":
        return budget
    names = [name for name in ("spent", "total") if all(isinstance(b.get(name), int) for b in (budget, later))]
    return {**budget, **{name: max(budget[name], later[name]) for name in names}}


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` as JSON: a reader sees the old file or the new one, also after a power cut."""
    write_atomic(path, json.dumps(state, allow_nan=False) + "\n")


def read_state(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`write_state` wrote. Raises CheckpointError if the file is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_members)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
