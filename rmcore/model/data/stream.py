"""Sources too large for memory: mixed as they are read, without duplicates, with prompts that are never trained on.

A stream is read once an epoch, and again from its beginning. What a mixture knows of all pairs at once
(:mod:`rmcore.model.data.mixture`) a stream knows in bounds:

    duplicates       looked for among the last ``remembered`` distinct pairs (at least half of them, see SeenPairs)
    held-out prompts a hash of the prompt says which, so that a share of the prompts is held out in expectation, every
                     pair of one prompt falls on one side, and no list of prompts is kept
    report           what was read so far
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject
from rmcore._base.prompt import content_key
from rmcore.model.data import read_preferences
from rmcore.model.data.mixture import DataReport, DataSource, SourceReport, pair_said
from rmcore.model.training_pairs import Preference

__all__ = ["REMEMBERED", "SeenPairs", "held_out_pairs", "stream"]

REMEMBERED = 2_000_000
"""Distinct pairs among which duplicates are looked for; 64 MB at most."""


class SeenPairs:
    """Which keys have been seen lately, in bounded memory: 64 bits of a hash of each, in two generations.

    A generation holds ``most // 2`` keys. Where the newer one is full, the older is forgotten: the last ``most // 2``
    distinct keys are known for certain, none before the last ``most``. Two keys of one hash are taken for one: among n
    remembered a new one meets that by n / 2⁶⁴, 2e-13 at four million.

    Args:
        most: at least 2.
    """

    def __init__(self, most: int = REMEMBERED) -> None:
        if most < 2:
            reject("most", most, "at least 2 keys")
        self._room = most // 2
        self._slots = 1 << (self._room * 4 // 3 + 1).bit_length()
        self._new, self._old = self._table(), self._table()
        self._held = 0

    def _table(self) -> npt.NDArray[np.uint64]:
        return np.zeros(self._slots, dtype=np.uint64)  # zeroed pages, which cost nothing until they are written to

    def add(self, key: object) -> bool:
        """Remember a key; True if it was there."""
        number = hashed(key) or 1  # an empty slot is 0
        old, _ = self._find(self._old, number)
        new, slot = self._find(self._new, number)
        if new:
            return True
        if self._held == self._room:
            self._old, self._new = self._new, self._table()
            self._held = 0
            _, slot = self._find(self._new, number)
        self._new[slot] = number
        self._held += 1
        return old

    def __contains__(self, key: object) -> bool:
        number = hashed(key) or 1
        return self._find(self._new, number)[0] or self._find(self._old, number)[0]

    def _find(self, table: npt.NDArray[np.uint64], number: int) -> tuple[bool, int]:
        slot = number % self._slots
        while (there := int(table[slot])) and there != number:
            slot = (slot + 1) % self._slots
        return there == number, slot


def hashed(key: object) -> int:
    """64 bits of a key's blake2b, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def stream(
    sources: Sequence[DataSource],
    *,
    seed: int = 0,
    held_out: float = 0.0,
    remembered: int = REMEMBERED,
    report: DataReport | None = None,
    critiques: bool = False,
) -> Iterator[Preference]:
    """Pairs of all sources as they come, each drawn from one source at random by weight, until all have ended.

    Args:
        sources: files and ``hf://`` names, read as they are needed.
        seed: of the draws, and of which prompts are held out.
        held_out: share of the prompts, in expectation, whose pairs do not come.
        remembered: distinct pairs among which duplicates are looked for; 0 for none.
        report: begun anew, and counts what was read so far.
        critiques: whether those of the responses are read.

    Raises InputError for a share or number that is none; DataError for a row that is no preference.
    """
    _check_share(held_out)
    report = report if report is not None else DataReport([])
    report.begin([SourceReport(source.path, source.weight) for source in sources])
    seen = SeenPairs(2 * remembered) if remembered else None  # the pair, and the pair with its label
    for item, found in _mixed(sources, report.sources, seed, critiques):
        found.read += 1
        if seen is not None:
            key, label = pair_said(item)
            if seen.add((key, label)):
                found.duplicates += 1
                continue
            found.contradicted += seen.add(key)
        if is_held_out(item, held_out, seed):
            report.held_out += 1
            continue
        found.taken += 1
        report.trained += 1
        yield item


def held_out_pairs(
    sources: Sequence[DataSource], share: float, most: int, *, seed: int = 0, critiques: bool = False
) -> list[Preference]:
    """The first ``most`` distinct pairs that :func:`stream` holds out; reads about ``most / share`` pairs for it.

    Raises InputError where there are none.
    """
    _check_share(share)
    if not share:
        reject("held_out", share, "a share of the prompts in (0, 1)")
    if most < 1:
        reject("held_out_pairs", most, "at least 1")
    seen: set[int] = set()

    def found() -> Iterator[Preference]:
        reports = [SourceReport(source.path, source.weight) for source in sources]
        for item, _ in _mixed(sources, reports, seed, critiques):
            number = hashed(pair_said(item))
            if is_held_out(item, share, seed) and number not in seen:
                seen.add(number)
                yield item

    pairs = list(islice(found(), most))
    if not pairs:
        reject("held_out", f"{share} of the stream's prompts, and none fell to it", "a larger share, or more data")
    return pairs


def is_held_out(item: Preference, share: float, seed: int) -> bool:
    """Whether a pair's prompt is among the share that is not trained on: by its hash, whatever else is read."""
    return share > 0 and hashed((seed, content_key(item.prompt))) < share * 2.0**64


def _mixed(
    sources: Sequence[DataSource], reports: Sequence[SourceReport], seed: int, critiques: bool
) -> Iterator[tuple[Preference, SourceReport]]:
    left = [
        islice(read_preferences(source.path, source.columns, critiques=critiques), source.most) for source in sources
    ]
    told = list(reports)
    weights = [source.weight for source in sources]
    draw = random.Random(seed)
    while left:
        k = draw.choices(range(len(left)), weights)[0]
        try:
            yield next(left[k]), told[k]
        except StopIteration:
            del left[k], weights[k], told[k]


def _check_share(share: float) -> None:
    if isinstance(share, bool) or not 0 <= share < 1:
        reject("held_out", share, "a share of the prompts in [0, 1)")
