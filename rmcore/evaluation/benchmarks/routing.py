"""What accuracy how many judge calls buy: a benchmark's scores with the most uncertain pairs put to a judge.

For each threshold on a pair's score, or each budget of calls: the benchmark's own scores where the judge decides the
pairs routed, the same where as many pairs are drawn at random, and the difference with an interval that resamples
prompts. A call is a pair put to the judge; where it gives no verdict the model's answer stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks.item import Benchmark, CountedPairs, Matrix, Score
from rmcore.evaluation.benchmarks.routing_table import RoutedScore, RoutingRow, RoutingTable
from rmcore.evaluation.benchmarks.scoring import Answers, bounds_of
from rmcore.evaluation.statistics import average_ranks
from rmcore.judge.base import Pair
from rmcore.judge.recorded import RecordedJudge

__all__ = ["BUDGETS", "LABEL", "RouteBy", "check_cuts", "label_verdicts", "recorded_verdicts", "routing_table"]

RouteBy: TypeAlias = Literal["u", "margin", "rank_sum"]
BUDGETS = (0.02, 0.10, 0.25, 0.45)
LABEL = "the label (an upper bound: a judge that is always right)"
DRAWS = 200  # of random routing: its mean is then known to a few hundredths of a point


def check_cuts(budgets: Sequence[float], thresholds: Sequence[float]) -> None:
    """Raise InputError for a budget that is no share, or a threshold that is no number."""
    for budget in budgets:
        if not 0 <= budget <= 1:
            reject("budgets", budget, "shares of the pairs, in [0, 1]")
    for threshold in thresholds:
        if not np.isfinite(threshold):
            reject("thresholds", threshold, "finite numbers")


def label_verdicts(pairs: CountedPairs) -> Matrix:
    """(P,) of a judge that always agrees with the label: no judge can do better."""
    return np.ones(len(pairs))


def recorded_verdicts(pairs: CountedPairs, judge: RecordedJudge) -> Matrix:
    """(P,) the recorded preference for the better response in [−1, 1], both orders put together; NaN where none is."""
    found = []
    for item in pairs.items:
        for better, worse in item.pairs:
            said = judge.verdict(Pair(item.prompt, item.responses[better], item.responses[worse])).preference
            found.append(np.nan if said is None else said)
    return np.array(found, dtype=np.float64)


def routing_table(
    benchmark: Benchmark,
    answers: Answers,
    verdicts: Matrix,
    *,
    judge: str = LABEL,
    by: RouteBy = "u",
    budgets: Sequence[float] = BUDGETS,
    thresholds: Sequence[float] = (),
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RoutingTable:
    """The table.

    Args:
        benchmark: whose scores.
        answers: the model's.
        verdicts: (P,) the judge's preference for each pair's better response: positive is right, NaN no verdict.
        judge: what it is called.
        by: what makes a pair worth a call, highest first: u, −|margin|, or the sum of their ranks. Equal ones are taken
            in a seeded random order.
        budgets: shares of pairs, in [0, 1].
        thresholds: pairs with a score above this are routed.
        replicates: bootstrap replicates, clustered by prompt.
        level: of the intervals.
        seed: of the bootstrap, and of what is drawn at random.

    Raises:
        InputError: a budget or threshold that is none, or verdicts of another length.
    """
    check_cuts(budgets, thresholds)
    count = len(answers.pairs)
    if len(verdicts) != count:
        reject("verdicts", f"{len(verdicts)}", f"{count}, one a pair")
    score = _route_score(answers, by)
    order = np.lexsort((np.random.default_rng(seed).permutation(count), -score))
    cuts = [(f"{100 * budget:g}%", round(budget * count)) for budget in budgets]
    cuts += [(f"{by} > {threshold:g}", int((score > threshold).sum())) for threshold in thresholds]
    draw = _Draw(benchmark, answers, verdicts, seed)
    rows = []
    for name, calls in [("no judge", 0), *cuts, ("every pair", count)]:
        routed = np.zeros(count, dtype=bool)
        routed[order[:calls]] = True
        lines = _scores(draw, routed, replicates, level, seed)
        threshold = float(score[order[calls - 1]]) if calls else float("inf")
        failed = int(np.isnan(verdicts[routed]).sum())
        rows.append(RoutingRow(name, threshold, calls, calls / count, failed, lines))
    return RoutingTable(
        benchmark=benchmark.name,
        title=benchmark.title,
        judge=judge,
        by=by,
        pairs=count,
        rows=tuple(rows),
        level=level,
        replicates=replicates,
        seed=seed,
    )


@dataclass(frozen=True)
class _Draw:
    """The credit that a choice of pairs to judge gives."""

    benchmark: Benchmark
    answers: Answers
    verdicts: Matrix
    seed: int

    def credit(self, routed: npt.NDArray[np.bool_]) -> Matrix:
        decided = routed & ~np.isnan(self.verdicts)
        return self.benchmark.credit(self.answers.pairs, np.where(decided, self.verdicts, self.answers.margin))

    def random_credit(self, calls: int) -> Matrix:
        """Mean credit of as many calls drawn at random; scores are linear in credit, so this gives their mean."""
        count = len(self.answers.pairs)
        rng = np.random.default_rng(self.seed)
        if calls in (0, count):
            return self.credit(np.full(count, calls == count))
        total: Matrix = np.zeros(())
        for _ in range(DRAWS):
            routed = np.zeros(count, dtype=bool)
            routed[rng.permutation(count)[:calls]] = True
            total = total + self.credit(routed)
        return total / DRAWS


def _scores(
    draw: _Draw, routed: npt.NDArray[np.bool_], replicates: int, level: float, seed: int
) -> tuple[RoutedScore, ...]:
    """The overall and section scores of one row, routed and random; subsets too where there is but one section."""
    pairs = draw.answers.pairs
    ours, random = draw.credit(routed), draw.random_credit(int(routed.sum()))

    def of(credit: Matrix, weight: Matrix) -> list[Score]:
        found = draw.benchmark.scores(pairs.items, credit, weight, None)
        single = sum(score.level == "section" for score in found) <= 1
        return [score for score in found if single or score.level != "subset"]

    def differences(weight: Matrix) -> Matrix:
        both = zip(of(ours, weight), of(random, weight), strict=True)
        return np.stack([one.value - other.value for one, other in both])

    one = np.ones((1, len(pairs.items)))
    found = list(zip(of(ours, one), of(random, one), strict=True))
    if routed.any() and not routed.all():
        bounds = bounds_of(differences, pairs.cluster, replicates, level, seed)
    else:  # nothing was chosen: the difference is 0 by definition
        bounds = (np.zeros(1), np.zeros(1))
    low, high = (np.broadcast_to(bound, len(found)) for bound in bounds)
    return tuple(
        RoutedScore(a.level, a.name, float(a.value[0]), float(b.value[0]), float(lo), float(hi))
        for (a, b), lo, hi in zip(found, low, high, strict=True)
    )


def _route_score(answers: Answers, by: RouteBy) -> Matrix:
    closeness = -np.abs(answers.margin)
    if by == "margin":
        return closeness
    if by == "u":
        return answers.uncertainty
    if by != "rank_sum":
        reject("by", repr(by), "'u', 'margin' or 'rank_sum'")
    finite = np.isfinite(answers.uncertainty)
    top = answers.uncertainty[finite].max(initial=1.0) + 1.0  # what the inputs tell nothing of comes first
    return average_ranks(np.where(finite, answers.uncertainty, top)) + average_ranks(closeness)
