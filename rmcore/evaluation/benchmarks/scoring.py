"""A model's answers to a benchmark's items, and the report that they make."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Canonical, canonical_groups, text_length
from rmcore.engine.routing import Candidates
from rmcore.evaluation.benchmarks.estimators import HEAD, make_estimator
from rmcore.evaluation.benchmarks.item import Benchmark, CountedPairs, Item, Matrix, Score
from rmcore.evaluation.benchmarks.report import BenchmarkReport, ScoreLine
from rmcore.evaluation.statistics import Interval, bootstrap_bounds
from rmcore.head.estimators import VarianceKind
from rmcore.model.error_prior import row_distance
from rmcore.model.response_scores import ResponseScores
from rmcore.model.reward_model import RewardModel
from rmcore.model.signal import fill_unread
from rmcore.model.text import EncodedText
from rmcore.model.uncertainties import UNCERTAINTIES

__all__ = ["Answers", "benchmark_report", "score_items", "score_lines"]

CHUNK = 64  # items of a forward pass: keeps the hidden states of pools of 32 answers bounded


@dataclass(frozen=True)
class Answers:
    """What a model says of a benchmark's items.

    Attributes:
        pairs: the pairs that count, P of them.
        margin: (P,) the better response's score less the worse one's; in concat mode the pair's own logit.
        uncertainty: (P,) u; Inf where the model's inputs tell nothing of the pair.
        scores: (K,) of each item: its responses' own scores, or in concat mode the mean preference over the others.
        variance: (P,) v; Inf where u is. None where it is not known.
        columns: (P,) what else is known of pairs, by name: ``novelty``, ``distance``, ``log_length_ratio``
            (:class:`rmcore.engine.routing.Candidates`).
        preference: (K,) of each item: the mean preference p̃ of a response over the others, in logits.
        doubt: (K,) of each item: the mean u of a response's pairs, Inf where it has none.
        position_bias: (P,) of :class:`~rmcore.model.response_scores.ResponseScores`, concat mode only.
        tokens: (N,) tokens that the model reads of each item; None where that is not known.
        seconds: of the model's own, for all items, as the clock has it: little where hidden states were cached. NaN
            where that is not known.
    """

    pairs: CountedPairs
    margin: Matrix
    uncertainty: Matrix
    scores: tuple[Matrix, ...]
    variance: Matrix | None = None
    columns: Mapping[str, Matrix] = field(default_factory=dict)
    preference: tuple[Matrix, ...] = ()
    doubt: tuple[Matrix, ...] = ()
    position_bias: Matrix | None = None
    tokens: Matrix | None = None
    seconds: float = float("nan")

    def candidates(self) -> Candidates:
        """The pairs as routers take them, the better response first: no score of theirs goes by the order."""
        variance = (self.uncertainty**2 - 1) if self.variance is None else self.variance
        g, v, u = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (self.margin, variance, self.uncertainty))
        return Candidates(g, v, u, {name: torch.from_numpy(column) for name, column in self.columns.items()})


def score_items(
    model: RewardModel,
    items: Sequence[Item],
    *,
    estimator: str | None = None,
    variance: VarianceKind | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Score all responses: one pass over each of them in difference mode, over all ordered pairs in concat mode.

    Args:
        model: its backbone's state cache is used where it has one.
        items: of one benchmark.
        estimator: of pairs' g and v (:mod:`.estimators`); None for what the model is served with.
        variance: which part of it; None for all that it tells by itself.
        progress: called with (items done, items in all).

    Raises:
        InputError: naming the item: a response is too long under the policy ``error``, or left unread under
            ``no-reward``: a benchmark's rules need a score of each. Or an estimator that there is not.
    """
    reader = _Reader(model, estimator or model.uncertainty or HEAD, variance)
    for start in range(0, len(items), CHUNK):
        reader.read(items[start : start + CHUNK])
        if progress is not None:
            progress(min(start + CHUNK, len(items)), len(items))
    return reader.answers(items)


class _Reader:
    """Collects a model's answers chunk by chunk."""

    def __init__(self, model: RewardModel, estimator: str, variance: VarianceKind | None) -> None:
        self.model, self.name, self.variance = model, estimator, variance
        self.estimate = make_estimator(model, estimator)
        self.head = estimator in UNCERTAINTIES and model.estimator_named(estimator) is None
        self.knows_novelty = model.mode == "difference" and model.head.rows is not None
        prior = model.error_prior
        self.sketch = prior.sketch if prior is not None and model.mode == "difference" else None
        self.pairs: dict[str, list[Matrix]] = {}
        self.members: dict[str, list[Matrix]] = {}
        self.tokens: list[float] = []
        self.seconds = 0.0

    def read(self, items: Sequence[Item]) -> None:
        begun = time.perf_counter()
        encoded, groups = self._encoded(items)
        hidden, attributes = self.model.backbone.hidden_and_attributes([text for group in encoded for text in group])
        hidden = fill_unread(hidden, encoded)
        how: dict[str, Any] = {"uncertainty": self.name, "variance": self.variance, "attributes": attributes}
        if self.name not in UNCERTAINTIES:
            how = {"pairs": self.estimate(hidden, torch.tensor([len(group) for group in groups]))}
        found = self.model.scores_of(hidden, encoded, groups, **how)
        rows = self._row_columns(hidden, [len(group) for group in groups])
        for k, (item, said) in enumerate(zip(items, found, strict=True)):
            own, margin = _numbers(item, said, own_scores=self.head, pairwise=self.model.mode == "concat")
            at = tuple(np.array(item.pairs, dtype=np.intp).reshape(-1, 2).T)
            squares = {"margin": margin, "uncertainty": said.uncertainty.numpy(), "variance": said.variance.numpy()}
            if said.position_bias is not None:
                squares["position_bias"] = said.position_bias.numpy()
            for name, square in squares.items():
                self.pairs.setdefault(name, []).append(square[at])
            for name, columns in rows.items():
                self.pairs.setdefault(name, []).append((columns[k][at[0]] + columns[k][at[1]]) / 2)
            size = np.array([text_length(response) for response in groups[k]], dtype=float)
            self.pairs.setdefault("log_length_ratio", []).append(np.log1p(size)[at[0]] - np.log1p(size)[at[1]])
            count = len(own)
            mean = said.rewards.numpy() * count / (count - 1)  # over the others, as rloo_advantages has it
            for name, member in (("scores", own), ("preference", mean), ("doubt", said.response_uncertainty.numpy())):
                self.members.setdefault(name, []).append(member)
            self.tokens.append(float(sum(len(text.ids) for text in encoded[k] if not text.unread)))
        self.seconds += time.perf_counter() - begun

    def answers(self, items: Sequence[Item]) -> Answers:
        flat = {name: np.concatenate(parts).astype(np.float64) for name, parts in self.pairs.items()}
        silent = ~np.isfinite(flat["uncertainty"])
        for name in ("variance", *(name for name in ("novelty", "distance") if name in flat)):
            flat[name] = np.where(silent, np.inf, flat[name])
        return Answers(
            CountedPairs(tuple(items)),
            flat.pop("margin"),
            flat.pop("uncertainty"),
            tuple(self.members["scores"]),
            variance=flat.pop("variance"),
            position_bias=flat.pop("position_bias", None),
            columns=flat,
            preference=tuple(self.members["preference"]),
            doubt=tuple(self.members["doubt"]),
            tokens=np.array(self.tokens),
            seconds=self.seconds,
        )

    def _row_columns(self, hidden: Tensor, sizes: list[int]) -> dict[str, list[Matrix]]:
        """What is known of each response by itself, by name: an array a group."""
        found = {}
        if self.knows_novelty:
            found["novelty"] = self.model.head.novelty(hidden)
        if self.sketch is not None:
            found["distance"] = row_distance(hidden, self.sketch)
        return {name: [part.double().cpu().numpy() for part in row.split(sizes)] for name, row in found.items()}

    def _encoded(self, items: Sequence[Item]) -> tuple[list[list[EncodedText]], list[list[Canonical]]]:
        """The inputs, and the responses in canonical form."""

        def encoded(some: Sequence[Item]) -> tuple[list[list[EncodedText]], list[list[Canonical]]]:
            prompts, groups = canonical_groups([item.prompt for item in some], [item.responses for item in some])
            return self.model.encode_groups(prompts, groups), groups

        try:
            return encoded(items)
        except InputError:
            for item in items:  # again one by one: the error then has the item's name
                try:
                    encoded([item])
                except InputError as error:
                    raise InputError(f"item {item.id} ({item.subset}): {error}") from error
            raise


def _numbers(item: Item, said: ResponseScores, *, own_scores: bool, pairwise: bool) -> tuple[Matrix, Matrix]:
    """(K,) scores and (K, K) margins; 0 where the inputs of two responses are equal."""
    alone = said.scores if own_scores and said.scores is not None else torch.nan_to_num(said.rewards, nan=0.0)
    own = alone.double().numpy()
    if own_scores and said.scores is not None and not pairwise:
        margin = own[:, None] - own[None, :]
    else:
        margin = said.logit.double().numpy()
    if np.isnan(margin).any():
        reject(f"item {item.id}", "a response too long to be read", "a score of each", "--overlong truncate-right cuts")
    return own, margin


def score_lines(
    benchmark: Benchmark,
    pairs: CountedPairs,
    margin: Matrix,
    scores: Sequence[Matrix] | None,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[ScoreLine, ...]:
    """A benchmark's scores of (P,) margins and each item's own scores, with bounds that resample prompts."""
    credit = benchmark.credit(pairs, margin)

    def of(weight: Matrix) -> list[Score]:
        return benchmark.scores(pairs.items, credit, weight, scores)

    found = of(np.ones((1, len(pairs.items))))
    low, high = bounds_of(
        lambda weight: np.stack([s.value for s in of(weight)]), pairs.cluster, replicates, level, seed
    )
    low, high = (np.broadcast_to(bound, len(found)) for bound in (low, high))
    return tuple(
        ScoreLine(score.level, score.name, float(score.value[0]), float(lo), float(hi), score.items)
        for score, lo, hi in zip(found, low, high, strict=True)
    )


def bounds_of(
    statistic: Callable[[Matrix], Matrix], cluster: npt.NDArray[np.intp], replicates: int, level: float, seed: int
) -> tuple[Matrix, Matrix]:
    """Percentile bounds of weights (B, N) → (numbers, B); NaN with a single prompt or without replicates."""
    interval = Interval(cluster, replicates, level, seed)
    if not replicates or cluster.max() == 0:
        return np.array(np.nan), np.array(np.nan)
    with warnings.catch_warnings():  # a subset so small that some resample has none of it has no interval: NaN
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        return bootstrap_bounds(statistic, interval)


def benchmark_report(
    benchmark: Benchmark,
    answers: Answers,
    *,
    model: str,
    mode: str,
    sources: Sequence[str],
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> BenchmarkReport:
    """The report of a model's answers."""
    lines = score_lines(
        benchmark, answers.pairs, answers.margin, answers.scores, replicates=replicates, level=level, seed=seed
    )
    return BenchmarkReport(
        benchmark=benchmark.name,
        title=benchmark.title,
        model=model,
        mode=mode,
        sources=tuple(sources),
        items=len(answers.pairs.items),
        pairs=len(answers.pairs),
        ties=int((answers.margin == 0).sum()),
        lines=lines,
        level=level,
        replicates=replicates,
        seed=seed,
    )
