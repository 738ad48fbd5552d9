"""What a *run* of score calls came to, step by step: summaries added up, kept in a file, and told in a few lines.

One call's own usage, cost and latency is :mod:`rmcore.engine.usage`'s.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmcore._base.errors import DataError, reject
from rmcore.engine.usage import known_cost, merge_latencies

__all__ = ["Accounts", "StepAccount", "account_lines"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepAccount:
    """What a plot over steps shows of one step. NaN: not known, or there was nothing to measure."""

    step: int
    pairs: int
    routed: int
    failed: int
    uncertainty: float
    cost: float
    tokens: int
    judge_s: float
    hidden_s: float

    @classmethod
    def of(cls, step: int, summary: Mapping[str, Any]) -> StepAccount:
        """From ``GroupScores.summary()``."""
        usage, u = summary["judge_usage"], summary["uncertainty"]
        return cls(
            step=step,
            pairs=summary["pairs"],
            routed=summary["routed"],
            failed=summary["decided_by"]["judge_failed"],
            uncertainty=math.nan if u is None else u["mean"],
            cost=math.nan if usage["cost"] is None else usage["cost"],
            tokens=usage["prompt_tokens"] + usage["completion_tokens"],
            judge_s=summary["overlap"]["judge_s"],
            hidden_s=summary["overlap"]["hidden_s"],
        )


class Accounts:
    """The summaries of many score calls, added up: one a training step, say.

    Args:
        log: a JSON Lines file to which every summary is appended as it comes, with its step; None keeps no file. What
            is in it already is read first, so a resumed run goes on counting. One process at a time may write it;
            :meth:`read` only looks.

    Raises:
        DataError: a line of the file is no summary. A last line cut short by a crash is dropped, with a warning.

    Attributes:
        steps: one :class:`StepAccount` a summary, for :func:`rmcore.evaluation.plots.plot_accounts`.

    Example:
        >>> accounts = Accounts()
        >>> accounts.totals()["steps"]
        0
    """

    def __init__(self, log: str | os.PathLike[str] | None = None) -> None:
        self.steps: list[StepAccount] = []
        self._sums: dict[str, Any] = {}
        self._u_sum, self._u_count = 0.0, 0
        self._path = None if log is None else Path(log)
        if self._path is not None and self._path.exists():
            whole, rest = self._read(self._path)
            if rest:
                with self._path.open("r+b") as file:
                    file.truncate(whole)

    @classmethod
    def read(cls, log: str | os.PathLike[str]) -> Accounts:
        """What a log holds, without continuing it: also while another process writes.

        Raises:
            DataError: as above.
            OSError: there is no such file.
        """
        accounts = cls()
        accounts._read(Path(log))
        return accounts

    def add(self, summary: Mapping[str, Any], *, step: int | None = None) -> None:
        """Add ``GroupScores.summary()``; ``step`` is one more than the last unless given.

        Raises:
            InputError: not such a summary.
            OSError: the log cannot be written. The summary is counted nevertheless.
        """
        if step is None:
            step = self.steps[-1].step + 1 if self.steps else 0
        self._count(summary, step)
        if self._path is not None:
            line = json.dumps({"step": step, **summary}, allow_nan=False, ensure_ascii=False) + "\n"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)

    def totals(self) -> dict[str, Any]:
        """Sums over all steps, laid out as a summary; quantiles of u, which cannot be added up, are left out."""
        total = _copy(self._sums)
        total["steps"] = len(self.steps)
        total["uncertainty"] = {"mean": self._u_sum / self._u_count, "count": self._u_count} if self._u_count else None
        if "overlap" in total:
            total["overlap"]["fraction"] = _ratio(total["overlap"]["hidden_s"], total["overlap"]["judge_s"])
        for usage in _usages(total):
            usage["cost"] = known_cost(
                usage["cost"],
                calls=usage["calls"],
                unpriced=usage["unpriced_calls"],
                work=usage["attempts"] + usage["prompt_tokens"],
            )
            usage["latency_s"] = merge_latencies(usage["latency_s"])
        return total

    def _count(self, summary: Mapping[str, Any], step: int) -> None:
        try:
            figures = StepAccount.of(step, summary)
            u = summary["uncertainty"]
            mean, count = (0.0, 0) if u is None else (float(u["mean"]), int(u["count"]))
            failures, judges = dict(summary["judge_failures"]), dict(summary["judges"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reject("summary", f"something without {error}", "what GroupScores.summary() returns")
        apart = ("uncertainty", "step", "judge_failures", "judges")
        _add(self._sums, {key: value for key, value in summary.items() if key not in apart})
        _add_named(self._sums.setdefault("judge_failures", {}), failures)
        _add_named(self._sums.setdefault("judges", {}), judges)
        self._u_sum, self._u_count = self._u_sum + mean * count, self._u_count + count
        self.steps.append(figures)

    def _read(self, path: Path) -> tuple[int, int]:
        """Count what is there; → bytes of whole lines, and of a last line that was cut short."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.warning("%s: the last line is cut short and is left out", path.name)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._count(record, int(record["step"]))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(f"no summary: {error}"[:300], source=path.name, line=number) from None
        return whole, len(content) - whole


def account_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``Accounts.totals()``, or one summary, as (what, figures) lines for people to read."""
    by = totals.get("decided_by")
    if by is None:
        return [("scored", "nothing")]
    scored = f"{totals['groups']:,} groups, {totals['pairs']:,} pairs"
    decided = f"the head {by['head']:,}, the judge {by['judge']:,}, by rule {totals['rule_verdicts']:,}"
    lines = [("scored", scored), ("decided by", decided)]
    if by["judge_failed"]:
        reasons = sorted(totals["judge_failures"].items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{reason} {count:,}" for reason, count in reasons[:5])
        lines.append(("no verdict", f"{by['judge_failed']:,} ({shown}{', ...' if len(reasons) > 5 else ''})"))
    silent = {name: count for name, count in totals.get("no_signal", {}).items() if count}
    if silent:
        shown = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in silent.items())
        lines.append(
            ("no signal", f"{sum(silent.values()):,} pairs ({shown}), of which nobody decided {by['nobody']:,}")
        )
    usage, overlap = totals["judge_usage"], totals["overlap"]
    if totals["routed"]:
        cut = totals.get("judge_cut", 0)
        notes = f", {cut:,} of texts cut to the judge's context" if cut else ""
        lines.append(("verdicts", f"{totals['judge_flips']:,} flips, {totals['judge_ties']:,} ties{notes}"))
    if usage["calls"] or usage["cache_hits"]:
        counts = f"{usage['calls']:,}, {usage['retries']:,} retries, {usage['cache_hits']:,} cache hits"
        lines.append(("judge calls", counts))
        lines.append(("tokens", _token_line(usage)))
        lines.append(("cost", _cost_line(usage)))
    if usage["latency_s"] is not None:
        latency = usage["latency_s"]
        lines.append(("latency", f"p50 {latency['p50']:.2f} s, p95 {latency['p95']:.2f} s, max {latency['max']:.2f} s"))
    if overlap["judge_s"]:
        hidden = f"{overlap['judge_s']:.1f} s, of which {overlap['hidden_s']:.1f} s"
        lines.append(("judge time", f"{hidden} ({100 * overlap['fraction']:.0f}%) hidden behind the backbone"))
    lines.append(("wall time", f"{totals['seconds'].get('total', 0.0):.1f} s"))
    return lines


def _token_line(usage: Mapping[str, Any]) -> str:
    return (
        f"{usage['prompt_tokens']:,} prompt ({usage['cached_tokens']:,} cached), "
        f"{usage['completion_tokens']:,} completion ({usage['reasoning_tokens']:,} reasoning)"
    )


def _cost_line(usage: Mapping[str, Any]) -> str:
    if usage["cost"] is None:
        return f"unknown: no price for {usage['unpriced_calls']:,} calls" if usage["unpriced_calls"] else "unknown"
    missing = f", without {usage['unpriced_calls']:,} calls that have no price" if usage["unpriced_calls"] else ""
    return f"{usage['cost']:,.6g}{missing}"


_NAMES, _OTHERS = 64, "(others)"
_DERIVED = ("fraction", "p50", "p95")


def _add(into: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add numbers under equal keys, at any depth. Texts are left out, and what follows from sums is left to them."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            _add(into.setdefault(key, {}), value)
        elif key == "latency_s":  # None: no calls
            into.setdefault(key, {})
        elif key == "cost":  # None: not known, which the count of unpriced calls tells
            into[key] = into.get(key, 0.0) + (value or 0.0)
        elif key == "max":
            into[key] = max(into.get(key, value), value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in _DERIVED:
            into[key] = into.get(key, 0) + value


def _add_named(into: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add counts under names that come from judges; past a number of different ones they are counted together."""
    for name, value in part.items():
        key = name if name in into or len(into) < _NAMES else _OTHERS
        if isinstance(value, Mapping):
            _add(into.setdefault(key, {}), value)
        else:
            into[key] = into.get(key, 0) + value


def _usages(total: Mapping[str, Any]) -> list[dict[str, Any]]:
    own = [total["judge_usage"]] if "judge_usage" in total else []
    return own + [judge["usage"] for judge in total.get("judges", {}).values()]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
