"""Every uncertainty on one table: same cached states, same training pairs, same streams, several seeds.

For each estimator of :mod:`rmcore.head.estimators` and each stream: accuracy, log-loss, ECE, Brier's score, AUROC of
its errors by its variance and by its margin, points over random routing at 10, 25 and 45% by its variance with
intervals that resample prompts (an oracle judges), RewardUQ's confident-true/false score, and accuracy under a filter
by threshold with tests of its order (:mod:`rmcore.bench.filters`); seconds to fit, to score and bytes on disk. Needs
the data folder (``--data`` or RMCORE_DATA). Writes ``uncertainties.json``, ``.md``, ``.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmcore
from rmcore._base.arguments import whole
from rmcore._base.files import write_atomic
from rmcore.bench.attribute_uncertainties import attribute_figures, attribute_lines, calculations, read_data
from rmcore.bench.filters import Run, filter_curves, filter_lines, filter_scores, summary_lines
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.evaluation.confidence import BETAS, brier_score, confident_score
from rmcore.evaluation.evaluate import PairStates, encode_pairs, evaluate_pairs
from rmcore.evaluation.plots.figure import COLOURS, new_figure, plot_style, save_figure
from rmcore.evaluation.report import ScoredPairs
from rmcore.evaluation.statistics import correctness, risk_coverage
from rmcore.evaluation.streams import Corpus, StreamPair, find_data, load_corpus, load_test_pairs
from rmcore.head import HeadConfig
from rmcore.head.estimators import ESTIMATORS, AnyEstimator, PairEstimate, save_estimator
from rmcore.model.backbone import Backbone
from rmcore.model.training_pairs import encode_preferences
from rmcore.ops.reference import mean_field_amplitude, uncertainty

__all__ = ["fit_estimator", "main", "measure", "run", "table"]

FRACTIONS = (0.10, 0.25, 0.45)
COVERAGES = tuple(round(0.1 * step, 1) for step in range(1, 11))
GROUPS, SIZE = 64, 8
OTHERS = (("pandalm", "PandaLM", "pandalm"), ("hh", "harmless (HH)", "hh_harmless"))
"""Streams beside those of the corpus: name, title, file."""


def fit_estimator(name: str, hidden: Tensor, labels: Tensor, pairs: Tensor, seed: int) -> AnyEstimator:
    """Fit one by its name; those that draw nothing do not go by the seed."""
    settings: dict[str, Any] = {}
    if name.startswith("sngp"):
        settings["config"] = HeadConfig(hidden.shape[1], seed=seed, **DEMO_HEAD)
    if name != "sngp" and not name.startswith("laplace"):
        settings["seed"] = seed
    return ESTIMATORS[name].fit(hidden, labels, pairs, **settings)


def measure(
    estimator: AnyEstimator, states: PairStates, pairs: tuple[StreamPair, ...], *, replicates: int, seed: int
) -> tuple[dict[str, Any], Run]:
    """An estimator's figures on labelled pairs, and what its filters are made of."""
    found = _pairs(estimator, states)
    label = np.array([pair.label for pair in pairs])
    prompts = np.array([str(pair.prompt) for pair in pairs])
    g, v, p = (column.cpu().numpy() for column in found[:3])
    probability = torch.sigmoid(found.preference).cpu().numpy()
    tiny = np.finfo(np.float64).eps  # σ may have rounded to 0 or 1, which the log-loss below is not taken from
    scored = ScoredPairs(
        logit=g,
        label=label,
        uncertainty=uncertainty(found.variance, mean_field_amplitude()).cpu().numpy(),
        cluster=prompts,
        probability=np.clip(probability, tiny, 1 - tiny),
    )
    report = evaluate_pairs(scored, fractions=FRACTIONS, replicates=replicates, seed=seed)
    by_v, by_margin = report.score("u"), report.score("margin")
    right = correctness(g, label)
    curve = risk_coverage(v, right)
    figures = {
        "accuracy": [100 * x for x in (report.accuracy.point, report.accuracy.low, report.accuracy.high)],
        "log_loss": float(np.logaddexp(0, np.where(label == 1, -p, p)).mean()),
        "ece": report.ece_equal_mass,
        "brier": brier_score(probability, label),
        "auroc_by_variance": by_v.auroc,
        "auroc_by_margin": by_margin.auroc,
        "uplift": [[step.point, step.low, step.high] for step in by_v.uplift],
        "uplift_by_margin": [[step.point, step.low, step.high] for step in by_margin.uplift],
        "confident": [confident_score(g, v, label, beta) for beta in BETAS],
        "risk": [100 * float(curve.risk[max(0, round(share * len(g)) - 1)]) for share in COVERAGES],
        "aurc": 100 * curve.aurc,
    }
    return figures, (filter_scores(estimator, states, found), right, prompts)


def _pairs(estimator: AnyEstimator, states: PairStates) -> PairEstimate:
    return estimator.pairs(states.hidden.flatten(0, 1), torch.full((len(states.hidden),), 2, dtype=torch.int64))


def load_streams(data: Path) -> Corpus:
    """The corpus of the data folder, with the streams of its other files."""
    corpus = load_corpus(data)
    parts = corpus.parts | {name: load_test_pairs(data, file) for name, _, file in OTHERS}
    return replace(corpus, parts=parts, mixes=(*corpus.mixes, *((name, title, (name,)) for name, title, _ in OTHERS)))


def run(data: Path, seeds: int, replicates: int = 1000) -> dict[str, Any]:
    """All figures, as JSON values."""
    corpus, backbone = load_streams(data), demo_backbone()
    backbone.use_state_cache()
    hidden, labels, pairs = encode_preferences(backbone, corpus.train, "difference")
    assert pairs is not None
    everything = [pair for part in corpus.parts.values() for pair in part]
    states = encode_pairs(backbone, everything, "difference")
    where = {id(pair): k for k, pair in enumerate(everything)}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {stream: [] for stream, *_ in corpus.mixes} for name in ESTIMATORS
    }
    runs: dict[str, dict[str, list[Run]]] = {name: {stream: [] for stream, *_ in corpus.mixes} for name in ESTIMATORS}
    seconds: dict[str, float] = dict.fromkeys(ESTIMATORS, math.inf)
    fitted: dict[str, AnyEstimator] = {}
    for seed in range(seeds):
        streams = corpus.streams(seed)
        for name in ESTIMATORS:
            began = time.perf_counter()
            fitted[name] = fit_estimator(name, hidden, labels, pairs, seed)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
            for stream in streams:
                rows = states[[where[id(pair)] for pair in stream.pairs]]
                figures, kept = measure(fitted[name], rows, stream.pairs, replicates=replicates, seed=seed)
                found[name][stream.name].append(figures)
                runs[name][stream.name].append(kept)
        print(f"seed {seed} done", flush=True)
    attributes = _attributes(data, backbone, replicates)
    score = _score_seconds(fitted, states.hidden.flatten(0, 1))
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "training_pairs": len(pairs),
        "width": hidden.shape[1],
        "head": DEMO_HEAD,
        "seeds": seeds,
        "replicates": replicates,
        "fractions": list(FRACTIONS),
        "betas": list(BETAS),
        "coverages": list(COVERAGES),
        "streams": {s.name: {"title": s.title, "pairs": len(s.pairs)} for s in streams},
        "estimators": {
            name: {
                "kind": ESTIMATORS[name].kind,
                "fit_s": round(seconds[name], 3),
                "score_us": round(1e6 * score[name]),
                "bytes": _bytes(fitted[name]),
                "streams": {
                    stream: {**_over_seeds(values), "filter": filter_curves(runs[name][stream], replicates=replicates)}
                    for stream, values in found[name].items()
                },
            }
            for name in ESTIMATORS
        },
        "attributes": attributes,
    }


def _attributes(data: Path, backbone: Backbone, replicates: int) -> dict[str, Any]:
    """The figures on responses with attributes, and their time."""
    responses = read_data(data, backbone)
    texts = [backbone.encoder.encode(prompt, answer) for prompt, answer in calculations(200)]
    measured = partial(measure, replicates=replicates, seed=0)
    return attribute_figures(responses, backbone.hidden(texts).cpu(), measured, replicates=replicates)


def _over_seeds(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, of bounds too, and the standard deviation of the middle uplift."""
    mean = {key: np.mean([value[key] for value in values], axis=0).round(4).tolist() for key in values[0]}
    points = np.array([[step[0] for step in value["uplift"]] for value in values])
    return mean | {"uplift_sd_over_seeds": points.std(0).round(3).tolist()}


def _score_seconds(fitted: dict[str, AnyEstimator], rows: Tensor, rounds: int = 20) -> dict[str, float]:
    """Least seconds of a call of GROUPS groups of SIZE rows, the estimators taken in turns."""
    hidden = rows.repeat(-(-GROUPS * SIZE // len(rows)), 1)[: GROUPS * SIZE]
    sizes = torch.full((GROUPS,), SIZE, dtype=torch.int64)
    least = dict.fromkeys(fitted, math.inf)
    for _ in range(rounds):
        for name, estimator in fitted.items():
            began = time.perf_counter()
            estimator.pairs(hidden, sizes)
            least[name] = min(least[name], time.perf_counter() - began)
    return least


def _bytes(estimator: AnyEstimator) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save_estimator(estimator, Path(folder) / "it")
        return sum(file.stat().st_size for file in (Path(folder) / "it").iterdir())


# -- as a table and a plot -------------------------------------------------------------------------------------------


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown, two tables a stream and one of costs."""
    lines = []
    filters: dict[str, Any] = {}
    for stream, about in figures["streams"].items():
        lines += [f"### {about['title']}, {about['pairs']} pairs", ""]
        heads = ["", "accuracy, %", "log-loss", "ECE", "Brier", "AUROC of errors by v / margin"]
        heads += [f"uplift at {100 * f:.0f}%" for f in figures["fractions"]]
        heads += [*(f"confident, β = {beta:g}" for beta in figures["betas"]), "AURC, %", "errors of the surest half, %"]
        lines += [_row(heads), _row(["---"] * len(heads))]
        for name, estimator in figures["estimators"].items():
            own = estimator["streams"][stream]
            point, low, high = own["accuracy"]
            cells = [name, f"{point:.1f} [{low:.1f}, {high:.1f}]", f"{own['log_loss']:.3f}", f"{own['ece']:.3f}"]
            cells += [f"{own['brier']:.3f}", f"{own['auroc_by_variance']:.3f} / {own['auroc_by_margin']:.3f}"]
            cells += [f"{p:+.1f} [{lo:+.1f}, {hi:+.1f}]" for p, lo, hi in own["uplift"]]
            cells += [f"{value:+.3f}" for value in own["confident"]]
            lines.append(_row([*cells, f"{own['aurc']:.1f}", f"{own['risk'][4]:.1f}"]))
        filters[stream] = {name: own["streams"][stream]["filter"] for name, own in figures["estimators"].items()}
        lines += ["", *filter_lines(filters[stream]), ""]
    filters["attributes"] = figures["attributes"]["filter"]
    lines += ["### Filters, over all streams and Topical-Chat", "", *summary_lines(filters), ""]
    cost = ["", "fit, s", f"score {GROUPS} groups of {SIZE}, ms", "on disk, KB"]
    about = f"One process, {figures['threads']} threads, load {figures['load']:g} at the end: least times, ratios."
    lines += ["### Cost", "", about, "", _row(cost), _row(["---"] * len(cost))]
    for name, estimator in figures["estimators"].items():
        size = f"{estimator['bytes'] / 1024:.0f}"
        lines.append(_row([name, f"{estimator['fit_s']:.2f}", f"{estimator['score_us'] / 1e3:.2f}", size]))
    return "\n".join([*lines, "", *attribute_lines(figures["attributes"])]) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _colour(number: int) -> str:
    """The plot's own colours, then black, grey and brown."""
    return (*COLOURS, "#000000", "#767676", "#8C564B")[number]


def draw(figures: dict[str, Any], path: Path) -> None:
    """Uplift with intervals, errors by coverage, and log-loss, by stream."""
    names = list(figures["estimators"])
    with plot_style():
        figure = new_figure((3.5 * max(len(figures["streams"]), 2), 8.6))
        axes = figure.subplots(3, len(figures["streams"]), gridspec_kw={"height_ratios": [2, 1.6, 1]}, squeeze=False)
        for column, (stream, about) in enumerate(figures["streams"].items()):
            top, middle, bottom = (row[column] for row in axes)
            top.set_title(about["title"])
            top.axhline(0, color="#767676", linewidth=1, linestyle=(0, (2, 2)))
            for k, name in enumerate(names):
                own = figures["estimators"][name]["streams"][stream]
                points = np.array(own["uplift"])
                x = np.arange(len(points)) + 0.75 / len(names) * (k - (len(names) - 1) / 2)
                error = np.abs(points[:, 1:].T - points[:, 0])
                style = {"color": _colour(k), "markersize": 4, "elinewidth": 1}
                top.errorbar(x, points[:, 0], yerr=error, fmt="o", label=name, **style)
                middle.plot(100 * np.array(figures["coverages"]), own["risk"], color=_colour(k), linewidth=1.3)
                bottom.plot([own["log_loss"]], [k], "o", color=_colour(k), markersize=5)
            top.set_xticks(range(len(figures["fractions"])), [f"{100 * f:.0f}%" for f in figures["fractions"]])
            top.set_xlabel("pairs judged, by variance")
            middle.set_xlabel("pairs kept, the surest by variance, %")
            bottom.axvline(math.log(2), color="#767676", linewidth=1, linestyle=(0, (2, 2)))
            bottom.set_yticks(range(len(names)), names if column == 0 else [])
            bottom.invert_yaxis()
            bottom.set_xlabel("log-loss (dashed: a coin)")
        axes[0][0].set_ylabel("points over random routing")
        axes[1][0].set_ylabel("errors among them, %")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(names))
        save_figure(figure, path)


def main(argv: list[str] | None = None, *, work: Callable[[Path, int, int], dict[str, Any]] = run) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--seeds", type=whole(), default=5)
    parser.add_argument("--replicates", type=whole(), default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("uncertainties: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = work(data, arguments.seeds, arguments.replicates)
    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    text = re.sub(r"\[[-+.,\d\se]+\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers is a line
    write_atomic(arguments.out / "uncertainties.json", text)
    write_atomic(arguments.out / "uncertainties.md", table(figures))
    draw(figures, arguments.out / "uncertainties.png")
    print(table(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
