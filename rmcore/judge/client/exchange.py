"""One completion through a function of the caller's own, as an attempt of the client's."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rmcore._base import large
from rmcore._base.client.error_body import scrub
from rmcore._base.client.exchange import MAX_ERROR_BODY, Attempt, Send, failure, finished
from rmcore._base.errors import JudgeError
from rmcore.judge.client.completions import CompletionError, CompletionFunction, reply_object

__all__ = ["FunctionExchange"]


class FunctionExchange:
    """Asks through a function: an in-process model, or a client library of the caller's own.

    Args:
        complete: see :class:`~rmcore.judge.client.completions.CompletionFunction`.

    What it raises becomes an attempt: :class:`~rmcore.judge.client.completions.CompletionError`, and any exception with
    a ``status_code`` (those of ``openai`` have one), is that HTTP status; a ``TimeoutError`` or ``OSError``, also as
    the cause of another exception, is a timeout or a broken connection; all else fails with ``error_<type>``.

    Raises:
        JudgeError: ``complete`` cannot be called.
    """

    def __init__(self, complete: CompletionFunction) -> None:
        if not callable(complete):
            raise JudgeError(
                f"complete: got {type(complete).__name__}, expected an async function (messages, **parameters); "
                "for an openai client openai_completions(client)"
            )
        self.complete = complete

    def __repr__(self) -> str:
        return f"complete={self.complete!r}"

    @property
    def name(self) -> str:
        """The function's own ``name``, if it has one."""
        name = getattr(self.complete, "name", "")
        return name if isinstance(name, str) else ""

    @property
    def place(self) -> str:
        """Not known: it is the function's."""
        return ""

    def start_afresh(self) -> None:
        """Nothing here belongs to a process."""

    def secret(self) -> tuple[str, str]:
        """The key that the function says it uses (``api_key``), so that it can be kept out of logs and stores."""
        key = getattr(self.complete, "api_key", "")
        return (key, "") if isinstance(key, str) else ("", "")

    @contextmanager
    def session(self) -> Iterator[Send]:
        """The function."""
        yield self._call

    async def context_tokens(self, model: str) -> int | None:
        """What the function says of itself (``context_tokens``)."""
        known = getattr(self.complete, "context_tokens", None)
        return known if isinstance(known, int) and not isinstance(known, bool) and known > 0 else None

    async def aclose(self) -> None:
        """Close the function if it can be closed (``aclose``)."""
        close = getattr(self.complete, "aclose", None)
        if close is not None:
            await close()

    async def _call(self, payload: Mapping[str, object], body: bytes, key: str) -> Attempt:
        parameters = dict(payload)
        messages: Any = parameters.pop("messages", [])
        try:
            found = self.complete(messages, **parameters)
            reply = await found if inspect.isawaitable(found) else found
        except Exception as error:
            return _raised(error, key)
        return await large.call(_object_finished, reply_object(reply), key)


def _object_finished(reply: object, key: str) -> Attempt:
    return finished(large.ascii_json(reply).encode("ascii"), key, {})


def _raised(error: Exception, key: str) -> Attempt:
    """What a completion function raised, as an attempt.

    Raises:
        TimeoutError, OSError: it was that, or caused by it.
        Exception: the error itself, if nothing is known of it.
    """
    status = error.status if isinstance(error, CompletionError) else getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 600:
        headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
        words = {name: getattr(error, name, None) for name in ("code", "type")}
        content = json.dumps({"error": {name: word for name, word in words.items() if isinstance(word, str)}}).encode()
        return failure(status, content, scrub(str(error), key), headers, str(error)[:MAX_ERROR_BODY])
    chain: BaseException | None = error
    while chain is not None:
        kinds = {kind.__name__ for kind in type(chain).__mro__}
        if isinstance(chain, TimeoutError) or "TimeoutException" in kinds:  # the latter: httpx's, not imported here
            raise TimeoutError from None
        if isinstance(chain, OSError) or kinds & {"NetworkError", "RemoteProtocolError", "ProxyError"}:
            raise ConnectionError from None
        chain = chain.__cause__
    raise error
