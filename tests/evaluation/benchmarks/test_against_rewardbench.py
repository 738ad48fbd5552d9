"""Scores held against the ``rewardbench`` package's own functions, on the same random scores (make test-rewardbench).

The package runs in an environment of its own, whose Python ``RMCORE_REWARDBENCH_PYTHON`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.benchmarks import item, scored

from rmcore.evaluation.benchmarks import rewardbench, rewardbench2
from rmcore.evaluation.benchmarks.item import Item

PEER = Path(__file__).with_name("rewardbench_peer.py")
CASES = 20


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """Credits by subset, scores of best-of-n items, and items of Ties, with equal scores among all of them."""
    rng = np.random.default_rng(2)
    names = list(rewardbench.COUNTS)
    chosen = [names, ["math-prm", "hep-js", "donotanswer"], *(list(rng.permutation(names)[: k + 1]) for k in range(18))]
    sections = [{str(name): float(rng.integers(0, 11) / 10) for name in some} for some in chosen]
    best = [rng.integers(0, 4, (60, 4)).astype(float).tolist() for _ in range(CASES)]
    return {"sections": sections, "best_of": best, "ties": [_ties(rng, case % 2 == 0) for case in range(CASES)]}


@pytest.fixture(scope="module")
def theirs(cases: dict[str, Any]) -> dict[str, Any]:
    python = os.environ.get("RMCORE_REWARDBENCH_PYTHON")
    if not python:
        pytest.skip("no RMCORE_REWARDBENCH_PYTHON: rewardbench's functions are not compared with ours; "
                    "make test-rewardbench installs the package and does")  # fmt: skip
    done = subprocess.run([python, PEER], input=json.dumps(cases), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ties(rng: np.random.Generator, whole: bool) -> list[dict[str, Any]]:
    """Rows as the package takes them; some numbers lack one of their two prompts, one has a single right response."""
    rows = []
    for kind, number in [("ref", 1), ("tied", 1), ("tied", 2), ("ref", 3), ("tied", 3), ("ref", 4), ("tied", 4)]:
        right = 1 if kind == "ref" or number == 4 else int(rng.integers(2, 5))
        quality = np.array([1] * right + [0] * int(rng.integers(1, 4)))
        own = (rng.integers(0, 4, len(quality)) if whole else rng.normal(size=len(quality))) + quality
        rows.append({"id": f"{kind}:{number}", "scores": own.tolist(), "num_correct": right})
    return rows


def _items(rows: list[dict[str, Any]]) -> list[Item]:
    qualities = [[1] * row["num_correct"] + [0] * (len(row["scores"]) - row["num_correct"]) for row in rows]
    return [item(quality, "Ties", row["id"], row["id"]) for quality, row in zip(qualities, rows, strict=True)]


def test_sections(cases: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert theirs["counts"] == rewardbench.COUNTS
    assert {name: set(own) for name, own in theirs["subsets"].items()} == {
        name: set(own) for name, own in rewardbench.SECTIONS.items()
    }
    for credits, sections in zip(cases["sections"], theirs["sections"], strict=True):
        items = [item([1, 0], name) for name in credits for _ in range(10)]
        scores = [[1, 0] if k < round(10 * credit) else [0, 1] for credit in credits.values() for k in range(10)]
        found = scored(rewardbench.BENCHMARK, items, scores)
        of_subsets = {name: section for section, own in rewardbench.SECTIONS.items() for name in own}
        there = {of_subsets[name] for name in credits}
        assert {name for name in sections if name in found} == there
        for section, value in sections.items():
            assert found.get(section, 0.0) == pytest.approx(value, abs=1e-9), "theirs of a section without rows is 0"
        mean = np.mean([sections[section] for section in there])
        assert found["Score"] == pytest.approx(mean, abs=1e-9)


def test_best_of_four(cases: dict[str, Any], theirs: dict[str, Any]) -> None:
    for scores, value in zip(cases["best_of"], theirs["best_of"], strict=True):
        items = [item([1, 0, 0, 0], "Focus") for _ in scores]
        assert scored(rewardbench2.BENCHMARK, items, scores)["Focus"] == pytest.approx(value, abs=1e-9)


def test_ties(cases: dict[str, Any], theirs: dict[str, Any]) -> None:
    for rows, value in zip(cases["ties"], theirs["ties"], strict=True):
        scores = [np.array(row["scores"]) for row in rows]
        assert rewardbench2.ties_score(_items(rows), scores)[0] == pytest.approx(value, abs=1e-9)


def test_overall_of_rewardbench2(cases: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The mean of the six subsets, each as the package scores it."""
    five = [name for name in rewardbench2.SUBSETS if name != rewardbench2.TIES]
    rows = cases["ties"][1]
    items = [item([1, 0, 0, 0], name) for name, scores in zip(five, cases["best_of"], strict=False) for _ in scores]
    scores = [row for own in cases["best_of"][:5] for row in own] + [row["scores"] for row in rows]
    found = scored(rewardbench2.BENCHMARK, items + _items(rows), scores)
    assert found["Score"] == pytest.approx(np.mean([*theirs["best_of"][:5], theirs["ties"][1]]), abs=1e-9)
