"""A judge behind any OpenAI-compatible chat-completions endpoint."""

from __future__ import annotations

import asyncio
import json
import logging
from asyncio import TaskGroup
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Never

from rmcore._base.errors import InputError, JudgeError
from rmcore._base.loop import run_sync
from rmcore._base.prompt import Prompt, Response
from rmcore.judge.base import Pair, Verdict
from rmcore.judge.client.chat_client import ChatClient
from rmcore.judge.client.completions import CompletionFunction
from rmcore.judge.client.exchange import FunctionExchange
from rmcore.judge.client.options import ClientOptions
from rmcore.judge.client.secrets import without_secret
from rmcore.judge.orders import Orders, check_orders, combine_orders, exchanged, shown_exchanged
from rmcore.judge.question.dialect import Dialect
from rmcore.judge.question.prompt import JudgePrompt, Output
from rmcore.judge.question.rules import rule_verdict
from rmcore.judge.question.sanitise import breakable
from rmcore.judge.store.prices import PriceTable, answering_model, price_call
from rmcore.judge.store.records import Question, Reply, reply_text
from rmcore.judge.wrappers.canary_pairs import CANARY_ID

if TYPE_CHECKING:
    from types import TracebackType

    from rmcore.judge.store.store import VerdictStore

__all__ = ["ChatJudge"]

_logger = logging.getLogger(__name__)
_CLOSE_S = 5.0
_RESERVED = frozenset({"model", "messages", "stream", "n"})


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
            limits (:class:`~rmcore.judge.client.options.ClientOptions`).
        orders: ``"both"`` (two calls a pair) or ``"one"`` (a stable hash of the texts picks the order).
        prompt: the question's template.
        output: ``"text"``, or ``"json_schema"`` for a structured reply under a strict schema. An endpoint that refuses
            the schema or answers it with nothing is asked for text instead. ``None``: what ``prompt`` says.
        soft: read how sure the judge is from the log-probabilities of its label (:mod:`rmcore.judge.question.soft`);
            where that cannot be had the verdict is hard, with a note.
        top_logprobs: alternatives to ask for with ``soft``. Most endpoints allow 5, some 20.
        rules: decide blank and identical responses without a call.
        max_response_chars: of longer responses the judge is shown the beginning, and told so. ``None``: what ``prompt``
            says.
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
        output: Output | None = None,
        soft: bool = False,
        top_logprobs: int = 5,
        rules: bool = True,
        max_response_chars: int | None = None,
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
        _refuse(unknown)
        options = ClientOptions() if client is None else client
        if not isinstance(model, str) or not model:
            raise JudgeError(f"model: got {model!r}, expected the name of a model")
        if deadline_s is not None and not deadline_s > 0:
            raise JudgeError(f"deadline_s: got {deadline_s}, expected seconds above 0, or None")
        if max_tokens is not None and max_completion_tokens is not None:
            raise JudgeError("max_tokens and max_completion_tokens: got both, expected at most one")
        self.model = model
        self.orders: Orders = check_orders(orders)
        given_prompt = prompt or JudgePrompt()
        self.prompt = replace(
            given_prompt,
            output=given_prompt.output if output is None else output,
            max_response_chars=given_prompt.max_response_chars if max_response_chars is None else max_response_chars,
            special_tokens=given_prompt.special_tokens or breakable(getattr(complete, "special_tokens", ())),
        )
        self.soft = soft
        self.rules = rules
        self.deadline_s = deadline_s
        given = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "max_completion_tokens": max_completion_tokens,
        }
        if soft:
            if not isinstance(top_logprobs, int) or not 2 <= top_logprobs <= 20:
                raise JudgeError(f"top_logprobs: got {top_logprobs!r}, expected a number from 2 to 20")
            given |= {"logprobs": True, "top_logprobs": top_logprobs}
        self._parameters: dict[str, object] = {name: value for name, value in given.items() if value is not None}
        self._parameters |= _check_extra(extra_body or {}, self._parameters.keys())
        self.client = _make_client(base_url, api_key_env, complete, options)
        self._dialect = Dialect(model, self.prompt, self._parameters, soft, options.random_source)
        if judge_id is not None and not (isinstance(judge_id, str) and judge_id):
            raise JudgeError(f"judge_id: got {judge_id!r}, expected a name")
        self.judge_id = judge_id or self.client.exchange.name
        if store is not None and not self.judge_id:
            raise JudgeError("judge_id: got nothing, expected a name for the store, since `complete` has none")
        self.prices = None if prices is None else PriceTable.of(prices)
        self._others: set[str] = set()  # models that answered and were not asked for
        self._own_store = isinstance(store, (str, Path))
        self.store = _open_store(store)

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
        pairs = list(pairs)
        deadline = None if self.deadline_s is None else self.client.clock.now() + self.deadline_s
        ruled = {index: v for index, pair in enumerate(pairs) if self.rules and (v := rule_verdict(pair)) is not None}
        self._dialect.add(Counter(verdict.reason for verdict in ruled.values()))
        asked = {index: self._questions(index, pair) for index, pair in enumerate(pairs) if index not in ruled}
        queue = deque(question for questions in asked.values() for question in questions)
        answers: dict[_Call, Reply] = {}

        async def worker() -> None:
            # Workers, not a task a question: a batch of any size holds `concurrency` rendered prompts at a time.
            while queue:
                question = queue.popleft()
                answers[question] = await self._ask(pairs[question.pair], question.exchanged, deadline)

        async with TaskGroup() as group:
            for _ in range(min(len(queue), self.client.options.concurrency)):
                group.create_task(worker())
        for index, questions in asked.items():
            parts = [answers[question].verdict for question in questions]
            ruled[index] = parts[0] if len(parts) == 1 else combine_orders(*parts)
        verdicts = [ruled[index] for index in range(len(pairs))]
        self._report(verdicts, answers.values())
        return verdicts

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

    def _questions(self, index: int, pair: Pair) -> list[_Call]:
        if self.orders == "both":
            return [_Call(index, False), _Call(index, True)]
        try:
            return [_Call(index, shown_exchanged(pair))]
        except InputError:
            return [_Call(index, False)]  # it fails where it is asked, with the reason

    async def _ask(self, pair: Pair, exchange: bool, deadline: float | None) -> Reply:
        """One question, from the texts to the verdict from ``pair.first``'s side. Raises nothing but cancellation."""
        try:
            if pair.deadline is not None:
                deadline = pair.deadline if deadline is None else min(deadline, pair.deadline)
            first, second = (pair.second, pair.first) if exchange else (pair.first, pair.second)
            try:
                reply = await self._answer(pair, first, second, deadline)
            except InputError as error:
                # Without its store a judge buys nothing: what could not be kept would be bought again.
                reason = "store" if self.store is not None and isinstance(error, _store_error()) else "bad_pair"
                return Reply(Verdict.none(reason), detail=str(error))
            return replace(reply, verdict=exchanged(reply.verdict)) if exchange else reply
        except Exception as error:  # the contract of a judge: a pair's trouble stays with the pair
            return Reply(Verdict.none(f"error_{type(error).__name__}"))

    async def _answer(self, pair: Pair, first: Response, second: Response, deadline: float | None) -> Reply:
        """The answer from the side of the response shown first: from the store if it is there, or else by a call."""
        if self.store is None:
            return await self._call(pair.prompt, first, second, deadline)
        how = {**self._parameters, "soft": True} if self.soft else self._parameters
        canary = str(pair.id).startswith(CANARY_ID)
        question = Question.of(
            self.judge_id, self.model, how, self.prompt.version, pair.prompt, first, second, canary=canary
        )
        left = None if deadline is None else max(0.0, deadline - self.client.clock.now())
        reply = await self.store.once(
            question, lambda: self._call(pair.prompt, first, second, deadline), timeout_s=left
        )
        if reply is None:
            return Reply(Verdict.none("deadline"))
        return replace(reply, verdict=replace(reply.verdict, judge=answering_model(self.model, reply.model)))

    async def _call(self, prompt: Prompt, first: Response, second: Response, deadline: float | None) -> Reply:
        """One call, and what it cost."""
        asked = await self._dialect.ask(self.client.complete, prompt, first, second, deadline=deadline)
        answered = self._answered(asked.completion.model)
        verdict, labels = asked.verdict(answered), asked.question.labels
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
            text=self._without_key(reply_text(asked.completion.choice)),
            labels={"win": labels.win, "loss": labels.loss, "tie": labels.tie},
            sanitised=asked.question.sanitised,
            detail=asked.completion.detail,
            model=asked.completion.model,
            fingerprint=asked.completion.fingerprint,
            currency="" if self.prices is None else self.prices.currency,
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


def _make_client(
    base_url: str | None, api_key_env: str | None, complete: CompletionFunction | None, options: ClientOptions
) -> ChatClient:
    if not isinstance(options, ClientOptions):
        raise JudgeError(f"client: got {type(options).__name__}, expected ClientOptions")
    if (base_url is None) == (complete is None):
        raise JudgeError(f"base_url, complete: got {'neither' if complete is None else 'both'}, expected one of them")
    if complete is not None:
        return ChatClient(FunctionExchange(complete), options)
    assert base_url is not None
    return ChatClient.over_http(base_url, api_key_env, options)


def _refuse(unknown: Mapping[str, object]) -> None:
    """TypeError for keyword arguments that there are not, or not any more."""
    moved = [name for name in unknown if name in {option.name for option in fields(ClientOptions)}]
    if moved:
        names = ", ".join(f"{name}=..." for name in moved)
        raise TypeError(f"ChatJudge: {', '.join(moved)} moved into the client's options: client=ClientOptions({names})")
    if unknown:
        raise TypeError(f"ChatJudge: got unexpected keyword arguments {', '.join(unknown)}")


def _open_store(store: VerdictStore | str | Path | None) -> VerdictStore | None:
    """The store, opened if it is a path. Without one, sqlite is not even imported."""
    if store is None:
        return None
    from rmcore.judge.store.store import VerdictStore

    if isinstance(store, (str, Path)):
        return VerdictStore(store)
    if not isinstance(store, VerdictStore):
        raise JudgeError(f"store: got {type(store).__name__}, expected a VerdictStore, a path or None")
    return store


def _store_error() -> type[Exception]:
    from rmcore.judge.store.store import StoreError

    return StoreError


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
