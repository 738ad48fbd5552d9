"""From a trainer's flat rows to groups: what one reward call sees, checked before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Prompt

__all__ = ["GroupingError", "completion_text", "group_size_of_runs", "prompt_key", "split_groups"]


class GroupingError(InputError):
    """The rows of a call are no whole groups; the message names the trainer setting to change."""


def completion_text(completion: object, where: str = "completion") -> str:
    """The text of one completion: a string, or the messages the policy wrote.

    One message gives its content. Several (a completion with tool calls) are joined as ``Role: content`` paragraphs, so
    that nothing the policy did is hidden from the reward model.

    Raises:
        InputError: not text: an image part, a message without text.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or not completion:
        what = "an empty list" if isinstance(completion, Sequence) else type(completion).__name__
        reject(where, what, "a string or a non-empty list of messages")
    texts = []
    for k, message in enumerate(completion):
        if not isinstance(message, dict):
            reject(f"{where}[{k}]", type(message).__name__, "a message")
        texts.append((str(message.get("role", "assistant")), _content(message, f"{where}[{k}]")))
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in texts)


def _content(message: dict[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        return ""  # an assistant turn that only called tools
    if not isinstance(content, list) or not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        reject(f"{where}.content", type(content).__name__, "text, or a list of text parts")
    return "".join(str(part.get("text", "")) for part in content)


def group_size_of_runs(keys: Sequence[object]) -> int:
    """K, where all runs of equal neighbours are equally long.

    Raises:
        GroupingError: the runs differ in length, so rows are missing or a prompt stands beside itself.
    """
    runs: list[int] = []
    for k, key in enumerate(keys):
        if k and key == keys[k - 1]:
            runs[-1] += 1
        else:
            runs.append(1)
    if len(set(runs)) > 1:
        raise GroupingError(
            f"prompts: got runs of {runs[:8]} equal prompts, expected runs of one length K. Pass num_generations, "
            "and a prompt_id column if the data repeats prompts"
        )
    return runs[0] if runs else 0


def split_groups(keys: Sequence[object], size: int, *, setting: str = "") -> list[range]:
    """Rows of each group: consecutive chunks of ``size`` rows, each checked to hold one prompt.

    Args:
        keys: what tells prompts apart, one a row.
        size: K.
        setting: what the trainer's user can change, for the error message.

    Raises:
        GroupingError: the rows are no multiple of K, or a chunk mixes prompts.
    """
    advice = f" {setting}" if setting else ""
    if size < 1:
        reject("num_generations", size, "at least 1")
    if len(keys) % size:
        raise GroupingError(f"prompts: got {len(keys)} rows, expected a multiple of num_generations = {size}.{advice}")
    groups = [range(start, start + size) for start in range(0, len(keys), size)]
    for number, rows in enumerate(groups):
        other = next((row for row in rows if keys[row] != keys[rows[0]]), None)
        if other is not None:
            raise GroupingError(
                f"prompts: got different prompts in rows {rows[0]} and {other}, expected the {size} rows of group "
                f"{number} to share one.{advice}"
            )
    return groups


def prompt_key(prompt: Prompt) -> object:
    """What tells prompts apart where no id column does."""
    return prompt if isinstance(prompt, str) else repr(prompt)
