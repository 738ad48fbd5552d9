"""``rmcore best-of`` and ``rmcore filter``: what else scored groups are good for. Input and options as in ``score``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rmcore._base.errors import reject
from rmcore.cli.console import notes
from rmcore.cli.numbers import number
from rmcore.cli.output import Run
from rmcore.cli.score import with_scoring

if TYPE_CHECKING:
    from rmcore.engine.group_score import GroupScore
    from rmcore.engine.selection import Measure
    from rmcore.model.data import Group

__all__ = ["best_of_command", "filter_command"]


@with_scoring
def best_of_command(
    load: Callable[..., Run],
    penalty: Annotated[float, number(help="c: choose by mean preference minus c times uncertainty.", least=0)] = 0.0,
    ties: Annotated[
        Literal["first", "shortest", "longest"], typer.Option(help="Which of equally good ones.")
    ] = "first",
    penalty_by: Annotated[
        Literal["u", "gap", "covariance"],
        typer.Option(help="What --penalty is times: u, or of --uncertainty urme its gap or covariance norm."),
    ] = "u",
) -> None:
    """Choose the best response of each group, one JSON line a group: its index and text, every response's score and u.

    A score is the mean preference over the group's other responses, minus --penalty times the mean uncertainty of these
    comparisons (a lower confidence bound), or times what --penalty-by says. Without --threshold, --budget or
    --judge-fraction no pair goes to a judge.

    Example: `rmcore best-of my-rm groups.jsonl --penalty 0.5 -o best.jsonl`
    """
    from rmcore.engine.selection import best_of, check_selection, member_uncertainty

    check_selection(penalty, ties, penalty_by)

    def line(group: Group, score: GroupScore) -> dict[str, Any]:
        best = best_of([score], [group.responses], penalty=penalty, ties=ties, measure=penalty_by)[0]
        return {
            "index": best.index,
            "response": best.response,
            "score": best.score,
            "scores": [_number(value) for value in best.scores.tolist()],
            "tied": best.tied,
            "uncertainty": [_number(value) for value in member_uncertainty(score).tolist()],
            **{name: [_number(value) for value in values.tolist()] for name, values in score.measures.items()},
        }

    load(penalty_by)(line, measure=penalty_by)


@with_scoring
def filter_command(
    load: Callable[..., Run],
    max_u: Annotated[float | None, number(help="Highest uncertainty kept; u is at least 1.", least=1)] = None,
    max_gap: Annotated[
        float | None,
        number(help="Instead, of --uncertainty urme: largest gap kept between its heads' rewards.", least=0),
    ] = None,
    max_covariance: Annotated[
        float | None,
        number(help="Instead, of --uncertainty urme: largest norm kept of its heads' covariances.", least=0),
    ] = None,
    by: Annotated[
        Literal["response", "group"],
        typer.Option(help="response: drop single responses; group: drop groups whose mean is higher."),
    ] = "response",
    min_responses: Annotated[int, number(help="A group left with fewer is dropped whole.", least=1)] = 2,
) -> None:
    """Drop what the reward model is unsure of, one JSON line a group that stays: input for another command.

    A response's uncertainty is the mean u of its comparisons; those a judge decided count as 1. With --max-gap or
    --max-covariance it is URME's measure of it, and a pair goes where either response's is higher. ``kept`` says which
    of the input's responses stayed. Dropped groups leave no line, and how many there were is told at the end.

    Example: `rmcore filter my-rm groups.jsonl --max-u 1.5 -o sure.jsonl`
    """
    from rmcore.engine.selection import check_filter, filter_groups, member_measures

    limits: dict[Measure, float | None] = {"u": max_u, "gap": max_gap, "covariance": max_covariance}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        named = {"u": "--max-u", "gap": "--max-gap", "covariance": "--max-covariance"}
        told = ", ".join(named[name] for name in given) or "none"
        reject("--max-u, --max-gap, --max-covariance", told, "one of them")
    [(measure, limit)] = given.items()
    check_filter(limit, by, min_responses, measure)
    seen, stayed = [0, 0], [0, 0]

    def line(group: Group, score: GroupScore) -> dict[str, Any] | None:
        kept = filter_groups([score], limit, by=by, min_responses=min_responses, measure=measure).responses[0]
        seen[0], seen[1] = seen[0] + 1, seen[1] + score.size
        stayed[0], stayed[1] = stayed[0] + bool(kept), stayed[1] + len(kept)
        if not kept:
            return None
        found = member_measures([score], measure).tolist()
        return {
            "prompt": group.prompt,
            "responses": [group.responses[k] for k in kept],
            **({} if group.critiques is None else {"critiques": [list(group.critiques[k]) for k in kept]}),
            "kept": list(kept),
            "uncertainty" if measure == "u" else measure: [_number(found[k]) for k in kept],
        }

    try:
        load(measure)(line, measure=measure)
    finally:
        if seen[0]:
            notes.print(f"kept {stayed[0]} of {seen[0]} groups, {stayed[1]} of {seen[1]} responses")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
