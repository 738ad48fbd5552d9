"""The best answer of a prompt's pool with a judge: what as many calls, and as much cost, buy routed and at random.

Of all K answers of a prompt the one of highest mean preference over the others is chosen, as in best of n. Where a pair
is judged, the judge's logit stands in place of the model's preference, as in the engine. The judge is asked about the
pairs that the benchmark counts, one right and one wrong: pairs of equally good answers would cost calls on top, for
routed and random choice alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from rmcore.evaluation.benchmarks.choice import Choice
from rmcore.evaluation.benchmarks.item import Matrix, Score, group_mean
from rmcore.evaluation.benchmarks.routing import Draw, random_order, routed_mask
from rmcore.evaluation.benchmarks.routing_table import Spent
from rmcore.evaluation.benchmarks.scoring import bounds_of
from rmcore.evaluation.benchmarks.table import Cell, Column, Curve, Table
from rmcore.evaluation.benchmarks.verdicts import Mask
from rmcore.ops import reference

__all__ = ["PoolDraw", "best_of_routing_table"]

EQUAL = 1e-9  # of two answers' means: sums in another order differ by less


@dataclass(frozen=True)
class PoolDraw(Draw):
    """Credit is what the answer chosen of each pool is worth; equal ones are chosen with equal probability."""

    @property
    def title(self) -> str:
        """What is scored."""
        return f"{self.benchmark.title}, best of a pool"

    @cached_property
    def pools(self) -> Mask:
        """(N,) bool: items with three answers or more."""
        return np.array([len(item.responses) > 2 for item in self.answers.pairs.items], dtype=bool)

    @cached_property
    def ceiling(self) -> float:
        """Worth of the best answer of each pool, in the mean."""
        items = self.answers.pairs.items
        return float(np.mean([max(item.quality) for item, own in zip(items, self.pools, strict=True) if own]))

    def credit(self, routed: Mask) -> Matrix:
        """(N, 1) where the judge decides the pairs routed."""
        mean = np.concatenate(self.answers.preference)
        return self._worth(routed, mean, self._own)

    def coin_credit(self, routed: Mask, rng: np.random.Generator) -> Matrix:
        """(N, 1) without a model: answers that the judge does not tell apart have equal chances."""
        return self._worth(routed, np.zeros(len(self._quality)), np.zeros(len(routed)))

    def scores(self, credit: Matrix, weight: Matrix) -> list[Score]:
        """The mean over pools."""
        worth = group_mean(credit[:, 0], self.pools, weight)
        return [Score("overall", "worth of the answer chosen", worth, int(self.pools.sum()))]

    def _worth(self, routed: Mask, mean: Matrix, own: Matrix) -> Matrix:
        """(N, 1) of (R,) mean preferences and (P,) preferences of pairs, with the judge's in place of those routed."""
        better, worse, others = self._ends
        decided = routed & ~np.isnan(self._said)
        change = np.where(decided, np.nan_to_num(self._said) - own, 0.0) / others
        judged = np.zeros(len(mean), dtype=bool)
        judged[better[decided]] = judged[worse[decided]] = True
        total = np.where(np.isnan(mean), np.where(judged, 0.0, -np.inf), mean)
        total = total + np.bincount(better, change, len(mean)) - np.bincount(worse, change, len(mean))
        start = self._starts
        best = np.repeat(np.maximum.reduceat(total, start), self._sizes)
        chosen = (total >= best - EQUAL * (1 + np.abs(np.nan_to_num(best, neginf=0.0)))).astype(np.float64)
        worth = np.add.reduceat(chosen * self._quality, start) / np.add.reduceat(chosen, start)
        return np.asarray(worth[:, None], dtype=np.float64)

    @cached_property
    def _sizes(self) -> npt.NDArray[np.intp]:
        return np.array([len(item.responses) for item in self.answers.pairs.items], dtype=np.intp)

    @cached_property
    def _starts(self) -> npt.NDArray[np.intp]:
        return np.concatenate([[0], np.cumsum(self._sizes)[:-1]]).astype(np.intp)

    @cached_property
    def _quality(self) -> Matrix:
        return np.concatenate([np.asarray(item.quality, dtype=np.float64) for item in self.answers.pairs.items])

    @cached_property
    def _ends(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Matrix]:
        """(P,) rows of the better and the worse answers, and how many others each has."""
        pairs = self.answers.pairs
        local = np.array([pair for item in pairs.items for pair in item.pairs], dtype=np.intp).reshape(-1, 2)
        rows = local + self._starts[pairs.item][:, None]
        return rows[:, 0], rows[:, 1], (self._sizes[pairs.item] - 1).astype(np.float64)

    @cached_property
    def _own(self) -> Matrix:
        """(P,) the model's preference g / u; 0 where its inputs tell nothing."""
        return np.where(np.isfinite(self.answers.uncertainty), self.answers.margin / self.answers.uncertainty, 0.0)

    @property
    def _said(self) -> Matrix:
        """(P,) the judge's logit; NaN without a verdict. A live judge's grow, so they are not kept."""
        return reference.verdict_logit(torch.from_numpy(self.verdicts.preference)).numpy()


def best_of_routing_table(
    draw: PoolDraw,
    choices: Sequence[Choice],
    *,
    by: str,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    name: str = "best_of-routing",
) -> Table | None:
    """What the answer chosen is worth with the pairs of each choice judged, and with as many drawn at random.

    Args:
        draw: the benchmark, the model's answers (with ``preference``) and the judge's verdicts.
        choices: the pairs of each budget or threshold.
        by: what they were chosen by.
        replicates: bootstrap replicates, clustered by prompt, the pairs held.
        level: of the intervals.
        seed: of the bootstrap.
        name: of the table's files.

    None where no prompt has three answers or more, or the answers have no preferences.
    """
    if not draw.pools.any() or not draw.answers.preference:
        return None
    pairs, count = draw.answers.pairs, len(draw.answers.pairs)
    pools = float(draw.pools.sum())
    one = np.ones((1, len(pairs.items)))
    at_random = random_order(count, draw.seed)
    first = Choice("no judge", np.zeros(0, dtype=np.intp), float("inf"))
    last = [Choice("every pair", np.arange(count), float("-inf"))] if draw.verdicts.complete else []
    rows: list[tuple[str | float | Cell, ...]] = []
    points: list[tuple[float, float, float]] = []
    for choice in (first, *choices, *last):
        calls = len(choice.rows)
        if not draw.verdicts.asked[choice.rows].all() or not draw.verdicts.asked[at_random[:calls]].all():
            continue  # as in the routing table, which says so
        credit, random = draw.credit(routed_mask(choice.rows, count)), draw.random_credit(calls)
        ours, theirs = (float(draw.scores(own, one)[0].value[0]) for own in (credit, random))
        cell = Cell(0.0)
        if calls not in (0, count):
            low, high = bounds_of(_difference(draw, credit, random), pairs.cluster, replicates, level, seed)
            cell = Cell(ours - theirs, float(np.ravel(low)[0]), float(np.ravel(high)[0]))
        spent = Spent.of(draw.verdicts, routed_mask(choice.rows, count))
        told = (spent.calls, spent.prompt_tokens, spent.completion_tokens, spent.seconds)
        rows.append((choice.name, float(calls), calls / pools, ours, theirs, cell, *told))
        points.append((calls / count, ours, theirs))
    points.sort()
    share = tuple(point[0] for point in points)
    columns = (
        Column("routing", "routing", "text"),
        Column("pairs", "pairs judged", "count"),
        Column("pairs_a_prompt", "a prompt", "number"),
        Column("routed", f"worth, by {by}", "percent"),
        Column("random", "worth, random", "percent"),
        Column("difference", f"{by} − random, points", "points"),
        Column("judge_calls", "judge calls", "count"),
        Column("judge_prompt_tokens", "prompt tokens", "count"),
        Column("judge_completion_tokens", "completion tokens", "count"),
        Column("judge_seconds", "judge seconds", "number"),
    )
    notes = (
        f"The judge is {draw.verdicts.name}. Of each of {int(pools)} pools the answer of highest mean preference is "
        f"chosen; the best one would be worth {100 * draw.ceiling:.1f}%",
        "Judged are pairs of a right and a wrong answer: those of equally good answers would be calls on top, routed "
        "and at random alike",
        f"Intervals: {100 * level:g}%, percentile bootstrap over prompts, {replicates} replicates, seed {seed}",
    )
    curves = tuple(
        Curve(line, share, tuple(point[k] for point in points)) for k, line in ((1, f"by {by}"), (2, "random"))
    )
    title = f"{draw.title}, with a judge"
    return Table(name, title, columns, tuple(rows), notes, curves, ("pairs judged, %", "worth of the answer chosen"))


def _difference(draw: PoolDraw, credit: Matrix, random: Matrix) -> Callable[[Matrix], Matrix]:
    def of(weight: Matrix) -> Matrix:
        return np.stack([draw.scores(credit, weight)[0].value - draw.scores(random, weight)[0].value])

    return of
