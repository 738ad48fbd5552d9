"""What a score call may be given: groups of texts, or sizes of groups, each wrong argument named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.prompt import Prompt, check_prompt

__all__ = ["check_group_sizes", "check_groups"]


def check_group_sizes(group_sizes: Sequence[int] | Tensor) -> list[int]:
    """K of each group as a list; raises InputError unless it holds positive integers, at least one."""
    given: Any = group_sizes.tolist() if isinstance(group_sizes, Tensor) else group_sizes
    if not isinstance(given, Iterable):
        reject("group_sizes", repr(given), "a sequence of positive integers")
    sizes = list(given)
    if not sizes:
        reject("group_sizes", "an empty list", "at least one group")
    for k, size in enumerate(sizes):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            reject(f"group_sizes[{k}]", size, "a positive integer")
    return sizes


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
