"""Pooled states of pairs through a wrapped model: of a batch, and of a rank's block of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from rmcore._base.errors import BackendError
from rmcore.integrations.training.collator import SharedTexts
from rmcore.integrations.training.posterior import PairRows
from rmcore.model.backbone import Backbone
from rmcore.model.encoding.architecture import text_config
from rmcore.model.encoding.tree_attention import attending

__all__ = ["BatchStates", "block_rows"]


class BatchStates:
    """States of a batch's pairs, as :class:`~rmcore.integrations.training.collator.PairCollator` has put it together.

    Args:
        backbone: whose pooling rule it is.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._step: ExitStack | None = None

    def __call__(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """(B, 2, h) float32, through ``model`` (the backbone's, or what a trainer wraps it in), with their graph."""
        return self.pooled(self.tokens(model, inputs), inputs)

    def tokens(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """States of all tokens: (2B, T, h), or without padding or of a tree (1, ΣT, h)."""
        if "tree" in inputs:
            return self._along_tree(model, inputs["tree"])
        if "ends" not in inputs:
            return self.backbone.token_states(inputs["input_ids"], inputs["attention_mask"], through=model)
        given = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
        states: Tensor = model(**given).last_hidden_state
        return states

    def pooled(self, states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(B, 2, h) of what :meth:`tokens` gives."""
        if "tree" in inputs:
            tree: SharedTexts = inputs["tree"]
            rows = self.backbone.pool_tree(states, tree.pack, tree.texts)[tree.rows.to(states.device)]
        elif "ends" in inputs:
            rows = self._packed(states[0].float(), inputs["ends"])
        else:
            rows = self.backbone.pool(states, inputs["input_ids"], inputs["attention_mask"])
        rows = self.backbone.append_lengths(rows.float(), inputs["content"])
        return rows.view(-1, 2, rows.shape[1])

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward and backward pass of a batch: checkpointed layers attend in both."""
        with ExitStack() as stack:
            self._step = stack
            try:
                yield
            finally:
                self._step = None

    def _along_tree(self, model: Any, tree: SharedTexts) -> Tensor:
        with nullcontext(self._step) if self._step is not None else ExitStack() as stack:
            training = self._step is not None
            plan = stack.enter_context(attending(self.backbone.model, tree.pack, "sdpa", every_thread=training))
            states = self.backbone.tree_states(tree.pack, through=model)
        layers = self.backbone.config.layer or int(text_config(self.backbone.model).num_hidden_layers)
        if plan.calls < layers:
            raise BackendError(
                f"share_prefixes: got {plan.calls} of {layers} layers that call the attention function which "
                "transformers looks up, expected all. Leave it off with this model"
            )
        return states

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
