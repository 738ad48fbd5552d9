"""Judges: who decides the pairs that the reward model is unsure of.

:class:`~rmcore.judge.base.Judge` is the protocol; :class:`RecordedJudge` replays verdicts, :class:`ChatJudge` asks a
model over HTTP, :class:`ReplayServer` serves recorded verdicts over real HTTP. Importing this package imports no HTTP
library: what needs one is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore.judge.base import Judge, JudgeUsage, Message, Outcome, Pair, Prompt, Verdict
from rmcore.judge.keys import pair_key
from rmcore.judge.orders import Orders, combine_orders, exchanged
from rmcore.judge.prompt import JudgePrompt
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.retry import RetryPolicy
from rmcore.judge.verdict import Labels, Parsed, parse_verdict

if TYPE_CHECKING:
    from rmcore.judge.chat import ChatJudge
    from rmcore.judge.replay import Fault, ReplayServer
    from rmcore.judge.sync import run_sync

__all__ = [
    "ChatJudge",
    "Fault",
    "Judge",
    "JudgePrompt",
    "JudgeUsage",
    "Labels",
    "Message",
    "Orders",
    "Outcome",
    "Pair",
    "Parsed",
    "Prompt",
    "RecordedJudge",
    "ReplayServer",
    "RetryPolicy",
    "Verdict",
    "combine_orders",
    "exchanged",
    "pair_key",
    "parse_verdict",
    "run_sync",
]

_LAZY = {
    "ChatJudge": "rmcore.judge.chat",
    "Fault": "rmcore.judge.replay",
    "ReplayServer": "rmcore.judge.replay",
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
