"""PPE, Preference Proxy Evaluations (Frick et al. 2024): human preference pairs, and pools of sampled answers.

**Pairs**: accuracy on what people preferred, ties left out. **Best of k**: for each prompt a pool of K answers that are
right or wrong. Accuracy is over pairs of a right and a wrong answer (those that the rows list, else all). Best of k is
what the answer of highest score among k drawn from the pool is worth, expected over all draws in closed form instead of
sampled; its ceiling is the same with the best answer chosen. AUC is within a prompt, meaned over prompts that have both
kinds, so that it means the same for models whose scores do not compare between prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.benchmarks.fields import id_of, one_of, prompt_of, response_of, responses_of, text_of
from rmcore.evaluation.benchmarks.item import (
    Benchmark,
    Context,
    CountedPairs,
    Item,
    Matrix,
    Score,
    group_mean,
    half_point,
    mean_of,
)
from rmcore.evaluation.statistics import auroc

__all__ = ["BEST_OF_K", "DOMAINS", "PAIRS", "best_of_k"]

_WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)")


def _read_pair(row: Mapping[str, Any], context: Context) -> Item | None:
    responses = (response_of(row, "response_1"), response_of(row, "response_2"))
    winner = one_of(row, "winner", _WINNERS)
    prompt = prompt_of(row)
    if winner.startswith("tie"):
        return None
    quality = (1.0, 0.0) if winner == "model_a" else (0.0, 1.0)
    return Item(id_of(row, "question_id", context), prompt, responses, quality, "human preference")


def _credit_pair(pairs: CountedPairs, margin: Matrix) -> Matrix:
    return half_point(margin)[:, None]


def _scores_pair(
    items: Sequence[Item], credit: Matrix, weight: Matrix, own_scores: Sequence[Matrix] | None
) -> list[Score]:
    return [Score("overall", "Accuracy", group_mean(credit[:, 0], np.full(len(items), True), weight), len(items))]


PAIRS = Benchmark(
    name="ppe-pairs",
    title="PPE, human preference",
    about="lmarena-ai/PPE-Human-Preference-V1, arXiv:2410.14872; 16,038 rows",
    data=("hf://lmarena-ai/PPE-Human-Preference-V1:test",),
    read=_read_pair,
    credit=_credit_pair,
    scores=_scores_pair,
    own=("response_1", "response_2"),
    results=("sampled_conflict_pairs", "score_1"),
)


# -- best of k -------------------------------------------------------------------------------------------------------

DOMAINS = {"MMLU-Pro": "mmlu", "MATH": "math", "GPQA": "gpqa", "MBPP-Plus": "mbpp", "IFEval": "ifeval"}
"""Domain → what the name of its file or data set holds."""
_RESPONSE = re.compile(r"response_(\d+)")


def best_of_k(score: Matrix, quality: Matrix, k: int) -> float:
    """Expected quality of the answer of highest score among k of K answers drawn without replacement.

    Answers of equal score are chosen with equal probability. With ``score = quality`` it is the ceiling; k = 1 is the
    mean quality, whatever the scores.
    """
    size = len(score)
    if not 1 <= k <= size:
        reject("k", k, f"1 to {size}, the number of answers")
    total, above, draws = 0.0, 0, math.comb(size, k)
    for value in np.unique(score)[::-1]:
        own = score == value
        upto = above + int(own.sum())
        chance = (math.comb(size - above, k) - math.comb(size - upto, k)) / draws
        total += chance * float(quality[own].mean())
        above = upto
    return total


def _domain(row: Mapping[str, Any], context: Context) -> str:
    told = text_of(row, "benchmark") if row.get("benchmark") is not None else context.source
    places = {name: told.lower().rfind(sign) for name, sign in DOMAINS.items()}
    found = max(places, key=lambda name: places[name])
    if places[found] < 0:
        reject("benchmark", f"none, and {told!r:.80} as the file", f"a file named after {', '.join(DOMAINS)}")
    return found


def _read_pool(row: Mapping[str, Any], context: Context) -> Item | None:
    numbers = sorted(int(match[1]) for name in row if (match := _RESPONSE.fullmatch(str(name))))
    if numbers:
        if numbers != list(range(1, len(numbers) + 1)):
            reject("response_1, response_2, ...", f"the numbers {numbers[:8]}", "1 to K, each once")
        responses = tuple(response_of(row, f"response_{k}") for k in numbers)
    else:
        responses = responses_of(row, "responses")
    quality = _quality(row, len(responses))
    pairs = _conflicts(row, quality)
    own = f"{id_of(row, 'question_id', context)}/{row.get('model_name') or ''}".rstrip("/")
    return Item(own, prompt_of(row), responses, quality, _domain(row, context), pairs)


def _quality(row: Mapping[str, Any], count: int) -> tuple[float, ...]:
    given = row.get("scores")
    if not isinstance(given, (list, tuple)) or len(given) != count:
        what = f"{len(given)} values" if isinstance(given, (list, tuple)) else type(given).__name__
        reject("scores", what, f"a list of {count}, one a response: whether it is right")
    for k, value in enumerate(given):
        if not isinstance(value, (bool, Real)) or not 0 <= float(value) <= 1:
            reject(f"scores[{k}]", repr(value)[:40], "true, false, or a number in [0, 1]")
    return tuple(float(value) for value in given)


def _conflicts(row: Mapping[str, Any], quality: Sequence[float]) -> tuple[tuple[int, int], ...]:
    given = row.get("sampled_conflict_pairs")
    pairs = []
    for k, pair in enumerate(given or ()):
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(i, int) and 0 <= i < len(quality) for i in pair)
            or quality[pair[0]] == quality[pair[1]]
        ):
            reject(f"sampled_conflict_pairs[{k}]", repr(pair)[:40], "numbers of a right and a wrong response, from 0")
        i, j = pair
        pairs.append((i, j) if quality[i] > quality[j] else (j, i))
    return tuple(pairs)


def _credit_pool(pairs: CountedPairs, margin: Matrix) -> Matrix:
    return np.stack([pairs.sum(half_point(margin)), pairs.count], axis=1)


def _scores_pool(
    items: Sequence[Item], credit: Matrix, weight: Matrix, own_scores: Sequence[Matrix] | None
) -> list[Score]:
    domain = np.array([item.subset for item in items], dtype=object)
    columns = {} if own_scores is None else _columns(items, own_scores)
    found: dict[str, list[Score]] = {}
    for name in DOMAINS:
        member = domain == name
        if not member.any():
            continue
        own = {"accuracy": group_mean(credit[:, 0], member, weight, credit[:, 1])}
        for metric, value in columns.items():
            known = member & ~np.isnan(value)
            own[metric] = group_mean(np.nan_to_num(value), known, weight)
        for metric, value in own.items():
            found.setdefault(metric, []).append(Score("section", f"{name}, {metric}", value, int(member.sum())))
    overall = [
        Score("overall", metric, mean_of([score.value for score in scores]), len(items))
        for metric, scores in found.items()
    ]
    return overall + [score for scores in found.values() for score in scores]


def _columns(items: Sequence[Item], own_scores: Sequence[Matrix]) -> dict[str, Matrix]:
    """(N,) numbers by metric: AUC (NaN where all answers are right, or all wrong), and best of k for powers of 2."""
    most = min(len(item.responses) for item in items)
    ks = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    qualities = [np.asarray(item.quality) for item in items]
    columns = {"AUC": np.array([_auc(s, q) for s, q in zip(own_scores, qualities, strict=True)])}
    for k in ks:
        values = [best_of_k(score, quality, k) for score, quality in zip(own_scores, qualities, strict=True)]
        columns[f"best of {k}"] = np.array(values)
    columns[f"ceiling of {most}"] = np.array([best_of_k(quality, quality, most) for quality in qualities])
    return columns


def _auc(score: Matrix, quality: Matrix) -> float:
    right = quality == quality.max()
    return float("nan") if right.all() else auroc(score, right)


BEST_OF_K = Benchmark(
    name="ppe-best-of-k",
    title="PPE, correctness (best of k)",
    about="lmarena-ai/PPE-*-Best-of-K, arXiv:2410.14872; five domains, pools of 32 answers",
    data=tuple(
        f"hf://lmarena-ai/PPE-{name}-Best-of-K:train" for name in ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval")
    ),
    read=_read_pool,
    credit=_credit_pool,
    scores=_scores_pool,
    own=("response_1", "responses"),
    results=("winner", "score_1"),
)
