"""The figures of an evaluation, a router's run and a judge's bill. Each returns a matplotlib Figure, saves if asked.

matplotlib loads on first use and only through its Figure objects: no pyplot, so no global state, no display needed,
and no effect on a caller's own figures. Colours are Okabe & Ito's, told apart with every common colour blindness;
every line also has its own dash pattern, for print.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmcore._base.errors import RmcoreError, reject
from rmcore._base.files import write_atomic
from rmcore.engine.accounts import Accounts
from rmcore.engine.routing.drift import StepRecord
from rmcore.evaluation.report import EvaluationReport, ScoreReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PlotsUnavailableError",
    "new_figure",
    "percent_axis",
    "plot_accounts",
    "plot_accuracy_cost",
    "plot_reliability",
    "plot_report",
    "plot_risk_coverage",
    "plot_routing",
    "plot_style",
    "plot_uplift",
    "save_figure",
]

DPI = 150
INK, MUTED, FAINT = "#222222", "#767676", "#E4E4E4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (7, 1.5, 1.5, 1.5)), (0, (1.2, 1.2)), (0, (3, 1, 1, 1, 1, 1)), "-.")
BASELINE: dict[str, Any] = {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (2, 2)), "zorder": 1}
SHARES = np.linspace(0.0, 1.0, 51)  # where curves are drawn; the exact one has a step per pair and hides its dashes
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.8,
}


class PlotsUnavailableError(RmcoreError, ImportError):
    """matplotlib is not installed."""


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


def plot_routing(history: Sequence[StepRecord], path: str | Path | None = None) -> Figure:
    """A router's run: u and the threshold that follows it, the share of pairs routed, what each budget spent.

    Args:
        history: of an :class:`~rmcore.engine.routing.adaptive.AdaptiveRouter`.
        path: a .png to write.
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


def save_figure(figure: Figure, path: str | Path) -> Figure:
    """Write a PNG at 150 dpi, whole or not at all: readers never see half a file, a failure leaves the old one."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        reject("path", str(path), "a file name ending in .png")
    buffer = io.BytesIO()
    # No software version in the file: the same report gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return figure


# ---------------------------------------------------------------------------------------- panels


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


def _draw_drift(ax: Axes, history: Sequence[StepRecord]) -> None:
    steps = [record.step for record in history]
    low, median, high = (_series(history, name) for name in ("u_p10", "u_p50", "u_p90"))
    ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="10–90% of pairs")
    ax.plot(steps, median, color=COLOURS[0], marker=_marker(history), label="median u")
    if history[0].by == "u":
        threshold = _series(history, "threshold")
        ax.plot(steps, threshold, color=COLOURS[1], linestyle=DASHES[1], marker=_marker(history), label="threshold")
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
    fraction = 100 * _series(history, "fraction")
    ax.plot(steps, fraction, color=COLOURS[1], marker=_marker(history), label="routed")
    ax.plot(steps, 100 * _series(history, "target"), label="target", **BASELINE)
    fixed = 100 * _series(history, "fixed_fraction")
    if np.isfinite(fixed).any():
        look = {"color": COLOURS[2], "linestyle": DASHES[2], "linewidth": 1.4}
        ax.plot(steps, fixed, marker=_marker(history), label="a fixed threshold", **look)
    denied = np.array([100 * record.denied / record.pairs for record in history])
    if denied.any():
        ax.plot(steps, denied, color=COLOURS[3], linestyle=DASHES[3], marker=_marker(history), label="denied by budget")
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


def _draw_judged(ax: Axes, accounts: Accounts) -> None:
    steps, pairs, routed, failed = (_series(accounts.steps, name) for name in ("step", "pairs", "routed", "failed"))
    share = 100 / np.maximum(pairs, 1)
    ax.plot(steps, routed * share, color=COLOURS[0], marker=_marker(accounts.steps), label="sent to the judge")
    if failed.any():
        look: dict[str, Any] = {"color": COLOURS[1], "linestyle": DASHES[1], "marker": _marker(accounts.steps)}
        ax.plot(steps, failed * share, label="without a verdict", **look)
    rates = [f"{100 * n.sum() / max(pairs.sum(), 1):.3g}%" for n in (routed, failed)]
    ax.set_title(f"{rates[0]} of {pairs.sum():,.0f} pairs judged, {rates[1]} failed", loc="left")
    ax.set_ylabel("pairs, %")


def _draw_cost(ax: Axes, accounts: Accounts) -> None:
    cost, tokens = _series(accounts.steps, "cost"), _series(accounts.steps, "tokens")
    usage = accounts.totals()["judge_usage"]
    priced = usage["cost"] is not None
    shown = cost if priced else tokens
    ax.plot(_series(accounts.steps, "step"), shown, color=COLOURS[2], marker=_marker(accounts.steps))
    fact = f"{tokens.sum():,.0f} tokens"
    fact += f", cost {usage['cost']:,.4g}" if priced else ", cost unknown"
    if usage["unpriced_calls"]:
        fact += f" ({usage['unpriced_calls']:,} of {usage['calls']:,} calls have no price)"
    ax.set_title(fact, loc="left")
    ax.set_ylabel("cost of a step" if priced else "tokens of a step")


def _draw_mean_u(ax: Axes, accounts: Accounts) -> None:
    u = _series(accounts.steps, "uncertainty")
    ax.plot(_series(accounts.steps, "step"), u, color=COLOURS[3], marker=_marker(accounts.steps))
    ends = u[np.isfinite(u)]
    ax.set_title(f"Mean u: {ends[0]:.3g} → {ends[-1]:.3g}" if len(ends) else "No pair with a finite u", loc="left")
    ax.set_ylabel("mean uncertainty u")


def _draw_judge_time(ax: Axes, accounts: Accounts) -> None:
    steps, judge, hidden = (_series(accounts.steps, name) for name in ("step", "judge_s", "hidden_s"))
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


# ---------------------------------------------------------------------------------------- helpers


def _single(
    report: EvaluationReport, path: str | Path | None, draw: Callable[..., None], chosen: list[ScoreReport]
) -> Figure:
    with plot_style():
        figure = new_figure((5.4, 4.5))
        ax = figure.subplots()
        draw(ax, report, chosen)
        _legend(figure, ax)
    return save_figure(figure, path) if path is not None else figure


def plot_style() -> Any:
    """The look of all figures, as a context."""
    return _matplotlib().rc_context(STYLE)


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of a size in inches that needs no display."""
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise PlotsUnavailableError("plots need matplotlib; install it with: pip install 'rmcore[plots]'") from error
    return matplotlib


def _chosen(report: EvaluationReport, names: Sequence[str] | None) -> list[ScoreReport]:
    """The asked scores; by default as many as there are colours, without random, which is drawn as a line."""
    if names is None:
        names = [entry.name for entry in report.scores if entry.name != "random"][: len(COLOURS)]
    if not 1 <= len(names) <= len(COLOURS):
        reject("scores", f"{len(names)} names", f"1 to {len(COLOURS)}, one colour each")
    return [report.score(name) for name in names]


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


def _series(history: Sequence[object], name: str) -> Any:
    """An attribute a step; NaN, which is not drawn, where there is none or it is infinite."""
    values = [getattr(record, name) for record in history]
    return np.array([value if value is not None and np.isfinite(value) else np.nan for value in values])


def _marker(history: Sequence[object]) -> str | None:
    return "o" if len(history) == 1 else None  # a line through one point is invisible


def percent_axis(ax: Axes, label: str) -> None:
    """Make x run from 0 to 100 under a label."""
    ax.set_xlim(0, 100)
    ax.set_xlabel(label)
