r"""JSON Lines in: TRL's preference format and the groups format, streamed, with line numbers in every error.

Preferences, one a line (TRL's names; plain or conversational, explicit or implicit prompt)::

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}
    {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": "..."}

Where ``chosen`` and ``rejected`` are whole conversations, the prompt is what they begin with: the messages they share,
or the one that is given beside them. What follows is the response, of several messages if they part earlier. In the
last form the prompt ends with the last "Assistant:" they share.

Groups, one a line: ``{"id": ..., "prompt": ..., "responses": ["...", ...]}``. Prompts and responses are read as
:mod:`rmcore._base.prompt` has them, from text to conversations with tool calls. Other keys are ignored.

Files ending in ``.gz`` are decompressed; ``-`` is standard input.
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
from rmcore._base.prompt import Canonical, canonical_prompt, canonical_response
from rmcore.model.reward_model import Preference

__all__ = ["Group", "parse_group", "parse_preference", "read_groups", "read_lines", "read_preferences"]


@dataclass(frozen=True, slots=True)
class Group:
    """One line of the groups format. ``id`` is None where the line has none; ``line`` is its 1-based number."""

    prompt: Canonical
    responses: tuple[Canonical, ...]
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
    prompt, chosen, rejected = _split(value.get("prompt"), value["chosen"], value["rejected"])
    label = value.get("label", 1.0)
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not 0 <= label <= 1:
        # TRL-style files may carry a word here (who labelled); only a probability means something to a fit.
        label = 1.0
    return Preference(
        canonical_prompt(prompt),
        canonical_response(chosen, "chosen"),
        canonical_response(rejected, "rejected"),
        float(label),
    )


def parse_group(value: dict[str, Any]) -> Group:
    """A group from one JSON object; raises InputError saying which key is wrong."""
    for key in ("prompt", "responses"):
        if key not in value:
            raise InputError(f"{key}: missing; expected keys prompt, responses (found {sorted(value)[:8]})")
    prompt = canonical_prompt(value["prompt"])
    responses = value["responses"]
    if not isinstance(responses, list) or not responses:
        raise InputError(f"responses: got {_kind(responses)}, expected a non-empty list")
    name = value.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise InputError(f"id: got {_kind(name)}, expected a string or an integer")
    texts = tuple(canonical_response(response, f"responses[{k}]") for k, response in enumerate(responses))
    return Group(prompt, texts, name)


def _split(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected response of a row whose prompt may be part of the others."""
    whole = [_is_whole(chosen), _is_whole(rejected)]
    if prompt is not None and not any(whole):
        return prompt, chosen, rejected
    if prompt is not None and not all(whole):
        name, other = ("chosen", "rejected") if whole[0] else ("rejected", "chosen")
        raise InputError(f"{name}: got a whole conversation, expected a response as in {other}, or both whole")
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        size = _prompt_messages(prompt, chosen, rejected)
        return chosen[:size], chosen[size:], rejected[size:]
    if isinstance(chosen, str) and isinstance(rejected, str):
        shorter = min(len(chosen), len(rejected))
        parting = next((k for k in range(shorter) if chosen[k] != rejected[k]), shorter)
        if (found := chosen.rfind(_ANSWER, 0, parting)) >= 0:
            size = found + len(_ANSWER)
            return chosen[:size], chosen[size:], rejected[size:]
    raise InputError(
        "prompt: missing; only conversations (lists of messages, or texts that share a beginning up to "
        f"{_ANSWER.strip()!r}) may leave it out"
    )


_ANSWER = "\n\nAssistant:"


def _is_whole(value: Any) -> bool:
    """Whether a response is a conversation from its beginning on, prompt included."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.get("role") in ("system", "developer", "user")


def _prompt_messages(prompt: Any, chosen: list[Any], rejected: list[Any]) -> int:
    """How many messages at the beginning of two conversations are the prompt."""
    ours, theirs = canonical_prompt(chosen, "chosen"), canonical_prompt(rejected, "rejected")
    shared = 0
    while shared < min(len(ours), len(theirs)) - 1 and ours[shared] == theirs[shared]:
        shared += 1
    if prompt is None:
        if not shared:
            raise InputError("prompt: missing, and chosen and rejected share no first messages to take it from")
        return shared
    given = canonical_prompt(prompt)
    if isinstance(given, list) and given == ours[: len(given)] and len(given) <= shared:
        return len(given)
    if isinstance(given, str) and any(m["content"].strip() == given.strip() for m in ours[:shared]):  # type: ignore[index]
        return shared
    raise InputError("prompt: got another prompt than chosen and rejected begin with, expected one and the same")


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
