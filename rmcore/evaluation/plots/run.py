"""The figures of a run: what a router did step by step, and what judging came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.engine.accounts import Accounts
from rmcore.engine.routing.drift import StepRecord
from rmcore.evaluation.plots.figure import (
    BASELINE,
    COLOURS,
    DASHES,
    marker,
    new_figure,
    plot_style,
    save_figure,
    series,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_accounts", "plot_routing"]


def plot_routing(history: Sequence[StepRecord], path: str | Path | None = None) -> Figure:
    """A router's run: u and the threshold that follows it, the share of pairs routed, what each budget spent.

    Args:
        history: of an :class:`~rmcore.engine.routing.adaptive.AdaptiveRouter`.
        path: a .png to write.

    Raises:
        InputError: no step, or another ending.
        PlotsUnavailableError: matplotlib is not installed.
    """
    if not history:
        reject("history", "no steps", "at least one")
    spenders = [name for name in history[0].spend if any(record.spend.get(name) for record in history)][:2]
    panels: list[Callable[[Axes], None]] = [
        lambda ax: _draw_drift(ax, history),
        lambda ax: _draw_routed(ax, history),
        *(partial(_draw_spend, history=history, budget=name) for name in spenders),
    ]
    with plot_style():
        figure = new_figure((7.4, 2.5 * len(panels) + 0.4))
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for draw, ax in zip(panels, axes, strict=True):
            draw(ax)
            if len(ax.get_legend_handles_labels()[1]) > 1:
                ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlim(history[0].step - 0.5, history[-1].step + 0.5)
    return save_figure(figure, path) if path is not None else figure


def plot_accounts(accounts: Accounts, path: str | Path | None = None) -> Figure:
    """What judging came to, step by step: pairs judged and failed, cost, mean u, and judge time, hidden or waited for.

    Args:
        accounts: of at least one step.
        path: a .png to write.

    Raises:
        InputError: no step, or another ending.
        PlotsUnavailableError: matplotlib is not installed.
    """
    if not accounts.steps:
        reject("accounts", "no steps", "at least one")
    panels = (_draw_judged, _draw_cost, _draw_mean_u, _draw_judge_time)
    with plot_style():
        figure = new_figure((7.4, 9.2))
        axes = figure.subplots(len(panels), 1, sharex=True)
        for draw, ax in zip(panels, axes, strict=True):
            draw(ax, accounts)
            ax.set_ylim(bottom=0 if draw is not _draw_mean_u else None)
            if len(ax.get_legend_handles_labels()[1]) > 1:
                ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        numbers = [figures.step for figures in accounts.steps]  # a resumed run may go back some steps
        axes[-1].set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
        figure.align_ylabels(axes)
    return save_figure(figure, path) if path is not None else figure


# -- panels of a router ------------------------------------------------------------------------------------------------


def _draw_drift(ax: Axes, history: Sequence[StepRecord]) -> None:
    steps = [record.step for record in history]
    low, median, high = (series(history, name) for name in ("u_p10", "u_p50", "u_p90"))
    ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="10–90% of pairs")
    ax.plot(steps, median, color=COLOURS[0], marker=marker(history), label="median u")
    if history[0].by == "u":
        threshold = series(history, "threshold")
        ax.plot(steps, threshold, color=COLOURS[1], linestyle=DASHES[1], marker=marker(history), label="threshold")
    ends = median[np.isfinite(median)]
    fact = f"Median u: {ends[0]:.3g} → {ends[-1]:.3g}" if len(ends) else "No pair with a finite u"
    width = (high - low)[np.isfinite(high - low)]
    if len(width) and width[0] > 0:
        moved = (ends[-1] - ends[0]) / width[0]
        fact += f", {moved:+.1f} times the first step's 10–90% range"
    ax.set_title(fact, loc="left")
    ax.set_ylabel("uncertainty u")


def _draw_routed(ax: Axes, history: Sequence[StepRecord]) -> None:
    steps = [record.step for record in history]
    fraction = 100 * series(history, "fraction")
    ax.plot(steps, fraction, color=COLOURS[1], marker=marker(history), label="routed")
    ax.plot(steps, 100 * series(history, "target"), label="target", **BASELINE)
    fixed = 100 * series(history, "fixed_fraction")
    if np.isfinite(fixed).any():
        look = {"color": COLOURS[2], "linestyle": DASHES[2], "linewidth": 1.4}
        ax.plot(steps, fixed, marker=marker(history), label="a fixed threshold", **look)
    denied = np.array([100 * record.denied / record.pairs for record in history])
    if denied.any():
        ax.plot(steps, denied, color=COLOURS[3], linestyle=DASHES[3], marker=marker(history), label="denied by budget")
    pairs, routed = (sum(getattr(record, name) for record in history) for name in ("pairs", "routed"))
    wanted = sum((record.target or 0.0) * record.pairs for record in history)
    ax.set_title(
        f"{100 * routed / pairs:.1f}% of {pairs:,} pairs routed, target {100 * wanted / pairs:.1f}%", loc="left"
    )
    ax.set_ylim(-0.03 * ax.get_ylim()[1], min(ax.get_ylim()[1], 103.0))
    ax.set_ylabel("pairs, %")


def _draw_spend(ax: Axes, history: Sequence[StepRecord], budget: str) -> None:
    spend = np.array([record.spend.get(budget, 0.0) for record in history])
    ax.bar([record.step for record in history], spend, color=COLOURS[5], width=0.8)
    unit = budget.partition(" ")[0]
    total, most = (f"{value:,.2f}" if unit == "cost" else f"{value:,.0f}" for value in (spend.sum(), spend.max()))
    ax.set_title(f"Budget of {budget}: {total} spent, at most {most} in a step", loc="left")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value / 1e6:,.6g} M")
    ax.set_ylabel(f"{unit} in a step")


# -- panels of a bill --------------------------------------------------------------------------------------------------


def _draw_judged(ax: Axes, accounts: Accounts) -> None:
    steps, pairs, routed, failed = (series(accounts.steps, name) for name in ("step", "pairs", "routed", "failed"))
    share = 100 / np.maximum(pairs, 1)
    ax.plot(steps, routed * share, color=COLOURS[0], marker=marker(accounts.steps), label="sent to the judge")
    if failed.any():
        look: dict[str, Any] = {"color": COLOURS[1], "linestyle": DASHES[1], "marker": marker(accounts.steps)}
        ax.plot(steps, failed * share, label="without a verdict", **look)
    rates = [f"{100 * n.sum() / max(pairs.sum(), 1):.3g}%" for n in (routed, failed)]
    ax.set_title(f"{rates[0]} of {pairs.sum():,.0f} pairs judged, {rates[1]} failed", loc="left")
    ax.set_ylabel("pairs, %")


def _draw_cost(ax: Axes, accounts: Accounts) -> None:
    cost, tokens = series(accounts.steps, "cost"), series(accounts.steps, "tokens")
    usage = accounts.totals()["judge_usage"]
    priced = usage["cost"] is not None
    shown = cost if priced else tokens
    ax.plot(series(accounts.steps, "step"), shown, color=COLOURS[2], marker=marker(accounts.steps))
    fact = f"{tokens.sum():,.0f} tokens"
    fact += f", cost {usage['cost']:,.4g}" if priced else ", cost unknown"
    if usage["unpriced_calls"]:
        fact += f" ({usage['unpriced_calls']:,} of {usage['calls']:,} calls have no price)"
    ax.set_title(fact, loc="left")
    ax.set_ylabel("cost of a step" if priced else "tokens of a step")


def _draw_mean_u(ax: Axes, accounts: Accounts) -> None:
    u = series(accounts.steps, "uncertainty")
    ax.plot(series(accounts.steps, "step"), u, color=COLOURS[3], marker=marker(accounts.steps))
    ends = u[np.isfinite(u)]
    ax.set_title(f"Mean u: {ends[0]:.3g} → {ends[-1]:.3g}" if len(ends) else "No pair with a finite u", loc="left")
    ax.set_ylabel("mean uncertainty u")


def _draw_judge_time(ax: Axes, accounts: Accounts) -> None:
    steps, judge, hidden = (series(accounts.steps, name) for name in ("step", "judge_s", "hidden_s"))
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    for low, high, colour, label in (
        (np.zeros_like(hidden), hidden, COLOURS[5], "hidden"),
        (hidden, judge, COLOURS[4], "waited for"),
    ):
        area: dict[str, Any] = {"color": colour, "linewidth": 0, "label": label, "step": "post"}
        ax.fill_between(edges, np.append(low, low[-1]), np.append(high, high[-1]), **area)
    fact = "No judge time" if not judge.sum() else f"{100 * hidden.sum() / judge.sum():.0f}% of judge time hidden"
    ax.set_title(f"{fact} behind the backbone, {(judge - hidden).sum():,.3g} s waited for in all", loc="left")
    ax.set_ylabel("judge time of a step, s")
