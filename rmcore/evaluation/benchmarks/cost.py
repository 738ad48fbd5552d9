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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmcore._base.errors import reject
from rmcore._base.prompt import canonical_prompt, conversation_text, response_text
from rmcore.evaluation.benchmarks.choice import Choice, Rows
from rmcore.evaluation.benchmarks.item import Matrix, half_point
from rmcore.evaluation.benchmarks.routing import DRAWS, Draw, random_order, routed_mask
from rmcore.evaluation.benchmarks.scoring import Answers
from rmcore.evaluation.benchmarks.table import Column, Curve, Table
from rmcore.evaluation.benchmarks.verdicts import Mask, Verdicts
from rmcore.judge.question.cut import estimate_tokens
from rmcore.judge.question.prompt import JudgePrompt

__all__ = ["CostModel", "cost_table", "judge_tokens"]


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
            ("judge_price", min(prices)),
            ("model_price", self.model_price),
            ("answer_tokens", self.answer_tokens),
        ):
            if not (math.isfinite(value) and value >= 0) or not math.isfinite(max(prices)):
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
    if unit not in model.units:
        reject(
            "unit", repr(unit), f"one of {', '.join(model.units) or 'none: neither parameters nor prices are given'}"
        )
    if draw.answers.tokens is None:
        reject("answers", "no tokens", "answers of score_items")
    prompt, completion, estimated = judge_tokens(draw.answers, draw.verdicts, model)
    price = model.of_judge(prompt, completion, unit)
    reading = model.of_model(float(draw.answers.tokens.sum()), unit)
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
    curves = tuple(
        Curve(line, tuple(x for x, _ in sorted(own)), tuple(y for _, y in sorted(own)))
        for line, own in points.items()
        if not any(math.isnan(y) for _, y in own)
    )
    return Table(
        name,
        f"{draw.benchmark.title}: {first} at equal {'FLOP' if unit == 'FLOP' else 'money'}",
        tuple(columns),
        tuple(rows),
        _assumptions(draw, model, unit, mode, prompt, completion, estimated),
        curves,
        (f"{unit}, % of the judge on all pairs", first),
    )


class _Others:
    """What else the same cost buys."""

    def __init__(self, draw: Draw, price: Matrix) -> None:
        self.draw, self.price = draw, price
        self.one = np.ones((1, len(draw.answers.pairs.items)))
        self.name = draw.scores(draw.credit(np.zeros(len(price), dtype=bool)), self.one)[0].name

    def score(self, credit: Matrix) -> float:
        return float(self.draw.scores(credit, self.one)[0].value[0])

    def random(self, budget: float) -> float:
        return self._mean(budget, self.draw.answers.margin)

    def judge_alone(self, budget: float) -> float:
        """Pairs at random until the cost is spent; the others by a coin: scores drawn at random for the responses."""
        return self._mean(budget, None)

    def hindsight(self, budget: float) -> float:
        said = self.draw.verdicts.preference
        gain = np.where(np.isnan(said), 0.0, half_point(np.nan_to_num(said)) - half_point(self.draw.answers.margin))
        worth = np.flatnonzero(gain > 0)
        worth = worth[np.argsort(-gain[worth] / np.maximum(self.price[worth], 1e-300), kind="stable")]
        return self.score(self.draw.credit(routed_mask(self._within(worth, budget), len(self.price))))

    def _within(self, order: Rows, budget: float) -> Rows:
        return order[np.cumsum(self.price[order]) <= budget * (1 + 1e-12)]

    def _mean(self, budget: float, margin: Matrix | None) -> float:
        """Over draws of pairs, and of the coin; one draw, or none, where the judge was not asked about all."""
        draw, count = self.draw, len(self.price)
        rng = np.random.default_rng([draw.seed, 2])
        if draw.verdicts.complete:
            orders = [rng.permutation(count) for _ in range(DRAWS)]
        else:
            orders = [random_order(count, draw.seed)]
        found = []
        for order in orders:
            rows = self._within(order, budget)
            if not draw.verdicts.asked[rows].all():
                return math.nan
            found.append(self.score(self._credit(routed_mask(rows, count), margin, rng)))
        return float(np.mean(found))

    def _credit(self, routed: Mask, margin: Matrix | None, rng: np.random.Generator) -> Matrix:
        if margin is not None:
            return self.draw.credit(routed)
        pairs = self.draw.answers.pairs
        coin = []
        for item in pairs.items:
            score = rng.random(len(item.responses))
            coin.append(np.array([score[i] - score[j] for i, j in item.pairs]))
        said = self.draw.verdicts.preference
        decided = routed & ~np.isnan(said)
        return self.draw.benchmark.credit(pairs, np.where(decided, said, np.concatenate(coin)))


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
