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
from rmcore.model.critiqued_data import critiqued_preferences, matched_states
from rmcore.model.critiques import critique_lead, shared_length
from rmcore.model.data import Source, parse_preferences, read_preferences, read_rows
from rmcore.model.data.columns import map_columns
from rmcore.model.data.preferences import COLUMNS
from rmcore.model.reward_model import Preference, encode_pairs
from rmcore.model.text import EncodedText

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
    source: Source,
    columns: Mapping[str, str] | None = None,
    *,
    extra: Sequence[str] = (),
    critiques: bool = False,
) -> Iterator[TrainingPair]:
    """Preferences (:func:`rmcore.model.data.read_preferences`) with their ``margin`` and ``weight`` columns.

    Args:
        source: a file, an ``hf://`` name, or rows.
        columns: other names, as ``read_preferences`` takes them.
        extra: columns of numbers to keep for a loss.
        critiques: read the responses' critiques too.

    Raises DataError for a row that is no preference, InputError for a margin or weight that is no number.
    """
    for row in read_rows(source):
        value = map_columns(row.value, columns or {}, COLUMNS)
        more = {name: value[name] for name in extra}
        margin, weight = (_number(value, name, default) for name, default in (("margin", 0.0), ("weight", 1.0)))
        for item in parse_preferences(value, critiques=critiques):
            given = (item.prompt, item.chosen, item.rejected, item.label)
            yield TrainingPair(*given, margin, weight, more, critiques=item.critiques)


def pairs_of(source: Source | Sequence[Preference], *, critiques: bool = False) -> list[Preference]:
    """The preferences of whatever a trainer is given: preferences, rows of a data set, a file's name."""
    if isinstance(source, (list, tuple)) and all(isinstance(item, Preference) for item in source):
        return list(source)
    names = getattr(source, "column_names", None) or ()
    if "margin" in names or "weight" in names:
        return list(read_training_pairs(source, critiques=critiques))  # type: ignore[arg-type]
    return list(read_preferences(source, critiques=critiques))  # type: ignore[arg-type]


class PairDataset(Dataset[Row]):
    """Pairs encoded up front: 4 bytes a token, and what carries no signal left out with a warning that counts it.

    Args:
        backbone: whose tokens they are.
        preferences: at least one pair that can be learned from.
        mode: ``difference`` or ``concat``, where each pair is encoded in both orders.
        critiques: each response behind its critiques (difference mode), one of each side in a row, so that a pair of
            several has several rows, which together weigh what it weighs. A row says where a critique's own tokens
            begin (``critique``; the text's length where there is none).

    Raises InputError as :func:`rmcore.model.reward_model.encode_pairs`.
    """

    def __init__(
        self, backbone: Backbone, preferences: Sequence[Preference], mode: str, *, critiques: bool = False
    ) -> None:
        if not preferences:
            reject("preferences", "an empty list", "at least one pair")
        self.mode = mode
        if critiques:
            kept, texts, self._rest = _critiqued(backbone, preferences, mode)
        else:
            kept, texts = encode_pairs(backbone, preferences, mode)
            self._rest = [_rest(preferences[k], f"preferences[{k}]") for k in kept]
        self.dropped = len(preferences) - len(kept)
        """Pairs that were left out."""
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
        critiques: as :class:`PairDataset`.

    Attributes:
        dropped: pairs without signal that were left out so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        preferences: Callable[[], Iterable[Preference]],
        mode: str,
        *,
        critiques: bool = False,
    ) -> None:
        self.backbone, self.preferences, self.mode, self.critiques = backbone, preferences, mode, critiques
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
            pairs = PairDataset(self.backbone, chunk, self.mode, critiques=self.critiques)
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
    ``margins`` and ``weights`` (B,) float32; further columns as tensors, under ``column_NAME``. With critiques
    ``critique``, as ``input_ids``: 1 where a token is a critique's own, and for what ends its turn.
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
        if "critique" in rows[0]:
            batch["critique"] = self._own_tokens(texts, [start for row in rows for start in row["critique"]])
        for name in rows[0]:
            if name.startswith("column_"):
                batch[name] = torch.stack([torch.as_tensor(row[name], dtype=torch.float32) for row in rows])
        return batch

    def _own_tokens(self, texts: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
        own = [(torch.arange(len(text)) >= start).long() for text, start in zip(texts, starts, strict=True)]
        return torch.cat(own)[None] if self.padding_free else torch.nn.utils.rnn.pad_sequence(own, batch_first=True)

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


def _critiqued(
    backbone: Backbone, preferences: Sequence[Preference], mode: str
) -> tuple[list[int], list[tuple[EncodedText, EncodedText]], list[Row]]:
    """(which pairs teach something, texts of a row, the rows' other columns)."""
    if mode != "difference":
        reject("critiques", f"some for a head in {mode} mode", "None, or a head in difference mode")
    texts, counts, kept = critiqued_preferences(backbone, preferences)
    rows: list[tuple[EncodedText, EncodedText]] = []
    rest: list[Row] = []
    for k in kept:
        item = preferences[k]
        first = counts[k][0]
        starts = []
        for response, said, own in (
            (item.chosen, (item.critiques or ((), ()))[0], texts[k][:first]),
            (item.rejected, (item.critiques or ((), ()))[1], texts[k][first:]),
        ):
            lead = critique_lead(backbone.encoder, item.prompt, response) if any(said) else ()
            starts += [
                min(shared_length(lead, text.ids), len(text)) if said and said[n] else len(text)
                for n, text in enumerate(own)
            ]
        matched = matched_states(*counts[k])
        row = _rest(item, f"preferences[{k}]")
        for i, j in matched:
            rows.append((texts[k][i], texts[k][first + j]))
            own_row = {"weight": row["weight"] / len(matched), "critique": [starts[i], starts[first + j]]}
            rest.append({**row, **own_row})
    return kept, rows, rest


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
