"""Pairs as a trainer takes them: encoded once, or streamed; padded into batches, or packed without padding."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from rmcore._base.errors import InputError, reject
from rmcore.model.backbone import Backbone
from rmcore.model.data import Source, parse_preferences, read_preferences, read_rows
from rmcore.model.data.columns import map_columns
from rmcore.model.data.preferences import COLUMNS
from rmcore.model.reward_model import Preference, encode_pairs

__all__ = ["PairCollator", "PairDataset", "Row", "StreamedPairs", "TrainingPair", "pairs_of", "read_training_pairs"]

log = logging.getLogger(__name__)

_STREAM_CHUNK = 256

Row: TypeAlias = dict[str, Any]
"""One pair: ``ids`` of its two texts, ``content`` tokens of each, ``label``, ``margin``, ``weight``, more columns."""


@dataclass(frozen=True, slots=True)
class TrainingPair(Preference):
    """A preference with what a loss may want besides.

    Attributes:
        margin: by how much the chosen response's logit is to exceed the other's.
        weight: how much the pair counts; 2 is the pair twice.
        columns: numbers for a loss of your own, by name.
    """

    margin: float = 0.0
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_training_pairs(
    source: Source, columns: Mapping[str, str] | None = None, *, extra: Sequence[str] = ()
) -> Iterator[TrainingPair]:
    """Preferences (:func:`rmcore.model.data.read_preferences`) with their ``margin`` and ``weight`` columns.

    Args:
        source: a file, an ``hf://`` name, or rows.
        columns: other names, as ``read_preferences`` takes them.
        extra: columns of numbers to keep for a loss.

    Raises DataError for a row that is no preference, InputError for a margin or weight that is no number.
    """
    for row in read_rows(source):
        value = map_columns(row.value, columns or {}, COLUMNS)
        more = {name: value[name] for name in extra}
        margin, weight = (_number(value, name, default) for name, default in (("margin", 0.0), ("weight", 1.0)))
        for item in parse_preferences(value):
            yield TrainingPair(item.prompt, item.chosen, item.rejected, item.label, margin, weight, more)


def pairs_of(source: Source | Sequence[Preference]) -> list[Preference]:
    """The preferences of whatever a trainer is given: preferences, rows of a data set, a file's name."""
    if isinstance(source, (list, tuple)) and all(isinstance(item, Preference) for item in source):
        return list(source)
    names = getattr(source, "column_names", None) or ()
    if "margin" in names or "weight" in names:
        return list(read_training_pairs(source))  # type: ignore[arg-type]
    return list(read_preferences(source))  # type: ignore[arg-type]


class PairDataset(Dataset[Row]):
    """Pairs encoded up front: 4 bytes a token, and what carries no signal left out with a warning that counts it.

    Args:
        backbone: whose tokens they are.
        preferences: at least one pair that can be learned from.
        mode: ``difference`` or ``concat``, where each pair is encoded in both orders.

    Raises InputError as :func:`rmcore.model.reward_model.encode_pairs`.
    """

    def __init__(self, backbone: Backbone, preferences: Sequence[Preference], mode: str) -> None:
        if not preferences:
            reject("preferences", "an empty list", "at least one pair")
        kept, texts = encode_pairs(backbone, preferences, mode)
        self.mode = mode
        self.dropped = len(preferences) - len(kept)
        """Pairs that were left out."""
        self._rest: list[Row] = [_rest(preferences[k], f"preferences[{k}]") for k in kept]
        ids = [backbone.input_ids(text) for pair in texts for text in pair]
        self._content = [text.content_tokens for pair in texts for text in pair]
        self._ends = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        self._ids: npt.NDArray[np.int32] = np.fromiter(
            (token for text in ids for token in text), dtype=np.int32, count=int(self._ends[-1])
        )

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, index: int) -> Row:
        ends = self._ends[2 * index : 2 * index + 3]
        ids = [torch.from_numpy(self._ids[ends[k] : ends[k + 1]].astype(np.int64)) for k in range(2)]
        return {"ids": ids, "content": self._content[2 * index : 2 * index + 2], **self._rest[index]}

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return int(self._ends[-1])


class StreamedPairs(IterableDataset[Row]):
    """Pairs encoded as they come, for data that do not fit into memory; ``max_steps`` says when to stop.

    Args:
        backbone: whose tokens they are.
        preferences: a function that begins the stream anew, called once an epoch and worker.
        mode: the head's.

    Attributes:
        dropped: pairs without signal that were left out so far.
    """

    def __init__(self, backbone: Backbone, preferences: Callable[[], Iterable[Preference]], mode: str) -> None:
        self.backbone, self.preferences, self.mode = backbone, preferences, mode
        self.dropped = 0

    def __iter__(self) -> Iterator[Row]:
        worker = torch.utils.data.get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        chunk: list[Preference] = []
        for k, item in enumerate(self.preferences()):
            if k % parts == part:
                chunk.append(item)
            if len(chunk) == _STREAM_CHUNK:
                yield from self._encoded(chunk)
                chunk = []
        yield from self._encoded(chunk)

    def _encoded(self, chunk: list[Preference]) -> Iterator[Row]:
        if not chunk:
            return
        try:
            pairs = PairDataset(self.backbone, chunk, self.mode)
        except InputError as error:
            if "carry no signal" not in str(error):
                raise
            log.warning("%s", error)
            self.dropped += len(chunk)
            return
        self.dropped += pairs.dropped
        yield from (pairs[k] for k in range(len(pairs)))


@dataclass
class PairCollator:
    """Rows into a batch of B pairs, the texts of pair k in rows 2k and 2k + 1.

    ``input_ids`` and ``attention_mask`` (2B, T), padded to the right; without padding ``input_ids`` and
    ``position_ids`` (1, Σ T), and ``ends`` (2B,), one past each text's last token. ``content`` (2B,); ``labels``,
    ``margins`` and ``weights`` (B,) float32; further columns as tensors, under ``column_NAME``.
    """

    backbone: Backbone
    padding_free: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch of these rows."""
        texts = [ids for row in rows for ids in row["ids"]]
        batch = self._packed(texts) if self.padding_free else self._padded(texts)
        batch["content"] = torch.tensor([count for row in rows for count in row["content"]])
        for name in ("label", "margin", "weight"):
            batch[f"{name}s"] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        for name in rows[0]:
            if name.startswith("column_"):
                batch[name] = torch.stack([torch.as_tensor(row[name], dtype=torch.float32) for row in rows])
        return batch

    def _padded(self, texts: Sequence[Tensor]) -> dict[str, Tensor]:
        pad = getattr(self.backbone.tokenizer, "pad_token_id", None) or 0
        if self.backbone.rows is not None and pad >= self.backbone.rows:
            pad = 0  # padding is masked, so that any id will do that the model knows
        ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(text) for text in texts])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def _packed(self, texts: Sequence[Tensor]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(text) for text in texts])
        positions = torch.cat([torch.arange(len(text)) for text in texts])
        return {"input_ids": torch.cat(list(texts))[None], "position_ids": positions[None], "ends": lengths.cumsum(0)}


def _rest(item: Preference, name: str) -> Row:
    row: Row = {"label": float(item.label), "margin": 0.0, "weight": 1.0}
    if isinstance(item, TrainingPair):
        for what in ("margin", "weight"):
            value = getattr(item, what)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                reject(f"{name}.{what}", repr(value)[:40], "a finite number")
        if item.weight < 0:
            reject(f"{name}.weight", item.weight, "0 or more")
        row |= {"margin": float(item.margin), "weight": float(item.weight)}
        row |= {f"column_{key}": value for key, value in item.columns.items()}
    return row


def _number(value: Mapping[str, Any], name: str, default: float) -> float:
    found = value.get(name)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        reject(name, repr(found)[:40], "a number")
    return float(found)
