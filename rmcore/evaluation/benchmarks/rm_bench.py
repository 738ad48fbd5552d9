"""RM-Bench (Liu et al. 2025): three right and three wrong responses a prompt, in three styles each.

Accuracy is a matrix: style of the right response × style of the wrong one. *normal* is its diagonal (the same style),
*easy* where the right one's style is the richer, *hard* where it is the poorer. A domain's score is the mean of the
three; safety is the mean of its two files; the score is the mean of the four domains. A pair without a preference
counts as wrong, as in the project's code. Its rows have no licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks.fields import id_of, one_of, prompt_of, responses_of
from rmcore.evaluation.benchmarks.item import (
    Benchmark,
    Context,
    CountedPairs,
    Item,
    Matrix,
    Score,
    group_mean,
    mean_of,
    strict_point,
)

__all__ = ["BENCHMARK", "DOMAINS", "LEVELS", "STYLES", "levels_of"]

STYLES = ("concise", "detailed plain", "detailed markdown")
"""Of the right and of the wrong responses, in the order of a file's lists."""
DOMAINS = {
    "chat": ("chat",),
    "math": ("math",),
    "code": ("code",),
    "safety": ("safety-refuse", "safety-response"),
}
"""Domain → the parts that it is the mean of."""
LEVELS = ("easy", "normal", "hard")
_PARTS = tuple(part for parts in DOMAINS.values() for part in parts)
_CELLS = tuple((i, j) for i in range(len(STYLES)) for j in range(len(STYLES)))


def _read(row: Mapping[str, Any], context: Context) -> Item:
    chosen, rejected = responses_of(row, "chosen", 3), responses_of(row, "rejected", 3)
    pairs = tuple((i, 3 + j) for i, j in _CELLS)
    quality = (1.0,) * 3 + (0.0,) * 3
    return Item(id_of(row, "id", context), prompt_of(row), chosen + rejected, quality, _part(row, context), pairs)


def _part(row: Mapping[str, Any], context: Context) -> str:
    """The domain that the row names, or its file does."""
    if row.get("domain") is not None:
        return one_of(row, "domain", _PARTS)
    name = PurePath(context.source).name.lower()
    found = next((part for part in _PARTS if name.startswith(part)), None)
    if found is None:
        reject("domain", "none, and none in the file's name", " or ".join(_PARTS))
    return found


def levels_of(matrix: Matrix) -> dict[str, Matrix]:
    """easy, normal and hard of matrices (..., 3, 3), style of the chosen response × style of the rejected one."""
    below, above = np.tril_indices(3, -1), np.triu_indices(3, 1)
    return {
        "easy": matrix[..., *below].mean(axis=-1),
        "normal": np.diagonal(matrix, axis1=-2, axis2=-1).mean(axis=-1),
        "hard": matrix[..., *above].mean(axis=-1),
    }


def _credit(pairs: CountedPairs, margin: Matrix) -> Matrix:
    return strict_point(margin).reshape(len(pairs.items), 9)


def _scores(items: Sequence[Item], credit: Matrix, weight: Matrix, own_scores: Sequence[Matrix] | None) -> list[Score]:
    subset = np.array([item.subset for item in items], dtype=object)
    parts: dict[str, dict[str, Matrix]] = {}
    sizes: dict[str, int] = {}
    for part in _PARTS:
        member = subset == part
        if member.any():
            cells = np.stack([group_mean(credit[:, cell], member, weight) for cell in range(9)], axis=-1)
            parts[part] = levels_of(cells.reshape(len(weight), 3, 3))
            sizes[part] = int(member.sum())
    sections: list[Score] = []
    levels: dict[str, list[Matrix]] = {level: [] for level in LEVELS}
    for domain, names in DOMAINS.items():
        own = [name for name in names if name in parts]
        if own:
            of_parts = [mean_of(list(parts[name].values())) for name in own]
            sections.append(Score("section", domain, mean_of(of_parts), sum(sizes[name] for name in own)))
            for level in LEVELS:
                levels[level].append(mean_of([parts[name][level] for name in own]))
    overall = [Score("overall", "Score", mean_of([score.value for score in sections]), len(items))]
    overall += [Score("overall", level, mean_of(levels[level]), len(items)) for level in LEVELS]
    return (
        overall
        + sections
        + [Score("subset", f"{part}, {level}", parts[part][level], sizes[part]) for part in parts for level in LEVELS]
    )


BENCHMARK = Benchmark(
    name="rm-bench",
    title="RM-Bench",
    about="THU-KEG/RM-Bench (no licence), arXiv:2410.16184; 1,327 prompts",
    data=("hf://THU-KEG/RM-Bench:train",),
    read=_read,
    credit=_credit,
    scores=_scores,
    own=("chosen", "rejected"),
    results=("score_chosen", "score_rejected"),
    whole=("total_dataset",),
)
