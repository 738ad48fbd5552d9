"""Partial comparison designs: judge calls, time and accuracy against all pairs, for groups of 16 and 32 responses.

Synthetic groups, since no public data has this many judged responses a prompt: a response's quality is N(0, 1), the
head's logit of a pair is the difference of two noisy readings of it, and the judge, asked about every pair of the
design or about a share of them, those with the smallest margin, is right with probability σ(2 · difference).
Accuracy is the rank correlation (Kendall's τ) of the advantages with the quality, and how good the best of n is, in
standard deviations. Writes ``designs.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import rmcore
from rmcore._base.arguments import whole
from rmcore.engine import RewardEngine
from rmcore.engine.routing import BudgetRouter
from rmcore.head import HeadConfig
from rmcore.head.fit import without_posterior
from rmcore.judge.base import Pair, Verdict

__all__ = ["main", "run"]

DESIGNS = ("all", "circular", "regular:4", "regular:6", "swiss:2", "swiss:3")
NOISE = 0.8
"""Of the head's reading of a response's quality, in standard deviations."""


class NoisyJudge:
    """Right with probability σ(2 · difference of quality), by a draw that depends on the pair alone."""

    def __init__(self, quality: np.ndarray, seed: int) -> None:
        self.quality, self.seed, self.calls = quality, seed, 0

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Verdicts of full strength."""
        self.calls += len(pairs)
        return [Verdict(self.said(int(str(pair.first)), int(str(pair.second)))) for pair in pairs]

    def said(self, i: int, j: int) -> float:
        """1 for the first, -1 for the second."""
        drawn = np.random.default_rng([self.seed, min(i, j), max(i, j)]).random()
        low, high = min(i, j), max(i, j)
        better = 1.0 if drawn < 1 / (1 + math.exp(-2 * (self.quality[low] - self.quality[high]))) else -1.0
        return better if i < j else -better


def measured(size: int, design: str, fraction: float, groups: int, seed: int = 0) -> dict[str, Any]:
    """One design: the means over its groups."""
    random = np.random.default_rng(seed)
    quality = random.normal(size=groups * size)
    reading = torch.from_numpy(quality + NOISE * random.normal(size=groups * size)).float()[:, None]
    head = without_posterior(torch.ones(1), 0.0, HeadConfig(1, mode="difference", features="linear", amplitude=0.3))
    judge = NoisyJudge(quality, seed)
    engine = RewardEngine(head, judge, BudgetRouter(fraction, by="margin"), design=design)
    texts = [[str(k) for k in range(g * size, (g + 1) * size)] for g in range(groups)]
    began = time.perf_counter()
    scores = engine.score_hidden(reading, [size] * groups, prompts=["p"] * groups, responses=texts)
    advantages = scores.advantages.view(groups, size).numpy()
    seconds = time.perf_counter() - began
    truth = quality.reshape(groups, size)
    best = truth[np.arange(groups), advantages.argmax(1)]
    return {
        "size": size,
        "design": design,
        "judged": fraction,
        "pairs_a_group": len(scores.table) / groups,
        "calls_a_group": judge.calls / groups,
        "ms_a_group": round(1e3 * seconds / groups, 3),
        "tau": round(float(np.mean([stats.kendalltau(a, t)[0] for a, t in zip(advantages, truth, strict=True)])), 3),
        "best_of_n": round(float(best.mean()), 3),
        "variance": round(float(scores[0].design_variance.mean()), 4),
    }


def run(groups: int) -> list[dict[str, Any]]:
    """Every size and design with all its pairs judged and a quarter of them; all pairs with smaller shares too."""
    shares = dict.fromkeys(DESIGNS, (0.25, 1.0)) | {"all": (0.0, 0.07, 0.13, 0.25, 1.0)}
    return [measured(size, design, q, groups) for size in (16, 32) for design in DESIGNS for q in shares[design]]


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=whole(), default=60)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    rows = run(arguments.groups)
    for row in rows:
        print(
            "  ".join(
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = {"rmcore": rmcore.__version__, "date": date.today().isoformat(), "groups": arguments.groups}
    (arguments.out / "designs.json").write_text(json.dumps(known | {"rows": rows}, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
