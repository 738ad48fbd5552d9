"""Scores by the functions of the ``rewardbench`` package, in an environment of its own: cases in, scores out, as JSON.

Run by ``test_against_rewardbench.py``. The package pins versions of what it imports that rmcore cannot have.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answered(cases: dict[str, Any]) -> dict[str, Any]:
    """Each case as the package scores it."""
    from datasets import Dataset
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
    from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset

    best = []
    for scores in cases["best_of"]:
        flat = [score for row in scores for score in row]
        rows = Dataset.from_dict({"text": ["t"] * len(flat), "scores": flat, "subset": ["s"] * len(flat)})
        results = reroll_and_score_dataset(rows, [len(row) for row in scores])["results"]
        best.append(sum(results) / len(results))
    return {
        "counts": EXAMPLE_COUNTS,
        "subsets": SUBSET_MAPPING,
        "sections": [calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, case) for case in cases["sections"]],
        "best_of": best,
        "ties": [float(process_single_model(rows)[1]) for rows in cases["ties"]],
    }


if __name__ == "__main__":
    found = answered(json.load(sys.stdin))
    print("\n" + json.dumps(found))
