"""What a reward model alone says of one prompt's responses, and how squares are made of the head's flat pairs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmcore._base.prompt import Response, content_key
from rmcore.model.signal import PairSignal, pair_signals
from rmcore.model.text import EncodedText
from rmcore.ops import reference

__all__ = ["ResponseScores", "pair_squares"]


@dataclass(frozen=True, eq=False, slots=True)
class ResponseScores:
    """One prompt's K responses. Squares are (K, K) float64 on the CPU; row i, column j is "i against j".

    The names mean what they do in :class:`rmcore.GroupScores`, and the values are those of an engine without a judge.

    Attributes:
        preference: p̃ = g / u, antisymmetric, logits. NaN where the model cannot tell: the inputs of two different
            responses are equal (cut to the limit, say), or one is over-long under the policy ``no-reward``.
        uncertainty: u ≥ 1, symmetric; 1 is as sure as the training data allows. Inf where there is no preference.
        logit: g, antisymmetric, before division by u.
        variance: v, symmetric.
    """

    preference: Tensor
    uncertainty: Tensor
    logit: Tensor
    variance: Tensor

    @property
    def rewards(self) -> Tensor:
        """(K,) a reward a response: the mean of its p̃ against the K responses, its own 0 included.

        They compare responses of one prompt; between prompts they mean nothing. The reward of a model with linear
        features, where no uncertainty divides it, is this up to a constant of the prompt. K = 1 gives 0. Pairs without
        a preference are left out; a response that has none to any other gets NaN, and does not count among the K.
        """
        known = ~self.preference.isnan()
        known.fill_diagonal_(False)
        members = (known.sum(1) > 0).sum().clamp_min(1)
        total = self.preference.masked_fill(~known, 0.0).sum(1) / members
        return total if len(total) == 1 else total.masked_fill(known.sum(1) == 0, torch.nan)

    @property
    def response_uncertainty(self) -> Tensor:
        """(K,) mean u of a response's pairs that have a preference; Inf where none has; K = 1 gives 1."""
        if len(self.uncertainty) == 1:
            return torch.ones(1, dtype=torch.float64)
        known = ~self.preference.isnan()
        known.fill_diagonal_(False)
        count = known.sum(1)
        mean = self.uncertainty.masked_fill(~known, 0.0).sum(1) / count
        return mean.masked_fill(count == 0, torch.inf)

    @property
    def ranking(self) -> Tensor:
        """(K,) int64: places of the responses, best reward first; of equal ones the first in the group is first.

        Those without a reward come last.
        """
        return self.rewards.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)


def pair_squares(
    logit: Tensor,
    variance: Tensor,
    responses: Sequence[Sequence[Response]],
    amplitude: float,
    encoded: Sequence[Sequence[EncodedText]],
    mode: str,
    *,
    ordered: bool,
) -> list[ResponseScores]:
    """One result a group from the head's flat pairs, all groups of equal K at once.

    Args:
        logit: (Q,) g, group after group: pairs i < j, or with ``ordered`` all (i, j), i ≠ j, row-major.
        variance: (Q,) v, likewise.
        responses: the groups' texts. Equal ones of a group are decided by rule: nothing between them, and no doubt.
        amplitude: a of u = √(1 + a v).
        encoded: the groups' texts as the backbone had them.
        mode: ``difference`` (a text a response) or ``concat`` (a text a pair, as in ``logit``).
        ordered: both orders were scored, and are averaged.
    """
    g, v = logit.double().cpu(), variance.double().cpu()
    sizes = torch.tensor([len(group) for group in responses])
    counts = sizes * (sizes - 1) // (1 if ordered else 2)
    starts = counts.cumsum(0) - counts
    result: dict[int, ResponseScores] = {}
    inputs = [text for group in encoded for text in group]
    row_starts = starts if mode == "concat" else sizes.cumsum(0) - sizes
    for k in sizes.unique().tolist():
        groups = (sizes == k).nonzero()[:, 0]
        i, j = (~torch.eye(k, dtype=torch.bool)).nonzero().T if ordered else torch.triu_indices(k, k, 1)
        rows = starts[groups, None] + torch.arange(len(i))
        squares = torch.zeros(2, len(groups), k, k, dtype=torch.float64)
        squares[:, :, i, j] = torch.stack((g[rows], v[rows]))
        if not ordered:
            squares[:, :, j, i] = torch.stack((-g[rows], v[rows]))
        same = _equal_texts([responses[group] for group in groups.tolist()], k)
        squares.masked_fill_(same, 0.0)
        u = reference.uncertainty(squares[1], amplitude)
        p, u = reference.concat_preference(reference.preference(squares[0], u), u)
        g_mean, v_mean = (squares[0] - squares[0].mT) / 2, (squares[1] + squares[1].mT) / 2
        pair_rows = rows[..., None] if mode == "concat" else row_starts[groups, None, None] + torch.stack((i, j), 1)
        signal = torch.zeros(len(groups), k, k, dtype=torch.uint8)
        signal[:, i, j] = pair_signals(inputs, pair_rows.flatten(0, 1), mode).view(len(groups), -1)
        signal = torch.maximum(signal, signal.mT)
        unread = signal == PairSignal.UNREAD
        silent = unread | ((signal == PairSignal.EQUAL_INPUTS) & ~same)
        p, u = p.masked_fill(silent, torch.nan), u.masked_fill(silent, torch.inf)
        g_mean, v_mean = g_mean.masked_fill(unread, torch.nan), v_mean.masked_fill(unread, torch.nan)
        for n, group in enumerate(groups.tolist()):
            result[group] = ResponseScores(p[n], u[n], g_mean[n], v_mean[n])
    return [result[group] for group in range(len(responses))]


def _equal_texts(groups: Sequence[Sequence[Response]], k: int) -> Tensor:
    known: dict[Hashable, int] = {}
    ids = torch.tensor([known.setdefault(content_key(text), len(known)) for group in groups for text in group]).view(
        -1, k
    )
    return ids[:, :, None] == ids[:, None, :]
