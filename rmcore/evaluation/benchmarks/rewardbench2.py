"""RewardBench 2 (Malik et al. 2025): one right response of four, and Ties with several.

An item is right where the chosen response has the highest score of all, and 1/t right where t share the highest. Ties
has its own rule (:func:`ties_score`), which compares gaps between right and wrong responses with the spread among the
right ones, so it needs scores, not only preferences. The score is the plain mean of the subsets. Rules of
``reroll_and_score_dataset`` and ``process_single_model`` in ``rewardbench.utils``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
)

__all__ = ["BENCHMARK", "SUBSETS", "TIES", "best_of", "ties_score"]

TIES = "Ties"
SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", TIES)
_TIES_ID = re.compile(r"(ref|tied):(\d+)")


def _read(row: Mapping[str, Any], context: Context) -> Item:
    prompt, subset = prompt_of(row), one_of(row, "subset", SUBSETS)
    chosen, rejected = responses_of(row, "chosen"), responses_of(row, "rejected")
    for name, size in (("num_correct", len(chosen)), ("total_completions", len(chosen) + len(rejected))):
        if row.get(name) is not None and row[name] != size:
            reject(name, row[name], f"{size}, as there are {len(chosen)} chosen and {len(rejected)} rejected responses")
    own, cluster = id_of(row, "id", context), ""
    if subset != TIES and len(chosen) != 1:
        reject("chosen", f"{len(chosen)} responses", "one, as everywhere but in Ties")
    if subset == TIES:
        match = _TIES_ID.fullmatch(own)
        if match is None:
            reject("id", repr(own)[:40], "ref:NUMBER or tied:NUMBER, as everywhere in Ties")
        cluster = f"{TIES}:{match[2]}"  # the two prompts of a number are scored together
    quality = (1.0,) * len(chosen) + (0.0,) * len(rejected)
    return Item(own, prompt, chosen + rejected, quality, subset, cluster=cluster)


def best_of(pairs: CountedPairs, margin: Matrix) -> Matrix:
    """(N,) credit of the better response against all worse ones of its item: 1/t where t are best together, else 0.

    ``margin`` is (P,), of each counted pair; items have one better response.
    """
    lost = pairs.sum((margin < 0).astype(np.float64)) > 0
    return np.where(lost, 0.0, 1.0 / (1.0 + pairs.sum((margin == 0).astype(np.float64))))


def _credit(pairs: CountedPairs, margin: Matrix) -> Matrix:
    return best_of(pairs, margin)[:, None]


def _scores(items: Sequence[Item], credit: Matrix, weight: Matrix, own_scores: Sequence[Matrix] | None) -> list[Score]:
    subset = np.array([item.subset for item in items], dtype=object)
    sections = [
        Score("section", name, group_mean(credit[:, 0], subset == name, weight), int((subset == name).sum()))
        for name in SUBSETS
        if name != TIES and (subset == name).any()
    ]
    ties = int((subset == TIES).sum())
    if ties and own_scores is not None:
        sections.append(Score("section", TIES, ties_score(items, own_scores, weight), ties))
    used = len(items) if own_scores is not None else len(items) - ties
    name = "Score" if used == len(items) else "Score without Ties"
    if not sections:
        return []
    return [Score("overall", name, mean_of([score.value for score in sections]), used), *sections]


# -- Ties ------------------------------------------------------------------------------------------------------------


def ties_score(items: Sequence[Item], scores: Sequence[Matrix], weight: Matrix | None = None) -> Matrix:
    """(B,) the score of Ties.

    Of each item: it is accurate if the worst right response beats the best wrong one; gap is their difference; spread
    is the difference between the best right and the worst right one, if there are several. Over numbers that have both
    a ``ref`` and a ``tied`` item: 0.3 tied accuracy + 0.3 ref accuracy + 0.2 mean[gap_tied > spread] +
    0.2 mean[min(gap_ref, gap_tied) > spread] + 0.01 mean tanh(min(gap_ref, gap_tied) / spread − 1), the last over
    positive spreads only. A mean over nothing is 0, as in the project's code.

    Args:
        items: of Ties; others are not looked at.
        scores: (K,) of each item, any scale: the rule is the same for a·s + b with a > 0.
        weight: (B, N); None is one weighting of ones.
    """
    weights = np.ones((1, len(items))) if weight is None else weight
    found: dict[str, dict[int, tuple[int, float, float]]] = {"ref": {}, "tied": {}}
    for k, (item, score) in enumerate(zip(items, scores, strict=True)):
        match = _TIES_ID.fullmatch(item.id) if item.subset == TIES else None
        if match is None:
            continue
        right = np.asarray(item.quality) > 0
        spread = float(np.ptp(score[right])) if right.sum() > 1 else float("nan")
        found[match[1]][int(match[2])] = (k, float(score[right].min() - score[~right].max()), spread)
    total = np.zeros(len(weights))
    for kind, share in (("tied", 0.3), ("ref", 0.3)):
        total += share * _mean({k: gap > 0 for k, gap, _ in found[kind].values()}, weights)
    both = [(*found["tied"][number], found["ref"][number][1]) for number in found["tied"] if number in found["ref"]]
    spreads = [entry for entry in both if not np.isnan(entry[2])]
    total += 0.2 * _mean({k: gap > spread for k, gap, spread, _ in spreads}, weights)
    total += 0.2 * _mean({k: min(ref, gap) > spread for k, gap, spread, ref in spreads}, weights)
    margins = {k: float(np.tanh(min(ref, gap) / spread - 1)) for k, gap, spread, ref in spreads if spread > 0}
    return total + 0.01 * _mean(margins, weights)


def _mean(value: Mapping[int, float], weight: Matrix) -> Matrix:
    own = weight[:, list(value)]
    total = own.sum(axis=1)
    return np.divide(own @ np.array(list(value.values()), dtype=float), total, out=np.zeros(len(own)), where=total > 0)


BENCHMARK = Benchmark(
    name="rewardbench2",
    title="RewardBench 2",
    about="allenai/reward-bench-2 (ODC-By), arXiv:2506.01937; 1,865 prompts",
    data=("hf://allenai/reward-bench-2:test",),
    read=_read,
    credit=_credit,
    scores=_scores,
    own=("chosen", "rejected"),
    results=("results", "scores"),
)
