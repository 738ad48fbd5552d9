"""A judge that replays recorded verdicts: for tests, for the demo, and for judging a router without buying a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from rmcore._base.errors import DataError, InputError, reject
from rmcore._base.lines import opened, read_json
from rmcore._base.prompt import Prompt, Response
from rmcore.judge.base import Outcome, Pair, Verdict
from rmcore.judge.keys import pair_key
from rmcore.judge.orders import Asked, Orders, check_orders, exchanged, shown_exchanged

__all__ = ["RecordedJudge"]

Recorded: TypeAlias = Outcome | float | None
"""A hard verdict, a soft one in [-1, 1], or that there was none."""

_OUTCOMES = ("win", "loss", "tie")
_EXPECTED = "'win', 'loss', 'tie', a number in [-1, 1] or none (null)"


class RecordedJudge:
    """Replays verdicts by content: what was recorded for these texts is the answer, whoever asks and in what order.

    A **row** is a mapping (in a file: one JSON object a line) with

    - ``prompt``: a string or a list of messages, ``first``, ``second``: the two responses;
    - ``verdict``: ``"win"`` (``first`` is better), ``"loss"`` (``second`` is), ``"tie"``, a soft verdict as a number in
      [-1, 1] (2P − 1, P how probable it is that ``first`` is better), or ``null``: the judge was asked and gave no
      verdict;
    - ``order``, optional: which response the judge was *shown* first. ``"ab"`` (the default) means ``first``, ``"ba"``
      means ``second``. The verdict is always from ``first``'s side, whichever was shown first.

    Other fields are ignored. So ``{first: X, second: Y, verdict: win, order: ba}`` and ``{first: Y, second: X,
    verdict: loss}`` are the same record: shown Y then X, the judge preferred X.

    Answers: both orders recorded → put together as in :mod:`rmcore.judge.orders` (with ``orders="one"``: the order the
    stable hash picks); one order recorded → that one, its sign turned if the pair is asked the other way round; neither
    → no verdict, ``no_record``; recorded ``null`` → no verdict, ``no_verdict``.

    Args:
        verdicts: :func:`~rmcore.judge.keys.pair_key` of the texts in the order *shown* → the verdict from the side of
            the response shown first, or ``None``. Most callers want :meth:`from_rows` or :meth:`from_file`.
        orders: ``"both"`` or ``"one"``.

    Raises:
        InputError: a key or a verdict of ``verdicts`` is malformed, or ``orders`` is neither word.
    """

    buys_once = True
    """It buys nothing."""

    def __init__(self, verdicts: Mapping[str, Recorded], *, orders: Orders = "both") -> None:
        self.orders: Orders = check_orders(orders)
        for key, outcome in verdicts.items():
            if not isinstance(key, str) or len(key) != 64:
                reject("verdicts", f"the key {str(key)[:80]!r}", "the 64 hex digits of pair_key(prompt, first, second)")
            if not _is_verdict(outcome):
                reject(f"verdicts[{key[:12]}…]", repr(outcome)[:80], _EXPECTED)
        self._verdicts: dict[str, Recorded] = dict(verdicts)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], *, orders: Orders = "both") -> RecordedJudge:
        """From rows as the class describes.

        A record may come twice if both say the same.

        Raises:
            InputError: naming the row (counted from 0): a field is missing or malformed, or two rows contradict.
        """
        table: dict[str, Recorded] = {}
        for index, row in enumerate(rows):
            try:
                _add(table, row)
            except InputError as error:
                raise InputError(f"rows[{index}]: {error}") from None
        return cls(table, orders=orders)

    @classmethod
    def from_file(cls, path: str | Path, *, orders: Orders = "both") -> RecordedJudge:
        """From a file of rows: JSON Lines or an array, in UTF-8, compressed or not (:mod:`rmcore._base.lines`).

        Raises:
            DataError: with the line's number: no JSON object, a bad field, contradicting rows, a damaged file.
            OSError: the file cannot be opened.
        """
        table: dict[str, Recorded] = {}
        Path(path).open("rb").close()
        with opened(path) as (stream, _):
            for row in read_json(stream, str(path)):
                try:
                    _add(table, row.value)
                except InputError as error:
                    raise DataError(str(error), source=str(path), line=row.number, unit=row.unit) from None
        return cls(table, orders=orders)

    def __len__(self) -> int:
        """How many (pair, order) records there are."""
        return len(self._verdicts)

    def __repr__(self) -> str:
        return f"RecordedJudge({len(self)} records, orders={self.orders!r})"

    def lookup(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        """The verdict when ``first`` is shown first, never averaged: what one call to the judge answered.

        If only the exchanged order is recorded, its verdict with the sign turned.

        Raises:
            InputError: the texts are not texts.
        """
        ahead = self._recorded(pair_key(prompt, first, second))
        if ahead is not None:
            return ahead
        back = self._recorded(pair_key(prompt, second, first))
        return Verdict.none("no_record") if back is None else exchanged(back)

    def orders_recorded(self, prompt: Prompt, first: Response, second: Response) -> int:
        """In how many of the two orders there is a verdict on the pair: 0, 1 or 2."""
        keys = (pair_key(prompt, first, second), pair_key(prompt, second, first))
        return sum(self._verdicts.get(key) is not None for key in keys)

    def verdict(self, pair: Pair) -> Verdict:
        """The answer for one pair, as :meth:`judge` gives it."""
        return self.asked(pair).verdict

    def asked(self, pair: Pair) -> Asked:
        """What was recorded for one pair in each order; with one order recorded, that one alone."""
        try:
            ahead = self._recorded(pair_key(pair.prompt, pair.first, pair.second))
            back = self._recorded(pair_key(pair.prompt, pair.second, pair.first))
        except InputError:
            return Asked(rule=Verdict.none("bad_pair"))
        if ahead is None and back is None:
            return Asked(rule=Verdict.none("no_record"))
        backward = None if back is None else exchanged(back)
        if ahead is None or backward is None or self.orders == "both":
            return Asked(ahead, backward)
        return Asked(backward=backward) if shown_exchanged(pair) else Asked(forward=ahead)

    async def judge_orders(self, pairs: Sequence[Pair]) -> list[Asked]:
        """:meth:`asked` of each pair."""
        return [self.asked(pair) for pair in pairs]

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order. Never raises because of a pair; nothing is awaited and nothing is spent."""
        return [self.verdict(pair) for pair in pairs]

    def _recorded(self, key: str) -> Verdict | None:
        """The record under ``key`` from the side of the response shown first; ``None`` if there is none."""
        if key not in self._verdicts:
            return None
        outcome = self._verdicts[key]
        if outcome is None:
            return Verdict.none("no_verdict")
        return Verdict.of(outcome) if isinstance(outcome, str) else Verdict(float(outcome))


def _is_verdict(value: object) -> bool:
    if value is None or (isinstance(value, str) and value in _OUTCOMES):
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1 <= value <= 1


def _add(table: dict[str, Recorded], row: object) -> None:
    """Put one row into ``table`` under its key of the order shown."""
    if not isinstance(row, Mapping):
        reject("row", type(row).__name__, "an object with prompt, first, second and verdict")
    for name in ("prompt", "first", "second", "verdict"):
        if name not in row:
            reject(name, "nothing", "a value", "A pair without a verdict is written with verdict null")
    verdict, order = row["verdict"], row.get("order", "ab")
    if not _is_verdict(verdict):
        reject("verdict", repr(verdict)[:80], _EXPECTED)
    if order not in ("ab", "ba"):
        reject("order", repr(order)[:80], "'ab' (first was shown first) or 'ba'")
    first, second = row["first"], row["second"]
    outcome = cast("Recorded", verdict)
    if order == "ba":
        first, second = second, first
        turned: dict[Recorded, Recorded] = {"win": "loss", "loss": "win"}
        outcome = 0.0 - outcome if isinstance(outcome, (int, float)) else turned.get(outcome, outcome)
    key = pair_key(row["prompt"], first, second)
    if table.setdefault(key, outcome) != outcome:
        reject(
            "verdict",
            f"{outcome!r} for a pair and order already recorded as {table[key]!r}",
            "one verdict per pair and order",
            "Keep one of the two rows, or record the pair as null",
        )
