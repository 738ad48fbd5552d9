"""Scores of a hand-made head, and what must hold of any."""

from __future__ import annotations

from rmcore import RewardEngine

__all__ = ["table_engine"]


def table_engine(hand_head, table_model, judge=None, router=None, **kwargs) -> RewardEngine:
    """Difference mode on "quality novelty" responses: "2 1" is hidden state (2, 1)."""
    model = table_model(hand_head([1.0, 0.0]), lambda _prompt, text: [float(x) for x in text.split()[:2]])
    return RewardEngine(model, judge, router, **kwargs)
