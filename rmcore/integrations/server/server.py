"""``rmcore serve``: groups of responses over HTTP, for trainers that cannot hold the reward model themselves.

    POST /v1/groups        a prompt and its responses → rewards, advantages, preferences, uncertainties, cost
    POST /v1/rendezvous    one member of a group; waits for its siblings (verl, and anything that scores single samples)
    POST /get_reward       OpenRLHF's remote reward model
    GET  /health, /ready, /metrics, /docs, /openapi.json

Needs fastapi, uvicorn and prometheus-client: ``pip install 'rmcore[serve]'``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from rmcore._base.clock import Clock
from rmcore._base.errors import MissingPackageError
from rmcore.engine.engine import RewardEngine
from rmcore.integrations.server.settings import ServeSettings

if TYPE_CHECKING:
    import httpx
    import uvicorn
    from fastapi import FastAPI

    from rmcore.integrations.server.service import RewardService

__all__ = ["ServeSettings", "create_app", "run"]

log = logging.getLogger(__name__)

_WRITE_OUT_S = 10.0
"""How long the last answers may take to go out once all are known."""


def create_app(
    engine: RewardEngine,
    settings: ServeSettings | None = None,
    *,
    model: str = "",
    clock: Clock | None = None,
    save_state: Callable[[], None] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """:func:`rmcore.integrations.server.app.create_app`, imported when it is needed.

    Raises:
        MissingPackageError: fastapi is not installed.
    """
    try:
        from rmcore.integrations.server.app import create_app as create
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return create(engine, settings, model=model, clock=clock, save_state=save_state, transport=transport)


def run(
    engine: RewardEngine,
    settings: ServeSettings | None = None,
    *,
    model: str = "",
    started: Callable[[str], None] | None = None,
    save_state: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted and return.

    The first signal ends the taking of new groups (429); open ones may still get their missing members for
    ``drain_s``, then they are scored as they are. A second signal closes the door at once, a third drops everything.

    Args:
        engine: scores the groups.
        settings: limits and times; without them the defaults.
        model: a name for ``/health``.
        started: called with the server's URL when it accepts connections.
        save_state: called in a thread after each batch, before its answers go out; to keep budgets over a crash.

    Raises:
        MissingPackageError: fastapi or uvicorn is not installed.
        SystemExit: the port cannot be bound (uvicorn's doing).
    """
    settings = settings or ServeSettings()
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    from rmcore.integrations.server.connections import bounded
    from rmcore.integrations.server.open_files import make_room

    make_room(settings)
    app = create_app(engine, settings, model=model, save_state=save_state)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded(settings.read_s),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        # Longer than clients keep idle connections: otherwise one is closed just as its next request is on the way.
        timeout_keep_alive=120,
        timeout_graceful_shutdown=int(_WRITE_OUT_S),
    )
    _server(config, app.state.service, started).run()


def _server(config: uvicorn.Config, service: RewardService, started: Callable[[str], None] | None) -> uvicorn.Server:
    import uvicorn

    class DrainingServer(uvicorn.Server):
        """A server that answers everything it has accepted before it closes its sockets."""

        loop: asyncio.AbstractEventLoop | None = None
        signals = 0
        draining: asyncio.Task[None] | None = None

        async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)  # type: ignore[arg-type]
            if self.signals:
                self.should_exit = True
            if self.started and started is not None:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                started(f"http://{f'[{host}]' if ':' in host else host}:{port}")

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn's own would raise the signal again after a clean end, which would not be exit status 0.
            self.signals += 1
            if self.signals == 1 and self.loop is not None and self.started:
                self.loop.call_soon_threadsafe(self.begin_drain)
                return
            self.force_exit = self.signals > 2
            self.should_exit = True

        def begin_drain(self) -> None:
            self.draining = asyncio.create_task(self.drain(), name="rmcore drain")

        async def drain(self) -> None:
            log.info("going down: %d groups open, %d queued", service.assembly.open_groups, service.scorer.queued)
            try:
                await service.drain()
            finally:
                self.should_exit = True

    return DrainingServer(config)


def _missing(error: ModuleNotFoundError) -> MissingPackageError:
    return MissingPackageError(f"{error.name} is not installed; pip install 'rmcore[serve]'")
