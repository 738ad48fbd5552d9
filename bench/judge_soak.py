"""Endurance of the judge: 20,000 pairs at 2,000 requests in flight against an endpoint that fails one time in five.

The pairs go through :class:`rmcore.RewardEngine` to a loopback endpoint in another process, over
real sockets. A fifth of the requests meets a fault, all kinds of :data:`rmcore.judge.testing.FAULTS` equally often, and
three storms refuse everything for a while.
Verdicts are kept in a store. Then it is checked that every pair has exactly one verdict or one reason, one that its
faults are to have, that verdicts are right, that the store holds these and what else the judge itself answered and
nothing more, that totals add up on both sides of the wire, that memory stayed within its bound and that the run ended
by itself. Writes
``judge_soak.json``; exits 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rmcore import FrozenHead, GroupScores, RewardEngine
from rmcore._base.arguments import real, whole
from rmcore._base.prompt import Response, response_text
from rmcore.engine.routing import AlwaysRoute
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.posterior import Posterior
from rmcore.judge import ChatJudge, ClientOptions, RecordedJudge, Verdict
from rmcore.judge.store.ledger import VerdictLedger
from rmcore.judge.testing import FAULTS, STORM_FAULTS, FaultMix, ReplayServer, Storm

from .harness import environment

__all__ = ["Soak", "main", "run"]

GROUP = 5
"""Responses a group, so ten pairs."""

MEMORY_BOUND_MIB = 512
"""By how much the client's resident memory may grow: a quarter of a MiB for each request in flight."""

_WORTH = re.compile(r"worth (\d+)")
_ENDINGS = {"deadline", "breaker_open"}
"""Reasons of pairs that met no fault themselves."""

_STORM_AT = (0.6, 0.75, 0.9)
"""Late enough that all places are taken before the first."""


@dataclass
class Soak:
    """What to run: the endpoint's latency (its bounds, and more by the number in flight divided by ``rate``, so that
    2,000 really are in flight) and the client's limits, in seconds.
    """

    pairs: int = 20_000
    in_flight: int = 2_000
    faults: float = 0.2
    storm_s: float = 1.0
    latency_s: tuple[float, float] = (0.3, 0.7)
    rate: float = 120.0
    timeout_s: float = 40.0
    deadline_s: float = 900.0
    seed: int = 0
    storms: list[Storm] = field(init=False)

    def __post_init__(self) -> None:
        if self.pairs < 10 or self.pairs % 10:
            raise SystemExit(f"pairs: got {self.pairs}, expected a positive multiple of 10")
        starts = [int(share * self.pairs) for share in _STORM_AT]
        self.storms = [Storm(at, self.storm_s, kind) for at, kind in zip(starts, STORM_FAULTS, strict=True)]


class WorthJudge(RecordedJudge):
    """Instead of a recorded verdict: the response that says it is worth more wins."""

    def lookup(self, prompt: object, first: Response, second: Response) -> Verdict:
        """The verdict when ``first`` is shown first."""
        difference = worth_of(response_text(first)) - worth_of(response_text(second))
        return Verdict.of("win" if difference > 0 else "loss" if difference < 0 else "tie")


def worth_of(text: str) -> int:
    """What a response says it is worth."""
    found = _WORTH.search(text)
    if found is None:
        raise ValueError("no worth")
    return int(found[1])


def serve(soak: Soak) -> None:
    """Print the endpoint's base URL and serve until standard input ends."""
    faults = FaultMix(soak.faults, storms=soak.storms, seed=soak.seed)
    with ReplayServer(
        WorthJudge({}), latency_s=soak.latency_s, rate=soak.rate, faults=faults, seed=soak.seed
    ) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()


def run(soak: Soak) -> dict[str, Any]:
    """One run; all figures and checks as JSON values."""
    prompts, responses, hidden = _groups(soak)
    with _server(soak) as base_url, tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "verdicts.db"
        judge = ChatJudge(
            base_url,
            "soak",
            None,
            orders="one",
            client=ClientOptions(
                concurrency=soak.in_flight, first_concurrency=soak.in_flight, timeout_s=soak.timeout_s
            ),
            deadline_s=soak.deadline_s,
            store=store,
        )
        engine = RewardEngine(_head(), judge, AlwaysRoute())
        before, high_before = _resident_mib(), _high_water_mib()
        found: list[GroupScores] = []
        errors: list[BaseException] = []

        def score() -> None:
            try:
                found.append(engine.score_hidden(hidden, [GROUP] * len(prompts), prompts=prompts, responses=responses))
            except BaseException as error:  # an exception that escapes is what this run looks for
                errors.append(error)

        started = time.perf_counter()
        thread = threading.Thread(target=score, daemon=True)
        thread.start()
        sampled = _watch(thread, judge, soak)
        seconds = time.perf_counter() - started
        high = _high_water_mib()
        peak = high if high > high_before else sampled
        client = judge.client.state
        again = sum(count for name, count in judge.counts.items() if name.startswith(("refused:", "text_instead")))
        ended = not thread.is_alive()
        if ended:
            judge.close()
        stats = httpx.get(base_url + "/stats", trust_env=False, timeout=30).json()
        kept = _kept(store)
    figures: dict[str, Any] = {
        "environment": environment(torch.device("cpu")) | {"httpx": httpx.__version__},
        "soak": asdict(soak) | {"evenly_spread_faults": len(FAULTS)},
        "seconds": round(seconds, 1),
        "ended_by_itself": ended,
        "escaped": [type(error).__name__ for error in errors],
        "memory_mib": {"before": before, "peak": peak, "growth": peak - before, "bound": MEMORY_BOUND_MIB},
        "server": stats,
        "client": asdict(client),
        "put_again": again,
        "kept": kept,
    }
    if found:
        figures |= _outcome(found[0], responses)
        figures["requests_per_second"] = round(stats["requests"] / seconds, 1)
    figures["checks"] = _checks(figures, soak)
    return figures


def _checks(figures: dict[str, Any], soak: Soak) -> dict[str, bool]:
    checks = {
        "ended by itself": bool(figures["ended_by_itself"]) and figures["seconds"] < soak.deadline_s,
        "no exception escaped score": not figures["escaped"],
        "memory within its bound": figures["memory_mib"]["growth"] <= MEMORY_BOUND_MIB,
    }
    if "summary" not in figures:
        return checks | {"a result came back": False}
    summary, pairs, server = figures["summary"], figures["pairs"], figures["server"]
    by, answers = summary["decided_by"], server["answers"]
    usage, client = summary["judge_usage"], figures["client"]
    unseen = client["attempts"] - server["requests"]
    faulty = sum(count for kind, count in answers.items() if kind != "good")
    kinds, failed = [*FAULTS.values(), *STORM_FAULTS.values()], summary["judge_failures"]
    answered = {fault.reason for fault in kinds if fault.answer}
    return checks | {
        "every pair decided exactly once": pairs["decided_once"] == soak.pairs,
        "every failed pair has a reason": pairs["without_reason"] == 0,
        "every verdict is right": pairs["wrong"] == 0 and pairs["right"] == by["judge"],
        "pairs add up": by["judge"] + by["judge_failed"] == summary["pairs"] == summary["routed"] == soak.pairs,
        "failures add up": sum(failed.values()) == by["judge_failed"],
        "every reason is one of a fault": failed.keys() <= {fault.reason for fault in kinds} | _ENDINGS,
        "the store holds what the judge answered": figures["kept"]
        == {"verdict": by["judge"]} | {reason: failed[reason] for reason in sorted(failed.keys() & answered)},
        "attempts agree: result, client": usage["attempts"] == client["attempts"],
        # A request may end on its way: its time was up, or the endpoint was closing the connection it was sent on.
        "attempts agree: client, endpoint": 0 <= unseen <= 2 + client["attempts"] // 100,
        # A question that is put again, without what was refused, is another call of the client and none of the judge.
        "calls agree: result, client": usage["calls"] + pairs["not_sent"]
        == client["calls"] - figures["put_again"]
        == soak.pairs,
        "answers add up to requests": sum(answers.values()) == server["requests"],
        "a fifth of the requests met a fault": faulty >= soak.faults * 0.95 * server["requests"],
        "every kind of fault occurred": set(answers) >= {*FAULTS, *STORM_FAULTS},
        "so many requests were in flight": server["peak_in_flight"] >= 0.95 * soak.in_flight,
        "never more than allowed": client["concurrency"]["peak_in_flight"] <= soak.in_flight,
        "nothing left in flight or queued": client["concurrency"]["in_flight"] == client["concurrency"]["queued"] == 0,
    }


def _outcome(scores: GroupScores, responses: list[list[str]]) -> dict[str, Any]:
    """Each pair's decision against the truth that its texts tell."""
    tally: Counter[str] = Counter()
    for group, texts in zip(scores, responses, strict=True):
        decided = Counter((d.i, d.j) for d in group.decisions)
        tally["decided_once"] += sum(decided[pair] == 1 for pair in combinations(range(len(texts)), 2))
        for d in group.decisions:
            if d.by == "judge_failed":
                tally["without_reason"] += not d.reason
                tally["not_sent"] += d.verdict is not None and d.verdict.usage.calls == 0
                continue
            difference = worth_of(texts[d.i]) - worth_of(texts[d.j])
            told = None if d.verdict is None else d.verdict.preference
            tally["right" if told is not None and np.sign(told) == np.sign(difference) else "wrong"] += 1
    names = ("decided_once", "right", "wrong", "without_reason", "not_sent")
    return {"summary": scores.summary(), "pairs": {name: int(tally[name]) for name in names}}


def _kept(store: Path) -> dict[str, int]:
    """What in the store answers a question, by its reason; of verdicts the number."""
    with VerdictLedger(store) as ledger:
        kept = [call for call in ledger.calls() if call.replied]
    counts = Counter("verdict" if call.preference is not None else call.reason for call in kept)
    return {"verdict": counts["verdict"]} | dict(sorted(counts.items()))


def _groups(soak: Soak) -> tuple[list[str], list[list[str]], torch.Tensor]:
    """Groups of responses that say what they are worth; ties occur."""
    rng = np.random.default_rng(soak.seed)
    count = soak.pairs // 10
    worth = rng.integers(0, 20, (count, GROUP))
    filler = "It is argued at some length, with care and with examples. " * 6
    responses = [[f"Answer {k} of {g}, worth {worth[g, k]}. {filler}" for k in range(GROUP)] for g in range(count)]
    hidden = torch.from_numpy(rng.standard_normal((count * GROUP, 2)).astype(np.float32))
    return [f"Question number {g}: what is best?" for g in range(count)], responses, hidden


def _head() -> FrozenHead:
    """The smallest head there is: all pairs are judged, so what it thinks is not at issue."""
    config = HeadConfig(2, mode="difference", features="linear", ridge=1.0)
    features = SNGPHead(config).freeze_features(torch.float32)
    return FrozenHead(config, features, torch.tensor([1.0, 0.0]), 0.0, Posterior(2, ridge=1.0))


def _watch(thread: threading.Thread, judge: ChatJudge, soak: Soak) -> float:
    """Show progress and sample memory until the thread ends or has had a minute more than its deadline."""
    console = Console(stderr=True)
    columns = (
        TextColumn("judged"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    latest, peak = time.monotonic() + soak.deadline_s + 60, 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=soak.pairs, note="")
        while thread.is_alive() and time.monotonic() < latest:
            thread.join(0.1)
            peak = max(peak, _resident_mib())
            state = judge.client.state
            note = f"{state.concurrency.in_flight} in flight, limit {state.concurrency.limit}, {peak:.0f} MiB"
            bar.update(task, completed=state.calls, note=note)
    return peak


@contextmanager
def _server(soak: Soak) -> Iterator[str]:
    """The endpoint in a process of its own, so that its memory and time are not the client's."""
    command = [sys.executable, "-m", "rmcore.bench.judge_soak", "--serve", "--pairs", str(soak.pairs)]
    command += ["--seed", str(soak.seed), "--rate", str(soak.rate), "--latency", *map(str, soak.latency_s)]
    command += ["--faults", str(soak.faults), "--storm", str(soak.storm_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        base_url = process.stdout.readline().strip()
        if not base_url:
            raise RuntimeError("the loopback endpoint did not start")
        yield base_url
    finally:
        process.stdin.close()  # which ends it
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()


def _resident_mib() -> float:
    """Resident memory now; where the system does not tell, the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _high_water_mib()
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _high_water_mib() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10), 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Soak()
    parser.add_argument("--pairs", type=whole(), default=default.pairs)
    parser.add_argument("--in-flight", type=whole(), default=default.in_flight)
    parser.add_argument("--faults", type=real(least=0, most=1), default=default.faults)
    parser.add_argument(
        "--storm", type=real(least=0), default=default.storm_s, metavar="SECONDS", help="length of each storm"
    )
    parser.add_argument("--latency", type=real(least=0), nargs=2, default=default.latency_s, metavar="SECONDS")
    parser.add_argument(
        "--rate", type=real(least=0), default=default.rate, help="the endpoint's answers a second; 0: any"
    )
    parser.add_argument("--timeout", type=real(above=0), default=default.timeout_s, metavar="SECONDS")
    parser.add_argument("--deadline", type=real(above=0), default=default.deadline_s, metavar="SECONDS")
    parser.add_argument("--seed", type=whole(least=0), default=default.seed)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--serve", action="store_true", help="be the endpoint only, until standard input ends")
    a = parser.parse_args(argv)
    soak = Soak(a.pairs, a.in_flight, a.faults, a.storm, tuple(a.latency), a.rate, a.timeout, a.deadline, a.seed)
    if a.serve:
        serve(soak)
        return 0
    log = logging.getLogger("rmcore")
    level = log.level
    log.setLevel(logging.ERROR)  # thousands of failures are meant here
    try:
        figures = run(soak)
    finally:
        log.setLevel(level)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "judge_soak.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    memory, server = figures["memory_mib"], figures["server"]
    print(
        f"{soak.pairs} pairs, {server['requests']} requests in {figures['seconds']} s, "
        f"{server['peak_in_flight']} in flight at most, memory +{memory['growth']:.0f} of {memory['bound']} MiB"
    )
    if "summary" in figures:
        by = figures["summary"]["decided_by"]
        failures = ", ".join(f"{why} {n}" for why, n in sorted(figures["summary"]["judge_failures"].items()))
        print(f"verdicts {by['judge']}, without {by['judge_failed']} ({failures})")
    for name, passed in figures["checks"].items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    return 0 if all(figures["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
