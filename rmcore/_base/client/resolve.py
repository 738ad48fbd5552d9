"""Host names looked up in threads that nobody waits for: a resolver that hangs costs a deadline and no more.

An event loop looks names up in its executor, whose threads are joined at the end of the loop and of the process, so a
lookup that hangs keeps both from ending and, a few at a time, takes the threads away from everybody else. So a name is
looked up here first; a request goes out only once that has worked.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future

from rmcore._base.client.causes import ConnectionFailedError, connection_trouble, past_proxies

__all__ = ["Resolver"]

_KEPT_S = 30.0
_LONGEST_S = 10.0

Lookup = Callable[[str, int], object]


class Resolver:
    """Whether the name in a URL can be resolved. One lookup at a time, shared by whoever asks.

    Args:
        url: what is requested. Addresses, and hosts behind a proxy of the environment, are not looked up.
        through_proxy: whether proxies of the environment are used.
        within_s: longest wait, ten seconds at most.
        lookup: a seam for tests; ``socket.getaddrinfo`` by default.
    """

    def __init__(self, url: str, *, through_proxy: bool, within_s: float, lookup: Lookup | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self._url, self._host = url, parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._within = min(within_s, _LONGEST_S)
        self._lookup = lookup
        self._lock = threading.Lock()
        self._flight: Future[None] | None = None
        self._known_until = float("-inf")
        proxies = urllib.request.getproxies() if through_proxy else {}
        named = bool({parts.scheme, "all"} & proxies.keys())
        behind = named and not past_proxies(parts)
        # Of NO_PROXY there are several readings, and by another one it is the proxy that knows the name.
        self._certain = not named
        if behind or not self._host or _is_address(self._host):
            self._known_until = float("inf")

    async def check(self) -> None:
        """Return once the name is known to resolve.

        Raises:
            ConnectionFailedError: it does not, or there is no answer in time.
        """
        if time.monotonic() < self._known_until:
            return
        try:
            async with asyncio.timeout(self._within):
                await asyncio.wrap_future(self._join())
        except TimeoutError:
            raise ConnectionFailedError(
                f"DNS: no answer about {self._host} within {self._within:g} s; check the resolver and the network"
            ) from None
        except OSError as error:
            if self._certain:
                raise connection_trouble(error, self._url) from None
        self._known_until = max(self._known_until, time.monotonic() + _KEPT_S)

    def _join(self) -> Future[None]:
        with self._lock:
            flight = self._flight
            if flight is None:
                flight = Future()
                flight.set_running_or_notify_cancel()  # so that whoever stops waiting does not stop the others
                thread = threading.Thread(target=self._look_up, args=(flight,), name="rmcore-dns", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads: not a flight that never ends
                    raise OSError(errno.EAGAIN, str(error)) from None
                self._flight = flight
            return flight

    def _look_up(self, flight: Future[None]) -> None:
        error: BaseException | None = None
        try:
            (self._lookup or socket.getaddrinfo)(self._host, self._port)
        except UnicodeError:
            error = socket.gaierror(socket.EAI_NONAME, "no host name")
        except BaseException as problem:
            error = problem
        with self._lock:
            self._flight = None
        if error is None:
            flight.set_result(None)
        else:
            flight.set_exception(error)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
