"""What learning from verdicts is worth on real preferences: judge calls needed for an accuracy, with it and without.

One stream, shuffled by seed: Auto-J's held-out pairs, LLMBar and XSTest. It is worked off in chunks; of each the
router picks pairs, the judge decides those, and a learning head folds them in before it sees the next chunk. Accuracy
is that of the routed system: the judge's where it was asked, the head's elsewhere.

First the table of the data's own README (chunks of 64, the human label as judge), then curves of accuracy over the
fraction judged, and from these the calls needed to hold 60, 65 and 70%, chosen beforehand, with and without learning.
A second stream, of human pairs from PandaLM and hh-rlhf, shows the same where the head is not wrong but ignorant.

Needs the data folder (``--data`` or RMCORE_DATA). Writes ``learning.json`` and ``learning.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmcore
from rmcore._base.arguments import whole
from rmcore.cli.run_demo import DEMO_HEAD
from rmcore.evaluation.plots.figure import new_figure
from rmcore.evaluation.streams import find_data
from rmcore.head import FrozenHead, HeadConfig, SNGPHead
from rmcore.head.fit import fit

from .learning_stream import Material, encode_streams, material_of, read_streams
from .learning_walk import Choose, Online, Refit, Setup, above, top, walk

__all__ = ["main", "run"]

LEVELS = (60, 65, 70)
OTHER_LEVELS = (50, 55, 75)
TARGET = 20.0
"""Per cent fewer judge calls that learning is asked to bring."""
PUBLISHED = {  # q: routed system (random fixed, random learning, u fixed, u learning), head alone on the second half
    10: ((50.1, 51.4, 51.5, 53.5), (43.7, 46.2, 49.1)),
    25: ((58.6, 60.9, 61.9, 64.7), (43.7, 48.3, 53.1)),
    45: ((69.6, 73.0, 74.8, 75.9), (43.7, 52.6, 55.5)),
}
SIXTEENTHS = tuple(k / 16 for k in range(1, 9))
SETUPS = (
    Setup("top u of every 64"),
    Setup("top u of every 16", chunk=16, grid=SIXTEENTHS),
    Setup(
        "top u of every 16, a judged pair counts 3",
        chunk=16,
        weight=3.0,
        grid=SIXTEENTHS,
        note="the weight was chosen on this stream",
    ),
    Setup("u above a threshold", router="threshold", grid=(0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)),
    Setup("top u of every 64, GPT-4 as judge on LLMBar", judge="gpt-4"),
    Setup("second stream, top u of every 64", stream="second"),
    Setup("second stream, a judged pair counts 3", stream="second", weight=3.0),
)


def run(data: Path, seeds: int, cache: Path | None) -> dict[str, Any]:
    """Encode (or read the cache), walk every setup for every seed; returns the figures, JSON values."""
    started = time.perf_counter()
    tensors = encode_streams(data, cache)
    streams = {name: material_of(pairs, tensors[name]) for name, pairs in read_streams(data).items()}
    heads = []
    for seed in range(seeds):
        head = SNGPHead(HeadConfig(tensors["train"].shape[1], seed=seed, **DEMO_HEAD))
        heads.append(fit(head, tensors["train"], tensors["labels"], pairs=tensors["pairs"], dtype=torch.float16)[0])
    table = _table(heads, streams["mixed"], tensors)
    curves = []
    for setup in SETUPS:
        print(f"{time.perf_counter() - started:6.0f} s  {setup.name}", file=sys.stderr, flush=True)
        curves.append(_curve(setup, heads, streams[setup.stream]))
    reached = {
        curve["name"]: [level for level in LEVELS if (curve["levels"][str(level)]["reduction"] or 0) >= TARGET]
        for curve in curves
    }
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "head": DEMO_HEAD,
        "learning": "LearningConfig() but for judge_weight",
        "seeds": seeds,
        "pairs": {name: len(material.truth) for name, material in streams.items()},
        "seconds": round(time.perf_counter() - started),
        "table": table,
        "curves": curves,
        "target_reduction": TARGET,
        "levels_at_which_it_is_reached": reached,
    }


def _orders(heads: list[FrozenHead], material: Material) -> list[tuple[FrozenHead, np.ndarray]]:
    """Each seed's head with its order of the stream."""
    return [(head, np.random.default_rng(seed).permutation(len(material.truth))) for seed, head in enumerate(heads)]


def _table(heads: list[FrozenHead], material: Material, train: dict[str, Tensor]) -> list[dict[str, Any]]:
    learners: dict[str, Callable[[FrozenHead], Online | Refit | None]] = {
        "fixed": lambda head: None,
        "learning": lambda head: Online(head, 1.0),
        "refit": lambda head: Refit(head, train),
    }
    columns = (*((by, how) for by in ("random", "u") for how in ("fixed", "learning")), ("u", "refit"))
    result = []
    for percent, (system, alone) in PUBLISHED.items():
        walks = {
            (by, how): [
                walk(head, material, order, SETUPS[0], choose, seed, learners[how](head))
                for seed, (head, order) in enumerate(_orders(heads, material))
            ]
            for by, how in columns
            for choose in (top(percent / 100, at_random=by == "random"),)
        }
        ours = [np.mean([w.accuracy() for w in some]) for some in walks.values()]
        later = [("u", "fixed"), ("random", "learning"), ("u", "learning"), ("u", "refit")]
        result.append(
            {
                "judged_percent": percent,
                "columns": [" ".join(column) for column in columns],
                "accuracy": _round(ours),
                "published": list(system),
                "alone_columns": ["fixed", *(" ".join(key) for key in later[1:])],
                "head_alone_second_half": _round(np.mean([w.alone_later() for w in walks[key]]) for key in later),
                "published_alone": list(alone),
            }
        )
    return result


def _curve(setup: Setup, heads: list[FrozenHead], material: Material) -> dict[str, Any]:
    points: dict[bool, np.ndarray] = {}
    longest = 0.0
    for learn in (False, True):
        of_seeds = []
        for seed, (head, order) in enumerate(_orders(heads, material)):
            row = []
            for choose in _choices(setup, head, material):
                learner = Online(head, setup.weight) if learn else None
                once = walk(head, material, order, setup, choose, seed, learner)
                row.append((100 * float(once.judged.mean()), once.accuracy()))
                longest = max([longest, *(learner.shifts if learner is not None else [])])
            of_seeds.append(row)
        points[learn] = np.array(of_seeds)  # (seeds, grid, 2)
    return {
        "name": setup.name,
        "note": setup.note,
        "chunk": setup.chunk,
        "router": setup.router,
        "judge": setup.judge,
        "stream": setup.stream,
        "judge_weight": setup.weight,
        **{
            name: {"judged_percent": _round(at[:, :, 0].mean(0)), "accuracy": _round(at[:, :, 1].mean(0)),
                   "accuracy_by_seed": [_round(row) for row in at[:, :, 1]]}
            for name, at in (("fixed", points[False]), ("learning", points[True]))
        },
        "largest_shift_of_trust_region": round(longest, 3),
        "levels": {str(level): _calls(level, points, len(material.truth)) for level in (*LEVELS, *OTHER_LEVELS)},
    }  # fmt: skip


def _choices(setup: Setup, head: FrozenHead, material: Material) -> list[Choose]:
    if setup.router == "budget":
        return [top(fraction) for fraction in setup.grid]
    count = len(material.rows)
    scores = head.score_pairs(material.rows.flatten(0, 1), torch.full((count,), 2, dtype=torch.int64))
    u = scores.uncertainty.double().numpy()
    return [above(float(np.quantile(u, place))) for place in setup.grid]


def _calls(level: float, points: dict[bool, np.ndarray], pairs: int) -> dict[str, Any]:
    """Judge calls to hold an accuracy, by linear interpolation of the mean over seeds; None outside the grid."""
    fixed, learning = (_needed(level, points[learn].mean(0)) for learn in (False, True))
    single = [
        (_needed(level, without), _needed(level, with_it))
        for without, with_it in zip(points[False], points[True], strict=True)
    ]
    return {
        "fixed_percent": fixed and round(fixed, 2),
        "learning_percent": learning and round(learning, 2),
        "fixed_calls": fixed and round(fixed * pairs / 100),
        "learning_calls": learning and round(learning * pairs / 100),
        "reduction": None if not fixed or not learning else round(100 * (1 - learning / fixed), 1),
        "reduction_by_seed": [round(100 * (1 - b / a), 1) if a and b else None for a, b in single],
    }


def _needed(level: float, curve: np.ndarray) -> float | None:
    """The smallest fraction at which the curve (grid, 2) of (fraction, accuracy) reaches the level."""
    ordered = curve[np.argsort(curve[:, 0])]
    best = np.maximum.accumulate(ordered[:, 1])
    return float(np.interp(level, best, ordered[:, 0])) if best[0] <= level <= best[-1] else None


def _round(values: Any) -> list[float]:
    return [round(float(value), 2) for value in values]


# -- picture ---------------------------------------------------------------------------------------------------------


def draw(figures: dict[str, Any], path: Path) -> None:
    """Left: accuracy over the fraction judged. Right: calls saved at each level, against the target."""
    colours = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#999999", "#555555")
    figure = new_figure((13, 5.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for curve, colour in zip(figures["curves"][:3], colours, strict=False):
        if curve is figures["curves"][0]:
            fixed = curve["fixed"]
            left.plot(fixed["judged_percent"], fixed["accuracy"], color="0.35", linewidth=2, linestyle="--",
                      label="the same router, no learning")  # fmt: skip
        x, by_seed = curve["learning"]["judged_percent"], np.array(curve["learning"]["accuracy_by_seed"])
        left.plot(x, by_seed.mean(0), color=colour, linewidth=2, marker="o", markersize=4, label=curve["name"])
        left.fill_between(x, by_seed.min(0), by_seed.max(0), color=colour, alpha=0.12, linewidth=0)
    for level in LEVELS:
        left.axhline(level, color="0.8", linewidth=0.8, zorder=0)
    left.set_xlabel("pairs judged, %")
    left.set_ylabel("accuracy of the routed system, %")
    left.set_title(
        f"one mixed stream of {figures['pairs']['mixed']} pairs, {figures['seeds']} seeds (band: min to max)",
        fontsize=10,
    )
    left.legend(frameon=False, fontsize=9, loc="upper left")
    width = 0.8 / len(figures["curves"])
    for n, (curve, colour) in enumerate(zip(figures["curves"], colours, strict=False)):
        saved = [curve["levels"][str(level)]["reduction"] for level in LEVELS]
        places = np.arange(len(LEVELS)) + (n - (len(figures["curves"]) - 1) / 2) * width
        bars = right.bar(places, [value or 0 for value in saved], width * 0.92, color=colour, label=curve["name"])
        right.bar_label(bars, ["–" if value is None else f"{value:.0f}" for value in saved], fontsize=8, padding=2)
    right.axhline(TARGET, color="black", linewidth=1, linestyle=":", label=f"target: {TARGET:.0f}%")
    right.set_xticks(range(len(LEVELS)), [f"{level}%" for level in LEVELS])
    right.set_xlabel("accuracy to hold")
    right.set_ylabel("judge calls saved by learning, %")
    low, high = right.get_ylim()
    right.set_ylim(min(low, 0) - 1.5, max(high, TARGET) * 1.4)
    right.axhline(0, color="0.5", linewidth=0.8)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--seeds", type=whole(), default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--cache", type=Path, help="file that keeps the encoded texts from run to run")
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("learning: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = run(data, arguments.seeds, arguments.cache)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "learning.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    draw(figures, arguments.out / "learning.png")
    for row in figures["table"]:
        print(f"{row['judged_percent']}% judged: {row['accuracy']} | published {row['published']}", end="")
        print(f" | alone {row['head_alone_second_half']}, published {row['published_alone']}")
    for curve in figures["curves"]:
        levels = {level: curve["levels"][str(level)] for level in LEVELS}
        shown = ", ".join(
            f"{level}%: {at['fixed_calls']} → {at['learning_calls']} calls ({at['reduction']}% fewer)"
            for level, at in levels.items()
        )
        print(f"{curve['name']}: {shown}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
