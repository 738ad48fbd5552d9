"""``rmcore score --ray``: the loop of :mod:`rmcore.cli.score` over the chunks that a cluster scores."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import DataError
from rmcore.cli.accounts import book, judge_outcome, print_accounts
from rmcore.cli.build_engine import check_key, check_routing
from rmcore.cli.checks import check_readable
from rmcore.cli.console import count_lines, notes, print_error, progress_bar
from rmcore.cli.judge_options import reject_unused
from rmcore.cli.on_ray import asks_a_judge, batch_routing, check_settings, engine_of, ray_errors, shared_judge, tell
from rmcore.cli.options import Judging
from rmcore.cli.output import opened_output
from rmcore.cli.records import Chain, run_digest
from rmcore.cli.resumed import groups_behind, last_line

if TYPE_CHECKING:
    from rmcore.engine.selection import Measure
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
) -> Callable[..., None]:
    """What scores all groups on a cluster and writes a line of each, in the order of the input."""
    own, asks = batch_routing(judging), asks_a_judge(judging)
    check_routing(own, asks)
    if judging.judge_url is None:
        reject_unused(judging)
    check_key(judging)
    check_readable(groups)
    check_settings(model, settings)
    source, model = (str(Path(name).resolve()) if Path(name).exists() else name for name in (groups, model))

    def run(line: Any, decides: Mapping[str, Any], *, measure: Measure = "u") -> None:
        from rmcore.engine.accounts import Accounts
        from rmcore.integrations.ray.bulk import Pool, score_in_order
        from rmcore.integrations.ray.cluster import connect
        from rmcore.model.data import read_groups

        booked, judged, done, failed = Accounts(accounts), Counter[str](), 0, 0
        with connect(address), opened_output(out, resume=resume) as output:
            output.chain = Chain(run_digest(model, decides))
            after = last_line(output.last, out)
            if after:  # here, since no actor sees the whole input
                next(groups_behind(read_groups(source, columns), output.done(), out, output.chain), None)
            judge = shared_judge(judging, None if out == "-" else Path(out + ".budget").resolve()) if asks else None
            try:
                make = functools.partial(engine_of, model, own, dict(settings), judge, measure)
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
                    tell(judge)
                if judged or not sys.exc_info()[0]:
                    print_accounts(booked.totals(), notes)
        judge_outcome(judged, done, failed)

    return run


def _said(stream: Iterator[Chunk]) -> Iterator[Chunk]:
    while True:
        with ray_errors():
            chunk = next(stream, None)
        if chunk is None:
            return
        yield chunk
