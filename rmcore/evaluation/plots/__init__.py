"""The figures of an evaluation, of a run and a judge's bill. Each returns a matplotlib Figure, saves if asked.

``path`` is a .png to write; ``scores`` names those to draw, at most six. InputError is raised for another ending, and
for a score that the report does not have; PlotsUnavailableError where matplotlib is not installed.
"""

from __future__ import annotations

from rmcore.evaluation.plots.figure import PlotsUnavailableError, new_figure, percent_axis, plot_style, save_figure
from rmcore.evaluation.plots.monitor import plot_monitor
from rmcore.evaluation.plots.report import (
    plot_accuracy_cost,
    plot_reliability,
    plot_report,
    plot_risk_coverage,
    plot_uplift,
)
from rmcore.evaluation.plots.run import plot_accounts, plot_routing

__all__ = [
    "PlotsUnavailableError",
    "new_figure",
    "percent_axis",
    "plot_accounts",
    "plot_accuracy_cost",
    "plot_monitor",
    "plot_reliability",
    "plot_report",
    "plot_risk_coverage",
    "plot_routing",
    "plot_style",
    "plot_uplift",
    "save_figure",
]
