"""What stands between the network and the application: who may come in, how much they may send, who has gone away.

One ASGI middleware, so that it holds for every route: bearer token, host names, bounded bodies, cancellation when the
client disconnects, errors in one form, request figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
from collections import Counter
from typing import Any

from prometheus_client import Histogram
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rmcore._base.clock import Clock, SystemClock
from rmcore.integrations.server.doubts import AGAIN
from rmcore.integrations.server.members import RESENT, MemberResult
from rmcore.integrations.server.schema import OPEN_PATHS, error_response
from rmcore.integrations.server.settings import ServeSettings

__all__ = ["Guard", "follow", "lost", "reached"]

log = logging.getLogger(__name__)

_FOLLOWED = "rmcore.followed"
_AGAIN = AGAIN.encode()


def follow(scope: Scope, result: MemberResult) -> None:
    """Have a member told if the answer to this request does not go out as a success to a client that is there."""
    scope.setdefault(_FOLLOWED, []).append(result)


def lost(scope: Scope) -> None:
    """The answer did not reach its client, as somebody found out later."""
    for result in scope.get(_FOLLOWED, ()):
        result.lost()


def reached(scope: Scope) -> None:
    """The answer has reached its client, as somebody found out later."""
    for result in scope.get(_FOLLOWED, ()):
        result.reached()


class Guard:
    """The middleware.

    Args:
        app: the application.
        settings: token, host names and limits.
        paths: what requests are counted under; others count as ``other``.
        seconds: where the times to answer go, by ``path``.
        clock: of the latencies; a seam for tests.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        paths: frozenset[str],
        seconds: Histogram,
        clock: Clock | None = None,
    ) -> None:
        self.app, self.settings, self.paths = app, settings, paths
        self.clock: Clock = clock or SystemClock()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.active = 0
        self.disconnected = 0
        self._seconds = seconds
        # Digests are of one length, so that comparing them tells nothing of the token's.
        self._token = None if settings.token is None else _digest(settings.token.encode("ascii"))
        self._hosts = {_host(name) for name in (*settings.hosts, settings.host)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        status, finished = 0, False

        async def noting_send(message: Message) -> None:
            nonlocal status, finished
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)

        began = self.clock.now()
        self.active += 1
        gone = False
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                try:
                    body = await self._body(scope, receive)
                    gone = body is None
                    if body is not None:
                        gone = not await self._answer(scope, body, receive, noting_send)
                except _RefusedError as refused:
                    refusal = refused.response
            if refusal is not None:
                await refusal(scope, receive, noting_send)
        except _LetGoError:
            log.warning("the answer to a request to %s was cancelled, though its client is there", path)
            if not status:
                again = error_response(503, "cancelled", "the answer was cancelled; ask again", {"Retry-After": "1"})
                await again(scope, receive, noting_send)
        except Exception:
            # The trace may hold texts of the request, so it is for the log only.
            log.exception("a request to %s failed", path)
            if not status:
                await error_response(500, "internal", "internal error")(scope, receive, noting_send)
        finally:
            self.active -= 1
            self.disconnected += gone
            if gone or not finished or status >= 300:
                lost(scope)
            self.requests[path, "disconnected" if gone else str(status)] += 1
            self._seconds.labels(path).observe(self.clock.now() - began)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = scope["headers"]
        if self._token is None:
            host = next((value for name, value in headers if name == b"host"), b"").decode("latin-1")
            if _host(_without_port(host)) not in self._hosts:
                return error_response(421, "misdirected", "this server is not known by the name in the Host header")
            return None
        if scope["path"] in OPEN_PATHS:
            return None
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        right = hmac.compare_digest(_digest(token.strip()), self._token)
        if right and scheme.lower() == b"bearer":
            return None
        return error_response(401, "unauthorized", "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away. Raises _RefusedError for one that is too long or too slow."""
        limit = self.settings.max_body
        # The connection stays: to close it while the body still comes would reset it, and the answer be lost with it.
        too_long = error_response(413, "too_large", f"the body may have {limit} bytes")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise _RefusedError(too_long)
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.read_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _RefusedError(too_long)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            slow = error_response(408, "timeout", "the body did not arrive in time", {"Connection": "close"})
            raise _RefusedError(slow) from None

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Run the application; False if the client went away before it was done, which cancels it."""
        left = [{"type": "http.request", "body": body, "more_body": False}]
        hung_up = asyncio.Event()

        async def replay() -> Message:
            if left:
                return left.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            hung_up.set()

        again = any(name == _AGAIN for name, _ in scope["headers"])
        token = RESENT.set(again or RESENT.get())
        try:
            answering = asyncio.ensure_future(_run(self.app, scope, replay, send))
        finally:
            RESENT.reset(token)
        watching = asyncio.ensure_future(watch())
        both: set[asyncio.Future[Any]] = {answering, watching}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if answering.cancelled():
                raise _LetGoError
            if answering.done():
                answering.result()
                return True
            return False
        finally:
            for task in both:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({answering})
            if answering.done() and not answering.cancelled():
                answering.exception()  # looked at: what it raised last matters to nobody
            if watching.done() and not watching.cancelled():
                watching.exception()


class _RefusedError(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class _LetGoError(Exception):
    """Somebody else cancelled the answer."""


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _host(name: str) -> str:
    """One spelling of a host name or address."""
    bare = name.lower().strip("[]").rstrip(".")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        return bare
