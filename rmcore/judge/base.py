"""What a judge is: pairs in, one verdict a pair out, never an exception for a pair that failed.

The engine depends on this file alone; everything else in ``rmcore.judge`` is one way to fill the protocol in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

__all__ = ["Judge", "JudgeUsage", "Message", "Outcome", "Pair", "Prompt", "Verdict"]

Message: TypeAlias = Mapping[str, str]
"""One chat message: ``{"role": ..., "content": ...}``."""

Prompt: TypeAlias = str | Sequence[Message]
"""A plain-text prompt, or a conversation as a list of messages."""

Outcome: TypeAlias = Literal["win", "loss", "tie"]
"""``win``: the first response is better; ``loss``: the second is; ``tie``: the judge says neither is."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One question to a judge: which of two responses to ``prompt`` is better?

    ``id`` is the caller's own name for the pair, empty if there is none; it never reaches the judge model.
    """

    prompt: Prompt
    first: str
    second: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class JudgeUsage:
    """What one verdict cost: HTTP attempts, tokens by kind as the endpoint reported them, wall seconds."""

    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: JudgeUsage) -> JudgeUsage:
        return JudgeUsage(
            self.attempts + other.attempts,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cached_tokens + other.cached_tokens,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer for one :class:`Pair`.

    ``preference`` is in [-1, 1] from the first response's side: 1 win, -1 loss, 0 tie, values between for a soft
    verdict or for two orders that disagree. It is ``None`` exactly when there is **no verdict**, and then ``reason``
    says why (``timeout``, ``http_500``, ``length``, ``refusal``, ``filter``, ``conflicting``, ``unparsable``, ...).
    A missing verdict is never a tie.
    """

    preference: float | None
    reason: str = ""
    flipped: bool = False
    critique: str = ""
    usage: JudgeUsage = field(default_factory=JudgeUsage)

    @property
    def outcome(self) -> Outcome | None:
        """The verdict as a word; ``None`` where there is none."""
        if self.preference is None:
            return None
        return "win" if self.preference > 0 else "loss" if self.preference < 0 else "tie"

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
    name), and one that returns the wrong number of verdicts.
    """

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Compare each pair."""
        ...
