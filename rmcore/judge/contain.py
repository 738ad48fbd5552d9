"""Calling a judge that may be anybody's code: its answers are checked, its errors contained, its connections closed."""

from __future__ import annotations

import asyncio
import logging
import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rmcore._base.errors import JudgeError
from rmcore.judge.base import Judge, JudgeUsage, Pair, Verdict

__all__ = ["checked_verdicts", "close_judge", "contained_verdicts", "log_contained"]

_logger = logging.getLogger(__name__)


async def checked_verdicts(judge: Judge, pairs: Sequence[Pair], *, name: str = "judge") -> list[Verdict]:
    """:func:`contained_verdicts`, with the error logged: one line and a traceback, under ``name``."""
    verdicts, error = await contained_verdicts(judge, pairs)
    if error is not None:
        log_contained(error, name, len(verdicts))
    return verdicts


async def contained_verdicts(judge: Judge, pairs: Sequence[Pair]) -> tuple[list[Verdict], BaseException | None]:
    """``judge.judge(pairs)`` as exactly one sound verdict a pair, whatever the judge does; only cancellation gets out.

    A judge that raises gives every pair of the call ``raised_<error>``; one that returns no sequence of ``len(pairs)``
    answers gives them ``wrong_number_of_verdicts``; an answer that is no :class:`Verdict` becomes ``not_a_verdict``;
    a preference that is no number in [-1, 1] becomes ``preference_<what it was>``. Without pairs there is no call.

    A ``CancelledError`` is let through only where *this* task was cancelled. One that the judge raises by itself (it
    waited for something that somebody else cancelled) is an error of the judge like any other.

    Returns:
        The verdicts, and the error that cost all of them, if one did. Nothing is logged.
    """
    pairs = list(pairs)
    if not pairs:
        return [], None
    try:
        answers: list[object] = list(await judge.judge(pairs))
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return [Verdict.none("raised_CancelledError")] * len(pairs), error
    except Exception as error:
        return [Verdict.none(f"raised_{type(error).__name__}")] * len(pairs), error
    if len(answers) != len(pairs):
        mistake = JudgeError(f"{len(answers)} results for {len(pairs)} pairs; none is used")
        return [Verdict.none("wrong_number_of_verdicts")] * len(pairs), mistake
    return [_checked(answer) for answer in answers], None


def log_contained(error: BaseException, name: str, pairs: int) -> None:
    """The line about an error that cost the verdicts of a whole call."""
    _logger.error("%s failed with %s; %d pairs get no verdict", name, type(error).__name__, pairs, exc_info=error)


async def close_judge(judge: Judge) -> None:
    """``await judge.aclose()`` if it has one. An error there is logged, not raised: the verdicts are already out."""
    close = getattr(judge, "aclose", None)
    if close is None:
        return
    try:
        await close()
    except Exception:
        _logger.warning("closing %s failed", type(judge).__name__, exc_info=True)


def _checked(answer: object) -> Verdict:
    """An answer as a verdict whose preference is a number in [-1, 1], or none with the reason."""
    if not isinstance(answer, Verdict):
        return Verdict.none("not_a_verdict")
    try:
        preference: Any = answer.preference
        usage: object = answer.usage
        reason = str(answer.reason)
        if preference is not None and not (isinstance(preference, numbers.Real) and -1 <= float(preference) <= 1):
            preference, reason = None, f"preference_{str(preference)[:40]}"
        return replace(
            answer,
            preference=None if preference is None else float(preference),
            reason=reason or ("unknown" if preference is None else ""),
            flipped=bool(answer.flipped),
            critique=str(answer.critique),
            usage=usage if isinstance(usage, JudgeUsage) else JudgeUsage(),
            judge=str(answer.judge),
        )
    except Exception:  # a field whose own __str__ or __bool__ raises
        return Verdict.none("not_a_verdict")
