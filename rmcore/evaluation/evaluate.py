"""From a head and labelled pairs to an evaluation: what ``rmcore evaluate``, the demo and the quality report share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmcore._base.errors import InputError
from rmcore.evaluation.statistics import EvaluationReport, PairEvaluation, evaluate
from rmcore.evaluation.streams import LabelledPair
from rmcore.head.frozen import FrozenHead
from rmcore.model.backbone import Backbone
from rmcore.model.reward_model import Progress
from rmcore.model.text import EncodedText
from rmcore.ops.reference import concat_preference, uncertainty

__all__ = ["PairStates", "encode_pairs", "evaluate_head", "recorded_preference"]


@dataclass(frozen=True)
class PairStates:
    """Hidden states of N labelled pairs.

    Attributes:
        hidden: (N, 2, h): first and second response (difference mode), or both orders of the pair (concat mode).
        tokens: (N, 2) content tokens of the two texts encoded.
    """

    hidden: Tensor
    tokens: Tensor

    def __getitem__(self, index: Tensor | Sequence[int]) -> PairStates:
        rows = torch.as_tensor(index, dtype=torch.long)
        return PairStates(self.hidden[rows], self.tokens[rows])


def encode_pairs(
    backbone: Backbone, pairs: Sequence[LabelledPair], mode: str, *, progress: Progress | None = None
) -> PairStates:
    """Encode labelled pairs; a text that occurs in several of them is encoded once."""
    texts: list[EncodedText] = []
    encode = backbone.encoder.encode
    for k, pair in enumerate(pairs):
        try:
            if mode == "difference":
                texts += [encode(pair.prompt, pair.first), encode(pair.prompt, pair.second)]
            else:
                texts += [
                    encode(pair.prompt, pair.first, pair.second),
                    encode(pair.prompt, pair.second, pair.first),
                ]
        except InputError as error:
            raise InputError(f"pairs[{k}]: {error}") from error
    note = None if progress is None else (lambda done, total: progress("encoding", done, total))
    hidden = backbone.hidden(texts, progress=note)
    tokens = torch.tensor([text.content_tokens for text in texts], dtype=torch.float64)
    return PairStates(hidden.view(len(pairs), 2, -1), tokens.view(-1, 2))


def evaluate_head(
    head: FrozenHead,
    states: PairStates,
    pairs: Sequence[LabelledPair],
    *,
    train: Tensor | None = None,
    judge: Sequence[float] | None = None,
    fractions: Sequence[float] = (0.10, 0.25, 0.45),
    replicates: int = 1000,
    seed: int = 0,
) -> EvaluationReport:
    """Evaluate a head on labelled pairs, beside the controls any claim about u must be held against.

    Args:
        head: the head, in the mode ``states`` were encoded for.
        states: of ``pairs``.
        pairs: labelled pairs.
        train: (R, h) hidden rows the head was fitted on, for the control "distance to the nearest training row".
        judge: the judge's preference a pair, NaN for none; default: a judge that is always right, under which uplift
            over random routing depends on the routing alone.
        fractions: of pairs judged, at which uplift is reported.
        replicates: bootstrap replicates, clustered by prompt.
        seed: of the bootstrap.
    """
    count = len(pairs)
    if head.config.mode == "difference":
        scores = head.score_pairs(states.hidden.flatten(0, 1), torch.full((count,), 2, dtype=torch.int64))
        g, u = scores.logit.double(), scores.uncertainty.double()
    else:
        rows = head.score(states.hidden.flatten(0, 1))
        logit, spread = (t.double().view(count, 2) for t in (rows.logit, rows.variance))
        u_both = uncertainty(spread, head.weights.amplitude)
        order = torch.zeros(count, 2, 2, dtype=torch.float64, device=logit.device)
        width = order.clone()
        order[:, 0, 1], order[:, 1, 0] = (logit / u_both).unbind(1)
        width[:, 0, 1], width[:, 1, 0] = u_both.unbind(1)
        preference, width = concat_preference(order, width)
        u = width[:, 0, 1]
        g = preference[:, 0, 1] * u
    labels = np.array([pair.label for pair in pairs])
    decided = np.where(labels == 0.5, 0.0, np.sign(labels - 0.5))
    clusters = {key: k for k, key in enumerate(dict.fromkeys(str(pair.prompt) for pair in pairs))}
    return evaluate(
        PairEvaluation(
            logit=g.cpu().numpy(),
            label=labels,
            uncertainty=u.cpu().numpy(),
            cluster=np.array([clusters[str(pair.prompt)] for pair in pairs]),
            judge=decided if judge is None else np.asarray(judge, dtype=np.float64),
            controls=_controls(states, train, head.config.mode),
        ),
        fractions=tuple(fractions),
        replicates=replicates,
        seed=seed,
    )


def recorded_preference(pair: LabelledPair) -> float:
    """The recorded judge's preference for ``first`` in [−1, 1], both orders averaged; NaN where none was recorded."""
    if pair.verdicts is None:
        return float("nan")
    words = {"win": 1.0, "loss": -1.0, "tie": 0.0}
    known = [words[v] for v in pair.verdicts if v is not None]
    return float(np.mean(known)) if known else float("nan")


def _controls(states: PairStates, train: Tensor | None, mode: str) -> dict[str, np.ndarray]:
    hidden = states.hidden.double()
    controls = {}
    if train is not None:
        nearest = torch.cdist(hidden.flatten(0, 1), train.double().to(hidden.device)).amin(dim=1).view(-1, 2)
        controls["nearest training row"] = nearest.amax(dim=1).cpu().numpy()
    if mode == "difference":
        controls["‖e₁ − e₂‖"] = (hidden[:, 0] - hidden[:, 1]).norm(dim=1).cpu().numpy()
        controls["|length difference|"] = (states.tokens[:, 0] - states.tokens[:, 1]).abs().numpy()
    return controls
