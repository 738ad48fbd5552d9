"""What several files of this folder build on."""

from __future__ import annotations

import pytest
from support.chat_client import Endpoint, client_of


@pytest.fixture
def play(virtual):
    """Run ``work(clock, endpoint, client)`` against an endpoint that answers as told."""

    def run(work, answer=None, latency_s=1.0, **kwargs):
        async def whole(clock):
            endpoint = Endpoint(clock, answer, latency_s)
            return await work(clock, endpoint, client_of(endpoint, **kwargs))

        return virtual(whole)

    return run
