"""Responses with critiques: K critiques of a response give K hidden states, and these one reward and one variance.

Each state is that of the text (prompt, response, critique), as CLoud scores it (Ankner et al. 2024, arXiv:2408.11791).
Which critique a critic happened to write is a source of chance beside what the head does not know, so for a pair of
responses i and j, over all K_i·K_j pairs of their critiques, each as likely,

    g_ij = mean g        v_ij = mean v + Var g        (the law of total variance)

with g and v the head's own for two states. A response's reward is the mean of its states'. Without critiques a response
has one state, that of an empty critique, so that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.prompt import Prompt, Response, canonical_response, response_text
from rmcore.model.text import CRITIQUE_TEXT, EncodedText, TextEncoder, TextLimit
from rmcore.ops.pair_layout import PairLayout

__all__ = [
    "CritiquedPairs",
    "Critiques",
    "StateCounts",
    "behind_critique",
    "critique_lead",
    "critiqued_texts",
    "merged_texts",
    "read_critiques",
    "shared_length",
]

Critiques: TypeAlias = Sequence[Sequence[str | Sequence[str]]]
"""For each group and response its critiques: a list of texts, or one text."""


def read_critiques(critiques: object, responses: Sequence[Sequence[Response]]) -> list[list[tuple[str, ...]]]:
    """Critiques as tuples of texts, one a response; raises InputError, naming the place, for anything else."""
    if isinstance(critiques, str) or not isinstance(critiques, Sequence) or len(critiques) != len(responses):
        got = f"{len(critiques)} groups" if isinstance(critiques, (list, tuple)) else type(critiques).__name__
        reject("critiques", got, f"a list of {len(responses)} lists, one a group")
    found = []
    for g, (own, group) in enumerate(zip(critiques, responses, strict=True)):
        if isinstance(own, str) or not isinstance(own, Sequence) or len(own) != len(group):
            got = f"{len(own)} responses" if isinstance(own, (list, tuple)) else type(own).__name__
            reject(f"critiques[{g}]", got, f"a list of {len(group)}, one a response")
        found.append([_texts(said, f"critiques[{g}][{k}]") for k, said in enumerate(own)])
    return found


def _texts(said: object, name: str) -> tuple[str, ...]:
    texts = (said,) if isinstance(said, str) else said
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        reject(name, type(said).__name__, "a text, or a list of texts")
    return tuple(texts)


def critiqued_texts(
    encoder: TextEncoder,
    prompt: Prompt,
    responses: Sequence[Response],
    critiques: Sequence[Sequence[str]],
    limit: TextLimit | None = None,
) -> list[EncodedText]:
    """The texts of one group, response after response; one without critiques has one, of an empty critique.

    One text stands for a list of one, as in :func:`read_critiques`.
    """
    return [
        encoder.encode(prompt, response, critique=critique, limit=limit)
        for response, own in zip(responses, critiques, strict=True)
        for critique in ((own,) if isinstance(own, str) else own or ("",))
    ]


def behind_critique(response: Response, critiques: str | Sequence[str], name: str = "critiques") -> str:
    """A response with its critique under a heading: what stands for the response in a text of two (concat mode).

    It is cut as the response it is part of, wherever the critique ends. Raises InputError for several critiques: in a
    text of two there is a place for one, and K of each would make K² texts a pair.
    """
    own = (critiques,) if isinstance(critiques, str) else tuple(critiques)
    if len(own) > 1:
        reject(name, f"{len(own)} of one response in concat mode", "one at most, or a model in difference mode")
    return response_text(canonical_response(response)) + CRITIQUE_TEXT.replace("{critique}", own[0] if own else "")


def critique_lead(encoder: TextEncoder, prompt: Prompt, response: Response) -> tuple[int, ...]:
    """The token ids that a critique of a response follows: where a language model writes one, or is taught to.

    Raises InputError as the encoder does.
    """
    one, other = (encoder.encode(prompt, response, critique=text).ids for text in ("A", "b"))
    return one[: shared_length(one, other)]


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class CritiquedPairs:
    """Pairs of responses from pairs of states; (Q,) each, in the order of :class:`~rmcore.ops.pair_layout.PairLayout`.

    Attributes:
        logit: g, the mean over pairs of critiques.
        within: mean v: what the head does not know.
        between: Var g: what hangs on the critiques.
        parts: means of the parts of ``within`` that were given.
    """

    logit: Tensor
    within: Tensor
    between: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def variance(self) -> Tensor:
        """The total: within + between."""
        return self.within + self.between


@dataclass(frozen=True)
class StateCounts:
    """How many states each response has.

    Attributes:
        counts: for each group, of each response; 1 or more.
    """

    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, critiques: Sequence[Sequence[Sequence[str]]]) -> StateCounts:
        """Of critiques as :func:`read_critiques` gives them."""
        return cls(tuple(tuple(max(len(own), 1) for own in group) for group in critiques))

    @classmethod
    def read(cls, states: object, sizes: Sequence[int]) -> StateCounts:
        """Counts that somebody gives for groups of ``sizes``; raises InputError for what does not fit them."""
        if not isinstance(states, Sequence) or isinstance(states, str) or len(states) != len(sizes):
            reject("states", type(states).__name__, f"a list of {len(sizes)} lists, one a group")
        for k, (own, size) in enumerate(zip(states, sizes, strict=True)):
            good = isinstance(own, Sequence) and not isinstance(own, str) and len(own) == size
            if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in own):
                reject(f"states[{k}]", repr(own)[:40], f"a list of {size} counts, each at least 1")
        return cls(tuple(tuple(own) for own in states))

    def part(self, groups: Sequence[int]) -> StateCounts:
        """Those of some of the groups."""
        return StateCounts(tuple(self.counts[k] for k in groups))

    @property
    def flat(self) -> Tensor:
        """(ΣK,) int64, of all responses."""
        return torch.tensor([count for group in self.counts for count in group], dtype=torch.int64)

    @property
    def firsts(self) -> Tensor:
        """(ΣK,) int64, the row of each response's first state."""
        return self.flat.cumsum(0) - self.flat

    @property
    def rows(self) -> Tensor:
        """(G,) int64 states of each group."""
        return torch.tensor([sum(group) for group in self.counts], dtype=torch.int64)

    def mean(self, rows: Tensor) -> Tensor:
        """(ΣK,) the mean over a response's states of a value a state (R,)."""
        counts = self.flat.to(rows.device)
        owner = torch.repeat_interleave(counts)
        return torch.zeros(len(counts), dtype=rows.dtype, device=rows.device).index_add_(0, owner, rows) / counts

    def pairs(self, logit: Tensor, variance: Tensor, parts: Mapping[str, Tensor] | None = None) -> CritiquedPairs:
        """Pairs of responses from all pairs of states of each group, as a head gives them for groups of :attr:`rows`.

        Args:
            logit: (P,) g.
            variance: (P,) v.
            parts: (P,) parts of v by name.
        """
        states, responses = PairLayout(self.rows), PairLayout([len(group) for group in self.counts])
        owner = torch.repeat_interleave(self.flat)
        first, second = owner[states.first], owner[states.second]
        apart = first != second
        # Pairs of responses are in order, so their place is found by number.
        total = max(len(self.flat), 1)
        place = torch.searchsorted(responses.first * total + responses.second, first[apart] * total + second[apart]).to(
            logit.device
        )
        apart = apart.to(logit.device)
        g, v = logit[apart].double(), variance[apart.to(variance.device)].double().to(logit.device)
        count = (self.flat[responses.first] * self.flat[responses.second]).to(g)

        def mean(values: Tensor) -> Tensor:
            return (
                torch.zeros(responses.pairs, dtype=values.dtype, device=values.device).index_add_(0, place, values)
                / count
            )

        center = mean(g)
        # Around the mean, not as a difference of squares: never negative, and right where critiques hardly differ.
        told = {name: mean(part.to(logit.device)[apart].double()) for name, part in (parts or {}).items()}
        return CritiquedPairs(center, mean(v), mean((g - center[place]).square()), told)


def merged_texts(texts: Sequence[EncodedText], counts: Sequence[int]) -> list[EncodedText]:
    """A text a response for :func:`~rmcore.model.signal.pair_signals`: equal for equal states, unread if one is."""
    found, start = [], 0
    for count in counts:
        own = texts[start : start + count]
        segments = tuple(segment for text in own for segment in text.segments)
        found.append(replace(own[0], segments=segments, unread=any(text.unread for text in own)))
        start += count
    return found
