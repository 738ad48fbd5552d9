"""``rmcore benchmark``: a model on the field's benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device, check_folder
from rmcore.cli.console import notes, print_markdown, progress_bar, reported_errors
from rmcore.cli.output import check_file

__all__ = ["benchmark"]


def benchmark(
    model: Annotated[
        str | None, typer.Argument(help="A folder written by rmcore train or upgrade, or a hub name.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="Which benchmark; --list lists them.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A file, a folder or a hub name with its rows; default: where its authors keep them."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and report.md.")] = None,
    replicates: Annotated[
        int, typer.Option(help="Bootstrap replicates, clustered by prompt; 0 for no intervals.")
    ] = 1000,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    no_cache: options.NoCache = False,
    max_length: options.MaxLength = None,
    overlong: options.Overlong = None,
) -> None:
    """Score a model on RewardBench, RewardBench 2, RM-Bench, JudgeBench, PPE or RMB, by their own rules.

    Rows come from the hub, or from files in JSON Lines, JSON or Parquet, compressed or not. Scores have intervals that
    resample prompts.
    """
    kept = Kept()
    with reported_errors(kept):
        from rmcore.evaluation.benchmarks import BENCHMARKS, find_benchmark

        if show_list:
            rows = [f"| {known.name} | {known.title} | {known.about} |" for known in BENCHMARKS.values()]
            print_markdown("\n".join(["| name | benchmark | from |", "|---|---|---|", *rows]) + "\n")
            return
        if model is None or name is None:
            reject("model, name", "not both", f"rmcore benchmark MODEL NAME, with NAME one of {', '.join(BENCHMARKS)}")
        from rmcore.evaluation.benchmarks.reading import read_items, sources_of
        from rmcore.evaluation.benchmarks.scoring import benchmark_report, score_items
        from rmcore.model.reward_model import RewardModel

        asked = find_benchmark(name)
        if replicates < 0:
            reject("--replicates", replicates, "at least 0")
        check_folder(out, "--out")
        check_device(device)
        files = [] if out is None else [out / "report.json", out / "report.md"]
        for file in files:
            check_file(str(file), inputs=[data], overwrite=overwrite, resumable=False)
        items = read_items(asked, data)
        loaded = RewardModel.from_pretrained(
            model,
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            max_length=max_length,
            overlong=overlong,
        )
        kept.use(loaded.backbone, cache=not no_cache)
        with progress_bar() as bar:
            task = bar.add_task(asked.title, total=len(items))
            answers = score_items(loaded, items, progress=lambda done, _all: bar.update(task, completed=done))
        report = benchmark_report(
            asked,
            answers,
            model=model,
            mode=loaded.mode,
            sources=sources_of(asked, data),
            replicates=replicates,
        )
        print_markdown(report.to_markdown())
        if files:
            write_atomic(files[0], json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
            write_atomic(files[1], report.to_markdown())
            notes.print(f"wrote {files[0]} and {files[1]}")
