"""MC dropout through the backbone beside dropout over its states and SNGP: what T passes buy.

The demo's backbone (MiniLM, a BERT with dropout of 0.1) reads the test pairs of two streams T times under masks of the
network (:mod:`rmcore.model.dropout`); the head is the SNGP head of ``uncertainties``, fitted on the plain states. Needs
the data folder (``--data`` or RMCORE_DATA). Writes ``backbone_dropout.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmcore
from rmcore._base.arguments import whole
from rmcore._base.files import write_atomic
from rmcore.bench.uncertainties import fit_estimator, measure
from rmcore.cli.run_demo import demo_backbone
from rmcore.evaluation.evaluate import PairStates, encode_pairs
from rmcore.evaluation.streams import find_data, load_corpus
from rmcore.head.estimators import SNGP, PairEstimate
from rmcore.head.estimators.samples import sampled_estimate
from rmcore.model.dropout import dropout_layers, dropout_states
from rmcore.model.reward_model import RewardModel
from rmcore.model.training_pairs import encode_preferences

__all__ = ["ThroughBackbone", "main", "run"]


class ThroughBackbone:
    """A model's head on T states of each row, which lie side by side: rows (R, T·h)."""

    name, kind = "backbone dropout", "epistemic"

    def __init__(self, model: RewardModel, passes: int) -> None:
        self.model, self.passes = model, passes

    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """Moments over the passes."""
        each = hidden.view(len(hidden), self.passes, -1).unbind(1)
        return sampled_estimate(torch.stack([self.model.row_scores(rows) for rows in each], 1), group_sizes)


def run(data: Path, passes: int, seeds: int, most: int | None = None, replicates: int = 1000) -> dict[str, Any]:
    """All figures, as JSON values; of ``most`` pairs of each part, drawn once."""
    corpus, backbone = load_corpus(data), demo_backbone()
    draw = np.random.default_rng(0)
    parts = {name: corpus.parts[name] for name in ("id", "llmbar")}
    kept = {name: sorted(draw.permutation(len(part))[:most].tolist()) for name, part in parts.items()}
    mixes = tuple(mix for mix in corpus.mixes if set(mix[2]) <= set(parts))
    corpus = replace(
        corpus, parts={name: tuple(part[k] for k in kept[name]) for name, part in parts.items()}, mixes=mixes
    )
    backbone.use_state_cache()
    hidden, labels, pairs = encode_preferences(backbone, corpus.train, "difference")
    assert pairs is not None
    everything = [pair for part in corpus.parts.values() for pair in part]
    where = {id(pair): k for k, pair in enumerate(everything)}
    plain = encode_pairs(backbone, everything, "difference")
    texts = [backbone.encoder.encode(p.prompt, text) for p in everything for text in (p.first, p.second)]
    began = time.perf_counter()
    drawn = dropout_states(backbone, texts, passes=passes, progress=lambda k, n: print(f"pass {k} of {n}", flush=True))
    seconds = time.perf_counter() - began
    rows = PairStates(drawn.permute(1, 0, 2).reshape(len(everything), 2, -1).cpu(), plain.tokens)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for seed in range(seeds):
        head = fit_estimator("sngp", hidden, labels, pairs, seed)
        assert isinstance(head, SNGP)
        beside = {"sngp": head, "dropout": fit_estimator("dropout", hidden, labels, pairs, seed)}
        ways: dict[str, tuple[Any, PairStates]] = {name: (one, plain) for name, one in beside.items()}
        ways["backbone dropout"] = ThroughBackbone(RewardModel(backbone, head.head), passes), rows
        for stream in corpus.streams(seed):
            at = [where[id(pair)] for pair in stream.pairs]
            for name, (estimator, states) in ways.items():
                figures, _ = measure(estimator, states[at], stream.pairs, replicates=replicates, seed=seed)
                found.setdefault(stream.name, {}).setdefault(name, []).append(figures)
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "passes": passes,
        "seeds": seeds,
        "rates": sorted(set(dropout_layers(backbone).values())),
        "layers": len(dropout_layers(backbone)),
        "pairs": {name: len(part) for name, part in corpus.parts.items()},
        "seconds_of_passes": round(seconds, 1),
        "streams": {
            stream: {
                name: {key: np.mean([one[key] for one in runs], 0).round(4).tolist() for key in runs[0]}
                for name, runs in ways_of.items()
            }
            for stream, ways_of in found.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--passes", type=whole(), default=10)
    parser.add_argument("--seeds", type=whole(), default=3)
    parser.add_argument("--pairs", type=whole(), help="of each part; default: all")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("backbone_dropout: no data folder; give --data or set RMCORE_DATA. Nothing was measured", file=sys.stderr)
        return 2
    figures = run(data, arguments.passes, arguments.seeds, arguments.pairs)
    text = json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(arguments.out / "backbone_dropout.json", text)
    for stream, ways in figures["streams"].items():
        for name, own in ways.items():
            uplift = " / ".join(f"{point:+.1f} [{low:+.1f}, {high:+.1f}]" for point, low, high in own["uplift"])
            print(f"{stream}, {name}: accuracy {own['accuracy'][0]:.1f}%, log-loss {own['log_loss']:.3f}, ", end="")
            print(f"AUROC of errors {own['auroc_by_variance']:.3f}, uplift at 10 / 25 / 45% {uplift}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
