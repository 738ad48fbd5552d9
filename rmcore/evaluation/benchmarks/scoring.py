"""A model's answers to a benchmark's items, and the report that they make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from rmcore._base.errors import InputError, reject
from rmcore.evaluation.benchmarks.item import Benchmark, CountedPairs, Item, Matrix, Score
from rmcore.evaluation.benchmarks.report import BenchmarkReport, ScoreLine
from rmcore.evaluation.statistics import Interval, bootstrap_bounds
from rmcore.model.response_scores import ResponseScores
from rmcore.model.reward_model import RewardModel

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
    """

    pairs: CountedPairs
    margin: Matrix
    uncertainty: Matrix
    scores: tuple[Matrix, ...]


def score_items(
    model: RewardModel, items: Sequence[Item], *, progress: Callable[[int, int], None] | None = None
) -> Answers:
    """Score all responses: one pass over each of them in difference mode, over all ordered pairs in concat mode.

    Args:
        model: its backbone's state cache is used where it has one.
        items: of one benchmark.
        progress: called with (items done, items in all).

    Raises:
        InputError: naming the item: a response is too long under the policy ``error``, or left unread under
            ``no-reward``: a benchmark's rules need a score of each.
    """
    scores: list[Matrix] = []
    margins: list[Matrix] = []
    uncertainties: list[Matrix] = []
    for start in range(0, len(items), CHUNK):
        chunk = items[start : start + CHUNK]
        for item, said in zip(chunk, _said(model, chunk), strict=True):
            own, margin = _numbers(item, said)
            better, worse = np.array(item.pairs, dtype=np.intp).reshape(-1, 2).T
            scores.append(own)
            margins.append(margin[better, worse])
            uncertainties.append(said.uncertainty.numpy()[better, worse])
        if progress is not None:
            progress(min(start + CHUNK, len(items)), len(items))
    return Answers(CountedPairs(tuple(items)), np.concatenate(margins), np.concatenate(uncertainties), tuple(scores))


def _said(model: RewardModel, items: Sequence[Item]) -> list[ResponseScores]:
    try:
        return model.score([item.prompt for item in items], [item.responses for item in items])
    except InputError:
        for item in items:  # again one by one: the error then has the item's name
            try:
                model.score([item.prompt], [item.responses])
            except InputError as error:
                raise InputError(f"item {item.id} ({item.subset}): {error}") from error
        raise


def _numbers(item: Item, said: ResponseScores) -> tuple[Matrix, Matrix]:
    """(K,) scores and (K, K) margins; 0 where the inputs of two responses are equal."""
    if said.scores is not None:
        own = said.scores.double().numpy()
        margin = own[:, None] - own[None, :]
    else:
        own = torch.nan_to_num(said.rewards, nan=0.0).double().numpy()
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
