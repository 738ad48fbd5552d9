"""Reading a verdict store without touching it: what was asked, what it came to, and preferences to train on.

The file or the database is opened read-only, and another process may be writing to it meanwhile.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeAlias

from rmcore._base.errors import InputError, reject
from rmcore._base.numbers import COUNT, check_number
from rmcore._base.prompt import canonical_prompt, canonical_response
from rmcore._base.quantile import quantiles
from rmcore.judge.base import Verdict
from rmcore.judge.keys import CRITIC_VERSION
from rmcore.judge.orders import combine_orders, exchanged
from rmcore.judge.store.location import locate
from rmcore.judge.store.logged import TOKENS, JudgedPair, LoggedCall
from rmcore.judge.store.prices import PriceTable, price_call
from rmcore.judge.store.protocol import Reader, StoreError
from rmcore.judge.store.records import Shown
from rmcore.judge.store.rows import load_text

__all__ = ["JudgedPair", "LoggedCall", "Unreadable", "VerdictLedger"]

_CALLS = """
    SELECT calls.id, calls.judge, key, pair, shown, judges.judge, model, template, preference, reason, replied, canary,
        attempts, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, seconds, cost, currency,
        neutralised, reply_cut, at, version, {later}
    FROM calls JOIN judges ON judges.id = calls.judge"""
_KINDS: dict[str, Any] = {"int": int, "float": (int, float), "float | None": (int, float, type(None))}
_CUT = re.compile(r"\[(?:\d{1,12}, ){2}\d{1,12}\]")


Unreadable: TypeAlias = Callable[[StoreError], None]
"""What is told of a row that cannot be read."""


class VerdictLedger:
    """A verdict store, opened for reading; use it in a ``with`` statement, in one thread.

    Raises:
        StoreError: the file is missing, damaged, foreign or of another version; methods raise it too, for damage that
            is found later.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._store: Reader = locate(path).read()
        version = self._store.version
        # Files of the first version do not say who answered, those of the second not what was cut.
        later = ("answered" if version > 1 else "''", "fingerprint" if version > 1 else "''")
        self._select = _CALLS.format(later=", ".join((*later, "cut" if version > 2 else "'[0, 0, 0]'")))

    def __enter__(self) -> VerdictLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def calls(
        self,
        *,
        key: str | None = None,
        model: str | None = None,
        reason: str | None = None,
        limit: int | None = None,
        unreadable: Unreadable | None = None,
    ) -> list[LoggedCall]:
        """Calls, the latest first.

        Args:
            key: a call's key or a pair's, or the beginning of one (4 hex digits or more).
            model: of this model only.
            reason: with this reason, or with one that begins with it and a colon.
            limit: that many at most.
            unreadable: as in :meth:`pairs`.

        Raises:
            InputError: ``key`` is no beginning of a key, or ``limit`` is not positive.
        """
        if limit is not None:
            check_number("limit", limit, COUNT, "at least 1")
        where: list[str] = []
        values: list[object] = []
        if key is not None:
            if not re.fullmatch(r"[0-9a-f]{4,64}", key):
                reject("key", repr(key)[:80], "4 to 64 hex digits")
            # A range instead of LIKE: it uses the index, and nothing in it can be a pattern.
            where.append("(key BETWEEN ? AND ? OR pair BETWEEN ? AND ?)")
            values += [key, key + "g", key, key + "g"]
        if model is not None:
            where.append("model = ?")
            values.append(model)
        if reason is not None:
            where.append("(reason = ? OR substr(reason, 1, ?) = ?)")
            values += [reason, len(reason) + 1, f"{reason}:"]
        query = f"{self._select}{_where(where)} ORDER BY calls.id DESC"
        calls = self._calls(query, *values, unreadable=unreadable)  # the limit is of those that can be read
        return list(islice(calls, limit))

    def texts(self, call: LoggedCall) -> dict[str, Any]:
        """Everything said in one call: ``prompt``, ``first``, ``second``, ``critique``, ``reply``, ``labels``, and the
        request's ``parameters``.
        """
        query = """
            SELECT p.body, a.body, b.body, critique, reply, labels, parameters FROM calls
            JOIN judges ON judges.id = calls.judge JOIN texts p ON p.id = calls.prompt
            JOIN texts a ON a.id = calls.first JOIN texts b ON b.id = calls.second WHERE calls.id = ?"""
        names = ("prompt", "first", "second", "critique", "reply", "labels", "parameters")
        for row in self._store.rows(query, call.id):
            try:
                said = dict(zip(names, map(load_text, row), strict=True))
            except StoreError as error:
                raise StoreError(f"{self.path}: call {call.id}: {error}") from None
            if not all(isinstance(said[name], str) for name in ("critique", "reply")):
                raise StoreError(f"{self.path}: call {call.id} holds texts that are none")
            try:
                canonical_prompt(said["prompt"])
                canonical_response(said["first"], "first")
                canonical_response(said["second"], "second")
            except InputError as error:
                raise StoreError(f"{self.path}: call {call.id}: {error}") from None
            return said
        raise StoreError(f"{self.path}: call {call.id} has no texts")

    def pairs(
        self,
        *,
        model: str | None = None,
        canaries: bool = False,
        texts: bool = True,
        unreadable: Unreadable | None = None,
    ) -> Iterator[JudgedPair]:
        """What each judge said of each pair, pair by pair, in memory for one pair.

        Args:
            model: of this model only.
            canaries: also pairs that were made up to test the judge.
            texts: read the texts; without, they are empty.
            unreadable: called with the error of a row that cannot be read, which is then left out. Without it the
                error is raised.
        """
        where = [f"substr(template, 1, {len(CRITIC_VERSION)}) <> '{CRITIC_VERSION}'"]  # a critic compares nothing
        where += ([] if canaries else ["canary = 0"]) + ([] if model is None else ["model = ?"])
        query = f"{self._select}{_where(where)} ORDER BY calls.judge, pair, calls.id"
        calls = self._calls(query, *([] if model is None else [model]), unreadable=unreadable)
        for _, group in groupby(calls, key=lambda call: (call.asked, call.pair)):
            try:
                pair = self._together(list(group), texts)
            except StoreError as error:
                if unreadable is None:
                    raise
                unreadable(error)
                continue
            yield pair

    def stats(self, prices: PriceTable | None = None, *, unreadable: Unreadable | None = None) -> dict[str, Any]:
        """Counts over the whole log, as JSON values.

        Args:
            prices: what tokens cost now; without it, costs are those of the time of each call.
            unreadable: as in :meth:`pairs`; called once for each row.
        """
        counts: dict[str, Counter[str]] = {name: Counter() for name in ("models", "outcomes", "reasons", "shown_first")}
        total = _Sums()
        days: defaultdict[str, _Sums] = defaultdict(_Sums)
        latencies: list[float] = []
        keys: set[str] = set()
        first = last = None
        cut = critiques = 0
        for call in self._calls(f"{self._select} ORDER BY calls.id", unreadable=unreadable):
            keys.add(call.key)
            first, last = first or call.at, call.at
            counts["models"][call.answering] += 1
            cut += any(call.characters_cut)
            if call.template.startswith(CRITIC_VERSION):
                critiques += call.replied
            else:
                counts["outcomes"][call.outcome] += 1
            if call.template.startswith(CRITIC_VERSION) and call.replied:
                pass  # a text, which is all that was asked for
            elif call.preference is None:
                counts["reasons"][call.reason] += 1
            elif not call.canary:
                counts["shown_first"][{"win": "preferred", "loss": "not preferred", "tie": "tie"}[call.outcome]] += 1
            latencies.append(call.seconds)
            for sums in (total, days[call.at[:10]]):
                sums.add(call, prices)
        pairs: Counter[str] = Counter()
        # Rows that cannot be read have been told of.
        for pair in self.pairs(texts=False, unreadable=None if unreadable is None else _told):
            pairs["judged"] += 1
            pairs[_kind(pair.verdict)] += 1
            pairs["both_orders"] += pair.orders == 2
        (texts,) = next(iter(self._store.rows("SELECT count(*) FROM texts")))
        return {
            **total.to_json(),
            "questions": len(keys),
            "cut": cut,
            "critiques": critiques,
            **{name: dict(counter.most_common()) for name, counter in counts.items()},
            "pairs": {name: pairs[name] for name in ("judged", "both_orders", "decided", "flips", "ties", "failed")},
            "latency_s": dict(zip(("p50", "p95"), quantiles(latencies, (0.5, 0.95)), strict=True))
            if latencies
            else {"p50": None, "p95": None},
            "file": {"bytes": self._store.size(), "texts": texts, "first": first, "last": last},
            "days": {day: sums.to_json() for day, sums in sorted(days.items())},
        }

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _calls(self, query: str, *values: object, unreadable: Unreadable | None = None) -> Iterator[LoggedCall]:
        """Rows as calls; sqlite lets a column hold anything, so a file that others wrote is not believed."""
        for row in self._store.rows(query, *values):
            try:
                call = self._checked(LoggedCall(*row))
            except StoreError as error:
                if unreadable is None:
                    raise
                unreadable(error)
                continue
            yield call

    def _checked(self, call: LoggedCall) -> LoggedCall:
        for part in fields(LoggedCall):
            value = getattr(call, part.name)
            if not isinstance(value, _KINDS.get(str(part.type), str)):
                raise StoreError(f"{self.path}: call {call.id!r:.20}: {part.name} is no {part.type}")
        if not _CUT.fullmatch(call.cut):
            raise StoreError(f"{self.path}: call {call.id}: cut is none that this library writes")
        if call.shown not in ("ab", "ba") or not -1 <= (call.preference or 0.0) <= 1:
            raise StoreError(f"{self.path}: call {call.id}: shown or preference is none that this library writes")
        return call

    def _together(self, calls: Sequence[LoggedCall], texts: bool) -> JudgedPair:
        """The calls of one judge for one pair as one verdict."""
        by_order: dict[Shown, LoggedCall] = {}
        for shown in ("ab", "ba"):
            asked = [call for call in calls if call.shown == shown]
            if asked:
                by_order[shown] = _standing(asked)
        said = {shown: self.texts(call) for shown, call in by_order.items()} if texts else {}
        verdicts = [
            verdict if shown == "ab" else exchanged(verdict)
            for shown, call in by_order.items()
            for verdict in [Verdict(call.preference, call.reason)]
        ]
        one = calls[0]
        prompt, a, b = "", "", ""
        for shown, text in said.items():
            prompt, a, b = text["prompt"], text["first"], text["second"]
            if shown == "ba":
                a, b = b, a
        return JudgedPair(
            pair=one.pair,
            judge=one.judge,
            model=" ".join(dict.fromkeys(call.answering for call in by_order.values())),
            prompt=prompt,
            a=a,
            b=b,
            verdict=verdicts[0] if len(verdicts) == 1 else combine_orders(*verdicts),
            orders=sum(not verdict.failed for verdict in verdicts),
            critiques={shown: text["critique"] for shown, text in said.items() if text["critique"]},
            cut=_most_cut(by_order),
        )


def _standing(calls: Sequence[LoggedCall]) -> LoggedCall:
    """What answers a question that was put several times: the first verdict, or else the latest reply or failure.

    Of verdicts that were shown more or less of the texts, one that was shown the most.
    """
    verdicts = sorted((call for call in calls if call.preference is not None), key=lambda c: sum(c.characters_cut))
    return verdicts[0] if verdicts else ([call for call in calls if call.replied] or calls)[-1]


def _most_cut(by_order: Mapping[Shown, LoggedCall]) -> tuple[int, int, int]:
    """Characters of prompt, a and b that were not shown, in the order in which more of them were missing."""
    found = [(0, 0, 0)]
    for shown, call in by_order.items():
        prompt, first, second = call.characters_cut
        found.append((prompt, first, second) if shown == "ab" else (prompt, second, first))
    return max(found, key=sum)


def _told(error: StoreError) -> None:
    """Nothing more to say."""


def _kind(verdict: Verdict) -> str:
    if verdict.preference is None:
        return "failed"
    if verdict.preference:
        return "decided"
    return "flips" if verdict.flipped else "ties"


def _where(conditions: Sequence[str]) -> str:
    return f" WHERE {' AND '.join(conditions)}" if conditions else ""


class _Sums:
    """Calls, tokens and costs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.cost: defaultdict[str, float] = defaultdict(float)

    def add(self, call: LoggedCall, prices: PriceTable | None) -> None:
        counted = {"calls": 1, "retries": max(0, call.attempts - 1), "canaries": call.canary}
        counted |= {"sanitised": call.sanitised} | {name: getattr(call, name) for name in TOKENS}
        self.counts.update(counted)
        cost, currency = call.cost, call.currency
        if prices is not None:
            usage = price_call(prices, call.usage, call.model, call.reason, call.answered)
            cost, currency = None if usage.unpriced_calls else usage.cost, prices.currency
        if cost is None:
            self.counts["unpriced_calls"] += 1
        elif cost:
            self.cost[currency] += cost

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        names = ("calls", "retries", "canaries", "sanitised", *TOKENS, "unpriced_calls")
        return {name: self.counts[name] for name in names} | {"cost": dict(self.cost)}
