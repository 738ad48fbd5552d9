"""How good judges are where nobody knows the answers: by their own repetitions, by both orders, and by each other.

Dawid & Skene (1979) estimate every judge's accuracy and every item's answer together, by EM, from votes alone: a judge
is good where it agrees with the answer that the judges, weighed by how good they are, come to. Which response of a
pair is called first is arbitrary, so a judge is taken to err alike on both sides: P(right), P(tie), and wrong for the
rest.

Two things it cannot know. Judges that make the *same* mistakes look good to each other (one model under several
prompts, or a set on which most are wrong); and the whole could be turned round, so the answer is that on which the
average judge is better than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject
from rmcore.evaluation.report import Array, Estimate
from rmcore.evaluation.statistics import Interval, mean_with_interval
from rmcore.judge.store.ledger import Unreadable, VerdictLedger

__all__ = ["DawidSkene", "JudgeQuality", "JudgeReport", "Vote", "dawid_skene", "judge_quality", "stored_votes"]

_PRIOR = np.array([2.0, 1.0, 1.0])
"""Pseudo-votes right, tied and wrong of each judge: no judge is certain, and one with few votes is a little better than
chance."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer of one judge on one pair in one order.

    Attributes:
        item: which pair.
        judge: who.
        first: whether the pair's own first response was shown first.
        preference: in [-1, 1], from the side of the pair's own first response.
    """

    item: str
    judge: str
    first: bool
    preference: float


@dataclass(frozen=True)
class DawidSkene:
    """Estimates from votes alone.

    Attributes:
        right, tied: (J,) P(a vote is right) and P(it is a tie); the rest is wrong.
        answer: (I,) P(the first response is better) of each item.
        iterations: of EM.
        log_likelihood: of the votes, up to the prior.
    """

    right: Array
    tied: Array
    answer: Array
    iterations: int
    log_likelihood: float

    @property
    def accuracy(self) -> Array:
        """(J,) of a judge's votes that are no ties, plus half of its ties: what a judge that must choose gets right."""
        found: Array = self.right + self.tied / 2
        return found


def dawid_skene(
    votes: npt.ArrayLike, *, weight: npt.ArrayLike | None = None, max_iterations: int = 500, tolerance: float = 1e-8
) -> DawidSkene:
    """EM on a table of votes.

    Args:
        votes: (I, J) the sign of each judge's vote on each item: 1 first, -1 second, 0 tie, NaN for none.
        weight: (I,) how often each item counts, for a bootstrap.
        max_iterations: of EM.
        tolerance: it ends when no answer moves by more.

    Raises:
        InputError: another shape, other values, or no votes.
    """
    table = np.asarray(votes, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        reject("votes", f"shape {table.shape}", "(items, judges)")
    known = ~np.isnan(table)
    if not known.any() or not np.isin(table[known], (-1.0, 0.0, 1.0)).all():
        reject("votes", "no votes, or other values", "1, 0 and -1, and NaN for none")
    counts = np.ones(len(table)) if weight is None else np.asarray(weight, dtype=np.float64)
    up, tie, down = (known & (table == value) for value in (1.0, 0.0, -1.0))
    mean = np.where(known, table, 0).sum(1) / np.maximum(known.sum(1), 1)
    answer: Array = 0.5 + 0.5 * mean * 0.9  # begin with the majority
    iterations, log_likelihood = 0, -np.inf
    right = tied = np.empty(0)
    while iterations < max_iterations:
        iterations += 1
        a = (answer * counts)[:, None]
        b = ((1 - answer) * counts)[:, None]
        hits, misses = (up * a + down * b).sum(0), (down * a + up * b).sum(0)
        ties = (tie * counts[:, None]).sum(0)
        total = hits + misses + ties + _PRIOR.sum()
        right, tied = (hits + _PRIOR[0]) / total, (ties + _PRIOR[1]) / total
        wrong = 1 - right - tied
        for_first = (up * np.log(right) + down * np.log(wrong)).sum(1)
        for_second = (down * np.log(right) + up * np.log(wrong)).sum(1)
        new = 1 / (1 + np.exp(np.clip(for_second - for_first, -700, 700)))
        log_likelihood = float(
            (counts * (np.logaddexp(for_first, for_second) - np.log(2) + (tie * np.log(tied)).sum(1))).sum()
        )
        moved = float(np.abs(new - answer).max())
        answer = new
        if moved <= tolerance:
            break
    if (right - (1 - right - tied)).mean() < 0:  # the mirror image, which fits as well
        right, answer = 1 - right - tied, 1 - answer
    return DawidSkene(right, tied, answer, iterations, log_likelihood)


@dataclass(frozen=True, kw_only=True)
class JudgeQuality:
    """One judge.

    Attributes:
        judge: its name.
        items: pairs it voted on.
        votes: its votes.
        order_consistency: share of pairs, asked in both orders, of which both prefer the same response (a tie in both
            counts, a tie in one counts half); None without such pairs.
        first_shown: how much more often than half of the time it prefers the response shown first; None likewise.
        self_consistency: chance that two of its votes on one pair in one order are equal, over pairs with several
            (other templates, principles or samples); None without such pairs.
        accuracy: by Dawid & Skene, ties counting half; None where it shares no pair with two other judges.
    """

    judge: str
    items: int
    votes: int
    order_consistency: Estimate | None
    first_shown: Estimate | None
    self_consistency: Estimate | None
    accuracy: Estimate | None


@dataclass(frozen=True, kw_only=True)
class JudgeReport:
    """All judges of a set of votes.

    Attributes:
        items: pairs.
        judges: by name.
        agreement: (judge, judge) → (pairs both decided, share on which they agree).
        shared: pairs that three judges or more voted on, which is what Dawid & Skene go by.
    """

    items: int
    judges: tuple[JudgeQuality, ...]
    agreement: dict[tuple[str, str], tuple[int, float]]
    shared: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        pairs = [{"judges": list(names), "pairs": n, "agree": share} for names, (n, share) in self.agreement.items()]
        judges = [_plain(asdict(judge)) for judge in self.judges]
        return {"items": self.items, "shared": self.shared, "judges": judges, "agreement": pairs}

    def to_markdown(self) -> str:
        """Two tables, and what they rest on."""
        titles = ("judge", "pairs", "both orders agree, %", "leans to first, points", "agrees with itself, %")
        head = f"| {' | '.join(titles)} | accuracy by the others, % |"
        rows = [
            f"| {_cell(j.judge)} | {j.items} | {_percent(j.order_consistency)} | {_percent(j.first_shown, sign='+')} | "
            f"{_percent(j.self_consistency)} | {_percent(j.accuracy)} |"
            for j in self.judges
        ]
        text = "\n".join([head, "|---|---|---|---|---|---|", *rows, ""])
        if self.agreement:
            agree = [
                f"| {_cell(a)} | {_cell(b)} | {n} | {100 * share:.1f} |"
                for (a, b), (n, share) in self.agreement.items()
            ]
            text += "\n".join(["", "| judge | and | pairs both decided | agree, % |", "|---|---|---|---|", *agree, ""])
        rest = f"{self.shared} of them with votes of three judges or more, on which accuracy rests."
        return text + f"\n{self.items} pairs, {rest}\n"


def judge_quality(votes: Sequence[Vote], *, replicates: int = 200, level: float = 0.95, seed: int = 0) -> JudgeReport:
    """Measure judges by their votes.

    Args:
        votes: any number a judge, pair and order.
        replicates: of the bootstrap over pairs.
        level: of its intervals.
        seed: of it.

    Raises:
        InputError: no votes, or a preference outside [-1, 1].
    """
    if not votes:
        reject("votes", "none", "at least one")
    for k, vote in enumerate(votes):
        if not -1 <= vote.preference <= 1:
            reject(f"votes[{k}].preference", vote.preference, "a number in [-1, 1]")
    items = {name: k for k, name in enumerate(dict.fromkeys(vote.item for vote in votes))}
    judges = {name: k for k, name in enumerate(dict.fromkeys(vote.judge for vote in votes))}
    own: list[dict[int, dict[bool, list[float]]]] = [{} for _ in judges]
    for vote in votes:
        by_order = own[judges[vote.judge]].setdefault(items[vote.item], {})
        by_order.setdefault(vote.first, []).append(vote.preference)
    table = np.full((len(items), len(judges)), np.nan)
    for j, of_item in enumerate(own):
        for i, orders in of_item.items():
            # Each order once, however often it was asked: a lean to the first place cancels.
            table[i, j] = np.sign(np.round(np.mean([np.mean(said) for said in orders.values()]), 12))
    shared = (~np.isnan(table)).sum(1) >= 3
    accuracy = _accuracies(table[shared], replicates, level, seed) if shared.any() else [None] * len(judges)

    def estimate(values: list[float]) -> Estimate | None:
        return _mean(values, replicates, level, seed)

    found = [
        JudgeQuality(
            judge=name,
            items=len(own[j]),
            votes=sum(len(said) for orders in own[j].values() for said in orders.values()),
            order_consistency=estimate([_same(*_both(orders)) for orders in own[j].values() if len(orders) == 2]),
            first_shown=estimate([_lean(*_both(orders)) for orders in own[j].values() if len(orders) == 2]),
            self_consistency=estimate(
                [_repeats(said) for orders in own[j].values() for said in orders.values() if len(said) > 1]
            ),
            accuracy=accuracy[j],
        )
        for name, j in judges.items()
    ]
    agreement = {}
    for a, one in judges.items():
        for b, other in judges.items():
            both = (np.abs(table[:, one]) == 1) & (np.abs(table[:, other]) == 1)
            if one < other and both.any():
                agreement[a, b] = int(both.sum()), float((table[both, one] == table[both, other]).mean())
    return JudgeReport(items=len(items), judges=tuple(found), agreement=agreement, shared=int(shared.sum()))


def stored_votes(ledger: VerdictLedger, *, unreadable: Unreadable | None = None) -> list[Vote]:
    """The votes of a verdict store, by the model that answered; canaries and failures are left out."""
    return [
        Vote(call.pair, call.answering, call.shown == "ab", call.preference * (1 if call.shown == "ab" else -1))
        for call in reversed(ledger.calls(unreadable=unreadable))
        if call.preference is not None and not call.canary
    ]


def _both(orders: dict[bool, list[float]]) -> tuple[float, float]:
    return float(np.mean(orders[True])), float(np.mean(orders[False]))


def _same(ahead: float, back: float) -> float:
    one, other = np.sign(ahead), np.sign(back)
    return 1.0 if one == other else 0.5 if 0 in (one, other) else 0.0


def _lean(ahead: float, back: float) -> float:
    """P(shown first is preferred) − ½ over both orders, in which which response is better cancels."""
    return float(np.sign(ahead) - np.sign(back)) / 4


def _repeats(said: list[float]) -> float:
    signs = np.sign(said)
    n = len(signs)
    equal = sum(int((signs == value).sum()) * (int((signs == value).sum()) - 1) for value in (-1, 0, 1))
    return equal / (n * (n - 1))


def _mean(values: list[float], replicates: int, level: float, seed: int) -> Estimate | None:
    if not values:
        return None
    return mean_with_interval(np.array(values), Interval(np.arange(len(values)), replicates, level, seed))


def _accuracies(table: Array, replicates: int, level: float, seed: int) -> list[Estimate | None]:
    voted: npt.NDArray[np.bool_] = np.asarray((~np.isnan(table)).any(0))
    point = dawid_skene(table).accuracy
    rng = np.random.default_rng(seed)
    drawn = [
        dawid_skene(
            table, weight=rng.multinomial(len(table), np.full(len(table), 1 / len(table))), tolerance=1e-4
        ).accuracy
        for _ in range(replicates)
    ]
    nan = np.full_like(point, np.nan)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail), axis=0) if drawn and len(table) > 1 else (nan, nan)
    return [
        Estimate(float(p), float(a), float(b)) if there else None
        for p, a, b, there in zip(point, low, high, voted.tolist(), strict=True)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _cell(name: str) -> str:
    return "".join(c if c.isprintable() and c != "|" else "\\" + f"x{ord(c):02x}" for c in name)[:80]


def _percent(value: Estimate | None, sign: str = "") -> str:
    if value is None:
        return "–"
    bounds = "" if np.isnan(value.low) else f" [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"
    return f"{100 * value.point:{sign}.1f}{bounds}"
