"""``rmcore best-of`` and ``rmcore filter``: what else scored groups are good for. Input and options as in ``score``."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmcore import cli_options as options
from rmcore.errors import reject

if TYPE_CHECKING:
    from rmcore.cli import Line
    from rmcore.data import Group
    from rmcore.groups import GroupScore

__all__ = ["best_of_command", "filter_command"]

Run = Callable[["Line"], None]


def _scoring(
    model: Annotated[Path, typer.Argument(help="A folder written by rmcore train or upgrade.")],
    groups: Annotated[str, typer.Argument(help='JSONL of groups: {"prompt": ..., "responses": [...]}; - for stdin.')],
    out: Annotated[str, typer.Option("--out", "-o", help="Where results go; - for stdout.")] = "-",
    threshold: options.Threshold = None,
    budget: options.BudgetFraction = None,
    judge_fraction: options.JudgeFraction = None,
    max_calls: options.MaxCalls = None,
    max_tokens: options.MaxTokens = None,
    max_cost: options.MaxCost = None,
    router_state: options.RouterState = None,
    rank_by: options.RankByOption = "u",
    judge_url: options.JudgeUrl = None,
    judge_model: options.JudgeModel = "",
    judge_key_env: options.JudgeKeyEnv = "OPENAI_API_KEY",
    judge_orders: options.JudgeOrders = "both",
    judge_soft: options.JudgeSoft = False,
    judge_template: options.JudgeTemplate = None,
    judge_deadline: options.JudgeDeadline = None,
    store: options.Store = None,
    prices: options.Prices = None,
    verdicts: options.Verdicts = None,
    batch: Annotated[int, typer.Option(help="Groups scored, routed and written together.")] = 64,
    accounts: Annotated[
        Path | None, typer.Option(help="Append a summary of each batch to this file (rmcore accounts shows it).")
    ] = None,
    backend: Annotated[str, typer.Option(help="Kernels: auto, torch, cpu, triton, cuda.")] = "auto",
    device: Annotated[str | None, typer.Option(help="torch device; default: cuda if there is one.")] = None,
) -> Run:
    """Make the engine the options name; returns what scores all groups and writes a line of each."""
    from rmcore.accounts import Accounts
    from rmcore.cli import _notes, _print_accounts, _score_stream
    from rmcore.engine import RewardEngine
    from rmcore.model import RewardModel

    if batch < 1:
        reject("--batch", batch, "at least 1")
    adaptive = options.make_adaptive_router(
        judge_fraction,
        calls=max_calls,
        tokens=max_tokens,
        cost=max_cost,
        prices=prices,
        model=judge_model,
        rank_by=rank_by,
        orders=judge_orders,
        state=router_state,
    )
    router = options.make_router(threshold, budget, rank_by, adaptive)
    judge = options.make_judge(
        judge_url,
        judge_model,
        judge_key_env,
        orders=judge_orders,
        verdicts=verdicts,
        store=store,
        prices=prices,
        soft=judge_soft,
        template=judge_template,
    )
    loaded = RewardModel.from_pretrained(model, device=device)
    engine = RewardEngine(loaded, judge, router, backend=backend, judge_deadline_s=judge_deadline)  # type: ignore[arg-type]
    booked = Accounts(accounts)

    def save() -> None:
        if adaptive is not None and router_state is not None:
            adaptive.save(router_state)

    def run(line: Line) -> None:
        _score_stream(engine, groups, out, batch, booked, line, save)
        _print_accounts(booked.totals(), _notes)

    return run


def _with_scoring(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of :func:`_scoring` besides its own; its first argument makes the ``Run``.

    A function, so that what is wrong with the command's own options is found before a model is loaded.
    """
    shared = inspect.signature(_scoring, eval_str=True).parameters
    _load, *own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def combined(**given: Any) -> None:
        from rmcore.cli import _errors

        with _errors():
            load = functools.partial(_scoring, **{name: given.pop(name) for name in shared})
            command(load, **given)

    needed = [p for p in shared.values() if p.default is inspect.Parameter.empty]
    rest = [p for p in shared.values() if p.default is not inspect.Parameter.empty]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*needed, *own, *rest)]
    combined.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    combined.__annotations__ = {p.name: p.annotation for p in parameters}
    return combined


@_with_scoring
def best_of_command(
    load: Callable[[], Run],
    penalty: Annotated[float, typer.Option(help="c: choose by mean preference minus c times uncertainty.")] = 0.0,
    ties: Annotated[str, typer.Option(help="Which of equally good ones: first, shortest or longest.")] = "first",
) -> None:
    """Choose the best response of each group, one JSON line a group: its index and text, every response's score and u.

    A score is the mean preference over the group's other responses, minus --penalty times the mean uncertainty of these
    comparisons (a lower confidence bound). Without --threshold, --budget or --judge-fraction no pair goes to a judge.

    Example: `rmcore best-of my-rm groups.jsonl --penalty 0.5 -o best.jsonl`
    """
    from rmcore.selection import best_of, check_selection, member_uncertainty

    check_selection(penalty, ties)

    def line(group: Group, score: GroupScore) -> dict[str, Any]:
        best = best_of([score], [group.responses], penalty=penalty, ties=ties)[0]  # type: ignore[arg-type]
        return {
            "index": best.index,
            "response": best.response,
            "score": best.score,
            "scores": [_number(value) for value in best.scores.tolist()],
            "tied": best.tied,
            "uncertainty": [_number(value) for value in member_uncertainty(score).tolist()],
        }

    load()(line)


@_with_scoring
def filter_command(
    load: Callable[[], Run],
    max_u: Annotated[float, typer.Option(help="Highest uncertainty kept; u is at least 1.")],
    by: Annotated[
        str, typer.Option(help="response: drop single responses; group: drop groups whose mean is higher.")
    ] = "response",
    min_responses: Annotated[int, typer.Option(help="A group left with fewer is dropped whole.")] = 2,
) -> None:
    """Drop what the reward model is unsure of, one JSON line a group that stays: input for another command.

    A response's uncertainty is the mean u of its comparisons; those a judge decided count as 1. ``kept`` says which of
    the input's responses stayed. Dropped groups leave no line, and how many there were is told at the end.

    Example: `rmcore filter my-rm groups.jsonl --max-u 1.5 -o sure.jsonl`
    """
    from rmcore.cli import _notes
    from rmcore.selection import check_filter, filter_groups, member_uncertainty

    check_filter(max_u, by, min_responses)
    seen, stayed = [0, 0], [0, 0]

    def line(group: Group, score: GroupScore) -> dict[str, Any] | None:
        kept = filter_groups([score], max_u, by=by, min_responses=min_responses).responses[0]  # type: ignore[arg-type]
        seen[0], seen[1] = seen[0] + 1, seen[1] + score.size
        stayed[0], stayed[1] = stayed[0] + bool(kept), stayed[1] + len(kept)
        if not kept:
            return None
        u = member_uncertainty(score).tolist()
        return {
            "prompt": group.prompt,
            "responses": [group.responses[k] for k in kept],
            "kept": list(kept),
            "uncertainty": [_number(u[k]) for k in kept],
        }

    try:
        load()(line)
    finally:
        if seen[0]:
            _notes.print(f"kept {stayed[0]} of {seen[0]} groups, {stayed[1]} of {seen[1]} responses")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
