"""The most tokens a text may have, and what is cut of longer ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, check_numbers

__all__ = ["OverlongPolicy", "Run", "TextLimit", "check_positions", "shorten"]

OverlongPolicy: TypeAlias = Literal["error", "truncate-prompt-left", "truncate-right", "truncate-longest", "no-reward"]
"""``error``: refuse, naming the text. ``truncate-prompt-left``: drop the oldest prompt tokens, refuse if the responses
alone are too long. ``truncate-right``: drop from the end, the longest response first, down to a quarter of the limit
for all responses of the text together, then the prompt's end. ``truncate-longest``: drop from the end of whichever is
longest, prompt or response, until all fits. ``no-reward``: leave such a text unread; its pairs have no preference, and
the other responses of its group are as they would be without it.

A critique behind a response is the first to be cut, from its end and to nothing if need be, by every policy that cuts.
No policy cuts a response to nothing: a text of which no token of a response would be left is refused."""

_POLICIES = get_args(OverlongPolicy)

_LEAST_SHARE = 4
"""Under ``truncate-right`` the responses keep at least a quarter of the limit while there is prompt to cut."""


class Run(NamedTuple):
    """Consecutive token ids of one kind: whose they are (``prompt``, ``first``, ``second``, ``critique``), and may they
    be cut. An array, of which a part costs nothing: of millions of tokens few may be kept.
    """

    name: str
    cuttable: bool
    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TextLimit:
    """How many tokens a text may have, specials included (None: any number), and what happens to longer ones."""

    max_length: int | None = None
    overlong: OverlongPolicy = "error"

    def __post_init__(self) -> None:
        if self.overlong not in _POLICIES:
            reject("overlong", repr(self.overlong), f"one of {', '.join(_POLICIES)}")
        check_numbers(self, COUNT, "max_length", expected="a positive number of tokens or None")


def check_positions(max_length: int | None, positions: int | None) -> None:
    """Raise InputError for a limit that a model has no positions for; ``None``: no limit, or nobody knows."""
    if max_length is not None and positions is not None and max_length > positions:
        reject("max_length", max_length, f"at most the model's {positions} positions")


def shorten(runs: Sequence[Run], limit: TextLimit, positions: int | None) -> list[Run]:
    """Cut ``runs`` to the limit as its policy says.

    Args:
        runs: a text longer than ``limit.max_length``.
        limit: any policy but ``no-reward``.
        positions: how many the model has, for error messages; None if nobody knows.

    Raises InputError under the policy ``error``, and where the policy cannot shorten enough.
    """
    total = sum(len(ids) for *_, ids in runs)
    assert limit.max_length is not None
    excess = total - limit.max_length
    if limit.overlong == "error":
        reject("prompt and response", f"{total} tokens", f"at most {limit.max_length}", _remedy(limit, positions))
    sizes = [len(ids) if cuttable else 0 for _, cuttable, ids in runs]
    left = [0] * len(runs)
    right = [0] * len(runs)
    prompts = [k for k, run in enumerate(runs) if run[0] == "prompt" and run[1]]
    # A unit is what is shortened as one: a response, or all messages of the prompt.
    own = {name: [k for k, run in enumerate(runs) if run[0] == name and run[1]] for name in ("first", "second")}
    units = [unit for unit in own.values() if unit]
    critique = [k for k, run in enumerate(runs) if run[0] == "critique" and run[1]]
    if critique:
        excess -= _level([critique], sizes, right, excess, [0])
    if limit.overlong == "truncate-prompt-left":
        for k in prompts:
            left[k] = min(sizes[k], excess)
            excess -= left[k]
    elif limit.overlong == "truncate-longest":
        excess -= _level([prompts, *units], sizes, right, excess, [0, *[1] * len(units)])
    else:
        least = max(1, limit.max_length // (_LEAST_SHARE * max(len(units), 1)))
        excess -= _level(units, sizes, right, excess, [least] * len(units))
        excess -= _level([prompts], sizes, right, excess, [0])
        excess -= _level(units, sizes, right, excess, [1] * len(units))
    if excess > 0:
        reject(
            "prompt and response",
            f"{total} tokens, of which {excess} too many remain after the policy {limit.overlong!r}, which never "
            "cuts a response to nothing",
            f"at most {limit.max_length}",
        )
    return [run._replace(ids=run.ids[left[k] : len(run.ids) - right[k]]) for k, run in enumerate(runs)]


def _remedy(limit: TextLimit, positions: int | None) -> str:
    policies = f"an overlong policy: {', '.join(name for name in _POLICIES if name != 'error')}"
    if positions is None:
        return f"Pass a larger max_length, or {policies}"
    if limit.max_length is not None and limit.max_length < positions:
        return f"Pass a larger max_length (the model has {positions} positions), or {policies}"
    return f"The model has no more positions. Pass {policies}"


def _level(units: list[list[int]], sizes: list[int], right: list[int], excess: int, least: list[int]) -> int:
    """Cut up to ``excess`` tokens from the ends of ``units`` into ``right``, the longest unit first; how many it was.

    The longest is brought down to the next longest (or as far as needed) before another is touched, so none pays for
    another; and no unit below its ``least``.
    """
    left = [sum(sizes[k] - right[k] for k in unit) for unit in units]
    cut = 0
    while cut < excess:
        spare = [n for n in range(len(units)) if left[n] > least[n]]
        if not spare:
            break
        level = max(left[n] for n in spare)
        longest = [n for n in spare if left[n] == level]
        below = max([least[n] for n in longest] + [left[n] for n in spare if left[n] < level])
        # Equally long units go down together by as many whole rounds as there are; of what is left, the first pays.
        rounds = min(level - below, (excess - cut) // len(longest))
        drops = dict.fromkeys(longest, rounds) if rounds else {longest[0]: 1}
        for n, drop in drops.items():
            left[n] -= drop
            cut += drop
            for k in reversed(units[n]):
                taken = min(drop, sizes[k] - right[k])
                right[k] += taken
                drop -= taken
    return cut
