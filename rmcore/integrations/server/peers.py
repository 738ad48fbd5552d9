"""Several group servers behind one trainer: whichever a member comes to, its group is put together at one of them.

Every server is told the same list and which of it is its own address. The owner of a group is the one whose address has
the greatest sha256 together with the group's key (rendezvous hashing), which every server and every client works out by
itself; a server that is added or taken away moves no groups but its own. A server that does not own a group passes the
member's request on and hands the owner's answer back as it came.

Nobody takes the groups of a server that does not answer: two servers that thought differently of it would cut groups in
two. Their members get 503 and a cause, which trainers' clients try again until it is back.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from rmcore._base.http import Connections, check_base_url
from rmcore.integrations.server.doubts import AGAIN
from rmcore.integrations.server.placing import group_key, owner
from rmcore.integrations.server.schema import error_response
from rmcore.integrations.server.settings import ServeSettings

if TYPE_CHECKING:
    import httpx

__all__ = ["Peers"]

_PASSED_ON = "x-rmcore-peers"
"""On a request from another server: the digest of the list that sent it here."""
_KEPT = ("authorization", "content-type", AGAIN)
_CONNECT_S = 5.0
_ANSWERS = 2.0
"""Times ``answer_within_s`` until an owner that says nothing is taken for gone."""


class Peers:
    """The other servers, as one of them sees them.

    Args:
        settings: ``peers``, and ``advertise`` which of them this is; without peers nothing is passed on.
        transport: instead of the network; a seam for tests.

    Attributes:
        members: requests by what became of them: ``passed_on``, ``taken_over``, ``unreachable``, ``refused``.
    """

    def __init__(self, settings: ServeSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        checked = [check_base_url(url) for url in settings.peers]
        self.urls = tuple(url for url, _ in checked)
        self.own = settings.own_address
        self.members: Counter[str] = Counter()
        self._answer_within_s = settings.answer_within_s
        self._digest = hashlib.sha256(json.dumps(sorted(self.urls)).encode()).hexdigest()
        self._connections = Connections(
            timeout_s=settings.answer_within_s,
            trust_env=not all(loopback for _, loopback in checked),
            certificates=any(url.startswith("https:") for url in self.urls),
            transport=transport,
        )

    async def answer(self, request: Request, *key: object) -> Response | None:
        """The owner's answer to a member's request; None where this server is to answer itself.

        Args:
            request: as it came, its body read.
            key: what all members of the group have in common, and no other group has.
        """
        if not self.urls:
            return None
        sent_by = request.headers.get(_PASSED_ON)
        if sent_by is not None:
            # Passed on once is passed on for good: lists that differ must not send a request round and round.
            if not hmac.compare_digest(sent_by.encode("latin-1"), self._digest.encode()):
                self.members["refused"] += 1
                return error_response(
                    421, "misdirected", "peers: the server that passed this on has another list; give all of them one"
                )
            self.members["taken_over"] += 1
            return None
        url = owner(group_key(*key), self.urls)
        return None if url == self.own else await self._passed_on(url, request)

    async def aclose(self) -> None:
        """Close the connections to the others."""
        await self._connections.aclose()

    async def _passed_on(self, url: str, request: Request) -> Response:
        import httpx

        headers = {name: value for name in _KEPT if (value := request.headers.get(name)) is not None}
        try:
            with self._connections.here().client() as client:
                answer = await client.post(
                    f"{url}{request.url.path}",
                    content=await request.body(),
                    headers={**headers, _PASSED_ON: self._digest},
                    # The owner says when the time is up, and a caller that leaves cancels this; but from a machine that
                    # went without a word nothing ever comes. Who asks again finds the member it asked for.
                    timeout=httpx.Timeout(_ANSWERS * self._answer_within_s, connect=_CONNECT_S),
                )
        except (httpx.TransportError, OSError) as error:
            self.members["unreachable"] += 1
            return error_response(
                503,
                "peer_unreachable",
                f"the group belongs to {url}, which does not answer ({type(error).__name__})",
                {"Retry-After": "1"},
            )
        if answer.status_code in (401, 403):
            self.members["refused"] += 1
            return error_response(421, "peer_refused", f"{url} has another token; give all servers one")
        self.members["passed_on"] += 1
        kept = {name: value for name in ("content-type", "retry-after") if (value := answer.headers.get(name))}
        return Response(answer.content, answer.status_code, kept)
