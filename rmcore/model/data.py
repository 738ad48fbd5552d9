"""JSON Lines in: TRL's preference format and the groups format, streamed, with line numbers in every error.

Preferences, one a line (TRL's names; plain or conversational, explicit or implicit prompt)::

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}

Groups, one a line: ``{"id": ..., "prompt": ..., "responses": ["...", ...]}``; a response may also be a list with one
assistant message. Other keys are ignored. Files ending in ``.gz`` are decompressed; ``-`` is standard input.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rmcore._base.errors import DataError, InputError
from rmcore._base.prompt import Prompt, check_prompt
from rmcore.model.reward_model import Preference

__all__ = ["Group", "parse_group", "parse_preference", "read_groups", "read_lines", "read_preferences"]


@dataclass(frozen=True, slots=True)
class Group:
    """One line of the groups format. ``id`` is None where the line has none; ``line`` is its 1-based number."""

    prompt: Prompt
    responses: tuple[str, ...]
    id: str | int | None = None
    line: int = 0


def read_preferences(path: str | Path) -> Iterator[Preference]:
    """Yield preferences; raises DataError at the first bad line, naming it."""
    for number, value in read_lines(path):
        try:
            yield parse_preference(value)
        except InputError as error:
            raise DataError(str(error), source=str(path), line=number) from error


def read_groups(path: str | Path) -> Iterator[Group]:
    """Yield groups; raises DataError at the first bad line, naming it."""
    for number, value in read_lines(path):
        try:
            group = parse_group(value)
        except InputError as error:
            raise DataError(str(error), source=str(path), line=number) from error
        yield Group(group.prompt, group.responses, group.id, number)


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every non-blank line; raises DataError for one that is not a JSON object in UTF-8."""
    with _opened(path) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise DataError(f"not JSON ({error})", source=str(path), line=number) from error
                if not isinstance(value, dict):
                    raise DataError(
                        f"got a JSON {type(value).__name__}, expected an object", source=str(path), line=number
                    )
                yield number, value
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 ({error})", source=str(path), line=number + 1) from error
        except (gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"not a complete gzip file ({error})", source=str(path), line=number + 1) from error


def parse_preference(value: dict[str, Any]) -> Preference:
    """A preference from one JSON object; raises InputError saying which key is wrong."""
    for key in ("chosen", "rejected"):
        if key not in value:
            raise InputError(f"{key}: missing; expected keys prompt, chosen, rejected (found {sorted(value)[:8]})")
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if prompt is None:
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    check_prompt(prompt)
    label = value.get("label", 1.0)
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
        # TRL-style files may carry a word here (who labelled); only a probability means something to a fit.
        label = 1.0
    return Preference(prompt, _response(chosen, "chosen"), _response(rejected, "rejected"), float(label))


def parse_group(value: dict[str, Any]) -> Group:
    """A group from one JSON object; raises InputError saying which key is wrong."""
    for key in ("prompt", "responses"):
        if key not in value:
            raise InputError(f"{key}: missing; expected keys prompt, responses (found {sorted(value)[:8]})")
    check_prompt(value["prompt"])
    responses = value["responses"]
    if not isinstance(responses, list) or not responses:
        raise InputError(f"responses: got {_kind(responses)}, expected a non-empty list")
    name = value.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise InputError(f"id: got {_kind(name)}, expected a string or an integer")
    texts = tuple(_response(response, f"responses[{k}]") for k, response in enumerate(responses))
    return Group(value["prompt"], texts, name)


def _response(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        content = value[0].get("content")
        if isinstance(content, str):
            return content
    raise InputError(f"{where}: got {_kind(value)}, expected a string or a list with one assistant message")


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise InputError("prompt: missing; only conversations (lists of messages) may leave it out")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise InputError("prompt: missing, and chosen and rejected share no first messages to take it from")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _kind(value: Any) -> str:
    if isinstance(value, (list, str)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'string'}"
    return {dict: "an object", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[str]]:
    if str(path) == "-":
        yield sys.stdin
        return
    try:
        stream: IO[str] = (
            gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path, encoding="utf-8")  # noqa: SIM115
        )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    with stream:
        yield stream
