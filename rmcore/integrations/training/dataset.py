"""Pairs as a trainer takes them: encoded once, or streamed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from rmcore._base.errors import reject
from rmcore.model.backbone import Backbone
from rmcore.model.critiqued_data import critiqued_preferences, matched_states
from rmcore.model.critiques import critique_lead, shared_length
from rmcore.model.data import Source, parse_preferences, read_preferences, read_rows
from rmcore.model.data.columns import map_columns
from rmcore.model.data.preferences import COLUMNS
from rmcore.model.text import EncodedText
from rmcore.model.training_pairs import Preference, encode_pairs

__all__ = [
    "PairDataset",
    "Row",
    "StreamedPairs",
    "TrainingPair",
    "encoded",
    "endless",
    "pairs_of",
    "read_training_pairs",
]

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
        may_be_empty: whether none need be left that can be learned from.

    Raises InputError as :func:`rmcore.model.training_pairs.encode_pairs`.
    """

    def __init__(
        self,
        backbone: Backbone,
        preferences: Sequence[Preference],
        mode: str,
        *,
        critiques: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        if not preferences:
            reject("preferences", "an empty list", "at least one pair")
        self.mode = mode
        self.left_out: dict[int, str] = {}
        """Why a pair was left out, by its number."""
        signal: dict[str, Any] = {"may_be_empty": may_be_empty, "reasons": self.left_out}
        if critiques:
            _, texts, self._rest = _critiqued(backbone, preferences, mode, **signal)
        else:
            kept, texts = encode_pairs(backbone, preferences, mode, **signal)
            self._rest = [_rest(preferences[k], f"preferences[{k}]") for k in kept]
        ids = [backbone.input_ids(text) for pair in texts for text in pair]
        self._content = [text.content_tokens for pair in texts for text in pair]
        self._ends = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        self._ids: npt.NDArray[np.int32] = np.fromiter(
            (token for text in ids for token in text), dtype=np.int32, count=int(self._ends[-1])
        )

    @property
    def dropped(self) -> int:
        """Pairs that were left out."""
        return len(self.left_out)

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
        endless: another pass follows the last one, so that a run that is resumed skips what it has seen, passes
            included; what a trainer trains on is.
        left_out: pairs that nothing can be learned from, counted by why, in the pass that is going on; of this process,
            and not of a data loader's workers.
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
        self.endless = False
        self.left_out: Counter[str] = Counter()

    @property
    def dropped(self) -> int:
        """Pairs that were left out."""
        return self.left_out.total()

    def __iter__(self) -> Iterator[Row]:
        some = True
        while some:  # a pass without a pair is the last
            some = False
            for row in self.once():
                yield row
                some = self.endless

    def once(self) -> Iterator[Row]:
        """One pass."""
        self.left_out.clear()
        worker = torch.utils.data.get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        chunk: list[Preference] = []
        for k, item in enumerate(self.preferences()):
            if k % parts == part:
                chunk.append(item)
            if len(chunk) == _STREAM_CHUNK:
                yield from self._encoded(chunk)
                chunk = []
        if chunk:
            yield from self._encoded(chunk)

    def _encoded(self, chunk: list[Preference]) -> Iterator[Row]:
        pairs = PairDataset(self.backbone, chunk, self.mode, critiques=self.critiques, may_be_empty=True)
        self.left_out.update(pairs.left_out.values())
        yield from (pairs[k] for k in range(len(pairs)))


def _critiqued(
    backbone: Backbone, preferences: Sequence[Preference], mode: str, **signal: Any
) -> tuple[list[int], list[tuple[EncodedText, EncodedText]], list[Row]]:
    """(which pairs teach something, texts of a row, the rows' other columns)."""
    if mode != "difference":
        reject("critiques", f"some for a head in {mode} mode", "None, or a head in difference mode")
    texts, counts, kept = critiqued_preferences(backbone, preferences, **signal)
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


def encoded(source: Any, backbone: Backbone, mode: str, *, critiques: bool = False) -> Any:
    """What a trainer is given, as it reads it: preferences encoded, or streamed; what is encoded already as it is.

    Raises InputError for critiques that are not there, and as :class:`PairDataset` does.
    """
    if source is None or isinstance(source, (PairDataset, StreamedPairs, Subset)):
        return source
    if isinstance(source, dict):  # of evaluations, by name
        return {name: encoded(part, backbone, mode, critiques=critiques) for name, part in source.items()}
    if isinstance(source, IterableDataset) or type(source).__name__ == "IterableDataset":
        return StreamedPairs(
            backbone, lambda: read_training_pairs(source, critiques=critiques), mode, critiques=critiques
        )
    pairs = pairs_of(source, critiques=critiques)
    if critiques and not any(item.critiques for item in pairs):
        reject("critiques", "preferences without any", "a column critiques", "rmcore critique writes one")
    return PairDataset(backbone, pairs, mode, critiques=critiques)


def endless(data: Any, posterior: str) -> Any:
    """What is trained on, a stream of it begun anew after each pass; raises InputError where P wants a last epoch."""
    if isinstance(data, StreamedPairs):
        if posterior == "training":
            reject("posterior", "'training' with a stream, which has no last epoch", "'pass'")
        data.endless = True
    return data
