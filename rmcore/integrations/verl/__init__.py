"""verl (read from 0.9.1): rewards of whole groups from its reward loop, which hands out single samples.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=PairwiseRewardManager
    reward.reward_manager.module.path=pkg://rmcore.integrations.verl
    +reward.reward_kwargs.rmcore.url=http://127.0.0.1:8400
    algorithm.adv_estimator=rmcore

Each call goes to where the group's samples meet, waits there for its siblings (same ``uid``, ``session_id`` 0 to n−1)
and takes its own advantage back; the estimator ``rmcore`` hands that through. They meet at ``rmcore serve`` (``url``),
or in an actor of verl's own Ray cluster (``model``), whose judge is the generative reward model that verl serves behind
``reward_router_address``. :func:`compute_score` is for verl's own managers.

An error is raised, never turned into 0.0 (as verl's own ``rate_limited`` manager does). verl logs it; its synchronous
trainer then trains on the group's other samples, the asynchronous ones drop the group. The others' advantages are exact
all the same with ``rmcore``, since they were made from the whole group; ``rloo`` would take its baseline over what is
left.
"""

import sys

from rmcore.integrations.verl.estimator import ADVANTAGE_ESTIMATOR, passthrough_advantages, register
from rmcore.integrations.verl.function import compute_score
from rmcore.integrations.verl.manager import PairwiseRewardManager

__all__ = ["ADVANTAGE_ESTIMATOR", "PairwiseRewardManager", "compute_score", "passthrough_advantages", "register"]

if "verl" in sys.modules:  # verl's trainer imports this module to find the manager, and then looks for the estimator
    register()
