"""What routing by uncertainty is worth on real preferences: three streams, several seeds, against the data's figures.

Needs the data folder (``--data`` or RMCORE_DATA). Writes ``quality.json`` and ``quality.png`` and exits 1 if a figure
is further than the tolerance from what a plain fp64 implementation reaches on the same data.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmcore
from rmcore._base.arguments import whole
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.evaluation.evaluate import encode_pairs, evaluate_head
from rmcore.evaluation.plots.figure import new_figure
from rmcore.evaluation.report import EvaluationReport
from rmcore.evaluation.streams import Corpus, find_data, load_corpus
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.model.training_pairs import encode_preferences
from rmcore.ops.reference import uncertainty, variance

__all__ = ["main", "run"]

FRACTIONS = (0.10, 0.25, 0.45)
TOLERANCE = 2.5
"""Points by which a figure may differ from the published one."""


def run(data: Path, seeds: int) -> tuple[dict[str, Any], dict[str, list[EvaluationReport]]]:
    """Fit and evaluate once a seed; → (JSON figures, reports by stream)."""
    corpus = load_corpus(data)
    backbone = demo_backbone()
    started = time.perf_counter()
    hidden, labels, pairs = encode_preferences(backbone, corpus.train, "difference", progress=_line("training texts"))
    everything = [pair for part in corpus.parts.values() for pair in part]
    states = encode_pairs(backbone, everything, "difference", progress=_line("test texts"))
    where: dict[int, int] = {id(pair): k for k, pair in enumerate(everything)}
    seconds = time.perf_counter() - started
    reports: dict[str, list[EvaluationReport]] = {name: [] for name, *_ in corpus.mixes}
    for seed in range(seeds):
        config = HeadConfig(backbone.hidden_size, seed=seed, **DEMO_HEAD)
        head, _ = fit(SNGPHead(config), hidden, labels, pairs=pairs, dtype=torch.float16)
        for stream in corpus.streams(seed):
            rows = states[[where[id(pair)] for pair in stream.pairs]]
            report = evaluate_head(head, rows, stream.pairs, train=hidden, fractions=FRACTIONS, seed=seed)
            reports[stream.name].append(report)
    served = {
        str(dtype).removeprefix("torch."): _serving_error(
            backbone.hidden_size, hidden, labels, pairs, states.hidden, dtype
        )
        for dtype in (torch.float16, torch.bfloat16, torch.int8)
    }
    figures = {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "head": DEMO_HEAD,
        "seeds": seeds,
        "training_pairs": len(corpus.train),
        "encoding": {"tokens": backbone.stats.tokens, "seconds": round(seconds, 1)},
        "worst_relative_error_of_u": {name: error for name, (error, _) in served.items()},
        "changed_preferences": {name: changed for name, (_, changed) in served.items()},
        "streams": {name: _stream_figures(name, reports[name], corpus) for name in reports},
    }
    return figures, reports


def _serving_error(
    width: int, hidden: Tensor, labels: Tensor, pairs: Tensor | None, rows: Tensor, dtype: torch.dtype
) -> tuple[float, int]:
    """Over all test pairs, as served in ``dtype``, against float64 throughout: u's largest relative error, and how many
    preferences have the other sign.

    The truth has the same frozen (rounded) projection, which is part of the features, and neither rounds hidden rows,
    features nor the factor.
    """
    head, _ = fit(SNGPHead(HeadConfig(width, **DEMO_HEAD)), hidden, labels, pairs=pairs, dtype=dtype)
    assert head.posterior is not None
    served = head.score_pairs(rows.flatten(0, 1), torch.full((len(rows),), 2, dtype=torch.int64))
    phi = head.feature_map(rows.double()) * head.feature_map.feature_scale
    delta = phi[:, 0] - phi[:, 1]
    truth = uncertainty(variance(delta, head.posterior.factor()), head.config.resolved_amplitude)
    error = float(((served.uncertainty.double() - truth).abs() / truth).max())
    return error, int(((served.logit > 0) != (delta @ head.beta > 0)).sum())


def _stream_figures(name: str, reports: list[EvaluationReport], corpus: Corpus) -> dict[str, Any]:
    base = np.array([100 * report.accuracy.point for report in reports])
    scores: dict[str, Any] = {}
    for score in reports[0].scores:
        points = np.array([[step.point for step in report.score(score.name).uplift] for report in reports])
        scores[score.name] = {
            "uplift": _rounded(points.mean(0)),
            "uplift_sd_over_seeds": _rounded(points.std(0, ddof=1)) if len(reports) > 1 else None,
            "auroc_errors": _mean([report.score(score.name).auroc for report in reports]),
            "rank_correlation_with_u": _mean([report.score(score.name).rank_correlation_with_u for report in reports]),
        }
    published_base, *published = corpus.published[name]
    ours = [float(base.mean()), *scores["u"]["uplift"]]
    distance = [round(a - b, 2) for a, b in zip(ours, (published_base, *published), strict=True)]
    return {
        "pairs": reports[0].n_pairs,
        "base_accuracy": round(float(base.mean()), 2),
        "ece": round(float(np.mean([report.ece_equal_mass for report in reports])), 4),
        "fractions": list(FRACTIONS),
        "scores": scores,
        "published_u": {"base_accuracy": published_base, "uplift": published},
        "difference_from_published": distance,
        "within_tolerance": max(abs(d) for d in distance) <= TOLERANCE,
    }


def _mean(values: list[float]) -> float | None:
    mean = float(np.mean(values))
    return round(mean, 3) if np.isfinite(mean) else None  # a random order correlates with nothing


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 2) for v in values]


def draw(reports: dict[str, list[EvaluationReport]], corpus: Corpus, path: Path) -> None:
    """One panel a stream: uplift over random against pairs judged, mean and spread over seeds, published points."""
    looks = {"u": ("#0072B2", "uncertainty u"), "margin": ("#D55E00", "margin"), "rank_sum": ("#009E73", "rank sum")}
    figure = new_figure((12, 3.9))
    axes = figure.subplots(1, len(reports), sharey=True)
    for axis, (name, title, _) in zip(axes, corpus.mixes, strict=True):
        for score, (colour, label) in looks.items():
            bands = [report.score(score).band for report in reports[name]]
            x = 100 * np.array([step.fraction for step in bands[0]])
            y = np.array([[step.point for step in band] for band in bands])
            axis.plot(x, y.mean(0), color=colour, label=label, linewidth=2)
            axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
        _, *points = corpus.published[name]
        axis.plot([10, 25, 45], points, "o", color="#0072B2", markerfacecolor="white", label="u, plain fp64 reference")
        axis.axhline(0, color="0.5", linewidth=1)
        base = 100 * np.mean([report.accuracy.point for report in reports[name]])
        axis.set_title(f"{title}: head alone {base:.0f}%", fontsize=10)
        axis.set_xlabel("pairs judged, %")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("points over random routing")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _line(title: str) -> Any:
    shown = sys.stderr.isatty()

    def update(_stage: str, done: int, total: int) -> None:
        if shown:
            end = "\n" if done == total else ""
            print(f"\r{title}: {100 * done // max(total, 1)}%", end=end, file=sys.stderr, flush=True)

    return update


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--seeds", type=whole(), default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("quality: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures, reports = run(data, arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "quality.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    draw(reports, load_corpus(data), arguments.out / "quality.png")
    for name, stream in figures["streams"].items():
        verdict = "within" if stream["within_tolerance"] else "OUTSIDE"
        print(f"{name}: base {stream['base_accuracy']}%, u {stream['scores']['u']['uplift']} at {FRACTIONS}", end="")
        print(f" | published {stream['published_u']} | {verdict} {TOLERANCE} points")
    return 0 if all(stream["within_tolerance"] for stream in figures["streams"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
