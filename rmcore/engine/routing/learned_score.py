"""P(the head is wrong about a pair), learned from the verdicts that are bought.

A Bayesian logistic regression on a handful of features (:data:`rmcore.model.error_prior.FEATURES`, and the caller's own
columns), by the library's own Newton step with what was known before as its prior: online Laplace, one step a batch of
verdicts. Several beginnings are kept side by side and weighed by how well each has foretold the verdicts so far, before
seeing them (prequential likelihood, Dawid 1984):

- ``broad``: uncertain, close and unlike pairs, and those where the longer response is preferred or not, all a little;
- ``u`` and ``margin``: what the paper routes by, and its mirror image;
- ``training``: what the head got wrong in its own training data (:class:`~rmcore.model.error_prior.ErrorPrior`), where
  the model has that. It is the best in distribution and fooled by adversarial streams, so it begins with less weight.

Each is kept twice, remembering all verdicts and forgetting them at 2% a verdict: on a stream that moves the second
foretells better, and leads.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.engine.routing.recent import Floats
from rmcore.engine.routing.routers import Candidates
from rmcore.head.ascent import learn
from rmcore.model.error_prior import FEATURES, ErrorPrior, error_features, prior_precision, with_product
from rmcore.ops import reference

__all__ = ["LearnedScore"]

log = logging.getLogger(__name__)

_FORMAT, _VERSION = "rmcore-learned-score", 1
_BEGINNINGS = {  # offset, then a weight a feature
    "broad": (-0.6, 0.35, -0.35, 0.2, 0.0, 0.0, 0.3),
    "u": (-0.6, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0),
    "margin": (-0.6, 0.0, -0.6, 0.0, 0.0, 0.0, 0.0),
}
_LOG_WEIGHTS = {"broad": 0.0, "u": -1.0, "margin": -1.0, "training": -2.0}
"""What each begins with."""
_FORGETTING = {1.0: 0.0, 0.98: -1.0}
"""Share of a verdict that is left after the next, and the log weight that a belief begins with."""
_OWN = len(FEATURES) - 1  # features that are measured; the last is a product of two of them
_SETTLED = 64
"""Pairs by which a feature is standardised that nobody has measured before."""


class LearnedScore:
    """What a router ranks by: the probability that the head is wrong, as learned so far.

    Args:
        prior: the model's, or None: then features are standardised by the first 64 pairs of the stream.
        columns: names of the caller's own columns of :class:`Candidates` to learn from.

    Give it to a router as ``by``; the router passes the verdicts on. Safe to use from several threads.
    """

    name = "learned"

    def __init__(self, prior: ErrorPrior | None = None, *, columns: Sequence[str] = ()) -> None:
        if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
            reject("columns", repr(columns), "a sequence of column names")
        self.prior = prior
        self.columns = tuple(columns)
        self._lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        prior, extra = self.prior, len(self.columns)
        width = 1 + len(FEATURES) + extra
        broad = prior_precision(width - 1).numpy()
        beginnings = {name: (np.array(weights), broad) for name, weights in _BEGINNINGS.items()}
        if prior is not None:
            precision = broad.copy()
            precision[: width - extra, : width - extra] = prior.precision.cpu().numpy()
            beginnings["training"] = (prior.mean.cpu().numpy(), precision)
        names = [(name, left) for left in _FORGETTING for name in beginnings]
        self._names = names
        self._left = np.array([left for _, left in names])
        self._begin_mean = np.stack([np.pad(beginnings[name][0], (0, extra)) for name, _ in names])
        self._begin_precision = np.stack([beginnings[name][1] for name, _ in names])
        self._mean, self._precision = self._begin_mean.copy(), self._begin_precision.copy()
        self._log_weight = np.array([_LOG_WEIGHTS[name] + _FORGETTING[left] for name, left in names])
        self._verdicts = self._overturned = 0
        self._weight = 0.0
        known = 0 if prior is None else _OWN
        self._moments = np.zeros((3, _OWN + extra))  # count, mean, squares about it
        if prior is not None:
            self._moments[0, :known] = _SETTLED
            self._moments[1, :known] = prior.center.cpu().numpy()
            self._moments[2, :known] = prior.scale.cpu().numpy() ** 2 * _SETTLED
        self._absent: tuple[str, ...] = ()
        self._covariance: Floats | None = None

    @property
    def sketch(self) -> Tensor | None:
        """(S, h) training rows, by which the engine makes the column ``distance``."""
        return None if self.prior is None else self.prior.sketch

    # -- the score ---------------------------------------------------------------------------------------------------

    def __call__(self, candidates: Candidates) -> Tensor:
        """(Q,) float64, P(the head is wrong); Inf for pairs of which nothing is known (u = Inf)."""
        with self._lock:
            raw = self._raw(candidates)
            known = candidates.uncertainty.isfinite().cpu().numpy()
            self._measure(raw[known])
            score = self._foretell(self._inputs(raw)) @ _shares(self._log_weight)
        return torch.from_numpy(np.where(known, score, math.inf))

    def _raw(self, candidates: Candidates) -> Floats:
        g, v, u = candidates.logit, candidates.variance, candidates.uncertainty
        columns = candidates.columns
        absent = [name for name in ("distance", "log_length_ratio", *self.columns) if name not in columns]
        if tuple(absent) != self._absent:
            self._absent = tuple(absent)
            log.info("no column %s: those features are taken to be at their mean", ", ".join(absent) or "is missing")
        own = error_features(g, v, g.double() / u.double(), columns)
        nothing = torch.full((len(g),), math.nan, dtype=torch.float64)
        found = torch.cat([own, *(columns.get(name, nothing).double()[:, None] for name in self.columns)], 1)
        values: Floats = found.cpu().numpy()
        return values

    def _measure(self, raw: Floats) -> None:
        """Take the first pairs' values into the moments of features that have no standard yet (Chan et al. 1983)."""
        count, mean, squares = self._moments
        for k in np.flatnonzero(count < _SETTLED):
            new = raw[:, k][np.isfinite(raw[:, k])]
            if not len(new):
                continue
            n, step = len(new), new.mean() - mean[k]
            total = count[k] + n
            squares[k] += ((new - new.mean()) ** 2).sum() + step**2 * count[k] * n / total
            mean[k] += step * n / total
            count[k] = total

    def _inputs(self, raw: Floats) -> Floats:
        """(Q, features + 1) standardised, the offset's 1 first; a value that is not known is at its mean."""
        count, mean, squares = self._moments
        scale = np.sqrt(squares / np.maximum(count, 1))
        known = np.where(scale > 0, (raw - mean) / np.maximum(scale, 1e-12), 0.0)
        known = np.where(np.isfinite(known), known, 0.0).clip(-6, 6)
        return np.concatenate([np.ones((len(raw), 1)), with_product(known)], 1)

    def _foretell(self, inputs: Floats) -> Floats:
        """(Q, M) P(wrong) by each belief, its own uncertainty averaged over (mean field)."""
        if self._covariance is None:
            self._covariance = np.linalg.inv(self._precision)
        logit = inputs @ self._mean.T
        variance = ((inputs @ self._covariance) * inputs).sum(2).T
        u = np.sqrt(1 + reference.mean_field_amplitude() * variance)
        foretold: Floats = 1 / (1 + np.exp(-logit / u))  # |logit| ≤ a few hundred: features are at most 6
        return foretold

    # -- learning ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, candidates: Candidates, routed: Tensor, preference: Tensor) -> None:
        """Learn from the verdicts on a choice; see :class:`~rmcore.engine.routing.routers.VerdictRouter`.

        A verdict counts its magnitude: a soft one less than a plain one, a tie, or a flip with the order of the
        responses, nothing. Where the head has no preference there is nothing to be wrong about.
        """
        said = candidates.logit.double().sign()
        usable = routed & preference.isfinite() & (preference != 0) & (said != 0) & candidates.uncertainty.isfinite()
        if not bool(usable.any()):
            return
        with self._lock:
            inputs = self._inputs(self._raw(candidates[usable]))
            verdict = preference[usable].double().clamp(-1, 1)
            wrong = (said[usable] != verdict.sign()).double()
            self._learn(inputs, wrong.cpu().numpy(), verdict.abs().cpu().numpy())

    def _learn(self, inputs: Floats, wrong: Floats, weight: Floats) -> None:
        foretold = self._foretell(inputs).clip(1e-6, 1 - 1e-6)
        likelihood = np.log(np.where(wrong[:, None] == 1, foretold, 1 - foretold))
        log_weight = self._log_weight + weight @ likelihood
        self._log_weight = log_weight - np.logaddexp.reduce(log_weight)
        self._forget(float(weight.sum()))
        self._mean, self._precision = learn(self._mean, self._precision, inputs, wrong, weight, tolerance=1e-3)
        self._covariance = None
        self._verdicts += len(wrong)
        self._overturned += int(wrong.sum())
        self._weight += float(weight.sum())

    def _forget(self, weight: float) -> None:
        """Let beliefs fade towards where they began: precision and precision-weighted mean are averages of the two."""
        left = (self._left**weight)[:, None, None]
        precision = left * self._precision + (1 - left) * self._begin_precision
        pull = left * (self._precision @ self._mean[:, :, None])
        pull += (1 - left) * (self._begin_precision @ self._begin_mean[:, :, None])
        fading = left[:, 0, 0] < 1
        self._mean[fading] = np.linalg.solve(precision[fading], pull[fading])[:, :, 0]
        self._precision = precision

    # -- what it has learned -----------------------------------------------------------------------------------------

    def explain(self) -> dict[str, Any]:
        """What it goes by, JSON values.

        ``verdicts`` learned from and how many of them ``overturned`` the head; ``leading``, the belief with most
        weight, and ``beliefs``, all of them with their weights; ``weights`` of the leading one by feature, for one
        standard deviation of it, with 95% intervals; ``absent``, the columns that the last pairs came without.
        """
        with self._lock:
            weight = _shares(self._log_weight)
            lead = int(weight.argmax())
            spread = np.sqrt(np.linalg.inv(self._precision[lead]).diagonal())
            names = ("offset", *FEATURES, *self.columns)
            values = zip(names, self._mean[lead].tolist(), spread.tolist(), strict=True)
            return {
                "verdicts": self._verdicts,
                "overturned": self._overturned,
                "leading": self._names[lead][0],
                "beliefs": [
                    {"begins": name, "left_after_a_verdict": left, "weight": share}
                    for (name, left), share in zip(self._names, weight.tolist(), strict=True)
                ],
                "weights": {
                    name: {"mean": mean, "low": mean - 1.96 * sd, "high": mean + 1.96 * sd} for name, mean, sd in values
                },
                "absent": list(self._absent),
            }

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next score depends on but the model's prior, JSON values; a few kilobytes."""
        with self._lock:
            rows, columns = np.tril_indices(self._precision.shape[1])
            return {
                "format": _FORMAT,
                "version": _VERSION,
                "columns": list(self.columns),
                "beliefs": [[name, left] for name, left in self._names],
                "begin": self._digest(),
                "mean": self._mean.tolist(),
                "precision": self._precision[:, rows, columns].tolist(),
                "log_weight": self._log_weight.tolist(),
                "moments": self._moments.tolist(),
                "verdicts": self._verdicts,
                "overturned": self._overturned,
                "weight": self._weight,
            }

    def load_state_dict(self, state: object) -> None:
        """Go on from a state, bit for bit; the score must have been made with the same prior and columns.

        Raises:
            CheckpointError: the state is damaged, or of a score with another prior or other columns. Nothing is
                changed.
        """
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import LearnedScoreState

        found = checked(LearnedScoreState, state, "score")
        beliefs, width = self._mean.shape
        mine = {"columns": list(self.columns), "beliefs": [list(name) for name in self._names], "begin": self._digest()}
        for name, value in mine.items():
            theirs = getattr(found, name)
            theirs = [list(one) for one in theirs] if name == "beliefs" else theirs
            if theirs != value:
                refuse(f"score.{name}", theirs, f"{value}, as this score was made with")
        values = (found.mean, found.precision, found.log_weight, found.moments)
        if any(len({len(row) for row in rows}) > 1 for rows in (found.mean, found.precision, found.moments)):
            refuse("score", "rows of different lengths", "matrices")
        mean, packed, log_weight, moments = (np.array(value, dtype=np.float64) for value in values)
        shapes = [t.shape for t in (mean, packed, log_weight, moments)]
        expected = [(beliefs, width), (beliefs, width * (width + 1) // 2), (beliefs,), self._moments.shape]
        if shapes != expected:
            refuse("score", shapes, f"arrays of shapes {expected}")
        rows, columns = np.tril_indices(width)
        precision = np.zeros((beliefs, width, width))
        precision[:, rows, columns] = packed
        precision[:, columns, rows] = packed
        if bool((np.linalg.eigvalsh(precision) <= 0).any()) or bool((moments[::2] < 0).any()):
            refuse("score.precision", "a matrix that is not positive definite", "precisions and moments")
        with self._lock:
            self._mean, self._precision, self._log_weight, self._moments = mean, precision, log_weight, moments
            self._verdicts, self._overturned, self._weight = found.verdicts, found.overturned, found.weight
            self._covariance = None

    def _digest(self) -> str:
        """Of where the beliefs begin."""
        import hashlib

        parts = [self._begin_mean, self._begin_precision]
        parts += [] if self.prior is None else [self.prior.center.cpu().numpy(), self.prior.scale.cpu().numpy()]
        return hashlib.sha256(b"".join(values.tobytes() for values in parts)).hexdigest()


def _shares(log_weight: Floats) -> Floats:
    """Softmax."""
    weight = np.exp(log_weight - log_weight.max())
    shares: Floats = weight / weight.sum()
    return shares
