"""Options of ``argparse`` that are numbers: none takes ``nan``, ``inf`` or ``1e400``, and each says what it expects.

parser.add_argument("--seeds", type=whole())
parser.add_argument("--share", type=real(least=0, most=1))
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Generic, TypeVar

from rmcore._base.numbers import Within, shown_number

__all__ = ["Number", "real", "whole"]

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Number(Generic[T]):
    """What ``type=`` takes: reads an option's text, or ends the command with the option, the value and the bounds."""

    kind: type[T]
    within: Within

    def __call__(self, text: str) -> T:
        """The number. Raises what argparse makes its message of."""
        try:
            value = self.kind(text)
        except ValueError:  # no number, or one of so many digits that Python does not read it
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected {self.within}") from None
        if value not in self.within:
            raise argparse.ArgumentTypeError(f"got {shown_number(value)}, expected {self.within}")
        return value


def whole(*, least: int | None = 1, most: int | None = None) -> Number[int]:
    """A whole number within bounds."""
    return Number(int, Within(whole=True, least=least, most=most))


def real(
    *, above: float | None = None, least: float | None = None, below: float | None = None, most: float | None = None
) -> Number[float]:
    """A finite number within bounds, as of :class:`~rmcore._base.numbers.Within`."""
    return Number(float, Within(above=above, least=least, below=below, most=most))
