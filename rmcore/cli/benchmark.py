"""``rmcore benchmark``: models on the field's benchmarks, and what a judge's calls are worth there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rmcore._base.errors import JudgeError, reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.build_engine import check_key, make_budgets, make_judge, make_prices
from rmcore.cli.checks import Kept, check_device, check_folder
from rmcore.cli.console import notes, print_markdown, progress_bar, reported_errors
from rmcore.cli.load_model import load_model
from rmcore.cli.output import check_file

if TYPE_CHECKING:
    from rmcore.cli.benchmark_tables import Wanted
    from rmcore.evaluation.benchmarks.choice import RouteBy
    from rmcore.evaluation.benchmarks.item import Benchmark, Item
    from rmcore.evaluation.benchmarks.routing_table import RoutingTable
    from rmcore.evaluation.benchmarks.scoring import Answers
    from rmcore.evaluation.benchmarks.verdicts import Verdicts
    from rmcore.judge.base import Judge
    from rmcore.model.error_prior import ErrorPrior
    from rmcore.model.reward_model import RewardModel

__all__ = ["benchmark"]

_FORMS = ("md", "tex", "csv", "json", "png")


@dataclass(frozen=True)
class Routing:
    """The options of the routing table."""

    budgets: Annotated[
        str | None,
        typer.Option(
            help="Routing table: shares of pairs put to a judge, as in 0.02,0.1,0.25,0.45; published: those of the "
            "paper's table, where it has this benchmark."
        ),
    ] = None
    thresholds: Annotated[
        str | None,
        typer.Option(help="Routing table: pairs whose score exceeds each of these are judged, as in 1.2,1.5."),
    ] = None
    rank_by: Annotated[
        Literal["learned", "u", "margin", "error_probability", "novelty", "rank_sum"],
        typer.Option(help="Routing table: what makes a pair worth a judge call."),
    ] = "u"
    every_pair: Annotated[
        bool,
        typer.Option("--every-pair", help="Routing table: ask a live judge about all pairs, not only those routed."),
    ] = False
    beside: Annotated[
        str | None,
        typer.Option(help="Other scores beside --rank-by in one table, as in u,margin,novelty,learned."),
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(help="Filter table: scores on these shares of the prompts, the surest, as in 0.25,0.5,0.75."),
    ] = None
    penalties: Annotated[
        str | None,
        typer.Option(
            help="Best-of-n table: choose by mean preference minus these times the uncertainty, as in 0,0.5,1."
        ),
    ] = None
    judge_params: Annotated[
        float | None, typer.Option(help="Accuracy at equal FLOP: the judge's parameters, as in 32e9.")
    ] = None
    model_params: Annotated[
        float | None, typer.Option(help="The model's parameters; default: those of its backbone.")
    ] = None
    judge_price: Annotated[
        str | None,
        typer.Option(
            help="Accuracy at equal money: the judge's prices of a million prompt and completion tokens, 2.5,10."
        ),
    ] = None
    model_price: Annotated[float, typer.Option(help="Price of a million tokens that the model reads.")] = 0.0
    judge_answer_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer of the judge, where it reports none.", min=0)
    ] = 256

    @property
    def routes(self) -> bool:
        """Whether a judge is needed, live, recorded or the label."""
        asked = (self.budgets, self.thresholds, self.beside, self.judge_params, self.judge_price)
        return any(option is not None for option in asked)

    @property
    def extra(self) -> tuple[str, ...]:
        """Names of the further tables."""
        return (
            *(("beside",) if self.beside is not None else ()),
            *(("cost-flop",) if self.judge_params is not None else ()),
            *(("cost-money",) if self.judge_price is not None else ()),
            *(("detection", "filter") if self.keep is not None else ()),
            *(("best_of",) if self.penalties is not None else ()),
        )


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
    routing: Routing,
    replicates: Annotated[
        int, typer.Option(help="Bootstrap replicates, clustered by prompt; 0 for no intervals.")
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
        if show_list:
            _list()
            return
        job = _checked(names, data, out, routing, replicates, asking, loading, overwrite)
        with _judge_of(job, asking) as verdicts:
            kept.store = asking.store
            _run(job, verdicts, routing, lambda model: load_model(model, loading, kept, deterministic=deterministic))


@dataclass
class _Job:
    """What was found right before a model is loaded."""

    benchmark: Benchmark
    models: list[str]
    sources: list[str]
    items: tuple[Item, ...]
    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]
    routed: bool
    replicates: int
    files: list[Path]
    tables: list[Path]
    wanted: Wanted


def _wanted(routing: Routing) -> Wanted:
    """The further tables; raises InputError for words and numbers that are none."""
    from typing import get_args

    from rmcore.cli.benchmark_tables import Wanted
    from rmcore.evaluation.benchmarks.choice import RouteBy
    from rmcore.evaluation.benchmarks.uncertainty import check_shares

    words = [] if routing.beside is None else [word.strip() for word in routing.beside.split(",")]
    for word in words:
        if word not in get_args(RouteBy):
            reject("--beside", repr(word), f"words out of {', '.join(get_args(RouteBy))}")
    scores = list(dict.fromkeys([routing.rank_by, *words]))
    if routing.beside is not None and len(scores) < 2:
        reject("--beside", repr(routing.beside), f"another score than {routing.rank_by}")
    keep, penalties = _numbers("--keep", routing.keep), _numbers("--penalties", routing.penalties)
    check_shares("--keep", keep)
    check_shares("--penalties", penalties, high=float("inf"))
    price = _numbers("--judge-price", routing.judge_price)
    if price and len(price) != 2:
        reject("--judge-price", repr(routing.judge_price), "two prices, of prompt and completion tokens, as in 2.5,10")
    return Wanted(
        scores=tuple(scores),  # type: ignore[arg-type]  # checked above
        keep=keep,
        penalties=penalties,
        judge_params=routing.judge_params,
        model_params=routing.model_params,
        judge_price=(price[0], price[1]) if price else None,
        model_price=routing.model_price,
        answer_tokens=routing.judge_answer_tokens,
    )


def _list() -> None:
    from rmcore.evaluation.benchmarks import BENCHMARKS

    rows = [f"| {known.name} | {known.title} | {known.about} |" for known in BENCHMARKS.values()]
    print_markdown("\n".join(["| name | benchmark | from |", "|---|---|---|", *rows]) + "\n")


def _checked(
    names: list[str] | None,
    data: str | None,
    out: Path | None,
    routing: Routing,
    replicates: int,
    asking: options.Asking,
    loading: options.Loading,
    overwrite: bool,
) -> _Job:
    """Everything that can be wrong before a model is loaded, and the rows."""
    from rmcore.evaluation.benchmarks import BENCHMARKS, find_benchmark
    from rmcore.evaluation.benchmarks.choice import BUDGETS, check_cuts
    from rmcore.evaluation.benchmarks.published import published_budgets
    from rmcore.evaluation.benchmarks.reading import read_items, sources_of

    if names is None or len(names) < 2:
        reject("MODEL... NAME", names or "nothing", f"models, then one of {', '.join(BENCHMARKS)}")
    *models, name = names
    if len(set(models)) < len(models):
        reject("MODEL", f"{models}", "each model once")
    asked = find_benchmark(name)
    if replicates < 0:
        reject("--replicates", replicates, "at least 0")
    check_folder(out, "--out")
    check_device(loading.device)
    told = routing.budgets
    shares = published_budgets(asked.name) if told == "published" else _numbers("--budgets", told)
    cuts = _numbers("--thresholds", routing.thresholds)
    judged = asking.verdicts is not None or asking.judge_url is not None
    if not shares and not cuts:
        shares = BUDGETS
    check_cuts(shares, cuts)
    routed = routing.routes or judged
    if (routed or routing.extra) and len(models) > 1:
        reject("--budgets, --thresholds, --verdicts, --judge-url", f"{len(models)} models", "one, for a routing table")
    wanted = _wanted(routing)
    files = [] if out is None else [out / "report.json", out / "report.md"]
    tables = [] if out is None or not routed else [out / f"routing.{kind}" for kind in _FORMS]
    further = [] if out is None else [out / f"{name}.{kind}" for name in routing.extra for kind in _FORMS]
    for file in files + tables + further:
        check_file(str(file), inputs=[data, asking.verdicts], overwrite=overwrite, resumable=False)
    items = read_items(asked, data)
    return _Job(asked, models, sources_of(asked, data), items, shares, cuts, routed, replicates, files, tables, wanted)


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
        answers[model] = _answers(loaded, job, model)
        text, report = _report(job, model, loaded.mode, answers[model])
        print_markdown(text)
        texts.append(text)
        reports.append(report)
    content = reports[0]
    if len(job.models) > 1:
        comparison = compare(job.benchmark, answers, replicates=job.replicates)
        texts.insert(0, comparison.to_markdown())
        print_markdown(texts[0])
        content = comparison.to_dict() | {"reports": reports}
    if verdicts is not None:
        _write_table(_routing_table(job, answers[job.models[0]], verdicts, routing, prior), job.tables)
    from rmcore.cli.benchmark_tables import further_tables, write_table

    written = list(job.tables)
    for table in further_tables(
        job.benchmark, loaded, answers[job.models[0]], verdicts, job.wanted, job.budgets, job.replicates
    ):
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


def _answers(model: RewardModel, job: _Job, name: str) -> Answers:
    """A model's answers, with a bar of the items done and left."""
    from rmcore.evaluation.benchmarks.scoring import score_items

    title = job.benchmark.title if len(job.models) == 1 else f"{job.benchmark.title}, {name}"
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(job.items))
        return score_items(model, job.items, progress=lambda done, _all: bar.update(task, completed=done))


def _numbers(option: str, given: str | None) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in given.split(",")) if given is not None else ()
    except ValueError:
        reject(option, repr(given)[:60], "numbers with commas between them, as in 0.02,0.1")
    return found


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
