"""URM's first stage through the trainer (arXiv:2410.00847): the body learns several attributes' means and spread.

HelpSteer2 has two responses a prompt, each with labels, so a prompt is a pair: :func:`attribute_training_pairs` makes
them, with the labels in a column, and :class:`AttributeLoss` learns from both responses of each,

    −Σ_k log N(s_k; μ_k, σ_k),  μ_k and log σ_k from one linear layer (Eq. 4),

with ``preference`` times Bradley–Terry of the pair beside it, 0 as in the paper. The second stage, the gate, needs
frozen states alone: ``rmcore train --attributes`` on the body that this one leaves (examples/train_urm.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from rmcore._base.errors import reject
from rmcore._base.prompt import content_key
from rmcore.head.attributes.head import AttributeConfig, AttributeHead
from rmcore.head.attributes.losses import gaussian_nll_entries
from rmcore.integrations.training.dataset import TrainingPair
from rmcore.integrations.training.losses import PairBatch, bradley_terry
from rmcore.model.data.attributes import AttributeRow

__all__ = ["ATTRIBUTES", "AttributeLoss", "attribute_training_pairs"]

ATTRIBUTES = "attributes"
"""The column of :class:`~rmcore.integrations.training.losses.PairBatch` with labels (B, 2, A), NaN for none."""


def attribute_training_pairs(rows: Sequence[AttributeRow], by: int = 0) -> list[TrainingPair]:
    """Pairs of the responses of one prompt, the one with more of attribute number ``by`` preferred; ties are 0.5.

    Of more than two responses each one is in a pair with the next, the last alone with the first, so that labels count
    twice at most. Raises InputError where no prompt has two.
    """
    prompts: dict[Hashable, list[AttributeRow]] = {}
    for row in rows:
        prompts.setdefault(content_key(row.prompt), []).append(row)
    found: list[TrainingPair] = []
    for group in prompts.values():
        around = [(group[-1], group[0])] if len(group) > 2 else []
        for one, other in [*itertools.pairwise(group), *around]:
            labels = [one.labels, other.labels]
            a, b = one.labels[by], other.labels[by]
            better = 0.5 if a == b or math.isnan(a) or math.isnan(b) else float(a > b)
            found.append(TrainingPair(one.prompt, one.response, other.response, better, columns={ATTRIBUTES: labels}))
    if not found:
        reject("rows", f"{len(rows)} responses, no two of one prompt", "at least two of a prompt")
    return found


class AttributeLoss(nn.Module):
    """Eq. 4 over the labels of both responses of a pair, with ``preference`` times Bradley–Terry beside it.

    Args:
        hidden_size: of the backbone's states.
        names: of the attributes, in the labels' order.
        preference: share of the preference, 0 or more; with 0 the head beside it is fitted after training alone.
        seed: of the layer's start.
        state_scale: root mean square of the states' entries, for that start.

    Attributes:
        head: the layer, trained with the trainer's head. Its rows are what published URMs call the value head.

    A call raises InputError for a batch without the column :data:`ATTRIBUTES`, or of another shape.
    """

    def __init__(
        self,
        hidden_size: int,
        names: Sequence[str],
        *,
        preference: float = 0.0,
        seed: int = 0,
        state_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not (math.isfinite(preference) and preference >= 0):
            reject("preference", preference, "a finite number, 0 or more")
        self.preference = preference
        self.head = AttributeHead(AttributeConfig(hidden_size, tuple(names)), seed=seed, state_scale=state_scale)

    def forward(self, batch: PairBatch) -> Tensor:
        """(B,) losses."""
        count, names = len(batch.labels), self.head.config.names
        labels = batch.columns.get(ATTRIBUTES)
        if labels is None or labels.shape != (count, 2, len(names)):
            got = "no column" if labels is None else f"shape {tuple(labels.shape)}"
            reject(ATTRIBUTES, got, f"({count}, 2, {len(names)}) labels, NaN for none")
        mean, log_std = self.head.outputs(batch.states.flatten(0, 1)).unbind(-1)
        entries = gaussian_nll_entries(mean, log_std, labels.flatten(0, 1))
        losses = entries.view(count, 2, -1).sum(-1).mean(1)  # a pair's: the mean of its two responses'
        return losses if not self.preference else losses + self.preference * bradley_terry(batch)
