"""What a verdict store has on record: one call, and one judge's opinion of a pair, both orders together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rmcore._base.errors import reject
from rmcore._base.prompt import Canonical, Prompt
from rmcore.judge.base import JudgeUsage, Verdict
from rmcore.judge.store.prices import answering_model
from rmcore.judge.store.records import Shown

__all__ = ["TOKENS", "JudgedPair", "LoggedCall", "as_answer"]

TOKENS = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens")


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """One row of the log. ``preference`` is from the side of the response shown first, ``None`` without a verdict.

    ``asked`` is equal for calls of the same judge, model, parameters and template. ``model`` is the one asked for,
    ``answered`` and ``fingerprint`` are what the reply says of who answered (empty where it does not say). ``cut`` is
    the JSON list of how many characters of prompt, first and second were not shown, as too long for the judge.
    """

    id: int
    asked: int
    key: str
    pair: str
    shown: Shown
    judge: str
    model: str
    template: str
    preference: float | None
    reason: str
    replied: int
    canary: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    seconds: float
    cost: float | None
    currency: str
    sanitised: int
    reply_cut: int
    at: str
    version: str
    answered: str
    fingerprint: str
    cut: str

    @property
    def characters_cut(self) -> tuple[int, int, int]:
        """Characters of prompt, first and second that were not shown."""
        prompt, first, second = json.loads(self.cut)
        return prompt, first, second

    @property
    def answering(self) -> str:
        """The model that answered (:func:`~rmcore.judge.store.prices.answering_model`)."""
        return answering_model(self.model, self.answered)

    @property
    def outcome(self) -> Literal["win", "loss", "tie", "none"]:
        """The verdict as a word, from the side of the response shown first."""
        return Verdict(self.preference).outcome or "none"

    @property
    def usage(self) -> JudgeUsage:
        """Its tokens and attempts, as one call."""
        tokens = {name: getattr(self, name) for name in TOKENS}
        return JudgeUsage(calls=1, attempts=self.attempts, seconds=self.seconds, **tokens)


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """What one judge said of one pair, its two orders put together as in :mod:`rmcore.judge.orders`.

    Attributes:
        pair: the key that both orders share.
        judge, model: who was asked, and the model that answered (both, if it was another in each order).
        prompt: a text or a list of messages.
        a, b: the responses; ``a`` is the one shown first in the order ``ab``.
        verdict: from ``a``'s side.
        orders: in how many orders there is a verdict.
        critiques: what was written, by order shown.
        cut: characters of prompt, a and b that were not shown, as too long for the judge.
    """

    pair: str
    judge: str
    model: str
    prompt: Prompt
    a: Canonical
    b: Canonical
    verdict: Verdict
    orders: int
    critiques: Mapping[Shown, str]
    cut: tuple[int, int, int] = (0, 0, 0)

    def to_row(self) -> dict[str, Any]:
        """A preference as TRL reads it (plain or conversational, as the prompt is), and what is known of it besides.

        ``preference`` is its strength, from 0 (the orders contradict each other, or a tie; ``chosen`` then means
        nothing) to 1. ``cut`` is there if the judge was not shown all of the texts. A critique names the response that
        it was shown first: ``chosen`` or ``rejected``.

        Raises:
            InputError: the pair has no verdict.
        """
        preference = self.verdict.preference
        if preference is None:
            reject("pair", f"no verdict ({self.verdict.reason})", "a pair with a verdict")
        chosen, rejected = (self.a, self.b) if preference >= 0 else (self.b, self.a)
        first: dict[Shown, str] = {"ab": "chosen", "ba": "rejected"}
        if preference < 0:
            first = {"ab": "rejected", "ba": "chosen"}
        prompt, *gone = self.cut
        names = ("chosen", "rejected") if preference >= 0 else ("rejected", "chosen")
        cut = {"cut": {"prompt": prompt, **dict(zip(names, gone, strict=True))}} if any(self.cut) else {}
        return {
            "prompt": self.prompt,
            "chosen": as_answer(self.prompt, chosen),
            "rejected": as_answer(self.prompt, rejected),
            "preference": abs(preference),
            "flipped": self.verdict.flipped,
            "orders": self.orders,
            "reason": self.verdict.reason,
            "critiques": [{"shown_first": first[shown], "text": text} for shown, text in self.critiques.items()],
            "model": self.model,
            "judge": self.judge,
            "pair": self.pair,
        } | cut


def as_answer(prompt: Prompt, answer: Canonical) -> Canonical:
    """A response in the form of its prompt: TRL wants both plain or both conversational."""
    return (
        answer if isinstance(prompt, str) or not isinstance(answer, str) else [{"role": "assistant", "content": answer}]
    )
