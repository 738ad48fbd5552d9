"""JudgeBench (Tan et al. 2025): pairs of answers of which one is right, in four groups.

Accuracy by group and over all pairs. The project asks in both orders and counts a pair as right where the decisions for
the label outweigh those against it, so that no preference counts as wrong, and neither do two orders that contradict
each other count. A model in difference mode has one answer for both orders, one in concat mode is asked in both and the
two are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks.fields import id_of, one_of, text_of
from rmcore.evaluation.benchmarks.item import (
    Benchmark,
    Context,
    CountedPairs,
    Item,
    Matrix,
    Score,
    group_mean,
    strict_point,
)

__all__ = ["BENCHMARK", "GROUPS", "group_of"]

GROUPS = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
"""Group → what the names of its sources begin with."""


def group_of(source: str) -> str:
    """The group of a source; raises InputError for one that JudgeBench does not have."""
    found = next((group for group, start in GROUPS.items() if source.startswith(start)), None)
    if found is None:
        reject("source", repr(source)[:60], f"one that begins with {', '.join(GROUPS.values())}")
    return found


def _read(row: Mapping[str, Any], context: Context) -> Item:
    responses = (text_of(row, "response_A"), text_of(row, "response_B"))
    source = text_of(row, "source")
    group_of(source)
    first = one_of(row, "label", ("A>B", "B>A")) == "A>B"
    own = id_of(row, "pair_id", context)
    return Item(own, text_of(row, "question"), responses, (float(first), float(not first)), source)


def _credit(pairs: CountedPairs, margin: Matrix) -> Matrix:
    return strict_point(margin)[:, None]


def _scores(items: Sequence[Item], credit: Matrix, weight: Matrix, own_scores: Sequence[Matrix] | None) -> list[Score]:
    group = np.array([group_of(item.subset) for item in items], dtype=object)
    subset = np.array([item.subset for item in items], dtype=object)
    found = [Score("overall", "Accuracy", group_mean(credit[:, 0], np.full(len(items), True), weight), len(items))]
    for level, labels, names in (
        ("section", group, [name for name in GROUPS if (group == name).any()]),
        ("subset", subset, sorted(set(subset.tolist()))),
    ):
        for name in names:
            member = labels == name
            found.append(Score(level, name, group_mean(credit[:, 0], member, weight), int(member.sum())))  # type: ignore[arg-type]
    return found


BENCHMARK = Benchmark(
    name="judgebench",
    title="JudgeBench",
    about="ScalerLab/JudgeBench, arXiv:2410.12784; 620 pairs",
    data=("hf://ScalerLab/JudgeBench:gpt", "hf://ScalerLab/JudgeBench:claude"),
    read=_read,
    credit=_credit,
    scores=_scores,
    own=("response_A", "response_B"),
    results=("judgments",),
)
