"""uvicorn's connections, of which none may take for ever to say what it wants, and no answer is lost by hanging up.

uvicorn waits without limit for a request's head, and reads for as long as it comes a body whose request was answered
already. Here both have so many seconds. A body that the application reads is the application's own matter, and idle
connections are uvicorn's.

An answer may go out while its request still comes (413), to a client that writes before it reads. To close a connection
with bytes unread resets it, and the answer is lost on the way; so where it is to be closed, only our side of it is, and
what comes is thrown away until the client's side is, too (nginx calls that a lingering close).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BoundedConnection", "bounded"]


class _Lingering:
    """A transport whose ``close`` asks first; all else is the other's."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], bool]) -> None:
        self._transport, self._close = transport, close
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Close it; or, the first time and where ``close`` says no, our side of it."""
        if self.is_closing() or not self._transport.can_write_eof() or self._close():
            self._transport.close()
        else:
            self.lingers = True
            self._transport.write_eof()


class BoundedConnection(H11Protocol):
    """A connection that is closed where no whole head of a request comes within ``head_s``."""

    head_s = 60.0
    """Seconds from its start, or from what first comes after an answer."""
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is open."""
        self._lingering = _Lingering(transport, self._may_close)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        self._bound()

    def data_received(self, data: bytes) -> None:
        """Something came."""
        if not self._lingering.lingers:
            super().data_received(data)
        self._bound()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._unbound()
        super().connection_lost(exc)

    def _may_close(self) -> bool:
        """Whether all that was announced has come; else the connection is bound, and reading goes on."""
        if self.conn.their_state is not h11.SEND_BODY:
            return True
        self.flow.resume_reading()
        self._unbound()
        self._limit = self.loop.call_later(self.head_s, self._expired)
        return False

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _bound(self) -> None:
        if self._lingering.lingers:
            return  # since it lingers
        if self._answering or self.transport.is_closing():
            self._unbound()
        elif self._limit is None:
            self._limit = self.loop.call_later(self.head_s, self._expired)

    def _unbound(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _expired(self) -> None:
        self._limit = None
        if not self._answering:
            self.transport.close()


def bounded(head_s: float) -> type[BoundedConnection]:
    """The class with such a limit, for ``uvicorn.Config(http=...)``."""
    fields: dict[str, Any] = {"head_s": head_s, "__doc__": BoundedConnection.__doc__}
    return type("BoundedConnection", (BoundedConnection,), fields)
