"""``rmcore benchmark``: a model on the field's benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device, check_folder
from rmcore.cli.console import notes, print_markdown, progress_bar, reported_errors
from rmcore.cli.output import check_file

if TYPE_CHECKING:
    from rmcore.evaluation.benchmarks.item import Item, Matrix
    from rmcore.evaluation.benchmarks.routing_table import RoutingTable
    from rmcore.evaluation.benchmarks.scoring import Answers
    from rmcore.model.reward_model import RewardModel

__all__ = ["benchmark"]

_FORMS = ("md", "tex", "csv", "json", "png")


def benchmark(
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
    budgets: Annotated[
        str | None, typer.Option(help="Routing table: shares of pairs put to a judge, as in 0.02,0.1,0.25,0.45.")
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(help="Routing table: pairs whose score exceeds each of these are judged, as in 1.2,1.5."),
    ] = None,
    rank_by: Annotated[
        Literal["u", "margin", "rank_sum"], typer.Option(help="Routing table: what makes a pair worth a judge call.")
    ] = "u",
    verdicts: Annotated[
        Path | None,
        typer.Option(help="Routing table: recorded verdicts (JSONL); without them the label judges, an upper bound."),
    ] = None,
    replicates: Annotated[
        int, typer.Option(help="Bootstrap replicates, clustered by prompt; 0 for no intervals.")
    ] = 1000,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    deterministic: options.Deterministic = None,
    no_cache: options.NoCache = False,
    max_length: options.MaxLength = None,
    overlong: options.Overlong = None,
) -> None:
    """Score a model on RewardBench, RewardBench 2, RM-Bench, JudgeBench, PPE or RMB, by their own rules.

    Rows come from the hub, or from files in JSON Lines, JSON or Parquet, compressed or not. Scores have intervals that
    resample prompts. Several models are compared with the first one, with paired intervals.

    With --budgets, --thresholds or --verdicts also a routing table: what accuracy how many judge calls buy, beside
    random routing with as many; with -o as routing.md, .tex, .csv, .json and .png.
    """
    kept = Kept()
    with reported_errors(kept):
        from rmcore.evaluation.benchmarks import BENCHMARKS, find_benchmark

        if show_list:
            rows = [f"| {known.name} | {known.title} | {known.about} |" for known in BENCHMARKS.values()]
            print_markdown("\n".join(["| name | benchmark | from |", "|---|---|---|", *rows]) + "\n")
            return
        if names is None or len(names) < 2:
            reject("MODEL... NAME", names or "nothing", f"models, then one of {', '.join(BENCHMARKS)}")
        *models, name = names
        if len(set(models)) < len(models):
            reject("MODEL", f"{models}", "each model once")
        from rmcore.evaluation.benchmarks.comparison import compare
        from rmcore.evaluation.benchmarks.diagnostics import diagnose
        from rmcore.evaluation.benchmarks.reading import read_items, sources_of
        from rmcore.evaluation.benchmarks.report import number
        from rmcore.evaluation.benchmarks.routing import BUDGETS, LABEL, check_cuts, routing_table
        from rmcore.evaluation.benchmarks.scoring import benchmark_report
        from rmcore.model.reward_model import RewardModel

        asked = find_benchmark(name)
        if replicates < 0:
            reject("--replicates", replicates, "at least 0")
        check_folder(out, "--out")
        check_device(device)
        routed = budgets is not None or thresholds is not None or verdicts is not None
        shares, cuts = _numbers("--budgets", budgets), _numbers("--thresholds", thresholds)
        if not shares and not cuts:
            shares = BUDGETS
        check_cuts(shares, cuts)
        if routed and len(models) > 1:
            reject("--budgets, --thresholds, --verdicts", f"{len(models)} models", "one, for a routing table")
        files = [] if out is None else [out / "report.json", out / "report.md"]
        tables = [] if out is None or not routed else [out / f"routing.{kind}" for kind in _FORMS]
        for file in files + tables:
            check_file(str(file), inputs=[data, verdicts], overwrite=overwrite, resumable=False)
        items = read_items(asked, data)
        said = None if not routed else _verdicts(items, verdicts)
        answers: dict[str, Answers] = {}
        reports: dict[str, dict[str, Any]] = {}
        texts: list[str] = []
        for model in models:
            loaded = RewardModel.from_pretrained(
                model,
                device=device,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                deterministic=deterministic,
                max_length=max_length,
                overlong=overlong,
            )
            kept.use(loaded.backbone, cache=not no_cache)
            answers[model] = _answers(loaded, items, asked.title if len(models) == 1 else f"{asked.title}, {model}")
            report = benchmark_report(
                asked,
                answers[model],
                model=model,
                mode=loaded.mode,
                sources=sources_of(asked, data),
                replicates=replicates,
            )
            checked = diagnose(answers[model])
            texts.append(report.to_markdown() + "\n" + checked.to_markdown())
            print_markdown(texts[-1])
            diagnostics = {key: number(value) for key, value in asdict(checked).items()}
            reports[model] = report.to_dict() | {"diagnostics": diagnostics}
        content = reports[models[0]]
        if len(models) > 1:
            comparison = compare(asked, answers, replicates=replicates)
            texts.insert(0, comparison.to_markdown())
            print_markdown(texts[0])
            content = comparison.to_dict() | {"reports": list(reports.values())}
        if said is not None:
            judge = LABEL if verdicts is None else f"recorded verdicts of {verdicts.name}"
            table = routing_table(
                asked,
                answers[models[0]],
                said,
                judge=judge,
                by=rank_by,
                budgets=shares,
                thresholds=cuts,
                replicates=replicates,
            )
            print_markdown(table.to_markdown())
            _write_table(table, tables)
        if files:
            write_atomic(files[0], json.dumps(content, indent=2, allow_nan=False) + "\n")
            write_atomic(files[1], "\n".join(texts))
            notes.print(f"wrote {', '.join(map(str, files + tables))}")


def _answers(model: RewardModel, items: Sequence[Item], title: str) -> Answers:
    """A model's answers, with a bar of the items done and left."""
    from rmcore.evaluation.benchmarks.scoring import score_items

    with progress_bar() as bar:
        task = bar.add_task(title, total=len(items))
        return score_items(model, items, progress=lambda done, _all: bar.update(task, completed=done))


def _numbers(option: str, given: str | None) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in given.split(",")) if given is not None else ()
    except ValueError:
        reject(option, repr(given)[:60], "numbers with commas between them, as in 0.02,0.1")
    return found


def _verdicts(items: Sequence[Item], path: Path | None) -> Matrix:
    """What the judge says of each pair: the file, or the label where there is none."""
    from rmcore.evaluation.benchmarks.item import CountedPairs
    from rmcore.evaluation.benchmarks.routing import label_verdicts, recorded_verdicts
    from rmcore.judge.recorded import RecordedJudge

    pairs = CountedPairs(tuple(items))
    if path is None:
        return label_verdicts(pairs)
    said = recorded_verdicts(pairs, RecordedJudge.from_file(path))
    missing = int((said != said).sum())  # NaN
    if missing == len(said):
        reject("--verdicts", f"{str(path)!r}, with no verdict on any pair", "verdicts on these prompts and responses")
    if missing:
        notes.print(f"{path.name} has no verdict on {missing} of {len(said)} pairs: the model's answer stands there")
    return said


def _write_table(table: RoutingTable, files: list[Path]) -> None:
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
