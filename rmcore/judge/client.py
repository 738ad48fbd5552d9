"""One chat completion over HTTP: authorised, bounded in time, size and number, tried again when that can help.

This file knows HTTP and nothing of pairs or verdicts. Rate limits, adaptive concurrency and a circuit breaker belong
around :meth:`ChatClient.complete`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import random
import re
import threading
import urllib.parse
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rmcore.errors import JudgeError
from rmcore.judge.base import JudgeUsage
from rmcore.judge.clock import Clock, SystemClock
from rmcore.judge.reply import Completion, error_code, error_detail, read_completion
from rmcore.judge.retry import RetryPolicy, retry_delay_s, should_retry

if TYPE_CHECKING:
    import httpx

__all__ = ["ChatClient", "check_base_url"]

_logger = logging.getLogger(__name__)
_MAX_ERROR_BODY = 65_536
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(slots=True)
class _Attempt:
    """What one HTTP exchange came to: a ``body`` to read, or a ``reason`` why there is none."""

    body: bytes | None = None
    reason: str = ""
    detail: str = ""
    retry: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _PerLoop:
    """Connections and the count of calls belong to one event loop and must not cross to another."""

    client: httpx.AsyncClient
    slots: asyncio.Semaphore


class ChatClient:
    """Posts to ``{base_url}/chat/completions``. Safe to use from several event loops, each with its own connections.

    Args:
        base_url: as in ``https://api.openai.com/v1``; http or https, without credentials, query or fragment.
        api_key_env: environment variable that holds the bearer key, read at every call and kept nowhere; ``None``
            sends no key.
        concurrency: calls in progress at most, per event loop. A call keeps its place while it waits to try again, so
            a server that asks for patience gets it.
        timeout_s: for one attempt, connection and whole reply together.
        max_reply_bytes: a longer reply is dropped while it comes in.
        retry: see :class:`~rmcore.judge.retry.RetryPolicy`.
        transport: an ``httpx.AsyncBaseTransport`` instead of the network. It must suit every loop it is used on.
        clock, random_source: for deadlines and waits, and for jitter.

    Raises:
        JudgeError: an argument is unusable.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str | None,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        max_reply_bytes: int = 4 << 20,
        retry: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
        random_source: random.Random | None = None,
    ) -> None:
        self.base_url, self._loopback = check_base_url(base_url)
        if api_key_env is not None and not _ENV_NAME.fullmatch(api_key_env):
            # The value is not shown: it may be the key itself, passed by mistake.
            raise JudgeError("api_key_env: got no variable name, expected the NAME of an environment variable or None")
        if concurrency < 1 or not timeout_s > 0 or max_reply_bytes < 1:
            raise JudgeError("concurrency, timeout_s and max_reply_bytes: got one that is not positive")
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.max_reply_bytes = max_reply_bytes
        self.retry = retry or RetryPolicy()
        self.clock: Clock = clock or SystemClock()
        self._transport = transport
        self._random = random_source or random.Random()
        self._forget_connections()

    def _forget_connections(self) -> None:
        self._lock = threading.Lock()
        self._per_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _PerLoop] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a copy sent to another process opens connections of its own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_per_loop")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_connections()

    async def complete(self, payload: Mapping[str, object], *, deadline: float | None = None) -> Completion:
        """Post ``payload`` and return the reply, or a completion without choice that says why there is none.

        Never raises because of the network or the server; cancellation goes through.

        Args:
            payload: the JSON body.
            deadline: on ``clock.now()``'s scale. Nothing is sent after it, no attempt outlives it, and no wait is begun
                that would pass it.
        """
        key, reason = self._key()
        if reason:
            return Completion(None, reason, f"environment variable {self.api_key_env}")
        body = json.dumps(payload).encode("ascii")  # ASCII: a lone surrogate is escaped instead of failing here
        state = self._state()
        try:
            async with asyncio.timeout(self._left(deadline)):
                await state.slots.acquire()
        except TimeoutError:
            return Completion(None, "deadline")
        try:
            return await self._with_retries(state.client, body, key, deadline)
        finally:
            state.slots.release()

    async def aclose(self) -> None:
        """Close the connections of every loop that still runs. The client can be used again; it then reconnects."""
        with self._lock:
            states = list(self._per_loop.items())
            self._per_loop.clear()
        here = asyncio.get_running_loop()
        for loop, state in states:
            if loop is here:
                await state.client.aclose()
            elif loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(state.client.aclose(), loop)
                await asyncio.wrap_future(closing)

    async def _with_retries(
        self, client: httpx.AsyncClient, body: bytes, key: str, deadline: float | None
    ) -> Completion:
        started, attempts = self.clock.now(), 0
        failed = _Attempt(reason="deadline")
        while True:
            left = self._left(deadline)
            if left is not None and left <= 0:
                break
            failed = await self._attempt(client, body, key, left)
            attempts += 1
            if failed.body is not None or not failed.retry:
                break
            delay = retry_delay_s(self.retry, attempts - 1, failed.headers, self.clock.wall(), self._random.random())
            left = self._left(deadline)
            if delay is None or (left is not None and delay >= left):
                break
            _logger.debug("judge call failed (%s), next try in %.2f s", failed.reason, delay)
            await self.clock.sleep(delay)
        seconds = self.clock.now() - started
        usage = JudgeUsage(calls=1, attempts=attempts, seconds=seconds, latencies_s=(seconds,))
        if failed.body is None:
            return Completion(None, failed.reason, failed.detail, usage)
        return read_completion(failed.body, usage, key)

    async def _attempt(self, client: httpx.AsyncClient, body: bytes, key: str, left: float | None) -> _Attempt:
        """One exchange, at most ``timeout_s`` and at most ``left`` seconds long."""
        import httpx

        cut = left is not None and left < self.timeout_s
        try:
            async with asyncio.timeout(left if cut else self.timeout_s):
                return await self._exchange(client, body, key)
        except (TimeoutError, httpx.TimeoutException):
            return _Attempt(reason="deadline" if cut else "timeout", retry=not cut)
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError, OSError):
            return _Attempt(reason="connection", retry=True)
        except Exception as error:  # a transport of the user's own may raise anything
            # The type only: messages of HTTP libraries can quote headers, and one of them holds the key.
            return _Attempt(reason=f"error_{type(error).__name__}")

    async def _exchange(self, client: httpx.AsyncClient, body: bytes, key: str) -> _Attempt:
        # Uncompressed, so that the size limit is a limit on memory: a compressed reply can unfold a thousandfold.
        headers = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        url = self.base_url + "/chat/completions"
        async with client.stream("POST", url, content=body, headers=headers) as response:
            if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                return _Attempt(reason="bad_encoding")
            failed = response.status_code != 200
            limit = _MAX_ERROR_BODY if failed else self.max_reply_bytes
            content, complete = bytearray(), True
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > limit:
                    complete = False
                    break
        if not failed:
            return _Attempt(body=bytes(content)) if complete else _Attempt(reason="reply_too_large")
        status, code = response.status_code, error_code(bytes(content))
        reason = code if code == "insufficient_quota" else f"http_{status}"
        detail = error_detail(bytes(content[:limit]), key)
        return _Attempt(None, reason, detail, should_retry(status, code), response.headers)

    def _key(self) -> tuple[str, str]:
        """The key as the environment has it now, and a reason if there is none that can be sent."""
        if self.api_key_env is None:
            return "", ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            return "", "no_api_key"
        # Anything else cannot stand in a header; an HTTP library would refuse it in a message that quotes it.
        return (key, "") if key.isascii() and key.isprintable() else ("", "bad_api_key")

    def _left(self, deadline: float | None) -> float | None:
        return None if deadline is None else deadline - self.clock.now()

    def _state(self) -> _PerLoop:
        """The running loop's connections, made on first use. Those of loops that have ended are dropped."""
        import httpx

        loop = asyncio.get_running_loop()
        with self._lock:
            for old in [known for known in self._per_loop if known.is_closed()]:
                del self._per_loop[old]
            state = self._per_loop.get(loop)
            if state is None:
                client = httpx.AsyncClient(
                    transport=self._transport,
                    timeout=self.timeout_s,
                    limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
                    follow_redirects=False,  # a redirect would carry prompts, and perhaps the key, to another host
                    trust_env=not self._loopback,  # a proxy cannot reach this machine's own servers
                )
                state = self._per_loop[loop] = _PerLoop(client, asyncio.Semaphore(self.concurrency))
            return state


def check_base_url(base_url: str) -> tuple[str, bool]:
    """``base_url`` without a trailing slash, and whether it is this machine. Warns about plain http to another one.

    Raises:
        JudgeError: not an http(s) URL, or one with credentials, a query or a fragment. The URL is not quoted then.
    """
    expected = "expected an http:// or https:// URL such as https://host/v1"
    if not isinstance(base_url, str) or any(c.isspace() or not c.isprintable() for c in base_url):
        raise JudgeError(f"base_url: got a value that is no URL, {expected}")
    try:
        parts = urllib.parse.urlsplit(base_url)
        host = parts.hostname
        _ = parts.port  # raises on nonsense
    except ValueError:
        raise JudgeError(f"base_url: got a malformed URL, {expected}") from None
    if "@" in parts.netloc:
        raise JudgeError(f"base_url: got a URL with credentials, {expected}. Put the key into an environment variable")
    if parts.query or parts.fragment:
        raise JudgeError(f"base_url: got a URL with a query or a fragment, {expected}")
    if parts.scheme not in ("http", "https") or not host:
        raise JudgeError(f"base_url: got a URL without http(s) scheme or host, {expected}")
    loopback = _is_loopback(host)
    if parts.scheme == "http" and not loopback:
        _logger.warning("judge at %s: plain http, so prompts and key cross the network unencrypted", host)
    return base_url.rstrip("/"), loopback


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
