"""The one shape of an alarm about a judge: logged as a warning that says what to do next, and given to a callback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["Alarm", "AlarmCallback", "sound_alarm"]


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something about a judge that a person should look at.

    Attributes:
        name: which alarm: ``canary`` or ``disagreement``.
        message: what was seen, in figures, and what to do next. It never holds text of a prompt, response or judge.
        details: the figures, JSON values.
    """

    name: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)


AlarmCallback: TypeAlias = Callable[[Alarm], object]
"""Called with each alarm, on the thread that judged. What it returns is ignored; what it raises is logged."""


def sound_alarm(alarm: Alarm, callback: AlarmCallback | None, logger: logging.Logger) -> None:
    """Log ``alarm`` as a warning, then call ``callback``. Raises nothing: an alarm must not cost the batch."""
    logger.warning("%s alarm: %s", alarm.name, alarm.message)
    if callback is None:
        return
    try:
        callback(alarm)
    except Exception:
        logger.exception("the callback of the %s alarm raised", alarm.name)
