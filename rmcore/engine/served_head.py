"""Which head an engine serves: how it learns and goes back, and what of it and its router a restart must not lose."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import reject
from rmcore.engine.groups import GroupScores
from rmcore.engine.learning import UpdateReport, VerdictLearner
from rmcore.engine.learning.learner import check_same_features
from rmcore.engine.routing import Router
from rmcore.engine.routing.state import write_state
from rmcore.engine.state import engine_state, load_engine_file, load_engine_state
from rmcore.head.estimators import PairEstimator
from rmcore.head.frozen import FrozenHead
from rmcore.model.reward_model import RewardModel

__all__ = ["ServedHead"]


class ServedHead:
    """What of a :class:`~rmcore.engine.engine.RewardEngine` changes while it serves; these are its methods."""

    if TYPE_CHECKING:
        model: RewardModel | None
        head: FrozenHead
        head_version: int | None
        router: Router
        learner: VerdictLearner | None
        estimator: PairEstimator | None
        _publishing: threading.Lock

    # -- learning ----------------------------------------------------------------------------------------------------

    def update(self, scores: GroupScores) -> UpdateReport:
        """Learn from the verdicts of a scored batch (:class:`~rmcore.engine.learning.VerdictLearner`).

        The next score call uses the new head, as do ``model`` and what it saves; calls under way finish with theirs.

        Raises InputError for an engine without a learner; otherwise as the learner's ``learn``.
        """
        learner = self._checked_learner()
        report = learner.update(scores)
        self._serve_head_of(learner)
        return report

    def revert(self, version: int) -> None:
        """Serve an earlier (or later) version of the head again, bit for bit. Raises as the learner's ``revert``."""
        learner = self._checked_learner()
        learner.revert(version)
        self._serve_head_of(learner)

    def serve_head(self, head: FrozenHead, version: int) -> None:
        """Serve a version that somebody else has learned (:func:`rmcore.engine.learning.read_version`).

        The next score call uses it, and its results say ``version``; calls under way finish with theirs.

        Raises InputError for an engine that learns itself, one whose uncertainty is not the head's, and for a head with
        other features.
        """
        if self.learner is not None:
            reject("head", "one for an engine with a learner", "an engine without: there is one writer")
        if self.estimator is not None:
            reject("head", f"one for an engine whose uncertainty is {self.estimator.name!r}", "the head's own")
        check_same_features(head, self.head)
        with self._publishing:
            self._publish(head, version)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a restart must not lose, as JSON values: the router's state, budgets included, and which head this is.

        With a learner the state names the head's version; the head itself lies in the learner's journal. What is in
        flight counts as spent.
        """
        return engine_state(self)

    def load_state_dict(self, state: object) -> None:
        """Go on from a state of :meth:`state_dict`: a router made alike, the same head; a learner goes to its version.

        Raises:
            CheckpointError: damaged, or of another router, head or journal, named. Nothing is changed.
            InputError: reservations are in flight.
        """
        load_engine_state(self, state)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to a JSON file, whole or not at all."""
        write_state(path, engine_state(self))

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file of :meth:`save_state`. Raises as :meth:`load_state_dict`, naming the file."""
        load_engine_file(self, path)

    def _checked_learner(self) -> VerdictLearner:
        if self.learner is None:
            reject("learner", "None", "a VerdictLearner, given when the engine was made")
        return self.learner

    def _serve_head_of(self, learner: VerdictLearner) -> None:
        with self._publishing:  # of two updates at once, the one that publishes last must not publish the older head
            self._publish(*learner.current)

    def _publish(self, head: FrozenHead, version: int) -> None:
        self.head, self.head_version = head, version
        if self.model is not None:
            self.model.head = head
