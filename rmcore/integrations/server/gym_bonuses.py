"""What NeMo-Gym's ``genrm_compare`` adds to rewards for being short and plain, by the names of its configuration.

Read from ``resources_servers/genrm_compare/utils.py`` of NeMo-Gym 0.4 and 0.7 (``apply_length_bonuses``,
``apply_style_penalties``). All of it looks at a group's rewards and at how long its members' reasoning and answers are:

    reasoning_bonus, answer_bonus   for the group's shortest one, if its reward is among the best ``top_percentile``
    group_*_length_penalty_coeff    times (1 − (length − shortest)/(longest − shortest)) less its mean over the group
    group_style_penalty_coeff       the same, of headings, list items, bold passages and emoji a character
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from rmcore._base.errors import reject
from rmcore._base.numbers import Within, check_number

__all__ = ["GymBonuses", "Shape", "bonuses_of"]

_CODE = re.compile(r"```.*?```", re.DOTALL)
_MARKS = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),  # headings
    re.compile(r"^[^\S\n]*\d+\.\s", re.MULTILINE),  # numbered items
    re.compile(r"^[^\S\n]*[-*+]\s", re.MULTILINE),  # items
    re.compile(r"\*\*[^*\n]+\*\*"),  # bold
    re.compile(r"__[^_\n]+__"),
    re.compile(
        "[\U0001f600-\U0001f64f\U0001f300-\U0001f5ff\U0001f680-\U0001f6ff\U0001f1e0-\U0001f1ff\u2702-\u27b0"
        "\u24c2-\U0001f251\U0001f900-\U0001f9ff\U0001fa00-\U0001fa6f\U0001fa70-\U0001faff\u2600-\u26ff]"
    ),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is remembered of a response: characters of its reasoning and of its answer, marks a character of that."""

    reasoning: int
    answer: int
    style: float

    @classmethod
    def of(cls, reasoning: str, answer: str) -> Shape:
        """Of a response's texts; code between triple backticks has no style."""
        prose = _CODE.sub("", answer)
        length = len(prose.strip())
        marks = sum(len(mark.findall(prose)) for mark in _MARKS)
        return cls(len(reasoning.strip()), len(answer.strip()), marks / length if length else 0.0)


@dataclass(frozen=True)
class GymBonuses:
    """How much of each; 0 for none.

    Raises InputError for what is no such number.
    """

    reasoning_bonus: float = 0.0
    answer_bonus: float = 0.0
    top_percentile: float = 0.2
    group_reasoning_length_penalty_coeff: float = 0.0
    group_answer_length_penalty_coeff: float = 0.0
    group_style_penalty_coeff: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            check_number(one.name, getattr(self, one.name), _bounds(one.name))

    def __bool__(self) -> bool:
        return any(getattr(self, one.name) > 0 for one in fields(self) if one.name != "top_percentile")

    def applied(self, rewards: Sequence[float], shapes: Sequence[Shape]) -> list[float]:
        """Rewards with what their responses' shapes add. One that is NaN stays so, and no other is compared with it.

        Args:
            rewards: of a group, K of them.
            shapes: of its responses, in the same order.
        """
        known = [k for k, reward in enumerate(rewards) if math.isfinite(reward)]
        result = list(rewards)
        if not self or len(known) < 2:
            return result
        own = [shapes[k] for k in known]
        found = [rewards[k] for k in known]
        enough = sorted(found, reverse=True)[max(0, int(len(found) * self.top_percentile) - 1)]
        for bonus, lengths in (
            (self.reasoning_bonus, [shape.reasoning for shape in own]),
            (self.answer_bonus, [shape.answer for shape in own]),
        ):
            written = [k for k, length in enumerate(lengths) if length]
            shortest = min(written, key=lengths.__getitem__, default=None)
            if bonus and shortest is not None and found[shortest] >= enough:
                found[shortest] += bonus
        for coefficient, values in (
            (self.group_reasoning_length_penalty_coeff, [float(shape.reasoning) for shape in own]),
            (self.group_answer_length_penalty_coeff, [float(shape.answer) for shape in own]),
            (self.group_style_penalty_coeff, [shape.style for shape in own]),
        ):
            found = [one + coefficient * weight for one, weight in zip(found, _less_is_more(values), strict=True)]
        for k, reward in zip(known, found, strict=True):
            result[k] = reward
        return result


def _bounds(name: str) -> Within:
    return Within(least=0, most=1 if name == "top_percentile" else None)


def bonuses_of(pairs: Iterable[str]) -> GymBonuses:
    """Bonuses from ``NAME=VALUE``, as of a command line. Raises InputError."""
    known, given = {one.name for one in fields(GymBonuses)}, dict[str, float]()
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in known:
            reject("--nemo-gym-bonus", repr(pair), f"NAME=VALUE, with one of {', '.join(sorted(known))}")
        try:
            given[name] = float(value)
        except ValueError:
            reject("--nemo-gym-bonus", repr(pair), f"a number after {name}=")
        if given[name] not in (within := _bounds(name)):
            reject("--nemo-gym-bonus", repr(pair), f"{within} after {name}=")
    return GymBonuses(**given)


def _less_is_more(values: Sequence[float]) -> list[float]:
    """1 for the least, 0 for the most, in between in proportion; less their mean. 0 where all are equal."""
    least, most = min(values), max(values)
    if least == most:
        return [0.0] * len(values)
    weights = [1.0 - (value - least) / (most - least) for value in values]
    mean = sum(weights) / len(weights)
    return [weight - mean for weight in weights]
