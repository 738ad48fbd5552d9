"""How much of the judge's time disappears behind the backbone: 256 groups, a loopback judge that takes 300 ms a call.

A small random Llama scores groups of responses; a threshold on u sends about a quarter of the pairs to a
:class:`~rmcore.judge.chat.ChatJudge` over HTTP, whose server replays recorded verdicts in a process of its own, so that
it does not compete for this interpreter. Measured are the backbone alone, the judge alone (the same pairs at once), one
after the other (a router that wants the whole batch) and both at once; the claim is that both at once take no more than
15% longer than the longer of the two alone. Writes ``overlap.json``; exits 1 if the claim does not hold.

A machine that does something else meanwhile shows whatever it likes, so each round notes how many cores other processes
kept busy; where the operating system tells (Linux), rounds with more than ``--others`` cores are set aside, and are
reported as such.

    python -m rmcore.bench.overlap
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmcore._base.arguments import real, whole
from rmcore._base.client.options import ClientOptions
from rmcore.engine import RewardEngine
from rmcore.engine.groups import GroupScores
from rmcore.engine.routing import BudgetRouter, NeverRoute, ThresholdRouter
from rmcore.head import HeadConfig
from rmcore.judge.base import Pair
from rmcore.judge.chat import ChatJudge
from rmcore.model import Preference, RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

from .harness import environment

__all__ = ["main", "run"]

TOLERANCE = 0.15
WORDS = 2000


@dataclass(frozen=True)
class Setting:
    """What is measured; see the command line's help."""

    groups: int
    responses: int
    share: float
    latency_s: float
    concurrency: int
    hidden_size: int
    layers: int
    tokens_per_batch: int
    rounds: int
    others: float
    patience: int


def make_backbone(setting: Setting) -> Backbone:
    """A random Llama with a vocabulary of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["<pad>", "<unk>", *(f"w{n}" for n in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - a token of text
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")  # noqa: S106
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=setting.hidden_size,
        intermediate_size=3 * setting.hidden_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.hidden_size // 32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    kind = BackboneConfig(pooling="mean", append_eos=False)
    return Backbone(model, tokenizer, kind, tokens_per_batch=setting.tokens_per_batch)


def make_text(draw: random.Random, mean: float) -> str:
    """Words, of a log-normal number: lengths of real responses are spread like that."""
    count = min(400, max(4, round(mean * draw.lognormvariate(-0.18, 0.6))))
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(count))


def make_groups(setting: Setting) -> tuple[list[str], list[list[str]]]:
    """Prompts and responses."""
    draw = random.Random(1)
    prompts = [make_text(draw, 40) for _ in range(setting.groups)]
    return prompts, [[make_text(draw, 90) for _ in range(setting.responses)] for _ in prompts]


def make_model(setting: Setting) -> RewardModel:
    """A head fitted on preferences for the longer text, a little of everything else."""
    draw = random.Random(2)
    preferences = []
    for _ in range(64):
        texts = sorted((make_text(draw, 90), make_text(draw, 90)), key=len)
        preferences.append(Preference(make_text(draw, 40), texts[1], texts[0]))
    config = HeadConfig(setting.hidden_size, num_features=512, kernel_scale=3.0, length_scale_factor=2.0)
    return RewardModel.fit(make_backbone(setting), preferences, config)[0]


@contextmanager
def replay_server(pairs: Sequence[Pair], latency_s: float) -> Iterator[tuple[str, int]]:
    """The base URL and process number of a server in another process that prefers the longer response."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verdicts.jsonl"
        with file.open("w") as lines:
            for pair in pairs:
                verdict = "win" if len(pair.first) > len(pair.second) else "loss"
                row = {"prompt": pair.prompt, "first": pair.first, "second": pair.second, "verdict": verdict}
                lines.write(json.dumps(row) + "\n")
        command = [sys.executable, "-m", "rmcore.judge.testing", str(file), "--latency", str(latency_s)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.terminate()
            server.wait(10)


def run(setting: Setting, sweep: Sequence[int] = ()) -> dict[str, Any]:
    """Measure; → JSON figures."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # client and server need a core too
    model = make_model(setting)
    prompts, responses = make_groups(setting)
    alone = RewardEngine(model, None, NeverRoute())
    first = alone.score(prompts, responses)
    above = torch.triu_indices(setting.responses, setting.responses, 1)
    u = torch.cat([group.uncertainty[tuple(above)] for group in first])
    threshold = float(u.quantile(1 - setting.share))
    pairs = [
        Pair(prompts[g], responses[g][i], responses[g][j])
        for g, group in enumerate(first)
        for i, j in above.T.tolist()
        if group.uncertainty[i, j] > threshold
    ]
    with replay_server(pairs, setting.latency_s) as (url, server):
        judge = ChatJudge(url, "replay", None, client=ClientOptions(concurrency=setting.concurrency))
        after = RewardEngine(model, judge, BudgetRouter(count=len(pairs)))
        both = RewardEngine(model, judge, ThresholdRouter(threshold))
        judge.judge_sync(pairs)  # connections, and the concurrency that the client finds by trying
        rounds: list[dict[str, Any]] = []
        while sum(r["quiet"] for r in rounds) < setting.rounds and len(rounds) < setting.rounds + setting.patience:
            began = time.perf_counter(), _busy_elsewhere(server)
            times = {
                "backbone": _seconds(lambda: alone.score(prompts, responses)),
                "judge": _seconds(lambda: judge.judge_sync(pairs)),
                "one_after_the_other": _seconds(lambda: after.score(prompts, responses)),
            }
            scores = both.score(prompts, responses)
            times["overlapped"] = scores.seconds["total"]
            others = (_busy_elsewhere(server) - began[1]) / (time.perf_counter() - began[0])
            quiet = not others > setting.others  # also where nobody can tell
            rounds.append({**times, "others": others if others == others else None, "quiet": quiet})
        swept = [_swept(model, judge, threshold, passes, prompts, responses) for passes in sweep]
        judge.close()
    figures = _figures(setting, rounds, scores, len(pairs), model)
    return figures | ({"micro_batch_sizes": swept} if swept else {})


def _busy_elsewhere(server: int) -> float:
    """Seconds of processor time since the machine started that are neither ours nor the server's; NaN if unknown."""
    try:
        fields = [float(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        other = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    tick = os.sysconf("SC_CLK_TCK")
    busy = sum(fields[:8]) - fields[3] - fields[4]  # without idle and waiting for input or output
    return (busy - float(other[11]) - float(other[12])) / tick - time.process_time()


def _figures(
    setting: Setting, rounds: list[dict[str, Any]], scores: GroupScores, judged: int, model: RewardModel
) -> dict[str, Any]:
    counted = [r for r in rounds if r["quiet"]] or rounds
    names = ("backbone", "judge", "one_after_the_other", "overlapped")
    median = {name: statistics.median(r[name] for r in counted) for name in names}
    longer = max(median["backbone"], median["judge"])
    summary = scores.summary()
    assert summary["decided_by"]["judge"] == judged, summary["judge_failures"]
    return {
        "environment": environment(model.backbone.device),
        "setting": setting.__dict__,
        "pairs": summary["pairs"],
        "judged": judged,
        "judge_calls": summary["judge_usage"]["calls"],
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "sum": round(median["backbone"] + median["judge"], 3),
        "over_the_longer": round(median["overlapped"] / longer - 1, 4),
        "within_tolerance": median["overlapped"] <= (1 + TOLERANCE) * longer,
        "last_overlapped_call": summary["overlap"],
        "quiet_rounds": sum(r["quiet"] for r in rounds),
        "rounds": [{name: round(v, 3) if isinstance(v, float) else v for name, v in r.items()} for r in rounds],
    }


def _swept(
    model: RewardModel,
    judge: ChatJudge,
    threshold: float,
    passes: int,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """One micro-batch size, in full forward passes: what cutting the batch up costs, and what it brings."""
    tokens = passes * model.backbone.tokens_per_batch
    nobody = RewardEngine(model, judge, ThresholdRouter(float("inf")), micro_batch_tokens=tokens)
    engine = RewardEngine(model, judge, ThresholdRouter(threshold), micro_batch_tokens=tokens)
    backbone = min(_seconds(lambda: nobody.score(prompts, responses)) for _ in range(2))
    runs = [engine.score(prompts, responses) for _ in range(2)]
    best = min(runs, key=lambda scores: scores.seconds["total"])
    assert best.encoding is not None
    return {
        "passes": passes,
        "micro_batches": best.overlap.micro_batches,
        "computed_tokens_per_token": round(best.encoding.computed_tokens / best.encoding.tokens, 3),
        "backbone_s": round(backbone, 3),
        "overlapped_s": round(best.seconds["total"], 3),
        "hidden_s": round(best.overlap.hidden_s, 3),
    }


def _seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=whole(), default=256)
    parser.add_argument("--responses", type=whole(), default=4, help="in each group")
    parser.add_argument("--share", type=real(least=0, most=1), default=0.25, help="of the pairs that go to the judge")
    parser.add_argument("--latency", type=real(least=0), default=0.3, help="seconds a judge call takes")
    parser.add_argument("--concurrency", type=whole(), default=64, help="judge calls at once")
    parser.add_argument("--hidden-size", type=whole(), default=384)
    parser.add_argument("--layers", type=whole(), default=3)
    parser.add_argument("--tokens-per-batch", type=whole(), default=2048)
    parser.add_argument("--rounds", type=whole(), default=5)
    parser.add_argument(
        "--others", type=real(least=0), default=0.2, help="cores that other processes may use in a round"
    )
    parser.add_argument("--patience", type=whole(least=0), default=20, help="rounds that may be set aside")
    parser.add_argument(
        "--sweep", type=whole(), nargs="*", default=[], metavar="PASSES", help="micro-batch sizes to try"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    setting = Setting(
        options.groups,
        options.responses,
        options.share,
        options.latency,
        options.concurrency,
        options.hidden_size,
        options.layers,
        options.tokens_per_batch,
        options.rounds,
        options.others,
        options.patience,
    )
    figures = run(setting, options.sweep)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overlap.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    seconds = figures["seconds"]
    judged = f"{figures['judged']} judged in {figures['judge_calls']} calls"
    print(f"{setting.groups} groups, {figures['pairs']} pairs, {judged}")
    print(f"backbone alone        {seconds['backbone']:7.2f} s")
    print(f"judge alone           {seconds['judge']:7.2f} s")
    print(f"sum                   {figures['sum']:7.2f} s")
    print(f"one after the other   {seconds['one_after_the_other']:7.2f} s")
    over = f"{100 * figures['over_the_longer']:+.1f}% over the longer of the two"
    print(f"overlapped            {seconds['overlapped']:7.2f} s  ({over}, allowed {100 * TOLERANCE:.0f}%)")
    if not figures["quiet_rounds"]:
        print("no round was quiet: other processes were busy all the time, and these figures say little")
    for size in figures.get("micro_batch_sizes", []):
        print(size)
    return 0 if figures["within_tolerance"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
