"""What a small model's critiques are worth to a head: accuracy with and without them, on the same pairs and folds.

SmolLM2-135M-Instruct (a GGUF, ``--critic``) writes a critique of each response of some PandaLM pairs; a head on
MiniLM's frozen states is fitted on four fifths of the prompts and asked about the rest: behind the critiques, and
behind an empty one. Needs the data folder. Writes ``critiques.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rmcore
from rmcore._base.files import write_atomic
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.engine.own_critic import OwnCritic
from rmcore.evaluation.statistics import Interval, mean_with_interval
from rmcore.evaluation.streams import find_data
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.judge.critics.critique import Critique
from rmcore.model.critiqued_data import CritiquedData, encode_critiqued
from rmcore.model.data import read_lines
from rmcore.model.reward_model import Preference
from rmcore.model.text import TextEncoder

__all__ = ["cross_fitted", "main"]

_FOLDS = 5


def cross_fitted(data: CritiquedData, fold: np.ndarray[Any, Any], config: HeadConfig) -> np.ndarray[Any, Any]:
    """(N,) 1 where a head that has not seen a pair's fold orders it as people do, ½ without a preference, else 0."""
    rows = data.states.rows.tolist()
    starts = np.concatenate([[0], np.cumsum(rows)])
    owner = np.searchsorted(starts, data.pairs[:, 0].cpu().numpy(), side="right") - 1
    right = np.zeros(len(rows))
    for k in range(_FOLDS):
        kept = torch.from_numpy(np.flatnonzero(fold[owner] != k))
        head, _ = fit(
            SNGPHead(config), data.hidden, data.labels[kept], pairs=data.pairs[kept], sample_weight=data.weights[kept]
        )
        asked = np.flatnonzero(fold == k).tolist()
        states = data.states.part(asked)
        hidden: Tensor = torch.cat([data.hidden[starts[n] : starts[n + 1]] for n in asked])
        scores = head.score_pairs(hidden, states.rows)
        right[asked] = 0.5 + 0.5 * states.pairs(scores.logit, scores.variance).logit.sign().numpy()
    return right


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m rmcore.bench.critiques", description=about)
    parser.add_argument("--data", help="the data folder; default RMCORE_DATA")
    parser.add_argument("--critic", type=Path, required=True, help="a GGUF file of a chat model")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="longest critique")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    folder = find_data(options.data)
    if folder is None:
        print("needs the data folder: --data or RMCORE_DATA", file=sys.stderr)
        return 2
    rows = [row for _, row in read_lines(folder / "pandalm.jsonl.gz")]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()[: options.pairs]
    pairs = [Preference(rows[k]["prompt"], rows[k]["chosen"], rows[k]["rejected"]) for k in order]
    pairs = [pair for pair in pairs if pair.chosen != pair.rejected]
    said = _critiques(options.critic, pairs, options.tokens)
    critiqued = [
        replace(pair, critiques=((a.text,) if a.text else (), (b.text,) if b.text else ()))
        for pair, a, b in zip(pairs, said[0::2], said[1::2], strict=True)
    ]
    backbone = demo_backbone()
    config = HeadConfig(backbone.hidden_size, **DEMO_HEAD)
    prompts = list(dict.fromkeys(str(pair.prompt) for pair in pairs))
    part = dict(zip(prompts, np.random.default_rng(1).permutation(len(prompts)) % _FOLDS, strict=True))
    plain = [replace(pair, critiques=None) for pair in pairs]
    found: dict[str, Any] = {}
    for name, given in (("without", plain), ("with", critiqued)):
        data = encode_critiqued(backbone, given)
        if len(data.kept) < len(pairs):
            print(f"{len(pairs) - len(data.kept)} pairs carry no signal", file=sys.stderr)
        fold = np.array([part[str(pairs[k].prompt)] for k in data.kept])
        right = np.full(len(pairs), 0.5)
        right[list(data.kept)] = cross_fitted(data, fold, config)
        found[name] = right
    cluster = np.array([prompts.index(str(pair.prompt)) for pair in pairs])
    interval = Interval(cluster, 2000, 0.95, 0)
    values = {**found, "difference": found["with"] - found["without"]}
    content = {
        "command": f"python -m rmcore.bench.critiques --critic {options.critic.name} --pairs {options.pairs} "
        f"--tokens {options.tokens}",
        "version": rmcore.__version__,
        "pairs": len(pairs),
        "critiques": len(said),
        "notes": dict(Counter(one.reason for one in said if one.reason)),
        "junk": dict(Counter(one.junk for one in said if one.junk)),
        "accuracy": {name: vars(mean_with_interval(value, interval)) for name, value in values.items()},
    }
    write_atomic(options.out / "critiques.json", json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))
    return 0


def _critiques(gguf: Path, pairs: Sequence[Preference], tokens: int) -> list[Critique]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    critic = OwnCritic(model, TextEncoder(tokenizer), max_new_tokens=tokens, temperature=0.7)
    items = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    found: list[Critique] = []
    for k, item in enumerate(items):
        found += asyncio.run(critic.critiques([item]))[0]
        print(f"{k + 1} of {len(items)} critiques", end="\r", file=sys.stderr)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
