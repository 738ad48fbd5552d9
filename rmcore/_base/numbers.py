"""Which numbers an argument or an option may be: one check, and one way of saying what was expected."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from rmcore._base.errors import reject

__all__ = ["COUNT", "LARGEST", "SEED", "Within", "check_number", "check_numbers", "shown_number"]

LARGEST = 2**63 - 1
"""No whole number is larger: none that a file, a database or a tensor could hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """The numbers that make sense for something: finite ones, within bounds.

    Attributes:
        whole: no fractions.
        above, least: the bound below, itself excluded or not; at most one of them.
        below, most: the bound above, likewise.
        finite: whether infinity is none of them, as it is where a limit may be none at all.
    """

    whole: bool = False
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    finite: bool = True

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.whole else numbers.Real):
            return False
        if isinstance(value, numbers.Integral) and abs(int(value)) > LARGEST:
            return False  # 1e400 as a whole number is no float either
        number = float(value)
        if math.isnan(number) or (math.isinf(number) and (self.finite or self.whole)):
            return False
        return (
            (self.above is None or number > self.above)
            and (self.least is None or number >= self.least)
            and (self.below is None or number < self.below)
            and (self.most is None or number <= self.most)
        )

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number" if self.finite else "a number"
        low = self.above if self.least is None else self.least
        high = self.below if self.most is None else self.most
        if low is None and high is None:
            return kind
        if high is None:
            bound = f" above {low:g}" if self.least is None else f", at least {low:g}"
        elif low is None:
            bound = f" below {high:g}" if self.most is None else f", at most {high:g}"
        elif self.least is None and self.most is None:
            bound = f" strictly between {low:g} and {high:g}"
        elif self.least is not None and self.most is not None:
            bound = f" from {low:.12g} to {high:.12g}"
        else:
            bound = f" above {low:g}" if self.least is None else f", at least {low:g}"
            bound += f", below {high:g}" if self.most is None else f", at most {high:g}"
        return kind.replace("finite ", "" if None not in (low, high) else "finite ") + bound


COUNT = Within(whole=True, least=1)
SEED = Within(whole=True, least=0)


def check_numbers(holder: object, within: Within, *names: str, expected: str = "") -> None:
    """:func:`check_number` of each attribute named, but for those that are None."""
    for name in names:
        value = getattr(holder, name)
        if value is not None:
            check_number(name, value, within, expected)


def check_number(name: str, value: object, within: Within, expected: str = "") -> None:
    """Raise InputError for a value that is none of the numbers ``within``; ``expected`` says it in words of its own."""
    if value not in within:
        reject(name, shown_number(value), expected or str(within))


def shown_number(value: object) -> str:
    """What came instead of a number, briefly: Python refuses to print a whole number of thousands of digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return f"{value:.3g}" if value.bit_length() < 1000 else f"a number of {value.bit_length()} bits"
    return repr(value)[:40]
