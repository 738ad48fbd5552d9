"""What a reward service costs and how long a training step waits for it: predicted, and checked against real servers.

``--check`` measures a small model, the judge's client and the server's own work on this machine, one thread each; then
starts 1, 2 and 4 real group servers with one judge behind them, sends them whole training steps, and prints what
:func:`~rmcore.bench.scale_model.predict` says of each beside what came.

Without it, a step of the size given is predicted for a number of replicas, K, designs, shares of pairs judged and judge
limits. A table of predictions says what it assumes. Writes ``scale.json``, ``scale.png`` and, checked,
``scale_check.json``.

    python -m rmcore.bench.scale --check
    python -m rmcore.bench.scale --groups 128 --responses 16 --row 0.041 --judge-seconds 6 --judge-slots 512
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from rmcore._base.arguments import real, whole
from rmcore._base.client.options import ClientOptions
from rmcore._base.quantile import quantiles
from rmcore.engine import RewardEngine
from rmcore.evaluation.plots.figure import new_figure
from rmcore.judge.base import Pair
from rmcore.judge.chat import ChatJudge
from rmcore.model import RewardModel

from .harness import environment
from .overlap import Setting, make_model, make_text, replay_server
from .scale_model import JudgeService, Prediction, Service, Step, predict
from .serve_load import Client, Soak, server

__all__ = ["check", "main", "sweep"]

_REPLICAS = (1, 2, 4, 8, 16)
_SHARES = (0.0, 0.1, 0.25, 0.45, 1.0)


@dataclass(frozen=True)
class Checked:
    """What ``--check`` runs."""

    groups: int = 96
    responses: int = 4
    share: float = 0.25
    latency_s: float = 0.3
    concurrency: int = 16
    batch: int = 16
    steps: int = 3
    replicas: tuple[int, ...] = (1, 2, 4)


# -- predictions -----------------------------------------------------------------------------------------------------


def sweep(step: Step, service: Service, judge: JudgeService, *, seed: int = 0) -> list[dict[str, Any]]:
    """Predictions around one step, one thing varied in each row, which names it."""
    cases: list[tuple[str, Step, Service, JudgeService]] = []
    cases += [("replicas", replace(step, replicas=n), service, judge) for n in _REPLICAS]
    cases += [("responses", replace(step, responses=k), service, judge) for k in (4, 8, 16, 32)]
    cases += [("share", replace(step, share=share), service, judge) for share in _SHARES]
    cases += [("design", replace(step, share=1.0, design="circular"), service, judge)]
    starts = sorted({min(n, service.concurrency) for n in (4, 32, service.concurrency)})
    cases += [("first_concurrency", step, replace(service, first_concurrency=n), judge) for n in starts]
    if judge.slots:
        cases += [("judge_slots", step, service, replace(judge, slots=judge.slots * n // 4)) for n in (1, 2, 4, 8)]
    rows = []
    for varied, of, with_, by in cases:
        figures = predict(of, with_, by, seed=seed).summary(of)
        row = {
            "varied": varied,
            "replicas": of.replicas,
            "responses": of.responses,
            "design": of.design,
            "share": of.share,
            "first_concurrency": with_.first_concurrency,
            "judge_slots": by.slots,
            "per_minute": by.per_minute,
        }
        rows.append(row | {name: float(f"{value:.6g}") for name, value in figures.items()})
    return rows


def lognormal(median: float, p95: float, *, count: int = 1000, seed: int = 0) -> list[float]:
    """A sample of seconds with this median and 95% quantile, as a judge's answers are spread."""
    draw, spread = random.Random(seed), math.log(p95 / median) / 1.6449
    return [median * math.exp(spread * draw.gauss(0, 1)) for _ in range(count)]


# -- against real servers --------------------------------------------------------------------------------------------


def check(what: Checked) -> dict[str, Any]:
    """Measure one replica's work, predict, run; → JSON figures."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the servers
    setting = Setting(what.groups, what.responses, what.share, what.latency_s, what.concurrency, 256, 3, 2048, 1, 1, 0)
    model = make_model(setting)
    steps = [_texts(what, seed) for seed in range((what.steps + 1) * (1 + len(what.replicas)) + 1)]
    pairs = [Pair(prompt, *two) for step in steps for prompt, texts in step for two in combinations(texts, 2)]
    with tempfile.TemporaryDirectory() as folder, replay_server(pairs, what.latency_s) as (url, _):
        path = Path(folder) / "model"
        model.save_pretrained(path, backbone="embed")
        judge_options = ["--judge-url", url, "--judge-model", "replay", "--judge-key-env", ""]
        judge_options += ["--budget", str(what.share), "--judge-concurrency", str(what.concurrency)]
        batch = ["--batch", str(what.batch)]
        service, judge = _measured(what, model, url, pairs)
        alone = _real(what, path, batch, steps[:2], 1)
        bare = replace(_step(what, 1), share=0.0)
        left = alone["seconds"] - predict(bare, service, judge).seconds
        service = replace(service, group_s=max(0.0, left / what.groups))
        _told("measured", {name: f"{value:.4g}" for name, value in asdict(service).items()})
        rows, at = [], 2
        for replicas in what.replicas:
            step = _step(what, replicas)
            predicted = [predict(step, service, judge, seed=seed) for seed in range(what.steps)]
            real = _real(what, path, batch + judge_options, steps[at : at + what.steps + 1], replicas)
            at += what.steps + 1
            rows.append(_compared(step, predicted, real))
            _told(f"{replicas} replicas", rows[-1])
    told = replace(judge, latencies_s=[round(s, 5) for s in quantiles(judge.latencies_s, (0.05, 0.5, 0.95))])
    return {
        "environment": environment(torch.device("cpu")),
        "checked": asdict(what),
        "cores": os.cpu_count(),
        "service": asdict(service),
        "judge": asdict(told) | {"latencies_are": "quantiles 0.05, 0.5, 0.95"},
        "rows": rows,
    }


def _step(what: Checked, replicas: int) -> Step:
    return Step(what.groups, what.responses, what.share, replicas=replicas, cores=os.cpu_count() or 1)


def _texts(what: Checked, seed: int) -> list[tuple[str, list[str]]]:
    draw = random.Random(1000 + seed)
    return [(make_text(draw, 40), [make_text(draw, 90) for _ in range(what.responses)]) for _ in range(what.groups)]


def _measured(what: Checked, model: RewardModel, url: str, pairs: Sequence[Pair]) -> tuple[Service, JudgeService]:
    """A batch's and a row's seconds by two sizes; a call's by the processor time of the judge's client."""
    engine = RewardEngine(model)
    seconds: dict[int, float] = {}
    for size in (1, what.batch):
        times = []
        for seed in range(5):
            few = _texts(what, 500 + seed)[:size]
            began = time.perf_counter()
            engine.score([prompt for prompt, _ in few], [texts for _, texts in few])
            times.append(time.perf_counter() - began)
        seconds[size] = statistics.median(times)
    row_s = (seconds[what.batch] - seconds[1]) / ((what.batch - 1) * what.responses)
    some = pairs[-200:]
    judge = ChatJudge(url, "replay", None, client=ClientOptions(concurrency=what.concurrency))
    with closing(judge):
        judge.judge_sync(some[:50])
        began = time.process_time()
        verdicts = judge.judge_sync(some)
        spent = time.process_time() - began
        latencies = [s for verdict in verdicts for s in verdict.usage.latencies_s]
    calls = sum(verdict.usage.calls for verdict in verdicts)
    service = Service(
        max(0.0, seconds[1] - row_s * what.responses),
        row_s,
        call_s=spent / calls,
        batch=what.batch,
        concurrency=what.concurrency,
    )
    return service, JudgeService(latencies)


def _real(
    what: Checked, path: Path, options: Sequence[str], steps: Sequence[Sequence[tuple[str, list[str]]]], replicas: int
) -> dict[str, Any]:
    """Steps against so many servers, the first to warm them; medians over the others."""
    soak = Soak(group=what.responses)
    with ExitStack() as running:
        urls = [running.enter_context(server(path, soak, *options))[1] for _ in range(replicas)]
        times = [asyncio.run(_sent(urls, step)) for step in steps][1:]
    latencies = [s for of in times for s in of]
    p50, p95 = quantiles(latencies, (0.5, 0.95))
    return {"seconds": statistics.median(max(of) for of in times), "p50_s": float(p50), "p95_s": float(p95)}


async def _sent(urls: Sequence[str], step: Sequence[tuple[str, list[str]]]) -> list[float]:
    """All groups at once, to the servers in turn; → seconds of each."""
    clients = [Client(urls[number % len(urls)]) for number in range(len(step))]
    began = time.perf_counter()

    async def one(client: Client, prompt: str, responses: list[str]) -> float:
        await client.send("/v1/groups", {"prompt": prompt, "responses": responses})
        status, reply = await client.receive()
        if status != 200:
            raise RuntimeError(f"got status {status}: {reply}")
        return time.perf_counter() - began

    try:
        return await asyncio.gather(*(one(c, *group) for c, group in zip(clients, step, strict=True)))
    finally:
        for client in clients:
            client.hang_up()


def _compared(step: Step, predicted: Sequence[Prediction], real: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"replicas": step.replicas}
    summaries = [one.summary(step) for one in predicted]
    for name in ("seconds", "p50_s", "p95_s"):
        guess = statistics.median(s[name] for s in summaries)
        row[name] = {"predicted": round(guess, 3), "real": round(real[name], 3), "ratio": round(guess / real[name], 3)}
    return row


# -- the command -----------------------------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """``scale.png``: a step's seconds against replicas and against the share judged."""
    figure = new_figure((9, 3.8))
    left, right = figure.subplots(1, 2)
    for axis, varied, label in ((left, "replicas", "replicas"), (right, "share", "share of pairs judged")):
        of = [row for row in rows if row["varied"] == varied]
        at = [row[varied] for row in of]
        axis.plot(at, [row["seconds"] for row in of], "o-", color="#0072B2", label="whole step")
        axis.plot(at, [row["p50_s"] for row in of], "s--", color="0.45", label="median group")
        axis.set_xlabel(label)
        axis.set_ylabel("seconds, predicted")
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    left.set_xscale("log", base=2)
    left.set_xticks(_REPLICAS, [str(n) for n in _REPLICAS])
    figure.savefig(out, dpi=150)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    heads = {
        "varied": "varied",
        "replicas": "replicas",
        "responses": "K",
        "design": "design",
        "share": "share",
        "first_concurrency": "first",
        "judge_slots": "slots",
        "seconds": "seconds",
        "p95_s": "p95 s",
        "calls": "calls",
        "cost": "cost",
    }
    lines = ["| " + " | ".join([*heads.values(), "busy"]) + " |", "|" + "---|" * (len(heads) + 1)]
    for row in rows:
        cells = [f"{row[key]:,.4g}" if isinstance(row[key], float) else str(row[key]) for key in heads]
        lines.append("| " + " | ".join([*cells, f"{100 * row['backbone_busy']:.0f}%"]) + " |")
    return "\n".join(lines)


def _told(title: str, figures: dict[str, Any]) -> None:
    print(f"{title}: " + json.dumps(figures), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="against 1, 2 and 4 real servers on this machine")
    parser.add_argument("--groups", type=whole(), default=128, help="prompts of a step")
    parser.add_argument("--responses", type=whole(), default=16, help="K, of a prompt")
    parser.add_argument("--share", type=real(least=0, most=1), default=0.25, help="of the pairs that go to the judge")
    parser.add_argument("--orders", type=whole(), default=2, help="in which a pair is asked")
    parser.add_argument("--replicas", type=whole(), default=4)
    parser.add_argument("--arrive", type=real(least=0), default=0.0, help="seconds over which a step's groups arrive")
    parser.add_argument("--batch-seconds", type=real(least=0), default=0.02, help="of a batch, whatever is in it")
    parser.add_argument("--row", type=real(least=0), default=0.041, help="seconds of a response on a replica")
    parser.add_argument(
        "--call", type=real(least=0), default=0.001, help="seconds a replica's interpreter spends on a call"
    )
    parser.add_argument(
        "--group", type=real(least=0), default=0.001, help="seconds it spends on a group's request and answer"
    )
    parser.add_argument("--concurrency", type=whole(), default=128, help="judge calls in flight of a replica")
    parser.add_argument("--judge-seconds", type=real(above=0), default=6.0, help="median of a call")
    parser.add_argument("--judge-p95", type=real(above=0), default=20.0, help="its 95%% quantile")
    parser.add_argument(
        "--judge-slots", type=whole(least=0), default=512, help="calls it works on at a time; 0: any number"
    )
    parser.add_argument("--per-minute", type=real(least=0), default=0.0, help="calls a minute at most; 0: any number")
    parser.add_argument("--tokens", type=real(least=0), nargs=2, default=(3000.0, 600.0), metavar=("IN", "OUT"))
    parser.add_argument(
        "--prices", type=real(least=0), nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="of a million"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.check:
        figures = check(Checked())
        _write(options.out / "scale_check.json", figures)
        return 0
    service = Service(options.batch_seconds, options.row, options.call, options.group, concurrency=options.concurrency)
    judge = JudgeService(
        lognormal(options.judge_seconds, options.judge_p95),
        options.judge_slots,
        options.per_minute,
        tuple(options.tokens),
        tuple(options.prices),
    )
    step = Step(
        options.groups,
        options.responses,
        options.share,
        orders=options.orders,
        replicas=options.replicas,
        arrive_s=options.arrive,
    )
    rows = sweep(step, service, judge)
    assumed = {
        "step": asdict(step),
        "service": asdict(service),
        "judge": asdict(replace(judge, latencies_s=()))
        | {"median_s": options.judge_seconds, "p95_s": options.judge_p95, "spread": "log-normal"},
        "left_out": "failures, retries, verdicts that are stored already, the network",
    }
    print("Predicted, not measured. Assumed:")
    for name, value in assumed.items():
        print(f"  {name}: {json.dumps(value)}")
    print(table(rows))
    _write(options.out / "scale.json", {"predicted_not_measured": True, "assumed": assumed, "rows": rows})
    draw(rows, options.out / "scale.png")
    return 0


def _write(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
