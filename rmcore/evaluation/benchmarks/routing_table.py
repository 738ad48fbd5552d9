"""A routing table and its forms: Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

from rmcore.evaluation.benchmarks.item import Level
from rmcore.evaluation.benchmarks.report import number, percent, points
from rmcore.evaluation.benchmarks.table import csv_value, markdown_line, tex
from rmcore.evaluation.benchmarks.verdicts import Mask, Verdicts

__all__ = ["PositionLean", "RoutedScore", "RoutingRow", "RoutingTable", "Spent"]


@dataclass(frozen=True)
class RoutedScore:
    """A score of the benchmark under a routing.

    Attributes:
        level: ``overall`` or ``section``; ``subset`` where the benchmark's rows are of one section only.
        name: which score.
        routed: with the judge on the pairs routed.
        random: with the judge on as many pairs drawn at random.
        low: lower bound of routed − random; NaN where no interval can be had.
        high: upper bound.
    """

    level: Level
    name: str
    routed: float
    random: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """routed − random."""
        return self.routed - self.random


@dataclass(frozen=True)
class Spent:
    """What the verdicts on some pairs cost, as the judge reported it; NaN where that is not known.

    Attributes:
        calls: questions put to the judge, two a pair where both orders are asked.
        prompt_tokens: of these.
        completion_tokens: of its answers.
        seconds: wall time of all calls, added up.
        cost: in the table's currency; NaN without a price.
    """

    calls: float
    prompt_tokens: float
    completion_tokens: float
    seconds: float
    cost: float

    @classmethod
    def of(cls, verdicts: Verdicts, routed: Mask) -> Spent:
        """Of the pairs routed; 0 for none of them."""
        return cls(**{name: float(column[routed].sum()) for name, column in verdicts.spent.items()})


@dataclass(frozen=True)
class PositionLean:
    """How often a judge prefers the response that it is shown first, over pairs answered in both orders.

    Every response stands first once, so that ½ is no lean, whichever is better. A tie counts half.

    Attributes:
        share: of all answers.
        low: lower bound; NaN where no interval can be had.
        high: upper bound.
        pairs: with both orders known apart.
    """

    share: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        bounds = "" if math.isnan(self.low) else f" [{percent(self.low)}, {percent(self.high)}]"
        return (
            f"Of the judge's answers in both orders of {self.pairs} pairs, {percent(self.share)}%{bounds} are for the "
            "response shown first (50% is no lean)"
        )


@dataclass(frozen=True)
class RoutingRow:
    """One threshold or budget.

    Attributes:
        name: as it was asked for.
        threshold: the lowest score among the pairs routed; Inf where none is.
        calls: pairs put to the judge.
        share: of all pairs.
        failed: of the calls, those without a verdict.
        scores: overall ones first.
        spent: what these verdicts cost.
    """

    name: str
    threshold: float
    calls: int
    share: float
    failed: int
    scores: tuple[RoutedScore, ...]
    spent: Spent


@dataclass(frozen=True)
class RoutingTable:
    """Accuracy against judge calls on a benchmark; the first row is without a judge, the last has every pair judged,
    where the judge was asked about every pair.

    ``notes`` are sentences on what was asked and what is left out; ``position`` is None where the judge's two orders
    are not known apart; ``model_seconds`` and ``model_tokens`` are the model's on all items, NaN where not known.
    """

    benchmark: str
    title: str
    judge: str
    by: str
    pairs: int
    rows: tuple[RoutingRow, ...]
    level: float
    replicates: int
    seed: int
    notes: tuple[str, ...] = ()
    currency: str = ""
    position: PositionLean | None = None
    model_seconds: float = math.nan
    model_tokens: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN and Inf are None."""
        content = asdict(self)
        for name in ("model_seconds", "model_tokens"):
            content[name] = number(content[name])
        if self.position is not None:
            content["position"] |= {name: number(content["position"][name]) for name in ("low", "high")}
        for row in content["rows"]:
            row["threshold"] = number(row["threshold"])
            row["spent"] = {key: number(value) for key, value in row["spent"].items()}
            row["scores"] = [
                {key: number(value) if isinstance(value, float) else value for key, value in score.items()}
                | {"difference": number(score["routed"] - score["random"])}
                for score in row["scores"]
            ]
        return content

    def to_csv(self) -> str:
        """A line for each row and score, shares in [0, 1]; an empty field where there is no number."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        names = "routing threshold calls share failed score routed random difference difference_low difference_high"
        writer.writerow([*names.split(), *(f"judge_{field.name}" for field in fields(Spent)), "model_seconds"])
        for row in self.rows:
            for score in row.scores:
                numbers = (score.routed, score.random, score.difference, score.low, score.high)
                writer.writerow(
                    [row.name, csv_value(row.threshold), row.calls, repr(row.share), row.failed, score.name]
                    + [csv_value(value) for value in (*numbers, *astuple(row.spent), self.model_seconds)]
                )
        return stream.getvalue()

    def to_markdown(self) -> str:
        """A line for routing and one for random routing at each budget, then the differences with their intervals."""
        names = [score.name for score in self.rows[0].scores]
        head = (
            f"## {self.title}: accuracy against judge calls\n\nThe judge is {self.judge}. Pairs are routed by "
            f"{self.by}, highest first; {self.pairs} pairs.\n\n"
        )
        lines = [markdown_line(["routing", "calls", "share, %", *names]), "|---|" + "---:|" * (len(names) + 2)]
        differences = [markdown_line([f"{self.by} − random, points", *names]), "|---|" + "---:|" * len(names)]
        for row in self.rows:
            place = [str(row.calls), percent(row.share)]
            routed = [percent(score.routed) for score in row.scores]
            if row.calls in (0, self.pairs):
                lines.append(markdown_line([row.name, *place, *routed]))
                continue
            random = [percent(score.random) for score in row.scores]
            lines += [
                markdown_line([f"{row.name}, by {self.by}", *place, *routed]),
                markdown_line(["random", *place, *random]),
            ]
            differences.append(markdown_line([row.name, *(_difference(score) for score in row.scores)]))
        position = () if self.position is None else (str(self.position),)
        notes = (
            f"\nIntervals: {100 * self.level:g}%, percentile bootstrap over prompts, {self.replicates} replicates, "
            f"seed {self.seed}.{self._failures()}{''.join(f' {note}.' for note in (*position, *self.notes))}"
            f"{self._model()}\n"
        )
        return head + "\n".join(lines) + "\n\n" + "\n".join(differences) + "\n" + self._costs() + notes

    def to_latex(self) -> str:
        """A ``tabular`` for booktabs: a line for routing and one for random routing at each budget."""
        names = [score.name for score in self.rows[0].scores]
        lines = [
            rf"% {tex(self.title)}; judge: {tex(self.judge)}",
            rf"\begin{{tabular}}{{lrr{'r' * len(names)}}}",
            r"\toprule",
            " & ".join(["Routing", "Calls", r"Share (\%)", *map(tex, names)]) + r" \\",
            r"\midrule",
        ]
        for row in self.rows:
            place = f"{row.calls} & {percent(row.share)}"
            routed = " & ".join(percent(score.routed) for score in row.scores)
            if row.calls in (0, self.pairs):
                lines.append(rf"{tex(row.name)} & {place} & {routed} \\")
                continue
            random = " & ".join(percent(score.random) for score in row.scores)
            lines += [
                rf"{tex(f'{row.name}, by {self.by}')} & {place} & {routed} \\",
                rf"random & {place} & {random} \\",
            ]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _costs(self) -> str:
        """What the judge reported, where it did."""
        if all(math.isnan(row.spent.calls) for row in self.rows if row.calls):
            return ""
        names = ["judge calls", "prompt tokens", "completion tokens", "judge seconds", f"cost, {self.currency or '-'}"]
        timed = not math.isnan(self.model_seconds)
        names += ["model seconds"] * timed
        lines = ["", markdown_line(["routing", "pairs", *names]), "|---|" + "---:|" * (len(names) + 1)]
        for row in self.rows:
            spent = row.spent
            counts = [_count(x) for x in (spent.calls, spent.prompt_tokens, spent.completion_tokens)]
            cost = "-" if math.isnan(spent.cost) or not self.currency else f"{spent.cost:.4f}"
            seconds = "-" if math.isnan(spent.seconds) else f"{spent.seconds:.1f}"
            own = [f"{self.model_seconds:.1f}"] * timed
            lines.append(markdown_line([row.name, str(row.calls), *counts, seconds, cost, *own]))
        return "\n".join(lines) + "\n"

    def _model(self) -> str:
        if math.isnan(self.model_seconds):
            return ""
        read = "" if math.isnan(self.model_tokens) else f" {_count(self.model_tokens)} tokens"
        return f" The model read{read} in {self.model_seconds:.1f} s; hidden states that were kept cost no time again."

    def _failures(self) -> str:
        failed = self.rows[-1].failed
        return f" The judge gives no verdict on {failed} pairs: the model's answer stands there." if failed else ""


def _difference(score: RoutedScore) -> str:
    if math.isnan(score.difference):
        return "-"
    point = points(score.difference)
    return point if math.isnan(score.low) else f"{point} [{points(score.low)}, {points(score.high)}]"


def _count(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"
