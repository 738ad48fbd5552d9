"""uvicorn's connections, of which none may take for ever to say what it wants.

uvicorn waits without limit for a request's head, and reads for as long as it comes a body whose request was answered
already (413 goes out at once, and a client that writes before it reads finds it only when all is out: to hang up would
take the answer along). Here both have so many seconds. A body that the application reads is the application's own
matter, and idle connections are uvicorn's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BoundedConnection", "bounded"]


class BoundedConnection(H11Protocol):
    """A connection that is closed where no whole head of a request comes within ``head_s``."""

    head_s = 60.0
    """Seconds from its start, or from what first comes after an answer."""
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is open."""
        super().connection_made(transport)
        self._bound()

    def data_received(self, data: bytes) -> None:
        """Something came."""
        super().data_received(data)
        self._bound()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._unbound()
        super().connection_lost(exc)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _bound(self) -> None:
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
