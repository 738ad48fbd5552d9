"""What else an uncertainty is worth on a benchmark: the table of URM's filter, and best of n with a penalty.

**Filter** (URM, arXiv:2410.00847): what the model is unsure of is dropped; the benchmark's own scores on the prompts
that stay, against their share. A prompt goes where one of its counted pairs is above the threshold. Dropping at random
leaves a score as it is, so the line of all prompts is the baseline.

**Best of n**: of n answers drawn from a prompt's pool the one with the highest m − λ·u is chosen (m its mean preference
over the others, u the mean uncertainty of its pairs; :mod:`rmcore.engine.selection`), or the one of highest m among
those whose u is not above a threshold (if none is, among all). What it is worth, expected over all draws, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from rmcore._base.numbers import Within, check_number
from rmcore._base.quantile import quantiles
from rmcore.evaluation.benchmarks.choice import RouteBy, pair_scores
from rmcore.evaluation.benchmarks.item import Benchmark, Matrix, Score
from rmcore.evaluation.benchmarks.ppe import best_of_k
from rmcore.evaluation.benchmarks.scoring import Answers, bounds_of
from rmcore.evaluation.benchmarks.table import Cell, Column, Curve, Table
from rmcore.model.error_prior import ErrorPrior

__all__ = ["KEEP", "PENALTIES", "best_of_table", "check_shares", "filter_table", "kept_prompts"]

KEEP = (0.25, 0.5, 0.75, 0.9)
PENALTIES = (0.0, 0.5, 1.0)


def check_shares(name: str, shares: Sequence[float], *, low: float = 0.0, high: float = 1.0) -> None:
    """Raise InputError unless all are numbers in (low, high], or [low, high] where low is 0 and high infinite."""
    endless = math.isinf(high)
    within = Within(least=low) if endless else Within(above=low, most=high)
    for share in shares:
        check_number(name, share, within, "numbers ≥ 0" if endless else f"numbers above {low:g}, at most {high:g}")


def filter_table(
    benchmark: Benchmark,
    answers: Answers,
    by: Sequence[RouteBy],
    *,
    keep: Sequence[float] = KEEP,
    prior: ErrorPrior | None = None,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Table:
    """The benchmark's scores on the prompts kept, for each score and each share of prompts kept.

    Args:
        benchmark: whose scores.
        answers: the model's.
        by: scores; ``learned`` is what it begins with, before any verdict.
        keep: shares of the prompts; prompts with equal scores stay or go together, so that more may stay.
        prior: of the model, for ``learned``.
        replicates: bootstrap replicates, clustered by prompt; prompts kept are held.
        level: of the intervals, which are of the difference from the score on all prompts.
        seed: of the bootstrap.

    Raises:
        InputError: a share that is none, or a score that the model does not know.
    """
    check_shares("keep", keep)
    pairs = answers.pairs
    credit = benchmark.credit(pairs, answers.margin)

    def scores(weight: Matrix) -> list[Score]:
        found = benchmark.scores(pairs.items, credit, weight, answers.scores)
        return [score for score in found if score.level != "subset"]

    everything = scores(np.ones((1, len(pairs.items))))
    titles = [score.name for score in everything]
    columns = [Column("by", "kept by", "text"), Column("threshold", "score ≤", "number"),
               Column("prompts", "prompts kept", "count"), Column("share", "share kept, %", "percent"),
               *(Column(name, name, "percent") for name in titles),
               Column("difference", f"{titles[0]} − all, points", "points")]  # fmt: skip
    whole = [float(score.value[0]) for score in everything]
    rows: list[tuple[str | float | Cell, ...]] = [("all", math.nan, float(len(pairs.items)), 1.0, *whole, Cell(0.0))]
    curves = []
    for name in by:
        points = [(1.0, whole[0])]
        for _, cut, stay in kept_prompts(answers, pair_scores(answers, name, prior), keep):
            if stay.all():
                continue  # the first line
            found = [float(s.value[0]) for s in scores(stay[None].astype(float))]
            difference = _bounds(scores, stay, answers, found[0] - whole[0], replicates, level, seed)
            rows.append((name, cut, float(stay.sum()), float(stay.mean()), *found, difference))
            points.append((float(stay.mean()), found[0]))
        points.sort()
        curves.append(Curve(name, tuple(x for x, _ in points), tuple(y for _, y in points)))
    notes = (
        "A prompt is dropped where one of its pairs is above the threshold; prompts of equal score stay together. "
        "Dropping at random changes no score in expectation",
        f"Intervals: {100 * level:g}%, percentile bootstrap over prompts, {replicates} replicates, seed {seed}",
    )
    title = f"{benchmark.title}: scores on what is kept"
    return Table("filter", title, tuple(columns), tuple(rows), notes, tuple(curves), ("prompts kept, %", titles[0]))


def kept_prompts(
    answers: Answers, score: Matrix, keep: Sequence[float]
) -> Iterator[tuple[float, float, npt.NDArray[np.bool_]]]:
    """The prompts that stay at each share: (share that stays, threshold, (N,) bool), those of (P,) lowest scores.

    A prompt goes where one of its pairs is above the threshold. Shares at which equal scores leave nothing to drop by
    are left out.
    """
    pairs = answers.pairs
    highest = np.full(len(pairs.items), -np.inf)
    np.maximum.at(highest, pairs.item, score)
    for share in keep:
        cut = float(np.sort(highest)[max(1, math.ceil(share * len(highest) - 1e-9)) - 1])
        stay = highest <= cut
        if share == 1 or (math.isfinite(cut) and not stay.all()):
            yield float(stay.mean()), cut, stay


def _bounds(
    scores: Callable[[Matrix], list[Score]],
    stay: npt.NDArray[np.bool_],
    answers: Answers,
    point: float,
    replicates: int,
    level: float,
    seed: int,
) -> Cell:
    """The first score on those that stay less the same on all, with bounds."""

    def difference(weight: Matrix) -> Matrix:
        return np.stack([scores(weight * stay)[0].value - scores(weight)[0].value])

    low, high = bounds_of(difference, answers.pairs.cluster, replicates, level, seed)
    return Cell(point, float(np.ravel(low)[0]), float(np.ravel(high)[0]))


def best_of_table(
    benchmark: Benchmark,
    answers: Answers,
    *,
    penalties: Sequence[float] = PENALTIES,
    keep: Sequence[float] = (0.5, 0.9),
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Table | None:
    """What the best of n is worth, for each penalty and each filter; None where no prompt has three answers or more.

    Args:
        benchmark: whose items.
        answers: the model's, with ``preference`` and ``doubt``.
        penalties: λ ≥ 0; the first is what the others are compared with.
        keep: shares of all answers that a filter keeps.
        replicates: bootstrap replicates, clustered by prompt.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        InputError: a penalty or share that is none.
    """
    check_shares("penalties", penalties, high=math.inf)
    check_shares("keep", keep)
    pools = [k for k, item in enumerate(answers.pairs.items) if len(item.responses) > 2]
    if not pools or not answers.doubt:
        return None
    mean = [np.nan_to_num(answers.preference[k], nan=-np.inf) for k in pools]
    doubt = [answers.doubt[k] for k in pools]
    quality = [np.asarray(answers.pairs.items[k].quality) for k in pools]
    ways: list[tuple[str, list[Matrix]]] = [
        (f"λ = {c:g}", [m - c * u if c else m for m, u in zip(mean, doubt, strict=True)]) for c in penalties
    ]
    known = np.concatenate(doubt)
    for share, cut in zip(keep, quantiles(known[np.isfinite(known)].tolist(), list(keep)), strict=True):
        filtered = [_first(m, u <= cut) for m, u in zip(mean, doubt, strict=True)]
        ways.append((f"kept {100 * share:g}%, u ≤ {cut:.3f}", filtered))
    smallest = min(len(q) for q in quality)
    sizes = sorted({2**power for power in range(smallest.bit_length()) if 2**power <= smallest} | {smallest})
    cluster = np.unique(answers.pairs.cluster[pools], return_inverse=True)[1]
    rows: list[tuple[str | float | Cell, ...]] = []
    for n in sizes:
        worth = [np.array([best_of_k(s, q, n) for s, q in zip(score, quality, strict=True)]) for _, score in ways]
        ceiling = float(np.mean([best_of_k(q, q, n) for q in quality]))
        base = worth[0]
        cells = [Cell(float(base.mean())), *(_mean(w - base, cluster, replicates, level, seed) for w in worth[1:])]
        tokens = float("nan") if answers.tokens is None else _tokens(answers, pools, n)
        rows.append((f"{n}", *cells, ceiling, tokens))
    columns = [Column("n", "n", "text"), Column(ways[0][0], ways[0][0], "percent")]
    columns += [Column(name, f"{name}: − {ways[0][0]}, points", "points") for name, _ in ways[1:]]
    columns += [Column("ceiling", "ceiling", "percent"), Column("tokens", "tokens read a prompt", "count")]
    notes = (
        "The worth of the answer chosen among n drawn from a prompt's pool, expected over all draws. m and u of an "
        "answer are means over its whole pool",
        f"{len(pools)} pools. Intervals: {100 * level:g}%, percentile bootstrap over prompts, {replicates} replicates, "
        f"seed {seed}",
    )
    curves = tuple(
        Curve(name, tuple(float(n) for n in sizes), tuple(_worth(row, k) for row in rows))
        for k, (name, _) in enumerate(ways)
    )
    title = f"{benchmark.title}: best of n"
    return Table("best_of", title, tuple(columns), tuple(rows), notes, curves, ("n", "worth of the answer chosen"))


def _worth(row: tuple[str | float | Cell, ...], way: int) -> float:
    base, own = row[1], row[1 + way]
    assert isinstance(base, Cell)
    assert isinstance(own, Cell)
    return base.value if not way else base.value + own.value


def _first(mean: Matrix, kept: npt.NDArray[np.bool_]) -> Matrix:
    """Scores under which every answer kept is before every other."""
    order = np.unique(mean, return_inverse=True)[1].astype(np.float64)
    return order + kept * float(len(mean) + 1)


def _tokens(answers: Answers, pools: list[int], n: int) -> float:
    """Tokens read for n answers of a prompt, in the mean: as many as its pool has in proportion."""
    assert answers.tokens is not None
    shares = [n / len(answers.pairs.items[k].responses) for k in pools]
    return float(np.mean(answers.tokens[pools] * shares))


def _mean(value: Matrix, cluster: npt.NDArray[np.intp], replicates: int, level: float, seed: int) -> Cell:
    low, high = bounds_of(
        lambda weight: ((weight @ value) / weight.sum(axis=1))[None], cluster, replicates, level, seed
    )
    return Cell(float(value.mean()), float(np.ravel(low)[0]), float(np.ravel(high)[0]))
