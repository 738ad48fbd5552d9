"""Training pairs, and the texts, labels and hidden states that they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmcore._base.errors import InputError, reject
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response, check_prompt, check_response
from rmcore.model.backbone import Backbone
from rmcore.model.signal import training_signal
from rmcore.model.text import EncodedText

__all__ = [
    "Preference",
    "encode_pair",
    "encode_pairs",
    "encode_preferences",
    "encoding_progress",
    "informative",
    "preference_texts",
]


@dataclass(frozen=True, slots=True)
class Preference:
    """One training pair: ``chosen`` is better than ``rejected`` with probability ``label``.

    Nothing is checked before the pair is read: what fits one is told by the fit, which names the pair.
    """

    prompt: Prompt
    chosen: Response
    rejected: Response
    label: float = 1.0
    critiques: tuple[tuple[str, ...], tuple[str, ...]] | None = field(default=None, kw_only=True)
    """Of the chosen and of the rejected response, where they are to be read (:mod:`rmcore.model.critiques`)."""


def encode_preferences(
    backbone: Backbone,
    preferences: Sequence[Preference],
    mode: str,
    *,
    progress: Progress | None = None,
    may_be_empty: bool = False,
    reasons: dict[int, str] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, labels, pairs) of training pairs: one row a response with pairs, or in concat mode a row an order.

    ``may_be_empty`` and ``reasons`` as in :func:`encode_pairs`.
    """
    texts, labels = preference_texts(backbone, preferences, mode, may_be_empty=may_be_empty, reasons=reasons)
    hidden = backbone.hidden(texts, progress=encoding_progress(progress))
    pairs = torch.arange(len(texts), device=hidden.device).view(-1, 2) if mode == "difference" else None
    return hidden, labels.to(hidden.device), pairs


def preference_texts(
    backbone: Backbone,
    preferences: Sequence[Preference],
    mode: str,
    *,
    may_be_empty: bool = False,
    reasons: dict[int, str] | None = None,
) -> tuple[list[EncodedText], Tensor]:
    """Texts 2k and 2k + 1 of pair k, and float32 labels: (N,), or in concat mode (2N,), one for each order.

    Pairs are left out as by :func:`encode_pairs`. Raises InputError where none is left, unless it ``may_be_empty``.
    """
    kept, pairs = encode_pairs(backbone, preferences, mode, may_be_empty=may_be_empty, reasons=reasons)
    labels = [preferences[k].label for k in kept]
    if mode == "concat":
        labels = [value for label in labels for value in (label, 1 - label)]
    return [text for pair in pairs for text in pair], torch.tensor(labels, dtype=torch.float32)


def encode_pairs(
    backbone: Backbone,
    preferences: Sequence[Preference],
    mode: str,
    *,
    may_be_empty: bool = False,
    reasons: dict[int, str] | None = None,
) -> tuple[list[int], list[tuple[EncodedText, EncodedText]]]:
    """The two texts of each pair that can be learned from, after the numbers of those pairs.

    Pairs whose two inputs are equal, or one of which is unread, teach nothing: they are left out, with a warning that
    says how many and why, and ``reasons`` is filled with why for each. Raises InputError where no other is left, unless
    it ``may_be_empty``: one rank's part.
    """
    pairs, kept = _informative(backbone, preferences, mode, may_be_empty=may_be_empty, reasons=reasons)
    return kept, [pairs[k] for k in kept]


def informative(backbone: Backbone, preferences: Sequence[Preference], mode: str) -> list[int]:
    """Which pairs :func:`encode_preferences` keeps, by position. Raises InputError as it does."""
    return _informative(backbone, preferences, mode)[1]


def _informative(
    backbone: Backbone,
    preferences: Sequence[Preference],
    mode: str,
    *,
    may_be_empty: bool = False,
    reasons: dict[int, str] | None = None,
) -> tuple[list[tuple[EncodedText, EncodedText]], list[int]]:
    """The texts of all pairs, and which pairs teach something."""
    pairs: list[tuple[EncodedText, EncodedText]] = []
    for k, item in enumerate(preferences):
        if not isinstance(item, Preference):
            reject(
                f"preferences[{k}]",
                type(item).__name__,
                "a Preference",
                "rmcore.model.data.read_preferences makes them of rows: of dicts, of a datasets.Dataset, of files",
            )
        check_prompt(item.prompt, f"preferences[{k}].prompt")
        check_response(item.chosen, f"preferences[{k}].chosen")
        check_response(item.rejected, f"preferences[{k}].rejected")
        if isinstance(item.label, bool) or not isinstance(item.label, (int, float)) or not 0 <= item.label <= 1:
            reject(f"preferences[{k}].label", repr(item.label)[:40], "a probability in [0, 1]")
        try:
            pairs.append(encode_pair(backbone, item.prompt, item.chosen, item.rejected, mode))
        except InputError as error:
            raise InputError(f"preferences[{k}]: {error}") from error
    responses = [(item.chosen, item.rejected) for item in preferences]
    return pairs, training_signal(responses, pairs, mode, may_be_empty=may_be_empty, reasons=reasons)


def encode_pair(
    backbone: Backbone, prompt: Prompt, first: Response, second: Response, mode: str
) -> tuple[EncodedText, EncodedText]:
    """The two texts of a pair: its responses', or its two orders in concat mode."""
    encode = backbone.encoder.encode
    if mode == "difference":
        return encode(prompt, first), encode(prompt, second)
    return encode(prompt, first, second), encode(prompt, second, first)


def encoding_progress(progress: Progress | None) -> Callable[[int, int], None] | None:
    """What :meth:`Backbone.hidden` calls, to tell ``progress`` of the step "encoding"."""
    return None if progress is None else (lambda done, total: progress("encoding", done, total))
