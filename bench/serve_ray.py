"""The group server on Ray Serve under load: processes die, replicas go, the head changes; nothing may be lost or mixed.

A Ray cluster of this machine, two replicas of a tiny model, 200 clients for a minute, as in :mod:`serve_soak`: whole
groups, members by slot and OpenRLHF's single calls, through two entries to two assemblers. A learner's journal is
written meanwhile, whose versions are served as they come. Four runs:

    replicas    one is killed with SIGKILL, one goes when the server is scaled from two to one, the head changes thrice
    processes   an entry and an assembler are killed; clients ask again where a proxy has lost its entry, as ours do
    scaling     one replica of at most two, and a judge that takes its time: a second one is started; when the load is
                gone, one goes
    nodes       a head and two nodes, each with a replica: all of one are killed that has an assembler, too

Every answer names a version of the head, and is compared with what that version says of the same texts in this process;
so a lost, mixed or mistaken group shows, and one whose members have several versions. Writes ``serve_ray.json`` and
``serve_ray.png``; exits 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rmcore import RewardEngine
from rmcore._base.arguments import real, whole
from rmcore._base.quantile import quantiles
from rmcore.engine.learning import LearningConfig, VerdictLearner
from rmcore.engine.routing import AlwaysRoute
from rmcore.evaluation.plots.figure import new_figure
from rmcore.integrations.ray.serve import GroupServer, ServeScale
from rmcore.judge.base import Pair, Verdict
from rmcore.judge.testing import ReplayServer

from .harness import environment
from .serve_load import Group, Outcome, Soak, drive, make_pool, score_pool
from .serve_model import BLAME, PRAISE, tiny_model
from .serve_ray_cluster import kill_node, kill_one, processes, running, slow_judge, started

__all__ = ["RUNS", "Event", "main", "run", "versions_of"]

RUNS = {
    "replicas": ServeScale(replicas=2, assemblers=2),
    "processes": ServeScale(replicas=2, assemblers=2),
    "scaling": ServeScale(replicas=1, max_replicas=2, assemblers=2, upscale_delay_s=3.0, downscale_delay_s=10.0),
    "nodes": ServeScale(replicas=2, assemblers=3, entries=3, overhead_cpus=0.1),  # none on the head
}
"""What is started for each."""
PLOTS = {"serve_ray.png": ("replicas", "processes"), "serve_ray_nodes.png": ("scaling", "nodes")}

VERSIONS = 4
"""Of the head, the first included."""
_AFTER_S = 12.0
"""The load goes on for so long after the last event, even when its time is up."""
_PATIENCE_S = 150.0
_JUDGE_S = 1.0
_PAUSE_S = 2.0


@dataclass
class Event:
    """What happens so many seconds after the load began; where ``do`` returns a text, that is said of it, too."""

    at: float
    name: str
    do: Callable[[], object]
    began: float = 0.0
    done: float = 0.0
    note: str = ""


@dataclass
class Course:
    """Events as they happened."""

    events: list[Event] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _thread: threading.Thread | None = None
    _last: float = -_AFTER_S

    def start(self) -> threading.Thread:
        """Have them happen, one after the other, each at its time or when the one before is done."""
        self._thread = threading.Thread(target=self._happen, args=(time.perf_counter(),), daemon=True)
        self._thread.start()
        return self._thread

    def goes_on(self) -> bool:
        """Whether something is still to happen, or has just happened: the load is to go on."""
        recently = time.perf_counter() - self._last < _AFTER_S
        return (self._thread is not None and self._thread.is_alive()) or recently

    def _happen(self, origin: float) -> None:
        for event in sorted(self.events, key=lambda event: event.at):
            time.sleep(max(0.0, origin + event.at - time.perf_counter()))
            event.began = time.perf_counter() - origin
            try:
                told = event.do()
                event.note = told if isinstance(told, str) else ""
            except Exception as error:  # the load goes on; the run has failed
                self.failed.append(f"{event.name}: {type(error).__name__}: {error}"[:500])
            self._last = time.perf_counter()
            event.done = self._last - origin


# -- the head's versions -----------------------------------------------------------------------------------------------


class Contrary:
    """Prefers what the head was taught to dislike, so that learning from it moves the head."""

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict a pair."""

        def merit(text: object) -> int:
            words = str(text).split()
            return sum(word in BLAME for word in words) - sum(word in PRAISE for word in words)

        differences = [merit(pair.first) - merit(pair.second) for pair in pairs]
        return [Verdict.of("win" if d > 0 else "loss" if d < 0 else "tie") for d in differences]


def versions_of(model: Any, journal: Path, pool: Sequence[Group]) -> VerdictLearner:
    """A learner with :data:`VERSIONS` versions, back at 0; the pool then knows what each of them says."""
    learner = VerdictLearner(model.head, journal, LearningConfig(max_share=0.5), snapshot_every=1)
    engine = RewardEngine(model, Contrary(), AlwaysRoute(), learner=learner)
    telling = RewardEngine(model)
    for version in range(VERSIONS):
        if version:
            part = pool[40 * version : 40 * version + 40]
            engine.update(engine.score([group.prompt for group in part], [group.responses for group in part]))
        telling.serve_head(learner.head, version)
        score_pool(telling, pool)
    apart = min(
        max(abs(a - b) for a, b in zip(_flat(group, k), _flat(group, k + 1), strict=True))
        for group in pool[:50]
        for k in range(VERSIONS - 1)
    )
    if apart < 0.01:
        raise RuntimeError(f"versions: got preferences {apart} apart, expected to tell them from each other")
    engine.revert(0)
    return learner


def _flat(group: Group, version: int) -> list[float]:
    return [value for row in group.versions[version][0] for value in row]


# -- the runs --------------------------------------------------------------------------------------------------------


def run(soak: Soak, which: str) -> tuple[dict[str, Any], Outcome]:
    """One run; all figures and checks as JSON values."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path, journal = Path(folder, "tiny-rm"), Path(folder, "journal")
        model = tiny_model(soak.seed)
        model.save_pretrained(path, backbone="embed")
        pool = make_pool(RewardEngine(model), soak)
        learner = stack.enter_context(versions_of(model, journal, pool))
        judge = stack.enter_context(slow_judge(_JUDGE_S)) if which == "scaling" else None
        how: dict[str, Any] = {"nodes": 2 * (which == "nodes"), "judge_url": None if judge is None else judge.base_url}
        server, url, cluster = stack.enter_context(started(path, journal, soak, RUNS[which], **how))
        course = Course(_events(which, server, learner, soak, judge, cluster))
        asyncio.run(_warm_up(url, pool, soak))
        happening = course.start()
        outcome = asyncio.run(drive(url, pool, soak, course.goes_on))
        happening.join(_PATIENCE_S)
        told = _metrics(url)
        # A replica that Serve has let go of ends a moment later, on a busy machine a long one.
        _until(lambda: len(processes("Replica")) == server.scale_now.replicas, _PATIENCE_S)
        left = len(processes("Replica"))
        began = time.perf_counter()
        server.drain()
        drained = time.perf_counter() - began
    figures = _figures(soak, outcome, course, told) | {"replicas_at_the_end": left, "drain_s": round(drained, 2)}
    figures["checks"] = _checks(which, figures, outcome, course)
    return figures, outcome


async def _warm_up(url: str, pool: Sequence[Group], soak: Soak) -> None:
    """Groups of other numbers, until every process has answered some."""
    await drive(url, pool, replace(soak, seconds=2.0, hang_up=0.0, seed=soak.seed + 99, first_number=1_000_000))


def _events(
    which: str, server: GroupServer, learner: VerdictLearner, soak: Soak, judge: ReplayServer | None, cluster: Any
) -> list[Event]:
    seconds = soak.seconds

    def version(number: int) -> Event:
        at = (0.2, 0.45, 0.85)[number - 1] * seconds
        return Event(at, f"version {number}", functools.partial(learner.revert, number))

    if which == "processes":
        return [
            Event(0.2 * seconds, "an entry killed", functools.partial(kill_one, "Entry")),
            Event(0.5 * seconds, "an assembler killed", functools.partial(kill_one, "Assembler1")),
        ]
    if which == "scaling":
        return [
            Event(0.0, "one replica to two", functools.partial(_reach, server, 2)),
            Event(0.5 * seconds, "two replicas to one", functools.partial(_calm, server, soak, judge)),
        ]
    if which == "nodes":
        return [Event(0.3 * seconds, "a node killed", functools.partial(_lose_node, server, cluster))]
    return [
        Event(0.1 * seconds, "a replica killed", functools.partial(kill_one, "Replica")),
        Event(0.6 * seconds, "two replicas to one", functools.partial(_scale_down, server)),
        *(version(number) for number in range(1, VERSIONS)),
    ]


def _until(what: Callable[[], bool], seconds: float) -> None:
    ends = time.perf_counter() + seconds
    while not what() and time.perf_counter() < ends:
        time.sleep(0.2)


def _reach(server: GroupServer, replicas: int) -> str:
    """Wait until so many replicas serve and no other is coming or going."""
    _until(lambda: running(server) == {"RUNNING": replicas}, _PATIENCE_S)
    if (found := running(server)) != {"RUNNING": replicas}:
        raise RuntimeError(f"replicas: got {found} after {_PATIENCE_S:g} s, expected {replicas} and no other")
    return ""


def _scale_down(server: GroupServer) -> str:
    _reach(server, 2)  # the killed one's successor is there
    server.scale(1)
    return _reach(server, 1)


def _calm(server: GroupServer, soak: Soak, judge: ReplayServer | None) -> str:
    """The judge answers at once, and clients take their time: a replica has nothing to do."""
    assert judge is not None
    judge.latency_s = (0.0, 0.0)
    soak.pause_s = _PAUSE_S
    return _reach(server, 1)


def _lose_node(server: GroupServer, cluster: Any) -> str:
    """Kill a node, and wait until the other one has two replicas and all assemblers are there again."""
    names = kill_node(cluster)
    _until(lambda: running(server) != {"RUNNING": 2}, 30.0)  # Serve has noticed
    _reach(server, 2)
    _until(lambda: len(processes("Assembler")) == server.scale_now.assemblers, _PATIENCE_S)
    return "with " + ", ".join(names)


def _metrics(url: str) -> dict[str, float]:
    import httpx

    lines = httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def _sum(told: dict[str, float], name: str, label: str = "") -> float:
    return sum(value for key, value in told.items() if key.partition("{")[0] == name and label in key)


def _figures(soak: Soak, outcome: Outcome, course: Course, told: dict[str, float]) -> dict[str, Any]:
    answered: dict[str, int] = {}
    for _, _, version in outcome.answers:
        answered[str(version)] = answered.get(str(version), 0) + 1
    return {
        "soak": asdict(soak),
        "seconds": round(outcome.seconds, 2),
        "groups": outcome.groups,
        "groups_per_second": round(outcome.groups_in_time / soak.seconds, 1),
        "calls": dict(sorted(outcome.counts.items())),
        "latency_s": {kind: _quantiles(values) for kind, values in sorted(outcome.latencies_s.items())},
        "answers_by_version": answered,
        "groups_with_several_versions": sum(len(found) > 1 for found in outcome.versions.values()),
        "events": [
            {"name": e.name, "at_s": round(e.began, 1), "done_s": round(e.done, 1), "note": e.note}
            for e in sorted(course.events, key=lambda e: e.at)
        ],
        "answers_meanwhile": {event.name: _between(outcome, event) for event in course.events},
        "errors": (course.failed + outcome.errors)[:10],
        "server": {
            "assembled_whole": _sum(told, "rmcore_assembled_groups_total", 'outcome="whole"'),
            "assembled_partial": _sum(told, "rmcore_assembled_groups_total", 'outcome="partial"'),
            "members_late": _sum(told, "rmcore_members_total", 'outcome="late"'),
            "members_retried": _sum(told, "rmcore_members_total", 'outcome="retried"'),
            "members_recovered": _sum(told, "rmcore_members_total", 'outcome="recovered"'),
        },
        "load": os.getloadavg()[0],
    }


def _between(outcome: Outcome, event: Event) -> int:
    return sum(event.began <= at <= event.done for at, _, _ in outcome.answers)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = quantiles(values, (0.5, 0.95, 0.99))
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "max": round(max(values), 3)}


def _checks(which: str, figures: dict[str, Any], outcome: Outcome, course: Course) -> dict[str, bool]:
    told, calls = figures["server"], outcome.counts
    kinds = ("groups", "rendezvous", "openrlhf")
    checks = {
        "everything happened that was to happen": not course.failed and all(e.done for e in course.events),
        "no call was lost": calls["lost"] == 0,
        "every call was answered with 200": calls["status_200"] == sum(calls[f"calls_{kind}"] for kind in kinds),
        "no answer was mixed or wrong": calls["wrong"] == 0,
        "no group has answers of several versions": figures["groups_with_several_versions"] == 0,
        "no group was scored without a member": told["assembled_partial"] == told["members_late"] == 0,
    }
    if which == "replicas":
        by = figures["answers_by_version"]
        checks["all versions were served"] = set(by) == {str(k) for k in range(VERSIONS)}
    if which in ("replicas", "scaling"):
        checks["one replica is left"] = figures["replicas_at_the_end"] == 1
    if which == "scaling":
        checks["groups were answered while replicas came and went"] = min(figures["answers_meanwhile"].values()) > 0
    return checks


# -- the plot --------------------------------------------------------------------------------------------------------


def draw(figures: dict[str, Any], outcomes: dict[str, Outcome], path: Path) -> None:
    """Answers a second by version, and latencies, with what happened."""
    figure = new_figure((10, 3.4 * len(outcomes) + 1))
    grid = figure.subplots(2 * len(outcomes), 1, squeeze=False)[:, 0]
    for number, (name, outcome) in enumerate(outcomes.items()):
        _draw_run(figures[name], outcome, grid[2 * number], grid[2 * number + 1], name)
    figure.savefig(path, dpi=130)


def _draw_run(figures: dict[str, Any], outcome: Outcome, above: Any, below: Any, name: str) -> None:
    ends = int(max(at for at, _, _ in outcome.answers)) + 1
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
    bottom = [0] * ends
    for version in sorted({version for _, _, version in outcome.answers}, key=lambda v: -1 if v is None else v):
        counts = [0] * ends
        for at, _, of in outcome.answers:
            counts[int(at)] += of == version
        label = f"version {version}"
        above.bar(range(ends), counts, 1.0, bottom, align="edge", color=colours[(version or 0) % 4], label=label)
        bottom = [a + b for a, b in zip(bottom, counts, strict=True)]
    for level, style in ((0.5, "-"), (0.95, "--")):
        points = []
        for second in range(ends):
            values = [seconds for at, seconds, _ in outcome.answers if int(at) == second]
            if values:
                points.append((second + 0.5, quantiles(values, (level,))[0]))
        below.plot(*zip(*points, strict=True), style, color="0.2", label=f"{level:.0%} of answers")
    for axis in (above, below):
        for event in figures["events"]:
            axis.axvspan(event["at_s"], max(event["done_s"], event["at_s"] + 0.2), color="#D55E00", alpha=0.2, lw=0)
        axis.set_xlim(0, ends)
    for event in figures["events"]:
        text = f" {event['name']}"
        above.text(event["at_s"], above.get_ylim()[1], text, color="#D55E00", fontsize=7, rotation=90, va="top")
    above.set_ylabel("answers a second")
    above.set_title(f"{name}: {figures['soak']['clients']} clients", fontsize=10, loc="left")
    above.legend(frameon=False, fontsize=7, ncols=4, loc="upper right")
    below.set_ylabel("s to answer")
    below.set_xlabel("s")
    below.legend(frameon=False, fontsize=7)


def write(figures: dict[str, Any], outcomes: dict[str, Outcome], out: Path) -> None:
    """``serve_ray.json``, in which runs of before stay that were not made again, and a plot of every two runs."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "serve_ray.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    runs = {which: figures.get(which, before.get(which)) for which in RUNS}
    path.write_text(json.dumps({k: v for k, v in runs.items() if v is not None}, indent=2, allow_nan=False) + "\n")
    for name, drawn in PLOTS.items():
        if both := {which: outcomes[which] for which in drawn if which in outcomes}:
            draw(figures, both, out / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=whole(), default=200)
    parser.add_argument("--seconds", type=real(above=0), default=60.0)
    parser.add_argument(
        "--hang-up", type=real(least=0, most=1), default=0.05, help="share of calls dropped and made again"
    )
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    a = parser.parse_args(argv)
    figures: dict[str, Any] = {}
    outcomes: dict[str, Outcome] = {}
    for which in a.runs:
        soak = Soak(a.clients, a.seconds, hang_up=a.hang_up, pool=600, time_limit_s=150.0, answer_s=165.0)
        soak.ask_again = which in ("processes", "nodes")
        if which in ("scaling", "nodes"):
            # What is asked here is whether anything is lost by itself; a call dropped while all is slow waits long.
            soak.clients, soak.hang_up = min(a.clients, 64), 0.0
        where = environment(torch.device("cpu"))
        figures[which], outcomes[which] = run(soak, which)
        figures[which]["environment"] = where
        print(f"{which}: {figures[which]['groups']} groups in {figures[which]['seconds']} s")
        for name, passed in figures[which]["checks"].items():
            print(f"{'ok    ' if passed else 'FAILED'} {name}")
    write(figures, outcomes, a.out)
    return 0 if all(all(figures[which]["checks"].values()) for which in a.runs) else 1


if __name__ == "__main__":
    raise SystemExit(main())
