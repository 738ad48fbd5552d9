"""RMB (Zhou et al. 2025): pairs and best-of-n lists over helpful and harmless scenarios.

Pairwise accuracy, no preference counts half; a best-of-n list counts where the winner beats every loser. The score is
the mean of the four parts (pairs and lists, helpful and harmless). The goal and scenario of a row are its columns, its
``category_path``, or the folders that its file is in. Its rows have no licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import Prompt, Response
from rmcore.evaluation.benchmarks.fields import id_of, prompt_of
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

__all__ = ["BENCHMARK", "GOALS"]

GOALS = ("Helpfulness", "Harmlessness")
# What WildChat, whose conversations these are, says about a message; RMB's files have kept the language.
_ABOUT = frozenset(
    {"language", "country", "hashed_ip", "header", "redacted", "state", "timestamp", "toxic", "turn_identifier"}
)
_KINDS = ("pairs", "best of n")


def _read(row: Mapping[str, Any], context: Context) -> Item:
    if row.get("bon_best") is not None:
        losers = row.get("loser_list")
        if not isinstance(losers, (list, tuple)) or not losers:
            reject("loser_list", "an empty list" if losers == [] else type(losers).__name__, "a list of answers")
        best = _answer(row["bon_best"], "bon_best")
        worse = [_answer(loser, f"loser_list[{k}]") for k, loser in enumerate(losers)]
        kind, name = _KINDS[1], "bon_uid"
    else:
        best, worse = _answer(row.get("chosen"), "chosen"), [_answer(row.get("reject"), "reject")]
        kind, name = _KINDS[0], "pair_uid"
    goal, scenario = _category(row, context)
    quality = (1.0,) + (0.0,) * len(worse)
    return Item(id_of(row, name, context), _prompt(row), (best, *worse), quality, f"{goal}|{kind}|{scenario}")


def _prompt(row: Mapping[str, Any]) -> Prompt:
    """The conversation, without what is known about its messages."""
    name = "prompt" if row.get("conversation_input") is None and row.get("prompt") is not None else "conversation_input"
    given = row.get(name)
    if isinstance(given, (list, tuple)):
        given = [
            {field: said for field, said in turn.items() if field not in _ABOUT} if isinstance(turn, Mapping) else turn
            for turn in given
        ]
    return prompt_of({**row, name: given}, name)


def _answer(value: Any, name: str) -> Response:
    if value is None:
        raise InputError(f"{name}: missing")
    answer = value.get("answer") if isinstance(value, Mapping) else value
    if not isinstance(answer, str):
        reject(f"{name}.answer" if isinstance(value, Mapping) else name, type(answer).__name__, "a text")
    return answer


def _category(row: Mapping[str, Any], context: Context) -> tuple[str, str]:
    """Goal and scenario: of the columns, else of the path to the file."""
    if isinstance(row.get("goal"), str):
        told = [row["goal"], str(row.get("scenario") or "-")]
    else:
        path = row.get("category_path")
        told = list(PurePath(path if isinstance(path, str) else context.source).parts)
    at = [(k, goal) for k, part in enumerate(told) for goal in GOALS if part.lower().startswith(goal[:-4].lower())]
    if not at:
        reject("goal", repr(row.get("goal", context.source))[:80], f"{' or '.join(GOALS)}, as column or folder")
    k, goal = at[-1]
    return goal, "/".join(PurePath(step).stem for step in told[k + 1 :]) or "-"


def _credit(pairs: CountedPairs, margin: Matrix) -> Matrix:
    """Of a pair its half point; of a list 1 where all its pairs are won."""
    single = np.array([item.subset.split("|")[1] == _KINDS[0] for item in pairs.items])
    won = pairs.sum((margin > 0).astype(np.float64)) == pairs.count
    return np.where(single, pairs.sum(half_point(margin)) / pairs.count, won)[:, None]


def _scores(items: Sequence[Item], credit: Matrix, weight: Matrix, own_scores: Sequence[Matrix] | None) -> list[Score]:
    part = np.array([item.subset.rpartition("|")[0] for item in items], dtype=object)
    subset = np.array([item.subset for item in items], dtype=object)
    sections = []
    for goal in GOALS:
        for kind in _KINDS:
            member = part == f"{goal}|{kind}"
            if member.any():
                value = group_mean(credit[:, 0], member, weight)
                sections.append(Score("section", f"{goal}, {kind}", value, int(member.sum())))
    subsets = []
    for name in sorted(set(subset.tolist())):
        member = subset == name
        value = group_mean(credit[:, 0], member, weight)
        subsets.append(Score("subset", name.replace("|", ", "), value, int(member.sum())))
    return [
        Score("overall", "Score", mean_of([score.value for score in sections]), len(items)),
        *sections,
        *subsets,
    ]


BENCHMARK = Benchmark(
    name="rmb",
    title="RMB",
    about="Zhou-Zoey/RMB-Reward-Model-Benchmark on GitHub (no licence), arXiv:2410.09893: its folder RMB_dataset",
    data=(),
    read=_read,
    credit=_credit,
    scores=_scores,
    own=("chosen", "reject", "bon_best", "loser_list"),
    results=("chosen_reward", "reject_reward"),
)
