"""Several scores of one model side by side: what each is worth for finding errors, and for routing at each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks.choice import Choice, RouteBy, pair_scores
from rmcore.evaluation.benchmarks.item import Matrix, half_point
from rmcore.evaluation.benchmarks.routing import Draw, random_order, routed_mask
from rmcore.evaluation.benchmarks.scoring import Answers, bounds_of
from rmcore.evaluation.benchmarks.table import Cell, Column, Curve, Table
from rmcore.evaluation.statistics import auroc, risk_coverage
from rmcore.model.error_prior import ErrorPrior

__all__ = ["beside_table", "detection_table"]


def beside_table(
    draw: Draw, choices: Mapping[str, Sequence[Choice]], *, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> Table:
    """The benchmark's first score routed by each score at each budget, as differences from the first with intervals.

    Args:
        draw: the benchmark, the model's answers and the judge's verdicts.
        choices: score → its pairs at each budget, the same budgets for all.
        replicates: bootstrap replicates, clustered by prompt; the same for all, so differences are paired.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than two scores.
    """
    if len(choices) < 2:
        reject("choices", f"{len(choices)} scores", "at least two")
    first, *others = choices
    pairs, count = draw.answers.pairs, len(draw.answers.pairs)
    one = np.ones((1, len(pairs.items)))
    rows: list[tuple[str | float | Cell, ...]] = []
    points: dict[str, list[tuple[float, float]]] = {}
    name = draw.scores(draw.credit(np.zeros(count, dtype=bool)), one)[0].name
    at_random = random_order(count, draw.seed)
    for k, choice in enumerate(choices[first]):
        needed = [*(own[k].rows for own in choices.values()), at_random[: len(choice.rows)]]
        if not all(draw.verdicts.asked[own].all() for own in needed):
            continue
        credit = {by: draw.credit(routed_mask(own[k].rows, count)) for by, own in choices.items()}
        credit["random"] = draw.random_credit(len(choice.rows))
        value = {by: float(draw.scores(own, one)[0].value[0]) for by, own in credit.items()}

        def differences(weight: Matrix, credit: dict[str, Matrix] = credit) -> Matrix:
            base = draw.scores(credit[first], weight)[0].value
            return np.stack([draw.scores(credit[by], weight)[0].value - base for by in (*others, "random")])

        low, high = bounds_of(differences, pairs.cluster, replicates, level, seed)
        low, high = (np.broadcast_to(bound, len(others) + 1) for bound in (low, high))
        cells = [
            Cell(value[by] - value[first], float(lo), float(hi))
            for by, lo, hi in zip((*others, "random"), low, high, strict=True)
        ]
        rows.append((choice.name, float(len(choice.rows)), value[first], *cells))
        for by, own in value.items():
            points.setdefault(by, []).append((len(choice.rows) / count, own))
    columns = [Column("routing", "pairs judged", "text"), Column("calls", "calls", "count"),
               Column(first, f"{name}, by {first}", "percent"),
               *(Column(by, f"{by} − {first}, points", "points") for by in (*others, "random"))]  # fmt: skip
    notes = (
        f"The judge is {draw.verdicts.name}",
        f"Intervals: {100 * level:g}%, paired percentile bootstrap over prompts, {replicates} replicates, seed {seed}",
    )
    curves = tuple(
        Curve(by, tuple(x for x, _ in sorted(own)), tuple(y for _, y in sorted(own))) for by, own in points.items()
    )
    title = f"{draw.benchmark.title}: scores that route, side by side"
    return Table("beside", title, tuple(columns), tuple(rows), notes, curves, ("pairs judged, %", name))


def detection_table(
    title: str, answers: Mapping[str, Answers], by: Sequence[RouteBy], *, prior: ErrorPrior | None = None
) -> Table:
    """How well each score tells a model's errors, without any judge.

    Args:
        title: of the benchmark.
        answers: estimator or model → its answers.
        by: scores; ``learned`` before any verdict.
        prior: of the model, for ``learned``.

    Raises:
        InputError: a score that a model does not know.
    """
    rows: list[tuple[str | float | Cell, ...]] = []
    for name, own in answers.items():
        right = half_point(own.margin)
        certain = right != 0.5
        for one in by:
            score = _finite(pair_scores(own, one, prior))
            curve = risk_coverage(score, right)
            kept = [float(curve.risk[max(0, round(share * len(score)) - 1)]) for share in (0.5, 0.8, 1.0)]
            found = auroc(score[certain], right[certain] == 0) if certain.any() else float("nan")
            rows.append((name, one, found, curve.aurc, *kept))
    columns = (
        Column("answers", "answers", "text"),
        Column("by", "score", "text"),
        Column("auroc", "AUROC of errors", "number"),
        Column("aurc", "AURC", "number"),
        *(Column(f"error_{share}", f"errors among the surest {share}%, %", "percent") for share in (50, 80, 100)),
    )
    notes = ("Over all pairs that count, each with the same weight. AUROC ½ and AURC the error rate are chance",)
    return Table("detection", f"{title}: which score tells the errors", columns, tuple(rows), notes)


def _finite(score: Matrix) -> Matrix:
    """With the highest finite score and one more where nothing is known."""
    known = score[np.isfinite(score)]
    return np.where(np.isposinf(score), (known.max() if known.size else 0.0) + 1.0, np.nan_to_num(score, neginf=-1e300))
