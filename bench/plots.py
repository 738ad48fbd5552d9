"""Plots of benchmark rows: latency against batch size with the machine's limit, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmcore.evaluation.plots.figure import new_figure

from .encode import draw_encode
from .setup import Row

__all__ = ["draw"]

_DTYPES = {"float32": "0.45", "bfloat16": "#0072B2", "float16": "#56B4E9", "int8": "#009E73"}
_OTHERS = ("#D55E00", "#CC79A7", "#E69F00", "#8C564B")


def draw(rows: list[Row], document: dict[str, Any], out: Path) -> list[Path]:
    """``OUT-score-HxD.png`` for each size, ``OUT-memory.png``, ``OUT-encode.png``; none where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    paths = []
    timed = [row for row in rows if row["suite"] == "score" and "median_s" in row]
    for h, d in dict.fromkeys((row["h"], row["d"]) for row in timed):
        path = out.with_name(f"{out.name}-score-{h}x{d}.png")
        _latency([row for row in timed if (row["h"], row["d"]) == (h, d)], document, path, f"h = {h}, D = {d}")
        paths.append(path)
    memory = [row for row in rows if row["suite"] == "memory"]
    if memory:
        path = out.with_name(f"{out.name}-memory.png")
        _memory(memory, path)
        paths.append(path)
    encoded = [row for row in rows if row["suite"] == "encode"]
    if encoded:
        path = out.with_name(out.name + ("" if out.name.startswith("encode") else "-encode") + ".png")
        _encode(encoded, document, path)
        paths.append(path)
    return paths


def _latency(rows: list[Row], document: dict[str, Any], path: Path, size: str) -> None:
    figure = new_figure((9, 5.4))
    axis = figure.subplots()
    own_torch = ("rmcore torch",)  # our fallback is no peer, and three more lines of it hide those that are
    names = [n for n in dict.fromkeys((row["variant"], row["dtype"]) for row in rows) if n[0] not in own_torch]
    names.sort(key=lambda n: not n[0].startswith("rmcore"))
    others = iter(_OTHERS * 3)
    for name, dtype in names:
        points = sorted((r["rows"], 1e3 * r["median_s"]) for r in rows if (r["variant"], r["dtype"]) == (name, dtype))
        mine = name.startswith("rmcore")
        by_dtype = mine or name.startswith("torch")  # a colour for each dtype, a style for each kind of variant
        axis.plot(
            *zip(*points, strict=True),
            marker="o" if mine else "s" if "dense" in name else "^",
            markersize=4,
            linewidth=2.4 if mine else 1.2,
            linestyle="-" if mine else ":" if "compile" in name else "--",
            color=_DTYPES[dtype] if by_dtype else next(others),
            label=f"{name} {dtype}" if mine else name,
        )
    for name, dtype in names:
        if name == names[0][0]:
            points = sorted(
                (r["rows"], 1e3 * r["floor_s"]) for r in rows if (r["variant"], r["dtype"]) == (name, dtype)
            )
            axis.plot(*zip(*points, strict=True), color=_DTYPES[dtype], linewidth=0.8, label=f"limit, {dtype}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("rows B")
    axis.set_ylabel("ms per call, weights cold")
    axis.set_title(f"score, {size}, {document['environment']['name']}", fontsize=10)
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _memory(rows: list[Row], path: Path) -> None:
    figure = new_figure((8, 0.45 * len(rows) + 1.2))
    axis = figure.subplots()
    labels = [
        f"{row['variant']} {row['dtype']}" if row["variant"].startswith("rmcore") else row["variant"] for row in rows
    ]
    axis.barh(labels, [row["bytes"] / 1e6 for row in rows], color="#0072B2", label="weights")
    repacked = [row.get("repacked_bytes", 0) / 1e6 for row in rows]
    axis.barh(labels, repacked, left=[row["bytes"] / 1e6 for row in rows], color="#56B4E9", label="re-packed copy")
    axis.invert_yaxis()
    axis.set_xlabel("MB kept for scoring")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _encode(rows: list[Row], document: dict[str, Any], path: Path) -> None:
    count = len({row["lengths"] for row in rows})
    figure = new_figure((5.2 * count, 4.2))
    axes = figure.subplots(1, count, squeeze=False)[0]
    draw_encode(rows, axes)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['dtype']}, {document['environment']['name']}", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
