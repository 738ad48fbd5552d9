"""One call to a judge as the store keeps it: the question as it was shown, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from rmcore._base.client.overflow import Overflow
from rmcore._base.large import ascii_json
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_prompt, canonical_response
from rmcore.judge.base import JudgeUsage, Verdict
from rmcore.judge.keys import call_key, pair_key
from rmcore.judge.question.cut import NO_CUT, Cut

__all__ = ["MAX_REPLY", "Question", "Reply", "Shown", "reply_text", "without_secrets"]

MAX_REPLY = 65_536
"""Longest reply kept, in characters. What is cut off is counted."""

Shown: TypeAlias = Literal["ab", "ba"]
"""Which way round a pair was shown: ``ab`` is the order with the smaller :func:`~rmcore.judge.keys.pair_key`."""

_SECRET = re.compile(r"(?i)(^|[-_.])(api[-_]?key|key|token|secret|password|passwd|credentials?|authorization)$")


@dataclass(frozen=True, slots=True)
class Question:
    """What one call asks; make one with :meth:`of`.

    Attributes:
        key: :func:`~rmcore.judge.keys.call_key`: equal questions to the same judge have equal keys.
        pair: the smaller of the pair's two :func:`~rmcore.judge.keys.pair_key`: both orders have it in common.
        shown: which of the two orders this is.
        judge, model, parameters, template: who is asked and how, as in ``call_key``.
        prompt: in canonical form.
        first, second: the responses in the order shown, in canonical form.
        cut: characters of prompt, first and second that were not shown since they were too long for the judge.
        canary: the pair was made up to test the judge (:mod:`rmcore.judge.wrappers.canary`): no data, and not in the
        key.
    """

    key: str
    pair: str
    shown: Shown
    judge: str
    model: str
    parameters: Mapping[str, Any]
    template: str
    prompt: Canonical
    first: Canonical
    second: Canonical
    canary: bool = False
    cut: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(
        cls,
        judge: str,
        model: str,
        parameters: Mapping[str, Any],
        template: str,
        prompt: Prompt,
        first: Response,
        second: Response,
        *,
        canary: bool = False,
        cut: Cut = NO_CUT,
    ) -> Question:
        """The question whether ``first``, shown first, is better than ``second``.

        Values of parameters whose names say that they are secrets are replaced (:func:`without_secrets`), in the key
        too: a new key of an endpoint is no new question.

        Raises:
            InputError: the texts are not texts, or ``parameters`` are no JSON values.
        """
        here, other = pair_key(prompt, first, second), pair_key(prompt, second, first)
        public = without_secrets(parameters)
        return cls(
            key=call_key(judge, model, public, template, here, cut.to_list()),
            pair=min(here, other),
            shown="ab" if here <= other else "ba",
            judge=judge,
            model=model,
            parameters=public,
            template=template,
            prompt=canonical_prompt(prompt),
            first=canonical_response(first),
            second=canonical_response(second),
            canary=canary,
            cut=(cut.prompt, cut.first, cut.second),
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a :class:`Question`.

    Attributes:
        verdict: from the side of the response **shown first**, with its reason, critique and usage.
        replied: the judge's words were read, so they are paid for, whether or not they hold a verdict. False for
            failures on the way (timeouts, refused connections, error statuses), which say nothing about the pair.
        text: the final answer as it came, before it was read.
        labels: the words this call was to answer with, without which ``text`` cannot be read again.
        sanitised: how many control sequences were broken up in the texts.
        detail: the endpoint's own words for a failure; for logs, not kept.
        currency: what ``verdict.usage.cost`` is counted in.
        model, fingerprint: who answered, as the reply says (``model``, ``system_fingerprint``); empty if it does not.
        overflow: the question was too long for the judge; not kept.
    """

    verdict: Verdict
    replied: bool = False
    text: str = ""
    labels: Mapping[str, str] | None = None
    sanitised: int = 0
    detail: str = ""
    currency: str = ""
    model: str = ""
    fingerprint: str = ""
    overflow: Overflow | None = None

    @property
    def shareable(self) -> bool:
        """Whether it is the answer for everybody who waits for it: not if the asker had only run out of time."""
        usage = self.verdict.usage
        return self.replied or (usage.attempts > 0 and self.verdict.reason != "deadline")

    def as_hit(self) -> Reply:
        """The same answer for somebody who did not pay for it."""
        return replace(self, verdict=replace(self.verdict, usage=JudgeUsage(cache_hits=1)), sanitised=0)


def without_secrets(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which values under names such as ``api_key`` or ``access_token`` are ``"***"``, at any depth."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: "***" if _SECRET.search(str(name)) else clean(inner) for name, inner in value.items()}
        return [clean(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return {name: "***" if _SECRET.search(str(name)) else clean(value) for name, value in parameters.items()}


def reply_text(choice: Mapping[str, object] | None) -> str:
    """The final answer of a chat-completions choice as it came; content of another form as JSON. Total."""
    message = None if choice is None else choice.get("message")
    content = message.get("content") if isinstance(message, Mapping) else None
    if content is None and isinstance(message, Mapping):
        content = message.get("refusal")
    if content is None or isinstance(content, str):
        return content or ""
    try:
        return ascii_json(content)
    except (TypeError, ValueError, RecursionError):
        return ""
