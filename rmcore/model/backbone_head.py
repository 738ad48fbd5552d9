"""What a backbone knows of the reward model whose body it is: its last layer, its family's rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore.model.backbone_config import BackboneConfig
from rmcore.model.families.load import Loaded
from rmcore.model.forward import ForwardPass
from rmcore.model.loading import FLOATS
from rmcore.model.text import EncodedText
from rmcore.ops.dispatch import Explanation
from rmcore.ops.reference import OrderMean

__all__ = ["BackboneHead"]


class BackboneHead:
    """Methods of a :class:`~rmcore.model.backbone.Backbone`, most of them about a published reward model."""

    if TYPE_CHECKING:
        config: BackboneConfig
        published: Loaded | None
        positions: int | None
        _pass: ForwardPass

    def scalar_head(self) -> tuple[Tensor, float]:
        """(weight (h,), bias) of a reward model's last linear layer, for :func:`rmcore.head.fit.upgrade`.

        ``weight · row + bias`` is the score, for rows as :meth:`hidden` gives them.
        """
        if self.published is not None:
            return self.published.head.linear_weights()
        if self._pass.final_linear is None:
            reject("kind", self.config.kind, "'classifier' or 'reward'")
        labels = 2 if self.config.family == "trl-two-labels" else 1
        if self._pass.final_linear.out_features != labels:
            reject("model", f"{self._pass.final_linear.out_features} labels", f"a reward model with {labels}")
        held, shape = self._pass.final_linear.weight, (labels, self._pass.final_linear.in_features)
        if held.dtype not in FLOATS or held.shape != shape:
            raise CheckpointError(
                f"backbone: got a head of {held.dtype} and shape {tuple(held.shape)}, expected {shape} as it is: "
                "quantise a body alone (llm_int8_skip_modules, modules_to_not_convert)"
            )
        weight = held.detach().double().mean(0).float()
        bias = self._pass.final_linear.bias
        return weight, 0.0 if bias is None else float(bias.detach().double().mean())

    @property
    def pairwise(self) -> bool:
        """Whether it is a reward model that scores a pair of responses, not a response: a row a pair (concat mode)."""
        return self.published is not None and self.published.pooler.family.pairwise

    @property
    def ranked(self) -> bool:
        """Whether its authors make a score a response of the pairs of a group (LLM-Blender's ``rank``)."""
        return self.published is not None and self.published.pooler.family.ranked

    @property
    def order_mean(self) -> OrderMean:
        """What its authors average over the two orders of a pair."""
        return "logits" if self.published is None else self.published.pooler.family.order_mean

    @property
    def tells_spread(self) -> bool:
        """Whether it is a published model that gives attributes with a spread (:meth:`hidden_and_attributes`)."""
        return self.published is not None and self.published.head.spec.attributes != "outputs"

    def explain_head(self, rows: int | None = None) -> Explanation:
        """Who computes a published model's gate and attributes for so many texts: a backend of
        :func:`rmcore.ops.score_attributes`, or ``module``, torch layer by layer; and why not others.
        """
        if self.published is None:
            return Explanation("none", {"score_attributes": "no published head behind the states"})
        return self.published.head.explain(rows)

    def input_ids(self, text: EncodedText) -> tuple[int, ...]:
        """The token ids of a text as the model gets them: with what its family ends every text with.

        Raises InputError for a text without a token that the family pools at.
        """
        if self.published is None:
            return text.ids
        ids = self.published.pooler.complete(text.ids)
        self.published.pooler.check(ids)
        return ids

    def _content_positions(self) -> int | None:
        extra = 0 if self.published is None else self.published.pooler.extra
        return None if self.positions is None else self.positions - extra
