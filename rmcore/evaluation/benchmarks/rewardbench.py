"""RewardBench (Lambert et al. 2024): pairs in 23 subsets and four sections.

Accuracy by subset, no preference counts half; a section is the mean over its subsets weighted by ``COUNTS``, which are
the project's and not the rows' own (math-prm has 447 rows and weighs as much as code); the score is the plain mean of
the sections. Rules of ``rewardbench.utils.calculate_scores_per_section``.

The project's script for scalar models gives a tie 0 and its script for judges ½; a report says how many ties there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmcore._base.prompt import canonical_prompt, canonical_response
from rmcore.evaluation.benchmarks.fields import id_of, one_of, prompt_of, response_of
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
from rmcore.model.data.conversations import split_conversations

__all__ = ["BENCHMARK", "COUNTS", "SECTIONS"]

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984} | {f"hep-{x}": 164 for x in ("cpp", "go", "java", "js", "python", "rust")},
}
"""Section → subset → the weight that it has in its section."""

COUNTS = {subset: count for subsets in SECTIONS.values() for subset, count in subsets.items()}


def _read(row: Mapping[str, Any], context: Context) -> Item:
    subset, own = one_of(row, "subset", tuple(COUNTS)), id_of(row, "id", context)
    prompt, chosen, rejected = prompt_of(row), response_of(row, "chosen"), response_of(row, "rejected")
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):  # the prompt may be part of them
        prompt, chosen, rejected = split_conversations(row["prompt"], row["chosen"], row["rejected"])
        prompt, chosen = canonical_prompt(prompt), canonical_response(chosen, "chosen")
        rejected = canonical_response(rejected, "rejected")
    return Item(own, prompt, (chosen, rejected), (1.0, 0.0), subset)


def _credit(pairs: CountedPairs, margin: Matrix) -> Matrix:
    return half_point(margin)[:, None]


def _scores(items: Sequence[Item], credit: Matrix, weight: Matrix, own_scores: Sequence[Matrix] | None) -> list[Score]:
    subset = np.array([item.subset for item in items], dtype=object)
    sections, subsets = [], []
    for section, counts in SECTIONS.items():
        own = {name: subset == name for name in counts if (subset == name).any()}
        if not own:
            continue
        parts = [group_mean(credit[:, 0], member, weight) for member in own.values()]
        size = sum(int(member.sum()) for member in own.values())
        sections.append(Score("section", section, mean_of(parts, [counts[name] for name in own]), size))
        subsets += [
            Score("subset", name, value, int(member.sum()))
            for (name, member), value in zip(own.items(), parts, strict=True)
        ]
    overall = mean_of([score.value for score in sections])
    return [Score("overall", "Score", overall, len(items)), *sections, *subsets]


BENCHMARK = Benchmark(
    name="rewardbench",
    title="RewardBench",
    about="allenai/reward-bench (ODC-By), arXiv:2403.13787; 2,985 pairs",
    data=("hf://allenai/reward-bench:filtered",),
    read=_read,
    credit=_credit,
    scores=_scores,
    own=("chosen", "rejected"),
    results=("results", "scores_chosen"),
    whole=("raw",),
)
