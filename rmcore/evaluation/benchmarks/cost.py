"""Accuracy at equal cost: routing against random routing, the judge alone, and the best choice in hindsight.

Cost is floating-point operations, or money, of the model and the judge together:

- the model reads every response once (in concat mode every ordered pair): 2 · parameters · tokens, or a price a token;
- the judge's calls are 2 · its parameters · (prompt + completion) tokens, or its price. Tokens are those it reported;
  where none are known (recorded verdicts, the label) they are estimated from the characters, and its answers have a
  length that is given.

Pairs differ in length, so as many calls are not the same cost: random routing here takes pairs until the cost of the
pairs routed is spent. The judge alone spends what the model would have cost on more pairs, and leaves the rest to a
coin. In hindsight, the pairs are chosen on which the judge corrects the model, the most for their cost first: a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rmcore._base.errors import reject
from rmcore._base.prompt import canonical_prompt, conversation_text, response_text
from rmcore.evaluation.benchmarks.choice import Choice, RouteBy, Rows, pair_scores
from rmcore.evaluation.benchmarks.item import Matrix, half_point
from rmcore.evaluation.benchmarks.routing import DRAWS, Draw, random_order, routed_mask
from rmcore.evaluation.benchmarks.scoring import Answers
from rmcore.evaluation.benchmarks.table import Column, Curve, Table
from rmcore.evaluation.benchmarks.uncertainty import KEEP, kept_prompts
from rmcore.evaluation.benchmarks.verdicts import Verdicts
from rmcore.judge.question.cut import estimate_tokens
from rmcore.judge.question.prompt import JudgePrompt
from rmcore.model.error_prior import ErrorPrior

__all__ = ["CostModel", "cost_table", "filter_cost_table", "judge_tokens"]


@dataclass(frozen=True)
class CostModel:
    """What reading and judging cost; None is not known, and what needs it is left out.

    Attributes:
        model_params: parameters of the model's backbone.
        judge_params: of the judge, those used for a token.
        judge_price: per million prompt and completion tokens.
        model_price: per million tokens that the model reads.
        answer_tokens: of an answer of the judge, where it did not report any.
        orders: calls a pair, where it did not report any.
        currency: of the prices.
    """

    model_params: float | None = None
    judge_params: float | None = None
    judge_price: tuple[float, float] | None = None
    model_price: float = 0.0
    answer_tokens: int = 256
    orders: int = 2
    currency: str = "USD"

    def __post_init__(self) -> None:
        prices = self.judge_price or (0.0, 0.0)
        for name, value in (
            ("model_params", self.model_params or 0.0),
            ("judge_params", self.judge_params or 0.0),
            ("judge_price", prices[0]),
            ("judge_price", prices[1]),
            ("model_price", self.model_price),
            ("answer_tokens", self.answer_tokens),
        ):
            if not (math.isfinite(value) and value >= 0):
                reject(name, value, "a finite number, at least 0")

    @property
    def units(self) -> tuple[str, ...]:
        """What can be counted: ``FLOP``, the currency, both or neither."""
        flop = self.model_params is not None and self.judge_params is not None
        return (*(("FLOP",) if flop else ()), *((self.currency,) if self.judge_price is not None else ()))

    def of_model(self, tokens: float, unit: str) -> float:
        """What reading so many tokens costs."""
        return 2 * (self.model_params or 0.0) * tokens if unit == "FLOP" else self.model_price * tokens / 1e6

    def of_judge(self, prompt: Matrix, completion: Matrix, unit: str) -> Matrix:
        """(P,) what judging each pair costs."""
        if unit == "FLOP":
            return 2 * (self.judge_params or 0.0) * (prompt + completion)
        assert self.judge_price is not None
        return (self.judge_price[0] * prompt + self.judge_price[1] * completion) / 1e6


def judge_tokens(answers: Answers, verdicts: Verdicts, model: CostModel) -> tuple[Matrix, Matrix, int]:
    """(P,) prompt and completion tokens of judging each pair, all orders; and how many pairs' are estimated."""
    prompt, completion = verdicts.spent["prompt_tokens"].copy(), verdicts.spent["completion_tokens"].copy()
    unknown = np.isnan(prompt) | np.isnan(completion)
    if unknown.any():
        frame = JudgePrompt().render("", "a", "b")
        around = sum(estimate_tokens(message["content"]) for message in frame.messages)
        row = 0
        for item in answers.pairs.items:
            given = canonical_prompt(item.prompt)
            asked = estimate_tokens(given if isinstance(given, str) else conversation_text(given))
            size = {k: estimate_tokens(response_text(item.responses[k])) for pair in item.pairs for k in pair}
            for i, j in item.pairs:
                if unknown[row]:
                    prompt[row] = model.orders * (around + asked + size[i] + size[j])
                    completion[row] = model.orders * model.answer_tokens
                row += 1
    return prompt, completion, int(unknown.sum())


def cost_table(
    draw: Draw, choices: Sequence[Choice], model: CostModel, unit: str, *, mode: str, by: str, name: str = "cost"
) -> Table:
    """The benchmark's first score at the cost of each choice of pairs.

    Args:
        draw: the benchmark, the model's answers and the judge's verdicts.
        choices: the pairs of each budget.
        model: what things cost.
        unit: one of ``model.units``.
        mode: of the model, for the assumptions printed.
        by: what the pairs were chosen by.
        name: of the table's files.

    Raises:
        InputError: a unit that the costs are not known in, or answers whose tokens are not known.
    """
    price, reading, notes = _priced(draw, model, unit, mode)
    every = float(price.sum())
    other = _Others(draw, price)
    rows: list[tuple[str | float, ...]] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for choice in choices:
        judging = float(price[choice.rows].sum())
        total = reading + judging
        scores = {
            f"by {by}": other.score(draw.credit(routed_mask(choice.rows, len(price)))),
            "random": other.random(judging),
            "judge alone": other.judge_alone(total),
            "in hindsight": other.hindsight(judging),
        }
        rows.append((choice.name, float(len(choice.rows)), total, total / every, *scores.values()))
        for line, value in scores.items():
            points.setdefault(line, []).append((total / every, value))
    first = other.name
    columns = [Column("routing", "routing", "text"), Column("pairs", "pairs judged", "count"),
               Column("cost", f"{unit} in all", "cost"), Column("of_judge", "of the judge on all pairs, %", "percent"),
               *(Column(key, f"{first}, {key}", "percent") for key in points)]  # fmt: skip
    title = f"{draw.title}: {first} at equal {_kind(unit)}"
    axes = (f"{unit}, % of the judge on all pairs", first)
    return Table(name, title, tuple(columns), tuple(rows), notes, _curves(points), axes)


def _priced(draw: Draw, model: CostModel, unit: str, mode: str) -> tuple[Matrix, float, tuple[str, ...]]:
    """(P,) what judging each pair costs, what reading all items does, and what is assumed."""
    if unit not in model.units:
        reject(
            "unit", repr(unit), f"one of {', '.join(model.units) or 'none: neither parameters nor prices are given'}"
        )
    if draw.answers.tokens is None:
        reject("answers", "no tokens", "answers of score_items")
    prompt, completion, estimated = judge_tokens(draw.answers, draw.verdicts, model)
    notes = _assumptions(draw, model, unit, mode, prompt, completion, estimated)
    return model.of_judge(prompt, completion, unit), model.of_model(float(draw.answers.tokens.sum()), unit), notes


def _kind(unit: str) -> str:
    return "FLOP" if unit == "FLOP" else "money"


def _curves(points: Mapping[str, list[tuple[float, float]]]) -> tuple[Curve, ...]:
    """A curve a line that has a value everywhere."""
    return tuple(
        Curve(line, tuple(x for x, _ in sorted(own)), tuple(y for _, y in sorted(own)))
        for line, own in points.items()
        if not any(math.isnan(y) for _, y in own)
    )


def filter_cost_table(
    draw: Draw,
    by: RouteBy,
    model: CostModel,
    unit: str,
    *,
    mode: str,
    keep: Sequence[float] = KEEP,
    prior: ErrorPrior | None = None,
    name: str = "filter-cost",
) -> Table:
    """URM's filter at equal cost: for as many answered prompts, 1/share as many are read and the unsure ones dropped.

    Beside it what that cost buys where no prompt is dropped: pairs put to the judge, those routed or drawn at random.

    Args:
        draw: the benchmark, the model's answers and the judge's verdicts. A live judge is asked about pairs routed.
        by: the score that filters, and routes; ``learned`` is what it begins with, before any verdict.
        model: what things cost.
        unit: one of ``model.units``.
        mode: of the model, for the assumptions printed.
        keep: shares of the prompts that stay.
        prior: of the model, for ``learned``.
        name: of the table's files.

    Raises:
        InputError: as :func:`cost_table` and :func:`.uncertainty.filter_table`.
    """
    price, reading, notes = _priced(draw, model, unit, mode)
    every, other = float(price.sum()), _Others(draw, price)
    items = draw.answers.pairs.items
    none = draw.credit(np.zeros(len(price), dtype=bool))
    score = pair_scores(draw.answers, by, prior)
    shuffled = np.random.default_rng(draw.seed).permutation(len(score))
    order = np.lexsort((shuffled, -score))
    rows: list[tuple[str | float, ...]] = []
    points: dict[str, list[tuple[float, float]]] = {}
    for share, _, stay in kept_prompts(draw.answers, score, (*keep, 1.0)):
        total = reading / share
        routed = other.within(order, total - reading)
        draw.verdicts.ask(routed)
        asked = draw.verdicts.asked[routed].all()
        scores = {
            "score_kept": float(draw.scores(none, stay[None].astype(float))[0].value[0]),
            f"routed by {by}": other.score(draw.credit(routed_mask(routed, len(price)))) if asked else math.nan,
            "routed at random": other.random(total - reading),
            "judge alone": other.judge_alone(total),
        }
        rows.append(
            (f"{100 * share:.3g}%", float(stay.sum()), total, total / every, float(len(routed)), *scores.values())
        )
        for line, value in scores.items():
            points.setdefault(line, []).append((total / every, value))
    columns = [Column("kept", "prompts kept", "text"), Column("prompts", "prompts", "count"),
               Column("cost", f"{unit} for {len(items)} answered", "cost"),
               Column("of_judge", "of the judge on all pairs, %", "percent"),
               Column("pairs", "pairs that this judges", "count"),
               *(Column(key, f"{other.name}, {key.replace('score_', '')}", "percent") for key in points)]  # fmt: skip
    notes = (
        *notes,
        "Filter: to answer as many prompts as there are, 1/share as many are read; what it costs to have those prompts "
        "and their responses is not counted, and what is dropped has no answer",
    )
    title = f"{draw.title}: the filter on {by} and the judge at equal {_kind(unit)}"
    axes = (f"{unit}, % of the judge on all pairs", other.name)
    return Table(name, title, tuple(columns), tuple(rows), notes, _curves(points), axes)


class _Others:
    """What else the same cost buys."""

    def __init__(self, draw: Draw, price: Matrix) -> None:
        self.draw, self.price = draw, price
        self.one = np.ones((1, len(draw.answers.pairs.items)))
        self.name = draw.scores(draw.credit(np.zeros(len(price), dtype=bool)), self.one)[0].name

    def score(self, credit: Matrix) -> float:
        return float(self.draw.scores(credit, self.one)[0].value[0])

    def random(self, budget: float) -> float:
        return self._mean(budget, coin=False)

    def judge_alone(self, budget: float) -> float:
        """Pairs at random until the cost is spent; the others by a coin: scores drawn at random for the responses."""
        return self._mean(budget, coin=True)

    def hindsight(self, budget: float) -> float:
        said = self.draw.verdicts.preference
        gain = np.where(np.isnan(said), 0.0, half_point(np.nan_to_num(said)) - half_point(self.draw.answers.margin))
        worth = np.flatnonzero(gain > 0)
        worth = worth[np.argsort(-gain[worth] / np.maximum(self.price[worth], 1e-300), kind="stable")]
        return self.score(self.draw.credit(routed_mask(self.within(worth, budget), len(self.price))))

    def within(self, order: Rows, budget: float) -> Rows:
        """The beginning of an order of pairs that a budget pays for."""
        return order[np.cumsum(self.price[order]) <= budget * (1 + 1e-12)]

    def _mean(self, budget: float, *, coin: bool) -> float:
        """Over draws of pairs, and of the coin; one draw, or none, where the judge was not asked about all."""
        draw, count = self.draw, len(self.price)
        rng = np.random.default_rng([draw.seed, 2])
        if draw.verdicts.complete:
            orders = [rng.permutation(count) for _ in range(DRAWS)]
        else:
            orders = [random_order(count, draw.seed)]
        found = []
        for order in orders:
            rows = self.within(order, budget)
            if not draw.verdicts.asked[rows].all():
                return math.nan
            routed = routed_mask(rows, count)
            found.append(self.score(draw.coin_credit(routed, rng) if coin else draw.credit(routed)))
        return float(np.mean(found))


def _assumptions(
    draw: Draw, model: CostModel, unit: str, mode: str, prompt: Matrix, completion: Matrix, estimated: int
) -> tuple[str, ...]:
    tokens = 0.0 if draw.answers.tokens is None else float(draw.answers.tokens.sum())
    read = "every response once" if mode == "difference" else "every ordered pair of responses"
    known = ~np.isnan(prompt)
    if unit == "FLOP":
        rule = (
            f"FLOP: 2 · parameters · tokens; the model has {model.model_params:.3g} parameters, "
            f"the judge {model.judge_params:.3g}"
        )
    else:
        a, b = model.judge_price or (0.0, 0.0)
        rule = (
            f"Prices in {unit} per million tokens: the judge {a:g} for prompts and {b:g} for answers, "
            f"the model {model.model_price:g}"
        )
    notes = [
        "Assumed: " + rule,
        f"The model reads {read}: {tokens:,.0f} tokens, also where its states were cached",
        f"The judge reads {prompt[known].mean():,.0f} and writes {completion[known].mean():,.0f} tokens a pair in the "
        f"mean, all orders together"
        + (f"; for {estimated} of {len(prompt)} pairs estimated from the characters, {model.answer_tokens} tokens an "
           f"answer, {model.orders} orders" if estimated else ", as it reported"),
        "Random routing takes pairs until the same cost is spent; the judge alone spends the model's cost too, and "
        "leaves the other pairs to a coin; in hindsight the pairs are known on which the judge corrects the model",
    ]  # fmt: skip
    return tuple(notes)
