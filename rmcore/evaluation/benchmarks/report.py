"""A benchmark's scores with their intervals, as a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rmcore.evaluation.benchmarks.item import Level

__all__ = ["BenchmarkReport", "ScoreLine", "number", "percent", "points"]


@dataclass(frozen=True)
class ScoreLine:
    """One score: a share in [0, 1] (Ties may exceed 1 by 0.01), its bounds, the items behind it.

    ``low`` and ``high`` are NaN where no interval can be had: one prompt, or no replicates.
    """

    level: Level
    name: str
    score: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class BenchmarkReport:
    """What a model scores on a benchmark.

    Attributes:
        benchmark: its name.
        title: what people call it.
        model: as it was given.
        mode: ``difference`` or ``concat``.
        sources: where the rows came from.
        items: rows that count.
        pairs: pairs of responses that count.
        ties: of these, those on which the model has no preference.
        lines: the scores, ``overall`` first.
        level: of the intervals, which are percentile bootstraps over prompts.
        replicates: bootstrap replicates.
        seed: of the bootstrap.
    """

    benchmark: str
    title: str
    model: str
    mode: str
    sources: tuple[str, ...]
    items: int
    pairs: int
    ties: int
    lines: tuple[ScoreLine, ...]
    level: float
    replicates: int
    seed: int

    @property
    def score(self) -> float:
        """The benchmark's headline number."""
        return self.lines[0].score

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN is None."""
        content = asdict(self)
        content["sources"] = list(self.sources)
        content["lines"] = [
            {key: number(value) if isinstance(value, float) else value for key, value in asdict(line).items()}
            for line in self.lines
        ]
        return content

    def to_markdown(self) -> str:
        """A heading and a table."""
        ties = f", {self.ties} of them without a preference of the model" if self.ties else ""
        head = (
            f"# {self.title}: {self.model}\n\n{self.items} prompts, {self.pairs} pairs{ties}; {self.mode} mode. "
            f"Intervals: {100 * self.level:g}%, percentile bootstrap over prompts, {self.replicates} replicates, "
            f"seed {self.seed}.\n\n"
        )
        return head + _table(self.lines)


def _table(lines: Sequence[ScoreLine]) -> str:
    rows = ["| | score | interval | prompts |", "|---|---:|---:|---:|"]
    for line in lines:
        name = line.name.replace("|", "\\|")
        name = {"overall": f"**{name}**", "section": name, "subset": f"*{name}*"}[line.level]
        bounds = "-" if math.isnan(line.low) else f"{percent(line.low)} to {percent(line.high)}"
        rows.append(f"| {name} | {percent(line.score)} | {bounds} | {line.items} |")
    return "\n".join(rows) + "\n"


def percent(value: float) -> str:
    """A share as tables have it; ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of shares as tables have it, in points; what rounds to nothing has no minus."""
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def number(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None
