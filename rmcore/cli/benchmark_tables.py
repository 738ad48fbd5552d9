"""The further tables of ``rmcore benchmark``: scores side by side, equal cost, the filter, best of n."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rmcore._base.files import write_atomic

if TYPE_CHECKING:
    from rmcore.evaluation.benchmarks.choice import Choice, RouteBy
    from rmcore.evaluation.benchmarks.cost import CostModel
    from rmcore.evaluation.benchmarks.item import Benchmark
    from rmcore.evaluation.benchmarks.routing import Draw
    from rmcore.evaluation.benchmarks.scoring import Answers
    from rmcore.evaluation.benchmarks.table import Table
    from rmcore.evaluation.benchmarks.verdicts import Verdicts
    from rmcore.model.reward_model import RewardModel

__all__ = ["Wanted", "further_tables", "write_table"]


@dataclass(frozen=True)
class Wanted:
    """Which further tables, as the options say; ``scores`` begins with the one that routes."""

    scores: tuple[RouteBy, ...]
    keep: tuple[float, ...] = ()
    penalties: tuple[float, ...] = ()
    judge_params: float | None = None
    model_params: float | None = None
    judge_price: tuple[float, float] | None = None
    model_price: float = 0.0
    answer_tokens: int = 256
    estimator: str = "head"


def further_tables(
    benchmark: Benchmark,
    model: RewardModel,
    answers: Answers,
    verdicts: Verdicts | None,
    wanted: Wanted,
    budgets: Sequence[float],
    replicates: int,
) -> Iterator[Table]:
    """The tables that are wanted, one after the other."""
    from rmcore.evaluation.benchmarks.beside import beside_table, detection_table
    from rmcore.evaluation.benchmarks.choice import choose
    from rmcore.evaluation.benchmarks.cost import CostModel
    from rmcore.evaluation.benchmarks.routing import Draw
    from rmcore.evaluation.benchmarks.uncertainty import best_of_table, filter_table

    prior = model.error_prior
    if verdicts is not None:
        draw = Draw(benchmark, answers, verdicts, 0)
        chosen: dict[str, list[Choice]] = {
            by: choose(answers, verdicts, by, budgets=budgets, prior=prior) for by in wanted.scores
        }
        for choices in chosen.values():
            for choice in choices:
                verdicts.ask(choice.rows)
        if len(chosen) > 1:
            yield beside_table(draw, chosen, replicates=replicates)
        params = _parameters(model) if wanted.model_params is None else wanted.model_params
        costs = CostModel(
            model_params=params,
            judge_params=wanted.judge_params,
            judge_price=wanted.judge_price,
            model_price=wanted.model_price,
            answer_tokens=wanted.answer_tokens,
            currency=verdicts.currency or "money",
        )
        yield from _judged(draw, chosen[wanted.scores[0]], costs, wanted, model, replicates)
    if wanted.keep:
        yield detection_table(benchmark.title, {wanted.estimator: answers}, wanted.scores, prior=prior)
        yield filter_table(benchmark, answers, wanted.scores, keep=wanted.keep, prior=prior, replicates=replicates)
    if wanted.penalties:
        table = best_of_table(benchmark, answers, penalties=wanted.penalties, replicates=replicates)
        if table is not None:
            yield table


def _judged(
    draw: Draw, chosen: Sequence[Choice], costs: CostModel, wanted: Wanted, model: RewardModel, replicates: int
) -> Iterator[Table]:
    """With a judge, at as many calls and at equal cost: the benchmark's score, the filter, the best of a pool."""
    from rmcore.evaluation.benchmarks.cost import cost_table, filter_cost_table
    from rmcore.evaluation.benchmarks.pools import PoolDraw, best_of_routing_table

    by, mode, prior = wanted.scores[0], model.mode, model.error_prior
    pool = PoolDraw(draw.benchmark, draw.answers, draw.verdicts, draw.seed)
    best = best_of_routing_table(pool, chosen, by=by, replicates=replicates) if wanted.penalties else None
    if best is not None:
        yield best
    for unit in costs.units:
        end = "flop" if unit == "FLOP" else "money"
        yield cost_table(draw, chosen, costs, unit, mode=mode, by=by, name=f"cost-{end}")
        if wanted.keep:
            keep, name = wanted.keep, f"filter-{end}"
            yield filter_cost_table(draw, by, costs, unit, mode=mode, keep=keep, prior=prior, name=name)
        if best is not None:
            yield cost_table(pool, chosen, costs, unit, mode=mode, by=by, name=f"best_of-{end}")


def _parameters(model: RewardModel) -> float | None:
    """Those of the backbone; None where they are on a server."""
    parameters = getattr(model.backbone.model, "parameters", None)
    return None if parameters is None else float(sum(p.numel() for p in parameters()))


def write_table(table: Table, folder: Path) -> list[Path]:
    """The table in all its forms; → the files."""
    from rmcore.evaluation.benchmarks.plot import plot_table

    texts = {
        "md": table.to_markdown(),
        "tex": table.to_latex(),
        "csv": table.to_csv(),
        "json": json.dumps(table.to_dict(), indent=2, allow_nan=False) + "\n",
    }
    files = []
    for form, text in texts.items():
        files.append(folder / f"{table.name}.{form}")
        write_atomic(files[-1], text)
    if table.curves:
        files.append(folder / f"{table.name}.png")
        plot_table(table, files[-1])
    return files
