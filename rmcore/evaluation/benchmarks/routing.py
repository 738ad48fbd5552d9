"""What accuracy how many judge calls buy: a benchmark's scores with the most uncertain pairs put to a judge.

For each threshold on a pair's score, or each budget of calls: the benchmark's own scores where the judge decides the
pairs routed, the same where as many pairs are drawn at random, and the difference with an interval that resamples
prompts. A call is a pair put to the judge; where it gives no verdict the model's answer stands.

A judge that is live is asked about the pairs that some line of the table needs: those routed, and as many drawn at
random. Where all verdicts are known, random routing is the mean of many draws; otherwise it is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks.choice import BUDGETS, Choice, RouteBy, Rows, check_cuts, choose
from rmcore.evaluation.benchmarks.item import Benchmark, Matrix, Score, group_mean
from rmcore.evaluation.benchmarks.routing_table import PositionLean, RoutedScore, RoutingRow, RoutingTable, Spent
from rmcore.evaluation.benchmarks.scoring import Answers, bounds_of
from rmcore.evaluation.benchmarks.verdicts import LABEL, Mask, Verdicts, label_verdicts, recorded_verdicts
from rmcore.model.error_prior import ErrorPrior

__all__ = [
    "BUDGETS",
    "LABEL",
    "Draw",
    "RouteBy",
    "check_cuts",
    "label_verdicts",
    "position_lean",
    "random_order",
    "recorded_verdicts",
    "routed_mask",
    "routing_table",
]

DRAWS = 200  # of random routing: its mean is then known to a few hundredths of a point


def routing_table(
    benchmark: Benchmark,
    answers: Answers,
    verdicts: Verdicts,
    *,
    by: RouteBy = "u",
    budgets: Sequence[float] = BUDGETS,
    thresholds: Sequence[float] = (),
    every: bool = False,
    prior: ErrorPrior | None = None,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> RoutingTable:
    """The table.

    Args:
        benchmark: whose scores.
        answers: the model's.
        verdicts: the judge's, on the same pairs; a live judge is asked for what the table needs.
        by: what makes a pair worth a call, highest first (:data:`.choice.RouteBy`). Equal ones are taken in a seeded
            random order.
        budgets: shares of pairs, in [0, 1].
        thresholds: pairs with a score above this are routed.
        every: ask a live judge about every pair, for a last line with all of them.
        prior: of the model, for ``by="learned"``.
        replicates: bootstrap replicates, clustered by prompt.
        level: of the intervals.
        seed: of the bootstrap, and of what is drawn at random.

    Raises:
        InputError: a budget or threshold that is none, verdicts of another length, or a score that the model does not
            know.
    """
    check_cuts(budgets, thresholds)
    count = len(answers.pairs)
    if len(verdicts) != count:
        reject("verdicts", f"{len(verdicts)}", f"{count}, one a pair")
    chosen = choose(answers, verdicts, by, budgets=budgets, thresholds=thresholds, prior=prior, seed=seed)
    nothing = np.zeros(0, dtype=np.intp)
    chosen = [Choice("no judge", nothing, float("inf")), *chosen]
    for choice in chosen:
        verdicts.ask(choice.rows)
    at_random = random_order(count, seed)
    if not verdicts.complete:
        verdicts.ask(at_random[: max(len(choice.rows) for choice in chosen)])
    if every:
        verdicts.ask(np.arange(count))
    if verdicts.complete:
        chosen.append(Choice("every pair", np.arange(count), float("-inf")))
    draw = Draw(benchmark, answers, verdicts, seed)
    rows, lost = [], []
    for choice in chosen:
        if not verdicts.asked[choice.rows].all() or not verdicts.asked[at_random[: len(choice.rows)]].all():
            lost.append(choice.name)
            continue
        routed = routed_mask(choice.rows, count)
        rows.append(
            RoutingRow(
                choice.name,
                choice.threshold,
                len(choice.rows),
                len(choice.rows) / count,
                int(np.isnan(verdicts.preference[routed]).sum()),
                _scores(draw, routed, replicates, level, seed),
                Spent.of(verdicts, routed),
            )
        )
    return RoutingTable(
        benchmark=benchmark.name,
        title=benchmark.title,
        judge=verdicts.name,
        by=by,
        pairs=count,
        rows=tuple(rows),
        level=level,
        replicates=replicates,
        seed=seed,
        notes=_notes(verdicts, lost),
        currency=verdicts.currency,
        position=position_lean(verdicts, replicates, level, seed),
        model_seconds=answers.seconds,
        model_tokens=float("nan") if answers.tokens is None else float(answers.tokens.sum()),
    )


def position_lean(verdicts: Verdicts, replicates: int, level: float, seed: int) -> PositionLean | None:
    """How far the judge goes by the place, of all pairs with both orders known apart; None without any."""
    verdicts.find_lean()
    known = ~np.isnan(verdicts.lean)
    if not known.any():
        return None
    pairs = verdicts.pairs
    first = pairs.sum(np.where(known, 0.5 + 0.5 * verdicts.lean, 0.0))
    count = pairs.sum(known.astype(np.float64))
    member = np.full(len(pairs.items), True)

    def share(weight: Matrix) -> Matrix:
        return group_mean(first, member, weight, count)[None]

    low, high = bounds_of(share, pairs.cluster, replicates, level, seed)
    value = share(np.ones((1, len(pairs.items))))
    return PositionLean(float(value.item()), float(low.item()), float(high.item()), int(known.sum()))


def random_order(count: int, seed: int) -> Rows:
    """The order in which one draw of random routing takes pairs; every budget takes its beginning."""
    return np.random.default_rng([seed, 1]).permutation(count)


def routed_mask(rows: Rows, count: int) -> Mask:
    """(P,) bool of row numbers."""
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


def _notes(verdicts: Verdicts, lost: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if not verdicts.complete:
        notes.append(f"The judge was asked about {int(verdicts.asked.sum())} of {len(verdicts)} pairs, so random "
                     "routing is a single draw")  # fmt: skip
    if lost:
        notes.append(f"{', '.join(lost)} left out, as {verdicts.ended or 'not all its pairs were asked'}")
    flips, both = verdicts.flips
    if both:
        notes.append(f"The judge contradicts itself when the order is exchanged in {flips} of {both} pairs "
                     f"({100 * flips / both:.1f}%)")  # fmt: skip
    return tuple(notes)


@dataclass(frozen=True)
class Draw:
    """The credit that a choice of pairs to judge gives."""

    benchmark: Benchmark
    answers: Answers
    verdicts: Verdicts
    seed: int

    @property
    def title(self) -> str:
        """What is scored."""
        return self.benchmark.title

    def credit(self, routed: Mask) -> Matrix:
        """(N, C) where the judge decides the pairs routed."""
        return self.benchmark.credit(self.answers.pairs, self._decided(routed, self.answers.margin))

    def coin_credit(self, routed: Mask, rng: np.random.Generator) -> Matrix:
        """(N, C) without a model: the judge decides the pairs routed, scores drawn at random the others."""
        coin = []
        for item in self.answers.pairs.items:
            score = rng.random(len(item.responses))
            coin.append(np.array([score[i] - score[j] for i, j in item.pairs]))
        return self.benchmark.credit(self.answers.pairs, self._decided(routed, np.concatenate(coin)))

    def _decided(self, routed: Mask, margin: Matrix) -> Matrix:
        said = self.verdicts.preference
        return np.where(routed & ~np.isnan(said), said, margin)

    def random_credit(self, calls: int) -> Matrix:
        """Mean credit of as many calls drawn at random; scores are linear in credit, so this gives their mean."""
        count = len(self.answers.pairs)
        if calls in (0, count):
            return self.credit(np.full(count, calls == count))
        if not self.verdicts.complete:
            return self.credit(routed_mask(random_order(count, self.seed)[:calls], count))
        rng = np.random.default_rng(self.seed)
        total: Matrix = np.zeros(())
        for _ in range(DRAWS):
            total = total + self.credit(routed_mask(rng.permutation(count)[:calls], count))
        return total / DRAWS

    def scores(self, credit: Matrix, weight: Matrix) -> list[Score]:
        """The overall and section scores; subsets too where there is but one section."""
        found = self.benchmark.scores(self.answers.pairs.items, credit, weight, None)
        single = sum(score.level == "section" for score in found) <= 1
        return [score for score in found if single or score.level != "subset"]


def _scores(draw: Draw, routed: Mask, replicates: int, level: float, seed: int) -> tuple[RoutedScore, ...]:
    """The scores of one row, routed and random."""
    pairs = draw.answers.pairs
    ours, random = draw.credit(routed), draw.random_credit(int(routed.sum()))

    def differences(weight: Matrix) -> Matrix:
        both = zip(draw.scores(ours, weight), draw.scores(random, weight), strict=True)
        return np.stack([one.value - other.value for one, other in both])

    one = np.ones((1, len(pairs.items)))
    found = list(zip(draw.scores(ours, one), draw.scores(random, one), strict=True))
    if routed.any() and not routed.all():
        bounds = bounds_of(differences, pairs.cluster, replicates, level, seed)
    else:  # nothing was chosen: the difference is 0 by definition
        bounds = (np.zeros(1), np.zeros(1))
    low, high = (np.broadcast_to(bound, len(found)) for bound in bounds)
    return tuple(
        RoutedScore(a.level, a.name, float(a.value[0]), float(b.value[0]), float(lo), float(hi))
        for (a, b), lo, hi in zip(found, low, high, strict=True)
    )
