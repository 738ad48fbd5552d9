"""Large request bodies are read and checked in a thread, so that other requests go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from rmcore._base.large import LARGE, TooManyValuesError, read_json
from rmcore.integrations.server.schema import GroupsBody, MemberRequest, RewardRequest

__all__ = ["BodyRoute"]

_BODIES: dict[str, Any] = {"/v1/groups": GroupsBody, "/v1/rendezvous": MemberRequest, "/get_reward": RewardRequest}


class BodyRoute(APIRoute):
    """A route whose handler finds a large body read already; FastAPI reads all bodies on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler."""
        handler = super().get_route_handler()
        if self.path not in _BODIES:
            return handler

        async def reading(request: Request) -> Response:
            content = await request.body()
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if len(content) < LARGE or kind != "application/json":
                return await handler(request)
            found = await asyncio.to_thread(_read, self.path, content)
            return await handler(_ReadRequest(request, content, found))

        return reading


class _ReadRequest(Request):
    def __init__(self, request: Request, content: bytes, found: object) -> None:
        super().__init__(request.scope, request.receive)
        self._content, self._found = content, found

    async def body(self) -> bytes:
        return self._content

    async def json(self) -> Any:
        return self._found  # FastAPI lets an instance of what it expects pass


@lru_cache
def _adapter(path: str) -> TypeAdapter[Any]:
    return TypeAdapter(_BODIES[path])


def _read(path: str, content: bytes) -> object:
    """The body as the route's handler takes it; raises RequestValidationError as FastAPI does."""
    try:
        value = read_json(content)
    except TooManyValuesError as problem:
        error = {"type": "too_many_values", "loc": ("body",), "msg": f"{problem}; send several requests", "input": {}}
        raise RequestValidationError([error]) from None
    except (ValueError, RecursionError):
        error = {"type": "json_invalid", "loc": ("body",), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([error]) from None
    try:
        return _adapter(path).validate_python(value, from_attributes=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None
