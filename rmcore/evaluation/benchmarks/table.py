"""A table of figures in four forms: Markdown, LaTeX, CSV, JSON; and the plot that some of them have."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from rmcore.evaluation.benchmarks.report import number, percent, points

__all__ = ["Cell", "Column", "Curve", "Table", "csv_value", "markdown_line", "tex"]

Form: TypeAlias = Literal["text", "percent", "points", "count", "number", "cost"]


@dataclass(frozen=True)
class Cell:
    """A figure with its interval; ``low`` and ``high`` are NaN where none can be had."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: its name in CSV and JSON.
        title: what stands over it.
        form: ``percent`` and ``points`` are shares, shown times 100; ``cost`` has three digits and an exponent.
    """

    key: str
    title: str
    form: Form


@dataclass(frozen=True)
class Curve:
    """What a plot draws: a line by (x, y) shares, in the order of x."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """Rows of text, numbers and figures with intervals.

    Attributes:
        name: of its files.
        title: over it.
        columns: of every row.
        rows: a value a column: text, a number (NaN: none), or a :class:`Cell`.
        notes: sentences under it, what was assumed among them.
        curves: of its plot; none for a table without one.
        axes: what the plot's x and y are.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | float | Cell, ...], ...]
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    axes: tuple[str, str] = ("", "")

    def to_markdown(self) -> str:
        """A heading, the table, the notes."""
        lines = [markdown_line([column.title for column in self.columns])]
        lines.append("|" + "|".join("---" if column.form == "text" else "---:" for column in self.columns) + "|")
        lines += [markdown_line(self._shown(row)) for row in self.rows]
        notes = "".join(f"{note}.\n" for note in self.notes)
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n" + (f"\n{notes}" if notes else "")

    def to_latex(self) -> str:
        """A ``tabular`` for booktabs."""
        kinds = "".join("l" if column.form == "text" else "r" for column in self.columns)
        lines = [f"% {tex(self.title)}", *(f"% {tex(note)}" for note in self.notes), rf"\begin{{tabular}}{{{kinds}}}"]
        lines += [r"\toprule", " & ".join(tex(column.title) for column in self.columns) + r" \\", r"\midrule"]
        lines += [" & ".join(map(tex, self._shown(row))) + r" \\" for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def to_csv(self) -> str:
        """A line a row; a figure with an interval has three columns, an empty field is no number."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        wide = [any(isinstance(row[k], Cell) for row in self.rows) for k in range(len(self.columns))]
        names = []
        for column, bounded in zip(self.columns, wide, strict=True):
            names += [column.key, f"{column.key}_low", f"{column.key}_high"] if bounded else [column.key]
        writer.writerow(names)
        for row in self.rows:
            fields: list[str] = []
            for value, bounded in zip(row, wide, strict=True):
                if isinstance(value, Cell):
                    fields += [csv_value(value.value), csv_value(value.low), csv_value(value.high)]
                else:
                    own = value if isinstance(value, str) else csv_value(value)
                    fields += [own, "", ""] if bounded else [own]
            writer.writerow(fields)
        return stream.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN and Inf are None."""
        rows = []
        for row in self.rows:
            own: dict[str, Any] = {}
            for column, value in zip(self.columns, row, strict=True):
                if isinstance(value, Cell):
                    bounds = {"low": number(value.low), "high": number(value.high)}
                    own[column.key] = {"value": number(value.value)} | bounds
                else:
                    own[column.key] = value if isinstance(value, str) else number(value)
            rows.append(own)
        return {"name": self.name, "title": self.title, "rows": rows, "notes": list(self.notes)}

    def _shown(self, row: tuple[str | float | Cell, ...]) -> list[str]:
        return [_shown(value, column.form) for value, column in zip(row, self.columns, strict=True)]


def _shown(value: str | float | Cell, form: Form) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Cell):
        point = _shown(value.value, form)
        bounds = "" if math.isnan(value.low) else f" [{_shown(value.low, form)}, {_shown(value.high, form)}]"
        return point + bounds
    if not math.isfinite(value):
        return "-"
    if form == "percent":
        return percent(value)
    if form == "points":
        return points(value)
    return {"count": f"{value:,.0f}", "cost": f"{value:.3g}"}.get(form, f"{value:.3f}")


def markdown_line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def csv_value(value: float) -> str:
    """A number for CSV, an empty field for NaN and Inf."""
    return repr(float(value)) if math.isfinite(value) else ""


_TEX = {
    **{c: rf"\{c}" for c in "&%_#${}"},
    ">": r"$>$",
    "<": r"$<$",
    "−": "$-$",
    "·": r"$\cdot$",
    "λ": r"$\lambda$",
    "≤": r"$\leq$",
    "½": r"$\frac{1}{2}$",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def tex(text: str) -> str:
    """Text for LaTeX."""
    return "".join(_TEX.get(c, c) for c in text)
