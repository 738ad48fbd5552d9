"""``rmcore evaluate``: a model on held-out preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device, check_folder
from rmcore.cli.console import encoding_progress, notes, print_markdown, progress_bar, reported_errors
from rmcore.cli.load_model import load_model
from rmcore.cli.output import check_file

__all__ = ["evaluate"]


@options.with_options
def evaluate(
    *,
    model: options.Model,
    preferences: Annotated[str, typer.Argument(help="Held-out preferences: a file, - or hf://org/name:split.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and a plot.")] = None,
    train_data: Annotated[Path | None, typer.Option("--train", help="Training preferences, for one control.")] = None,
    replicates: Annotated[int, typer.Option(help="Bootstrap replicates, clustered by prompt.")] = 1000,
    alpha: Annotated[
        float | None,
        typer.Option(help="Error rate allowed among the pairs left to the head: prints the threshold that holds it."),
    ] = None,
    delta: Annotated[float, typer.Option(help="With --alpha: how often a calibration may fail to hold it.")] = 0.1,
    risk_method: Annotated[
        Literal["fixed-sequence", "conformal"], typer.Option(help="With --alpha: which guarantee.")
    ] = "fixed-sequence",
    columns: options.Columns = None,
    critiques: options.Critiques = False,
    overwrite: options.Overwrite = False,
    loading: options.Loading,
    doubting: options.Doubting,
    deterministic: options.Deterministic = None,
) -> None:
    """Evaluate on held-out preferences: accuracy, calibration, and what routing by u is worth beside its controls.

    Where rows have a column subset or section, or lists of responses (RewardBench 2), accuracy is also told by subset
    and by row.
    """
    kept = Kept()
    with reported_errors(kept):
        from rmcore.engine.routing.risk_bounds import check_risk
        from rmcore.evaluation.evaluate import encode_pairs, evaluate_pairs, scored_pairs
        from rmcore.evaluation.risk import evaluate_risk
        from rmcore.evaluation.soft import soft_fit
        from rmcore.evaluation.streams import StreamPair
        from rmcore.evaluation.subsets import accuracy_by_subset, subsets_to_markdown
        from rmcore.model.data import parse_columns, read_preference_rows, read_preferences
        from rmcore.model.training_pairs import encode_preferences

        if replicates < 1:
            reject("--replicates", replicates, "at least 1")
        if alpha is not None:
            check_risk(alpha, delta, risk_method)
        check_folder(out, "--out")
        check_device(loading.device)
        files = [] if out is None else [out / "report.json", out / "report.png"]
        for file in files:
            check_file(str(file), inputs=[preferences, train_data], overwrite=overwrite, resumable=False, rows=False)
        names = parse_columns(columns or [])
        rows = list(read_preference_rows(preferences, names, critiques=critiques))
        items = [(pair, row) for row in rows for pair in row.pairs]
        if not items:
            reject("preferences", "no lines", "at least one")
        loaded = load_model(model, loading, kept, deterministic=deterministic)
        estimator = loaded.estimator_named(doubting.uncertainty)
        soft = sum(0.5 < pair.label < 1 for pair, _ in items)
        if soft:
            notes.print(
                f"{soft} of {len(items)} labels are between 0.5 and 1: for accuracy the chosen response counts as the "
                "better; how near the model comes to the labels themselves is told apart"
            )
        pairs = [
            StreamPair(p.prompt, p.chosen, p.rejected, 0.5 if p.label == 0.5 else 1.0, row.subset or "")
            for p, row in items
        ]
        with progress_bar() as bar:
            said = [pair.critiques or ((), ()) for pair, _ in items] if critiques else None
            loaded.notice_critiques(critiques)
            states = encode_pairs(loaded.backbone, pairs, loaded.mode, critiques=said, progress=encoding_progress(bar))
            known = None
            if train_data is not None:
                known, _, _ = encode_preferences(
                    loaded.backbone,
                    list(read_preferences(train_data, names)),
                    loaded.mode,
                    progress=encoding_progress(bar),
                )
        scored = scored_pairs(
            loaded.head,
            states,
            pairs,
            train=known,
            apart=deterministic == "batch",
            uncertainty=estimator,
            variance=doubting.variance,
        )
        report = evaluate_pairs(scored, replicates=replicates)
        risk = None
        if alpha is not None:
            risk = evaluate_risk(scored, alpha=alpha, delta=delta, method=risk_method)
        silent = int(states.silent.sum())
        if silent:
            notes.print(
                f"{silent} of {len(items)} pairs carry no signal: the model's inputs are equal, or one is too long and "
                "unread. They count as no preference, and as the most uncertain"
            )
        print_markdown(report.to_markdown())
        labels = soft_fit(scored.served_logit, [pair.label for pair, _ in items]) if soft else None
        if labels is not None:
            print_markdown(labels.to_markdown())
        if risk is not None:
            print_markdown(risk.to_markdown())
        parts = accuracy_by_subset(
            scored.logit, scored.label, [row.number for _, row in items], [row.subset for _, row in items]
        )
        if len(parts) > 2 or len(items) > len(rows) or any(row.subset for row in rows):
            print_markdown(subsets_to_markdown(parts))
        if files:
            from rmcore.evaluation.plots import plot_report

            content = report.to_dict() | {"subsets": [part.to_dict() for part in parts]}
            content |= {} if labels is None else {"soft_labels": labels.to_dict()}
            content |= {} if risk is None else {"risk": risk.to_dict()}
            write_atomic(files[0], json.dumps(content, indent=2, allow_nan=False) + "\n")
            plot_report(report, files[1])
            notes.print(f"wrote {files[0]} and {files[1]}")
