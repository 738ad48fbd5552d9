"""Whether a judge's labels helped: a weight chosen on some of people's pairs, its worth measured on others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rmcore.evaluation.report import Estimate
from rmcore.evaluation.statistics import Interval, mean_with_interval
from rmcore.model.ai_weight import HeldOutLosses

__all__ = ["AIWeightReport", "WeightTrial", "ai_weight_report"]


@dataclass(frozen=True)
class WeightTrial:
    """A weight, and what heads that counted the judge's pairs so said of people's pairs left out."""

    weight: float
    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class AIWeightReport:
    """The choice of a weight for a judge's labels.

    Attributes:
        human, ai: pairs of people and of the judge.
        weight: the one with the least loss on people's pairs left out.
        trials: all of them.
        gain: nats a pair that the judge's labels save on people's pairs, each fold's at the weight that the *other*
            folds choose, so that choosing is not counted as gaining.
        accuracy_gain: the same in share of pairs ordered as people do.
    """

    human: int
    ai: int
    weight: float
    trials: tuple[WeightTrial, ...]
    gain: Estimate
    accuracy_gain: Estimate

    @property
    def helped(self) -> str:
        """``yes`` or ``no`` where the interval of the gain is on one side of 0, else ``undecided``."""
        if self.gain.low > 0:
            return "yes"
        return "no" if self.gain.high < 0 or self.weight == 0 else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"helped": self.helped}

    def to_markdown(self) -> str:
        """A table and a sentence."""
        rows = [f"| {t.weight:g} | {t.loss:.4f} | {100 * t.accuracy:.1f} |" for t in self.trials]
        said = {"yes": "The judge's labels help", "no": "The judge's labels do not help"}.get(
            self.helped, "Whether the judge's labels help cannot be told from so many pairs"
        )
        g, a = self.gain, self.accuracy_gain
        return "\n".join(
            [
                "| weight of a judge's pair | log loss on people's pairs left out | accuracy, % |\n|---|---|---|\n"
                + "\n".join(rows),
                "",
                f"{said}: {self.ai} of them beside {self.human} of people's, at weight {self.weight:g}. Log loss "
                f"falls by {g.point:+.4f} [{g.low:+.4f}, {g.high:+.4f}] nats a pair, accuracy changes by "
                f"{100 * a.point:+.1f} [{100 * a.low:+.1f}, {100 * a.high:+.1f}] points, each fold at the weight that "
                "the others choose.",
                "",
            ]
        )


def ai_weight_report(
    held: HeldOutLosses, prompts: Sequence[Hashable], ai: int, *, replicates: int = 1000, seed: int = 0
) -> AIWeightReport:
    """Choose a weight, and measure what choosing one gains.

    Args:
        held: as :func:`rmcore.model.ai_weight.held_out_losses` found it.
        prompts: of people's pairs; intervals resample them.
        ai: how many pairs the judge labelled.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    loss, right, fold = held.loss.numpy(), held.right.numpy(), held.fold.numpy()
    best = int(loss.mean(axis=1).argmin())
    chosen = np.zeros(len(fold), dtype=np.int64)
    for k in np.unique(fold):
        chosen[fold == k] = loss[:, fold != k].mean(axis=1).argmin()
    each = np.arange(len(fold))
    numbers = {key: n for n, key in enumerate(dict.fromkeys(prompts))}
    cluster = np.array([numbers[key] for key in prompts])
    decided = ~np.isnan(right[0])
    gained = (right[chosen, each] - right[0])[decided]
    of_decided = np.unique(cluster[decided], return_inverse=True)[1]
    return AIWeightReport(
        human=len(fold),
        ai=ai,
        weight=held.weights[best],
        trials=tuple(
            WeightTrial(w, float(loss[n].mean()), float(right[n][decided].mean())) for n, w in enumerate(held.weights)
        ),
        gain=mean_with_interval(loss[0] - loss[chosen, each], Interval(cluster, replicates, 0.95, seed)),
        accuracy_gain=mean_with_interval(gained, Interval(of_decided, replicates, 0.95, seed)),
    )
