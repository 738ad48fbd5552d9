"""Where a prompt ends and a response begins in rows that hold whole conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import canonical_prompt

__all__ = ["is_whole", "split_conversations", "with_roles"]


def split_conversations(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected response of a row whose prompt may be part of the others."""
    prompt, chosen, rejected = with_roles(prompt), with_roles(chosen, "chosen"), with_roles(rejected, "rejected")
    whole = [is_whole(chosen), is_whole(rejected)]
    if prompt is not None and not any(whole):
        if _starts_both(prompt, chosen, rejected):
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
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
_QUESTION = "Human:"


def _starts_both(prompt: Any, chosen: Any, rejected: Any) -> bool:
    """Whether two dialogues written as text begin with the prompt that stands beside them."""
    texts = (prompt, chosen, rejected)
    return (
        all(isinstance(text, str) for text in texts)
        and prompt.lstrip().startswith(_QUESTION)
        and chosen.startswith(prompt)
        and rejected.startswith(prompt)
    )


def is_whole(value: Any) -> bool:
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


def with_roles(value: Any, where: str = "prompt") -> Any:
    """``value`` with ShareGPT's turns (``from`` and ``value``) as messages of a role and a content.

    Raises:
        InputError: a turn is of a kind that messages have no role for.
    """
    if isinstance(value, (list, tuple)):
        return [
            with_roles(turn, f"{where}[{k}]") if isinstance(turn, Mapping) else turn for k, turn in enumerate(value)
        ]
    if not isinstance(value, Mapping) or "role" in value or not {"from", "value"} <= value.keys():
        return value
    role = _ROLES.get(value["from"]) if isinstance(value["from"], str) else None
    if role is None:
        reject(f"{where}.from", repr(value["from"])[:40], f"one of {', '.join(_ROLES)}")
    rest = {name: part for name, part in value.items() if name not in ("from", "value")}
    return {"role": role, "content": value["value"], **rest}


_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}
