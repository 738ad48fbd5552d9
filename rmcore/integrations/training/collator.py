"""Batches of pairs: padded, in one row without padding, or as a tree whose shared beginnings are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.integrations.training.dataset import Row
from rmcore.model.backbone import Backbone
from rmcore.model.encoding.packing import Pack, PrefixTree
from rmcore.model.encoding.tree_attention import explain

__all__ = ["BatchForm", "PairCollator", "SharedTexts", "check_batch_form"]

BatchForm: TypeAlias = Literal["padded", "padding-free", "shared-prefix"]


@dataclass(frozen=True)
class SharedTexts:
    """A batch's distinct texts as one packed tree.

    Attributes:
        pack: all of them in one sequence.
        texts: ids of those the pack completes, in its order.
        rows: (2B,) which of them each text of the batch is.
    """

    pack: Pack
    texts: tuple[tuple[int, ...], ...]
    rows: Tensor


@dataclass
class PairCollator:
    """Rows into a batch of B pairs, the texts of pair k in rows 2k and 2k + 1.

    ``labels``, ``margins`` and ``weights`` (B,) float32; ``content`` (2B,); further columns as tensors, under
    ``column_NAME``; and, of T tokens,

    - padded: ``input_ids`` and ``attention_mask`` (2B, T), padded to the right;
    - padding-free: ``input_ids`` and ``position_ids`` (1, Σ T), and ``ends`` (2B,), one past each text's last token;
    - shared-prefix: ``input_ids`` (1, Σ T) and ``tree``, a :class:`SharedTexts`. Both orders of a pair share the
      prompt, and pairs of one prompt all that their texts begin with.

    With critiques ``critique``, as ``input_ids``: 1 where a token is a critique's own, and for what ends its turn.
    """

    backbone: Backbone
    form: BatchForm = "padded"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of these rows."""
        # First what has a row a pair: Trainer takes the first tensor's length for the batch's size.
        batch: dict[str, Any] = {
            f"{name}s": torch.tensor([row[name] for row in rows], dtype=torch.float32)
            for name in ("label", "margin", "weight")
        }
        for name in rows[0]:
            if name.startswith("column_"):
                batch[name] = torch.stack([torch.as_tensor(row[name], dtype=torch.float32) for row in rows])
        batch["content"] = torch.tensor([count for row in rows for count in row["content"]])
        texts = [ids for row in rows for ids in row["ids"]]
        if "critique" in rows[0]:
            batch["critique"] = self._own_tokens(texts, [start for row in rows for start in row["critique"]])
        forms = {"padded": self._padded, "padding-free": _packed, "shared-prefix": _shared}
        return batch | forms[self.form](texts)

    def _own_tokens(self, texts: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        own = [(torch.arange(len(text)) >= start).long() for text, start in zip(texts, starts, strict=True)]
        packed = self.form == "padding-free"
        return torch.cat(own)[None] if packed else torch.nn.utils.rnn.pad_sequence(own, batch_first=True)

    def _padded(self, texts: Sequence[Tensor]) -> dict[str, Any]:
        pad = getattr(self.backbone.tokenizer, "pad_token_id", None) or 0
        if self.backbone.rows is not None and pad >= self.backbone.rows:
            pad = 0  # padding is masked, so that any id will do that the model knows
        ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(text) for text in texts])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def _packed(texts: Sequence[Tensor]) -> dict[str, Any]:
    lengths = torch.tensor([len(text) for text in texts])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return {"input_ids": torch.cat(list(texts))[None], "position_ids": positions[None], "ends": lengths.cumsum(0)}


def _shared(texts: Sequence[Tensor]) -> dict[str, Any]:
    number: dict[tuple[int, ...], int] = {}
    which = [number.setdefault(tuple(text.tolist()), len(number)) for text in texts]
    distinct = list(number)
    tree = PrefixTree(distinct)
    (pack,) = tree.packs(max(tree.flat_tokens, 1))
    place = {text: k for k, text in enumerate(pack.texts)}
    own = tuple(distinct[text] for text in pack.texts)
    shared = SharedTexts(pack, own, torch.tensor([place[k] for k in which]))
    return {"input_ids": torch.from_numpy(pack.ids)[None], "tree": shared}


def check_batch_form(backbone: Backbone, form: BatchForm) -> None:
    """Raise InputError where this backbone's texts cannot be held so; called before adapters are put on it."""
    config = backbone.config
    if form == "padding-free" and (config.kind != "base" or config.layer is not None):
        reject("padding_free", True, "False, or a backbone of kind 'base' whose last layer is read")
    if form != "shared-prefix":
        return
    found = explain(backbone.model, "sdpa")
    if found.backend != "sdpa":
        reject("share_prefixes", True, f"False: {found.reasons['sdpa']}")
    dropout = getattr(backbone.model.config.get_text_config(), "attention_dropout", 0.0)
    if dropout:
        reject("share_prefixes", True, f"False, or attention_dropout 0 and not {dropout} in the model's configuration")
