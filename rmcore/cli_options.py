"""Options that several commands share: which pairs go to a judge, which judge, and what it may cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmcore.errors import reject

if TYPE_CHECKING:
    from rmcore.adaptive import AdaptiveRouter
    from rmcore.judge.base import Judge
    from rmcore.judge.prices import PriceTable
    from rmcore.routing import RankBy, Router

Threshold = Annotated[float | None, typer.Option(help="Route pairs whose score exceeds this.")]
BudgetFraction = Annotated[float | None, typer.Option(help="Route this fraction of the pairs of each batch.")]
JudgeFraction = Annotated[
    float | None, typer.Option(help="Route this fraction of all pairs by a threshold that follows their scores.")
]
MaxCalls = Annotated[int | None, typer.Option(help="With --judge-fraction: never more judge calls.")]
MaxTokens = Annotated[int | None, typer.Option(help="With --judge-fraction: never more judge tokens.")]
MaxCost = Annotated[float | None, typer.Option(help="With --judge-fraction and --prices: never more money.")]
RouterState = Annotated[
    Path | None, typer.Option(help="With --judge-fraction: file to continue from, if there, and to save to.")
]
RankByOption = Annotated[str, typer.Option(help="u, margin, error_probability or rank_sum.")]
JudgeUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible base URL of the judge.")]
JudgeModel = Annotated[str, typer.Option(help="The judge's model name.")]
JudgeKeyEnv = Annotated[str, typer.Option(help="Environment variable with its key; empty for none.")]
JudgeOrders = Annotated[str, typer.Option(help="Ask both orders of a pair, or one.")]
JudgeSoft = Annotated[bool, typer.Option(help="Read soft verdicts from the judge's token probabilities.")]
JudgeTemplate = Annotated[Path | None, typer.Option(help="Text file with the question's template.")]
JudgeDeadline = Annotated[
    float | None, typer.Option(help="Seconds from the start of a batch after which verdicts are of no use.")
]
Store = Annotated[Path | None, typer.Option(help="Verdict store: what is in it is not bought again.")]
Prices = Annotated[Path | None, typer.Option(help="JSON price table of the judge's models, for costs.")]
Verdicts = Annotated[Path | None, typer.Option(help="Replay recorded verdicts (JSONL) instead of asking.")]


def make_adaptive_router(
    fraction: float | None,
    *,
    calls: int | None,
    tokens: int | None,
    cost: float | None,
    prices: Path | None,
    model: str,
    rank_by: str,
    orders: str,
    state: Path | None,
) -> AdaptiveRouter | None:
    """The router of ``--judge-fraction``, or None where that is not given."""
    if fraction is None:
        if (calls, tokens, cost, state) != (None, None, None, None):
            reject(
                "--max-calls, --max-tokens, --max-cost, --router-state",
                "without --judge-fraction",
                "together with it",
            )
        return None
    from rmcore.adaptive import AdaptiveRouter
    from rmcore.budget import Budget

    budgets = [] if calls is None else [Budget(calls, "calls", max_per_pair=1 if orders == "one" else 2)]
    budgets += [] if tokens is None else [Budget(tokens, "tokens")]
    if cost is not None:
        budgets.append(Budget(cost, "cost", first_estimate=_first_cost(prices, model, orders)))
    router = AdaptiveRouter(fraction, budgets, by=rank_by)  # type: ignore[arg-type]
    if state is not None and state.exists():
        router.load(state)
    return router


def _first_cost(prices: Path | None, model: str, orders: str) -> float:
    """What a pair is taken to cost before one has been bought: a long prompt and a long answer, in each order."""
    if prices is None:
        reject("--max-cost", "without --prices", "together with it: costs are known from a price table only")
    from rmcore.judge.base import JudgeUsage
    from rmcore.judge.prices import PriceTable

    table = PriceTable.from_file(prices)
    call = table.cost(JudgeUsage(calls=1, prompt_tokens=3072, completion_tokens=1024), model)
    if call is None:
        reject("--max-cost", f"no price for {model!r} in {prices}", "a price table that has the judge's model")
    return call * (1 if orders == "one" else 2)


def make_router(
    threshold: float | None, budget: float | None, rank_by: str, adaptive: AdaptiveRouter | None = None
) -> Router:
    """The router the options name; without any, none is routed."""
    from rmcore.routing import BudgetRouter, NeverRoute, ThresholdRouter

    by: RankBy = rank_by  # type: ignore[assignment]
    if sum(given is not None for given in (threshold, budget, adaptive)) > 1:
        reject("--threshold, --budget, --judge-fraction", "more than one", "at most one")
    if adaptive is not None:
        return adaptive
    if threshold is not None:
        return ThresholdRouter(threshold, by)
    return NeverRoute() if budget is None else BudgetRouter(fraction=budget, by=by)


def make_judge(
    url: str | None,
    model: str,
    key_env: str,
    *,
    orders: str = "both",
    verdicts: Path | None = None,
    store: Path | None = None,
    prices: Path | PriceTable | None = None,
    soft: bool = False,
    template: Path | None = None,
) -> Judge | None:
    """The judge the options name, or None."""
    from rmcore.judge import ChatJudge, JudgePrompt, RecordedJudge

    if url is not None and verdicts is not None:
        reject("--judge-url, --verdicts", "both", "at most one")
    if verdicts is not None:
        return RecordedJudge.from_file(verdicts, orders=orders)  # type: ignore[arg-type]
    if url is None:
        if store is not None or prices is not None:
            reject("--store, --prices", "without --judge-url", "together with it")
        return None
    if not model:
        reject("--judge-model", "nothing", "the judge's model name, since --judge-url is given")
    return ChatJudge(
        url,
        model,
        key_env or None,
        orders=orders,  # type: ignore[arg-type]
        prompt=None if template is None else JudgePrompt.from_file(template),
        store=store,
        prices=prices,
        soft=soft,
    )
