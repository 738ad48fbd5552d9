"""``rmcore score --ray``: the loop of :mod:`rmcore.cli.score` over the chunks that a cluster scores."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import DataError, RmcoreError, reject
from rmcore.cli.accounts import book, judge_outcome, print_accounts
from rmcore.cli.build_engine import check_key, check_routing, make_budgets, make_engine, make_judge
from rmcore.cli.console import count_lines, notes, print_error, progress_bar
from rmcore.cli.options import Judging
from rmcore.cli.output import opened_output
from rmcore.cli.resumed import groups_behind, last_line

if TYPE_CHECKING:
    from rmcore.engine.engine import RewardEngine
    from rmcore.integrations.ray import ActorJudge
    from rmcore.integrations.ray.bulk import Chunk

__all__ = ["score_on_ray"]


def score_on_ray(
    address: str,
    groups: str,
    model: str,
    judging: Judging,
    settings: Mapping[str, Any],
    out: str,
    accounts: Path | None,
    columns: Mapping[str, str],
    batch: int,
    resume: bool,
    pool: Mapping[str, Any],
) -> Callable[[Any], None]:
    """What scores all groups on a cluster and writes a line of each, in the order of the input."""
    own = _routing(judging)
    asks = judging.judge_url is not None or judging.verdicts is not None
    check_routing(own, asks)
    check_key(judging)
    source, model = (str(Path(name).resolve()) if Path(name).exists() else name for name in (groups, model))

    def run(line: Any) -> None:
        from rmcore.engine.accounts import Accounts
        from rmcore.integrations.ray.bulk import Pool, score_in_order
        from rmcore.integrations.ray.cluster import connect
        from rmcore.model.data import read_groups

        booked, judged, done, failed = Accounts(accounts), Counter[str](), 0, 0
        with connect(address), opened_output(out, resume=resume) as output:
            after = last_line(output.last, out)
            if after:  # here, since no actor sees the whole input
                next(groups_behind(read_groups(source, columns), output.last, out), None)
            judge = _start_judge(judging, out) if asks else None
            try:
                make = functools.partial(_engine, model, own, dict(settings), judge)
                stream = score_in_order(source, make, line, columns=columns, size=batch, pool=Pool(**pool), after=after)
                lines = count_lines(groups)
                with progress_bar() as bar:
                    task = bar.add_task("groups" if lines is None else "lines", total=lines)
                    for chunk in _said(stream):
                        for record in chunk.records:
                            output.write(record)
                        output.flush()
                        for number, said in chunk.errors:
                            print_error(DataError(said, source="groups", line=number))
                        if chunk.summary:
                            book(chunk.summary, booked, judged)
                        done, failed = done + chunk.groups, failed + len(chunk.errors)
                        bar.update(task, completed=done if lines is None else chunk.last)
                        if chunk.ends is not None:
                            raise DataError(chunk.ends)
            finally:
                if judge is not None:
                    _tell(judge)
                if judged or not sys.exc_info()[0]:
                    print_accounts(booked.totals(), notes)
        judge_outcome(judged, done, failed)

    return run


def _routing(judging: Judging) -> Judging:
    """What of the options an actor's router goes by. What learns from a stream has no place where there are many."""
    for option, value in (("--judge-fraction", judging.judge_fraction), ("--router-state", judging.router_state)):
        if value is not None:
            reject(option, f"{value} with --ray", "--budget or --threshold, of which each batch is routed by itself")
    routes = judging.budget is not None or judging.threshold is not None
    by = judging.rank_by or ("u" if judging.threshold is not None else "learned")
    if routes and by == "learned":
        reject(
            "--rank-by",
            "learned with --ray",
            "u, margin, error_probability, novelty or rank_sum",
            "A router that learns takes every verdict in turn, in one process",
        )
    # The judge is made once, in an actor of its own, with its store and its limits.
    nothing: dict[str, Any] = {"max_calls": None, "max_tokens": None, "max_cost": None, "judge_url": None}
    nothing |= {"verdicts": None, "store": None, "prices": None, "reuse": "replies", "ask_again": None}
    return replace(judging, **nothing)


def _engine(model: str, judging: Judging, settings: dict[str, Any], judge: ActorJudge | None) -> RewardEngine:
    return make_engine(model, judging, **settings, shared_judge=judge)[0]


def _start_judge(judging: Judging, out: str) -> ActorJudge:
    from rmcore.integrations.ray import start_judge

    state = None if out == "-" else Path(out + ".budget").resolve()
    if (judging.max_calls, judging.max_tokens, judging.max_cost) == (None, None, None):
        state = None
    # Actors have another working folder.
    files = {name: getattr(judging, name) for name in ("verdicts", "prices", "judge_template", "store")}
    here = {name: _absolute(path) for name, path in files.items() if path is not None}
    judging = replace(judging, **here)
    judge = start_judge(functools.partial(make_judge, judging), functools.partial(make_budgets, judging), state=state)
    with _ray_errors():
        judge.stats()  # raises what is wrong with it, before anything is scored
    return judge


def _absolute(path: str | Path) -> Any:
    """A file by its whole name, in the type it has; a URL as it is."""
    return path if "://" in str(path) else type(path)(Path(path).resolve())


def _tell(judge: ActorJudge) -> None:
    """What the judge of all actors was asked, and end it."""
    stats = judge.stats()
    notes.print(
        f"judge: {stats['asked']} pairs asked, {stats['repeated']} asked again and answered from memory, "
        f"{stats['refused']} over the budget; {stats['usage']['calls']} calls"
    )
    judge.close()


@contextmanager
def _ray_errors() -> Iterator[None]:
    """An actor's error as one of ours, in one line: Ray's own has the whole trace of the other process."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("ray"):
            raise
        raise RmcoreError(f"on the cluster: {_last_words(error)}") from error


def _last_words(error: BaseException) -> str:
    """The end of what Ray says, which is the line of the actor's own error; an empty error speaks by its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines:
        return lines[-1]
    return type(error).__name__ if error.__cause__ is None else _last_words(error.__cause__)


def _said(stream: Iterator[Chunk]) -> Iterator[Chunk]:
    while True:
        with _ray_errors():
            chunk = next(stream, None)
        if chunk is None:
            return
        yield chunk
