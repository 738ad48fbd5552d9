"""What a reward model alone says of one prompt's responses, and how squares are made of the head's flat pairs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmcore._base.prompt import Response, content_key
from rmcore.head.attributes.scores import AttributeScores
from rmcore.model.signal import PairSignal, pair_signals
from rmcore.model.text import EncodedText
from rmcore.ops import reference
from rmcore.ops.pair_layout import PairLayout, PairMode, squares
from rmcore.ops.reference import OrderMean

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
        scores: (K,) what the head gives each response alone, as a published reward model's own code does; NaN for one
            left unread, None for models of pairs (concat mode). PairRM has LLM-Blender's: the mean over the group,
            itself included, of M_ij − M_ji, which is twice that of ``logit``.
        attributes: of a published reward model that scores several (ArmoRM, QRM, URM, LDL): their means, weights and
            distributions, hence the variance that the model itself sees in its answers. None for all others.
        position_bias: concat mode with both orders: (K, K) symmetric, logits, what is added to the preference for
            whichever response is shown first, (p_ij + p_ji)/2: the two orders contradict each other where it is larger
            than the preference. NaN where there is none. None in difference mode, and for one order.
        epistemic: (K, K) symmetric, the part of the variance of a pair's logit that more data would take away, as far
            as the model tells parts; None where it tells none. With the default amplitude it is ``variance``.
        aleatoric: (K, K) symmetric, the part that is in the answers themselves; None likewise.
        critique_variance: (K, K) symmetric, the part of ``variance`` that hangs on which critiques were read; None
            without critiques.
    """

    preference: Tensor
    uncertainty: Tensor
    logit: Tensor
    variance: Tensor
    scores: Tensor | None = None
    attributes: AttributeScores | None = None
    position_bias: Tensor | None = None
    epistemic: Tensor | None = None
    aleatoric: Tensor | None = None
    critique_variance: Tensor | None = None

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
    mean: OrderMean = "logits",
    scores: Tensor | None = None,
    ranked: bool = False,
    attributes: AttributeScores | None = None,
    preference: Tensor | None = None,
    parts: Mapping[str, Tensor] | None = None,
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
        mean: of what the two orders are averaged, the head's ``order_mean``.
        scores: (R,) of the groups' responses, difference mode.
        ranked: a model of pairs whose authors give a response the mean over its group of what it has against each, in
            both orders: LLM-Blender's ``rank``.
        attributes: of the same.
        preference: (Q,) p̃ of an estimator that makes its own; None for g / u.
        parts: (Q,) ``epistemic`` and ``aleatoric`` variance, those that are known, and ``critique_variance``.
    """
    layout = PairLayout([len(group) for group in responses])
    kind: PairMode = "concat" if mode == "concat" else "difference"
    rows = layout.pair_rows(kind, one_order=kind == "concat" and not ordered)
    g, v = logit.double().cpu()[None], variance.double().cpu()[None]
    if ordered:
        g, v = g[0, rows.T], v[0, rows.T]  # (2, Q): of (i, j) and of (j, i)
    same = _equal_texts(responses, layout)
    # States may be the same where texts are not, such as a first token's: then nothing is known either.
    alike = (g[0] == g[1]) & (v[0] == v[1]) if ordered else (g[0] == 0) & (v[0] == 0) & (kind == "difference")
    g, v = g.masked_fill(same, 0.0), v.masked_fill(same, 0.0)
    u = reference.uncertainty(v, amplitude)
    p = reference.preference(g, u) if preference is None else preference.double().cpu()[None].masked_fill(same, 0.0)
    bias = p.mean(0) if ordered else None
    g, p = (reference.mean_of_orders(x[0], x[1], mean) if ordered else x[0] for x in (g, p))
    v, u = (x.mean(0) for x in (v, u))
    inputs = [text for group in encoded for text in group]
    signal = pair_signals(inputs, rows, mode)
    unread = signal == PairSignal.UNREAD
    silent = unread | (((signal == PairSignal.EQUAL_INPUTS) | alike) & ~same)
    p, u = p.masked_fill(silent, torch.nan), u.masked_fill(silent, torch.inf)
    g, v = g.masked_fill(unread, torch.nan), v.masked_fill(unread, torch.nan)
    told = {name: part.double().cpu().masked_fill(same, 0.0) for name, part in (parts or {}).items()}
    told = {name: part.masked_fill(unread, torch.nan) for name, part in told.items()}
    own = _by_group(scores, encoded)
    by_attribute: list[AttributeScores | None] = [None] * len(encoded)
    if attributes is not None:
        by_attribute[:] = attributes.split([len(group) for group in encoded])
    bias = None if bias is None else bias.masked_fill(silent, torch.nan)
    result: dict[int, ResponseScores] = {}
    for block in layout.blocks:
        columns = [
            squares(p, block, sign=-1),
            squares(u, block, sign=1, diagonal=1.0),
            squares(g, block, sign=-1),
            squares(v, block, sign=1),
        ]
        biases = [None] * len(block.groups) if bias is None else squares(bias, block, sign=1)
        spread = {name: squares(part, block, sign=1) for name, part in told.items()}
        for k, (group, p_of, u_of, g_of, v_of, b_of) in enumerate(
            zip(block.groups.tolist(), *columns, biases, strict=True)
        ):
            alone = 2 * g_of.mean(1) if ranked else own[group]
            more = {name: part[k] for name, part in spread.items()}
            result[group] = ResponseScores(p_of, u_of, g_of, v_of, alone, by_attribute[group], b_of, **more)
    return [result[group] for group in range(len(responses))]


def _by_group(scores: Tensor | None, encoded: Sequence[Sequence[EncodedText]]) -> list[Tensor | None]:
    if scores is None:
        return [None] * len(encoded)
    unread = torch.tensor([text.unread for group in encoded for text in group], dtype=torch.bool)
    return list(scores.masked_fill(unread, torch.nan).split([len(group) for group in encoded]))


def _equal_texts(groups: Sequence[Sequence[Response]], layout: PairLayout) -> Tensor:
    """(Q,) bool: the pair's responses are equal."""
    known: dict[Hashable, int] = {}
    ids = torch.tensor([known.setdefault(content_key(text), len(known)) for group in groups for text in group])
    return ids[layout.first] == ids[layout.second]
