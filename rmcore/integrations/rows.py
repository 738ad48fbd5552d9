"""From a trainer's flat rows to groups: what one reward call sees, checked before anything is scored."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Prompt, canonical_prompt, content_key

__all__ = ["GroupingError", "alone", "group_size_of_runs", "prompt_key", "split_groups"]


class GroupingError(InputError):
    """The rows of a call are no whole groups; the message names the trainer setting to change."""


def alone(setting: str) -> str:
    """What is said, as a warning, where a trainer is *set* to one response a prompt. That it follows from the rows is
    no such setting: :func:`group_size_of_runs` refuses it.
    """
    return f"{setting} is 1, so there is nothing to compare and every reward is 0; set at least 2"


def group_size_of_runs(keys: Sequence[object]) -> int:
    """K, where all runs of equal neighbours are equally long; 0 where there are no rows.

    Raises:
        GroupingError: the runs differ in length, so rows are missing or a prompt stands beside itself; or a prompt
            comes back in another run, so the rows are interleaved, or the data has it twice; or no two rows share a
            prompt, so that nothing could be compared.
    """
    runs: list[int] = []
    starts: dict[object, int] = {}
    for k, key in enumerate(keys):
        if k and key == keys[k - 1]:
            runs[-1] += 1
            continue
        runs.append(1)
        if (first := starts.setdefault(_hashable(key), k)) != k:
            raise GroupingError(
                f"prompts: got the prompt of row {first} again in row {k}, apart from it, expected a prompt's rows "
                "together. Sort interleaved rows by prompt; where the data repeats prompts, pass num_generations, and "
                "a prompt_id column that tells them apart"
            )
    if len(set(runs)) > 1:
        raise GroupingError(
            f"prompts: got runs of {runs[:8]} equal prompts, expected runs of one length K. Pass num_generations, "
            "and a prompt_id column if the data repeats prompts"
        )
    if runs and runs[0] == 1:
        raise GroupingError(
            f"prompts: got {len(runs)} rows of as many prompts, expected at least two rows a prompt, one after the "
            "other: a group of one has nothing to be compared with, and its reward is 0. Sort interleaved rows by "
            "prompt, or pass num_generations, with a prompt_id column if the prompts of one group differ"
        )
    return runs[0] if runs else 0


def _hashable(key: object) -> object:
    return key if isinstance(key, Hashable) else repr(key)


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


def prompt_key(prompt: Prompt, where: str = "prompt") -> object:
    """What tells prompts apart where no id column does; raises InputError, naming ``where``, for what is no prompt."""
    return content_key(canonical_prompt(prompt, where))
