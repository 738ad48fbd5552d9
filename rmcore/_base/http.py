"""HTTP: the address checked before anything is sent to it, and connections, each belonging to one event loop.

httpx's pool looks at every one of its connections whenever a request begins or ends, so a request costs the more the
larger the pool is: at 2,000 requests in flight over 250 connections a pool 6.7 ms of CPU, over 16 a pool 2.2 ms, and
with all in one pool the same run did not end. So a loop gets pools of 16, as many as the requests in flight need.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import threading
import urllib.parse
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING

from rmcore._base.early_reply import read_while_sending
from rmcore._base.errors import JudgeError

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = ["Connections", "LoopConnections", "check_base_url", "is_loopback"]

_logger = logging.getLogger(__name__)

_POOL = 16


class LoopConnections:
    """The pools of one event loop. Not to be used on another."""

    def __init__(
        self, *, timeout_s: float, trust_env: bool, certificates: bool, transport: httpx.AsyncBaseTransport | None
    ) -> None:
        self._timeout = timeout_s
        self._trust_env, self._certificates = trust_env, certificates
        self._transport = transport
        self._verify: ssl.SSLContext | None = None
        self._clients: list[httpx.AsyncClient] = []
        self._load: list[int] = []

    def __len__(self) -> int:
        return len(self._clients)

    @contextmanager
    def client(self) -> Iterator[httpx.AsyncClient]:
        """A client with a free connection, for one request."""
        k = next((k for k, load in enumerate(self._load) if load < _POOL or self._transport is not None), None)
        if k is None:
            k = len(self._clients)
            self._clients.append(self._new())
            self._load.append(0)
        self._load[k] += 1
        try:
            yield self._clients[k]
        finally:
            self._load[k] -= 1

    async def aclose(self) -> None:
        """Close all connections."""
        # The lists stay: a request that is still ending gives its place back.
        for client in self._clients:
            await client.aclose()

    def _new(self) -> httpx.AsyncClient:
        import httpx

        if self._verify is None and self._transport is None:
            self._verify = httpx.create_ssl_context(trust_env=self._certificates)  # slow to make, so shared by all
        client = httpx.AsyncClient(
            transport=self._transport,
            timeout=self._timeout,
            # A transport of the user's own may hold its requests back as it likes.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_POOL),
            verify=True if self._verify is None else self._verify,
            follow_redirects=False,  # a redirect would carry prompts, and perhaps the key, to another host
            trust_env=self._trust_env,
        )
        if self._transport is None:
            read_while_sending(client)
        # No request depends on an earlier one: a load balancer's cookie would tie all calls to one backend, and cookies
        # that a server never stops adding make a header that it refuses.
        client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
        return client


class Connections:
    """:class:`LoopConnections` for each event loop, made on first use; those of loops that have ended are dropped.

    Args:
        timeout_s: of each step of a request.
        trust_env: whether proxies and certificates named in the environment are used.
        certificates: whether certificates are, if not as ``trust_env`` says.
        transport: instead of the network; then there is one pool a loop.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        trust_env: bool,
        certificates: bool | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout = timeout_s
        self._trust_env = trust_env
        self._certificates = trust_env if certificates is None else certificates
        self.transport = transport
        self._lock = threading.Lock()
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopConnections] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        """Loops with connections."""
        return len(self._loops)

    def here(self) -> LoopConnections:
        """Those of the running loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            found = self._loops.get(loop)
            if found is None:
                for old in [known for known in self._loops if known.is_closed()]:
                    del self._loops[old]
                found = self._loops[loop] = LoopConnections(
                    timeout_s=self._timeout,
                    trust_env=self._trust_env,
                    certificates=self._certificates,
                    transport=self.transport,
                )
            return found

    async def aclose(self) -> None:
        """Close those of every loop that still runs. The next request opens new ones."""
        with self._lock:
            found = list(self._loops.items())
            self._loops.clear()
        current = asyncio.get_running_loop()
        for loop, connections in found:
            if loop is current:
                await connections.aclose()
            elif loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(connections.aclose(), loop)
                await asyncio.wrap_future(closing)


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
        port = parts.port  # raises on nonsense
    except ValueError:
        raise JudgeError(f"base_url: got a malformed URL, {expected}") from None
    if "@" in parts.netloc:
        raise JudgeError(f"base_url: got a URL with credentials, {expected}. Put the key into an environment variable")
    if parts.query or parts.fragment:
        raise JudgeError(f"base_url: got a URL with a query or a fragment, {expected}")
    if parts.scheme not in ("http", "https") or not host:
        raise JudgeError(f"base_url: got a URL without http(s) scheme or host, {expected}")
    if port == 0:
        raise JudgeError(f"base_url: got a URL with port 0, {expected}")
    loopback = is_loopback(host)
    if parts.scheme == "http" and not loopback:
        _logger.warning("judge at %s: plain http, so prompts and key cross the network unencrypted", host)
    return base_url.rstrip("/"), loopback


def is_loopback(host: str) -> bool:
    """Whether connections to ``host`` stay on this machine. Those to the address that servers bind to and print
    (``0.0.0.0``, ``::``) do.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.rstrip(".")
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)
