"""A rendered conversation as one text through the tokenizer, and which tokens are whose.

The ids are those of ``apply_chat_template(tokenize=True)``: the whole text is tokenised, no pieces of it, since a
tokenizer may merge over their borders or put a space before each. Whose a token is follows from the characters it came
from. One difference is wanted: where a prompt or a response spells a special token, that stays ordinary text unless
``split_special_tokens`` is off; then ids are the template's to the last.

What stands before a special token of the template is tokenised apart from what stands behind, and kept: the prompt of a
group is tokenised once.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rmcore._base.errors import reject
from rmcore.model.chat import Place, Rendering
from rmcore.model.encoding.limits import Run
from rmcore.model.encoding.pieces import pieces_of

__all__ = ["WholeText"]


class _Tokens(NamedTuple):
    """Token ids (T,) and the characters (T,) where each begins and ends."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class WholeText:
    """Tokenises rendered conversations for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer, a fast one unless no text spells a special token.
        lock: held while the tokenizer works.
        split_special_tokens: whether texts that spell special tokens stay ordinary text.
        cuttable: whether a long text's tokens are those of its pieces (:mod:`rmcore.model.encoding.pieces`).
        content: token ids of a text as ordinary text.
    """

    def __init__(
        self,
        tokenizer: Any,
        lock: threading.Lock,
        *,
        split_special_tokens: bool,
        cuttable: bool,
        content: Callable[[str], NDArray[np.int64]],
    ) -> None:
        self.tokenizer = tokenizer
        self.has_offsets = bool(getattr(tokenizer, "is_fast", False))
        self._lock = lock
        self._cuttable = cuttable
        self._content = content
        self._before = functools.lru_cache(maxsize=128)(self._tokenize)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number: token.content for number, token in added.items() if token.special and token.content}
        unknown = getattr(tokenizer, "unk_token_id", None)
        self._unknown = -1 if unknown is None else int(unknown), getattr(tokenizer, "unk_token", None)
        self._special = np.array(sorted(special) if split_special_tokens else [], dtype=np.int64)
        every = {token.content for token in added.values()}
        # A text may be cut before a token that is always found where it stands: it takes in no space before it, is not
        # one for whole words only, and no other reaches into it.
        safe = [
            token.content
            for token in added.values()
            if token.special and not (token.lstrip or token.normalized or token.single_word) and token.content
        ]
        safe = [name for name in safe if not any(_reaches_into(other, name) for other in every)]
        self._border = _any_of(safe)
        self.spells_special = _any_of(list(special.values())) if split_special_tokens else None

    def runs(self, rendering: Rendering, answer: int, critique: int | None = None) -> list[Run]:
        """The tokens of a rendered conversation.

        Args:
            rendering: of it.
            answer: number of the message that the response begins with; what stands before its text is the prompt's.
            critique: number of the message that is the response's critique, if there is one.
        """
        places = rendering.places
        if not self.has_offsets:
            return self._runs_without_offsets(rendering, answer, critique)
        begin = _first_place(places, answer)
        second = None if critique is None else _first_place(places, critique)
        tokens = self._cut_and_tokenize(rendering.text, places, begin)
        if len(self._special):
            tokens = self._as_text(tokens, rendering)
        return _runs(tokens, rendering, begin, second)

    def _runs_without_offsets(self, rendering: Rendering, answer: int, critique: int | None) -> list[Run]:
        """A text's tokens are those between the tokens that the text before it, and it with that, begin with alike."""
        if rendering.spelt:
            reject(
                "prompt and response",
                "a special token's name",
                "texts without one, where a tokenizer tells no offsets",
                "Use its fast form, or split_special_tokens=False",
            )
        ids = self._ids(rendering.text)
        runs: list[Run] = []
        done = 0
        for place in rendering.places:
            name = "first" if place.message >= answer else "prompt"
            if critique is not None and place.message >= critique:
                name = "critique"
            low, high = (max(done, _alike(ids, self._ids(rendering.text[:end]))) for end in (place.start, place.stop))
            before = runs[-1].name if runs else "prompt"
            runs += [Run(before, False, ids[done:low]), Run(name, True, ids[low:high])]
            done = max(high, low)
        last = runs[-1].name if runs else "prompt"
        runs.append(Run(last, False, ids[done:]))
        return [run for run in runs if len(run.ids)]

    def _ids(self, text: str) -> NDArray[np.int64]:
        with self._lock:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def _cut_and_tokenize(self, text: str, places: tuple[Place, ...], begin: int) -> _Tokens:
        last = places[begin - 1].stop if begin else 0
        cut = 0
        if self._border is not None and begin < len(places):
            for border in self._border.finditer(text, last, places[begin].start):
                cut = border.start()
        if not cut:
            return self._tokenize(text)
        before, behind = self._before(text[:cut]), self._tokenize(text[cut:])
        return _joined([before, _Tokens(behind.ids, behind.starts + cut, behind.ends + cut)])

    def _tokenize(self, text: str) -> _Tokens:
        parts = [self._tokenize_piece(piece, start) for start, piece in pieces_of(text, self._cuttable)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _tokenize_piece(self, text: str, start: int) -> _Tokens:
        with self._lock:
            encoded = self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2) + start
        return _Tokens(ids, offsets[:, 0], offsets[:, 1])

    def _as_text(self, tokens: _Tokens, rendering: Rendering) -> _Tokens:
        """The same with special tokens that texts have spelt as ordinary tokens."""
        text = rendering.text
        theirs = _Spans([*rendering.spelt, *((place.start, place.stop) for place in rendering.places)])
        # What the tokenizer knows nothing for, nobody spelt; alone it would know no more.
        unknown, name = self._unknown
        special = self._special if name and name in text else self._special[self._special != unknown]
        spelt: list[int] = []
        ordinary: list[NDArray[np.int64]] = []
        for k in np.flatnonzero(np.isin(tokens.ids, special)).tolist():
            # A special token may take in spaces around it, which may be a text's.
            start, stop = int(tokens.starts[k]), int(tokens.ends[k])
            own = text[start:stop].strip()
            if tokens.ids[k] == unknown and own != name:
                continue
            first = text.index(own, start, stop) if own else start
            if theirs.meet(first, first + len(own)):
                spelt.append(k)
                ordinary.append(self._content(text[start:stop]))
        if not spelt:
            return tokens
        counts = np.ones(len(tokens.ids), dtype=np.int64)
        counts[spelt] = [len(ids) for ids in ordinary]
        source = np.repeat(np.arange(len(counts)), counts)
        result = _Tokens(*(column[source] for column in tokens))
        new = np.zeros(len(counts), dtype=bool)
        new[spelt] = True
        result.ids[new[source]] = np.concatenate(ordinary)
        return result


class _Spans:
    """Spans of characters (start, stop), which may overlap."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        spans.sort()
        self._starts = [start for start, _ in spans]
        self._reach = list(itertools.accumulate((stop for _, stop in spans), max))

    def meet(self, start: int, stop: int) -> bool:
        """Whether any has a character of this one, or lies on both sides of it."""
        before = bisect.bisect_left(self._starts, stop)
        return before > 0 and self._reach[before - 1] > start


def _joined(parts: list[_Tokens]) -> _Tokens:
    return _Tokens(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _first_place(places: tuple[Place, ...], message: int) -> int:
    return next((k for k, place in enumerate(places) if place.message >= message), len(places))


def _runs(tokens: _Tokens, rendering: Rendering, begin: int, critique: int | None) -> list[Run]:
    """Tokens by whose they are; ``begin`` and ``critique`` are the numbers of the response's and its critique's first
    places.

    A token is a text's, so that it may be cut, if all of its characters are but spaces. The response begins with the
    first token that has a character of it.
    """
    text, places = rendering.text, rendering.places
    ids = tokens.ids
    starts = np.maximum.accumulate(tokens.starts)
    ends = np.minimum.accumulate(tokens.ends[::-1])[::-1]

    def border_at(place: int | None) -> int:
        if place is None or place >= len(places):
            return len(ids)
        return int(np.searchsorted(ends, places[place].start, side="right"))

    border, border2 = border_at(begin), border_at(critique)
    runs: list[Run] = []
    done = 0

    def add(stop: int, cuttable: bool) -> None:
        nonlocal done
        parts = ((0, border, "prompt"), (border, border2, "first"), (border2, len(ids), "critique"))
        for begins, ends_at, name in parts:
            low, high = max(done, begins), min(stop, ends_at)
            if low < high:
                runs.append(Run(name, cuttable, ids[low:high]))
        done = max(done, stop)

    for k, place in enumerate(places):
        low = int(np.searchsorted(ends, place.start, side="right"))
        high = int(np.searchsorted(starts, place.stop, side="left"))
        if low < high and text[starts[low] : place.start].strip():
            low += 1
        if low < high and text[place.stop : ends[high - 1]].strip():
            high -= 1
        low = max(low, done, border if k >= begin else 0)
        if low < high:
            add(low, False)
            add(high, True)
    add(len(ids), False)
    return runs


def _alike(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many ids both begin with."""
    most = min(len(first), len(second))
    different = np.flatnonzero(first[:most] != second[:most])
    return int(different[0]) if len(different) else most


def _any_of(texts: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _reaches_into(other: str, name: str) -> bool:
    """Whether ``other`` may end within ``name``, or begin before it and go on behind."""
    overlaps = any(other.endswith(name[:k]) for k in range(1, min(len(name), len(other))))
    return overlaps or (other != name and name in other)
