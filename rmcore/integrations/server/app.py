"""The HTTP application: routes, what stands behind them, and how errors become statuses."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rmcore._base import large
from rmcore._base.clock import Clock
from rmcore._base.errors import InputError, NonFiniteError
from rmcore._base.version import __version__
from rmcore.engine.engine import RewardEngine
from rmcore.integrations.server.assembly import BusyError, ConflictError, LateError
from rmcore.integrations.server.bodies import BodyRoute
from rmcore.integrations.server.guard import Guard
from rmcore.integrations.server.schema import (
    ErrorReply,
    GroupReply,
    GroupRequest,
    GroupsBody,
    HealthReply,
    MemberReply,
    MemberRequest,
    RewardReply,
    RewardRequest,
    describe,
    error_response,
    first_errors,
    json_response,
    member_reply,
)
from rmcore.integrations.server.service import RewardService
from rmcore.integrations.server.settings import ServeSettings

if TYPE_CHECKING:
    import httpx

__all__ = ["RewardService", "create_app"]


_ERRORS: dict[int, str] = {
    400: "The body is no JSON.",
    401: "The bearer token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    421: "The Host header names another server.",
    422: "The request cannot be scored as it is.",
    429: "Too much is waiting, or the server is going down. `Retry-After` says when to come back.",
}


def _errors(*more: tuple[int, str], without: Iterable[int] = ()) -> dict[int | str, dict[str, Any]]:
    told = {**_ERRORS, **dict(more)}
    return {code: {"model": ErrorReply, "description": told[code]} for code in sorted(told) if code not in set(without)}


def create_app(
    engine: RewardEngine,
    settings: ServeSettings | None = None,
    *,
    model: str = "",
    clock: Clock | None = None,
    save_state: Callable[[], None] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """The application, to be run by any ASGI server (one process: groups are put together in its memory).

    Args:
        engine: scores the groups.
        settings: limits and times; without them the defaults.
        model: a name for ``/health``.
        clock: a seam for tests.
        save_state: called in a thread after each batch, before its answers go out; to keep budgets over a crash.
        transport: to the other servers of ``settings.peers``, instead of the network; a seam for tests.

    Returns:
        The application; ``app.state.service`` is its :class:`RewardService`.
    """
    settings = settings or ServeSettings()
    service = RewardService(engine, settings, model=model, clock=clock, save_state=save_state, transport=transport)
    app = FastAPI(
        title="rmcore",
        version=__version__,
        description="Rewards, advantages and uncertainties of groups of responses.",
        redoc_url=None,
    )
    app.state.service = service
    app.router.route_class = BodyRoute
    _add_group_routes(app, service)
    _add_openrlhf_route(app, service)
    _add_state_routes(app, service)
    if settings.nemo_gym:
        from rmcore.integrations.server.nemo_gym import add_nemo_gym_routes

        add_nemo_gym_routes(app, service)
    _add_handlers(app)
    app.openapi = lambda: describe(FastAPI.openapi(app), settings)  # type: ignore[method-assign]
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", "")))
    service.guard = Guard(app.build_middleware_stack(), settings, paths, service.metrics.request_seconds, clock)
    app.middleware_stack = service.guard
    return app


def _add_group_routes(app: FastAPI, service: RewardService) -> None:
    """Groups that come whole, and groups whose members come one by one."""

    @app.post(
        "/v1/groups",
        response_model=GroupReply | list[GroupReply],
        responses=_errors((409, "The Idempotency-Key was used for another request.")),
        summary="Score whole groups",
    )
    async def score_groups(
        body: GroupsBody,
        idempotency_key: Annotated[
            str | None,
            Header(max_length=256, pattern=r"^[!-~]+$", description="A retry with the same key gets the same answer."),
        ] = None,
    ) -> Response:
        """One group or a list of groups; a list is scored whole or not at all."""
        requests = body if isinstance(body, list) else [body]

        async def work() -> bytes:
            replies = await service.score_groups(requests)
            return bytes(json_response(replies if isinstance(body, list) else replies[0]).body)

        named = idempotency_key is not None or (isinstance(body, GroupRequest) and body.id is not None)
        digest = await large.call(_digest, requests) if named else b""
        if idempotency_key is not None:
            content, replayed = await service.replies.once(("key", idempotency_key), digest, work)
        elif isinstance(body, GroupRequest) and body.id is not None:
            # An id may come again with other content: that is another group, no contradiction.
            content, replayed = await service.replies.once(("id", str(body.id), digest), digest, work)
        else:
            content, replayed = await work(), False
        headers = {"Idempotent-Replayed": "true"} if replayed else None
        return Response(content, headers=headers, media_type="application/json")

    @app.post(
        "/v1/rendezvous",
        response_model=MemberReply,
        responses=_errors(
            (409, "This member contradicts what it or its siblings said before."),
            (410, "The group was scored without this member, since the time limit had passed."),
        ),
        summary="Join a group as one member and wait for the others",
    )
    async def join(body: MemberRequest, request: Request) -> Response:
        if (answer := await service.peers.answer(request, *service.member_key(body))) is not None:
            return answer
        return json_response(await member_reply(body, await service.join(body, request.scope)))


def _add_openrlhf_route(app: FastAPI, service: RewardService) -> None:
    @app.post(
        "/get_reward",
        response_model=RewardReply,
        responses=_errors((503, "No reward: the time was up, or no preference is known. OpenRLHF asks again.")),
        summary="OpenRLHF's remote reward model",
    )
    async def get_reward(body: RewardRequest, request: Request) -> Response:
        async with asyncio.timeout(service.settings.answer_within_s):
            # A list's groups are whole, so any server scores it; a single response must meet its siblings.
            if len(body.prompts) == 1 and (answer := await service.peers.answer(request, body.prompts[0])) is not None:
                return answer
            rewards, rates, versions, figures = await service.rewards(body, request.scope)
        missing = sum(not math.isfinite(value) for value in (*rewards, *rates))
        if missing:
            # OpenRLHF cannot take a null, and 0 would be a reward like any other.
            return error_response(503, "no_preference", "no preference is known for a response, so it has no reward")
        logs: dict[str, Any] = {f"rmcore_{name}": value for name, value in figures.items()}
        if not set(versions) <= {None}:
            logs["head_version"] = versions[0] if len(set(versions)) == 1 else versions
        return json_response({"rewards": rewards, "scores": rates, "extra_logs": logs})


def _add_state_routes(app: FastAPI, service: RewardService) -> None:
    """How the server is, to people and machines that watch it."""

    @app.get("/health", response_model=HealthReply, responses=_errors(without=(400, 401, 422, 429)))
    async def health() -> Response:
        """Answers as long as the process lives; open to all."""
        return json_response(_health(service))

    @app.get(
        "/ready",
        response_model=HealthReply,
        responses={**_errors(without=(400, 401, 422, 429)), 503: {"model": HealthReply, "description": "Going down."}},
    )
    async def ready() -> Response:
        """As `/health`, but 503 while the server takes nothing new; open to all."""
        return json_response(_health(service), 503 if service.draining else 200)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={
            **_errors(without=(400, 422, 429)),
            200: {
                "description": "Prometheus' text format, or OpenMetrics where the Accept header asks for it.",
                "content": {
                    kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")
                },
            },
        },
    )
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus."""
        page, content_type = service.metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})


def _digest(requests: list[GroupRequest]) -> bytes:
    hashed = hashlib.sha256()
    for k, request in enumerate(requests):
        hashed.update(("\n" * (k > 0) + request.model_dump_json()).encode())
    return hashed.digest()


def _health(service: RewardService) -> dict[str, Any]:
    return {
        "status": "draining" if service.draining else "ok",
        "ready": not service.draining,
        "model": service.model,
        "version": __version__,
    }


def _add_handlers(app: FastAPI) -> None:
    def handle(kind: type[Exception], make: Any) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            answer: Response = make(error)
            return answer

        app.add_exception_handler(kind, handler)

    handle(InputError, lambda error: error_response(422, "invalid", for_clients(str(error))))
    handle(NonFiniteError, lambda error: error_response(422, "not_scorable", str(error)))
    handle(ConflictError, lambda error: error_response(409, "conflict", str(error)))
    handle(LateError, lambda error: error_response(410, "late", str(error)))
    handle(TimeoutError, lambda error: error_response(503, "timeout", "the group was not scored in time"))
    handle(BusyError, _busy)
    handle(RequestValidationError, _invalid)
    handle(HTTPException, _http)
    handle(Exception, lambda error: error_response(500, "internal", "internal error"))


def _busy(error: BusyError) -> Response:
    seconds = str(max(1, math.ceil(error.retry_after_s)))
    return error_response(429, "busy", str(error), {"Retry-After": seconds})


def for_clients(said: str) -> str:
    """What is said of an input, to who can set no limits: they are the server's."""
    return (
        f"{said}; to the server, that is: rmcore serve --max-length, --overlong" if "overlong policy" in said else said
    )


def _invalid(error: RequestValidationError) -> Response:
    errors = error.errors()
    if any(one["type"] == "json_invalid" for one in errors):
        return error_response(400, "bad_json", "the body is no JSON")
    return error_response(422, "invalid", first_errors(errors))


def _http(error: HTTPException) -> Response:
    if error.status_code == 400:  # JSON that Python refuses to read: nested too deeply, an endless number
        return error_response(400, "bad_json", "the body is no JSON that can be read")
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    return error_response(error.status_code, kind, str(error.detail), error.headers)
