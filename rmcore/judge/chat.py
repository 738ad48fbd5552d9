"""A judge behind any OpenAI-compatible chat-completions endpoint."""

from __future__ import annotations

import asyncio
import logging
from asyncio import TaskGroup
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Never

from rmcore._base import large
from rmcore._base.client.options import ClientOptions
from rmcore._base.client.secrets import without_secret
from rmcore._base.errors import InputError, JudgeError
from rmcore._base.loop import cancelled_here, run_sync
from rmcore._base.numbers import COUNT, Within, shown_number
from rmcore._base.prompt import Prompt, Response
from rmcore.judge.base import JudgeUsage, Pair, Verdict
from rmcore.judge.chat_arguments import check_extra, make_client, open_store, refuse, store_error
from rmcore.judge.client.completions import CompletionFunction
from rmcore.judge.context import ContextWindow, Fit, TokenCounter, cut_off_at
from rmcore.judge.orders import Asked, Orders, check_orders, exchanged, shown_exchanged
from rmcore.judge.question.constitution import Constitution
from rmcore.judge.question.cut import Cut
from rmcore.judge.question.dialect import Dialect, one_call
from rmcore.judge.question.prompt import JudgePrompt, Output
from rmcore.judge.question.rules import rule_verdict
from rmcore.judge.question.sanitise import breakable
from rmcore.judge.question.soft import MIN_MASS
from rmcore.judge.store.prices import PriceTable, answering_model, price_call
from rmcore.judge.store.records import Question, Reply, reply_text
from rmcore.judge.tokenizers import tokens_of
from rmcore.judge.wrappers.canary_pairs import CANARY_ID

if TYPE_CHECKING:
    from types import TracebackType

    from rmcore.judge.store.store import VerdictStore

__all__ = ["ChatJudge"]

_logger = logging.getLogger(__name__)
_CLOSE_S = 5.0


class _Call(NamedTuple):
    """One call: a pair of the batch, shown as given or exchanged."""

    pair: int
    exchanged: bool


class ChatJudge:
    """Asks a chat model which response is better; see :class:`~rmcore.judge.base.Judge`.

    Blank and identical responses are decided by rule (:mod:`rmcore.judge.question.rules`) and cost nothing.

    A pair that fails gets a verdict with a reason, never an exception and never a tie. The reasons are those of
    :class:`~rmcore.judge.client.reply.Completion` (the call), of :class:`~rmcore.judge.question.verdict.Parsed` (the
    reply), and ``bad_pair`` for a pair that is not text. A verdict that is there may carry a note in ``reason``:
    ``rule:<which>``, ``one_order:<why the other failed>``, ``cut:<characters>``, ``hard:<why it is not soft>``. How
    both orders are put together is said in :mod:`rmcore.judge.orders`.

    A pair that is longer than the judge's context is cut by rule (:mod:`rmcore.judge.question.cut`) and asked all the
    same, or a policy could write its way out of being judged. Where nothing fits, the reason is ``too_long``.

    Use it from asynchronous code (``await judge.judge(pairs)``) or synchronous code (:meth:`judge_sync`), on any number
    of event loops. ``async with``, :meth:`aclose` or :meth:`close` closes the connections; otherwise
    they end with the judge.

    Args:
        base_url: as in ``https://api.openai.com/v1``; an Azure deployment with its ``?api-version=…`` too. Either this
            or ``complete``.
        model: the model's name there.
        api_key_env: the environment variable that holds the key, read at each call and never kept; ``None`` for a
            server without keys. If it is unset, every pair fails with ``no_api_key`` and nothing is sent.
        complete: instead of an endpoint: an async function ``(messages, **parameters)`` that returns a chat completion
            (:class:`~rmcore.judge.client.completions.CompletionFunction`): :func:`openai_completions(client)
            <rmcore.judge.client.completions.openai_completions>`, :func:`transformers_completions(model, tokenizer)
            <rmcore.judge.client.completions.transformers_completions>`, or one of your own.
        client: bounds and patience of the calls, over HTTP or through ``complete``: concurrency, timeouts, retries,
            limits (:class:`~rmcore._base.client.options.ClientOptions`).
        orders: ``"both"`` (two calls a pair) or ``"one"`` (a stable hash of the texts picks the order).
        prompt: the question's template.
        constitution: principles of which each pair is judged by a few, the same in both orders.
        output: ``"text"``, or ``"json_schema"`` for a structured reply under a strict schema. An endpoint that refuses
            the schema or answers it with nothing is asked for text instead. ``None``: what ``prompt`` says.
        soft: read how sure the judge is from the log-probabilities of its label (:mod:`rmcore.judge.question.soft`);
            where that cannot be had the verdict is hard, with a note.
        min_mass: with ``soft``, the probability of all labels together below which a verdict counts for less, in
            proportion, and is no label (:mod:`rmcore.judge.labelling`); 0 for never.
        top_logprobs: alternatives to ask for with ``soft``. Most endpoints allow 5, some 20.
        rules: decide blank and identical responses without a call.
        max_response_chars: of longer responses the judge is shown the beginning, and told so. ``None``: what ``prompt``
            says.
        context_tokens: tokens that the judge's model takes, question and answer together. ``None``: learnt from the
            server's list of models or from its errors. Give it for a server that cuts long questions by itself without
            a word (Ollama).
        tokenizer: the judge's tokenizer (``encode``), whose special tokens are broken up in the texts, or a function
            from a text to its number of tokens. ``None``: an estimate from the characters, from above.
        deadline_s: seconds for one :meth:`judge` call over all its pairs; what is not answered by then fails with
            ``deadline``. ``None``: no limit. A pair's own ``deadline`` counts where it is earlier.
        temperature, max_tokens, max_completion_tokens: sent only if given, since endpoints differ in what they
            accept; reasoning models mostly want ``max_completion_tokens`` and no temperature. An endpoint that refuses
            one of them, or ``logprobs``, by name is asked again without it (a limit on tokens: under its other name),
            and from then on never with it; see :attr:`dropped`.
        extra_body: further fields of the request, JSON values.
        store: where verdicts are kept: a :class:`~rmcore.judge.store.VerdictStore`, or the path of one. What it holds
            is not asked again, equal questions share one call, and a run that was killed goes on where it was. If the
            store cannot be read, pairs fail with ``store``.
        judge_id: the name the store files verdicts under, besides the model: the same name, the same judge. Give one if
            a judge moves between addresses. Default: ``base_url``, or the ``name`` of ``complete``, if it has one.
        prices: a :class:`~rmcore.judge.store.prices.PriceTable`, a mapping or a JSON file, for ``usage.cost``. Without
            it, or for a model that is not in it, calls are counted in ``usage.unpriced_calls``. What counts is the
            model that answers, which may be another than was asked for: a warning says so once.

    Raises:
        JudgeError: an argument is unusable.
        InputError: ``orders`` is neither word, a limit is no positive integer, or the store or the prices cannot be
            used.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str = "",
        api_key_env: str | None = "OPENAI_API_KEY",
        *,
        complete: CompletionFunction | None = None,
        client: ClientOptions | None = None,
        orders: Orders = "both",
        prompt: JudgePrompt | None = None,
        constitution: Constitution | None = None,
        output: Output | None = None,
        soft: bool = False,
        min_mass: float = MIN_MASS,
        top_logprobs: int = 5,
        rules: bool = True,
        max_response_chars: int | None = None,
        context_tokens: int | None = None,
        tokenizer: TokenCounter | None = None,
        deadline_s: float | None = 600.0,
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_completion_tokens: int | None = None,
        extra_body: Mapping[str, object] | None = None,
        store: VerdictStore | str | Path | None = None,
        judge_id: str | None = None,
        prices: PriceTable | Mapping[str, Any] | str | Path | None = None,
        **unknown: Never,
    ) -> None:
        refuse(unknown)
        options = ClientOptions() if client is None else client
        if not isinstance(model, str) or not model:
            raise JudgeError(f"model: got {model!r}, expected the name of a model")
        for name, value, within in (
            ("deadline_s", deadline_s, Within(above=0)),
            ("temperature", temperature, Within(least=0)),
            ("max_tokens", max_tokens, COUNT),
            ("max_completion_tokens", max_completion_tokens, COUNT),
            ("max_response_chars", max_response_chars, COUNT),
            ("context_tokens", context_tokens, COUNT),
            ("min_mass", min_mass, Within(least=0, most=1)),
            ("top_logprobs", top_logprobs, Within(whole=True, least=2, most=20)),
        ):
            if value is not None and value not in within:
                raise JudgeError(f"{name}: got {shown_number(value)}, expected {within}")
        if max_tokens is not None and max_completion_tokens is not None:
            raise JudgeError("max_tokens and max_completion_tokens: got both, expected at most one")
        self.model = model
        self.orders: Orders = check_orders(orders)
        given_prompt = prompt or JudgePrompt()
        self.prompt = replace(
            given_prompt,
            output=given_prompt.output if output is None else output,
            max_response_chars=given_prompt.max_response_chars if max_response_chars is None else max_response_chars,
            special_tokens=given_prompt.special_tokens or _own_tokens(complete, tokenizer),
        )
        self.constitution = constitution
        self.soft, self.min_mass = soft, min_mass
        if min_mass != MIN_MASS and not soft:
            raise JudgeError(f"min_mass: got {min_mass} without soft=True, expected soft verdicts")
        self.rules = rules
        self.deadline_s = deadline_s
        given = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "max_completion_tokens": max_completion_tokens,
        }
        if soft:
            given |= {"logprobs": True, "top_logprobs": top_logprobs}
        self._parameters: dict[str, object] = {name: value for name, value in given.items() if value is not None}
        self._parameters |= check_extra(extra_body or {}, self._parameters.keys())
        self.client = make_client(base_url, api_key_env, complete, options)
        self._dialect = Dialect(model, self.prompt, self._parameters, soft, options.random_source, min_mass)
        self.context = ContextWindow(
            self.prompt if constitution is None else replace(self.prompt, principles=constitution.longest()),
            max_tokens or max_completion_tokens,
            getattr(complete, "context_tokens", None) if context_tokens is None else context_tokens,
            getattr(complete, "tokenizer", None) if tokenizer is None else tokenizer,
            partial(self.client.exchange.context_tokens, model),
            model,
        )
        if judge_id is not None and not (isinstance(judge_id, str) and judge_id):
            raise JudgeError(f"judge_id: got {judge_id!r}, expected a name")
        self.judge_id = judge_id or self.client.exchange.name
        if store is not None and not self.judge_id:
            raise JudgeError("judge_id: got nothing, expected a name for the store, since `complete` has none")
        self.prices = None if prices is None else PriceTable.of(prices)
        self._others: set[str] = set()  # models that answered and were not asked for
        self._own_store = isinstance(store, (str, Path))
        self.store = open_store(store, deadline_s)

    takes_principles = True
    """A pair's ``principle`` stands in its question, in place of the judge's own."""

    def __repr__(self) -> str:
        return (
            f"ChatJudge({self.client.exchange!r}, model={self.model!r}, orders={self.orders!r}, "
            f"prompt={self.prompt.version})"
        )

    @property
    def dropped(self) -> dict[str, str]:
        """What the endpoint turned out not to take (``temperature``, ``response_format``, …), and its words for it."""
        return dict(self._dialect.dropped)

    @property
    def counts(self) -> Counter[str]:
        """What happened so far: ``rule:<which>``, and the counts of :class:`~rmcore.judge.question.dialect.Dialect`."""
        return self._dialect.tally()

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order, by ``deadline_s`` from now. Cancelling it cancels its requests."""
        return [asked.verdict for asked in await self.judge_orders(pairs)]

    async def judge_orders(self, pairs: Sequence[Pair]) -> list[Asked]:
        """:meth:`judge` with the verdicts of both orders apart, as the labels and measures of a judge need them."""
        pairs = list(pairs)
        deadline = None if self.deadline_s is None else self.client.clock.now() + self.deadline_s
        found = [await large.call(rule_verdict, pair) if self.rules else None for pair in pairs]
        ruled = {index: Asked(rule=verdict) for index, verdict in enumerate(found) if verdict is not None}
        self._dialect.add(Counter(asked.verdict.reason for asked in ruled.values()))
        asked = {index: await self._questions(index, pair) for index, pair in enumerate(pairs) if index not in ruled}
        fits = {index: Fit(aside=self.context.tokens(pairs[index].principle)) for index in asked}
        queue = deque(question for questions in asked.values() for question in questions)
        answers: dict[_Call, Reply] = {}

        async def worker() -> None:
            # Workers, not a task a question: a batch of any size holds `concurrency` rendered prompts at a time.
            while queue:
                question = queue.popleft()
                pair, fit = pairs[question.pair], fits[question.pair]
                answers[question] = await self._ask(pair, question.exchanged, deadline, fit)

        async with TaskGroup() as group:
            for _ in range(min(len(queue), self.client.options.concurrency)):
                group.create_task(worker())
        for index, questions in asked.items():
            parts = {question.exchanged: answers[question].verdict for question in questions}
            ruled[index] = Asked(forward=parts.get(False), backward=parts.get(True))
        together = [ruled[index] for index in range(len(pairs))]
        self._report([one.verdict for one in together], answers.values())
        return together

    def judge_sync(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """:meth:`judge` for synchronous code, with or without a running loop (:func:`~rmcore._base.loop.run_sync`)."""
        return run_sync(self.judge(pairs))

    async def aclose(self) -> None:
        """Close all connections, and the store if it was given as a path. The judge can be used again."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self.client.aclose()
        except TimeoutError:
            _logger.warning("judge %s: connections did not close within %g s and are left", self.model, _CLOSE_S)
        if self.store is not None and self._own_store:
            await asyncio.to_thread(self.store.close)

    def close(self) -> None:
        """:meth:`aclose` for synchronous code."""
        run_sync(self.aclose())

    async def __aenter__(self) -> ChatJudge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _questions(self, index: int, pair: Pair) -> list[_Call]:
        if self.orders == "both":
            return [_Call(index, False), _Call(index, True)]
        try:
            return [_Call(index, await large.call(shown_exchanged, pair))]
        except InputError:
            return [_Call(index, False)]  # it fails where it is asked, with the reason

    async def _ask(self, pair: Pair, exchange: bool, deadline: float | None, fit: Fit) -> Reply:
        """One question, from the texts to the verdict from ``pair.first``'s side. Raises nothing but cancellation."""
        try:
            if pair.deadline is not None:
                deadline = pair.deadline if deadline is None else min(deadline, pair.deadline)
            try:
                reply = await self._fitted(pair, exchange, deadline, fit)
            except InputError as error:
                # Without its store a judge buys nothing: what could not be kept would be bought again.
                reason = "store" if self.store is not None and isinstance(error, store_error()) else "bad_pair"
                return Reply(Verdict.none(reason), detail=str(error))
            return replace(reply, verdict=exchanged(reply.verdict)) if exchange else reply
        except (Exception, asyncio.CancelledError) as error:  # the contract of a judge: a pair's trouble is its own
            if isinstance(error, asyncio.CancelledError) and cancelled_here():
                raise
            return Reply(Verdict.none(f"error_{type(error).__name__}"))

    async def _fitted(self, pair: Pair, exchange: bool, deadline: float | None, fit: Fit) -> Reply:
        """The answer to the question in a form that the judge has room for, cut and put again where it was too long."""
        usage = JudgeUsage()
        await self.context.fit(pair, fit)
        while True:
            shown = fit.cut
            if shown is None:
                detail = f"no room for the question in {fit.limit} tokens, the judge's context or its tokens_per_minute"
                return Reply(Verdict.none("too_long", usage), detail=detail)
            reply = await self._answer(pair, exchange, deadline, shown, self.context.answer_tokens(fit))
            usage = one_call(usage, reply.verdict.usage)
            reply = replace(reply, verdict=replace(reply.verdict, usage=usage))
            overflow = reply.overflow or cut_off_at(reply.verdict)
            if overflow is None:
                if not reply.verdict.failed:
                    self.context.answered(fit)
                return reply
            if not await self.context.shorten(pair, fit, shown, overflow):
                reason = reply.verdict.reason
                if overflow.paid:
                    reason = "length"
                elif overflow.stated and reply.verdict.usage.attempts:
                    reason = "too_long"
                return replace(reply, verdict=replace(reply.verdict, reason=reason))

    async def _answer(
        self, pair: Pair, exchange: bool, deadline: float | None, cut: Cut, answer_tokens: int | None
    ) -> Reply:
        """The answer from the side of the response shown first: from the store if it is there, or else by a call."""
        first, second = (pair.second, pair.first) if exchange else (pair.first, pair.second)
        cut = cut.exchanged() if exchange else cut
        principles: tuple[str, ...] = ()
        if pair.principle:
            principles = (pair.principle,)
        elif self.constitution is not None:
            principles = await large.call(self.constitution.drawn, pair.prompt, first, second)
        call = partial(self._call, pair.prompt, first, second, deadline, cut, answer_tokens, principles)
        if self.store is None:
            return await call()
        how = {**self._parameters, "soft": True} if self.soft else self._parameters
        if self.min_mass != MIN_MASS:  # so that verdicts at the usual one keep their keys
            how = {**how, "min_mass": self.min_mass}
        canary = str(pair.id).startswith(CANARY_ID)
        texts = (pair.prompt, first, second)
        question = await large.call(
            partial(Question.of, canary=canary, cut=cut),
            self.judge_id,
            self.model,
            how,
            self._version(principles),
            *texts,
        )
        left = None if deadline is None else max(0.0, deadline - self.client.clock.now())
        reply = await self.store.once(question, call, timeout_s=left)
        if reply is None:
            return Reply(Verdict.none("deadline"))
        return replace(reply, verdict=replace(reply.verdict, judge=answering_model(self.model, reply.model)))

    def _version(self, principles: tuple[str, ...]) -> str:
        """Of the question's form, for the store's keys."""
        return replace(self.prompt, principles=principles).version if principles else self.prompt.version

    async def _call(
        self,
        prompt: Prompt,
        first: Response,
        second: Response,
        deadline: float | None,
        cut: Cut,
        answer_tokens: int | None,
        principles: tuple[str, ...],
    ) -> Reply:
        """One call, and what it cost."""
        how: dict[str, Any] = {"deadline": deadline, "cut": cut, "answer_tokens": answer_tokens}
        asked = await self._dialect.ask(self.client.complete, prompt, first, second, **how, principles=principles)
        answered = self._answered(asked.completion.model)
        verdict, labels = self.context.cut_off(asked.verdict(answered), answer_tokens), asked.question.labels
        return Reply(
            replace(
                verdict,
                usage=price_call(
                    self.prices, verdict.usage, self.model, asked.completion.reason, asked.completion.model
                ),
                critique=self._without_key(verdict.critique),
            ),
            # A generation that its server ended is no answer of the judge: it is asked again another day.
            replied=asked.parsed is not None and asked.parsed.reason != "unfinished",
            text=await large.call(self._without_key, await large.call(reply_text, asked.completion.choice)),
            labels={"win": labels.win, "loss": labels.loss, "tie": labels.tie},
            sanitised=asked.question.sanitised,
            detail=asked.completion.detail,
            model=asked.completion.model,
            fingerprint=asked.completion.fingerprint,
            currency="" if self.prices is None else self.prices.currency,
            overflow=asked.completion.overflow,
        )

    def _answered(self, said: str) -> str:
        """Who answered, with a warning the first time that it is another model than the one asked for."""
        answered = answering_model(self.model, said)
        if answered != self.model and answered not in self._others:
            self._others.add(answered)
            _logger.warning(
                "judge %s: %s answers as %r; verdicts are stored and priced by that name",
                self.model,
                self.client.exchange.place or "the endpoint",
                answered,
            )
        return answered

    def _without_key(self, text: str) -> str:
        """``text`` without the endpoint's key, in case the endpoint says it back: what it says is kept."""
        key, _ = self.client.exchange.secret()
        return without_secret(text, key)

    def _report(self, verdicts: list[Verdict], answers: Collection[Reply]) -> None:
        """One warning a batch if pairs got no verdict, with the first words the endpoint had for it."""
        broken = sum(answer.sanitised for answer in answers)
        if broken:
            _logger.info("judge %s: sanitised %d control sequences in its questions", self.model, broken)
        reasons = Counter(verdict.reason for verdict in verdicts if verdict.failed)
        if reasons:
            counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            detail = next((f"; first: {answer.detail}" for answer in answers if answer.detail), "")
            place = self.client.exchange.place
            _logger.warning(
                "judge %s%s: no verdict for %d of %d pairs (%s)%s",
                self.model,
                f" (POST {place})" if place else "",
                reasons.total(),
                len(verdicts),
                counts,
                detail,
            )


def _own_tokens(complete: object, tokenizer: object) -> tuple[str, ...]:
    """The special tokens that a judge's completion function or tokenizer is known to have."""
    known = getattr(complete, "tokenizer", None) if tokenizer is None else tokenizer
    return breakable(dict.fromkeys([*getattr(complete, "special_tokens", ()), *tokens_of(known)]))
