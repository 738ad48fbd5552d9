"""A routing table as the papers draw it: score against the share of pairs judged, routed and at random."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from rmcore.evaluation.benchmarks.routing_table import RoutingTable
from rmcore.evaluation.benchmarks.table import Table
from rmcore.evaluation.plots.figure import BASELINE, COLOURS, new_figure, percent_axis, plot_style, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_routing_table", "plot_table"]

COLUMNS = 4
MARKERS = "os^Dv<>"  # hollow, so that curves on one another can be told apart


def plot_routing_table(table: RoutingTable, path: str | Path | None = None) -> Figure:
    """A panel for each score, sorted by calls; the bar at each point is the interval of routed − random.

    Args:
        table: with at least one score.
        path: a .png to write.
    """
    rows = sorted(table.rows, key=lambda row: row.calls)
    share = [100 * row.share for row in rows]
    count = len(rows[0].scores)
    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    with plot_style():
        figure = new_figure((3.0 * columns + 0.4, 2.5 * lines + 0.5))
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for k, ax in enumerate(axes):
            if k >= count:
                ax.set_visible(False)
                continue
            scores = [row.scores[k] for row in rows]
            ax.plot(share, [100 * score.random for score in scores], label="random routing", **BASELINE)
            ax.plot(
                share, [100 * s.routed for s in scores], "o-", color=COLOURS[0], markersize=3.5, label=f"by {table.by}"
            )
            low, high = ([100 * (s.random + getattr(s, bound)) for s in scores] for bound in ("low", "high"))
            ax.vlines(share, low, high, color=COLOURS[0], linewidth=1.2, alpha=0.5)
            ax.set_title(scores[0].name, loc="left")
            percent_axis(ax, "pairs judged, %")
            ax.set_ylabel("score, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(f"{table.title}. The judge is {table.judge}", fontsize=9)
    return save_figure(figure, path) if path is not None else figure


def plot_table(table: Table, path: str | Path | None = None) -> Figure:
    """A table's curves in one panel, their names beside it.

    Shares are in percent, n of "best of n" stays a number; ``random`` is dashed.

    Args:
        table: with at least one curve.
        path: a .png to write.
    """
    shares = table.axes[0].endswith("%") or "%" in table.axes[0]
    with plot_style():
        figure = new_figure((6.2, 3.4))
        ax = figure.subplots()
        styles = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
        for curve in table.curves:
            x = [100 * value for value in curve.x] if shares else curve.x
            y = [100 * value for value in curve.y]
            if curve.name == "random":
                ax.plot(x, y, label="random", **BASELINE)
            else:
                colour, marker = next(styles)
                ax.plot(x, y, f"{marker}-", markersize=4, fillstyle="none", color=colour, label=curve.name)
        if not shares:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel(table.axes[0])
        ax.set_ylabel(f"{table.axes[1]}, %")
        ax.set_title(table.title, loc="left", fontsize=9)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return save_figure(figure, path) if path is not None else figure
