"""Judges: who decides the pairs that the reward model is unsure of.

:class:`~rmcore.judge.base.Judge` is the protocol; :class:`RecordedJudge` replays verdicts, :class:`ChatJudge` asks a
model over HTTP, :class:`ReplayServer` serves recorded verdicts over real HTTP. :class:`TieredJudge`,
:class:`CanaryJudge` and :class:`MonitoredJudge` are judges around judges. Importing this package imports no HTTP
library: what needs one is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore.judge.accept import Accept
from rmcore.judge.alarm import Alarm
from rmcore.judge.base import Judge, JudgeUsage, Message, Outcome, Pair, Prompt, Verdict
from rmcore.judge.breaker import BreakerPolicy
from rmcore.judge.canary import CanaryJudge
from rmcore.judge.canary_pairs import CANARY_ID, CANARY_KINDS, CanaryKind
from rmcore.judge.contain import checked_verdicts
from rmcore.judge.disagreement import DisagreementAlarm, MonitoredJudge
from rmcore.judge.keys import call_key, pair_key
from rmcore.judge.orders import Orders, combine_orders, exchanged
from rmcore.judge.prompt import JudgePrompt
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.retry import RetryPolicy
from rmcore.judge.tiers import Tier, TieredJudge
from rmcore.judge.verdict import Labels, Parsed, parse_verdict

if TYPE_CHECKING:
    from rmcore.judge.chat import ChatJudge
    from rmcore.judge.limits import RateLimits
    from rmcore.judge.prices import Price, PriceTable
    from rmcore.judge.replay import Fault, ReplayServer
    from rmcore.judge.store import StoreError, VerdictStore
    from rmcore.judge.sync import run_sync

__all__ = [
    "CANARY_ID",
    "CANARY_KINDS",
    "Accept",
    "Alarm",
    "BreakerPolicy",
    "CanaryJudge",
    "CanaryKind",
    "ChatJudge",
    "DisagreementAlarm",
    "Fault",
    "Judge",
    "JudgePrompt",
    "JudgeUsage",
    "Labels",
    "Message",
    "MonitoredJudge",
    "Orders",
    "Outcome",
    "Pair",
    "Parsed",
    "Price",
    "PriceTable",
    "Prompt",
    "RateLimits",
    "RecordedJudge",
    "ReplayServer",
    "RetryPolicy",
    "StoreError",
    "Tier",
    "TieredJudge",
    "Verdict",
    "VerdictStore",
    "call_key",
    "checked_verdicts",
    "combine_orders",
    "exchanged",
    "pair_key",
    "parse_verdict",
    "run_sync",
]

_LAZY = {
    "ChatJudge": "rmcore.judge.chat",
    "Fault": "rmcore.judge.replay",
    "Price": "rmcore.judge.prices",
    "PriceTable": "rmcore.judge.prices",
    "RateLimits": "rmcore.judge.limits",
    "ReplayServer": "rmcore.judge.replay",
    "StoreError": "rmcore.judge.store",
    "VerdictStore": "rmcore.judge.store",
    "run_sync": "rmcore.judge.sync",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
