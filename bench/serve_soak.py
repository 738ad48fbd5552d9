"""Endurance of the group server: 200 clients for a minute, over real sockets, some of them hanging up.

``rmcore serve`` runs in a process of its own on a tiny model. The clients send whole groups, single members by slot and
OpenRLHF's single calls; a group's members come from different clients. One call in twenty is dropped and made again, by
OpenRLHF's clients a second later, as they do (sooner, the server could not tell it from an equal response).
Every answer is compared with the engine's own score of the same texts, made before in this process, so a lost, mixed
or mistaken group shows. Before that, batching is measured against one group at a time. Writes ``serve_soak.json``;
exits 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rmcore import RewardEngine
from rmcore._base.arguments import real, whole
from rmcore._base.quantile import quantiles

from .harness import environment
from .serve_load import Outcome, Soak, drive, make_pool, measure_batching, server
from .serve_model import tiny_model

__all__ = ["main", "run"]

WANTED_RATIO = 3.0


def run(soak: Soak) -> dict[str, Any]:
    """One run; all figures and checks as JSON values."""
    model = tiny_model(soak.seed)
    engine = RewardEngine(model)
    pool = make_pool(engine, soak)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny-rm"
        model.save_pretrained(path, backbone="embed")
        with server(path, soak) as (process, url):
            batching = measure_batching(engine, url, soak)
            before = _resident_mib(process.pid)
            scraped = _metrics(url)
            outcome = asyncio.run(drive(url, pool, soak))
            after = _resident_mib(process.pid)
            figures = _metrics(url)
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    told = {name: value - scraped.get(name, 0.0) for name, value in figures.items()}
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "soak": asdict(soak),
        "seconds": round(outcome.seconds, 1),
        "groups": outcome.groups,
        "groups_per_second": round(outcome.groups_in_time / soak.seconds, 1),
        "calls": dict(sorted(outcome.counts.items())),
        "latency_s": {kind: _quantiles(values) for kind, values in sorted(outcome.latencies_s.items())},
        "errors": outcome.errors[:10],
        "server": {
            "batches": told.get("rmcore_batches_total"),
            "groups_scored": told.get('rmcore_groups_total{outcome="scored"}'),
            "assembled_whole": told.get('rmcore_assembled_groups_total{outcome="whole"}'),
            "assembled_partial": told.get('rmcore_assembled_groups_total{outcome="partial"}'),
            "members_late": told.get('rmcore_members_total{outcome="late"}'),
            "members_retried": told.get('rmcore_members_total{outcome="retried"}'),
            "members_recovered": told.get('rmcore_members_total{outcome="recovered"}'),
            "resident_mib": {"before": before, "after": after},
            "exit_status": status,
        },
        "batching": batching,
    }
    result["checks"] = _checks(result, outcome)
    return result


def _resident_mib(pid: int) -> float | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _metrics(url: str) -> dict[str, float]:
    import httpx

    lines = httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = quantiles(values, (0.5, 0.95, 0.99))
    return {"p50": round(p50, 4), "p95": round(p95, 4), "p99": round(p99, 4), "max": round(max(values), 4)}


def _checks(figures: dict[str, Any], outcome: Outcome) -> dict[str, bool]:
    told = figures["server"]
    answered = outcome.counts["status_200"]
    return {
        "no call was lost": outcome.counts["lost"] == 0,
        "every call was answered with 200": answered == sum(outcome.counts[f"calls_{k}"] for k in outcome.latencies_s),
        "no answer was mixed or wrong": outcome.counts["wrong"] == 0,
        "no group was scored without a member": told["assembled_partial"] == told["members_late"] == 0,
        "some clients hung up": outcome.counts["hung_up"] > 0,
        "the server ended cleanly": told["exit_status"] == 0,
        f"batching is worth {WANTED_RATIO:g} times one at a time": figures["batching"]["ratio"] >= WANTED_RATIO,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Soak()
    parser.add_argument("--clients", type=whole(), default=default.clients)
    parser.add_argument("--seconds", type=real(above=0), default=default.seconds)
    parser.add_argument(
        "--hang-up", type=real(least=0, most=1), default=default.hang_up, help="share of calls dropped and made again"
    )
    parser.add_argument(
        "--ratio-seconds", type=real(above=0), default=default.ratio_seconds, help="of each batching round"
    )
    parser.add_argument("--seed", type=whole(least=0), default=default.seed)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    a = parser.parse_args(argv)
    soak = Soak(a.clients, a.seconds, hang_up=a.hang_up, ratio_seconds=a.ratio_seconds, seed=a.seed)
    figures = run(soak)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "serve_soak.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(f"{figures['groups']} groups in {figures['seconds']} s, {figures['groups_per_second']} a second")
    for kind, latency in figures["latency_s"].items():
        print(f"{kind}: p50 {latency['p50']} s, p95 {latency['p95']} s, p99 {latency['p99']} s")
    batching = figures["batching"]
    print(f"batching: {batching['ratio']} times one at a time, {batching['http_ratio']} times over HTTP")
    for name, passed in figures["checks"].items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    return 0 if all(figures["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
