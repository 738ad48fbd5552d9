"""Learning from verdicts: judged pairs change the head, in versions that are journalled and can be taken back.

- ``learner``: keeps a head that learns, one version an update.
- ``online``: one step of online Laplace, which makes the next head out of the last one.
- ``judged``: judged pairs as rows with labels and weights.
- ``journal``: the versions on disk.
"""

from __future__ import annotations

from rmcore.engine.learning.learner import LearningConfig, UpdateReport, VerdictLearner, read_version

__all__ = ["LearningConfig", "UpdateReport", "VerdictLearner", "read_version"]
