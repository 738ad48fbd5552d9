"""The curves of a run's reward: share routed, u, and judge against head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.plots.figure import COLOURS, DASHES, new_figure, plot_style, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MONITOR_PREFIX", "plot_monitor"]

MONITOR_PREFIX: Final = "rmcore/"


def plot_monitor(rows: Sequence[Mapping[str, float]], path: str | Path | None = None) -> Figure:
    """Three panels over the steps.

    Args:
        rows: each with ``step`` and what a reward logs under ``rmcore/…``; what a row lacks is a gap.
        path: a .png to write.

    Raises:
        InputError: there are no rows.
        PlotsUnavailableError: matplotlib is not installed.
    """
    if not rows:
        reject("rows", "none", "at least one")
    steps = np.array([row["step"] for row in rows])
    series = {
        name: np.array([row.get(MONITOR_PREFIX + name, np.nan) for row in rows], dtype=float)
        for name in sorted({name.removeprefix(MONITOR_PREFIX) for row in rows for name in row} - {"step"} | _NAMES)
    }
    with plot_style():
        figure = new_figure((7.4, 7.2))
        axes = figure.subplots(3, 1, sharex=True)
        for ax, draw in zip(axes, (_draw_routed, _draw_u, _draw_agreement), strict=True):
            draw(ax, steps, series)
            if len(ax.get_legend_handles_labels()[1]) > 1:
                ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.align_ylabels(axes)
    return save_figure(figure, path) if path is not None else figure


_NAMES: Final = {"judge_rate", "uncertainty_p50", "uncertainty_p90", "uncertainty_p99", "judged"} | {
    "judge_disagreement",
    "judge_disagreement_expected",
}


def _look(k: int, steps: Any) -> dict[str, Any]:
    return {"color": COLOURS[k], "linestyle": DASHES[k], "marker": "o" if len(steps) == 1 else None}


def _draw_routed(ax: Axes, steps: Any, series: Mapping[str, Any]) -> None:
    ax.plot(steps, 100 * series["judge_rate"], **_look(0, steps))
    ax.set_ylabel("pairs routed, %")
    ax.set_title("Share of pairs sent to the judge", loc="left")
    ax.set_ylim(bottom=0)


def _draw_u(ax: Axes, steps: Any, series: Mapping[str, Any]) -> None:
    for k, level in enumerate(("p50", "p90", "p99")):
        ax.plot(steps, series[f"uncertainty_{level}"], label=level, **_look(k, steps))
    ax.set_ylabel("uncertainty u")
    ax.set_title("Quantiles of u", loc="left")


def _draw_agreement(ax: Axes, steps: Any, series: Mapping[str, Any]) -> None:
    judged = np.where(series["judged"] > 0, series["judged"], np.nan)  # no verdict: a gap, not an agreement
    for k, (name, label) in enumerate((("judge_disagreement", "seen"), ("judge_disagreement_expected", "expected"))):
        ax.plot(steps, 100 * series[name] / judged, label=label, **_look(k, steps))
    ax.set_ylabel("judge against head, %")
    ax.set_title("Verdicts against the head; expected of a calibrated head and a judge without errors", loc="left")
    ax.set_ylim(bottom=0)
