"""Several models on one benchmark, in one table: scores, and differences from the first with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks.item import Benchmark, Level, Matrix, Score
from rmcore.evaluation.benchmarks.report import number, percent
from rmcore.evaluation.benchmarks.scoring import Answers, bounds_of

__all__ = ["ComparedScore", "Comparison", "compare"]


@dataclass(frozen=True)
class ComparedScore:
    """One score of every model.

    Attributes:
        level: ``overall``, ``section`` or ``subset``.
        name: which score.
        items: prompts behind it.
        scores: one a model.
        low: lower bounds of each model's score less the first's; 0 for the first, NaN where no interval can be had.
        high: upper bounds.
    """

    level: Level
    name: str
    items: int
    scores: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Models on one benchmark; the resamples of prompts are the same for all, so differences are paired."""

    benchmark: str
    title: str
    models: tuple[str, ...]
    lines: tuple[ComparedScore, ...]
    level: float
    replicates: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN is None."""
        content = asdict(self)
        content["models"] = list(self.models)
        content["lines"] = [
            asdict(line) | {key: [number(x) for x in getattr(line, key)] for key in ("scores", "low", "high")}
            for line in self.lines
        ]
        return content

    def to_markdown(self) -> str:
        """A line a score: each model's, and behind it the difference from the first model in points."""
        first, *others = (model.replace("|", "\\|") for model in self.models)
        cells = ["", "prompts", first, *(cell for name in others for cell in (name, f"− {first}, points"))]
        lines = ["| " + " | ".join(cells) + " |", "|---|" + "---:|" * (len(cells) - 1)]
        for line in self.lines:
            name = line.name.replace("|", "\\|")
            name = {"overall": f"**{name}**", "section": name, "subset": f"*{name}*"}[line.level]
            row = [name, str(line.items), percent(line.scores[0])]
            for k in range(1, len(self.models)):
                row += [percent(line.scores[k]), _difference(line, k)]
            lines.append("| " + " | ".join(row) + " |")
        notes = (
            f"Intervals: {100 * self.level:g}%, paired percentile bootstrap over prompts, {self.replicates} "
            f"replicates, seed {self.seed}.\n"
        )
        return f"# {self.title}\n\n" + "\n".join(lines) + f"\n\n{notes}"


def _difference(line: ComparedScore, k: int) -> str:
    point = line.scores[k] - line.scores[0]
    if math.isnan(point):
        return "-"
    bounds = "" if math.isnan(line.low[k]) else f" [{100 * line.low[k]:+.1f}, {100 * line.high[k]:+.1f}]"
    return f"{100 * point:+.1f}{bounds}"


def compare(
    benchmark: Benchmark,
    answers: Mapping[str, Answers],
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare models by their answers to the same items.

    Args:
        benchmark: whose scores.
        answers: model → its answers; the first is what the others are compared with.
        replicates: bootstrap replicates, clustered by prompt.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than two models, or answers to other items.
    """
    if len(answers) < 2:
        reject("answers", f"{len(answers)} models", "at least two")
    first, *others = answers.values()
    for name, other in answers.items():
        if other.pairs.items != first.pairs.items:
            reject(f"answers[{name!r}]", "answers to other items", "those of the first model")
    credit_of = [benchmark.credit(each.pairs, each.margin) for each in answers.values()]
    items = first.pairs.items

    def of(k: int, weight: Matrix) -> list[Score]:
        return benchmark.scores(items, credit_of[k], weight, list(answers.values())[k].scores)

    def differences(weight: Matrix) -> Matrix:
        base = np.stack([score.value for score in of(0, weight)])
        found = [np.stack([score.value for score in of(k, weight)]) - base for k in range(1, len(credit_of))]
        return np.concatenate(found)

    found = [of(k, np.ones((1, len(items)))) for k in range(len(credit_of))]
    bounds = bounds_of(differences, first.pairs.cluster, replicates, level, seed)
    shape = (len(others), len(found[0]))
    low, high = (np.broadcast_to(bound, shape[0] * shape[1]).reshape(shape) for bound in bounds)
    lines = tuple(
        ComparedScore(
            level=score.level,
            name=score.name,
            items=score.items,
            scores=tuple(float(own[k].value[0]) for own in found),
            low=(0.0, *low[:, k].tolist()),
            high=(0.0, *high[:, k].tolist()),
        )
        for k, score in enumerate(found[0])
    )
    return Comparison(benchmark.name, benchmark.title, tuple(answers), lines, level, replicates, seed)
