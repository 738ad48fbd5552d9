"""From a head and labelled pairs to a report: what ``rmcore evaluate``, the demo and the quality report share.

:func:`evaluate_head` scores pairs with a head; :func:`evaluate_pairs` takes scores from anywhere. The statistics are in
``statistics``, what they are put into in ``report``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rmcore._base.errors import InputError, reject
from rmcore._base.progress import Progress
from rmcore._base.prompt import content_key
from rmcore.engine.pair_table import PairTable
from rmcore.evaluation.report import Array, EvaluationReport, ScoredPairs, ScoreReport, Uplift, as_vector
from rmcore.evaluation.statistics import (
    FRACTIONS,
    Interval,
    accuracy_cost_curve,
    auroc,
    correctness,
    expected_calibration_error,
    judge_gains,
    log_loss,
    mean_with_interval,
    normal_quantile,
    rank_sum,
    reliability_curve,
    risk_coverage,
    spearman,
    uplift_over_random,
)
from rmcore.evaluation.streams import StreamPair
from rmcore.head.apart import pairs_apart, rows_apart
from rmcore.head.estimators import PairEstimate, PairEstimator, VarianceKind
from rmcore.head.frozen import FrozenHead
from rmcore.model.backbone import Backbone
from rmcore.model.critiques import StateCounts, behind_critique, critiqued_texts, merged_texts, read_critiques
from rmcore.model.signal import PairSignal, fill_unread, pair_signal
from rmcore.model.text import EncodedText
from rmcore.model.training_pairs import encode_pair
from rmcore.model.uncertainties import estimate_pairs
from rmcore.ops import reference
from rmcore.ops.pair_layout import PairLayout

__all__ = ["PairStates", "encode_pairs", "evaluate_head", "evaluate_pairs", "recorded_preference", "scored_pairs"]

BAND_FRACTIONS = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True)
class PairStates:
    """Hidden states of N labelled pairs.

    Attributes:
        hidden: (N, 2, h): first and second response (difference mode), or both orders of the pair (concat mode).
        tokens: (N, 2) content tokens of the two texts encoded.
        states: with critiques how many states each pair's two responses have; ``hidden`` is (R, h) then, all states of
            the first pair, then of the second, and so on.
        silent: (N,) bool, True where the inputs tell nothing (:mod:`rmcore.model.signal`): two different responses
            whose texts are equal, or an unread one. Default: nowhere.
        noise: (N, 2) the variance that a published model of several attributes sees in each response itself, NaN where
            it is unread; None for all others.
    """

    hidden: Tensor
    tokens: Tensor
    silent: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    noise: Tensor | None = None
    states: StateCounts | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not len(self.silent):
            object.__setattr__(self, "silent", torch.zeros(len(self.tokens), dtype=torch.bool))

    @property
    def flat(self) -> Tensor:
        """(R, h) all rows."""
        return self.hidden if self.states is not None else self.hidden.flatten(0, 1)

    @property
    def pairs(self) -> Tensor:
        """(N, 2, h): of several states of a response their mean, for what looks at distances."""
        if self.states is None:
            return self.hidden
        counts = self.states.flat.to(self.hidden.device)
        owner = torch.repeat_interleave(counts)
        total = torch.zeros(len(counts), self.hidden.shape[1], dtype=self.hidden.dtype, device=self.hidden.device)
        return (total.index_add_(0, owner, self.hidden) / counts[:, None]).view(-1, 2, self.hidden.shape[1])

    def __getitem__(self, index: Tensor | Sequence[int]) -> PairStates:
        rows = torch.as_tensor(index, dtype=torch.long)
        noise = None if self.noise is None else self.noise[rows]
        if self.states is None:
            return PairStates(self.hidden[rows], self.tokens[rows], self.silent[rows], noise)
        parts = self.hidden.split(self.states.rows.tolist())
        hidden = torch.cat([parts[k] for k in rows.tolist()])
        return PairStates(hidden, self.tokens[rows], self.silent[rows], noise, states=self.states.part(rows.tolist()))


def encode_pairs(
    backbone: Backbone,
    pairs: Sequence[StreamPair],
    mode: str,
    *,
    critiques: Sequence[Sequence[Sequence[str]]] | None = None,
    progress: Progress | None = None,
) -> PairStates:
    """Encode labelled pairs; a text that occurs in several of them is encoded once.

    With ``critiques``, of each pair those of its first and of its second response, each response is read behind each
    of its own, in concat mode of one at most (:mod:`rmcore.model.critiques`). Raises InputError for what is no
    critique, and for a pair that cannot be encoded, naming it.
    """
    if critiques is not None:
        known = read_critiques(critiques, [(pair.first, pair.second) for pair in pairs])
        if mode == "difference":
            return _encode_critiqued(backbone, pairs, known, progress)
        pairs = [
            replace(pair, first=behind_critique(pair.first, first), second=behind_critique(pair.second, second))
            for pair, (first, second) in zip(pairs, known, strict=True)
        ]
    texts: list[EncodedText] = []
    silent: list[bool] = []
    for k, pair in enumerate(pairs):
        try:
            own = encode_pair(backbone, pair.prompt, pair.first, pair.second, mode)
            texts += own
            silent.append(pair_signal(own, mode) != PairSignal.PRESENT and not _equal(pair, own))
        except InputError as error:
            raise InputError(f"pairs[{k}]: {error}") from error
    note = None if progress is None else (lambda done, total: progress("encoding", done, total))
    rows, said = backbone.hidden_and_attributes(texts, progress=note)
    hidden = fill_unread(rows, [texts[k : k + 2] for k in range(0, len(texts), 2)])
    noise = None if said is None or mode != "difference" else said.score_variance
    tokens = torch.tensor([text.content_tokens for text in texts], dtype=torch.float64)
    states = hidden.view(len(pairs), 2, -1)
    equal = torch.tensor([content_key(pair.first) == content_key(pair.second) for pair in pairs], dtype=torch.bool)
    alike = (states[:, 0] == states[:, 1]).all(-1).cpu() & ~equal  # although the texts are not
    return PairStates(
        states,
        tokens.view(-1, 2),
        torch.tensor(silent, dtype=torch.bool) | alike,
        None if noise is None else noise.view(-1, 2),
    )


def _encode_critiqued(
    backbone: Backbone,
    pairs: Sequence[StreamPair],
    said: Sequence[Sequence[tuple[str, ...]]],
    progress: Progress | None,
) -> PairStates:
    mode = "difference"
    states = StateCounts.of(said)
    texts: list[list[EncodedText]] = []
    silent, tokens = [], []
    for k, (pair, own, counts) in enumerate(zip(pairs, said, states.counts, strict=True)):
        try:
            texts.append(critiqued_texts(backbone.encoder, pair.prompt, (pair.first, pair.second), own))
        except InputError as error:
            raise InputError(f"pairs[{k}]: {error}") from error
        both = merged_texts(texts[-1], counts)
        silent.append(pair_signal(both, mode) != PairSignal.PRESENT and not _equal(pair, both))
        tokens.append([text.content_tokens for text in both])
    note = None if progress is None else (lambda done, total: progress("encoding", done, total))
    hidden = fill_unread(backbone.hidden([text for own in texts for text in own], progress=note), texts)
    return PairStates(
        hidden, torch.tensor(tokens, dtype=torch.float64), torch.tensor(silent, dtype=torch.bool), states=states
    )


def _equal(pair: StreamPair, texts: Sequence[EncodedText]) -> bool:
    """Equal responses, read: that there is nothing between them is known."""
    return content_key(pair.first) == content_key(pair.second) and not any(text.unread for text in texts)


def evaluate_head(
    head: FrozenHead,
    states: PairStates,
    pairs: Sequence[StreamPair],
    *,
    train: Tensor | None = None,
    judge: Sequence[float] | None = None,
    fractions: Sequence[float] = (0.10, 0.25, 0.45),
    replicates: int = 1000,
    seed: int = 0,
) -> EvaluationReport:
    """Evaluate a head on labelled pairs, beside the controls any claim about u must be held against.

    :func:`scored_pairs` and :func:`evaluate_pairs` in one.

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
    scored = scored_pairs(head, states, pairs, train=train, judge=judge)
    return evaluate_pairs(scored, fractions=tuple(fractions), replicates=replicates, seed=seed)


def scored_pairs(
    head: FrozenHead,
    states: PairStates,
    pairs: Sequence[StreamPair],
    *,
    train: Tensor | None = None,
    judge: Sequence[float] | None = None,
    apart: bool = False,
    uncertainty: PairEstimator | None = None,
    variance: VarianceKind | None = None,
) -> ScoredPairs:
    """What a head says of labelled pairs, with the controls; arguments as of :func:`evaluate_head`.

    ``apart`` calls the head a pair at a time, so that no bit of a pair's score depends on the others. ``uncertainty``
    is an estimator that says it in the head's place, ``variance`` which part of it.

    Raises InputError for a part that is not told, and for either in concat mode.
    """
    count, served = len(pairs), None
    if uncertainty is not None or variance in ("aleatoric", "total"):
        if head.config.mode != "difference" or apart or states.states is not None:
            reject("uncertainty", "given in concat mode, with apart or with critiques", "the head's own")
        found = _estimated(head, states, uncertainty, variance)
        g, u = found.logit, reference.uncertainty(found.variance, reference.mean_field_amplitude())
        novelty = _as_seen(head, states)
        served = torch.sigmoid(found.preference).clamp(_TINY, 1 - _TINY)
    elif head.config.mode == "difference":
        sizes = torch.full((count,), 2, dtype=torch.int64) if states.states is None else states.states.rows
        score_pairs = partial(pairs_apart, head) if apart else head.score_pairs
        scores = score_pairs(states.flat, sizes, novelty=head.rows is not None)
        g, u = scores.logit.double(), scores.uncertainty.double()
        novelty = None if scores.novelty is None else scores.novelty.double()
        if states.states is not None:
            mixed = states.states.pairs(scores.logit, scores.variance)
            g, u = mixed.logit, reference.uncertainty(mixed.variance, head.config.resolved_amplitude)
            if scores.row_novelty is not None:
                novelty = states.states.mean(scores.row_novelty.double()).view(-1, 2).mean(1)
    else:
        rows = (partial(rows_apart, head) if apart else head.score)(states.hidden.flatten(0, 1))
        table = PairTable.of_concat(rows, PairLayout([2] * count), "both", head.config.order_mean)
        u = table.uncertainty
        g, novelty = table.preference * u, None
    if bool(states.silent.any()):  # no preference, and as uncertain as the most uncertain: the engine routes them first
        silent = states.silent.to(u.device)
        g, u = g.masked_fill(silent, 0.0), _as_the_most(u, silent)
        novelty = None if novelty is None else _as_the_most(novelty, silent)
        served = None if served is None else served.masked_fill(silent, 0.5)
    labels = np.array([pair.label for pair in pairs])
    decided = np.where(labels == 0.5, 0.0, np.sign(labels - 0.5))
    clusters = {key: k for k, key in enumerate(dict.fromkeys(str(pair.prompt) for pair in pairs))}
    return ScoredPairs(
        logit=g.cpu().numpy(),
        label=labels,
        uncertainty=u.cpu().numpy(),
        cluster=np.array([clusters[str(pair.prompt)] for pair in pairs]),
        judge=decided if judge is None else np.asarray(judge, dtype=np.float64),
        probability=None if served is None else served.cpu().numpy(),
        controls=_controls(states, train, head.config.mode),
        novelty=None if novelty is None else novelty.cpu().numpy(),
    )


_TINY = float(np.finfo(np.float64).eps)  # σ may round to 0 or 1, of which no log-odds are left


def _estimated(
    head: FrozenHead, states: PairStates, estimator: PairEstimator | None, kind: VarianceKind | None
) -> PairEstimate:
    rows, sizes = states.hidden.flatten(0, 1), torch.full((len(states.hidden),), 2, dtype=torch.int64)
    noise = None if states.noise is None else states.noise.flatten().nan_to_num()  # unread ones are silent

    def own(hidden: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        scores = head.score_pairs(hidden, groups)
        return scores.logit.cpu(), scores.variance.cpu()

    return estimate_pairs(head, rows, sizes, estimator, own, variance=kind, noise=noise)


def _as_seen(head: FrozenHead, states: PairStates) -> Tensor | None:
    if head.rows is None:
        return None
    return head.novelty(states.hidden.flatten(0, 1)).double().view(-1, 2).mean(1).cpu()


def _as_the_most(score: Tensor, silent: Tensor) -> Tensor:
    """``score`` with the largest of the other pairs' at those of which nothing is known."""
    return torch.where(silent, score[~silent].max(), score) if bool((~silent).any()) else score


def evaluate_pairs(
    pairs: ScoredPairs,
    *,
    fractions: Sequence[float] = FRACTIONS,
    replicates: int = 1000,
    level: float = 0.95,
    bins: int = 10,
    seed: int = 0,
) -> EvaluationReport:
    """Judge the head, then every score as a router: u, margin -|g|, their rank sum, novelty, the controls, and random.

    AUROC is of the head's errors; pairs it gives no preference on (g = 0) are neither and are left out of that one.

    Args:
        pairs: what the head, the judge and the labels say.
        fractions: shares of pairs judged, in [0, 1], at which routing is told.
        replicates: of the bootstrap over prompts; 0 for no intervals.
        level: of the intervals.
        bins: of the calibration errors and the reliability curve.
        seed: of the bootstrap.

    Raises:
        InputError: nothing but ties, or an argument out of its bounds.
    """
    keep = pairs.decided()
    if not keep.any():
        reject("label", f"{len(pairs)} ties and nothing else", "at least one pair with label 0 or 1")
    label, logit = pairs.label[keep], pairs.logit[keep]
    head = correctness(logit, label)
    judge = np.ones(label.size) if pairs.judge is None else correctness(pairs.judge[keep], label)
    cluster = np.unique(pairs.cluster[keep], return_inverse=True)[1]
    u, margin = pairs.uncertainty[keep], -np.abs(logit)
    scores: dict[str, Array] = {"u": u, "margin": margin, "rank_sum": rank_sum(u, margin)}
    if pairs.novelty is not None:
        scores["novelty"] = pairs.novelty[keep]
    scores |= {name: score[keep] for name, score in pairs.controls.items()} | {"random": np.zeros(label.size)}
    interval = Interval(cluster, replicates, level, seed)
    asked = tuple(as_vector("fractions", fractions, low=0, high=1).tolist())
    no_verdict = np.isnan(judge)
    probability = np.asarray(pairs.probability)[keep]
    return EvaluationReport(
        n_pairs=len(pairs),
        n_decided=label.size,
        n_prompts=int(cluster.max()) + 1,
        accuracy=mean_with_interval(head, interval),
        log_loss=log_loss(pairs.served_logit[keep], label),
        log_loss_logit=log_loss(logit, label),
        ece_equal_mass=expected_calibration_error(probability, label, bins=bins, binning="mass"),
        ece_equal_width=expected_calibration_error(probability, label, bins=bins, binning="width"),
        reliability=reliability_curve(probability, label, bins=bins, level=level),
        judge="oracle" if pairs.judge is None else "given verdicts",
        judge_accuracy=float("nan") if no_verdict.all() else float(np.nanmean(judge)),
        n_no_verdict=int(no_verdict.sum()),
        scores=tuple(_score_report(name, score, u, head, judge, asked, interval) for name, score in scores.items()),
        level=level,
        replicates=replicates,
        seed=seed,
    )


def recorded_preference(pair: StreamPair) -> float:
    """The recorded judge's preference for ``first`` in [−1, 1], both orders averaged; NaN where none was recorded."""
    if pair.verdicts is None:
        return float("nan")
    words = {"win": 1.0, "loss": -1.0, "tie": 0.0}
    known = [words[v] for v in pair.verdicts if v is not None]
    return float(np.mean(known)) if known else float("nan")


def _controls(states: PairStates, train: Tensor | None, mode: str) -> dict[str, np.ndarray]:
    hidden = states.pairs.double()
    controls = {}
    if train is not None:
        nearest = torch.cdist(hidden.flatten(0, 1), train.double().to(hidden.device)).amin(dim=1).view(-1, 2)
        controls["nearest training row"] = nearest.amax(dim=1).cpu().numpy()
    if mode == "difference":
        controls["‖e₁ − e₂‖"] = (hidden[:, 0] - hidden[:, 1]).norm(dim=1).cpu().numpy()
        controls["|length difference|"] = (states.tokens[:, 0] - states.tokens[:, 1]).abs().numpy()
    return controls


def _score_report(
    name: str, score: Array, u: Array, head: Array, judge: Array, fractions: tuple[float, ...], interval: Interval
) -> ScoreReport:
    steps = uplift_over_random(
        score,
        head,
        judge,
        fractions + BAND_FRACTIONS,
        cluster=interval.cluster,
        replicates=0 if name == "random" else interval.replicates,
        level=interval.level,
        seed=interval.seed,
    )
    if name == "random":
        steps = _random_orders(steps, judge_gains(score, head, judge)[2], interval.level)
    certain = head != 0.5
    return ScoreReport(
        name=name,
        uplift=steps[: len(fractions)],
        band=steps[len(fractions) :],
        auroc=auroc(score[certain], head[certain] == 0) if certain.any() else float("nan"),
        rank_correlation_with_u=spearman(score, u),
        curve=accuracy_cost_curve(score, head, judge),
        risk_coverage=risk_coverage(score, head),
    )


def _random_orders(steps: tuple[Uplift, ...], gain: Array, level: float) -> tuple[Uplift, ...]:
    """Bounds in which random orders fall: judging fN pairs drawn without replacement has variance f(1-f)·S²/N."""
    if gain.size < 2:
        return steps
    spread = 100.0 * normal_quantile(level) * float(np.sqrt(gain.var(ddof=1) / gain.size))
    bounds = [spread * (step.fraction * (1.0 - step.fraction)) ** 0.5 for step in steps]
    return tuple(replace(step, low=-bound, high=bound) for step, bound in zip(steps, bounds, strict=True))
