"""Pairs that are longer than the judge's context: found out before they are sent where that can be, cut, and put again.

The length of the context is given, or learnt: from the server's ``/models`` as soon as a pair is long, or from the
error that refuses one. What a server's error says counts for that pair at once, and for all others once a pair that was
cut by it has been answered. Without any number a pair is shown by a quarter until it fits.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from rmcore._base import large
from rmcore._base.client.overflow import LEAST_CONTEXT, Overflow
from rmcore._base.errors import JudgeError
from rmcore._base.prompt import canonical_prompt
from rmcore.judge.base import Pair, Verdict
from rmcore.judge.question.cut import NO_CUT, Cut, cut_to_fit, estimate_tokens
from rmcore.judge.question.prompt import JudgePrompt
from rmcore.judge.question.sanitise import sanitise
from rmcore.judge.question.turns import as_text, segments

__all__ = ["ContextWindow", "Fit", "TokenCounter", "cut_off_at"]

_logger = logging.getLogger(__name__)

TokenCounter: TypeAlias = Callable[[str], int] | Any
"""The judge's tokenizer (with ``encode``, as those of transformers, tokenizers and tiktoken), or a function from a text
to its number of tokens."""

TRIES = 6
"""Requests for one question, all but the first cut shorter than the one before."""
_CUT_OFF = "context:"
_ANSWER = 1024
"""Tokens left for the answer where no limit is set to it."""
_TEMPLATE = 64
"""Tokens that a chat template puts around two messages."""
_ASK_FROM = 3_000
"""Tokens of a question from which on the server is asked for its context: any judge has room for less."""


@dataclass(slots=True)
class Fit:
    """How one pair is shown: the same in both orders, and shorter after each refusal.

    Attributes:
        cut: what is left out, from the side of the pair as it was given; ``None``: it cannot be made to fit.
        limit: tokens of the context it was cut for.
        refusals: how often it was too long.
        aside: tokens of what stands in this question besides its texts and the template.
    """

    cut: Cut | None = NO_CUT
    limit: int | None = None
    refusals: int = 0
    aside: int = 0
    scale: float = 1.0
    learnt: bool = False
    paid: bool = False
    planned: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ContextWindow:
    """How much the judge can be shown.

    Args:
        prompt: the question's template.
        answer_tokens: most tokens of the answer, if there is a limit.
        given: tokens of the context, if they are known.
        tokenizer: see :data:`TokenCounter`; ``None``: tokens are estimated from the characters.
        ask: asks the server for its context.
        name: the judge's, for log lines.

    Raises:
        JudgeError: ``given`` is no number of tokens, or ``tokenizer`` counts nothing.
    """

    def __init__(
        self,
        prompt: JudgePrompt,
        answer_tokens: int | None,
        given: int | None,
        tokenizer: TokenCounter | None,
        ask: Callable[[], Awaitable[int | None]],
        name: str,
    ) -> None:
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < LEAST_CONTEXT):
            raise JudgeError(f"context_tokens: got {given!r:.40}, expected tokens, at least {LEAST_CONTEXT}")
        self.prompt = prompt
        self.limit = given
        self._answer = answer_tokens
        self._count = _counter(tokenizer)
        self._ask, self._name = ask, name
        self._asked = given is not None
        self._overhead: int | None = None

    async def fit(self, pair: Pair, fit: Fit) -> None:
        """Plan how ``pair`` is shown, once for both its orders; what is certain to be too long is not sent.

        Raises:
            InputError: the pair is none.
        """
        async with fit.lock:
            if fit.planned:
                return
            texts, parts = await _aside(self._texts, pair)
            long = self.limit is None and not self._asked and sum(map(len, texts)) > _ASK_FROM
            if long and await _aside(self._total, texts) > _ASK_FROM:
                self._learn(await self._told(), "as its list of models says")
            if self.limit is not None:
                await self._plan(fit, texts, parts, self.limit)
            fit.planned = True

    async def shorten(self, pair: Pair, fit: Fit, shown: Cut, overflow: Overflow) -> bool:
        """Plan anew after ``overflow`` refused ``pair`` as it was ``shown``; whether that is worth a request.

        Raises:
            InputError: the pair is none.
        """
        async with fit.lock:
            if fit.cut != shown:  # the other order was refused meanwhile
                return fit.cut is not None
            fit.refusals += 1
            if fit.refusals >= TRIES or (overflow.paid and fit.paid):
                return False
            fit.paid |= overflow.paid
            texts, parts = await _aside(self._texts, pair)
            limit = overflow.limit or self.limit
            if limit is None and not self._asked:
                limit = await self._told()
            if limit is None:
                # A size that depends on the pair alone, so that the same pair is cut in the same way another time.
                fit.scale /= 4
                room = int((await _aside(self._total, texts) - self._template()) * fit.scale)
                fit.cut = await _aside(cut_to_fit, texts, parts, room, self._size)
                return fit.cut is not None and fit.cut != shown
            fit.learnt = overflow.limit is not None
            await self._plan(fit, texts, parts, limit)
            while fit.cut == shown and fit.scale > 0.01:
                # It fits by our count and not by the server's, which is the one that counts.
                fit.scale *= min(0.75, 0.9 * limit / overflow.asked) if overflow.asked else 0.75
                await self._plan(fit, texts, parts, limit)
            return fit.cut is not None and fit.cut != shown

    def tokens(self, text: str) -> int:
        """How many a text has; 0 for none."""
        return self._count(text) if text else 0

    def answered(self, fit: Fit) -> None:
        """``fit`` was shown and answered: what it was cut for is the context from now on."""
        if fit.learnt and fit.limit is not None:
            self._learn(fit.limit, "as it said when a pair was longer")

    def answer_tokens(self, fit: Fit) -> int | None:
        """Most tokens that the answer may have beside what is shown."""
        limit = self.limit or (fit.limit if fit.learnt else None)
        return None if limit is None or self._answer is None else min(self._answer, limit // 2)

    def cut_off(self, verdict: Verdict, answer_tokens: int | None) -> Verdict:
        """``verdict``, with the reason ``context:<tokens>`` if it was the context that ended the answer.

        A response that fills the context leaves the judge a few words for its verdict. That ends with ``length`` as an
        answer does that is longer than its limit, but far below the limit.
        """
        usage, most = verdict.usage, answer_tokens or self._answer
        asked, said = usage.prompt_tokens, usage.completion_tokens
        if not verdict.failed or verdict.reason != "length" or not 0 < said < asked:
            return verdict
        full = self.limit is not None and asked + said > 0.98 * self.limit
        if not full and (most is None or said >= 0.9 * most):
            return verdict
        return replace(verdict, reason=f"{_CUT_OFF}{asked + said}")

    # -- helpers -----------------------------------------------------------------------------------------------------

    async def _told(self) -> int | None:
        """What the server says. It is asked once; again if whoever asked went away before the answer."""
        self._asked = True
        try:
            return await self._ask()
        except BaseException:
            self._asked = False
            raise

    def _learn(self, limit: int | None, how: str) -> None:
        if limit is not None and (self.limit is None or limit < self.limit):
            self.limit = limit
            _logger.warning(
                "judge %s: its context has %d tokens, %s; longer pairs are cut in the middle", self._name, limit, how
            )

    async def _plan(self, fit: Fit, texts: tuple[str, str, str], parts: tuple[int, int, int], limit: int) -> None:
        fit.limit = limit
        answer = min(self._answer, limit // 2) if self._answer is not None else min(_ANSWER, limit // 4)
        room = int((limit - answer - self._template() - fit.aside) * fit.scale - limit * 0.01)
        fit.cut = await _aside(cut_to_fit, texts, parts, room, self._size) if room > 0 else None

    def _texts(self, pair: Pair) -> tuple[tuple[str, str, str], tuple[int, int, int]]:
        prompt = canonical_prompt(pair.prompt)
        first, _ = self.prompt.capped("first", pair.first)
        second, _ = self.prompt.capped("second", pair.second)
        parts = [len(segments(name, one)) for name, one in (("prompt", prompt), ("first", first), ("second", second))]
        return (as_text(prompt), as_text(first), as_text(second)), (parts[0], parts[1], parts[2])

    def _total(self, texts: tuple[str, str, str]) -> int:
        return self._template() + sum(map(estimate_tokens, texts))

    def _template(self) -> int:
        """Tokens of a question without its texts."""
        if self._overhead is None:
            # Not at random: every judge of the kind cuts a pair in the same way, or it would be bought again.
            empty = self.prompt.render("", "", "", random.Random(0))
            self._overhead = _TEMPLATE + sum(self._count(message["content"]) for message in empty.messages)
        return self._overhead

    def _size(self, text: str) -> int:
        return self._count(sanitise(text, self.prompt.special_tokens)[0])


def cut_off_at(verdict: Verdict) -> Overflow | None:
    """What :meth:`ContextWindow.cut_off` found, also if the verdict comes from a store."""
    tokens = verdict.reason.removeprefix(_CUT_OFF)
    if not verdict.failed or tokens == verdict.reason or not tokens.isdigit():
        return None
    return Overflow(max(int(tokens), LEAST_CONTEXT), paid=True)


async def _aside(work: Callable[..., Any], *args: Any) -> Any:
    """``work(*args)``; in a thread if the texts among ``args`` are long."""
    return await large.call(work, *args)


def _counter(tokenizer: TokenCounter | None) -> Callable[[str], int]:
    """A function that counts tokens, whatever it is given."""
    if tokenizer is None:
        return estimate_tokens
    encode = getattr(tokenizer, "encode", None)
    count = (lambda text: len(encode(text))) if callable(encode) else tokenizer
    if not callable(count):
        raise JudgeError(f"tokenizer: got {type(tokenizer).__name__}, expected one with encode(), or a function")
    told = False

    def counted(text: str) -> int:
        nonlocal told
        try:
            return int(count(text))
        except Exception as error:  # a tokenizer may refuse what a response holds; that is no reason to show nothing
            if not told:
                told = True
                _logger.warning("the judge's tokenizer failed with %s; tokens are estimated", type(error).__name__)
            return estimate_tokens(text)

    return counted
