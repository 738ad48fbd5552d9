"""Accuracy by part of the data, of pairs and of rows that hold several of them (best-of-n, as in RewardBench 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.report import Array
from rmcore.evaluation.statistics import correctness

__all__ = ["SubsetAccuracy", "accuracy_by_subset", "subsets_to_markdown"]

ALL = "all"


@dataclass(frozen=True)
class SubsetAccuracy:
    """Accuracy on one part of the data, ties in the labels left out.

    Attributes:
        name: what the rows call it; "all" for everything, "-" for rows that name none.
        n_pairs: labelled pairs.
        accuracy: share of them that the head orders as labelled; no preference counts half.
        n_rows: rows with such a pair.
        row_accuracy: share of rows all of whose pairs are so ordered: of best-of-n rows, those whose chosen responses
            all beat all rejected ones. A row whose worst pair has no preference counts half.
    """

    name: str
    n_pairs: int
    accuracy: float
    n_rows: int
    row_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def accuracy_by_subset(
    logit: Array, label: Array, rows: Sequence[int], subsets: Sequence[str | None]
) -> tuple[SubsetAccuracy, ...]:
    """One entry a subset, in the order they come, then all together; nothing where no pair has a label but 0.5.

    Args:
        logit: (N,) the head's g for the pair's first response.
        label: (N,) the probability that it is the better one.
        rows: (N,) the row that each pair is of.
        subsets: (N,) its subset, or None.

    Raises:
        InputError: the lengths differ.
    """
    sizes = {len(logit), len(label), len(rows), len(subsets)}
    if len(sizes) != 1:
        reject("logit, label, rows, subsets", f"lengths {sorted(sizes)}", "one length")
    keep = label != 0.5
    if not keep.any():
        return ()
    right = correctness(logit[keep], label[keep])
    row = np.asarray(rows)[keep]
    names = np.array(["-" if name is None else name for name in subsets], dtype=object)[keep]
    parts = [_accuracy(name, right[names == name], row[names == name]) for name in dict.fromkeys(names.tolist())]
    return (*parts, _accuracy(ALL, right, row))


def _accuracy(name: str, right: Array, row: np.ndarray) -> SubsetAccuracy:
    kinds, index = np.unique(row, return_inverse=True)
    worst = np.ones(len(kinds))
    np.minimum.at(worst, index, right)
    return SubsetAccuracy(name, len(right), float(right.mean()), len(kinds), float(worst.mean()))


def subsets_to_markdown(parts: Sequence[SubsetAccuracy]) -> str:
    """A table of :func:`accuracy_by_subset`'s result."""
    lines = ["| subset | pairs | accuracy | rows | all of a row right |", "|---|---:|---:|---:|---:|"]
    for part in parts:
        name = part.name.replace("|", "\\|").replace("\n", " ")
        lines.append(
            f"| {name} | {part.n_pairs} | {100 * part.accuracy:.1f}% | {part.n_rows} | {100 * part.row_accuracy:.1f}% |"
        )
    return "\n".join(lines) + "\n"
