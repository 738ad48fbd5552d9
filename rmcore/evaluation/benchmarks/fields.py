"""Fields of a benchmark's rows: read as they are published, and named where one is missing or wrong.

What the benchmark is not read by (models, scores, languages) is not looked at. A field that is null is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Prompt, Response, canonical_prompt, canonical_response
from rmcore.evaluation.benchmarks.item import Context
from rmcore.model.data.conversations import with_roles

__all__ = ["id_of", "one_of", "prompt_of", "response_of", "responses_of", "text_of"]


def id_of(row: Mapping[str, Any], name: str, context: Context) -> str:
    """The row's id as text, or its number where it has none."""
    value = row.get(name)
    return str(context.number if value is None else value)


def prompt_of(row: Mapping[str, Any], name: str = "prompt") -> Prompt:
    """A field that holds a prompt: text or messages, ShareGPT's turns among them; raises InputError naming it."""
    return canonical_prompt(with_roles(_field(row, name), name), name)


def response_of(row: Mapping[str, Any], name: str) -> Response:
    """A field that holds a response: text, a message or messages; raises InputError naming it."""
    return _response(_field(row, name), name)


def responses_of(row: Mapping[str, Any], name: str, count: int | None = None) -> tuple[Response, ...]:
    """A field that holds a list of responses, ``count`` of them where that is fixed; raises InputError naming it."""
    value = _field(row, name)
    if not isinstance(value, (list, tuple)) or not value:
        reject(name, "an empty list" if value == [] else type(value).__name__, "a list of texts")
    if count is not None and len(value) != count:
        reject(name, f"{len(value)} texts", f"{count}")
    return tuple(_response(response, f"{name}[{k}]") for k, response in enumerate(value))


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A field that holds text; raises InputError naming it."""
    value = _field(row, name)
    if not isinstance(value, str):
        reject(name, type(value).__name__, "a text")
    return value


def one_of(row: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    """A field that holds one of a few words, in any case; raises InputError naming it."""
    value = text_of(row, name)
    found = {word.lower(): word for word in known}.get(value.strip().lower())
    if found is None:
        reject(name, repr(value)[:60], f"one of {', '.join(known)}")
    return found


def _response(value: Any, where: str) -> Response:
    if not isinstance(value, (str, Mapping, list, tuple)):
        reject(where, type(value).__name__, "a text")
    return canonical_response(with_roles(value, where), where)


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise InputError(f"{name}: missing; the row has {', '.join(sorted(map(str, row))[:12])}")
    return row[name]
