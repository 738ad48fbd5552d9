"""What a judge is: pairs in, one verdict a pair out, never an exception for a pair that failed.

The engine depends on this file alone; everything else in ``rmcore.judge`` is one way to fill the protocol in. A judge
may be anybody's code, so here too is how one is called: its answers checked, its errors isolated, its connections
closed.
"""

from __future__ import annotations

import asyncio
import logging
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from rmcore._base.errors import JudgeError
from rmcore._base.loop import cancelled_here
from rmcore._base.prompt import Prompt, Response

__all__ = [
    "RULE",
    "Judge",
    "JudgeUsage",
    "Outcome",
    "Pair",
    "Verdict",
    "buys_once",
    "checked_verdicts",
    "close_judge",
    "isolated_verdicts",
    "log_judge_error",
    "takes_principles",
]

_logger = logging.getLogger(__name__)

RULE = "rule"
"""``Verdict.judge`` of a verdict by rule, without a judge (:mod:`rmcore.judge.question.rules`)."""

Outcome: TypeAlias = Literal["win", "loss", "tie"]
"""``win``: the first response is better; ``loss``: the second is; ``tie``: the judge says neither is."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One question to a judge: which of two responses to ``prompt`` is better?

    Only ``prompt``, ``first``, ``second`` and ``principle`` reach the judge model. The rest is for whoever stands
    between:

    Attributes:
        principle: what this pair is to be judged by, instead of the judge's own; empty for that. Only judges that
            :func:`takes_principles` says so of read it.
        id: the caller's own name for the pair, empty if there is none.
        uncertainty: the head's u, if there is one: which tier of judges a pair is for.
        preference: the head's p̃ from the first response's side, in logits: what a verdict is compared with.
        deadline: ``time.monotonic()`` seconds after which a verdict is of no use to anybody. A judge does not start
            a call that would end later, and ends one that does; the pair then fails with ``deadline``.
    """

    prompt: Prompt
    first: Response
    second: Response
    id: str = ""
    uncertainty: float | None = None
    preference: float | None = None
    deadline: float | None = None
    principle: str = ""


@dataclass(frozen=True, slots=True)
class JudgeUsage:
    """What verdicts cost.

    Attributes:
        calls: questions put to an endpoint; one in one order is a call, whatever number of attempts it took.
        attempts: HTTP requests, so ``attempts - calls`` were retries.
        cache_hits: questions answered from a store or by an equal question in flight, without a call.
        prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens: as the endpoint reported them. Reasoning is
            part of completion, cached is part of prompt.
        seconds: wall time of all calls, added up (they overlap, so it is more than the time that passed).
        latencies_s: wall time of each call, waits and retries included.
        cost: in the currency of the caller's price table, of those calls that have a price.
        unpriced_calls: calls that have none. A cost is complete only if this is 0.
    """

    calls: int = 0
    attempts: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    latencies_s: tuple[float, ...] = ()
    cost: float = 0.0
    unpriced_calls: int = 0

    def __add__(self, other: JudgeUsage) -> JudgeUsage:
        return JudgeUsage.total((self, other))

    @classmethod
    def total(cls, parts: Iterable[JudgeUsage]) -> JudgeUsage:
        """The sum of any number of them, in one pass."""
        parts = list(parts)
        values = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(cls) if f.name != "latencies_s"}
        return cls(**values, latencies_s=tuple(chain.from_iterable(part.latencies_s for part in parts)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer for one :class:`Pair`.

    ``preference`` is in [-1, 1] from the first response's side: 1 win, -1 loss, 0 tie, values between for a soft
    verdict or for two orders that disagree. It is ``None`` exactly when there is **no verdict**, and then ``reason``
    says why (``timeout``, ``http_500``, ``length``, ``refusal``, ``filter``, ``conflicting``, ``unparsable``, ...).
    A missing verdict is never a tie.

    ``judge`` names who answered (a model, a tier), empty if unknown; ``critique`` is what it wrote.
    """

    preference: float | None
    reason: str = ""
    flipped: bool = False
    critique: str = ""
    usage: JudgeUsage = field(default_factory=JudgeUsage)
    judge: str = ""

    @property
    def outcome(self) -> Outcome | None:
        """The verdict as a word; ``None`` where there is none."""
        if self.preference is None:
            return None
        return "win" if self.preference > 0 else "loss" if self.preference < 0 else "tie"

    @property
    def cut(self) -> bool:
        """Whether the judge was not shown all of the texts: a note ``cut:<characters>`` says so."""
        return any(note.startswith("cut:") for note in self.reason.split("; "))

    @property
    def failed(self) -> bool:
        """True where there is no verdict."""
        return self.preference is None

    @classmethod
    def of(cls, outcome: Outcome, **kwargs: object) -> Verdict:
        """A hard verdict from its word."""
        return cls({"win": 1.0, "loss": -1.0, "tie": 0.0}[outcome], **kwargs)  # type: ignore[arg-type]

    @classmethod
    def none(cls, reason: str, usage: JudgeUsage | None = None, critique: str = "") -> Verdict:
        """No verdict, and why."""
        return cls(None, reason=reason or "unknown", usage=usage or JudgeUsage(), critique=critique)


@runtime_checkable
class Judge(Protocol):
    """Anything that can compare pairs.

    ``judge`` returns exactly one verdict a pair, in order. It must not raise because a pair failed, timed out or was
    refused; the engine still survives one that does (every pair of the call is then marked failed, with the error's
    name), and one that returns the wrong number of verdicts. Several calls may be under way at once: the engine makes
    one a micro-batch.
    """

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Compare each pair."""
        ...


def takes_principles(judge: object) -> bool:
    """Whether a judge judges a pair by its own ``principle``: it says so (``takes_principles``), or those behind it."""
    said = getattr(judge, "takes_principles", None)
    if said is not None:
        return bool(said)
    behind = [tier.judge for tier in getattr(judge, "tiers", ())] or [getattr(judge, "inner", None)]
    return all(one is not None and takes_principles(one) for one in behind)


def buys_once(judge: object) -> bool:
    """Whether what a judge was asked is not paid for again, whoever asks: it says so (``buys_once``), or has a store,
    or those behind it.
    """
    if (said := getattr(judge, "buys_once", None)) is not None:
        return bool(said)
    if getattr(judge, "store", None) is not None:
        return True
    behind = [tier.judge for tier in getattr(judge, "tiers", ())] or [getattr(judge, "inner", None)]
    return all(one is not None and buys_once(one) for one in behind)


async def checked_verdicts(judge: Judge, pairs: Sequence[Pair], *, name: str = "judge") -> list[Verdict]:
    """:func:`isolated_verdicts`, with the error logged: one line and a traceback, under ``name``."""
    verdicts, error = await isolated_verdicts(judge, pairs)
    if error is not None:
        log_judge_error(error, name, len(verdicts))
    return verdicts


async def isolated_verdicts(judge: Judge, pairs: Sequence[Pair]) -> tuple[list[Verdict], BaseException | None]:
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
        if cancelled_here():
            raise
        return [Verdict.none("raised_CancelledError")] * len(pairs), error
    except Exception as error:
        return [Verdict.none(f"raised_{type(error).__name__}")] * len(pairs), error
    if len(answers) != len(pairs):
        mistake = JudgeError(f"{len(answers)} results for {len(pairs)} pairs; none is used")
        return [Verdict.none("wrong_number_of_verdicts")] * len(pairs), mistake
    return [_checked(answer) for answer in answers], None


def log_judge_error(error: BaseException, name: str, pairs: int) -> None:
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
