"""``rmcore score``, and what ``best-of`` and ``filter`` share with it: the options, and the loop over the groups."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from rmcore._base.errors import DataError, InputError, reject
from rmcore.cli import options
from rmcore.cli.accounts import book, judge_outcome, print_accounts, print_budgets
from rmcore.cli.build_engine import close_engine, make_engine
from rmcore.cli.checks import check_readable, check_writable
from rmcore.cli.console import count_lines, judge_progress, notes, print_error, progress_bar, reported_errors
from rmcore.cli.model_checks import check_options
from rmcore.cli.numbers import number
from rmcore.cli.output import Line, Output, Run, check_apart, check_file, opened_output
from rmcore.cli.records import Chain, run_digest
from rmcore.cli.resumed import groups_behind
from rmcore.cli.score_ray import score_on_ray

if TYPE_CHECKING:
    from rmcore.engine.accounts import Accounts
    from rmcore.engine.engine import RewardEngine
    from rmcore.engine.selection import Measure
    from rmcore.model.data import Group

__all__ = ["score", "with_scoring"]

_DECIDES = ("uncertainty", "variance", "design", "critiques", "max_length", "overlong")
"""Options that decide what is found of a group, besides the model and the judge."""


@options.with_options
def _scoring(
    *,
    model: options.Model,
    groups: Annotated[
        str, typer.Argument(help='Groups, {"prompt": ..., "responses": [...]}: a file, - or hf://org/name:split.')
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Where results go; - for stdout.")] = "-",
    overwrite: options.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the results in --out end, of an interrupted run too.")
    ] = False,
    columns: options.Columns = None,
    critiques: options.Critiques = False,
    judging: options.Judging,
    doubting: options.Doubting,
    batch: Annotated[int, number(help="Groups scored, routed and written together.", least=1)] = 64,
    design: Annotated[
        str, typer.Option(help="Pairs of a group to compare: all, circular, regular:4 or swiss:3. For large groups.")
    ] = "all",
    accounts: Annotated[
        Path | None, typer.Option(help="Append a summary of each batch to this file (rmcore accounts shows it).")
    ] = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    attn_implementation: options.AttnImplementation = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    deterministic: options.Deterministic = None,
    max_length: options.MaxLength = None,
    overlong: options.Overlong = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Score on a Ray cluster: auto, its address, or local for this machine."),
    ] = None,
    ray_actors: Annotated[int, number(help="With --ray: models loaded, each in an actor.", least=1)] = 1,
    ray_gpus: Annotated[float, number(help="With --ray: GPUs of an actor; 0.5 puts two on one.", least=0)] = 0.0,
    ray_cpus: Annotated[float, number(help="With --ray: CPUs of an actor.", least=0)] = 1.0,
) -> Callable[..., None]:
    """Make the engine the options name; what comes back is a :data:`Run` that takes the command's own options too."""
    from rmcore.engine.accounts import Accounts
    from rmcore.model.data import parse_columns, read_groups

    if batch < 1:
        reject("--batch", batch, "at least 1")
    read = [groups, model, judging.verdicts, judging.prices, judging.judge_template]
    kept = {
        "--accounts": accounts,
        "--router-state": judging.router_state,
        "--store": options.store_file(judging.store),
    }
    check_file(out, inputs=[*read, *kept.values()], overwrite=overwrite, resume=resume)
    for option, path in kept.items():
        check_apart(option, path, read)
    check_writable(accounts, "--accounts")
    names = parse_columns(columns or [])
    settings: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "deterministic": deterministic,
        "max_length": max_length,
        "overlong": overlong,
        "design": design,
        "doubting": doubting,
    }
    if ray is None and (ray_actors, ray_gpus, ray_cpus) != (1, 0.0, 1.0):
        reject("--ray-actors, --ray-gpus, --ray-cpus", "without --ray", "together with it")
    if ray is not None:
        if critiques:
            reject("--critiques", "with --ray", "one of the two")
        pool = {"size": ray_actors, "num_gpus": ray_gpus, "num_cpus": ray_cpus}
        return score_on_ray(ray, groups, model, judging, settings, out, accounts, names, batch, resume, pool)
    check_readable(groups)
    engine, save = make_engine(model, judging, **settings)
    booked = Accounts(accounts)
    judged: Counter[str] = Counter()

    def run(line: Line, decides: Mapping[str, Any], *, measure: Measure = "u") -> None:
        try:
            engine.check_measure(measure)
            with opened_output(out, resume=resume) as output:
                output.chain = Chain(run_digest(model, decides))
                source = read_groups(groups, names, critiques=critiques)
                todo = groups_behind(source, output.done(), out, output.chain)
                stream = (engine, _chunks(todo, batch), output, booked, line, save, judged)
                done, failed = _score_stream(*stream, lines=count_lines(groups), critiques=critiques)
        finally:
            close_engine(engine)
            if judged or not sys.exc_info()[0]:  # what was spent is told however the run ends
                print_accounts(booked.totals(), notes)
                print_budgets(engine.router, notes)
        if judged["without critiques"]:
            notes.print(f"rmcore: {judged['without critiques']} of {done} groups have no critiques", markup=False)
        judge_outcome(judged, done, failed)

    return run


def with_scoring(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of ``score`` besides its own; its first argument makes the :data:`Run`.

    A function, so that what is wrong with the command's own options is found before a model is loaded.
    """
    shared = inspect.signature(_scoring, eval_str=True).parameters
    _load, *own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def combined(**given: Any) -> None:
        with reported_errors():
            common = {name: given.pop(name) for name in shared}
            decides = {"command": command.__name__, **given, **{name: common[name] for name in _DECIDES}}

            def load(measure: Measure = "u") -> Run:
                if measure != "u":
                    check_options(common["model"], uncertainty=common["uncertainty"], measure=measure)
                return functools.partial(_scoring(**common), decides=decides)

            command(load, **given)

    needed = [p for p in shared.values() if p.default is inspect.Parameter.empty]
    rest = [p for p in shared.values() if p.default is not inspect.Parameter.empty]
    added = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    return options.with_parameters(combined, [*needed, *added, *rest])


@with_scoring
def score(load: Callable[..., Run]) -> None:
    """Score groups of responses: preferences, uncertainties, rewards and RLOO advantages, one JSON line a group.

    Without --threshold, --budget or --judge-fraction no pair goes to a judge.

    Example: `rmcore score my-rm groups.jsonl --budget 0.1 --judge-url http://localhost:8000/v1 --judge-model judge
    --judge-key-env ''` (a server without keys)
    """
    load()(lambda group, score: score.to_record())


Chunks: TypeAlias = "Iterator[tuple[list[Group], DataError | None]]"


def _score_stream(
    engine: RewardEngine,
    chunks: Chunks,
    output: Output,
    accounts: Accounts,
    line: Line,
    after: Callable[[], None],
    judged: Counter[str],
    *,
    lines: int | None = None,
    critiques: bool = False,
) -> tuple[int, int]:
    """Score groups batch by batch; how many there were, and how many could not be scored.

    ``line`` makes what is written of each group, ``after`` ends a batch. Groups that cannot be scored are named as they
    come; a line that cannot be read ends the run at once, all before it written. ``lines`` is how many there are.
    """
    done = failed = 0
    with progress_bar() as bar, judge_progress(bar, engine.judge):
        task = bar.add_task("groups" if lines is None else "lines", total=lines)
        for chunk, error in chunks:
            if chunk:
                failed += _score_chunk(engine, chunk, output, accounts, line, judged, critiques=critiques)
                done += len(chunk)
                bar.update(task, completed=done if lines is None else chunk[-1].line)
                after()
            if error is not None:
                raise error
    return done, failed


def _score_chunk(
    engine: RewardEngine,
    chunk: list[Group],
    output: Output,
    accounts: Accounts,
    line: Line,
    judged: Counter[str],
    *,
    critiques: bool,
) -> int:
    """Score groups together, write those that can be scored and name the others; how many these are."""
    from rmcore.model.data.results import group_result

    given = None
    if critiques:
        given = [g.critiques or ((),) * len(g.responses) for g in chunk]
        judged["without critiques"] += sum(not any(own) for own in given)
    scores = engine.score([g.prompt for g in chunk], [g.responses for g in chunk], critiques=given, on_error="return")
    if len(scores):
        book(scores.summary(), accounts, judged)
    failed = 0
    try:
        for group, outcome in zip(chunk, scores.outcomes(), strict=True):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                record = line(group, outcome)
            except Exception as error:  # a tokenizer's own as well: it is this group's alone
                failed += 1
                said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                print_error(DataError(said, source="groups", line=group.line))
                continue
            if record is not None:
                output.write(group_result(group, record))
    finally:
        output.flush()
    return failed


def _chunks(groups: Iterator[Group], size: int) -> Chunks:
    chunk: list[Group] = []
    while True:
        try:
            group = next(groups, None)
        except DataError as error:
            yield chunk, error
            return
        if group is None:
            yield chunk, None
            return
        chunk.append(group)
        if len(chunk) == size:
            yield chunk, None
            chunk = []
