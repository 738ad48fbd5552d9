"""The figures of an evaluation: accuracy against the share judged, reliability, risk against coverage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmcore._base.errors import reject
from rmcore.evaluation.plots.figure import (
    BASELINE,
    COLOURS,
    DASHES,
    MUTED,
    new_figure,
    percent_axis,
    plot_style,
    save_figure,
)
from rmcore.evaluation.report import EvaluationReport, ScoreReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_accuracy_cost",
    "plot_reliability",
    "plot_report",
    "plot_risk_coverage",
    "plot_uplift",
]

SHARES = np.linspace(0.0, 1.0, 51)  # where curves are drawn; the exact one has a step per pair and hides its dashes


def plot_accuracy_cost(
    report: EvaluationReport, path: str | Path | None = None, *, scores: Sequence[str] | None = None
) -> Figure:
    """Accuracy of head + judge against the share of pairs judged, with random routing as a straight line."""
    return _single(report, path, _draw_accuracy_cost, _chosen(report, scores))


def plot_uplift(
    report: EvaluationReport, path: str | Path | None = None, *, scores: Sequence[str] | None = None
) -> Figure:
    """The same curves less the random line, in points: where routing differs, magnified."""
    return _single(report, path, _draw_uplift, _chosen(report, scores))


def plot_reliability(report: EvaluationReport, path: str | Path | None = None) -> Figure:
    """Accuracy against confidence with Wilson bounds and the number of pairs in each bin."""
    with plot_style():
        figure = new_figure((4.8, 4.2))
        _draw_reliability(figure.subplots(), report)
    return save_figure(figure, path) if path is not None else figure


def plot_risk_coverage(
    report: EvaluationReport, path: str | Path | None = None, *, scores: Sequence[str] | None = None
) -> Figure:
    """Error rate of the head alone on the pairs it keeps, when those with the highest score are withheld."""
    return _single(report, path, _draw_risk_coverage, _chosen(report, scores))


def plot_report(
    report: EvaluationReport, path: str | Path | None = None, *, scores: Sequence[str] | None = None
) -> Figure:
    """All four in one figure, with one legend for the scores."""
    chosen = _chosen(report, scores)
    with plot_style():
        figure = new_figure((10.6, 8.2))
        axes = figure.subplots(2, 2)
        _draw_accuracy_cost(axes[0, 0], report, chosen)
        _draw_uplift(axes[0, 1], report, chosen)
        _draw_reliability(axes[1, 0], report)
        _draw_risk_coverage(axes[1, 1], report, chosen)
        for letter, ax in zip("abcd", axes.flat, strict=True):
            ax.set_title(f"({letter})  {ax.get_title(loc='left')}", loc="left")
        _legend(figure, axes[0, 0])
    return save_figure(figure, path) if path is not None else figure


def _single(
    report: EvaluationReport, path: str | Path | None, draw: Callable[..., None], chosen: list[ScoreReport]
) -> Figure:
    with plot_style():
        figure = new_figure((5.4, 4.5))
        ax = figure.subplots()
        draw(ax, report, chosen)
        _legend(figure, ax)
    return save_figure(figure, path) if path is not None else figure


def _chosen(report: EvaluationReport, names: Sequence[str] | None) -> list[ScoreReport]:
    """The asked scores; by default as many as there are colours, without random, which is drawn as a line."""
    if names is None:
        names = [entry.name for entry in report.scores if entry.name != "random"][: len(COLOURS)]
    if not 1 <= len(names) <= len(COLOURS):
        reject("scores", f"{len(names)} names", f"1 to {len(COLOURS)}, one colour each")
    return [report.score(name) for name in names]


# -- panels ------------------------------------------------------------------------------------------------------------


def _draw_accuracy_cost(ax: Axes, report: EvaluationReport, chosen: list[ScoreReport]) -> None:
    for entry, look in _looks(chosen):
        ax.plot(100 * SHARES, 100 * entry.curve.at(SHARES), label=_label(entry.name), **look)
    grid = [step.fraction for step in chosen[0].band]
    random_line = 100 * chosen[0].curve.at(grid) - np.array([step.point for step in chosen[0].band])
    _shade(ax, report, chosen[0], random_line)
    ax.plot((0, 100), 100 * chosen[0].curve.at((0, 1)), label="random routing", **BASELINE)
    step = chosen[0].uplift[len(chosen[0].uplift) // 2]
    before, after = 100 * report.accuracy.point, 100 * float(chosen[0].curve.at([step.fraction])[0])
    fact = f"{100 * step.fraction:g}% judged by {_label(chosen[0].name)}: accuracy {before:.1f} → {after:.1f}%"
    ax.set_title(fact, loc="left")
    percent_axis(ax, "pairs judged, %")
    low, high = ax.get_ylim()
    ax.set_ylim(low, min(high, 101.0))
    ax.set_ylabel("accuracy of head + judge, %")


def _draw_uplift(ax: Axes, report: EvaluationReport, chosen: list[ScoreReport]) -> None:
    for entry, look in _looks(chosen):
        start, end = entry.curve.at((0, 1))
        uplift = entry.curve.at(SHARES) - (start + SHARES * (end - start))
        ax.plot(100 * SHARES, 100 * uplift, label=_label(entry.name), **look)
    _shade(ax, report, chosen[0], np.zeros(len(chosen[0].band)))
    ax.axhline(0, label="random routing", **BASELINE)
    # A fixed budget, not the curve's peak: the best of many points would flatter every score.
    step = chosen[0].uplift[len(chosen[0].uplift) // 2]
    interval = f" [{step.low:+.1f}, {step.high:+.1f}]" if np.isfinite(step.low) else ""
    fact = f"{100 * step.fraction:g}% judged by {_label(chosen[0].name)}: {step.point:+.1f}{interval} points"
    ax.set_title(fact, loc="left")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -1.0), max(high, 1.0))  # differences far below a point stay visibly small
    percent_axis(ax, "pairs judged, %")
    ax.set_ylabel("points over random routing")


def _draw_reliability(ax: Axes, report: EvaluationReport) -> None:
    bins = report.reliability
    x, y = 100 * bins.confidence, 100 * bins.accuracy
    ax.plot((50, 100), (50, 100), **BASELINE)
    ax.text(99, 101, "perfectly calibrated", ha="right", va="bottom", fontsize=8, color=MUTED)
    ax.vlines(x, 100 * bins.low, 100 * bins.high, color=COLOURS[0], linewidth=1.2, alpha=0.6)
    ax.plot(x, y, "o-", color=COLOURS[0], markersize=4.5, linewidth=1.2)
    floor = min(50.0, float(100 * bins.low.min()))
    ax.set_xlim(48.5, 101.5)
    ax.set_ylim(floor - 13, 107)
    if bins.count.max() - bins.count.min() <= 1:
        note = f"pairs in each bin: {bins.count.max()}"
        ax.text(49.5, floor - 11, note, va="bottom", fontsize=8, color=MUTED)
    else:
        for at, count in zip(x, bins.count, strict=True):
            ax.text(at, floor - 12, f"{count}", ha="center", va="bottom", fontsize=7, color=MUTED, rotation=90)
    gap = 100 * float(np.average(bins.confidence - bins.accuracy, weights=bins.count))
    fact = f"{'over' if gap > 0 else 'under'}confident by {abs(gap):.1f} points"
    if abs(gap) < 0.05:
        fact = "as confident as it is accurate, on average"
    ax.set_title(f"The head is {fact} (ECE {report.ece_equal_mass:.3f})", loc="left")
    ax.set_xlabel("confidence, %")
    ax.set_ylabel(f"accuracy, % (bars: {100 * report.level:g}% intervals)")


def _draw_risk_coverage(ax: Axes, report: EvaluationReport, chosen: list[ScoreReport]) -> None:
    for entry, look in _looks(chosen):
        curve = entry.risk_coverage
        # Below 5% a handful of pairs makes the rate, and its jumps would set the axis.
        share = np.unique(np.clip(SHARES[SHARES >= 0.05], curve.coverage[0], 1.0))
        ax.plot(100 * share, 100 * np.interp(share, curve.coverage, curve.risk), label=_label(entry.name), **look)
    first = chosen[0].risk_coverage
    everything, half = 100 * first.risk[-1], 100 * float(np.interp(0.5, first.coverage, first.risk))
    ax.axhline(everything, label="random routing", **BASELINE)
    name = _label(chosen[0].name)
    ax.set_title(f"Half with lowest {name}: {half:.1f}% errors; all: {everything:.1f}%", loc="left")
    percent_axis(ax, "pairs the head answers, % (lowest score first)")
    low, high = ax.get_ylim()
    ax.set_ylim(max(0.0, low), max(high, 5.0))
    ax.set_ylabel("error rate among them, %")


def _shade(ax: Axes, report: EvaluationReport, entry: ScoreReport, line: Any) -> None:
    """The uplift's interval around ``line``: of the gain over random, without the noise all scores share."""
    low = np.array([step.low for step in entry.band])
    high = np.array([step.high for step in entry.band])
    if np.isfinite(low).all():
        grid = 100 * np.array([step.fraction for step in entry.band])
        label = f"{100 * report.level:g}% interval of its gain"
        ax.fill_between(grid, line + low, line + high, color=COLOURS[0], alpha=0.14, linewidth=0, zorder=2, label=label)


def _legend(figure: Figure, ax: Axes) -> None:
    # Outside the axes: the curves leave no corner that is empty for every data set. The band follows its line.
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (i > 0 and "interval" not in labels[i], i))
    # A column holds its longest label: 8 pt text is about 0.07 inches a letter, the line sample and gaps 0.7.
    columns = int(figure.get_figwidth() / (0.07 * max(map(len, labels)) + 0.7))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=min(max(columns, 1), 4),
    )


def _looks(chosen: list[ScoreReport]) -> list[tuple[ScoreReport, dict[str, Any]]]:
    looks = []
    for index, entry in enumerate(chosen):
        width = 2.2 if index == 0 else 1.4
        look = {"color": COLOURS[index], "linestyle": DASHES[index], "linewidth": width, "zorder": 5 - 0.1 * index}
        looks.append((entry, look))
    return looks


def _label(name: str) -> str:
    known = {
        "margin": "margin −|g|",
        "novelty": "novelty n",
        "rank_sum": "rank sum of u and margin",
        "u": "uncertainty u",
    }
    return known.get(name, name)
