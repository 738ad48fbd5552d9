"""Prompts and messages: the one notion that every edge of the library has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from rmcore._base.errors import reject

__all__ = ["Message", "Prompt", "canonical_prompt", "check_groups", "check_prompt"]

Message: TypeAlias = Mapping[str, str]
"""One chat message: ``{"role": ..., "content": ...}``."""

Prompt: TypeAlias = str | Sequence[Message]
"""A plain-text prompt, or a conversation as a list of messages."""


def check_prompt(prompt: object, where: str = "prompt") -> None:
    """Raise InputError unless ``prompt`` is a string or a non-empty list of ``{"role", "content"}`` strings."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Sequence) or not prompt:
        reject(where, type(prompt).__name__ if prompt else "an empty list", "a string or a list of messages")
    for k, message in enumerate(prompt):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            reject(f"{where}[{k}]", repr(message)[:80], '{"role": str, "content": str}')


def canonical_prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    """The part of ``prompt`` that a judge gets to see, in one form.

    Plain text stays text. A conversation becomes a list of ``{"role", "content"}``: other fields of a message are
    dropped, since no judge is shown them, and a content of ``None`` (an assistant turn that only called tools) is the
    empty text. Plain text and a one-message conversation with the same words stay different prompts.

    Raises:
        InputError: ``prompt`` is neither a string nor a non-empty sequence of messages with text roles and contents.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        what = "an empty message list" if isinstance(prompt, Sequence) else type(prompt).__name__
        reject("prompt", what, "a string or a non-empty list of messages")
    messages = []
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            reject(f"prompt[{index}]", type(message).__name__, "a message: a mapping with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            reject(f"prompt[{index}]['role']", type(role).__name__, "a non-empty string")
        if content is not None and not isinstance(content, str):
            reject(f"prompt[{index}]['content']", type(content).__name__, "a string or None")
        messages.append({"role": role, "content": content or ""})
    return messages


def check_groups(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[int]:
    """K of each group; raises InputError unless there is one non-empty list of texts a prompt, and a prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        reject("prompts", type(prompts).__name__, "a list with one prompt a group")
    if isinstance(responses, str) or not isinstance(responses, Sequence):
        reject("responses", type(responses).__name__, "a list with one list of responses a prompt")
    if not prompts:
        reject("prompts", "an empty list", "at least one prompt")
    if len(prompts) != len(responses):
        reject("responses", f"{len(responses)} groups", f"{len(prompts)}, one a prompt")
    for k, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        check_prompt(prompt, f"prompts[{k}]")
        if isinstance(group, str) or not isinstance(group, Sequence):
            reject(f"responses[{k}]", type(group).__name__, "a list of strings")
        if not group:
            reject(f"responses[{k}]", "an empty list", "at least one response")
        for i, response in enumerate(group):
            if not isinstance(response, str):
                reject(f"responses[{k}][{i}]", type(response).__name__, "a string")
    return [len(group) for group in responses]
