"""How often the bound of a risk-controlled router held: every public stream, 1,000 resamplings, with ties and copies.

Each resampling calibrates on one half of a stream's prompts and looks at the other half. The guarantee: the error rate
among the pairs kept there exceeds α in at most δ of them. Needs the data folder (``--data`` or RMCORE_DATA); writes
``risk.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import rmcore
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.evaluation.evaluate import encode_pairs, scored_pairs
from rmcore.evaluation.report import ScoredPairs
from rmcore.evaluation.risk import evaluate_risk
from rmcore.evaluation.streams import find_data, load_corpus
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.model.reward_model import encode_preferences

__all__ = ["main", "variants"]


def variants(pairs: ScoredPairs, seed: int = 0) -> dict[str, ScoredPairs]:
    """The stream as it is, with scores rounded to a few values, with every pair three times, and 40 pairs of it."""
    keep = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:40])
    steps = np.quantile(pairs.uncertainty, np.linspace(0, 1, 6))
    rounded = steps[np.searchsorted(steps[1:-1], pairs.uncertainty)]
    return {
        "as it is": pairs,
        "ties": replace(_rows(pairs, np.arange(len(pairs))), uncertainty=rounded),
        "copies": _rows(pairs, np.tile(np.arange(len(pairs)), 3), apart=True),
        "40 pairs": _rows(pairs, keep),
    }


def _rows(pairs: ScoredPairs, rows: np.ndarray, *, apart: bool = False) -> ScoredPairs:
    cluster = np.arange(len(rows)) if apart else pairs.cluster[rows]
    return ScoredPairs(
        logit=pairs.logit[rows], label=pairs.label[rows], uncertainty=pairs.uncertainty[rows], cluster=cluster
    )


def run(data: Path, alphas: list[float], delta: float, times: int) -> dict[str, Any]:
    """Every stream, variant and α, as JSON values."""
    corpus, backbone = load_corpus(data), demo_backbone()
    backbone.use_state_cache()
    hidden, labels, index = encode_preferences(backbone, corpus.train, "difference")
    head, _ = fit(SNGPHead(HeadConfig(backbone.hidden_size, **DEMO_HEAD)), hidden, labels, pairs=index)
    rows: list[dict[str, Any]] = []
    for stream in corpus.streams(0):
        scored = scored_pairs(head, encode_pairs(backbone, stream.pairs, "difference"), stream.pairs)
        for variant, pairs in variants(scored).items():
            for alpha in alphas:
                report = evaluate_risk(pairs, alpha=alpha, delta=delta, times=times)
                for score, tried in report.resamplings.items():
                    row: dict[str, Any] = {
                        "stream": stream.name,
                        "variant": variant,
                        "alpha": alpha,
                        "score": score,
                        "head_error": round(report.error, 4),
                        "exceeded": tried.exceeded,
                        "judged": round(tried.judged, 4),
                    }
                    rows.append(row)
                    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "delta": delta,
        "resamplings": times,
        "most_exceeded": max(row["exceeded"] for row in rows),
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 where the bound was exceeded more often than δ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("risk: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = run(data, arguments.alpha, arguments.delta, arguments.times)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "risk.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(f"exceeded at most {figures['most_exceeded']:.3f} of the time; delta {arguments.delta:g}")
    return int(figures["most_exceeded"] > arguments.delta)


if __name__ == "__main__":
    raise SystemExit(main())
