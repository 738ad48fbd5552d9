"""Distance from the training data in difference mode: what it finds, whether u should hold it, and what it costs.

On every stream, in distribution and mixed half and half with pairs unlike the training data, and on those pairs alone:
AUROC of the head's errors and points over random routing, by u, by the margin and by novelty (``rmcore.head.rows``).
Then p = g/√(1 + a·v + b·n) with a and b of the best likelihood of training pairs held out four-fold: whether novelty
belongs into u. And a *joint* head, which is no mode of the library: concat mode's, on the states of the two responses
laid end to end, both orders averaged; like difference mode it needs K rows of the backbone for K responses.

Needs the data folder (``--data`` or RMCORE_DATA). Writes ``novelty.json``.
"""

from __future__ import annotations

import argparse
import json
import math
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
from rmcore.evaluation.evaluate import PairStates, encode_pairs, evaluate_pairs, scored_pairs
from rmcore.evaluation.streams import StreamPair, find_data, load_corpus, load_test_pairs
from rmcore.head import FrozenHead, HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.head.rows import counted_rows
from rmcore.model.training_pairs import encode_preferences
from rmcore.ops.reference import log_likelihood

__all__ = ["held_out_weights", "main", "run"]

FRACTIONS = (0.10, 0.25, 0.45)
SCORES = ("u", "margin", "novelty", "rank_sum")
JOINT_SCORES = ("u", "margin", "rank_sum")
FURTHER = {"pandalm": None, "hh_harmless": 600}
"""Files tested on besides the corpus, and of how many of their pairs."""
FOLDS = 4
AMPLITUDES = (0.0, *(math.pi / 8 * 2.0**k for k in range(-6, 8)))
WEIGHTS = (0.0, *(2.0**k for k in range(-4, 10)))


def run(data: Path, seeds: int) -> dict[str, Any]:
    """All figures, as JSON values."""
    corpus, backbone = load_corpus(data), demo_backbone()
    backbone.use_state_cache()
    hidden, labels, pairs = encode_preferences(backbone, corpus.train, "difference")
    assert pairs is not None
    parts = corpus.parts | {name: _some(load_test_pairs(data, name), most) for name, most in FURTHER.items()}
    states = {name: encode_pairs(backbone, part, "difference") for name, part in parts.items()}
    found: dict[str, list[dict[str, Any]]] = {}
    weights = []
    for seed in range(seeds):
        config = HeadConfig(backbone.hidden_size, seed=seed, **DEMO_HEAD)
        head, _ = fit(SNGPHead(config), hidden, labels, pairs=pairs, dtype=torch.float16)
        joint = _joint_head(hidden, labels, pairs, seed)
        for name, of_parts in _mixes(parts, seed).items():
            rows = PairStates(*(torch.cat([getattr(states[p], k)[i] for p, i in of_parts]) for k in _FIELDS))
            own = [parts[p][k] for p, index in of_parts for k in index.tolist()]
            figures = _figures(head, rows, own, SCORES)
            both = PairStates(_both_orders(rows.hidden), rows.tokens, rows.silent)
            of_joint = _figures(joint, both, own, JOINT_SCORES)
            found.setdefault(name, []).append(figures | {f"joint {key}": value for key, value in of_joint.items()})
        weights.append(held_out_weights(config, hidden, labels, pairs, seed))
        print(f"seed {seed}: held out, {weights[-1]}", flush=True)
    streams = {name: _over_seeds(values) for name, values in found.items()}
    groups = {"in distribution and mixed": [s for s in streams if "alone" not in s]}
    groups["unlike the training data alone"] = [s for s in streams if "alone" in s]
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "head": DEMO_HEAD,
        "row_ridge": HeadConfig(1).row_ridge,
        "seeds": seeds,
        "fractions": list(FRACTIONS),
        "streams": streams,
        "summary": {name: _summary([streams[s] for s in members]) for name, members in groups.items()},
        "held_out": weights,
        "cost": _cost(head, states["id"].hidden.flatten(0, 1)),
    }


_FIELDS = ("hidden", "tokens", "silent")


def _some(pairs: tuple[StreamPair, ...], most: int | None) -> tuple[StreamPair, ...]:
    return tuple(pairs[k] for k in np.random.default_rng(0).permutation(len(pairs))[:most]) if most else pairs


def _mixes(parts: dict[str, tuple[StreamPair, ...]], seed: int) -> dict[str, list[tuple[str, Tensor]]]:
    """Each stream's name, and what it takes of which part."""
    rng = np.random.default_rng(seed)
    whole = {name: torch.arange(len(part)) for name, part in parts.items()}
    mixes = {"id": [("id", whole["id"])]}
    for name in parts:
        if name == "id":
            continue
        size = min(len(parts["id"]), len(parts[name]))
        drawn = {part: torch.from_numpy(rng.permutation(len(parts[part]))[:size]) for part in ("id", name)}
        mixes[f"id + {name}"] = list(drawn.items())
        mixes[f"{name} alone"] = [(name, whole[name])]
    return mixes


def _both_orders(hidden: Tensor) -> Tensor:
    """(N, 2, h) → (N, 2, 2h): the two states end to end, in both orders."""
    return torch.stack([hidden.flatten(1), hidden.flip(1).flatten(1)], dim=1)


def _joint_head(hidden: Tensor, labels: Tensor, pairs: Tensor, seed: int) -> FrozenHead:
    rows = _both_orders(hidden[pairs]).flatten(0, 1)
    config = HeadConfig(rows.shape[1], seed=seed, **(DEMO_HEAD | {"mode": "concat"}))
    return fit(SNGPHead(config), rows, torch.stack([labels, 1 - labels], dim=1).flatten(), dtype=torch.float16)[0]


def _figures(head: FrozenHead, states: PairStates, pairs: list[StreamPair], names: tuple[str, ...]) -> dict[str, Any]:
    report = evaluate_pairs(scored_pairs(head, states, pairs), fractions=FRACTIONS, replicates=0)
    scores = {name: report.score(name) for name in names}
    return {"accuracy": [100 * report.accuracy.point]} | {
        name: [score.auroc, *(step.point for step in score.uplift)] for name, score in scores.items()
    }


def _over_seeds(values: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {key: np.mean([value[key] for value in values], axis=0).round(3).tolist() for key in values[0]}


def _summary(streams: list[dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and worst of accuracy, and of AUROC and the uplift at each fraction."""
    table = {name: np.array([stream[name] for stream in streams]) for name in streams[0]}
    return {
        name: {"mean": values.mean(0).round(3).tolist(), "worst": values.min(0).round(3).tolist()}
        for name, values in table.items()
    }


# -- should u hold it? -----------------------------------------------------------------------------------------------


def held_out_weights(
    config: HeadConfig, hidden: Tensor, labels: Tensor, pairs: Tensor, seed: int
) -> dict[str, list[float]]:
    """Mean log-loss of held-out training pairs under p = g/√(1 + a·v + b·n), with the best a and b: (loss, a, b)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    columns: list[tuple[Tensor, ...]] = []
    for k in range(FOLDS):
        held = order[k::FOLDS]
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[held] = False
        rows = counted_rows(hidden, pairs[kept])
        numbers = torch.full((len(hidden),), -1)
        numbers[pairs[kept].flatten().unique()] = torch.arange(len(rows))
        head, _ = fit(SNGPHead(config), rows, labels[kept], pairs=numbers[pairs[kept]], dtype=torch.float32)
        sizes = torch.full((len(held),), 2, dtype=torch.int64)
        scores = head.score_pairs(hidden[pairs[held]].flatten(0, 1), sizes, novelty=True, dtype=torch.float64)
        assert scores.novelty is not None
        columns.append((scores.logit, scores.variance, scores.novelty, labels[held].double()))
    g, v, n, y = (torch.cat(column) for column in zip(*columns, strict=True))

    def best(amplitudes: tuple[float, ...], weights: tuple[float, ...]) -> list[float]:
        tried = [
            (-float(log_likelihood(g / torch.sqrt(1 + a * v + b * n), y).mean()), a, b)
            for a in amplitudes
            for b in weights
        ]
        return [round(value, 4) for value in min(tried)]

    return {
        "as served (a = π/8)": best((math.pi / 8,), (0.0,)),
        "a = π/8, b fitted": best((math.pi / 8,), WEIGHTS),
        "a = 0, b fitted": best((0.0,), WEIGHTS),
        "both fitted": best(AMPLITUDES, WEIGHTS),
    }


# -- what it costs ---------------------------------------------------------------------------------------------------


def _cost(head: FrozenHead, rows: Tensor, group: int = 8, rounds: int = 60) -> dict[str, float]:
    """Least microseconds of a call of 64 groups, without and with novelty, taken in turns in one process."""
    hidden = rows.repeat(-(-64 * group // len(rows)), 1)[: 64 * group]
    sizes = torch.full((64,), group, dtype=torch.int64)
    least = {False: math.inf, True: math.inf}
    for _ in range(rounds):
        for novelty in least:
            began = time.perf_counter()
            head.score_pairs(hidden, sizes, novelty=novelty)
            least[novelty] = min(least[novelty], time.perf_counter() - began)
    without, with_it = (round(1e6 * least[k]) for k in (False, True))
    return {"rows": len(hidden), "without_us": without, "with_us": with_it, "ratio": round(with_it / without, 2)}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--seeds", type=whole(), default=6)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("novelty: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = run(data, arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "novelty.json").write_text(
        json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    for name, stream in figures["streams"].items():
        print(name, stream)
    for name, group in figures["summary"].items():
        print(name, group)
    print("cost", figures["cost"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
