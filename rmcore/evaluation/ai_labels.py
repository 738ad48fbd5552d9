"""What a judge's labels are worth: how it leans to a place, how sure it is, and whether people agree.

Everything is counted from :class:`~rmcore.judge.labelling.SoftLabel`; nothing here asks a judge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from rmcore._base.errors import reject
from rmcore.evaluation.confidence import brier_score
from rmcore.evaluation.plots.figure import BASELINE, COLOURS, MUTED, new_figure, plot_style, save_figure
from rmcore.evaluation.report import Array, Estimate, ReliabilityCurve
from rmcore.evaluation.statistics import (
    Interval,
    correctness,
    expected_calibration_error,
    mean_with_interval,
    reliability_curve,
)
from rmcore.judge.labelling import SoftLabel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HumanAgreement", "LabelReport", "PositionBias", "label_report", "plot_labels"]

_BINS = 10


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """How a judge leans to the response shown first, over the pairs with a label in both orders.

    Attributes:
        pairs: how many these are.
        first_shown: mean P(the response shown first is better) over both orders, less ½: 0 for a judge that does not
            care, ½ for one that always takes the first. Both orders are there, so which response is better cancels.
        conflicts: share of pairs whose orders prefer different responses.
        spread: mean |P in one order − P in the other|, of the same response.
    """

    pairs: int
    first_shown: Estimate
    conflicts: Estimate
    spread: float


@dataclass(frozen=True, kw_only=True)
class HumanAgreement:
    """Labels held against people's, over the pairs that people decided.

    Attributes:
        pairs: how many these are.
        accuracy: the response that P prefers is people's; ½ where P is ½.
        one_order: the same with the first response shown first only, on the pairs that have both orders: what the
            second call buys.
        log_loss: mean −log P(people's choice), nats; infinite where a hard label is wrong.
        brier, ece: of P; ECE over ten bins of equal mass.
        curve: accuracy against confidence.
    """

    pairs: int
    accuracy: Estimate
    one_order: Estimate | None
    log_loss: float
    brier: float
    ece: float
    curve: ReliabilityCurve


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """Labels of one run.

    Attributes:
        pairs: asked for.
        labelled: that have a label.
        even: labels of exactly ½.
        sure: labels above 0.95 or below 0.05.
        mean_entropy: of the labels, bits: 0 for hard ones, 1 for ½ throughout.
        refused: why others have none, and how many each.
        position: None where no pair has both orders.
        agreement: None where people decided none of the pairs.
    """

    pairs: int
    labelled: int
    even: int
    sure: int
    mean_entropy: float
    refused: dict[str, int]
    position: PositionBias | None
    agreement: HumanAgreement | None
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite is None."""
        found: dict[str, Any] = _plain(asdict(self))
        return found

    def to_markdown(self) -> str:
        """A paragraph for each part."""
        refused = ", ".join(f"{count} {reason}" for reason, count in self.refused.items()) or "none"
        lines = [
            f"{self.labelled} of {self.pairs} pairs have a label ({self.sure} of them beyond 0.95, {self.even} even, "
            f"mean entropy {_shown(self.mean_entropy, '.2f')} bits). Refused: {refused}."
        ]
        if self.position is not None:
            p = self.position
            lines.append(
                f"Position: P(shown first is better) is ½ {_points(p.first_shown)} points over {p.pairs} pairs in both "
                f"orders; the orders contradict each other in {_percent(p.conflicts)}% of them, and differ by "
                f"{p.spread:.2f} on average."
            )
        if self.agreement is not None:
            a = self.agreement
            one = "" if a.one_order is None else f" (one order alone: {_percent(a.one_order)}%)"
            lines.append(
                f"Agreement with people: {_percent(a.accuracy)}%{one} of {a.pairs} pairs; log loss "
                f"{_shown(a.log_loss, '.3f')}, Brier score {a.brier:.3f}, ECE {a.ece:.3f}."
            )
        return "\n\n".join(lines) + "\n"


def label_report(
    labels: Sequence[SoftLabel],
    prompts: Sequence[Hashable],
    human: Sequence[float | None] | None = None,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> LabelReport:
    """Count and measure labels.

    Args:
        labels: one a pair.
        prompts: which prompt each pair is of; intervals resample prompts.
        human: how probable people hold it that the first response is better, ``None`` where nobody said; above ½ is
            a win.
        replicates: of the bootstrap.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        InputError: the lengths differ, or there is no pair.
    """
    if not labels:
        reject("labels", "no pairs", "at least one")
    people: list[float | None] = [None] * len(labels) if human is None else list(human)
    if not len(labels) == len(prompts) == len(people):
        reject("labels, prompts, human", f"{len(labels)}, {len(prompts)} and {len(people)}", "one a pair each")
    numbers = {key: k for k, key in enumerate(dict.fromkeys(prompts))}
    cluster = np.array([numbers[key] for key in prompts])
    probability = np.array([np.nan if label.probability is None else label.probability for label in labels])
    known = probability[~np.isnan(probability)]
    refused = Counter(label.reason for label in labels if label.probability is None)

    def interval(rows: Any) -> Interval:
        return Interval(np.unique(cluster[rows], return_inverse=True)[1], replicates, level, seed)

    entropy = (special.entr(known) + special.entr(1 - known)) / math.log(2)
    return LabelReport(
        pairs=len(labels),
        labelled=len(known),
        even=int((known == 0.5).sum()),
        sure=int((np.abs(known - 0.5) > 0.45).sum()),
        mean_entropy=float(entropy.mean()) if len(known) else float("nan"),
        refused=dict(refused.most_common()),
        position=_position(labels, interval),
        agreement=_agreement(labels, probability, people, interval, level),
        level=level,
    )


def _position(labels: Sequence[SoftLabel], interval: Any) -> PositionBias | None:
    rows = [k for k, label in enumerate(labels) if label.forward is not None and label.backward is not None]
    if not rows:
        return None
    forward = np.array([labels[k].forward for k in rows], dtype=np.float64)
    backward = np.array([labels[k].backward for k in rows], dtype=np.float64)
    within = interval(rows)
    return PositionBias(
        pairs=len(rows),
        first_shown=mean_with_interval((forward + 1 - backward) / 2 - 0.5, within),
        conflicts=mean_with_interval(((forward - 0.5) * (backward - 0.5) < 0).astype(np.float64), within),
        spread=float(np.abs(forward - backward).mean()),
    )


def _agreement(
    labels: Sequence[SoftLabel], probability: Array, people: list[float | None], interval: Any, level: float
) -> HumanAgreement | None:
    rows = [k for k, said in enumerate(people) if said not in (None, 0.5) and not np.isnan(probability[k])]
    if not rows:
        return None
    truth = np.array([float(said > 0.5) for k in rows if (said := people[k]) is not None])
    p = probability[rows]
    both = [n for n, k in enumerate(rows) if labels[k].forward is not None and labels[k].backward is not None]
    one_order = None
    if both:
        forward = np.array([labels[rows[n]].forward for n in both], dtype=np.float64)
        one_order = mean_with_interval(correctness(forward - 0.5, truth[both]), interval([rows[n] for n in both]))
    with np.errstate(divide="ignore"):
        loss = -np.log(np.where(truth == 1, p, 1 - p))
    return HumanAgreement(
        pairs=len(rows),
        accuracy=mean_with_interval(correctness(p - 0.5, truth), interval(rows)),
        one_order=one_order,
        log_loss=float(loss.mean()),
        brier=brier_score(p, truth),
        ece=expected_calibration_error(p, truth, bins=_BINS),
        curve=reliability_curve(p, truth, bins=_BINS, level=level),
    )


def plot_labels(report: LabelReport, path: str | Path | None = None) -> Figure:
    """Accuracy of labels against their confidence: on the diagonal a label means what it says.

    Raises:
        InputError: the report has no people's labels to hold them against.
        PlotsUnavailableError: matplotlib is not installed.
    """
    if report.agreement is None:
        reject("report", "no labels of people", "some, to hold the judge's against")
    bins = report.agreement.curve
    with plot_style():
        figure = new_figure((5.4, 4.5))
        ax = figure.subplots()
        x, y = 100 * bins.confidence, 100 * bins.accuracy
        ax.plot((50, 100), (50, 100), **BASELINE)
        ax.vlines(x, 100 * bins.low, 100 * bins.high, color=COLOURS[0], linewidth=1.2, alpha=0.6)
        ax.plot(x, y, "o-", color=COLOURS[0], markersize=4.5, linewidth=1.2)
        floor = min(45.0, float(100 * min(bins.low.min(), bins.accuracy.min())) - 6)
        for at, count in zip(x, bins.count, strict=True):
            ax.text(at, floor + 1, f"{count}", ha="center", va="bottom", fontsize=7, color=MUTED)
        ax.set_ylim(floor, 104)
        ax.set_xlim(48.5, 101.5)
        gap = 100 * float(np.average(bins.confidence - bins.accuracy, weights=bins.count))
        how = f"{'over' if gap > 0 else 'under'}confident by {abs(gap):.1f} points"
        ax.set_title(f"{report.agreement.pairs} labels held against people's: {how}")
        ax.set_xlabel("confidence of the label, max(P, 1 − P), %  (small figures: pairs)")
        ax.set_ylabel(f"agrees with people, %  (bars: {100 * report.level:g}%)")
    return save_figure(figure, path) if path is not None else figure


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shown(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ("∞" if math.isinf(value) else "–")


def _percent(value: Estimate) -> str:
    bounds = "" if math.isnan(value.low) else f" [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{100 * value.point:.1f}{bounds}"


def _points(value: Estimate) -> str:
    bounds = "" if math.isnan(value.low) else f" [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    return f"{100 * value.point:+.1f}{bounds}"
