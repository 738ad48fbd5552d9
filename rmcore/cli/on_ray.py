"""What the commands with --ray share: routing by batches, an actor's engine, one judge for all, errors in one line."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import RmcoreError, reject
from rmcore.cli.build_engine import make_budgets, make_engine, make_judge
from rmcore.cli.console import notes
from rmcore.cli.model_checks import check_options
from rmcore.cli.options import Judging

if TYPE_CHECKING:
    from rmcore.engine.engine import RewardEngine
    from rmcore.engine.selection import Measure
    from rmcore.integrations.ray import ActorJudge

__all__ = ["asks_a_judge", "batch_routing", "check_settings", "engine_of", "ray_errors", "shared_judge", "tell"]


def asks_a_judge(judging: Judging) -> bool:
    """Whether the options name one."""
    return judging.judge_url is not None or judging.verdicts is not None


def batch_routing(judging: Judging) -> Judging:
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


def check_settings(model: str, settings: Mapping[str, Any]) -> None:
    """What an actor would find that a model cannot go by, before anything is started elsewhere."""
    doubting, names = settings["doubting"], ("max_length", "overlong", "deterministic", "design")
    limits = {name: settings[name] for name in names}
    check_options(model, uncertainty=doubting.uncertainty, variance=doubting.variance, **limits)


def engine_of(
    model: str, judging: Judging, settings: dict[str, Any], judge: ActorJudge | None, measure: Measure = "u"
) -> RewardEngine:
    """An actor's engine, by the options of :func:`batch_routing`; it must tell the ``measure`` of responses."""
    engine = make_engine(model, judging, **settings, shared_judge=judge)[0]
    engine.check_measure(measure)
    return engine


def shared_judge(judging: Judging, state: Path | None) -> ActorJudge:
    """The judge of all actors, started; ``state`` keeps what its budgets have spent."""
    from rmcore.integrations.ray import start_judge

    if (judging.max_calls, judging.max_tokens, judging.max_cost) == (None, None, None):
        state = None
    # Actors have another working folder.
    files = {name: getattr(judging, name) for name in ("verdicts", "prices", "judge_template", "store")}
    here = {name: _absolute(path) for name, path in files.items() if path is not None}
    judging = replace(judging, **here)
    judge = start_judge(functools.partial(make_judge, judging), functools.partial(make_budgets, judging), state=state)
    with ray_errors():
        judge.stats()  # raises what is wrong with it, before anything is scored
    return judge


def _absolute(path: str | Path) -> Any:
    """A file by its whole name, in the type it has; a URL as it is."""
    return path if "://" in str(path) else type(path)(Path(path).resolve())


def tell(judge: ActorJudge) -> None:
    """What the judge of all actors was asked, and end it."""
    stats = judge.stats()
    notes.print(
        f"judge: {stats['asked']} pairs asked, {stats['repeated']} asked again and answered from memory, "
        f"{stats['refused']} over the budget; {stats['usage']['calls']} calls"
    )
    judge.close()


@contextmanager
def ray_errors() -> Iterator[None]:
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
