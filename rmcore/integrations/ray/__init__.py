"""rmcore on Ray: bulk scoring with Ray Data, the group server on Ray Serve, one judge for all actors.

    Scorer          scores groups in ``Dataset.map_batches``; an actor loads the model once
    start_judge     one judge for all actors of a cluster: its limits and budgets, one store, one question in flight
    whole_groups    a dataset with a row a group, of one with a row a response
    score_in_order  what ``rmcore score --ray`` does: results in the order of the input, in its batches

Only what starts something on a cluster imports ray: ``pip install 'rmcore[ray]'``.
"""

from rmcore.integrations.ray.bulk import score_in_order
from rmcore.integrations.ray.cluster import connect
from rmcore.integrations.ray.judge import ActorJudge, SharedJudge, start_judge
from rmcore.integrations.ray.scorer import Scorer, whole_groups

__all__ = ["ActorJudge", "Scorer", "SharedJudge", "connect", "score_in_order", "start_judge", "whole_groups"]
