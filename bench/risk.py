"""How often the bound of a risk-controlled router held: every public stream, 1,000 resamplings, with ties and copies.

Each resampling calibrates on one half of a stream's prompts and looks at the other half. The guarantee: the error rate
among the pairs kept there exceeds α in at most δ of them. Needs the data folder (``--data`` or RMCORE_DATA); writes
``risk.json`` and ``risk.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import rmcore
from rmcore._base.arguments import real, whole
from rmcore.bench.routing_streams import MIXES, candidates_of, load, mixed
from rmcore.cli.run_demo import DEMO_HEAD
from rmcore.evaluation.report import ScoredPairs
from rmcore.evaluation.risk import evaluate_risk
from rmcore.evaluation.streams import find_data
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.model.error_prior_fit import error_prior_of

__all__ = ["main", "variants"]


_COLUMNS = ("logit", "label", "uncertainty", "cluster", "novelty")


def variants(pairs: ScoredPairs, seed: int = 0) -> dict[str, ScoredPairs]:
    """The stream as it is, with scores rounded to a few values, with every pair three times, and 40 pairs of it.

    Copies of a pair are of one prompt, as they should be, or, ``apart``, pass for pairs of different prompts: then half
    of a pair's copies are often in the calibration and half beyond.
    """
    everything = np.arange(len(pairs))
    keep = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:40])
    ties = ScoredPairs(
        logit=np.sign(pairs.logit) * _rounded(np.abs(pairs.logit)),
        label=pairs.label,
        uncertainty=_rounded(pairs.uncertainty),
        cluster=pairs.cluster,
        novelty=None if pairs.novelty is None else _rounded(pairs.novelty),
    )
    return {
        "as it is": pairs,
        "ties": ties,
        "copies": _rows(pairs, np.tile(everything, 3), np.tile(everything, 3)),
        "copies apart": _rows(pairs, np.tile(everything, 3), np.arange(3 * len(pairs))),
        "40 pairs": _rows(pairs, keep, pairs.cluster[keep]),
    }


def _rounded(values: np.ndarray) -> np.ndarray:
    """To five values."""
    steps = np.quantile(values, np.linspace(0, 1, 6))
    return np.asarray(steps[np.searchsorted(steps[1:-1], values)])


def _rows(pairs: ScoredPairs, rows: np.ndarray, cluster: np.ndarray) -> ScoredPairs:
    return ScoredPairs(
        logit=pairs.logit[rows],
        label=pairs.label[rows],
        uncertainty=pairs.uncertainty[rows],
        cluster=cluster,
        novelty=None if pairs.novelty is None else pairs.novelty[rows],
    )


def streams_of(data: Path, seed: int = 0) -> dict[str, ScoredPairs]:
    """The streams of ``rmcore.bench.routing``, parts and mixtures, as its head of one seed scores them."""
    corpus, (hidden, labels, index), parts = load(data)
    head, _ = fit(SNGPHead(HeadConfig(hidden.shape[1], seed=seed, **DEMO_HEAD)), hidden, labels, pairs=index)
    prior = error_prior_of(head.config, corpus.train, hidden, labels, index)
    assert prior is not None
    known = {name: candidates_of(head, prior, part) for name, part in parts.items()}
    found = {}
    for mix in MIXES:
        stream = mixed(mix, parts, known, seed)
        pairs = stream.candidates
        found[" + ".join(mix)] = ScoredPairs(
            logit=pairs.logit.numpy(),
            label=(0.5 + 0.5 * stream.label).numpy(),
            uncertainty=pairs.uncertainty.numpy(),
            cluster=np.array(stream.prompts),
            novelty=pairs.columns["novelty"].numpy(),
        )
    return found


def tried(task: tuple[str, str, dict[str, Any], float, float, int]) -> list[dict[str, Any]]:
    """One stream, variant and α: a row a score."""
    stream, variant, columns, alpha, delta, times = task
    report = evaluate_risk(ScoredPairs(**columns), alpha=alpha, delta=delta, times=times)
    return [
        {
            "stream": stream,
            "variant": variant,
            "alpha": alpha,
            "score": score,
            "head_error": round(report.error, 4),
            "exceeded": found.exceeded,
            "kept_any": round(found.kept_any, 4),
            "judged": round(found.judged, 4),
        }
        for score, found in report.resamplings.items()
    ]


def run(data: Path, alphas: list[float], delta: float, times: int, workers: int) -> dict[str, Any]:
    """Every stream, variant and α, as JSON values."""
    tasks = [
        (stream, variant, {name: getattr(pairs, name) for name in _COLUMNS}, alpha, delta, times)
        for stream, scored in streams_of(data).items()
        for variant, pairs in variants(scored).items()
        for alpha in alphas
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for some in pool.map(tried, tasks):
            rows += some
            for row in some:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "delta": delta,
        "resamplings": times,
        "most_exceeded": max(row["exceeded"] for row in rows),
        "rows": rows,
    }


def markdown(figures: dict[str, Any]) -> str:
    """One row a stream and variant, one cell an α: how often it was exceeded by the worst of the scores."""
    rows = figures["rows"]
    alphas = sorted({row["alpha"] for row in rows})
    cells: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        cells.setdefault((row["stream"], row["variant"]), {}).setdefault(row["alpha"], []).append(row)
    lines = [
        "# How often the error rate among kept pairs was above α",
        "",
        f"{figures['resamplings']:,} resamplings each, δ = {figures['delta']:g}: the highest share over the scores (u, "
        f"margin, novelty), and in brackets the least share judged. `python -m rmcore.bench.risk`, {figures['date']}. "
        f"At most {figures['most_exceeded']:.3f} in all.",
        "",
        "| stream | variant | the head errs on | " + " | ".join(f"α = {alpha:g}" for alpha in alphas) + " |",
        "|---|---|---:|" + "---:|" * len(alphas),
    ]
    for (stream, variant), by_alpha in cells.items():
        worst = [max(row["exceeded"] for row in by_alpha[alpha]) for alpha in alphas]
        least = [min(row["judged"] for row in by_alpha[alpha]) for alpha in alphas]
        text = " | ".join(f"{w:.3f} ({share:.0%})" for w, share in zip(worst, least, strict=True))
        lines.append(f"| {stream} | {variant} | {by_alpha[alphas[0]][0]['head_error']:.3f} | {text} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 where the bound was exceeded more often than δ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--alpha", type=real(above=0, below=1), nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--delta", type=real(above=0, below=1), default=0.1)
    parser.add_argument("--times", type=whole(), default=1000)
    parser.add_argument("--workers", type=whole(), default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("risk: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = run(data, arguments.alpha, arguments.delta, arguments.times, arguments.workers)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "risk.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    (arguments.out / "risk.md").write_text(markdown(figures))
    print(f"exceeded at most {figures['most_exceeded']:.3f} of the time; delta {arguments.delta:g}")
    return int(figures["most_exceeded"] > arguments.delta)


if __name__ == "__main__":
    raise SystemExit(main())
