"""Preferences behind their critiques as data for a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmcore._base.errors import InputError
from rmcore.model.backbone import Backbone
from rmcore.model.critiques import StateCounts, behind_critique, critiqued_texts, merged_texts
from rmcore.model.signal import training_signal
from rmcore.model.text import EncodedText
from rmcore.model.training_pairs import Preference

__all__ = ["CritiquedData", "behind_critiques", "critiqued_preferences", "encode_critiqued", "matched_states"]


@dataclass(frozen=True)
class CritiquedData:
    """Pairs of responses as pairs of their states, as :func:`rmcore.head.fit.fit` takes them.

    Attributes:
        hidden: (R, h) states: of each pair those of its chosen response, then those of its rejected one.
        labels: (N,) float32, a pair of states each.
        pairs: (N, 2) int64 rows of ``hidden``.
        weights: (N,) float32: those of one pair of responses sum to 1, so that one with more critiques counts no more.
        states: how many states each response has; a group is a pair of responses.
        kept: which of the preferences these are: the others' inputs are equal, or one is unread.
    """

    hidden: Tensor
    labels: Tensor
    pairs: Tensor
    weights: Tensor
    states: StateCounts
    kept: tuple[int, ...]


def encode_critiqued(
    backbone: Backbone, preferences: Sequence[Preference], *, progress: Callable[[int, int], None] | None = None
) -> CritiquedData:
    """Encode preferences behind their critiques. Raises InputError as ``encode_preferences`` does.

    A pair's states are matched: critique k of one response with critique k of the other, the shorter list from its
    beginning again, since all K_i·K_j pairs of states are no more evidence than the states are.
    """
    texts, counts, kept = critiqued_preferences(backbone, preferences)
    hidden = backbone.hidden([text for k in kept for text in texts[k]], progress=progress)
    rows: list[tuple[int, int]] = []
    labels: list[float] = []
    weights: list[float] = []
    start = 0
    for k in kept:
        first, second = counts[k]
        matched = matched_states(first, second)
        rows += [(start + a, start + first + b) for a, b in matched]
        labels += [preferences[k].label] * len(matched)
        weights += [1 / len(matched)] * len(matched)
        start += first + second
    device = hidden.device
    return CritiquedData(
        hidden,
        torch.tensor(labels, dtype=torch.float32, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        StateCounts(tuple(counts[k] for k in kept)),
        tuple(kept),
    )


def behind_critiques(preferences: Sequence[Preference]) -> list[Preference]:
    """Preferences whose responses stand before their critiques, for concat mode: one of each at most.

    Raises InputError for several.
    """
    found = []
    for k, item in enumerate(preferences):
        said = item.critiques or ((), ())
        chosen, rejected = (
            behind_critique(text, own, f"preferences[{k}].critiques")
            for text, own in zip((item.chosen, item.rejected), said, strict=True)
        )
        found.append(replace(item, chosen=chosen, rejected=rejected, critiques=None))
    return found


def critiqued_preferences(
    backbone: Backbone,
    preferences: Sequence[Preference],
    *,
    may_be_empty: bool = False,
    reasons: dict[int, str] | None = None,
) -> tuple[list[list[EncodedText]], list[tuple[int, int]], list[int]]:
    """(the texts of each preference, its chosen response's before its rejected one's; how many either has; which teach
    something). ``may_be_empty`` and ``reasons`` as in ``encode_pairs``. Raises InputError as ``encode_preferences``.
    """
    texts: list[list[EncodedText]] = []
    counts: list[tuple[int, int]] = []
    for k, item in enumerate(preferences):
        own = item.critiques or ((), ())
        try:
            texts.append(critiqued_texts(backbone.encoder, item.prompt, (item.chosen, item.rejected), own))
        except InputError as error:
            raise InputError(f"preferences[{k}]: {error}") from error
        counts.append((max(len(own[0]), 1), max(len(own[1]), 1)))
    merged = [merged_texts(own, count) for own, count in zip(texts, counts, strict=True)]
    kept = training_signal(
        [(p.chosen, p.rejected) for p in preferences],
        [(a, b) for a, b in merged],
        "difference",
        may_be_empty=may_be_empty,
        reasons=reasons,
    )
    return texts, counts, kept


def matched_states(first: int, second: int) -> list[tuple[int, int]]:
    """Which states of two responses make a training pair; no state is left out, and none paired twice with one."""
    return [(n % first, n % second) for n in range(max(first, second))]
