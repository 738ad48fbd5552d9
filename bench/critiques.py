"""What a small model's critiques are worth to a head: accuracy with and without them, on the same pairs and folds.

SmolLM2-135M-Instruct (a GGUF, ``--critic``) writes critiques of the responses of some PandaLM pairs, over llama.cpp's
own server or (``--generate``) by transformers in this process; ``rmcore critique`` does it, so that a run that was
stopped goes on. A head on MiniLM's frozen states is fitted on four fifths of the prompts and asked about the rest:
behind an empty critique (``without``), behind one, behind two, and behind one of a response to another prompt, which
says nothing of this one (``shuffled``). ``unlike`` is a head that was fitted without critiques and asked behind them.
Needs the data folder. Writes ``critiques.json`` and ``critiques.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import rmcore
from rmcore._base.arguments import whole
from rmcore._base.files import write_atomic
from rmcore.bench.llama_server import PORT, served
from rmcore.cli import app
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.evaluation.report import Estimate
from rmcore.evaluation.statistics import Interval, mean_with_interval
from rmcore.evaluation.streams import find_data
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.judge.critics.critique import junk_reason
from rmcore.model.critiqued_data import CritiquedData, encode_critiqued
from rmcore.model.data import read_lines, read_preferences
from rmcore.model.training_pairs import Preference

__all__ = ["cross_fitted", "main", "shuffled"]

_FOLDS = 5
_SLOTS = 8
_REPEATS = 5
"""Divisions into folds, over which a pair's accuracy is the mean: the folds are no part of what is asked."""

_TITLES = {
    "without": "none (an empty one)",
    "with": "its own, one",
    "two": "its own, two",
    "shuffled": "one of another response",
    "unlike": "fitted without, asked behind one",
}


@dataclass(frozen=True)
class Found:
    """What is in ``critiques.json``."""

    command: str
    pairs: int
    prompts: int
    told: dict[str, Any]
    accuracy: dict[str, Estimate]
    difference: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "command": self.command,
            "version": rmcore.__version__,
            "pairs": self.pairs,
            "prompts": self.prompts,
            "folds": _FOLDS,
            "repeats": _REPEATS,
            "critiques": self.told,
            "accuracy": {name: vars(value) for name, value in self.accuracy.items()},
            "less_without": {name: vars(value) for name, value in self.difference.items()},
        }

    def to_markdown(self) -> str:
        """As a table."""
        lines = [
            "# A head behind a small model's critiques",
            "",
            f"`{self.command}`",
            "",
            f"{self.pairs} pairs of {self.prompts} prompts, {_FOLDS} folds by prompt, mean of {_REPEATS} divisions; "
            "95% intervals over prompts.",
            "",
            "| critiques | accuracy, % | less that without, points |",
            "|---|---|---|",
        ]
        for name, value in self.accuracy.items():
            less = _percent(self.difference[name]) if name in self.difference else "–"
            lines.append(f"| {_TITLES[name]} | {_percent(value)} | {less} |")
        return "\n".join(lines) + "\n"


def cross_fitted(
    data: CritiquedData,
    fold: npt.NDArray[np.int64],
    config: HeadConfig,
    asked: CritiquedData | None = None,
) -> npt.NDArray[np.float64]:
    """(N,) 1 where a head that has not seen a pair's fold orders it as people do, ½ without a preference, else 0.

    ``asked`` are the same pairs as they are asked about, where that is otherwise than as they are trained on.
    """
    asked = data if asked is None else asked
    starts = np.concatenate([[0], np.cumsum(data.states.rows.numpy())])
    owner = np.searchsorted(starts, data.pairs[:, 0].cpu().numpy(), side="right") - 1
    of_asked = np.concatenate([[0], np.cumsum(asked.states.rows.numpy())])
    right = np.zeros(len(data.kept))
    for k in range(_FOLDS):
        kept = torch.from_numpy(np.flatnonzero(fold[owner] != k))
        head, _ = fit(
            SNGPHead(config), data.hidden, data.labels[kept], pairs=data.pairs[kept], sample_weight=data.weights[kept]
        )
        out = np.flatnonzero(fold == k).tolist()
        states = asked.states.part(out)
        hidden: Tensor = torch.cat([asked.hidden[of_asked[n] : of_asked[n + 1]] for n in out])
        scores = head.score_pairs(hidden, states.rows)
        right[out] = 0.5 + 0.5 * states.pairs(scores.logit, scores.variance).logit.sign().numpy()
    return right


def shuffled(pairs: Sequence[Preference], seed: int) -> list[Preference]:
    """Each response behind critiques of a response to another prompt: as they are, of nothing that is here."""
    own = [(str(pair.prompt), said) for pair in pairs for said in pair.critiques or ((), ())]
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(own))
    # Exchanged until each stands behind another prompt than its own; a few rounds, as few prompts have many pairs.
    for _ in range(1000):
        wrong = [k for k, j in enumerate(order) if own[k][0] == own[j][0]]
        if not wrong:
            break
        for k in wrong:
            other = int(generator.integers(len(own)))
            order[k], order[other] = order[other], order[k]
    else:
        raise ValueError("all pairs are of one prompt")
    return [replace(pair, critiques=(own[order[2 * n]][1], own[order[2 * n + 1]][1])) for n, pair in enumerate(pairs)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m rmcore.bench.critiques", description=about)
    parser.add_argument("--data", help="the data folder; default RMCORE_DATA")
    parser.add_argument("--critic", type=Path, required=True, help="a GGUF file of a chat model")
    parser.add_argument("--generate", action="store_true", help="by transformers, not over llama.cpp's server")
    parser.add_argument("--pairs", type=whole(), default=200)
    parser.add_argument("--samples", type=whole(), default=2, help="critiques a response")
    parser.add_argument("--tokens", type=whole(), default=64, help="longest critique")
    parser.add_argument("--threads", type=whole(), default=1, help="of the server; more only where cores are free")
    parser.add_argument(
        "--port",
        type=whole(least=0, most=65_535),
        default=PORT,
        help="of the server: the same again to go on from the store",
    )
    parser.add_argument("--work", type=Path, default=Path("out/critiques"), help="where critiques are kept")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    folder = find_data(options.data)
    if folder is None:
        print("needs the data folder: --data or RMCORE_DATA", file=sys.stderr)
        return 2
    found = measured(_criticised(_chosen(folder, options.pairs), options), _command(options))
    write_atomic(options.out / "critiques.json", json.dumps(found.to_dict(), indent=1) + "\n")
    write_atomic(options.out / "critiques.md", found.to_markdown())
    print(found.to_markdown())
    return 0


def measured(pairs: Sequence[Preference], command: str) -> Found:
    """Accuracy of each way, and by how much it exceeds that without critiques."""
    backbone = demo_backbone()
    backbone.use_state_cache()
    config = HeadConfig(backbone.hidden_size, **DEMO_HEAD)
    ways: dict[str, Callable[[], list[Preference]]] = {
        "without": lambda: [replace(pair, critiques=None) for pair in pairs],
        "with": lambda: [_first(pair, 1) for pair in pairs],
        "two": lambda: [_first(pair, 2) for pair in pairs],
        "shuffled": lambda: shuffled([_first(pair, 1) for pair in pairs], 2),
    }
    if max(len(own) for pair in pairs for own in pair.critiques or ((), ())) < 2:
        del ways["two"]
    prompts = list(dict.fromkeys(str(pair.prompt) for pair in pairs))
    number = {prompt: k for k, prompt in enumerate(prompts)}
    cluster = np.array([number[str(pair.prompt)] for pair in pairs])
    encoded: dict[str, CritiquedData] = {}
    for name, make in ways.items():
        encoded[name] = encode_critiqued(backbone, make())
        if len(encoded[name].kept) < len(pairs):
            print(f"{name}: {len(pairs) - len(encoded[name].kept)} pairs carry no signal", file=sys.stderr)
    right = {name: np.zeros(len(pairs)) for name in (*ways, "unlike")}
    for repeat in range(_REPEATS):
        part = np.random.default_rng(1 + repeat).permutation(len(prompts)) % _FOLDS
        fold = part[cluster]
        for name in right:
            data = encoded["without" if name == "unlike" else name]
            asked = encoded["with"] if name == "unlike" else None
            if asked is not None and asked.kept != data.kept:
                raise ValueError("pairs that carry a signal differ with and without critiques")
            own = np.full(len(pairs), 0.5)
            own[list(data.kept)] = cross_fitted(data, fold[list(data.kept)], config, asked)
            right[name] += own / _REPEATS
    interval = Interval(cluster, 2000, 0.95, 0)
    return Found(
        command,
        len(pairs),
        len(prompts),
        _told(pairs),
        {name: mean_with_interval(value, interval) for name, value in right.items()},
        {
            name: mean_with_interval(value - right["without"], interval)
            for name, value in right.items()
            if name != "without"
        },
    )


def _chosen(folder: Path, count: int) -> list[dict[str, str]]:
    rows = [row for _, row in read_lines(folder / "pandalm.jsonl.gz")]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()[:count]
    return [
        {key: rows[k][key] for key in ("prompt", "chosen", "rejected")}
        for k in order
        if rows[k]["chosen"] != rows[k]["rejected"]
    ]


def _criticised(rows: Sequence[dict[str, str]], options: argparse.Namespace) -> list[Preference]:
    """The pairs with their critiques: those that are there, the others written now."""
    options.work.mkdir(parents=True, exist_ok=True)
    asked, said = options.work / "pairs.jsonl", options.work / "critiqued.jsonl"
    write_atomic(asked, "".join(json.dumps(row) + "\n" for row in rows))
    common = [asked, "--samples", options.samples, "--temperature", 0.7, "-o", said]
    if options.generate:
        _run([*common, "--resume", "--generate", options.critic, "--max-tokens-generated", options.tokens])
    else:
        # From the store what was bought before; the file is written anew.
        with served(options.critic, slots=_SLOTS, context=1536, threads=options.threads, port=options.port) as url:
            asking = ["--judge-url", url, "--judge-model", options.critic.stem, "--judge-key-env", ""]
            asking += ["--judge-max-tokens", options.tokens, "--judge-concurrency", _SLOTS, "--judge-timeout", 1800]
            _run([*common, "--overwrite", *asking, "--store", options.work / "critiques.db"])
    return list(read_preferences(said, critiques=True))


def _run(arguments: Sequence[object]) -> None:
    app(["critique", *map(str, arguments)], standalone_mode=False)


def _first(pair: Preference, count: int) -> Preference:
    chosen, rejected = pair.critiques or ((), ())
    return replace(pair, critiques=(chosen[:count], rejected[:count]))


def _told(pairs: Sequence[Preference]) -> dict[str, Any]:
    """How many critiques there are, and what is amiss with them."""
    own = [
        (text, response)
        for pair in pairs
        for texts, response in zip(pair.critiques or ((), ()), (pair.chosen, pair.rejected), strict=True)
        for text in texts
    ]
    junk = Counter(junk_reason(text, response) for text, response in own)
    del junk[""]
    words = [len(text.split()) for text, _ in own]
    none = sum(not texts for pair in pairs for texts in pair.critiques or ((), ()))
    return {"texts": len(own), "responses_without": none, "junk": dict(junk), "median_words": float(np.median(words))}


def _command(options: argparse.Namespace) -> str:
    return (
        f"python -m rmcore.bench.critiques --critic {options.critic.name} --pairs {options.pairs} "
        f"--samples {options.samples} --tokens {options.tokens}" + " --generate" * options.generate
    )


def _percent(value: Estimate) -> str:
    return f"{100 * value.point:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]".replace("-", "−")


if __name__ == "__main__":
    raise SystemExit(main())
