"""``rmcore label``: preferences from a judge instead of from people, as soft labels (RLAIF)."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rmcore._base.errors import JudgeError, reject
from rmcore._base.files import write_atomic
from rmcore.cli import options
from rmcore.cli.accounts import room_in_words
from rmcore.cli.build_engine import check_key, make_budgets, make_judge
from rmcore.cli.checks import check_folder
from rmcore.cli.console import judge_progress, notes, progress_bar, reported_errors
from rmcore.cli.files import file_read, reading
from rmcore.cli.numbers import number
from rmcore.cli.output import Output, check_apart, check_file, opened_output

if TYPE_CHECKING:
    from rmcore.engine.routing import Budget
    from rmcore.evaluation.ai_labels import LabelReport
    from rmcore.judge.base import Judge, JudgeUsage
    from rmcore.judge.labelling import LabelPolicy, SoftLabel
    from rmcore.judge.question.constitution import Constitution
    from rmcore.model.data.candidates import Candidate

__all__ = ["label"]

_CHUNK = 64
"""Pairs asked together: what a budget is settled by, and a file grows by."""


@dataclass(frozen=True)
class SoftAsking(options.Asking):
    """The judge's options, soft verdicts by default."""

    judge_soft: options.JudgeSoft = True


@dataclass(frozen=True)
class Labelling:
    """How questions are put, and what counts as a label."""

    design: Annotated[
        str, typer.Option(help="Pairs of a prompt's responses to ask about: all, circular or regular:4.")
    ] = "all"
    rationale: Annotated[
        bool, typer.Option(help="Have the judge compare in words first; without, its label is its first thought.")
    ] = True
    constitution: Annotated[
        Path | None, file_read(help="Text file with a principle a line, to judge by; each pair draws a few.")
    ] = None
    principles: Annotated[int, number(help="How many principles of --constitution a pair is judged by.", least=1)] = 1
    hard: Annotated[
        Literal["keep", "refuse"],
        typer.Option(help="With soft labels: what to do with verdicts of which no probability can be had."),
    ] = "refuse"
    one_order: Annotated[
        Literal["keep", "refuse"], typer.Option(help="What to do with pairs of which one order failed.")
    ] = "refuse"
    seed: Annotated[int, number(help="Of the principles drawn.", least=0)] = 0


@options.with_options
def label(
    *,
    prompts: Annotated[
        str,
        typer.Argument(
            help="Prompts with responses, or preferences of people, to see whether the judge agrees: a file, - or "
            "hf://org/name:split."
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Where preferences go; - for stdout.")] = "-",
    human: Annotated[
        str | None, file_read(help="Preferences of people: pairs that are among them count for agreement.", rows=True)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for labels.json, and labels.png if people's are given.")
    ] = None,
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Write --out again from the verdict store, and ask for what is missing.")
    ] = False,
    columns: options.Columns = None,
    how: Labelling,
    asking: SoftAsking,
) -> None:
    """Label pairs of responses with a judge: TRL's preferences with `label`, how probable it is that chosen is better.

    Each pair is asked in both orders, P is read from the probabilities of the verdict's words and averaged. What is no
    label (no verdict, no probability, too little of it on the verdict's words) is counted, and never written as a tie.
    Verdicts are kept in --store, by default NAME.verdicts.db beside --out: a run that was killed goes on with --resume,
    and buys nothing twice.

    Example: `rmcore label prompts.jsonl --judge-url http://localhost:8000/v1 --judge-model judge --judge-key-env ''
    -o prefs.jsonl`, then `rmcore train prefs.jsonl --backbone Qwen/Qwen3-0.6B -o my-rm`
    """
    with reported_errors():
        job = _job(prompts, out, human, report, overwrite, resume, columns or [], how, asking)
        with opened_output(out) as output, progress_bar() as bar, judge_progress(bar, job.judge):
            task = bar.add_task("pairs", total=None)
            for chunk, labels in _labelled(job):
                for candidate, found in zip(chunk, labels, strict=True):
                    job.note(candidate, found)
                    if found.probability is not None:
                        output.write(_row(candidate, found, job))
                output.flush()
                bar.update(task, completed=len(job.labels))
            _finish(job, output, report)


@dataclass
class _Job:
    """What was found right before anything is asked, and what has come of it."""

    pairs: Iterator[Candidate]
    judge: Judge
    budgets: list[Budget]
    policy: LabelPolicy
    constitution: Constitution | None
    known: dict[str, float]
    labels: list[SoftLabel] = field(default_factory=list)
    of_prompt: list[Hashable] = field(default_factory=list)
    people: list[float | None] = field(default_factory=list)
    left: int = 0
    """Pairs that no budget was left for; at least so many."""

    def note(self, candidate: Candidate, found: SoftLabel) -> None:
        from rmcore._base.prompt import content_key

        self.labels.append(found)
        self.of_prompt.append(content_key(candidate.prompt))
        self.people.append(self.human(candidate))

    def human(self, candidate: Candidate) -> float | None:
        """What people said of the pair, in its own row or in --human."""
        if candidate.human is not None or not self.known:
            return candidate.human
        from rmcore.judge.keys import pair_key

        return self.known.get(pair_key(candidate.prompt, candidate.first, candidate.second))


def _job(
    prompts: str,
    out: str,
    human: str | None,
    report: Path | None,
    overwrite: bool,
    resume: bool,
    columns: list[str],
    how: Labelling,
    asking: SoftAsking,
) -> _Job:
    """Everything that can be wrong before a call is bought."""
    from dataclasses import replace

    from rmcore.engine.comparisons import design_pairs, parse_design
    from rmcore.judge.labelling import LabelPolicy
    from rmcore.judge.question.constitution import Constitution
    from rmcore.model.data import parse_columns, read_rows
    from rmcore.model.data.candidates import candidates

    if parse_design(how.design, "--design")[0] == "swiss":
        reject("--design", repr(how.design), "all, circular or regular:k: rounds of swiss need a standing")
    if resume and overwrite:
        reject("--resume, --overwrite", "both", "at most one")
    store = asking.store
    if store is None and asking.judge_url is not None and out != "-":
        store = f"{out}.verdicts.db"
    if resume and store is None:
        reject("--resume", "without a verdict store", "--store, or results in a file: -o NAME")
    check_file(out, inputs=[prompts, human, how.constitution, asking.verdicts], overwrite=overwrite or resume)
    check_apart("--store", options.store_file(store), [prompts, human, out])
    check_folder(report, "--report")
    check_key(asking)
    limits = (asking.max_calls, asking.max_tokens, asking.max_cost)
    if asking.judge_url is None and limits != (None, None, None):
        reject("--max-calls, --max-tokens, --max-cost", "without --judge-url", "together with it")
    principles = None
    if how.constitution is not None:
        with reading("--constitution", how.constitution):
            principles = Constitution.from_file(how.constitution, per_question=how.principles, seed=how.seed)
    asking = replace(asking, store=store)
    judge = make_judge(asking, constitution=principles, rationale=how.rationale)
    if judge is None:
        reject("judge", "none", "--judge-url, or --verdicts with recorded ones")
    names = parse_columns(columns)

    def pairs_of(size: int) -> Iterator[tuple[int, int]]:
        return iter([(int(i), int(j)) for i, j in design_pairs(size, how.design).tolist()] if size > 1 else [])

    found = candidates(read_rows(prompts), pairs_of, names, source=prompts)
    policy = LabelPolicy(hard=how.hard if asking.judge_soft else "keep", one_order=how.one_order)
    return _Job(found, judge, make_budgets(asking), policy, principles, _known(human))


def _known(human: str | None) -> dict[str, float]:
    """People's labels by pair, in both orders; raises DataError where a pair has two that are not the same."""
    from rmcore._base.errors import DataError
    from rmcore.judge.keys import pair_key
    from rmcore.model.data import read_preference_rows

    known: dict[str, tuple[float, int]] = {}
    repeated = 0
    for row in () if human is None else read_preference_rows(human):
        for item in row.pairs:
            key = pair_key(item.prompt, item.chosen, item.rejected)
            if key not in known:
                known[pair_key(item.prompt, item.rejected, item.chosen)] = 1 - item.label, row.number
                known[key] = item.label, row.number
                continue
            label, line = known[key]
            if label != item.label:
                said = f"the label {item.label:g} for a pair that has {label:g} in line {line}"
                raise DataError(f"{said}. Keep one of them, or their mean", source=str(human), line=row.number)
            repeated += 1
    if repeated:
        notes.print(f"{human}: {repeated} pairs come again with the same label", markup=False, highlight=False)
    return {key: label for key, (label, _) in known.items()}


def _labelled(job: _Job) -> Iterator[tuple[list[Candidate], list[SoftLabel]]]:
    """Pairs and their labels, chunk by chunk, as far as the budgets go; closes the judge in the end."""
    from rmcore._base.loop import run_sync
    from rmcore.judge.base import JudgeUsage, Pair, close_judge
    from rmcore.judge.labelling import asked_orders, soft_label

    try:
        while waiting := list(islice(job.pairs, _CHUNK)):
            while waiting:
                held = [budget.reserve(len(waiting)) for budget in job.budgets]
                granted = min([len(waiting), *(one.pairs for one in held)])
                held = [b.shrink(one, granted) for b, one in zip(job.budgets, held, strict=True)]
                if granted == 0:
                    for budget, one in zip(job.budgets, held, strict=True):
                        budget.settle(one, JudgeUsage())
                    job.left = len(waiting) + sum(1 for _ in job.pairs)
                    return
                chunk, waiting = waiting[:granted], waiting[granted:]
                asked = run_sync(asked_orders(job.judge, [Pair(c.prompt, c.first, c.second) for c in chunk]))
                usage = JudgeUsage.total(one.verdict.usage for one in asked)
                for budget, one in zip(job.budgets, held, strict=True):
                    budget.settle(one, usage)
                yield chunk, [soft_label(one, job.policy) for one in asked]
    finally:
        run_sync(close_judge(job.judge))


def _row(candidate: Candidate, found: SoftLabel, job: _Job) -> dict[str, Any]:
    """A preference as TRL and ``rmcore train`` read it, and how it came about."""
    from rmcore.judge.store.logged import as_answer

    p = found.probability
    assert p is not None
    first_better = p >= 0.5
    chosen, rejected = candidate.first, candidate.second
    if not first_better:
        chosen, rejected = rejected, chosen

    def turn(value: float | None) -> float | None:
        return value if first_better or value is None else 1 - value

    human = job.human(candidate)
    row: dict[str, Any] = {
        "prompt": candidate.prompt,
        "chosen": as_answer(candidate.prompt, chosen),
        "rejected": as_answer(candidate.prompt, rejected),
        "label": turn(p),
        "by_order": {"chosen_first": None, "rejected_first": None},
        "flipped": found.flipped,
        "model": found.verdict.judge,
        "critique": found.verdict.critique,
        "line": candidate.line,
        "responses": [candidate.i, candidate.j] if first_better else [candidate.j, candidate.i],
    }
    shown = ("chosen_first", "rejected_first") if first_better else ("rejected_first", "chosen_first")
    row["by_order"] = dict(zip(shown, (turn(found.forward), turn(found.backward)), strict=True))
    if candidate.id is not None:
        row["id"] = candidate.id
    if found.reason:
        row["notes"] = found.reason
    if job.constitution is not None:
        row["principles"] = list(job.constitution.drawn(candidate.prompt, candidate.first, candidate.second))
    if human is not None:
        row["human"] = turn(human)
    return row


def _finish(job: _Job, output: Output, folder: Path | None) -> None:
    """Say what came of it; raises where nothing did, or the budget ended first."""
    from rmcore.engine.usage import usage_summary
    from rmcore.evaluation.ai_labels import label_report
    from rmcore.judge.base import JudgeUsage

    if not job.labels and not job.left:
        reject("prompts", "no pairs", "prompts with two responses or more, or preferences")
    usage = JudgeUsage.total(one.verdict.usage for one in job.labels)
    if job.labels:
        told = label_report(job.labels, job.of_prompt, job.people)
        _print(told, usage)
        if folder is not None:
            _write(told, usage_summary(usage), folder)
    if job.left:
        raise JudgeError(
            f"the budget ended with {job.left} pairs to go ({room_in_words(job.budgets)}); "
            f"the {output.count} labels so far are kept. --resume goes on from them, with a larger budget or a new one"
        )
    if not output.count:
        raise JudgeError(f"no label for any of {len(job.labels)} pairs")


def _print(told: LabelReport, usage: JudgeUsage) -> None:
    notes.print(told.to_markdown(), markup=False, highlight=False)
    cost = f"{usage.cost:.6g}" + (f" and {usage.unpriced_calls} calls of unknown cost" * bool(usage.unpriced_calls))
    notes.print(
        f"{usage.calls} calls ({usage.cache_hits} answered from the store), {usage.prompt_tokens} prompt and "
        f"{usage.completion_tokens} completion tokens, cost {cost}",
        markup=False,
        highlight=False,
    )


def _write(told: LabelReport, usage: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"labels": told.to_dict(), "usage": usage}
    write_atomic(folder / "labels.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    if told.agreement is not None:
        from rmcore.evaluation.ai_labels import plot_labels

        plot_labels(told, folder / "labels.png")
    notes.print(f"wrote {folder}", markup=False, highlight=False)
