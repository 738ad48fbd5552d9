"""Pooled states of pairs through a wrapped model: of a batch, and of a rank's block of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from rmcore.integrations.training.posterior import PairRows
from rmcore.model.backbone import Backbone

__all__ = ["PairStates", "block_rows"]


class PairStates:
    """States of a batch's pairs, as :class:`~rmcore.integrations.training.dataset.PairCollator` has put it together.

    Args:
        backbone: whose pooling rule it is.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __call__(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """(B, 2, h) float32, through ``model`` (the backbone's, or what a trainer wraps it in), with their graph."""
        return self.pooled(self.tokens(model, inputs), inputs)

    def tokens(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """States of all tokens: (2B, T, h), or without padding (1, ΣT, h)."""
        if "ends" not in inputs:
            return self.backbone.token_states(inputs["input_ids"], inputs["attention_mask"], through=model)
        given = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
        states: Tensor = model(**given).last_hidden_state
        return states

    def pooled(self, states: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """(B, 2, h) of what :meth:`tokens` gives."""
        if "ends" in inputs:
            rows = self._packed(states[0].float(), inputs["ends"])
        else:
            rows = self.backbone.pool(states, inputs["input_ids"], inputs["attention_mask"])
        rows = self.backbone.append_lengths(rows.float(), inputs["content"])
        return rows.view(-1, 2, rows.shape[1])

    def _packed(self, states: Tensor, ends: Tensor) -> Tensor:
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        if self.backbone.config.pooling == "mean":
            lengths = (ends - starts).tolist()
            return torch.stack([part.mean(0) for part in states.split(lengths)])
        return states[starts if self.backbone.config.pooling == "first" else ends - 1]


def block_rows(
    states_of: Callable[[dict[str, Any]], Tensor],
    model: nn.Module,
    data: Any,
    *,
    rank: int,
    ranks: int,
    batch_pairs: int,
    collator: Callable[[Any], dict[str, Any]],
) -> PairRows:
    """States of this rank's block of ``data``, in its order, on the CPU, with the model in eval mode meanwhile.

    Every rank runs as many forward passes, since sharded layers are gathered in each: the last pair once more.
    """
    mine = range(len(data) * rank // ranks, len(data) * (rank + 1) // ranks)
    asked = [min(mine.start + k, len(data) - 1) for k in range(-(-len(data) // ranks))]
    loader = DataLoader(Subset(data, asked), batch_size=batch_pairs, collate_fn=collator)
    with _evaluating(model):
        parts = [(states_of(inputs).cpu(), inputs["labels"], inputs["weights"]) for inputs in loader]
    states, labels, weights = (torch.cat(part)[: len(mine)] for part in zip(*parts, strict=True))
    return PairRows(states, labels, weights)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
