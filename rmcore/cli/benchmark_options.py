"""The options of ``rmcore benchmark``'s tables, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore._base.numbers import Within, check_number
from rmcore.cli.numbers import number

if TYPE_CHECKING:
    from rmcore.cli.benchmark_tables import Wanted

__all__ = ["Routing", "numbers_of", "wanted_tables"]


@dataclass(frozen=True)
class Routing:
    """The options of the routing table."""

    budgets: Annotated[
        str | None,
        typer.Option(
            help="Routing table: shares of pairs put to a judge, as in 0.02,0.1,0.25,0.45; published: those of the "
            "paper's table, where it has this benchmark."
        ),
    ] = None
    thresholds: Annotated[
        str | None,
        typer.Option(help="Routing table: pairs whose score exceeds each of these are judged, as in 1.2,1.5."),
    ] = None
    rank_by: Annotated[
        Literal["learned", "u", "margin", "error_probability", "novelty", "rank_sum"],
        typer.Option(help="Routing table: what makes a pair worth a judge call."),
    ] = "u"
    every_pair: Annotated[
        bool,
        typer.Option("--every-pair", help="Routing table: ask a live judge about all pairs, not only those routed."),
    ] = False
    beside: Annotated[
        str | None,
        typer.Option(help="Other scores beside --rank-by in one table, as in u,margin,novelty,learned."),
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(help="Filter table: scores on these shares of the prompts, the surest, as in 0.25,0.5,0.75."),
    ] = None
    penalties: Annotated[
        str | None,
        typer.Option(
            help="Best-of-n table: choose by mean preference minus these times the uncertainty, as in 0,0.5,1."
        ),
    ] = None
    judge_params: Annotated[
        float | None, number(help="Accuracy at equal FLOP: the judge's parameters, as in 32e9.", least=0)
    ] = None
    model_params: Annotated[
        float | None, number(help="The model's parameters; default: those of its backbone.", least=0)
    ] = None
    judge_price: Annotated[
        str | None,
        typer.Option(
            help="Accuracy at equal money: the judge's prices of a million prompt and completion tokens, 2.5,10."
        ),
    ] = None
    model_price: Annotated[float, number(help="Price of a million tokens that the model reads.", least=0)] = 0.0
    judge_answer_tokens: Annotated[
        int, number(help="Tokens of an answer of the judge, where it reports none.", least=0)
    ] = 256

    @property
    def routes(self) -> bool:
        """Whether a judge is needed, live, recorded or the label."""
        asked = (self.budgets, self.thresholds, self.beside, self.judge_params, self.judge_price)
        return any(option is not None for option in asked)

    def further(self, routed: bool) -> tuple[str, ...]:
        """Names of the further tables; ``routed``: there is a judge, live, recorded or the label."""
        costs = (("flop", self.judge_params), ("money", self.judge_price))
        ends = [end for end, given in costs if routed and given is not None]
        return (
            *(("beside",) if self.beside is not None else ()),
            *(f"cost-{end}" for end in ends),
            *(("detection", "filter", *(f"filter-{end}" for end in ends)) if self.keep is not None else ()),
            *(("best_of", *(f"best_of-{end}" for end in ends)) if self.penalties is not None else ()),
            *(("best_of-routing",) if self.penalties is not None and routed else ()),
        )


def wanted_tables(routing: Routing) -> Wanted:
    """The further tables; raises InputError for words and numbers that are none."""
    from typing import get_args

    from rmcore.cli.benchmark_tables import Wanted
    from rmcore.evaluation.benchmarks.choice import RouteBy
    from rmcore.evaluation.benchmarks.uncertainty import check_shares

    words = [] if routing.beside is None else [word.strip() for word in routing.beside.split(",")]
    for word in words:
        if word not in get_args(RouteBy):
            reject("--beside", repr(word), f"words out of {', '.join(get_args(RouteBy))}")
    scores = list(dict.fromkeys([routing.rank_by, *words]))
    if routing.beside is not None and len(scores) < 2:
        reject("--beside", repr(routing.beside), f"another score than {routing.rank_by}")
    keep, penalties = numbers_of("--keep", routing.keep), numbers_of("--penalties", routing.penalties)
    check_shares("--keep", keep)
    check_shares("--penalties", penalties, high=float("inf"))
    price = numbers_of("--judge-price", routing.judge_price)
    if price and len(price) != 2:
        reject("--judge-price", repr(routing.judge_price), "two prices, of prompt and completion tokens, as in 2.5,10")
    for value in price:
        check_number("--judge-price", value, Within(least=0))
    return Wanted(
        scores=tuple(scores),  # type: ignore[arg-type]  # checked above
        keep=keep,
        penalties=penalties,
        judge_params=routing.judge_params,
        model_params=routing.model_params,
        judge_price=(price[0], price[1]) if price else None,
        model_price=routing.model_price,
        answer_tokens=routing.judge_answer_tokens,
    )


def numbers_of(option: str, given: str | None) -> tuple[float, ...]:
    """The numbers of an option, none where it is not given; raises InputError naming it for what is none."""
    try:
        found = tuple(float(part) for part in given.split(",")) if given is not None else ()
    except ValueError:
        reject(option, repr(given)[:60], "numbers with commas between them, as in 0.02,0.1")
    return found
