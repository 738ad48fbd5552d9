"""A judge behind any OpenAI-compatible chat-completions endpoint."""

from __future__ import annotations

import json
import logging
import random
from asyncio import TaskGroup
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rmcore.errors import InputError, JudgeError
from rmcore.judge.base import Pair, Verdict
from rmcore.judge.client import ChatClient
from rmcore.judge.clock import Clock
from rmcore.judge.orders import Orders, check_orders, combine_orders, exchanged, shown_exchanged
from rmcore.judge.prompt import JudgePrompt, RandomSource
from rmcore.judge.retry import RetryPolicy
from rmcore.judge.sync import run_sync
from rmcore.judge.verdict import parse_verdict

if TYPE_CHECKING:
    from types import TracebackType

    import httpx

__all__ = ["ChatJudge"]

_logger = logging.getLogger(__name__)
_RESERVED = frozenset({"model", "messages", "stream", "n"})


class _Question(NamedTuple):
    """One call: a pair of the batch, shown as given or exchanged."""

    pair: int
    exchanged: bool


class _Answer(NamedTuple):
    """A verdict from ``pair.first``'s side, with what only the log wants to know."""

    verdict: Verdict
    detail: str = ""
    neutralised: int = 0


class ChatJudge:
    """Asks a chat model which response is better; see :class:`~rmcore.judge.base.Judge`.

    A pair that fails gets a verdict with a reason, never an exception and never a tie. The reasons are those of
    :class:`~rmcore.judge.reply.Completion` (the call), of :class:`~rmcore.judge.verdict.Parsed` (the reply), and
    ``bad_pair`` for a pair that is not text. How both orders are put together is told in :mod:`rmcore.judge.orders`.

    Use it from asynchronous code (``await judge.judge(pairs)``) or synchronous code (:meth:`judge_sync`), on any number
    of event loops. ``async with``, :meth:`aclose` or :meth:`close` closes the connections; otherwise
    they end with the judge.

    Args:
        base_url: as in ``https://api.openai.com/v1``.
        model: the model's name there.
        api_key_env: the environment variable that holds the key, read at each call and never kept; ``None`` for a
            server without keys. If it is unset, every pair fails with ``no_api_key`` and nothing is sent.
        orders: ``"both"`` (two calls a pair) or ``"one"`` (a stable hash of the texts picks the order).
        prompt: the question's template.
        concurrency: calls in progress at most, per event loop, over all concurrent :meth:`judge` calls.
        timeout_s: seconds for one attempt.
        deadline_s: seconds for one :meth:`judge` call over all its pairs; what is not answered by then fails with
            ``deadline``. ``None``: no limit.
        retry: see :class:`~rmcore.judge.retry.RetryPolicy`.
        temperature, max_tokens, max_completion_tokens: sent only if given, since endpoints differ in what they accept;
            reasoning models mostly want ``max_completion_tokens`` and no temperature.
        extra_body: further fields of the request, JSON values.
        max_reply_bytes: longer replies fail with ``reply_too_large``.
        transport, clock, random_source: seams for tests and for unusual networks. ``random_source`` draws markers,
            labels and jitter; without it they come from the operating system and cannot be foreseen.

    Raises:
        JudgeError: an argument is unusable.
        InputError: ``orders`` is neither word.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = "OPENAI_API_KEY",
        *,
        orders: Orders = "both",
        prompt: JudgePrompt | None = None,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        deadline_s: float | None = 600.0,
        retry: RetryPolicy | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        extra_body: Mapping[str, object] | None = None,
        max_reply_bytes: int = 4 << 20,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
        random_source: random.Random | None = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise JudgeError(f"model: got {model!r}, expected the name of a model")
        if deadline_s is not None and not deadline_s > 0:
            raise JudgeError(f"deadline_s: got {deadline_s}, expected seconds above 0, or None")
        if max_tokens is not None and max_completion_tokens is not None:
            raise JudgeError("max_tokens and max_completion_tokens: got both, expected at most one")
        self.model = model
        self.orders: Orders = check_orders(orders)
        self.prompt = prompt or JudgePrompt()
        self.deadline_s = deadline_s
        given = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "max_completion_tokens": max_completion_tokens,
        }
        self._parameters: dict[str, object] = {name: value for name, value in given.items() if value is not None}
        self._parameters |= _check_extra(extra_body or {}, self._parameters.keys())
        self._random: RandomSource | None = random_source
        self.client = ChatClient(
            base_url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_reply_bytes=max_reply_bytes,
            retry=retry,
            transport=transport,
            clock=clock,
            random_source=random_source,
        )

    def __repr__(self) -> str:
        return (
            f"ChatJudge(base_url={self.client.base_url!r}, model={self.model!r}, orders={self.orders!r}, "
            f"api_key_env={self.client.api_key_env!r}, prompt={self.prompt.version})"
        )

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order, by ``deadline_s`` from now. Cancelling it cancels its requests."""
        pairs = list(pairs)
        deadline = None if self.deadline_s is None else self.client.clock.now() + self.deadline_s
        asked = {index: self._questions(index, pair) for index, pair in enumerate(pairs)}
        waiting = deque(question for questions in asked.values() for question in questions)
        answers: dict[_Question, _Answer] = {}

        async def worker() -> None:
            # Workers, not a task a question: a batch of any size holds `concurrency` rendered prompts at a time.
            while waiting:
                question = waiting.popleft()
                answers[question] = await self._ask(pairs[question.pair], question.exchanged, deadline)

        async with TaskGroup() as group:
            for _ in range(min(len(waiting), self.client.concurrency)):
                group.create_task(worker())
        verdicts = []
        for questions in asked.values():
            parts = [answers[question].verdict for question in questions]
            verdicts.append(parts[0] if len(parts) == 1 else combine_orders(*parts))
        self._report(verdicts, answers.values())
        return verdicts

    def judge_sync(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """:meth:`judge` for synchronous code, with or without a running loop (:func:`~rmcore.judge.sync.run_sync`)."""
        return run_sync(self.judge(pairs))

    async def aclose(self) -> None:
        """Close all connections. The judge can be used again and then reconnects."""
        await self.client.aclose()

    def close(self) -> None:
        """:meth:`aclose` for synchronous code."""
        run_sync(self.aclose())

    async def __aenter__(self) -> ChatJudge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _questions(self, index: int, pair: Pair) -> list[_Question]:
        if self.orders == "both":
            return [_Question(index, False), _Question(index, True)]
        try:
            return [_Question(index, shown_exchanged(pair))]
        except InputError:
            return [_Question(index, False)]  # it fails where it is asked, with the reason

    async def _ask(self, pair: Pair, exchange: bool, deadline: float | None) -> _Answer:
        """One call, from rendering to the verdict from ``pair.first``'s side. Raises nothing but cancellation."""
        try:
            first, second = (pair.second, pair.first) if exchange else (pair.first, pair.second)
            try:
                question = self.prompt.render(pair.prompt, first, second, self._random)
            except InputError as error:
                return _Answer(Verdict.none("bad_pair"), str(error))
            payload = {"model": self.model, "messages": question.messages, **self._parameters}
            reply = await self.client.complete(payload, deadline=deadline)
            if reply.choice is None:
                return _Answer(Verdict.none(reply.reason, reply.usage), reply.detail, question.neutralised)
            parsed = parse_verdict(reply.choice, question.labels)
            if parsed.outcome is None:
                verdict = Verdict.none(parsed.reason, reply.usage, parsed.critique)
            else:
                verdict = Verdict.of(parsed.outcome, critique=parsed.critique, usage=reply.usage)
            return _Answer(exchanged(verdict) if exchange else verdict, "", question.neutralised)
        except Exception as error:  # the contract of a judge: a pair's trouble stays with the pair
            return _Answer(Verdict.none(f"error_{type(error).__name__}"))

    def _report(self, verdicts: list[Verdict], answers: Collection[_Answer]) -> None:
        """One warning a batch if pairs got no verdict, with the first words the endpoint had for it."""
        broken = sum(answer.neutralised for answer in answers)
        if broken:
            _logger.info("judge %s: neutralised %d control sequences in its questions", self.model, broken)
        reasons = Counter(verdict.reason for verdict in verdicts if verdict.failed)
        if reasons:
            counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            detail = next((f"; first: {answer.detail}" for answer in answers if answer.detail), "")
            _logger.warning(
                "judge %s: no verdict for %d of %d pairs (%s)%s",
                self.model,
                reasons.total(),
                len(verdicts),
                counts,
                detail,
            )


def _check_extra(extra: Mapping[str, object], taken: Collection[str]) -> dict[str, object]:
    """``extra`` as plain JSON values, if it leaves alone the fields that the judge sets itself."""
    clash = sorted((_RESERVED | set(taken)) & set(extra))
    if clash:
        raise JudgeError(f"extra_body: got {', '.join(clash)}, expected fields that the judge does not set itself")
    try:
        plain: dict[str, object] = json.loads(json.dumps(dict(extra), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise JudgeError(f"extra_body: got values that are no JSON ({type(error).__name__})") from None
    return plain
