"""Figures in Prometheus' text format (version 0.0.4), without a client library: counts, gauges, histograms."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["CONTENT_TYPE", "Family", "Histogram", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass
class Family:
    """All samples of one name.

    Attributes:
        name: without the ``_total`` of a counter, which is added.
        kind: ``counter`` or ``gauge``.
        help: one line.
        samples: values by their labels.
    """

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]] = ()

    @classmethod
    def of(cls, name: str, kind: str, help: str, value: float) -> Family:
        """One value without labels."""
        return cls(name, kind, help, [({}, value)])

    def lines(self) -> Iterable[str]:
        """The family's text."""
        name = f"{self.name}_total" if self.kind == "counter" else self.name
        yield f"# HELP {name} {self.help}"
        yield f"# TYPE {name} {self.kind}"
        for labels, value in self.samples:
            yield f"{name}{_labels(labels)} {_number(value)}"


class Histogram:
    """Observations in cumulative buckets, by labels.

    Args:
        name: of the family, with its unit.
        help: one line.
        buckets: upper bounds, ascending; +Inf is added.
        labels: names of the labels.
    """

    def __init__(self, name: str, help: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.buckets, self.labels = name, help, tuple(buckets), tuple(labels)
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Count one value under the values of the labels."""
        counts = self._counts.setdefault(labels, [0] * (len(self.buckets) + 1))
        counts[bisect.bisect_left(self.buckets, value)] += 1
        self._sums[labels] = self._sums.get(labels, 0.0) + value

    def lines(self) -> Iterable[str]:
        """The family's text."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        for values, counts in self._counts.items():
            labels = dict(zip(self.labels, values, strict=True))
            total = 0
            for bound, count in zip((*self.buckets, math.inf), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_labels({**labels, 'le': _number(bound)})} {total}"
            yield f"{self.name}_sum{_labels(labels)} {_number(self._sums[values])}"
            yield f"{self.name}_count{_labels(labels)} {total}"


def render(families: Iterable[Family | Histogram]) -> str:
    """The page."""
    return "\n".join(line for family in families for line in family.lines()) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
