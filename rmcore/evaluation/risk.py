"""What a bound on the error rate costs on labelled pairs, and how often it held when that was tried.

The pairs are cut in two by prompt, again and again: a threshold is calibrated on one half, and the error rate among
those pairs of the *other* half that it keeps is compared with α.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.engine.routing.risk_bounds import RiskMethod, RiskThreshold, risk_threshold
from rmcore.evaluation.report import Array, ScoredPairs
from rmcore.evaluation.statistics import correctness

__all__ = ["Resampling", "RiskReport", "evaluate_risk"]


@dataclass(frozen=True, slots=True)
class Resampling:
    """Halves tried.

    Attributes:
        times: how many.
        exceeded: share of them in which the error rate among kept pairs of the other half was above α.
        kept_any: share of them in which anything was kept.
        judged: share of the other half's pairs that was routed, in the mean.
        error: error rate among its kept pairs, in the mean over halves that kept any; NaN if none did.
    """

    times: int
    exceeded: float
    kept_any: float
    judged: float
    error: float


@dataclass(frozen=True, slots=True)
class RiskReport:
    """A threshold for each score that a router may route by, and what trying it on halves gave."""

    alpha: float
    delta: float
    error: float
    """Of the head alone, on all pairs."""
    thresholds: dict[str, RiskThreshold]
    resamplings: dict[str, Resampling]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None stands for what is not defined."""
        rows = {}
        for name, found in self.thresholds.items():
            tried = self.resamplings[name]
            rows[name] = found.to_dict() | {
                "resampling": {
                    "times": tried.times,
                    "exceeded": tried.exceeded,
                    "kept_any": tried.kept_any,
                    "judged": tried.judged,
                    "error": None if np.isnan(tried.error) else tried.error,
                }
            }
        return {"alpha": self.alpha, "delta": self.delta, "head_error": self.error, "scores": rows}

    def to_markdown(self) -> str:
        """One row a score, and the guarantee in words."""
        lines = [
            "| routed by | threshold | judged | errors among kept | bound | halves above α | judged there |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, found in self.thresholds.items():
            tried = self.resamplings[name]
            threshold = f"{found.threshold:.4g}" if found.kept else "routes all"
            errors = f"{found.errors} of {found.kept}" if found.kept else "–"
            bound = f"{found.bound:.3f}" if found.kept else "–"
            lines.append(
                f"| {name} | {threshold} | {100 * found.share_judged:.1f}% | {errors} | {bound} | "
                f"{100 * tried.exceeded:.1f}% of {tried.times} | {100 * tried.judged:.1f}% |"
            )
        found = next(iter(self.thresholds.values()))
        lines += [
            "",
            f"Guarantee: {found.guarantee}, for pairs drawn like these. The head alone errs on {self.error:.3f}.",
        ]
        lines += [f"By {name} every pair is routed: {f.reason}." for name, f in self.thresholds.items() if not f.kept]
        return "\n".join(lines) + "\n"


def evaluate_risk(
    pairs: ScoredPairs,
    *,
    alpha: float,
    delta: float = 0.1,
    method: RiskMethod = "fixed-sequence",
    times: int = 1000,
    seed: int = 0,
) -> RiskReport:
    """Calibrate on all decided pairs, one a prompt, and try it on ``times`` halves.

    Args:
        pairs: scored pairs with labels; ties are left out, and a logit of 0 counts as wrong.
        alpha: the error rate that is allowed among kept pairs.
        delta: how often a calibration may fail to hold it.
        method: which guarantee (:mod:`rmcore.engine.routing.risk_bounds`).
        times: halves to try.
        seed: of the halves, and of the pair that stands for its prompt.

    Raises:
        InputError: no decided pair, or a setting out of range.
    """
    if times < 1:
        reject("times", times, "at least 1")
    keep = pairs.decided()
    if not keep.any():
        reject("label", f"{len(pairs)} ties and nothing else", "at least one pair with label 0 or 1")
    logit = pairs.logit[keep]
    wrong = correctness(logit, pairs.label[keep]) != 1
    cluster = np.unique(pairs.cluster[keep], return_inverse=True)[1]
    scores = {"u": pairs.uncertainty[keep], "margin": -np.abs(pairs.served_logit[keep])}
    if pairs.novelty is not None:
        scores["novelty"] = pairs.novelty[keep]
    settings: dict[str, Any] = {"alpha": alpha, "delta": delta, "method": method}
    found = {
        name: risk_threshold(score, wrong, cluster=cluster, seed=seed, **settings) for name, score in scores.items()
    }
    tried = {name: _halves(score, wrong, cluster, times, seed, settings) for name, score in scores.items()}
    return RiskReport(alpha, delta, float(wrong.mean()), found, tried)


def _halves(
    score: Array, wrong: np.ndarray, cluster: np.ndarray, times: int, seed: int, settings: dict[str, Any]
) -> Resampling:
    random = np.random.default_rng(seed)
    prompts = int(cluster.max()) + 1
    exceeded = judged = 0.0
    errors = []
    for k in range(times):
        first = np.zeros(prompts, dtype=bool)
        first[random.permutation(prompts)[: prompts // 2]] = True
        inside = first[cluster]
        found = risk_threshold(score[inside], wrong[inside], cluster=cluster[inside], seed=k, **settings)
        kept = ~inside & (score <= found.threshold)
        outside = max(int((~inside).sum()), 1)
        judged += 1 - kept.sum() / outside
        if kept.any():
            errors.append(float(wrong[kept].mean()))
            exceeded += errors[-1] > settings["alpha"]
    mean = float(np.mean(errors)) if errors else float("nan")
    return Resampling(times, exceeded / times, len(errors) / times, judged / times, mean)
