"""Groups in, preferences, uncertainties and advantages out.

- ``engine``: :class:`RewardEngine`; ``score_call`` is one call under way, ``steps`` and ``micro_batches`` what is
  done for it, ``overlap`` runs backbone and judge at once.
- ``pair_table``: all pairs of a call; ``groups`` shows them group by group; ``advantage`` turns them into rewards.
- ``judging``: the judge's questions of one call.
- ``routing``: which pairs go to the judge. ``learning``: the head learns from verdicts.
- ``selection``: best of n. ``usage``, ``accounts``: what the judges cost, a call and a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy

if TYPE_CHECKING:
    from rmcore.engine.engine import RewardEngine
    from rmcore.engine.group_score import GroupScore, PairDecision
    from rmcore.engine.groups import GroupScores

__all__ = ["GroupScore", "GroupScores", "PairDecision", "RewardEngine"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.engine.engine": ("RewardEngine",),
        "rmcore.engine.group_score": ("GroupScore", "PairDecision"),
        "rmcore.engine.groups": ("GroupScores",),
    },
)
