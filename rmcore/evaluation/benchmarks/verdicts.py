"""A judge's verdicts on a benchmark's pairs: known from the start, or asked for as far as a table needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject
from rmcore._base.loop import run_sync
from rmcore.engine.routing import Budget
from rmcore.evaluation.benchmarks.item import CountedPairs, Matrix
from rmcore.judge.base import Judge, JudgeUsage, Pair, Verdict, checked_verdicts
from rmcore.judge.keys import pair_key
from rmcore.judge.orders import exchanged
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.store.ledger import VerdictLedger
from rmcore.judge.store.logged import LoggedCall
from rmcore.judge.store.prices import PriceTable
from rmcore.judge.store.store import VerdictStore

__all__ = ["LABEL", "LiveVerdicts", "Verdicts", "label_verdicts", "recorded_verdicts"]

LABEL = "the label (an upper bound: a judge that is always right)"
CHUNK = 64  # pairs asked together: what a budget is settled by, and a bar moves by
_SPENT = ("calls", "prompt_tokens", "completion_tokens", "seconds", "cost")

Mask: TypeAlias = npt.NDArray[np.bool_]


class Verdicts:
    """What a judge says of P pairs, from the side of each pair's better response.

    Attributes:
        pairs: the pairs.
        name: of the judge, for people to read.
        preference: (P,) in [−1, 1], positive where it agrees with the label; NaN where there is no verdict.
        asked: (P,) bool, where the judge was asked, with a verdict or without.
        flipped: (P,) bool, where its answers in the two orders contradict each other.
        orders: (P,) in how many orders it gave a verdict.
        lean: (P,) in [−1, 1], how far it went by the place: the mean over both orders of its preference for the
            response shown first. NaN where the two are not known apart; of a live judge its store tells them.
        spent: name → (P,) what it cost: ``calls`` (orders asked), ``prompt_tokens``, ``completion_tokens``,
            ``seconds``, ``cost``; NaN where that is not known. What a store had was paid for once, and counts as that.
        currency: of ``cost``.
        ended: why not all that was wanted was asked; empty otherwise.
    """

    def __init__(self, pairs: CountedPairs, name: str) -> None:
        count = len(pairs)
        self.pairs, self.name, self.currency, self.ended = pairs, name, "", ""
        self.preference: Matrix = np.full(count, np.nan)
        self.asked: Mask = np.zeros(count, dtype=bool)
        self.flipped: Mask = np.zeros(count, dtype=bool)
        self.orders: npt.NDArray[np.intp] = np.zeros(count, dtype=np.intp)
        self.lean: Matrix = np.full(count, np.nan)
        self.spent: dict[str, Matrix] = {name: np.full(count, np.nan) for name in _SPENT}

    @classmethod
    def of(cls, pairs: CountedPairs, preference: Matrix, name: str = LABEL) -> Verdicts:
        """Verdicts that are there, of which no more is known; raises InputError for another number of them."""
        if len(preference) != len(pairs):
            reject("verdicts", f"{len(preference)}", f"{len(pairs)}, one a pair")
        verdicts = cls(pairs, name)
        verdicts.preference, verdicts.asked = np.asarray(preference, dtype=np.float64), np.ones(len(pairs), dtype=bool)
        return verdicts

    def __len__(self) -> int:
        return len(self.preference)

    @property
    def complete(self) -> bool:
        """Whether the judge was asked about every pair."""
        return bool(self.asked.all())

    @property
    def failed(self) -> int:
        """Pairs that it was asked about and gave no verdict on."""
        return int((self.asked & np.isnan(self.preference)).sum())

    @property
    def flips(self) -> tuple[int, int]:
        """Pairs on which its two orders contradict each other, and all with a verdict in both."""
        both = self.orders == 2
        return int((self.flipped & both).sum()), int(both.sum())

    def ask(self, rows: npt.NDArray[np.intp]) -> None:
        """Have the verdicts on these pairs, in this order, as far as a budget goes; a no-op where all are known."""

    def find_lean(self) -> None:
        """Bring :attr:`lean` up to what was asked; a no-op where that is known from the start."""


def label_verdicts(pairs: CountedPairs) -> Verdicts:
    """Of a judge that always agrees with the label: no judge can do better."""
    return Verdicts.of(pairs, np.ones(len(pairs)))


def recorded_verdicts(pairs: CountedPairs, judge: RecordedJudge, name: str = "recorded verdicts") -> Verdicts:
    """The recorded verdicts, both orders put together; none where none is recorded."""
    found = Verdicts.of(pairs, np.full(len(pairs), np.nan), name)
    row = 0
    for item in pairs.items:
        for better, worse in item.pairs:
            first, second = item.responses[better], item.responses[worse]
            verdict = judge.verdict(Pair(item.prompt, first, second))
            found.preference[row] = np.nan if verdict.preference is None else verdict.preference
            found.flipped[row] = verdict.flipped
            found.orders[row] = judge.orders_recorded(item.prompt, first, second)
            if found.orders[row] == 2:
                shown = (judge.lookup(item.prompt, first, second), judge.lookup(item.prompt, second, first))
                found.lean[row] = sum(one.preference or 0.0 for one in shown) / 2
            row += 1
    return found


class LiveVerdicts(Verdicts):
    """Verdicts that are bought when they are asked for, each pair once.

    A pair is shown by the smaller of its two keys, never the better response first, so that a judge which asks one
    order only learns nothing from the order.

    Args:
        pairs: the pairs.
        judge: any judge; a ``ChatJudge`` with a store buys nothing twice, also not after a crash.
        name: of the judge.
        budgets: what is asked stays within each of them; then no more is asked, and :attr:`ended` says so.
        prices: for what a store bought before there were any.
        progress: called with (pairs answered, pairs wanted so far).
    """

    def __init__(
        self,
        pairs: CountedPairs,
        judge: Judge,
        name: str,
        *,
        budgets: Sequence[Budget] = (),
        prices: PriceTable | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(pairs, name)
        self.judge, self.budgets, self.prices = judge, tuple(budgets), prices
        self.currency = "" if prices is None else prices.currency
        self.bought = JudgeUsage()
        """In this run."""
        self._progress = progress
        self._logged: dict[str, dict[str, LoggedCall]] | None = None
        texts = [(item.prompt, item.responses[i], item.responses[j]) for item in pairs.items for i, j in item.pairs]
        keys = [(pair_key(*text), pair_key(text[0], text[2], text[1])) for text in texts]
        self._exchanged = [there > back for there, back in keys]
        self._key = [min(both) for both in keys]
        self._pair = [
            Pair(prompt, *((second, first) if turned else (first, second)))
            for (prompt, first, second), turned in zip(texts, self._exchanged, strict=True)
        ]
        self._same: dict[str, list[int]] = {}
        for row, key in enumerate(self._key):
            self._same.setdefault(key, []).append(row)

    def ask(self, rows: npt.NDArray[np.intp]) -> None:
        """Buy the verdicts that are not there yet; raises nothing on the judge's account."""
        wanted = list(dict.fromkeys(self._same[self._key[row]][0] for row in rows.tolist() if not self.asked[row]))
        known = int(self.asked.sum())
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            granted, settle = self._reserve(len(chunk))
            chunk = chunk[:granted]
            verdicts = run_sync(checked_verdicts(self.judge, [self._pair[row] for row in chunk])) if chunk else []
            usage = JudgeUsage.total(verdict.usage for verdict in verdicts)
            settle(usage)
            self.bought += usage
            for row, verdict in zip(chunk, verdicts, strict=True):
                for twin in self._same[self._key[row]]:
                    self._take(twin, verdict)
            self._read_store([row for row, verdict in zip(chunk, verdicts, strict=True) if verdict.usage.cache_hits])
            if self._progress is not None:
                self._progress(known + start + len(chunk), known + len(wanted))
            if granted < len(wanted[start : start + CHUNK]):
                left = len(wanted) - start - granted
                self.ended = f"the budget of {self._limits()} ended with {left} pairs unasked"
                return

    def find_lean(self) -> None:
        """From what the store has of both orders; nothing without a store."""
        store = getattr(self.judge, "store", None)
        if not isinstance(store, VerdictStore) or not (self.orders == 2).any():
            return
        with VerdictLedger(store.path) as ledger:
            logged = self._calls(ledger)
        for row in np.flatnonzero(self.orders == 2).tolist():
            said = [call.preference for call in logged.get(self._key[row], {}).values() if call.preference is not None]
            if len(said) == 2:
                self.lean[row] = sum(said) / 2

    def _reserve(self, count: int) -> tuple[int, Callable[[JudgeUsage], None]]:
        """How many of ``count`` pairs all budgets allow, and what settles them."""
        held = [budget.reserve(count) for budget in self.budgets]
        granted = min([count, *(one.pairs for one in held)])
        held = [budget.shrink(one, granted) for budget, one in zip(self.budgets, held, strict=True)]

        def settle(usage: JudgeUsage) -> None:
            for budget, one in zip(self.budgets, held, strict=True):
                budget.settle(one, usage)

        return granted, settle

    def _limits(self) -> str:
        return ", ".join(f"{budget.limit:g} {budget.unit}" for budget in self.budgets)

    def _take(self, row: int, verdict: Verdict) -> None:
        verdict = exchanged(verdict) if self._exchanged[row] else verdict
        self.asked[row] = True
        self.preference[row] = np.nan if verdict.preference is None else verdict.preference
        self.flipped[row] = verdict.flipped
        asked_both = getattr(self.judge, "orders", "both") == "both" and verdict.judge != "rule"
        one = not asked_both or "one_order:" in verdict.reason
        self.orders[row] = 0 if verdict.failed else 1 if one else 2
        if not verdict.usage.cache_hits:
            self._book(row, verdict.usage)

    def _book(self, row: int, usage: JudgeUsage) -> None:
        priced = not usage.unpriced_calls
        found = (usage.calls, usage.prompt_tokens, usage.completion_tokens, usage.seconds)
        for name, value in zip(_SPENT, (*found, usage.cost if priced else np.nan), strict=True):
            self.spent[name][row] = value
        if usage.calls and not usage.prompt_tokens:  # an endpoint that reports nothing does not work for nothing
            self.spent["prompt_tokens"][row] = self.spent["completion_tokens"][row] = np.nan

    def _read_store(self, rows: Sequence[int]) -> None:
        """What answers of a store once cost: of each order's last call that was answered."""
        store = getattr(self.judge, "store", None)
        if not rows or not isinstance(store, VerdictStore):
            return
        with VerdictLedger(store.path) as ledger:
            if self._logged is None:
                self._logged = self._calls(ledger)
            for row in rows:
                key = self._key[row]
                if len(self._logged.get(key, ())) < self.orders[row]:  # the other order was bought just now
                    self._logged |= self._calls(ledger, key)
                parts = [self._paid(call) for call in self._logged.get(key, {}).values()]
                for twin in self._same[key] if parts else ():
                    self._book(twin, JudgeUsage.total(parts))

    def _calls(self, ledger: VerdictLedger, key: str | None = None) -> dict[str, dict[str, LoggedCall]]:
        """Pair → order shown → this judge's last call that was answered."""
        found: dict[str, dict[str, LoggedCall]] = {}
        model, judge_id = getattr(self.judge, "model", None), getattr(self.judge, "judge_id", None)
        for call in reversed(ledger.calls(key=key, model=model)):
            if call.replied and call.judge == judge_id:
                found.setdefault(call.pair, {})[call.shown] = call
        return found

    def _paid(self, call: LoggedCall) -> JudgeUsage:
        cost = call.cost if self.prices is None else self.prices.cost(call.usage, call.answering)
        return replace(call.usage, cost=cost or 0.0, unpriced_calls=int(cost is None))
