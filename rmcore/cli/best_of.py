"""``rmcore best-of`` and ``rmcore filter``: what else scored groups are good for. Input and options as in ``score``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rmcore.cli.console import notes
from rmcore.cli.score import Run, with_scoring

if TYPE_CHECKING:
    from rmcore.engine.groups import GroupScore
    from rmcore.model.data import Group

__all__ = ["best_of_command", "filter_command"]


@with_scoring
def best_of_command(
    load: Callable[[], Run],
    penalty: Annotated[float, typer.Option(help="c: choose by mean preference minus c times uncertainty.")] = 0.0,
    ties: Annotated[
        Literal["first", "shortest", "longest"], typer.Option(help="Which of equally good ones.")
    ] = "first",
) -> None:
    """Choose the best response of each group, one JSON line a group: its index and text, every response's score and u.

    A score is the mean preference over the group's other responses, minus --penalty times the mean uncertainty of these
    comparisons (a lower confidence bound). Without --threshold, --budget or --judge-fraction no pair goes to a judge.

    Example: `rmcore best-of my-rm groups.jsonl --penalty 0.5 -o best.jsonl`
    """
    from rmcore.engine.selection import best_of, check_selection, member_uncertainty

    check_selection(penalty, ties)

    def line(group: Group, score: GroupScore) -> dict[str, Any]:
        best = best_of([score], [group.responses], penalty=penalty, ties=ties)[0]
        return {
            "index": best.index,
            "response": best.response,
            "score": best.score,
            "scores": [_number(value) for value in best.scores.tolist()],
            "tied": best.tied,
            "uncertainty": [_number(value) for value in member_uncertainty(score).tolist()],
        }

    load()(line)


@with_scoring
def filter_command(
    load: Callable[[], Run],
    max_u: Annotated[float, typer.Option(help="Highest uncertainty kept; u is at least 1.")],
    by: Annotated[
        Literal["response", "group"],
        typer.Option(help="response: drop single responses; group: drop groups whose mean is higher."),
    ] = "response",
    min_responses: Annotated[int, typer.Option(help="A group left with fewer is dropped whole.")] = 2,
) -> None:
    """Drop what the reward model is unsure of, one JSON line a group that stays: input for another command.

    A response's uncertainty is the mean u of its comparisons; those a judge decided count as 1. ``kept`` says which of
    the input's responses stayed. Dropped groups leave no line, and how many there were is told at the end.

    Example: `rmcore filter my-rm groups.jsonl --max-u 1.5 -o sure.jsonl`
    """
    from rmcore.engine.selection import check_filter, filter_groups, member_uncertainty

    check_filter(max_u, by, min_responses)
    seen, stayed = [0, 0], [0, 0]

    def line(group: Group, score: GroupScore) -> dict[str, Any] | None:
        kept = filter_groups([score], max_u, by=by, min_responses=min_responses).responses[0]
        seen[0], seen[1] = seen[0] + 1, seen[1] + score.size
        stayed[0], stayed[1] = stayed[0] + bool(kept), stayed[1] + len(kept)
        if not kept:
            return None
        u = member_uncertainty(score).tolist()
        return {
            "prompt": group.prompt,
            "responses": [group.responses[k] for k in kept],
            **({} if group.critiques is None else {"critiques": [list(group.critiques[k]) for k in kept]}),
            "kept": list(kept),
            "uncertainty": [_number(u[k]) for k in kept],
        }

    try:
        load()(line)
    finally:
        if seen[0]:
            notes.print(f"kept {stayed[0]} of {seen[0]} groups, {stayed[1]} of {seen[1]} responses")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
