"""A clock and costs for tests of budgets."""

from __future__ import annotations

from rmcore.judge.base import JudgeUsage

__all__ = ["usage"]


def usage(unit: str, amount: float, calls: int = 1) -> JudgeUsage:
    if unit == "tokens":
        return JudgeUsage(calls=calls, prompt_tokens=int(amount) - int(amount) // 3, completion_tokens=int(amount) // 3)
    return JudgeUsage(calls=int(amount)) if unit == "calls" else JudgeUsage(calls=calls, cost=amount)
