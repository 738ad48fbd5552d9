"""Beside a benchmark's scores: is the model as sure as it is right, and does it go by length?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from rmcore._base.prompt import canonical_response, text_length
from rmcore.evaluation.benchmarks.item import half_point
from rmcore.evaluation.benchmarks.scoring import Answers
from rmcore.evaluation.confidence import brier_score
from rmcore.evaluation.statistics import expected_calibration_error, spearman

__all__ = ["Diagnostics", "diagnose"]


@dataclass(frozen=True)
class Diagnostics:
    """Over all pairs that count, each with the same weight; NaN where there is nothing to go by.

    Attributes:
        ece: expected calibration error of P = σ(margin / u), ten bins of equal mass.
        brier: mean squared error of P, 0.25 for a model that always says ½.
        length_correlation: Spearman's, of the margin with the difference in characters, each pair taken both ways
            round, so that it does not matter which response is written first.
        prefers_longer: share of pairs in which the model prefers the longer response; ½ for no preference. Pairs of
            equal length are left out.
        longer_is_better: share of the same pairs in which the longer response is the better one.
        order_conflicts: concat mode: share of pairs on which the two orders contradict each other. NaN in difference
            mode, which has no order.
        first_bias: concat mode: mean of what is added to the preference for the response shown first, in logits.
    """

    ece: float
    brier: float
    length_correlation: float
    prefers_longer: float
    longer_is_better: float
    order_conflicts: float = float("nan")
    first_bias: float = float("nan")

    def to_markdown(self) -> str:
        """One sentence on each."""

        def shown(value: float, form: str) -> str:
            return "-" if np.isnan(value) else format(value, form)

        longer, better = shown(100 * self.prefers_longer, ".1f"), shown(100 * self.longer_is_better, ".1f")
        return (
            f"Calibration: ECE {shown(self.ece, '.3f')}, Brier score {shown(self.brier, '.3f')}. Length: the margin's "
            f"rank correlation with the difference in length is {shown(self.length_correlation, '+.2f')}; the model "
            f"prefers the longer response in {longer}% of pairs, and it is the better one in {better}%."
            f"{self._position()}\n"
        )

    def _position(self) -> str:
        if np.isnan(self.order_conflicts):
            return ""
        return (
            f" Position: the two orders of a pair contradict each other in {100 * self.order_conflicts:.1f}%; being "
            f"shown first adds {self.first_bias:+.3f} to a preference in the mean."
        )


def diagnose(answers: Answers) -> Diagnostics:
    """The diagnostics of a model's answers to a benchmark."""
    margin = answers.margin
    probability = special.expit(np.where(np.isfinite(answers.uncertainty), margin / answers.uncertainty, 0.0))
    lengths = [
        [text_length(canonical_response(response)) for response in item.responses] for item in answers.pairs.items
    ]
    longer = np.array(
        [own[i] - own[j] for own, item in zip(lengths, answers.pairs.items, strict=True) for i, j in item.pairs],
        dtype=np.float64,
    )
    unequal = longer != 0
    if unequal.any():
        prefers = float(half_point(margin[unequal] * np.sign(longer[unequal])).mean())
        better = float((longer[unequal] > 0).mean())
    else:
        prefers = better = float("nan")
    conflicts = first_bias = float("nan")
    if answers.position_bias is not None and (known := np.isfinite(answers.position_bias)).any():
        bias, preference = answers.position_bias[known], (margin / answers.uncertainty)[known]
        conflicts, first_bias = float((np.abs(bias) > np.abs(preference)).mean()), float(bias.mean())
    return Diagnostics(
        ece=expected_calibration_error(probability, np.ones(len(margin))),
        brier=brier_score(probability, np.ones_like(probability)),
        length_correlation=spearman(np.concatenate([margin, -margin]), np.concatenate([longer, -longer])),
        prefers_longer=prefers,
        longer_is_better=better,
        order_conflicts=conflicts,
        first_bias=first_bias,
    )
