"""Which labels teach a head most: accuracy on held-out streams against labels bought, for every acquisition.

A head starts from a few labelled pairs of the training data, buys a batch at a time from the rest by its own posterior,
and is fitted again. All acquisitions of a seed start from the same pairs. Needs the data folder (``--data`` or
RMCORE_DATA). Writes ``acquisition.json`` and ``acquisition.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

import rmcore
from rmcore._base.arguments import whole
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.engine.acquisition import Acquisition, pair_pool, select_pairs
from rmcore.evaluation.evaluate import encode_pairs
from rmcore.evaluation.plots.figure import new_figure
from rmcore.evaluation.streams import find_data, load_corpus
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.head.frozen import FrozenHead
from rmcore.model.training_pairs import encode_preferences

__all__ = ["learning_curve", "main"]

START, STEP = 50, 50


def learning_curve(
    by: Acquisition,
    hidden: Tensor,
    labels: Tensor,
    tests: dict[str, tuple[Tensor, Tensor]],
    config: HeadConfig,
    *,
    most: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Accuracy by stream after each batch of labels.

    Args:
        by: the acquisition.
        hidden: (2N, h) rows of N training pairs.
        labels: (N,) of them.
        tests: by name (M, 2, h) rows and (M,) labels.
        config: of the heads; its seed is that of the features.
        most: labels to buy in all.
        seed: of the first pairs and of what the acquisition draws.
    """
    count = len(labels)
    known = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:START]
    points = []
    while True:
        rows = torch.stack([2 * known, 2 * known + 1], 1)
        head, _ = fit(
            SNGPHead(config), hidden[rows.flatten()], labels[known], pairs=torch.arange(2 * len(known)).view(-1, 2)
        )
        points.append({"labels": len(known), **{name: _accuracy(head, *test) for name, test in tests.items()}})
        if len(known) >= most:
            return points
        free = torch.ones(count, dtype=torch.bool)
        free[known] = False
        left = free.nonzero()[:, 0]
        pool = pair_pool(head, hidden.view(count, 2, -1)[left].flatten(0, 1), torch.full((len(left),), 2))
        chosen, _ = select_pairs(pool, min(STEP, most - len(known)), by, seed=seed + len(known))
        known = torch.cat([known, left[chosen]])


def _accuracy(head: FrozenHead, hidden: Tensor, labels: Tensor) -> float:
    scores = head.score_pairs(hidden.flatten(0, 1), torch.full((len(hidden),), 2), dtype=torch.float64)
    decided = labels != 0.5
    right = (scores.logit > 0) == (labels > 0.5)
    return float(right[decided].double().mean())


def run(data: Path, seeds: int, most: int) -> dict[str, Any]:
    """All acquisitions and seeds, as JSON values."""
    corpus, backbone = load_corpus(data), demo_backbone()
    backbone.use_state_cache()
    rows, labels, pairs = encode_preferences(backbone, corpus.train, "difference")
    assert pairs is not None
    hidden = rows[pairs.flatten()]
    tests = {}
    for name, part in corpus.parts.items():
        states = encode_pairs(backbone, part, "difference")
        tests[name] = (states.hidden, torch.tensor([pair.label for pair in part], dtype=torch.float64))
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for by in get_args(Acquisition):
        for seed in range(seeds):
            config = HeadConfig(backbone.hidden_size, seed=seed, **DEMO_HEAD)
            curve = learning_curve(by, hidden, labels, tests, config, most=min(most, len(labels)), seed=seed)
            curves.setdefault(by, []).append(curve)
            last = ", ".join(f"{name} {100 * curve[-1][name]:.1f}" for name in tests)
            print(f"{by} seed {seed}: at {curve[-1]['labels']} labels {last}", flush=True)
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "head": DEMO_HEAD,
        "pool": len(labels),
        "seeds": seeds,
        "curves": {by: _over_seeds(found, list(tests)) for by, found in curves.items()},
    }


def _over_seeds(curves: list[list[dict[str, Any]]], names: list[str]) -> dict[str, Any]:
    values = {name: 100 * np.array([[point[name] for point in curve] for curve in curves]) for name in names}
    values["mean"] = np.mean([values[name] for name in names], axis=0)
    return {
        "labels": [point["labels"] for point in curves[0]],
        **{
            name: {
                "mean": v.mean(0).round(2).tolist(),
                "sd_over_seeds": v.std(0, ddof=min(1, len(v) - 1)).round(2).tolist(),
            }
            for name, v in values.items()
        },
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 2) for v in values]


def draw(figures: dict[str, Any], path: Path) -> None:
    """Accuracy against labels, the mean over streams and in distribution, every acquisition in one plot."""
    figure = new_figure((10, 4))
    names = [name for name in next(iter(figures["curves"].values())) if name not in ("labels", "mean")]
    for axis, name, title in zip(
        figure.subplots(1, 2),
        (names[0], "mean"),
        (f"in distribution ({names[0]})", "mean over all streams"),
        strict=True,
    ):
        for by, curve in figures["curves"].items():
            plain = by == "random"
            axis.plot(
                curve["labels"],
                curve[name]["mean"],
                label=by.replace("_", " "),
                linewidth=2.5 if plain else 1.6,
                color="0.4" if plain else None,
                linestyle="--" if plain else "-",
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("labels")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel(f"accuracy of the head, % (mean of {figures['seeds']} seeds)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--seeds", type=whole(), default=8)
    parser.add_argument("--labels", type=whole(), default=500, help="labels to buy in all")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("acquisition: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = run(data, arguments.seeds, arguments.labels)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "acquisition.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    draw(figures, arguments.out / "acquisition.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
