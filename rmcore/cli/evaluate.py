"""``rmcore evaluate``: a model on held-out preferences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.checks import Kept, check_device, check_folder
from rmcore.cli.console import encoding_progress, notes, print_markdown, progress_bar, reported_errors
from rmcore.cli.files import file_read
from rmcore.cli.load_model import load_model
from rmcore.cli.model_checks import check_options
from rmcore.cli.numbers import number
from rmcore.cli.output import check_file

if TYPE_CHECKING:
    from torch import Tensor

    from rmcore.evaluation.evaluate import PairStates
    from rmcore.evaluation.report import EvaluationReport
    from rmcore.evaluation.risk import RiskReport
    from rmcore.evaluation.soft import SoftFit
    from rmcore.evaluation.streams import StreamPair
    from rmcore.evaluation.subsets import SubsetAccuracy
    from rmcore.model.data import PreferenceRow
    from rmcore.model.reward_model import RewardModel
    from rmcore.model.training_pairs import Preference

__all__ = ["evaluate"]


@options.with_options
def evaluate(
    *,
    model: options.Model,
    preferences: Annotated[str, typer.Argument(help="Held-out preferences: a file, - or hf://org/name:split.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and a plot.")] = None,
    train_data: Annotated[
        Path | None, file_read("--train", help="Training preferences, for one control.", rows=True)
    ] = None,
    replicates: Annotated[int, number(help="Bootstrap replicates, clustered by prompt.", least=1)] = 1000,
    alpha: Annotated[
        float | None,
        number(
            help="Error rate allowed among the pairs left to the head: prints the threshold that holds it.",
            above=0,
            below=1,
        ),
    ] = None,
    delta: Annotated[
        float, number(help="With --alpha: how often a calibration may fail to hold it.", above=0, below=1)
    ] = 0.1,
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
        from rmcore.evaluation.evaluate import evaluate_pairs, scored_pairs
        from rmcore.evaluation.risk import evaluate_risk
        from rmcore.evaluation.soft import soft_fit
        from rmcore.evaluation.subsets import accuracy_by_subset
        from rmcore.model.data import parse_columns, read_preference_rows

        if replicates < 1:
            reject("--replicates", replicates, "at least 1")
        if alpha is not None:
            check_risk(alpha, delta, risk_method)
        files = _checked_files(out, inputs=[preferences, train_data], overwrite=overwrite)
        check_device(loading.device)
        check_options(
            model,
            uncertainty=doubting.uncertainty,
            variance=doubting.variance,
            max_length=loading.max_length,
            overlong=loading.overlong,
        )
        names = parse_columns(columns or [])
        rows = list(read_preference_rows(preferences, names, critiques=critiques))
        items = [(pair, row) for row in rows for pair in row.pairs]
        if not items:
            reject("preferences", "no lines", "at least one")
        loaded = load_model(model, loading, kept, deterministic=deterministic)
        estimator = loaded.estimator_named(doubting.uncertainty)
        labels = [pair.label for pair, _ in items]
        soft = any(0.5 < label < 1 for label in labels)
        pairs, states, known = _encoded(
            loaded, items, None if train_data is None else str(train_data), names, critiques
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
        found = Findings(
            evaluate_pairs(scored, replicates=replicates),
            soft_fit(scored.served_logit, labels) if soft else None,
            None if alpha is None else evaluate_risk(scored, alpha=alpha, delta=delta, method=risk_method),
            accuracy_by_subset(
                scored.logit, scored.label, [row.number for _, row in items], [row.subset for _, row in items]
            ),
        )
        _note_odd(labels, int(states.silent.sum()))
        found.show(by_subset=len(items) > len(rows) or any(row.subset for row in rows))
        if files:
            found.write(*files)


def _checked_files(out: Path | None, *, inputs: Sequence[str | Path | None], overwrite: bool) -> list[Path]:
    """The report and its picture, which may be written; none without a folder."""
    check_folder(out, "--out")
    files = [] if out is None else [out / "report.json", out / "report.png"]
    for file in files:
        check_file(str(file), inputs=inputs, overwrite=overwrite, resumable=False, rows=False)
    return files


def _note_odd(labels: Sequence[float], silent: int) -> None:
    """Tell of labels that are no certainties, and of pairs whose inputs tell nothing."""
    soft = sum(0.5 < label < 1 for label in labels)
    if soft:
        notes.print(
            f"{soft} of {len(labels)} labels are between 0.5 and 1: for accuracy the chosen response counts as the "
            "better; how near the model comes to the labels themselves is told apart"
        )
    if silent:
        notes.print(
            f"{silent} of {len(labels)} pairs carry no signal: the model's inputs are equal, or one is too long and "
            "unread. They count as no preference, and as the most uncertain"
        )


def _encoded(
    model: RewardModel,
    items: Sequence[tuple[Preference, PreferenceRow]],
    train_data: str | None,
    columns: dict[str, str],
    critiques: bool,
) -> tuple[list[StreamPair], PairStates, Tensor | None]:
    """The pairs as a stream, their states, and the rows of the training data where that is given."""
    from rmcore.evaluation.evaluate import encode_pairs
    from rmcore.evaluation.streams import StreamPair
    from rmcore.model.data import read_preferences
    from rmcore.model.training_pairs import encode_preferences

    pairs = [
        StreamPair(p.prompt, p.chosen, p.rejected, 0.5 if p.label == 0.5 else 1.0, row.subset or "") for p, row in items
    ]
    known = None
    with progress_bar() as bar:
        said = [pair.critiques or ((), ()) for pair, _ in items] if critiques else None
        model.notice_critiques(critiques)
        states = encode_pairs(model.backbone, pairs, model.mode, critiques=said, progress=encoding_progress(bar))
        if train_data is not None:
            given = list(read_preferences(train_data, columns))
            known, _, _ = encode_preferences(model.backbone, given, model.mode, progress=encoding_progress(bar))
    return pairs, states, known


@dataclass(frozen=True)
class Findings:
    """What there is to tell of a model.

    Attributes:
        report: accuracy, calibration, routing.
        soft: how near the model comes to labels that are no certainties, where there are any.
        risk: the threshold that holds an error rate, where one was asked for.
        subsets: accuracy by subset and by row.
    """

    report: EvaluationReport
    soft: SoftFit | None
    risk: RiskReport | None
    subsets: tuple[SubsetAccuracy, ...]

    def show(self, *, by_subset: bool) -> None:
        """Print tables; of one subset whose rows are pairs only where ``by_subset`` says so."""
        from rmcore.evaluation.subsets import subsets_to_markdown

        for part in (self.report, self.soft, self.risk):
            if part is not None:
                print_markdown(part.to_markdown())
        if len(self.subsets) > 2 or by_subset:
            print_markdown(subsets_to_markdown(self.subsets))

    def write(self, document: Path, plot: Path) -> None:
        """Write all of it as JSON, and draw the report."""
        from rmcore.evaluation.plots import plot_report

        content = self.report.to_dict() | {"subsets": [part.to_dict() for part in self.subsets]}
        content |= {} if self.soft is None else {"soft_labels": self.soft.to_dict()}
        content |= {} if self.risk is None else {"risk": self.risk.to_dict()}
        write_atomic(document, json.dumps(content, indent=2, allow_nan=False) + "\n")
        plot_report(self.report, plot)
        notes.print(f"wrote {document} and {plot}")
