"""Judges: who decides the pairs that the reward model is unsure of.

:class:`~rmcore.judge.base.Judge` is the protocol; :class:`RecordedJudge` replays verdicts, :class:`ChatJudge` asks a
model over HTTP, :class:`ReplayServer` serves recorded verdicts over real HTTP. :class:`TieredJudge`,
:class:`CanaryJudge` and :class:`MonitoredJudge` are judges around judges. Importing this package imports no HTTP
library: what needs one is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy
from rmcore._base.client.breaker import BreakerPolicy
from rmcore._base.client.options import ClientOptions
from rmcore._base.prompt import Message, Prompt
from rmcore._base.retry import RetryPolicy
from rmcore.judge.base import Judge, JudgeUsage, Outcome, Pair, Verdict, checked_verdicts
from rmcore.judge.client.completions import (
    CompletionError,
    CompletionFunction,
    openai_completions,
    transformers_completions,
)
from rmcore.judge.keys import call_key, pair_key
from rmcore.judge.orders import Orders, combine_orders, exchanged
from rmcore.judge.question.prompt import JudgePrompt
from rmcore.judge.question.verdict import Labels, Parsed, parse_verdict
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.wrappers.alarm import Alarm
from rmcore.judge.wrappers.canary import CanaryJudge
from rmcore.judge.wrappers.canary_pairs import CANARY_ID, CANARY_KINDS, CanaryKind
from rmcore.judge.wrappers.disagreement import DisagreementAlarm, MonitoredJudge
from rmcore.judge.wrappers.tiers import Accept, Tier, TieredJudge

if TYPE_CHECKING:
    from rmcore._base.client.limits import RateLimits
    from rmcore._base.loop import run_sync
    from rmcore.judge.chat import ChatJudge
    from rmcore.judge.genrm import GenRMJudge
    from rmcore.judge.store.prices import Price, PriceTable
    from rmcore.judge.store.shared_limits import SharedLimits
    from rmcore.judge.store.store import StoreError, VerdictStore
    from rmcore.judge.testing import Fault, ReplayServer

__all__ = [
    "CANARY_ID",
    "CANARY_KINDS",
    "Accept",
    "Alarm",
    "BreakerPolicy",
    "CanaryJudge",
    "CanaryKind",
    "ChatJudge",
    "ClientOptions",
    "CompletionError",
    "CompletionFunction",
    "DisagreementAlarm",
    "Fault",
    "GenRMJudge",
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
    "SharedLimits",
    "StoreError",
    "Tier",
    "TieredJudge",
    "Verdict",
    "VerdictStore",
    "call_key",
    "checked_verdicts",
    "combine_orders",
    "exchanged",
    "openai_completions",
    "pair_key",
    "parse_verdict",
    "run_sync",
    "transformers_completions",
]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore._base.loop": ("run_sync",),
        "rmcore.judge.chat": ("ChatJudge",),
        "rmcore._base.client.limits": ("RateLimits",),
        "rmcore.judge.genrm": ("GenRMJudge",),
        "rmcore.judge.store.prices": ("Price", "PriceTable"),
        "rmcore.judge.store.shared_limits": ("SharedLimits",),
        "rmcore.judge.store.store": ("StoreError", "VerdictStore"),
        "rmcore.judge.testing": ("Fault", "ReplayServer"),
    },
)
