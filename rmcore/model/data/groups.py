"""Groups: a prompt and K responses to score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Canonical, canonical_prompt, canonical_response
from rmcore.model.data.conversations import with_roles
from rmcore.model.data.critiques import critiques_of_group

__all__ = ["COLUMNS", "Group", "parse_group"]

COLUMNS = frozenset({"prompt", "responses", "id", "chosen", "rejected", "context", "completions", "critiques"})
"""Every name that a column can be mapped to."""


@dataclass(frozen=True, slots=True)
class Group:
    """One row of the groups format. ``id`` is None where the row has none; ``line`` is its 1-based number: of the line
    in JSON Lines, else of the row.
    """

    prompt: Canonical
    responses: tuple[Canonical, ...]
    id: str | int | None = None
    line: int = 0
    critiques: tuple[tuple[str, ...], ...] | None = None
    """Of each response; None where the row has none."""


def parse_group(value: Mapping[str, Any], *, critiques: bool = False) -> Group:
    """A group from one row, its critiques too where asked for; raises InputError saying which key is wrong.

    Besides ``prompt`` and ``responses``, RewardBench 2's lists of ``chosen`` and ``rejected`` are read (the chosen ones
    come first), and NeMo RL's ``context`` and ``completions``.
    """
    given, responses, where = value.get("prompt"), value.get("responses"), "responses"
    if responses is None and given is not None and _lists(value.get("chosen"), value.get("rejected")):
        responses, where = [*value["chosen"], *value["rejected"]], "chosen and rejected"
    elif responses is None and given is None and _lists(value.get("context"), value.get("completions")):
        given, where = value["context"], "completions"
        responses = [item.get("completion") if isinstance(item, Mapping) else item for item in value["completions"]]
    else:
        for key in ("prompt", "responses"):
            if key not in value:
                found = sorted(map(str, value))[:8]
                raise InputError(
                    f"{key}: missing; expected keys prompt, responses (found {found}). Other names can be mapped: "
                    "--columns prompt=question responses=answers"
                )
    prompt = canonical_prompt(with_roles(given))
    if not isinstance(responses, list) or not responses:
        reject(where, _kind(responses), "a non-empty list")
    name = value.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        reject("id", _kind(name), "a string or an integer")
    texts = tuple(canonical_response(with_roles(r), f"{where}[{k}]") for k, r in enumerate(responses))
    return Group(prompt, texts, name, critiques=critiques_of_group(value, len(texts)) if critiques else None)


def _lists(*values: Any) -> bool:
    return all(isinstance(value, list) for value in values)


def _kind(value: Any) -> str:
    if isinstance(value, (list, str)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'string'}"
    return {dict: "an object", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
