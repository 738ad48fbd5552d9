"""What all figures have in common: how they look, an empty one, and a file of one.

matplotlib loads on first use and only through its Figure objects: no pyplot, so no global state, no display needed,
and no effect on a caller's own figures. Colours are Okabe & Ito's, told apart with every common colour blindness;
every line also has its own dash pattern, for print.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmcore._base.errors import RmcoreError, reject
from rmcore._base.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BASELINE",
    "COLOURS",
    "DASHES",
    "MUTED",
    "PlotsUnavailableError",
    "marker",
    "new_figure",
    "percent_axis",
    "plot_style",
    "save_figure",
    "series",
]

DPI = 150
INK, MUTED, FAINT = "#222222", "#767676", "#E4E4E4"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (7, 1.5, 1.5, 1.5)), (0, (1.2, 1.2)), (0, (3, 1, 1, 1, 1, 1)), "-.")
BASELINE: dict[str, Any] = {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (2, 2)), "zorder": 1}
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


def plot_style() -> Any:
    """The look of all figures, as a context."""
    return _matplotlib().rc_context(STYLE)


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of a size in inches that needs no display.

    Raises PlotsUnavailableError where matplotlib is not installed.
    """
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


def save_figure(figure: Figure, path: str | Path) -> Figure:
    """Write a PNG at 150 dpi, whole or not at all: readers never see half a file, a failure leaves the old one.

    Raises InputError for another ending than .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        reject("path", str(path), "a file name ending in .png")
    buffer = io.BytesIO()
    # No software version in the file: the same report gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return figure


def percent_axis(ax: Axes, label: str) -> None:
    """Make x run from 0 to 100 under a label."""
    ax.set_xlim(0, 100)
    ax.set_xlabel(label)


def series(history: Sequence[object], name: str) -> Any:
    """An attribute a step; NaN, which is not drawn, where there is none or it is infinite."""
    values = [getattr(record, name) for record in history]
    return np.array([value if value is not None and np.isfinite(value) else np.nan for value in values])


def marker(history: Sequence[object]) -> str | None:
    """A dot where a line has one point, and would be invisible."""
    return "o" if len(history) == 1 else None
