"""``python -m rmcore.bench.tables``: the tables of README.md and docs/ from the results files they name, and the plots.

A table to be filled stands right below a line ``<!-- bench/results/NAME.json -->``. Its rows are known by their labels
(:data:`LABELS`); rows without one, and everything else, stay as they are. Plots are drawn anew from the same files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .plots import draw
from .setup import Row

__all__ = ["LABELS", "fill"]

PAGES = ("README.md", "docs/kernels.md")
_MARK = re.compile(r"<!-- (bench/results/\S+\.json) -->")

_Variants = tuple[tuple[str, ...], ...]


def _torch(dtype: str) -> tuple[str, ...]:
    return (f"torch eager, folded {dtype}", f"torch.compile, folded {dtype}")


LABELS: dict[str, _Variants] = {
    "**rmcore cpu, int8**": (("rmcore cpu int8",),),
    "**rmcore cpu, bf16** (the default here)": (("rmcore cpu bfloat16",),),
    "rmcore cpu, bf16": (("rmcore cpu bfloat16",),),
    "rmcore cpu, fp16": (("rmcore cpu float16",),),
    "torch, three dense fp32 products": (("torch eager, dense fp32",),),
    "torch eager, three dense fp32 products": (("torch eager, dense fp32",),),
    "torch eager, folded fp32": (("torch eager, folded fp32",),),
    "torch, folded bf16 / folded int8, the better of eager and compiled": (_torch("bf16"), _torch("int8")),
    "torch, folded bf16, eager / compiled": tuple((name,) for name in _torch("bf16")),
    "torch, folded int8 (`_int_mm`), eager / compiled": tuple((name,) for name in _torch("int8")),
    "a linear solve per call (published code)": (("solve per call (published code)",),),
    "gpytorch `inv_quad` (iterative: v is 0.7–0.9% off)": (("gpytorch inv_quad",),),
    "laplace-torch (multiplies P⁻¹ out on every call)": (("laplace-torch",),),
}
"""Label of a row → for each figure of a cell, the variants whose best it is. Ours are named with their dtype."""


def fill(text: str, root: Path) -> str:
    """A page with the rows of its marked tables as the results files have them.

    Raises KeyError where a row has a label but the file no such variant.
    """
    return "\n".join(_filled(text.split("\n"), root))


def _filled(lines: list[str], root: Path) -> Iterator[str]:
    rows: list[Row] | None = None
    batches: list[int] = []
    for line in lines:
        if found := _MARK.fullmatch(line):
            rows = json.loads((root / found[1]).read_text(encoding="utf-8"))["rows"]
            batches = []
        elif rows is not None and not line.startswith("|"):
            rows = None
        elif rows is not None and not batches:
            batches = [int(cell.removeprefix("B = ")) for cell in _cells(line)[1:]]
        elif rows is not None and (label := _cells(line)[0]) in LABELS:
            figures = [" / ".join(_best(rows, names, b) for names in LABELS[label]) for b in batches]
            line = f"| {' | '.join([label, *figures])} |"
        yield line


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _best(rows: list[Row], names: tuple[str, ...], batch: int) -> str:
    mine = [row for row in rows if row["suite"] == "score" and row["rows"] == batch and _name(row) in names]
    if not mine:
        raise KeyError(f"no row of {' or '.join(names)} at B = {batch}")
    times = [1e3 * row["median_s"] for row in mine if "median_s" in row]
    return _milliseconds(min(times)) if times else "left out"


def _name(row: Row) -> str:
    return f"{row['variant']} {row['dtype']}" if row["variant"].startswith("rmcore") else str(row["variant"])


def _milliseconds(value: float) -> str:
    """Three figures, but no more than two behind the point."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def main() -> None:
    """Fill the pages and draw the plots of every file they name."""
    root = Path(__file__).resolve().parents[1]
    for page in PAGES:
        path = root / page
        text = path.read_text(encoding="utf-8")
        path.write_text(fill(text, root), encoding="utf-8")
        for name in dict.fromkeys(_MARK.findall(text)):
            document: dict[str, Any] = json.loads((root / name).read_text(encoding="utf-8"))
            draw(document["rows"], document, (root / name).with_suffix(""))


if __name__ == "__main__":
    main()
