"""State that survives a restart: plain JSON, written whole or not at all, checked field by field when it is read."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmcore._base.errors import CheckpointError

__all__ = ["StateReader", "read_state", "write_state"]

_SPECIAL = {"inf": math.inf, "-inf": -math.inf}  # JSON has no infinities


class StateReader:
    """Reads a state's fields one by one; a missing or impossible one raises CheckpointError with its path.

    Args:
        state: the mapping, which may be anything: it came from a file.
        where: what to call it in messages, such as ``router.budgets[0]``.
        fields: the fields it must have, no more and no fewer.
    """

    def __init__(self, state: object, where: str, fields: tuple[str, ...]) -> None:
        self.where = where
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{where}: got {type(state).__name__}, expected an object")
        if set(state) != set(fields):
            missing, unknown = sorted(set(fields) - set(state)), sorted(map(str, set(state) - set(fields)))
            raise CheckpointError(f"{where}: fields missing {missing}, fields unknown {unknown}")
        self._state = state

    def fail(self, name: str, expected: str) -> None:
        """Raise for a field."""
        raise CheckpointError(f"{self.where}.{name}: got {str(self._state[name])[:80]!r}, expected {expected}")

    def raw(self, name: str) -> Any:
        """The field as it is, for a reader of its own."""
        return self._state[name]

    def exactly(self, name: str, value: object) -> None:
        """The field must have this value."""
        if type(self._state[name]) is not type(value) or self._state[name] != value:
            self.fail(name, f"{value!r}, as this object was made with")

    def integer(self, name: str, low: int = 0) -> int:
        """An integer, ``low`` or more."""
        value = self._state[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            self.fail(name, f"an integer, {low} or more")
        return int(value)

    def number(self, name: str, low: float = -math.inf) -> float:
        """A finite number, ``low`` or more."""
        value = self._state[name]
        if not _is_number(value) or not math.isfinite(value) or value < low:
            self.fail(name, f"a finite number, {low} or more")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number, an infinity as :func:`plain` writes it, or nothing."""
        value = self._state[name]
        if value is None:
            return None
        if isinstance(value, str) and value in _SPECIAL:
            return _SPECIAL[value]
        return self.number(name)

    def numbers(self, name: str, low: float = -math.inf, *, infinite: bool = False) -> list[float]:
        """A list of numbers."""
        values = self._state[name]
        if isinstance(values, list) and infinite:
            values = [_SPECIAL.get(v, v) if isinstance(v, str) else v for v in values]
        if not isinstance(values, list) or not all(_is_number(v) and not math.isnan(v) and v >= low for v in values):
            self.fail(name, f"a list of numbers, {low} or more")
        if not infinite and not all(map(math.isfinite, values)):
            self.fail(name, "a list of finite numbers")
        return [float(v) for v in values]

    def integers(self, name: str, low: int = 0) -> list[int]:
        """A list of integers."""
        values = self._state[name]
        if not isinstance(values, list) or not all(type(v) is int and v >= low for v in values):
            self.fail(name, f"a list of integers, {low} or more")
        return list(values)

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        if not isinstance(self._state[name], list):
            self.fail(name, "a list")
        return list(self._state[name])


def plain(value: float | None) -> float | str | None:
    """A number that may be infinite, as JSON."""
    return value if value is None or math.isfinite(value) else "inf" if value > 0 else "-inf"


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` as JSON: a reader sees the old file or the new one, also after a power cut."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with work.open("w", encoding="utf-8") as file:
            json.dump(state, file, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_state(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`write_state` wrote. Raises CheckpointError if the file is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
