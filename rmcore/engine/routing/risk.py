"""A router with a guarantee: the error rate among the pairs it leaves to the head is at most α, with confidence 1 − δ.

The threshold is calibrated from labelled pairs (:meth:`RiskControlledRouter.calibrate`) or from the judge's own
verdicts: until enough are known every pair is routed, and each verdict is a calibration pair. Afterwards a small random
share of all pairs, *audits*, goes to the judge whatever its score. They tell whether the guarantee still holds; two
tests that are wrong with a stated probability (:mod:`rmcore.engine.routing.shift`) watch for a stream that has moved.
When one speaks, the router says so, routes everything, and calibrates anew from what the judge then says.

"Wrong" is against whoever gave the labels or verdicts: with a judge's, the head disagrees with the judge.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.engine.routing.recent import Floats
from rmcore.engine.routing.risk_bounds import (
    RiskMethod,
    RiskThreshold,
    check_risk,
    least_pairs,
    one_per_cluster,
    risk_threshold,
)
from rmcore.engine.routing.routers import (
    Candidates,
    PairScore,
    RankBy,
    check_threshold_score,
    rank_score,
    score_name,
)
from rmcore.engine.routing.shift import ErrorExcess, ScoreShift
from rmcore.engine.routing.state import generator_of, plain

__all__ = ["RiskControlledRouter"]

log = logging.getLogger(__name__)

_FORMAT, _VERSION = "rmcore-risk-router", 1
_SCORES_KEPT = 4096
"""Calibration scores that the test of a shift compares with: quantiles of them, where there are more."""
_SAMPLE = 16384
"""Verdicts kept for the next calibration, the latest."""
_PENDING = 4096
"""Choices whose outcome nobody has told; beyond that the oldest are forgotten, and so are their audits."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a choice was made with, until its outcome is known."""

    candidates: Candidates
    score: Floats
    epoch: int
    audits: npt.NDArray[np.bool_]
    everything: bool


class RiskControlledRouter:
    """Routes the fewest pairs under which the error rate among the others is ≤ ``alpha``, with probability ≥ 1 − δ.

    Args:
        alpha: the error rate that is allowed among the pairs the head decides.
        delta: how often a calibration may fail to hold it. Online, the calibrations of one stretch share it: the first
            has δ/2, the next, at twice the verdicts, δ/4, and so on.
        by: the score pairs are routed by; any but ``rank_sum``, which has no scale. A
            :class:`~rmcore.engine.routing.learned_score.LearnedScore` is taken as it is and learns no more here: a
            threshold is for the scores it was calibrated on.
        method: :data:`~rmcore.engine.routing.risk_bounds.RiskMethod`.
        audit: share of all pairs that goes to the judge whatever its score. 0: none, and only a shift of the scores can
            be noticed then.
        alarm: probability that one stretch without any change is taken for a change, over its whole length.
        seed: of the draws.

    Raises:
        InputError: an argument is not as described.

    Several pairs of one prompt are not independent: where the candidates have a column ``group`` (the engine gives it)
    one pair of each group counts.
    """

    whole_batch: ClassVar[bool] = False

    def __init__(
        self,
        alpha: float,
        delta: float = 0.1,
        *,
        by: RankBy | PairScore = "u",
        method: RiskMethod = "fixed-sequence",
        audit: float = 0.05,
        alarm: float = 0.01,
        seed: int = 0,
    ) -> None:
        check_risk(alpha, delta, method)
        check_threshold_score(by)
        if not 0 <= audit < 1:
            reject("audit", audit, "a share in [0, 1)")
        if not 0 < alarm < 1:
            reject("alarm", alarm, "a probability strictly between 0 and 1")
        self.alpha, self.delta, self.by, self.method, self.audit, self.alarm = alpha, delta, by, method, audit, alarm
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._lock = threading.Lock()
        self._pending: OrderedDict[int, _Choice] = OrderedDict()
        self._epoch = 0
        self._alarms: list[str] = []
        self._seen = self._routed = 0
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of the stream: route everything."""
        self._found: RiskThreshold | None = None
        self._sample = np.empty((0, 2))
        self._unanswered = 0
        self._attempts = 0
        self._shift: ScoreShift | None = None
        self._excess = ErrorExcess(self.alpha, self.alarm / 2)

    @property
    def sketch(self) -> Tensor | None:
        """Training rows, where the score wants distances to them."""
        return getattr(self.by, "sketch", None)

    # -- calibration -------------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """Pairs with a score above it are routed; -inf while nothing is calibrated."""
        return -math.inf if self._found is None else self._found.threshold

    def calibrate(self, candidates: Candidates, wrong: Tensor) -> RiskThreshold:
        """Set the threshold from pairs whose truth is known, and begin a new stretch.

        Args:
            candidates: of these pairs; with a column ``group``, one pair of each group is used.
            wrong: (Q,) bool: whether the head's answer is wrong. Leave ties out.

        Returns:
            What was found. If it keeps nothing, everything is routed and the verdicts calibrate.

        Raises:
            InputError: shapes differ, or values that are no truth.
        """
        if wrong.shape != (len(candidates),):
            reject("wrong", tuple(wrong.shape), f"({len(candidates)},), one value a pair")
        found = risk_threshold(
            self._score(candidates),
            wrong.cpu().numpy(),
            alpha=self.alpha,
            delta=self.delta,
            method=self.method,
            cluster=_groups(candidates),
        )
        with self._lock:
            self._epoch += 1
            self._forget()
            self._serve(found, self._score(candidates))
        return found

    def _serve(self, found: RiskThreshold, score: Floats) -> None:
        """Route by what was found, and watch the scores if that keeps anything."""
        self._found, before = found, self._shift
        if not found.kept:
            self._shift = None
            return
        known = np.sort(score[np.isfinite(score)])
        if len(known) > _SCORES_KEPT:
            known = known[np.linspace(0, len(known) - 1, _SCORES_KEPT).round().astype(np.intp)]
        self._shift = ScoreShift(known, self.alarm / 2)
        if before is not None:  # its blocks go on being counted: all of a stretch share one probability
            self._shift.waiting, self._shift.blocks = before.waiting, before.blocks

    def _calibrate_online(self) -> None:
        """Calibrate from the verdicts of this stretch whenever there are twice as many as the last time."""
        wanted = max(64, 4 * least_pairs(self.alpha, self.delta / 2, self.method)) << self._attempts
        if not wanted <= len(self._sample) or wanted > _SAMPLE:
            return
        self._attempts += 1
        score, wrong = self._sample.T
        level = self.delta / 2**self._attempts
        found = risk_threshold(score, wrong, alpha=self.alpha, delta=level, method=self.method)
        self._serve(found, score)
        log.info("calibrated on %d verdicts: %s", len(self._sample), found.reason or f"threshold {found.threshold:.6g}")

    # -- a router's verbs --------------------------------------------------------------------------------------------

    def select(self, candidates: Candidates) -> Tensor:
        """Pairs above the threshold, and the audits."""
        score = self._score(candidates)
        with self._lock:
            if self._shift is not None:
                rows = self._one_a_group(candidates, np.isfinite(score))
                if self._shift.add(score[rows]):
                    self._raise_alarm(
                        f"the scores have moved: p = {self._shift.least_p:.2g} in block {self._shift.blocks} "
                        "(Kolmogorov-Smirnov, against the calibration)"
                    )
            audits = self._random.random(len(score)) < self.audit
            everything = self.threshold == -math.inf
            chosen = audits | (score > self.threshold) | everything
            self._pending[id(candidates)] = _Choice(candidates, score, self._epoch, audits, everything)
            while len(self._pending) > _PENDING:
                self._pending.popitem(last=False)
            self._seen += len(score)
            self._routed += int(chosen.sum())
        return torch.from_numpy(chosen)

    def observe(self, candidates: Candidates, routed: Tensor, preference: Tensor) -> None:
        """Calibrate and test with the verdicts on a choice; see :class:`~rmcore.engine.routing.routers.VerdictRouter`.

        A tie says nothing of the head's sign and is left out. A pair without a verdict counts as wrong in a
        calibration, since the pairs that a judge fails on are not any pairs, and not at all in the tests.
        """
        verdict = preference.double().cpu().numpy()
        with self._lock:
            choice = self._pending.pop(id(candidates), None)
            if choice is None or choice.epoch != self._epoch:
                return  # of a stretch that is over
            usable = np.isfinite(choice.score) & (verdict != 0)
            rows = self._one_a_group(candidates, usable & (choice.audits | choice.everything))
            sign = np.sign(candidates.logit.double().cpu().numpy()[rows])
            unanswered = np.isnan(verdict[rows])
            wrong = unanswered | (sign != np.sign(verdict[rows]))
            self._unanswered += int(unanswered.sum())
            new = np.stack([choice.score[rows], wrong.astype(np.float64)], axis=1)
            self._sample = np.concatenate([self._sample, new])[-_SAMPLE:]
            if not choice.everything:
                kept = (choice.score[rows] <= self.threshold) & ~unanswered
                if self._excess.add(wrong[kept]):
                    rate = f"{self._excess.errors} of {self._excess.pairs} audited pairs were wrong"
                    self._raise_alarm(f"the error rate among kept pairs is above {self.alpha:g}: {rate}")
                    return
            self._calibrate_online()

    def _raise_alarm(self, why: str) -> None:
        self._alarms.append(f"after {self._seen} pairs: {why}")
        self._epoch += 1
        self._forget()
        log.warning("%s; the calibration does not hold, every pair is routed until there is a new one", why)

    def _score(self, candidates: Candidates) -> Floats:
        score: Floats = rank_score(candidates, self.by).cpu().numpy()
        return score

    def _one_a_group(self, candidates: Candidates, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
        rows = np.flatnonzero(mask)
        groups = _groups(candidates)
        return rows if groups is None else rows[one_per_cluster(groups[rows], self._random)]

    # -- what it has found -------------------------------------------------------------------------------------------

    def explain(self) -> dict[str, Any]:
        """What holds and why, JSON values.

        ``calibration`` (:meth:`RiskThreshold.to_dict`, None before the first), ``pairs`` and ``routed`` so far,
        ``verdicts`` of this stretch and how many of them were ``unanswered``, ``audited`` kept pairs and how many were
        wrong, ``shift`` (blocks tested and their least p), ``alarms`` so far in words, and ``why``: one sentence.
        """
        with self._lock:
            found = self._found
            shift = None if self._shift is None else {"blocks": self._shift.blocks, "least_p": self._shift.least_p}
            return {
                "why": self._why(),
                "calibration": None if found is None else found.to_dict(),
                "pairs": self._seen,
                "routed": self._routed,
                "verdicts": len(self._sample),
                "unanswered": self._unanswered,
                "audited": {"pairs": self._excess.pairs, "wrong": self._excess.errors},
                "shift": shift,
                "alarms": list(self._alarms),
            }

    def _why(self) -> str:
        found = self._found
        if found is None:
            return f"every pair is routed: nothing is calibrated, with {len(self._sample)} verdicts so far"
        if not found.kept:
            return f"every pair is routed: {found.reason}"
        share = f"{found.kept} of {found.pairs} calibration pairs are kept"
        name = score_name(self.by)
        return f"pairs with {name} above {found.threshold:.6g} are routed: {share}, and {found.guarantee}"

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as JSON values. Choices whose outcome is open are not in it."""
        with self._lock:
            found, shift = self._found, self._shift
            return {
                "format": _FORMAT,
                "version": _VERSION,
                "settings": self._settings(),
                "epoch": self._epoch,
                "alarms": list(self._alarms),
                "seen": self._seen,
                "routed": self._routed,
                "random": self._random.bit_generator.state,
                "found": None
                if found is None
                else {
                    "delta": found.delta,
                    "threshold": plain(found.threshold),
                    "pairs": found.pairs,
                    "kept": found.kept,
                    "errors": found.errors,
                    "bound": found.bound,
                    "reason": found.reason,
                },
                "sample": self._sample.tolist(),
                "unanswered": self._unanswered,
                "attempts": self._attempts,
                "shift": None
                if shift is None
                else {
                    "calibration": shift.calibration.tolist(),
                    "waiting": list(shift.waiting),
                    "blocks": shift.blocks,
                    "least_p": shift.least_p,
                },
                "excess": {
                    "wealth": list(self._excess.wealth),
                    "pairs": self._excess.pairs,
                    "errors": self._excess.errors,
                },
            }

    def load_state_dict(self, state: object) -> None:
        """Go on from a state, bit for bit; the router must have been made with the same arguments.

        Raises:
            CheckpointError: the state is damaged, or of a router with other arguments. Nothing is changed.
        """
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import RiskRouterState

        found = checked(RiskRouterState, state, "router")
        if found.settings.model_dump() != self._settings():
            refuse("router.settings", found.settings.model_dump(), f"{self._settings()}, as this router was made with")
        random = generator_of(found.random.model_dump(), "router.random")
        with self._lock:
            self._forget()
            self._pending.clear()
            self._random = random
            self._epoch, self._alarms = found.epoch, list(found.alarms)
            self._seen, self._routed = found.seen, found.routed
            self._sample = np.array(found.sample, dtype=np.float64).reshape(-1, 2)
            self._unanswered, self._attempts = found.unanswered, found.attempts
            if found.found is not None:
                values = found.found.model_dump() | {"alpha": self.alpha, "method": self.method}
                self._found = RiskThreshold(**values)
            if found.shift is not None:
                values = found.shift.model_dump()
                calibration = np.array(values.pop("calibration"), dtype=np.float64)
                self._shift = ScoreShift(calibration, self.alarm / 2, **values)
            self._excess = ErrorExcess(self.alpha, self.alarm / 2, **found.excess.model_dump())

    def _settings(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("alpha", "delta", "method", "audit", "alarm")}
        return {**plain, "by": score_name(self.by)}


def _groups(candidates: Candidates) -> npt.NDArray[np.int64] | None:
    group = candidates.columns.get("group")
    return None if group is None else group.cpu().numpy()
