"""``rmcore train --ai-labels``: a judge's pairs beside people's, at a weight that people's pairs choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rmcore._base.errors import reject
from rmcore._base.prompt import content_key

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rmcore.evaluation.ai_weight import AIWeightReport
    from rmcore.head.config import HeadConfig
    from rmcore.head.fit import FitReport
    from rmcore.head.frozen import FrozenHead
    from rmcore.model.ai_weight import EncodedPairs
    from rmcore.model.backbone import Backbone
    from rmcore.model.error_prior_fit import Fitted
    from rmcore.model.training_pairs import Preference

__all__ = ["Mixture", "encode_ai", "fit_mixture", "mix", "parse_weight"]


class Mixture(NamedTuple):
    """A judge's pairs beside people's, at a weight, and how that was found."""

    human: EncodedPairs
    ai: EncodedPairs
    weight: float
    report: AIWeightReport | None

    def fitted(self, config: HeadConfig) -> Fitted:
        """Makes the head of some of people's pairs and all of the judge's."""
        from rmcore.head.sngp import SNGPHead
        from rmcore.model.ai_weight import fit_mixed

        def make(hidden: Tensor, labels: Tensor, pairs: Tensor | None) -> FrozenHead:
            head = SNGPHead(config).to(hidden.device)
            return fit_mixed(head, (hidden, labels, pairs), self.ai, self.weight, max_passes=12)[0]

        return make


def parse_weight(text: str) -> float | None:
    """``--ai-weight``: a number above 0, or None for ``auto``."""
    if text == "auto":
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        reject("--ai-weight", repr(text)[:40], "auto or a number above 0")
    return weight


def encode_ai(
    spine: Backbone, given: Sequence[Preference], mode: str, progress: Callable[[str, int, int], None]
) -> EncodedPairs:
    """The pairs of a file that teach something, encoded, with their prompts."""
    from rmcore.model.ai_weight import EncodedPairs
    from rmcore.model.training_pairs import encode_preferences, informative

    kept = informative(spine, given, mode)
    encoded = encode_preferences(spine, [given[k] for k in kept], mode, progress=progress)
    return EncodedPairs(*encoded, [content_key(given[k].prompt) for k in kept])


def mix(config: HeadConfig, human: EncodedPairs, ai: EncodedPairs, weight: float | None, seed: int) -> Mixture:
    """Both together, at ``weight`` or at the one with the least loss on people's pairs left out."""
    from rmcore.evaluation.ai_weight import ai_weight_report
    from rmcore.model.ai_weight import held_out_losses

    report = None
    if weight is None:
        report = ai_weight_report(held_out_losses(config, human, ai, seed=seed), human.prompts, len(ai), seed=seed)
        weight = report.weight
    return Mixture(human, ai, weight, report)


def fit_mixture(config: HeadConfig, mixture: Mixture, dtype: torch.dtype | None) -> tuple[FrozenHead, FitReport]:
    """The head of both."""
    from rmcore.head.sngp import SNGPHead
    from rmcore.model.ai_weight import fit_mixed

    human = mixture.human
    head = SNGPHead(config).to(human.hidden.device)
    return fit_mixed(head, (human.hidden, human.labels, human.pairs), mixture.ai, mixture.weight, dtype=dtype)
