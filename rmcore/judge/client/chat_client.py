"""One chat completion through a client's gates (:mod:`rmcore._base.client.client`); nothing of pairs or verdicts."""

from __future__ import annotations

import threading
import urllib.parse
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rmcore._base import large, tracing
from rmcore._base.client.address import Address
from rmcore._base.client.client import Client
from rmcore._base.client.exchange import Attempt, HttpExchange
from rmcore._base.client.limits import Used
from rmcore._base.client.options import ClientOptions
from rmcore._base.client.overflow import Overflow
from rmcore.judge.base import JudgeUsage
from rmcore.judge.client.reply import Completion, read_completion
from rmcore.judge.client.tokens import believable

__all__ = ["ChatClient"]


class ChatClient(Client):
    """Completions from one exchange, within ``options``. Safe to use from several event loops and threads."""

    @classmethod
    def over_http(cls, base_url: str, api_key_env: str | None, options: ClientOptions | None = None) -> ChatClient:
        """Of an OpenAI-compatible endpoint: posts to ``{base_url}/chat/completions``.

        ``base_url`` as in ``https://api.openai.com/v1``; the forms it may have, Azure's among them, are in
        :mod:`rmcore._base.client.address`. For the rest see :class:`~rmcore._base.client.exchange.HttpExchange`.
        """
        options = options or ClientOptions()
        return cls(HttpExchange(Address.of(base_url), api_key_env, options), options)

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._completions: deque[int] = deque(maxlen=64)  # tokens of the latest replies
        self._completions_lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_completions", "_completions_lock")
        return {k: v for k, v in super().__getstate__().items() if k not in own}

    async def complete(
        self, payload: Mapping[str, object], *, deadline: float | None = None, tokens_estimate: int | None = None
    ) -> Completion:
        """Send ``payload`` and return the reply, or a completion without choice that says why there is none.

        Never raises because of the network or the server; cancellation goes through and ends the request.

        Args:
            payload: the request, JSON values.
            deadline: on ``clock.now()``'s scale. No attempt is begun that is not likely to end before it, none outlives
                it, and no wait is begun that would pass it.
            tokens_estimate: what one attempt may use, prompt and completion, for ``tokens_per_minute``. Default: a
                quarter of the payload's bytes and its ``max_tokens`` or ``max_completion_tokens``; without those, the
                largest of the latest completions. The reply's own count replaces it.
        """
        key, reason = self.exchange.secret()
        if reason:
            return Completion(None, reason, f"environment variable {getattr(self.exchange, 'api_key_env', None)}")
        self._check_process()
        # ASCII: a lone surrogate is escaped instead of failing here.
        body = await large.call(_encoded, payload)
        tokens = self._tokens(payload, body) if tokens_estimate is None else tokens_estimate
        model = str(payload.get("model", ""))
        with tracing.span(f"chat {model}", client=True, **self._asked(payload, model)) as span:
            completion = await self._completed(payload, body, key, deadline, tokens)
            _note(span, completion)
        return completion

    async def _completed(
        self, payload: Mapping[str, object], body: bytes, key: str, deadline: float | None, tokens: int
    ) -> Completion:
        call = await self.call(payload, body, key, deadline=deadline, tokens=tokens)
        last, attempts, seconds = call.last, call.attempts, call.seconds
        usage = JudgeUsage(calls=1, attempts=attempts, seconds=seconds, latencies_s=(seconds,))
        if last.body is None:
            overflow = last.overflow
            if last.reason == "over_token_limit":  # as of a model whose context is no larger than that
                overflow = Overflow(self._limits.tokens_per_minute, tokens)
            return Completion(None, last.reason, last.detail, usage if attempts else JudgeUsage(), overflow=overflow)
        completion = await large.call(read_completion, last.body, usage, key)
        completion = replace(completion, usage=believable(completion.usage, payload, len(body), len(last.body)))
        self._settle(last, completion.usage)
        return completion

    def _asked(self, payload: Mapping[str, object], model: str) -> dict[str, str | float | None]:
        """What a span says of the question, by OpenTelemetry's conventions for generative models."""
        limits = (payload.get(name) for name in ("max_tokens", "max_completion_tokens", "temperature"))
        most, other, temperature = (value if isinstance(value, (int, float)) else None for value in limits)
        url = urllib.parse.urlsplit(self.exchange.place)
        return {
            "gen_ai__operation__name": "chat",
            "gen_ai__provider__name": "openai",  # whose interface it is
            "gen_ai__request__model": model,
            "gen_ai__request__max_tokens": most or other,
            "gen_ai__request__temperature": temperature,
            "server__address": url.hostname,
            "server__port": url.port,
        }

    def _tokens(self, payload: Mapping[str, object], body: bytes) -> int:
        """What one attempt may use, from above rather than from below."""
        given = [payload.get(name) for name in ("max_tokens", "max_completion_tokens")]
        most = [value for value in given if isinstance(value, int) and value > 0]
        if most:
            return len(body) // 4 + max(most)
        with self._completions_lock:
            return len(body) // 4 + max(self._completions, default=0)

    def _settle(self, attempt: Attempt, usage: JudgeUsage) -> None:
        used = usage.prompt_tokens + usage.completion_tokens
        if used and attempt.reservation is not None:
            parts = Used(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens)
            attempt.reservation.settle(used, parts)
            with self._completions_lock:
                self._completions.append(usage.completion_tokens)


def _note(span: tracing.Span, completion: Completion) -> None:
    """What a span says of the answer."""
    usage = completion.usage
    span.set(
        gen_ai__response__model=completion.model or None,
        gen_ai__usage__input_tokens=usage.prompt_tokens or None,
        gen_ai__usage__output_tokens=usage.completion_tokens or None,
        rmcore__attempts=usage.attempts,
    )
    if completion.reason:
        span.fail(completion.reason)


def _encoded(payload: Mapping[str, object]) -> bytes:
    return large.ascii_json(payload).encode("ascii")
