"""What share of GenRM calls a router saves at equal accuracy: recorded verdicts, replayed as a generative reward model.

LLMBar has GPT-4's recorded verdicts in both orders, PandaLM gpt-3.5-turbo's; each is replayed as an endpoint that takes
the roles ``response_1`` and ``response_2`` and answers ``{score_1, score_2, ranking}``, or no JSON at all where the
record has no verdict. Pairs of a stream come in chunks of 64 to an engine with that judge (one order, as NeMo-Gym asks)
and the default router, which learns as it goes. Accuracy is against the human label; a tie or a missing preference
counts half. Saved is told for what accuracy (the mean over seeds) may lose against asking about every pair: nothing, 1
and 2 points. The share is chosen with the labels known, so it says what there is to be had, not what one would have
picked; the whole curve is in the file. Intervals are of a bootstrap over prompts.

Needs the data folder (``--data`` or RMCORE_DATA). Writes ``genrm.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import rmcore
from rmcore._base.client.options import ClientOptions
from rmcore.bench.routing import CHUNK, RECORDED
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.engine import RewardEngine
from rmcore.engine.routing import LearnedRouter
from rmcore.evaluation.evaluate import PairStates, encode_pairs
from rmcore.evaluation.streams import StreamPair, find_data, load_corpus, load_test_pairs
from rmcore.head import FrozenHead, HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.judge import GenRMJudge
from rmcore.judge.question.genrm import genrm_messages
from rmcore.model.error_prior import ErrorPrior
from rmcore.model.reward_model import encode_preferences, error_prior_of

__all__ = ["Replay", "main", "run"]

STREAMS = (("llmbar",), ("pandalm",), ("llmbar", "pandalm"))
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LOSSES = (0.0, 1.0, 2.0)
_SAID = {
    "win": '{"score_1": 4, "score_2": 2, "ranking": 2}',
    "loss": '{"score_1": 2, "score_2": 4, "ranking": 5}',
    "tie": '{"score_1": 3, "score_2": 3, "ranking": 3.5}',
    None: "Both have their merits.",
}
_BACK = {"win": "loss", "loss": "win", "tie": "tie", None: None}


class Replay:
    """A completion function that answers as the record says; an endpoint in all but the network."""

    name = "replayed"

    def __init__(self, pairs: Sequence[StreamPair]) -> None:
        self.calls = 0
        self.verdicts: dict[tuple[str, ...], str | None] = {}
        for pair in pairs:
            forward, backward = pair.verdicts or (None, None)  # both from the first response's side
            self.verdicts[self._key(genrm_messages(pair.prompt, pair.first, pair.second)[0])] = forward
            self.verdicts[self._key(genrm_messages(pair.prompt, pair.second, pair.first)[0])] = _BACK[backward]

    async def __call__(self, messages: list[dict[str, str]], /, **parameters: Any) -> dict[str, Any]:
        """One answer."""
        self.calls += 1
        said = _SAID[self.verdicts[self._key(messages)]]
        return {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]}

    @staticmethod
    def _key(messages: Sequence[dict[str, str]]) -> tuple[str, ...]:
        return tuple(message["content"] for message in messages)


def walked(
    head: FrozenHead, prior: ErrorPrior | None, pairs: Sequence[StreamPair], states: PairStates, share: float
) -> tuple[npt.NDArray[np.float64], int, int]:
    """Right (1, ½, 0) by pair, GenRM calls, and replies without a verdict."""
    replay = Replay(pairs)
    judge = GenRMJudge(complete=replay, model="genrm", client=ClientOptions(concurrency=64, first_concurrency=64))
    router = LearnedRouter(max(share, 1e-9), prior=prior)
    engine = RewardEngine(head, judge, router)
    right: list[float] = []
    failed = 0
    for start in range(0, len(pairs), CHUNK):
        some = pairs[start : start + CHUNK]
        hidden = states.hidden[start : start + CHUNK].flatten(0, 1)
        scores = engine.score_hidden(
            hidden,
            [2] * len(some),
            prompts=[pair.prompt for pair in some],
            responses=[[pair.first, pair.second] for pair in some],
        )
        failed += sum(scores.summary()["judge_failures"].values())
        for pair, group in zip(some, scores, strict=True):
            side = float(group.preference[0, 1].nan_to_num().sign()) * (1 if pair.label > 0.5 else -1)
            right.append(0.5 * (1 + side))
    judge.close()
    return np.array(right), replay.calls, failed


def interval(gain: npt.NDArray[np.float64], prompts: Sequence[str]) -> list[float]:
    """95% of the mean, in points, by a bootstrap over prompts."""
    names = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    owner = np.array([names[prompt] for prompt in prompts])
    sums = np.bincount(owner, weights=gain, minlength=len(names))
    sizes = np.bincount(owner, minlength=len(names))
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=1000)
    low, high = np.quantile(100 * (draws @ sums) / (draws @ sizes), [0.025, 0.975])
    return [round(float(low), 2), round(float(high), 2)]


def curve(
    parts: Mapping[str, tuple[Sequence[StreamPair], PairStates]], stream: tuple[str, ...], heads: Sequence[Any]
) -> Any:
    """Accuracy and calls of one stream at every share, and the least share at which accuracy is that of asking all."""
    size = min(len(parts[name][0]) for name in stream)
    right: dict[float, list[npt.NDArray[np.float64]]] = {share: [] for share in SHARES}
    calls: dict[float, list[int]] = {share: [] for share in SHARES}
    failed = 0
    prompts: list[str] = []
    for seed, (head, prior) in enumerate(heads):
        rng = np.random.default_rng([seed, *map(ord, "+".join(stream))])
        drawn = [(name, int(k)) for name in stream for k in rng.permutation(len(parts[name][0]))[:size]]
        order = rng.permutation(len(drawn))
        pairs = [parts[drawn[k][0]][0][drawn[k][1]] for k in order]
        hidden = torch.stack([parts[drawn[k][0]][1].hidden[drawn[k][1]] for k in order])
        states = PairStates(hidden, torch.ones(len(pairs), 2))
        prompts += [str(pair.prompt) for pair in pairs]
        for share in SHARES:
            found, asked, missing = walked(head, prior, pairs, states, share)
            right[share].append(found)
            calls[share].append(asked)
            failed += missing if share == 1.0 else 0
    everything = np.concatenate(right[1.0])
    table: list[dict[str, Any]] = [
        {
            "share": share,
            "calls": int(np.sum(calls[share])),
            "accuracy": round(100 * float(np.concatenate(right[share]).mean()), 2),
            "against_all": interval(np.concatenate(right[share]) - everything, prompts),
        }
        for share in SHARES
    ]
    saved = {}
    for loss in LOSSES:
        enough = next(row for row in table if row["accuracy"] >= table[-1]["accuracy"] - loss - 1e-9)
        saved[f"{loss:g}"] = {"saved": round(1 - enough["calls"] / table[-1]["calls"], 3), **enough}
    return {
        "judge": " and ".join(RECORDED[name] for name in stream),
        "pairs": len(everything) // len(heads),
        "calls_of_all": table[-1]["calls"],
        "replies_without_verdict": failed,
        "saved_for_points_lost": saved,
        "curve": table,
    }


def run(data: Path, seeds: int) -> dict[str, Any]:
    """All streams."""
    started = time.perf_counter()
    corpus = load_corpus(data)
    backbone = demo_backbone()
    backbone.use_state_cache()
    hidden, labels, rows = encode_preferences(backbone, corpus.train, "difference")
    assert rows is not None
    sources = {"llmbar": corpus.parts["llmbar"], "pandalm": load_test_pairs(data, "pandalm")}
    parts = {name: (some, encode_pairs(backbone, some, "difference")) for name, some in sources.items()}
    heads = []
    for seed in range(seeds):
        config = HeadConfig(hidden.shape[1], seed=seed, **DEMO_HEAD)
        head, _ = fit(SNGPHead(config), hidden, labels, pairs=rows, dtype=torch.float16)
        heads.append((head, error_prior_of(head.config, corpus.train, hidden, labels, rows)))
    streams = {}
    for stream in STREAMS:
        streams[" + ".join(stream)] = curve(parts, stream, heads)
        print(f"genrm: {' + '.join(stream)}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "command": f"python -m rmcore.bench.genrm --seeds {seeds}",
        "head": DEMO_HEAD,
        "seeds": seeds,
        "chunk": CHUNK,
        "training_pairs": len(corpus.train),
        "streams": streams,
    }


def main(argv: list[str] | None = None) -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    data = find_data(args.data)
    if data is None:
        print("genrm: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    found = run(data, args.seeds)
    (args.out / "genrm.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'stream':<18} {'head':>6} {'all':>6}  calls saved for 0, 1, 2 points lost")
    for name, told in found["streams"].items():
        first, last = told["curve"][0]["accuracy"], told["curve"][-1]["accuracy"]
        saved = ", ".join(f"{100 * row['saved']:.0f}%" for row in told["saved_for_points_lost"].values())
        print(f"{name:<18} {first:>6} {last:>6}  {saved}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
