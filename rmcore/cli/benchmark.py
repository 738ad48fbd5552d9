"""``rmcore benchmark``: models on the field's benchmarks, and what a judge's calls are worth there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmcore._base.errors import JudgeError, reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.benchmark_options import Routing, numbers_of, wanted_tables
from rmcore.cli.build_engine import check_key, make_budgets, make_judge, make_prices
from rmcore.cli.checks import Kept, check_device, check_folder
from rmcore.cli.console import notes, print_markdown, progress_bar, reported_errors
from rmcore.cli.load_model import load_model
from rmcore.cli.model_checks import check_options
from rmcore.cli.numbers import number
from rmcore.cli.output import check_file

if TYPE_CHECKING:
    from rmcore.cli.benchmark_tables import Wanted
    from rmcore.evaluation.benchmarks.choice import RouteBy
    from rmcore.evaluation.benchmarks.item import Benchmark, Item
    from rmcore.evaluation.benchmarks.routing_table import RoutingTable
    from rmcore.evaluation.benchmarks.scoring import Answers
    from rmcore.evaluation.benchmarks.verdicts import Verdicts
    from rmcore.head.estimators import VarianceKind
    from rmcore.judge.base import Judge
    from rmcore.model.error_prior import ErrorPrior
    from rmcore.model.reward_model import RewardModel

__all__ = ["benchmark"]

_SERVED = ""
"""The uncertainty that a model is served with, which is not known before it is loaded."""
_FORMS = ("md", "tex", "csv", "json", "png")


@options.with_options
def benchmark(
    *,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models (folders written by rmcore train or upgrade, or hub names), then a name that --list has."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A file, a folder or a hub name with its rows; default: where its authors keep them."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and report.md.")] = None,
    uncertainty: Annotated[
        str | None,
        typer.Option(
            "--uncertainty",
            "--estimator",
            help="What makes g and v of the model's hidden states, by name: head, or what was fitted beside it (rmcore "
            "train --uncertainty); several with commas between them are compared. Default: what it is served with.",
        ),
    ] = None,
    variance: options.Variance = None,
    routing: Routing,
    replicates: Annotated[
        int, number(help="Bootstrap replicates, clustered by prompt; 0 for no intervals.", least=0)
    ] = 1000,
    overwrite: options.Overwrite = False,
    asking: options.Asking,
    loading: options.Loading,
    deterministic: options.Deterministic = None,
) -> None:
    """Score a model on RewardBench, RewardBench 2, RM-Bench, JudgeBench, PPE or RMB, by their own rules.

    Rows come from the hub, or from files in JSON Lines, JSON or Parquet, compressed or not. Scores have intervals that
    resample prompts. Several models are compared with the first one, with paired intervals.

    With --budgets, --thresholds, --verdicts or --judge-url also a routing table: what accuracy how many judge calls
    buy, beside random routing with as many; with -o as routing.md, .tex, .csv, .json and .png. The judge is live,
    recorded, or the label. With --store a run that was killed goes on and buys nothing twice.
    """
    kept = Kept()
    with reported_errors(kept):
        from rmcore.model.uncertainties import UNCERTAINTIES

        if show_list:
            _list()
            return
        job = _checked(names, data, out, uncertainty, variance, routing, replicates, asking, loading, overwrite)
        with _judge_of(job, asking) as verdicts:
            kept.store = asking.store
            for model, word in product(job.models, job.estimators):
                limits: dict[str, Any] = {"max_length": loading.max_length, "overlong": loading.overlong}
                # Further estimators, which are registered here alone, are no model's own.
                check_options(model, uncertainty=word if word in UNCERTAINTIES else None, variance=variance, **limits)
            _run(job, verdicts, routing, lambda model: load_model(model, loading, kept, deterministic=deterministic))


@dataclass
class _Job:
    """What was found right before a model is loaded."""

    benchmark: Benchmark
    models: list[str]
    estimators: list[str]
    sources: list[str]
    items: tuple[Item, ...]
    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]
    routed: bool
    replicates: int
    files: list[Path]
    tables: list[Path]
    wanted: Wanted
    variance: VarianceKind | None = None


def _list() -> None:
    from rmcore.evaluation.benchmarks import BENCHMARKS

    rows = [f"| {known.name} | {known.title} | {known.about} |" for known in BENCHMARKS.values()]
    print_markdown("\n".join(["| name | benchmark | from |", "|---|---|---|", *rows]) + "\n")


def _checked(
    names: list[str] | None,
    data: str | None,
    out: Path | None,
    estimator: str | None,
    variance: VarianceKind | None,
    routing: Routing,
    replicates: int,
    asking: options.Asking,
    loading: options.Loading,
    overwrite: bool,
) -> _Job:
    """Everything that can be wrong before a model is loaded, and the rows."""
    from rmcore.evaluation.benchmarks import BENCHMARKS, find_benchmark
    from rmcore.evaluation.benchmarks.choice import BUDGETS, check_cuts
    from rmcore.evaluation.benchmarks.estimators import ESTIMATORS
    from rmcore.evaluation.benchmarks.published import published_budgets
    from rmcore.evaluation.benchmarks.reading import read_items, sources_of

    if names is None or len(names) < 2:
        reject("MODEL... NAME", names or "nothing", f"models, then one of {', '.join(BENCHMARKS)}")
    *models, name = names
    if len(set(models)) < len(models):
        reject("MODEL", f"{models}", "each model once")
    estimators = [_SERVED] if estimator is None else [word.strip() for word in estimator.split(",")]
    for word in estimators:
        if word != _SERVED and (word not in ESTIMATORS or estimators.count(word) > 1):
            reject("--uncertainty", repr(estimator)[:60], f"each once, of {', '.join(ESTIMATORS)}")
    asked = find_benchmark(name)
    if replicates < 0:
        reject("--replicates", replicates, "at least 0")
    check_folder(out, "--out")
    check_device(loading.device)
    told = routing.budgets
    shares = published_budgets(asked.name) if told == "published" else numbers_of("--budgets", told)
    cuts = numbers_of("--thresholds", routing.thresholds)
    judged = asking.verdicts is not None or asking.judge_url is not None
    if not shares and not cuts:
        shares = BUDGETS
    check_cuts(shares, cuts, ("--budgets", "--thresholds"))
    routed = routing.routes or judged
    more = routing.further(routed)
    if (routed or more) and (several := len(models) * len(estimators)) > 1:
        what = "models" if len(models) > 1 else "estimators"
        reject("--budgets, --thresholds, --verdicts, --judge-url", f"{several} {what}", "one, for a routing table")
    wanted = replace(wanted_tables(routing), estimator=estimators[0] or "head")
    files = [] if out is None else [out / "report.json", out / "report.md"]
    tables = [] if out is None or not routed else [out / f"routing.{kind}" for kind in _FORMS]
    further = [] if out is None else [out / f"{name}.{kind}" for name in more for kind in _FORMS]
    for file in files + tables + further:
        check_file(str(file), inputs=[data, asking.verdicts], overwrite=overwrite, resumable=False, rows=False)
    of = sources_of(asked, data)
    items = read_items(asked, sources=of)
    return _Job(asked, models, estimators, of, items, shares, cuts, routed, replicates, files, tables, wanted, variance)


@contextmanager
def _judge_of(job: _Job, asking: options.Asking) -> Iterator[Verdicts | None]:
    """The judge that the options name, closed in the end: live, recorded, or the label; None without a table."""
    from rmcore._base.loop import run_sync
    from rmcore.evaluation.benchmarks.item import CountedPairs
    from rmcore.evaluation.benchmarks.verdicts import label_verdicts, recorded_verdicts
    from rmcore.judge.base import close_judge
    from rmcore.judge.recorded import RecordedJudge

    judge: Judge | None = make_judge(asking)  # also where none is asked: what is wrong with its options is told
    limits = (asking.max_calls, asking.max_tokens, asking.max_cost)
    if asking.judge_url is None and limits != (None, None, None):
        reject("--max-calls, --max-tokens, --max-cost", "without --judge-url", "together with it")
    pairs = CountedPairs(job.items)
    if not job.routed:
        yield None
    elif isinstance(judge, RecordedJudge):
        assert asking.verdicts is not None
        said = recorded_verdicts(pairs, judge, f"recorded verdicts of {asking.verdicts.name}")
        _check_recorded(said, asking.verdicts)
        yield said
    elif judge is None:
        yield label_verdicts(pairs)
    else:
        check_key(asking)
        try:
            with _live(job, judge, asking) as live:
                yield live
        finally:
            run_sync(close_judge(judge))


@contextmanager
def _live(job: _Job, judge: Judge, asking: options.Asking) -> Iterator[Verdicts]:
    """A live judge, with a bar of the pairs answered and left; in the end what was bought is told."""
    from rmcore.evaluation.benchmarks.item import CountedPairs
    from rmcore.evaluation.benchmarks.verdicts import LiveVerdicts

    with progress_bar() as bar:
        task = bar.add_task("judged pairs", total=None, visible=False)
        live = LiveVerdicts(
            CountedPairs(job.items),
            judge,
            f"{asking.judge_model}, {'both orders' if asking.judge_orders == 'both' else 'one order'}",
            budgets=make_budgets(asking),
            prices=make_prices(asking),
            progress=lambda done, of: bar.update(task, completed=done, total=of, visible=True),
        )
        try:
            yield live
        finally:
            bought = live.bought
            notes.print(
                f"the judge: {int(live.asked.sum())} pairs, {bought.calls} calls bought now ({bought.prompt_tokens} + "
                f"{bought.completion_tokens} tokens), {bought.cache_hits} answers from the store"
            )
    if live.asked.any() and live.failed == live.asked.sum():
        raise JudgeError(f"no verdict on any of the {live.failed} pairs that the judge was asked about")


def _run(job: _Job, verdicts: Verdicts | None, routing: Routing, load: Callable[[str], RewardModel]) -> None:
    """Score the models one after the other, and print and write what is asked for."""
    from rmcore.evaluation.benchmarks.comparison import compare

    answers: dict[str, Answers] = {}
    reports: list[dict[str, Any]] = []
    texts: list[str] = []
    prior: ErrorPrior | None = None
    for model in job.models:
        loaded = load(model)
        prior = loaded.error_prior
        for estimator in job.estimators:
            estimator = estimator or loaded.uncertainty or "head"
            name = model if job.estimators in (["head"], [_SERVED]) else f"{model}, {estimator}"
            answers[name] = _answers(loaded, job, name, estimator)
            text, report = _report(job, name, loaded.mode, answers[name])
            print_markdown(text)
            texts.append(text)
            reports.append(report)
    content, first = reports[0], next(iter(answers.values()))
    if len(answers) > 1:
        comparison = compare(job.benchmark, answers, replicates=job.replicates)
        texts.insert(0, comparison.to_markdown())
        print_markdown(texts[0])
        content = comparison.to_dict() | {"reports": reports}
    if verdicts is not None:
        _write_table(_routing_table(job, first, verdicts, routing, prior), job.tables)
    from rmcore.cli.benchmark_tables import further_tables, write_table

    written = list(job.tables)
    for table in further_tables(job.benchmark, loaded, first, verdicts, job.wanted, job.budgets, job.replicates):
        print_markdown(table.to_markdown())
        written += write_table(table, job.files[0].parent) if job.files else []
    if job.files:
        write_atomic(job.files[0], json.dumps(content, indent=2, allow_nan=False) + "\n")
        write_atomic(job.files[1], "\n".join(texts))
        notes.print(f"wrote {', '.join(map(str, job.files + written))}")


def _report(job: _Job, model: str, mode: str, answers: Answers) -> tuple[str, dict[str, Any]]:
    """One model's report, as text and as JSON values."""
    from rmcore.evaluation.benchmarks.diagnostics import diagnose
    from rmcore.evaluation.benchmarks.published import PUBLISHED, published_note
    from rmcore.evaluation.benchmarks.report import number
    from rmcore.evaluation.benchmarks.scoring import benchmark_report

    report = benchmark_report(
        job.benchmark, answers, model=model, mode=mode, sources=job.sources, replicates=job.replicates
    )
    checked = diagnose(answers)
    diagnostics = {key: number(value) for key, value in asdict(checked).items()}
    theirs = published_note(job.benchmark.name, report.pairs)
    text = "\n".join(part for part in (report.to_markdown(), checked.to_markdown(), theirs) if part)
    known = [asdict(one) for one in PUBLISHED.get(job.benchmark.name, ())]
    return text, report.to_dict() | {"diagnostics": diagnostics, "published": known}


def _routing_table(
    job: _Job, answers: Answers, verdicts: Verdicts, routing: Routing, prior: ErrorPrior | None
) -> RoutingTable:
    from rmcore.evaluation.benchmarks.routing import routing_table

    by: RouteBy = routing.rank_by
    table = routing_table(
        job.benchmark,
        answers,
        verdicts,
        by=by,
        budgets=job.budgets,
        thresholds=job.thresholds,
        every=routing.every_pair,
        prior=prior,
        replicates=job.replicates,
    )
    print_markdown(table.to_markdown())
    return table


def _answers(model: RewardModel, job: _Job, name: str, estimator: str) -> Answers:
    """A model's answers, with a bar of the items done and left."""
    from rmcore.evaluation.benchmarks.scoring import score_items

    title = job.benchmark.title if len(job.models) * len(job.estimators) == 1 else f"{job.benchmark.title}, {name}"
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(job.items))
        return score_items(
            model,
            job.items,
            estimator=estimator,
            variance=job.variance,
            progress=lambda done, _all: bar.update(task, completed=done),
        )


def _check_recorded(said: Verdicts, path: Path) -> None:
    if said.failed == len(said):
        reject("--verdicts", f"{str(path)!r}, with no verdict on any pair", "verdicts on these prompts and responses")
    if said.failed:
        notes.print(
            f"{path.name} has no verdict on {said.failed} of {len(said)} pairs: the model's answer stands there"
        )


def _write_table(table: RoutingTable, files: Sequence[Path]) -> None:
    if not files:
        return
    from rmcore.evaluation.benchmarks.plot import plot_routing_table

    texts = (
        table.to_markdown(),
        table.to_latex(),
        table.to_csv(),
        json.dumps(table.to_dict(), indent=2, allow_nan=False) + "\n",
    )
    for file, text in zip(files[:-1], texts, strict=True):
        write_atomic(file, text)
    plot_routing_table(table, files[-1])
