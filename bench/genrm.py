"""What share of GenRM calls a router saves at equal accuracy: recorded verdicts, replayed as a generative reward model.

LLMBar has GPT-4's recorded verdicts in both orders, PandaLM gpt-3.5-turbo's; each is replayed as an endpoint that takes
the roles ``response_1`` and ``response_2`` and answers ``{score_1, score_2, ranking}``, or no JSON at all where the
record has no verdict. Pairs of a stream come in chunks of 64 to an engine with that judge (one order, as NeMo-Gym asks)
and the default router, which learns as it goes. Accuracy is against the human label; a tie or a missing preference
counts half. Saved is told for what accuracy (the mean over seeds) may lose against asking about every pair: nothing, 1
and 2 points. The share is chosen with the labels known, so it says what there is to be had, not what one would have
picked; the whole curve is in the file. Intervals are of a bootstrap over prompts.

``--more`` tries two ways that might save more, each with a curve of its own: ``learning``, where the head folds a
chunk's verdicts in before it sees the next (:class:`~rmcore.engine.learning.VerdictLearner`), and ``combined``, where a
verdict and the head's own preference are taken for two independent witnesses and their log-odds added, the verdict's
being those of a judge that is right four times in five (a tie's are 0, so the head decides it).

Needs the data folder (``--data`` or RMCORE_DATA). Writes ``genrm.json``, or ``genrm_more.json``, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import rmcore
from rmcore._base.arguments import whole
from rmcore._base.client.options import ClientOptions
from rmcore.bench.routing import CHUNK
from rmcore.bench.routing_streams import RECORDED
from rmcore.cli.run_demo import DEMO_HEAD, demo_backbone
from rmcore.engine import RewardEngine
from rmcore.engine.learning import VerdictLearner
from rmcore.engine.routing import LearnedRouter
from rmcore.evaluation.evaluate import PairStates, encode_pairs
from rmcore.evaluation.streams import StreamPair, find_data, load_corpus, load_test_pairs
from rmcore.head import FrozenHead, HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.judge import GenRMJudge
from rmcore.judge.question.genrm import genrm_messages
from rmcore.model.error_prior import ErrorPrior
from rmcore.model.error_prior_fit import error_prior_of
from rmcore.model.training_pairs import encode_preferences

__all__ = ["Replay", "main", "run"]

STREAMS = (("llmbar",), ("pandalm",), ("llmbar", "pandalm"))
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LEARNING_SHARES = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
"""Fewer: an update of the head takes longer than all else."""
LOSSES = (0.0, 1.0, 2.0)
_SAID = {
    "win": '{"score_1": 4, "score_2": 2, "ranking": 2}',
    "loss": '{"score_1": 2, "score_2": 4, "ranking": 5}',
    "tie": '{"score_1": 3, "score_2": 3, "ranking": 3.5}',
    None: "Both have their merits.",
}
_WITNESS = math.log(4)
"""Log-odds of a judge that is right four times in five."""
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


@dataclass(frozen=True)
class Walk:
    """One pass over a stream.

    Attributes:
        right: by pair, 1, ½ or 0.
        combined: likewise, where a judged pair has the sum of both log-odds.
        calls: of the GenRM.
        failed: replies without a verdict.
    """

    right: npt.NDArray[np.float64]
    combined: npt.NDArray[np.float64]
    calls: int
    failed: int


def walked(
    head: FrozenHead,
    prior: ErrorPrior | None,
    pairs: Sequence[StreamPair],
    states: PairStates,
    share: float,
    *,
    learn: bool = False,
) -> Walk:
    """One pass, in chunks; ``learn``: the head takes a chunk's verdicts in before the next."""
    with tempfile.TemporaryDirectory() as journal:
        learner = VerdictLearner(head, journal, snapshot_every=1000) if learn else None
        return _walked(head, prior, pairs, states, share, learner)


def _walked(
    head: FrozenHead,
    prior: ErrorPrior | None,
    pairs: Sequence[StreamPair],
    states: PairStates,
    share: float,
    learner: VerdictLearner | None,
) -> Walk:
    replay = Replay(pairs)
    judge = GenRMJudge(complete=replay, model="genrm", client=ClientOptions(concurrency=64, first_concurrency=64))
    router = LearnedRouter(max(share, 1e-9), prior=prior)
    engine = RewardEngine(head, judge, router, learner=learner)
    right: list[float] = []
    combined: list[float] = []
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
            better = 1 if pair.label > 0.5 else -1
            right.append(0.5 * (1 + better * _sign(group.preference[0, 1])))
            own = group.logit[0, 1] / group.uncertainty[0, 1]
            verdict = next((one.verdict for one in group.decisions if one.verdict is not None), None)
            said = None if verdict is None else verdict.preference
            combined.append(0.5 * (1 + better * _sign(own if said is None else own + _WITNESS * np.sign(said))))
        if learner is not None:
            engine.update(scores)
    judge.close()
    if learner is not None:
        learner.close()
    return Walk(np.array(right), np.array(combined), replay.calls, failed)


def _sign(value: torch.Tensor) -> float:
    return float(value.nan_to_num().sign())


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
    parts: Mapping[str, tuple[Sequence[StreamPair], PairStates]],
    stream: tuple[str, ...],
    heads: Sequence[Any],
    more: bool,
) -> Any:
    """Accuracy and calls of one stream at every share, and the least share at which accuracy is that of asking all."""
    size = min(len(parts[name][0]) for name in stream)
    fixed: dict[float, list[Walk]] = {share: [] for share in SHARES}
    learning: dict[float, list[Walk]] = {share: [] for share in LEARNING_SHARES if more}
    prompts: list[str] = []
    for seed, (head, prior) in enumerate(heads):
        rng = np.random.default_rng([seed, *map(ord, "+".join(stream))])
        drawn = [(name, int(k)) for name in stream for k in rng.permutation(len(parts[name][0]))[:size]]
        order = rng.permutation(len(drawn))
        pairs = [parts[drawn[k][0]][0][drawn[k][1]] for k in order]
        hidden = torch.stack([parts[drawn[k][0]][1].hidden[drawn[k][1]] for k in order])
        states = PairStates(hidden, torch.ones(len(pairs), 2))
        prompts += [str(pair.prompt) for pair in pairs]
        for learn, by_share in ((False, fixed), (True, learning)):
            for share, walks in by_share.items():
                walks.append(walked(head, prior, pairs, states, share, learn=learn))
    asked = fixed[1.0]
    everything = np.concatenate([walk.right for walk in asked])
    calls_of_all = sum(walk.calls for walk in asked)
    told: dict[str, Any] = {
        "judge": " and ".join(RECORDED[name] for name in stream),
        "pairs": len(everything) // len(heads),
        "calls_of_all": calls_of_all,
        "replies_without_verdict": sum(walk.failed for walk in asked),
    }
    told |= _told(fixed, "right", everything, calls_of_all, prompts)
    if more:
        told["combined"] = _told(fixed, "combined", everything, calls_of_all, prompts)
        told["learning"] = _told(learning, "right", everything, calls_of_all, prompts)
    return told


def _told(
    walks: Mapping[float, Sequence[Walk]],
    what: str,
    everything: npt.NDArray[np.float64],
    calls_of_all: int,
    prompts: Sequence[str],
) -> dict[str, Any]:
    """A curve, and where it first reaches what asking about every pair is right in."""
    table: list[dict[str, Any]] = []
    for share, some in walks.items():
        right = np.concatenate([getattr(walk, what) for walk in some])
        table.append(
            {
                "share": share,
                "calls": sum(walk.calls for walk in some),
                "accuracy": round(100 * float(right.mean()), 2),
                "against_all": interval(right - everything, prompts),
            }
        )
    goal, saved = round(100 * float(everything.mean()), 2), {}
    for loss in LOSSES:
        enough = next((row for row in table if row["accuracy"] >= goal - loss - 1e-9), None)
        saved[f"{loss:g}"] = (
            None if enough is None else {"saved": round(1 - enough["calls"] / calls_of_all, 3), **enough}
        )
    return {"saved_for_points_lost": saved, "curve": table}


def run(data: Path, seeds: int, streams: Sequence[tuple[str, ...]] = STREAMS, more: bool = False) -> dict[str, Any]:
    """All streams, or some; with ``more`` the other ways too."""
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
    found = {}
    for stream in streams:
        found[" + ".join(stream)] = curve(parts, stream, heads, more)
        print(f"genrm: {' + '.join(stream)}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "command": f"python -m rmcore.bench.genrm --seeds {seeds}"
        + "".join(f" --stream {'+'.join(stream)}" for stream in streams if len(streams) < len(STREAMS))
        + " --more" * more,
        "head": DEMO_HEAD,
        "seeds": seeds,
        "chunk": CHUNK,
        "training_pairs": len(corpus.train),
        "streams": found,
    }


def main(argv: list[str] | None = None) -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=whole(), default=5)
    parser.add_argument("--stream", action="append", choices=["+".join(stream) for stream in STREAMS])
    parser.add_argument("--more", action="store_true", help="also a head that learns, and verdicts and head combined")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    data = find_data(args.data)
    if data is None:
        print("genrm: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    names = {"+".join(stream): stream for stream in STREAMS}
    found = run(data, args.seeds, [names[name] for name in args.stream or names], args.more)
    (args.out / ("genrm_more.json" if args.more else "genrm.json")).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'stream':<18} {'':<10} {'head':>6} {'most':>6}  calls saved for 0, 1, 2 points lost")
    for name, told in found["streams"].items():
        for way, some in {
            "routed": told,
            **{one: told[one] for one in ("combined", "learning") if one in told},
        }.items():
            first, last = some["curve"][0]["accuracy"], some["curve"][-1]["accuracy"]
            rows = some["saved_for_points_lost"].values()
            saved = ", ".join("never" if row is None else f"{100 * row['saved']:.0f}%" for row in rows)
            print(f"{name:<18} {way:<10} {first:>6} {last:>6}  {saved}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
