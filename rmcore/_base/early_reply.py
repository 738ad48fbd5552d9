"""A reply that comes while its request is still being sent: it is read, though the connection breaks then.

A server that refuses a body by its length (413, say) answers, closes, and resets what still comes in. httpx reads after
it has written, and by then the reset has taken the reply along: all that is left is a broken connection, which looks as
if it were worth another try. Here large bodies are written while somebody reads.

httpx has no public way to say how its bytes travel, so :func:`read_while_sending` sets httpcore's own seam
(``network_backend``) on the pools of a client that is made. A client that has no such pool is left as it is.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

    import httpcore
    import httpx

__all__ = ["read_while_sending"]

_LARGE = 16_384
"""Bytes from which on a write is watched; what a socket's buffer takes at once is out before anybody can answer."""
_READ = 65_536


def read_while_sending(client: httpx.AsyncClient) -> None:
    """Have a client read replies that come before their requests are out; before its first request."""
    for transport in (client._transport, *client._mounts.values()):
        pool = getattr(transport, "_pool", None)
        inner = getattr(pool, "_network_backend", None)
        if inner is not None:
            pool._network_backend = _Backend(inner)  # type: ignore[union-attr]


def _seen(reading: asyncio.Task[bytes]) -> None:
    """An error that nobody will be told of any more is no news in a log either."""
    if not reading.cancelled():
        reading.exception()


class _Backend:
    """httpcore's ``AsyncNetworkBackend``, around another one."""

    def __init__(self, inner: httpcore.AsyncNetworkBackend) -> None:
        self._inner = inner

    async def connect_tcp(self, *args: Any, **options: Any) -> _Stream:
        return _Stream(await self._inner.connect_tcp(*args, **options))

    async def connect_unix_socket(self, *args: Any, **options: Any) -> _Stream:
        return _Stream(await self._inner.connect_unix_socket(*args, **options))

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class _Stream:
    """httpcore's ``AsyncNetworkStream``, around another one: one read may be under way while it writes."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner
        self._reading: asyncio.Task[bytes] | None = None

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if len(buffer) >= _LARGE and self._reading is None:
            self._reading = asyncio.create_task(self._inner.read(_READ), name="rmcore early reply")
            await asyncio.sleep(0)  # or the whole body may be written, and refused, before it begins
        await self._inner.write(buffer, timeout)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._reading is None:
            return await self._inner.read(max_bytes, timeout)
        done, _ = await asyncio.wait({self._reading}, timeout=timeout)
        if not done:
            import httpcore

            raise httpcore.ReadTimeout
        reading, self._reading = self._reading, None
        return reading.result()

    async def aclose(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.add_done_callback(_seen)
            reading.cancel()
        try:
            if reading is not None:
                await asyncio.wait({reading})
        finally:  # a cancellation meanwhile is the caller's, and goes on
            await self._inner.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream:
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
