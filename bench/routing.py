"""Which router earns its judge calls: all of them, on all public streams and mixtures, several seeds.

A stream is worked off in chunks of 64 pairs, of each of which a router sends a share to the judge. Figures are points
of accuracy over routing as many pairs at random. Intervals are of a bootstrap clustered by prompt, over all seeds (of
the head's features, of the mixture and of its order) together. Judges: the human label, and where the data has them
recorded verdicts, GPT-4's on LLMBar and gpt-3.5-turbo's on PandaLM; the label elsewhere.

``hindsight`` is the better of u and margin chosen for each stream with its labels known, which nobody can.

Needs the data folder (``--data`` or RMCORE_DATA). Writes ``routing.json``, ``routing.md`` and ``routing.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import rmcore
from rmcore._base.arguments import whole
from rmcore.cli.run_demo import DEMO_HEAD
from rmcore.engine.routing import BudgetRouter, Candidates, LearnedRouter, RandomRouter, Router
from rmcore.evaluation.plots.figure import new_figure
from rmcore.evaluation.streams import find_data
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.model.error_prior import ErrorPrior
from rmcore.model.error_prior_fit import error_prior_of

from .routing_streams import MIXES, RECORDED, Part, candidates_of, load, mixed

__all__ = ["CHUNK", "FRACTIONS", "main", "run"]

FRACTIONS = (0.10, 0.25, 0.45)
CHUNK = 64
DEFAULT = "learned"
CONTROLS = ("random", "distance", "‖e₁ − e₂‖", "|length ratio|")
"""Scores without a posterior, beside which one with it must stand."""
Array = npt.NDArray[np.float64]


class ByColumn:
    """The top of each chunk by a column of the candidates: for controls."""

    def __init__(self, fraction: float, column: str) -> None:
        self.fraction, self.column = fraction, column

    def select(self, candidates: Candidates) -> Tensor:
        """The top of the chunk."""
        chosen = torch.zeros(len(candidates), dtype=torch.bool)
        order = candidates.columns[self.column].argsort(descending=True, stable=True)
        chosen[order[: int(self.fraction * len(candidates) + 1e-9)]] = True
        return chosen


def routers(prior: ErrorPrior | None, seed: int) -> dict[str, Callable[[float], Router]]:
    """Every router by name, made for a fraction."""
    return {
        "learned": lambda q: LearnedRouter(q, prior=prior),
        "learned, no prior": lambda q: LearnedRouter(q),
        "u": lambda q: BudgetRouter(q),
        "margin": lambda q: BudgetRouter(q, by="margin"),
        "rank_sum": lambda q: BudgetRouter(q, by="rank_sum"),
        "error_probability": lambda q: BudgetRouter(q, by="error_probability"),
        "novelty": lambda q: BudgetRouter(q, by="novelty"),
        "distance": lambda q: ByColumn(q, "distance"),
        "‖e₁ − e₂‖": lambda q: ByColumn(q, "apart"),
        "|length ratio|": lambda q: ByColumn(q, "length"),
        "random": lambda q: RandomRouter(q, seed=seed),
    }


def walk(router: Router, stream: Candidates, verdict: Tensor, seconds: list[float]) -> Tensor:
    """(N,) bool, which pairs of a stream are judged; a router that learns is told chunk by chunk."""
    judged = torch.zeros(len(stream), dtype=torch.bool)
    observe = getattr(router, "observe", None)
    for start in range(0, len(stream), CHUNK):
        part = torch.arange(start, min(start + CHUNK, len(stream)))
        chunk = stream[part]
        routed = router.select(chunk)
        judged[part] = routed
        if observe is not None:
            began = time.perf_counter()
            observe(chunk, routed, torch.where(routed, verdict[part], torch.nan))
            if len(chunk) == CHUNK and bool(routed.any()):
                seconds.append(time.perf_counter() - began)
    return judged


class Tally:
    """Sums by prompt, for figures and their clustered bootstrap."""

    def __init__(self) -> None:
        self.clusters: dict[str, int] = {}
        self.gain: dict[tuple[str, float], dict[int, float]] = {}
        self.pairs: dict[int, int] = {}

    def count(self, prompts: Sequence[str]) -> npt.NDArray[np.intp]:
        """Note a stream's pairs; → the number of each one's prompt."""
        owner = np.array([self.clusters.setdefault(prompt, len(self.clusters)) for prompt in prompts])
        for k in owner.tolist():
            self.pairs[k] = self.pairs.get(k, 0) + 1
        return owner

    def add(self, name: str, fraction: float, owner: npt.NDArray[np.intp], gain: Array, judged: Array) -> None:
        """One walk: the judge's gain a pair, and which pairs it was asked about."""
        over_random = gain * (judged - judged.mean())
        sums = self.gain.setdefault((name, fraction), {})
        for k, value in zip(owner.tolist(), over_random.tolist(), strict=True):
            sums[k] = sums.get(k, 0.0) + value

    def columns(self) -> tuple[Array, dict[tuple[str, float], Array]]:
        """Pairs a prompt, and by router and fraction the points a prompt."""
        size = np.array([self.pairs[k] for k in range(len(self.clusters))], dtype=np.float64)
        columns = {
            key: np.array([sums.get(k, 0.0) for k in range(len(size))], dtype=np.float64)
            for key, sums in self.gain.items()
        }
        return size, columns


def figures_of(tally: Tally, replicates: int = 1000, seed: int = 0) -> dict[str, Any]:
    """By router: points at each fraction with 95% intervals, and the default's lead over it with its own."""
    size, columns = tally.columns()
    draws = np.random.default_rng(seed).multinomial(len(size), np.full(len(size), 1 / len(size)), size=replicates)
    total = draws @ size

    def estimate(values: Array) -> dict[str, float]:
        low, high = np.quantile(100 * (draws @ values) / total, [0.025, 0.975])
        points = 100 * values.sum() / size.sum()
        return {"points": round(float(points), 2), "low": round(float(low), 2), "high": round(float(high), 2)}

    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in columns):
        result[name] = {"uplift": [estimate(columns[name, q]) for q in FRACTIONS]}
        if name != DEFAULT:
            result[name]["lead_of_default"] = [estimate(columns[DEFAULT, q] - columns[name, q]) for q in FRACTIONS]
    return result


def run(data: Path, seeds: int) -> dict[str, Any]:
    """All figures."""
    started = time.perf_counter()
    corpus, (hidden, labels, pairs), parts = load(data)
    tallies: dict[tuple[str, str], Tally] = {}
    seconds: list[float] = []
    for seed in range(seeds):
        config = HeadConfig(hidden.shape[1], seed=seed, **DEMO_HEAD)
        head, _ = fit(SNGPHead(config), hidden, labels, pairs=pairs, dtype=torch.float16)
        prior = error_prior_of(head.config, corpus.train, hidden, labels, pairs)
        assert prior is not None
        known = {name: candidates_of(head, prior, part) for name, part in parts.items()}
        for mix in MIXES:
            _one_seed(seed, mix, parts, known, prior, tallies, seconds)
        print(f"routing: seed {seed}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    streams = {
        judge: {name: figures_of(tally) for (who, name), tally in tallies.items() if who == judge}
        for judge in dict.fromkeys(judge for judge, _ in tallies)
    }
    return {
        "rmcore": rmcore.__version__,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "head": DEMO_HEAD,
        "seeds": seeds,
        "chunk": CHUNK,
        "fractions": list(FRACTIONS),
        "training_pairs": len(corpus.train),
        "pairs": {name: len(part.label) for name, part in parts.items()},
        "state_bytes": state_bytes(prior),
        "update_ms": {"least": round(1e3 * min(seconds), 3), "median": round(1e3 * float(np.median(seconds)), 3)},
        "seconds": round(time.perf_counter() - started),
        "streams": streams,
        "summary": {judge: summary(found) for judge, found in streams.items()},
        "above_every_control": {judge: beaten(found, CONTROLS) for judge, found in streams.items()},
        "above_every_control_and_u_and_margin": {
            judge: beaten(found, (*CONTROLS, "u", "margin")) for judge, found in streams.items()
        },
    }


def state_bytes(prior: ErrorPrior | None) -> int:
    """What the default's state comes to as JSON, with numbers in full."""
    router, chunk = LearnedRouter(0.25, prior=prior), torch.linspace(0.1, 3, CHUNK, dtype=torch.float64)
    candidates = Candidates(chunk, chunk, (1 + chunk).sqrt(), {"distance": chunk, "log_length_ratio": chunk.sin()})
    router.observe(candidates, router.select(candidates), chunk.cos().sign())
    return len(json.dumps(router.state_dict()))


def _one_seed(
    seed: int,
    mix: tuple[str, ...],
    parts: dict[str, Part],
    known: dict[str, Candidates],
    prior: ErrorPrior,
    tallies: dict[tuple[str, str], Tally],
    seconds: list[float],
) -> None:
    """One stream of one seed: mixed parts are cut to equal size; all routers, all fractions, every judge there is."""
    stream, name = mixed(mix, parts, known, seed), " + ".join(mix)
    label = stream.label
    judges = {"label": label}
    if any(part in RECORDED for part in mix):
        judges["recorded"] = stream.recorded
    head_right = 0.5 * (1 + stream.candidates.logit.sign() * label)
    for judge, verdict in judges.items():
        judge_right = torch.where(verdict.isnan(), head_right, 0.5 * (1 + verdict.sign() * label))
        gain = (judge_right - head_right).numpy()
        tally = tallies.setdefault((judge, name), Tally())
        owner = tally.count(stream.prompts)
        for router, make in routers(prior, seed).items():
            for q in FRACTIONS:
                judged = walk(make(q), stream.candidates, verdict, seconds)
                tally.add(router, q, owner, gain, judged.double().numpy())


def summary(streams: dict[str, Any]) -> dict[str, Any]:
    """Mean and worst stream of each router, and of the better of u and margin chosen in hindsight."""
    points = {
        router: np.array([[step["points"] for step in found[router]["uplift"]] for found in streams.values()])
        for router in next(iter(streams.values()))
    }
    points["hindsight"] = np.maximum(points["u"], points["margin"])
    above = {
        router: [
            sum(bool(found[router]["lead_of_default"][k]["low"] > 0) for found in streams.values()) for k in range(3)
        ]
        for router in points
        if router not in (DEFAULT, "hindsight")
    }
    return {
        router: {
            "mean": [round(float(x), 2) for x in table.mean(0)],
            "worst": [round(float(x), 2) for x in table.min(0)],
            "streams_on_which_the_default_is_above": above.get(router),
        }
        for router, table in points.items()
    }


def beaten(streams: dict[str, Any], others: Sequence[str]) -> list[list[str]]:
    """By fraction the streams on which the default is above all of some routers, with intervals that exclude 0."""
    return [
        [name for name, found in streams.items() if all(found[o]["lead_of_default"][k]["low"] > 0 for o in others)]
        for k in range(len(FRACTIONS))
    ]


def markdown(figures: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Routing: points of accuracy over random routing at 10 / 25 / 45% judged",
        "",
        f"{figures['seeds']} seeds, chunks of {CHUNK}, MiniLM in difference mode trained on "
        f"{figures['training_pairs']} Auto-J pairs. `python -m rmcore.bench.routing`, {figures['date']}.",
    ]
    shown = [
        "learned",
        "learned, no prior",
        "u",
        "margin",
        "rank_sum",
        "novelty",
        "distance",
        "‖e₁ − e₂‖",
        "|length ratio|",
    ]
    for judge, streams in figures["streams"].items():
        lines += ["", f"## Judge: {'the human label' if judge == 'label' else 'recorded verdicts'}", ""]
        lines += [
            "| stream | " + " | ".join(name.replace("|", "\\|") for name in shown) + " |",
            "|---" * (len(shown) + 1) + "|",
        ]
        for name, found in streams.items():
            cells = [" / ".join(f"{step['points']:+.1f}" for step in found[router]["uplift"]) for router in shown]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        total = figures["summary"][judge]
        for what in ("mean", "worst"):
            cells = [" / ".join(f"{x:+.1f}" for x in total[router][what]) for router in shown]
            lines.append(f"| **{what}** | " + " | ".join(cells) + " |")
        better = " / ".join(f"{x:+.1f}" for x in total["hindsight"]["mean"])
        above = "; ".join(
            f"{q:.0%}: {', '.join(names) or 'none'}"
            for q, names in zip(FRACTIONS, figures["above_every_control"][judge], strict=True)
        )
        lines += ["", f"The better of u and margin in hindsight, mean over streams: {better}.", ""]
        lines += [f"Streams on which learned is above every control ({', '.join(CONTROLS)}), 95%: {above}."]
    return "\n".join(lines) + "\n"


def draw(figures: dict[str, Any], path: Path) -> None:
    """One panel a budget: every stream's points and intervals, by router; the label as judge."""
    looks = {"learned": "#009E73", "u": "#0072B2", "margin": "#D55E00"}
    streams = figures["streams"]["label"]
    names = [*streams, "mean"]
    figure = new_figure((12, 5.2))
    axes = figure.subplots(1, len(FRACTIONS), sharey=True)
    place = np.arange(len(names))[::-1]
    for k, (axis, q) in enumerate(zip(axes, FRACTIONS, strict=True)):
        for shift, (router, colour) in zip((0.22, 0, -0.22), looks.items(), strict=True):
            steps = [streams[name][router]["uplift"][k] for name in streams]
            x = np.array([step["points"] for step in steps])
            error = np.abs(np.array([[step["low"], step["high"]] for step in steps]).T - x)
            axis.errorbar(x, place[:-1] + shift, xerr=error, fmt="o", color=colour, markersize=4, elinewidth=1)
            mean = figures["summary"]["label"][router]["mean"][k]
            axis.plot(mean, place[-1] + shift, "D", color=colour, markersize=7, label=router)
        better = figures["summary"]["label"]["hindsight"]["mean"][k]
        axis.plot(better, place[-1], "|", color="black", markersize=22, label="better of u and margin, in hindsight")
        axis.axvline(0, color="0.5", linewidth=1)
        axis.set_yticks(place, names)
        axis.set_title(f"{q:.0%} of the pairs judged", fontsize=10)
        axis.set_xlabel("points over random routing")
        axis.grid(alpha=0.25, axis="x")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 where the default does not hold what it promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="data folder; default: RMCORE_DATA")
    parser.add_argument("--seeds", type=whole(), default=12)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args(argv)
    data = find_data(arguments.data)
    if data is None:
        print("routing: no data folder; give --data or set RMCORE_DATA. Nothing was measured.", file=sys.stderr)
        return 2
    figures = run(data, arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "routing.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    (arguments.out / "routing.md").write_text(markdown(figures))
    draw(figures, arguments.out / "routing.png")
    print(markdown(figures))
    total = figures["summary"]["label"]
    ours, better = total[DEFAULT], total["hindsight"]["mean"]
    holds = all(a >= b for a, b in zip(ours["mean"], better, strict=True)) and min(ours["worst"]) >= -0.2
    print(f"default: mean {ours['mean']}, worst {ours['worst']}; hindsight {better}")
    print(f"update of a chunk of {CHUNK}: {figures['update_ms']} ms; state: {figures['state_bytes']:,} bytes")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
