"""One request and its reply, over HTTP. What stands around it is the client.

An exchange does not retry, limit, or keep a deadline; :class:`~rmcore._base.client.client.Client` does that for all of
them alike. It turns whatever happens into an :class:`Attempt`, or raises ``TimeoutError`` (no reply in time)
or ``OSError`` (no connection, or a broken one).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from rmcore._base import large
from rmcore._base.client.address import Address
from rmcore._base.client.causes import check_environment, connection_trouble, status_hint
from rmcore._base.client.concurrency import Signal
from rmcore._base.client.error_body import embedded_status, error_code, error_detail, error_words, scrub
from rmcore._base.client.limits import Admission
from rmcore._base.client.options import ClientOptions
from rmcore._base.client.overflow import Overflow, model_context, read_overflow
from rmcore._base.client.resolve import Resolver
from rmcore._base.errors import JudgeError
from rmcore._base.http import Connections
from rmcore._base.retry import should_retry, wait_in_words_s

if TYPE_CHECKING:
    import httpx

__all__ = ["MAX_ERROR_BODY", "OVERLOAD", "Attempt", "Exchange", "HttpExchange", "Send", "failure", "finished"]

_REPLIES = frozenset({200, 201, 203})
"""Statuses that a completion comes with: gateways make a 201 of it (a POST), proxies that change it a 203."""
OVERLOAD = frozenset({429, 503, 529})
"""Statuses that say "too many", as against "broken"."""

MAX_ERROR_BODY = 65_536
_MODELS_S = 5.0
_RETRY_DELAY = re.compile(rb'"retryDelay"\s{0,4}:\s{0,4}"(\d{1,6}(?:\.\d{1,9})?)s"')  # Google's
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(slots=True)
class Attempt:
    """What one try came to: a ``body`` to read (JSON), or a ``reason`` why there is none."""

    body: bytes | None = None
    reason: str = ""
    detail: str = ""
    retry: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 0
    sent: bool = True
    reservation: Admission | None = None
    local: bool = False
    """It failed for want of something of this machine's own."""
    overflow: Overflow | None = None

    @property
    def signal(self) -> Signal:
        """What it says about how many requests the endpoint bears."""
        if self.body is not None:
            return "success"
        if self.reason == "timeout":
            return "timeout"
        if self.local:
            return "refused"  # fewer at once may do
        return "refused" if self.status in OVERLOAD and self.retry else "neutral"

    @property
    def alive(self) -> bool | None:
        """What it says about the endpoint being there at all; ``None``: nothing."""
        if self.local:
            return None
        if self.reason in ("timeout", "connection"):
            return False
        if not self.status:
            return None
        if self.overflow is not None:
            return True  # or whoever writes long responses could take the endpoint from everybody else
        return self.status < 500 and self.status != 401


Send: TypeAlias = Callable[[Mapping[str, object], bytes, str], Awaitable[Attempt]]
"""One request: the payload, the same as JSON, and the key → what came of it."""


class Exchange(Protocol):
    """What a client needs of one way to reach a model."""

    @property
    def name(self) -> str:
        """Who is asked, for reprs and as a judge's name; empty if that is not known."""
        ...

    @property
    def place(self) -> str:
        """Where requests go, for a log line; empty if that is not known."""
        ...

    def secret(self) -> tuple[str, str]:
        """The key as it is now, and a reason if nothing can be sent with it."""
        ...

    def session(self) -> AbstractContextManager[Send]:
        """The means to send one request; what takes time here is not the endpoint's."""
        ...

    async def context_tokens(self, model: str) -> int | None:
        """Tokens of the context of ``model``, if it can be learnt; raises nothing but cancellation."""
        ...

    async def aclose(self) -> None:
        """Close what is open. It can be used again."""
        ...

    def start_afresh(self) -> None:
        """Forget what belongs to another process: this one was forked off."""
        ...


class HttpExchange:
    """Requests to one URL. Safe to use from several event loops, each with its own connections.

    Args:
        address: where they go.
        api_key_env: environment variable that holds the key, read at every call and kept nowhere; ``None`` sends no
            key.
        options: of which ``timeout_s``, ``max_reply_bytes`` and ``transport`` matter here.
        method: POST; GET sends no body.

    Raises:
        JudgeError: an argument is unusable, or the environment names a proxy or certificates that are
            (:func:`~rmcore._base.client.causes.check_environment`).
    """

    def __init__(
        self,
        address: Address,
        api_key_env: str | None,
        options: ClientOptions,
        *,
        method: Literal["POST", "GET"] = "POST",
    ) -> None:
        self.address, self.method = address, method
        if api_key_env is not None and not _ENV_NAME.fullmatch(api_key_env):
            # The value is not shown: it may be the key itself, passed by mistake.
            raise JudgeError("api_key_env: got no variable name, expected the NAME of an environment variable or None")
        self.api_key_env = api_key_env
        self.timeout_s, self.max_reply_bytes = options.timeout_s, options.max_reply_bytes
        self.transport = options.transport
        if self.transport is None:
            check_environment(proxies=not self.address.loopback, certificates=self._certificates)
        self.start_afresh()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("connections", "resolver")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.start_afresh()

    def __repr__(self) -> str:
        return f"base_url={self.base_url!r}, api_key_env={self.api_key_env!r}"

    @property
    def base_url(self) -> str:
        """The base URL, without its query."""
        return self.address.base_url

    @property
    def name(self) -> str:
        """The base URL, with what else of it names a judge."""
        return self.address.name

    @property
    def place(self) -> str:
        """What is posted to."""
        return self.address.url

    def start_afresh(self) -> None:
        """Connections of its own for this process."""
        # trust_env: a proxy cannot reach this machine's own servers
        trust_env = not self.address.loopback
        self.connections = Connections(
            timeout_s=self.timeout_s,
            trust_env=trust_env,
            certificates=self._certificates,
            transport=self.transport,
        )
        self.resolver = Resolver(self.address.url, through_proxy=trust_env, within_s=self.timeout_s)

    @property
    def _certificates(self) -> bool:
        """Whether those that the environment names count; a server on this machine may have one of its own, too."""
        return not self.address.loopback or self.address.url.startswith("https:")

    def secret(self) -> tuple[str, str]:
        """The key as the environment has it now, and a reason if there is none that can be sent."""
        if self.api_key_env is None:
            return "", ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            return "", "no_api_key"
        # Anything else cannot stand in a header; an HTTP library would refuse it in a message that quotes it.
        return (key, "") if key.isascii() and key.isprintable() else ("", "bad_api_key")

    @contextmanager
    def session(self) -> Iterator[Send]:
        """One connection of the running loop."""
        with self.connections.here().client() as client:
            yield partial(self._post, client)

    async def context_tokens(self, model: str) -> int | None:
        """What the endpoint's ``/models`` says of the context of ``model``, if it answers within five seconds."""
        key, reason = self.secret()
        if reason or self.address.key_header != "authorization":  # Azure lists models, not deployments
            return None
        headers = {"accept": "application/json", "accept-encoding": "identity"} | self.address.authorization(key)
        content = bytearray()
        try:
            async with asyncio.timeout(min(self.timeout_s, _MODELS_S)):
                if self.transport is None:
                    await self.resolver.check()
                with self.connections.here().client() as client:
                    async with client.stream("GET", f"{self.base_url}/models", headers=headers) as response:
                        async for chunk in response.aiter_bytes():
                            content += chunk
                            if len(content) > self.max_reply_bytes:
                                return None
            return model_context(json.loads(content), model) if response.status_code == 200 else None
        except Exception:  # a server without such a list is not wrong
            return None

    async def aclose(self) -> None:
        """Close the connections of every loop that still runs; it reconnects when used again."""
        await self.connections.aclose()

    async def _post(self, client: httpx.AsyncClient, payload: Mapping[str, object], body: bytes, key: str) -> Attempt:
        import httpx

        if self.transport is None:
            await self.resolver.check()
        try:
            return await self._exchange(client, body, key)
        except httpx.TimeoutException:
            raise TimeoutError from None
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
            # Without its words: messages of HTTP libraries can quote headers, and one of them holds the key.
            raise connection_trouble(error, self.address.url) from None

    async def _exchange(self, client: httpx.AsyncClient, body: bytes, key: str) -> Attempt:
        # Uncompressed, so that the size limit is a limit on memory: a compressed reply can unfold a thousandfold.
        sent = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        sent |= self.address.authorization(key)
        url = self.address.url
        content = body if self.method == "POST" else None
        async with client.stream(self.method, url, content=content, headers=sent) as response:
            failed = response.status_code not in _REPLIES
            if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                detail = "a compressed reply, although none was asked for; switch that off at the server or its proxy"
                if failed:  # what it says is not read; that it failed, and how, its status says
                    return self._failed(response, b"", key, detail)
                return Attempt(None, "bad_encoding", detail, headers=response.headers, status=200)
            limit = MAX_ERROR_BODY if failed else self.max_reply_bytes
            held, complete = bytearray(), True
            async for chunk in response.aiter_bytes():
                held += chunk
                if len(held) > limit:
                    complete = False
                    break
        status, headers = response.status_code, response.headers
        if not failed:
            if complete:
                return await large.call(finished, bytes(held), key, headers)
            return Attempt(reason="reply_too_large", headers=headers, status=status)
        return self._failed(response, bytes(held), key, error_detail(bytes(held[:limit]), key))

    def _failed(self, response: httpx.Response, content: bytes, key: str, said: str) -> Attempt:
        """An error status, with what the endpoint ``said`` and what to do about it."""
        status, headers, explained = response.status_code, response.headers, bool(error_code(content))
        hint = scrub(
            status_hint(status, self.address.url, headers, self.api_key_env, explained=explained, key=key), key
        )
        return failure(status, content, "; ".join(word for word in (said, hint) if word), headers)


_ALIVE = re.compile(rb"\s*(?::[^\n]*\n\s*)+(?=\{)")


def finished(content: bytes, key: str, headers: Mapping[str, str]) -> Attempt:
    """A whole reply of status 200, unless it holds an error of another status: that one counts then.

    Lines that a gateway sends to keep a connection alive (``: keep-alive``) are no part of it.
    """
    if content[:64].lstrip().startswith(b":") and (found := _ALIVE.match(content)) is not None:
        content = content[found.end() :]
    status = embedded_status(content)
    if status is not None:
        return failure(status, content, error_detail(content, key), headers)
    return Attempt(body=content, headers=headers, status=200)


def failure(status: int, content: bytes, detail: str, headers: Mapping[str, str], words: str | None = None) -> Attempt:
    """An error status as an attempt; ``words`` are the error's own if ``content`` does not hold them."""
    code = error_code(content)
    reason = code if code == "insufficient_quota" else f"http_{status}"
    overflow = read_overflow(status, code, error_words(content) if words is None else words)
    told_to = {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())  # OpenAI, Anthropic
    retry = (should_retry(status, code) if told_to is None else told_to) and overflow is None
    if retry and status in OVERLOAD and not ("retry-after" in headers or "retry-after-ms" in headers):
        told = _RETRY_DELAY.search(content[:MAX_ERROR_BODY])
        wait = float(told[1]) if told else wait_in_words_s(error_words(content) if words is None else words)
        headers = dict(headers) if wait is None else {**headers, "retry-after": str(wait)}
    return Attempt(None, reason, detail, retry, headers, status, overflow=overflow)
