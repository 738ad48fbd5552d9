"""What a person reads of a run on the GPU machine, and what of it is filed: by card, and which kernels proved right.

Of the standard library alone, like all of :mod:`bench.gpu_check`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .gpu_build import ROOT

__all__ = ["LIMITS", "choices", "findings", "read_rows", "report", "update_proven"]

OPS = (
    "score", "score_int8", "score_mid", "accumulate", "pair_variance", "power_iteration", "score_attributes",
    "score_persistent", "score_specialized", "accumulate_persistent", "accumulate_specialized",
)  # fmt: skip
LIMITS = {"err_g": 0.02, "err_v": 0.05, "err": 0.01, "err_diagonal": 0.02}
"""16-bit products of a thousand terms are right to a few thousandths; a wrong kernel is wrong by far more."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; a last line that was being written when the process was killed is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def report(path: Path, results: Path | None, table: Path | None = None) -> int:
    """Print the rows as a table; with ``results`` write ``gpu-<card>.json`` there and update ``table``."""
    rows = read_rows(path)
    shown = (
        "us",
        "GBs",
        "TFLOPs",
        "eager_host_us",
        "host_us",
        "err_g",
        "err_v",
        "err",
        "bits_repeat",
        "declined",
        "failed",
    )
    for row in rows:
        if "case" in row:
            figures = " ".join(
                f"{name}={row[name]:.3g}" if isinstance(row[name], float) else f"{name}={str(row[name])[:80]}"
                for name in shown
                if name in row
            )
            print(f"{row['size']:5} {row['dtype']:8} {row['case'][:36]:36} B={row.get('rows', '-')!s:>6} {figures}")
    for row in rows:
        if "rc" in row or "skipped" in row:
            print(f"{row['step']:14} " + (f"rc={row['rc']} {row['seconds']} s" if "rc" in row else row["skipped"]))
    print("\n".join(choices(rows)))
    if results is None:
        return 0
    environment = next((row for row in rows if row.get("case") == "environment" and "name" in row), None)
    if environment is None:
        print(f"{path}: no environment row, so nobody knows which card these are of", file=sys.stderr)
        return 1
    card = "".join(c if c.isalnum() else "-" for c in environment["name"].lower()).strip("-")
    target = results / f"gpu-{card}.json"
    earlier = _not_repeated(target, rows)
    target.write_text(json.dumps({"environment": environment, "rows": rows, "earlier": earlier}, indent=1) + "\n")
    print(target)
    update_proven(table or ROOT / "rmcore" / "ops" / "proven.json", environment, rows)
    return 0


def _not_repeated(file: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What earlier runs on the card measured and this one did not, each row with its own date and commit."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in ("step", "case", "size", "dtype", "rows", "k", "shape"))

    if not file.is_file():
        return []
    known, again = json.loads(file.read_text(encoding="utf-8")), {key(row) for row in rows}
    of = {name: known["environment"][name] for name in ("date", "commit")}
    before = [of | row for row in known["rows"] if "case" in row] + known.get("earlier", [])
    return [row for row in before if key(row) not in again and row["case"] != "environment"]


def choices(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of every form and tile that was timed beside others, which was fastest: lines for ``kernels/heuristics.py``, and
    of large products for ``rmcore/ops/backends/triton_tma.py``.

    Only of those that gave right results whose bits stayed the same. What decides stays what it is until somebody
    commits another row.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        words = str(row.get("case", "")).partition(",")[0].split(maxsplit=2)
        sound = row.get("bits_repeat") and row.get("finite", True) and "us" in row
        sound = sound and all(row.get(name, 0.0) < limit for name, limit in LIMITS.items())
        if len(words) == 3 and words[0] in ("form", "tile") and sound:
            groups.setdefault((words[0], words[1], row.get("rows", row.get("k"))), {})[words[2]] = row
    lines = []
    for (kind, name, count), found in groups.items():
        best, *others = sorted(found, key=lambda which: found[which]["us"])
        if not others:
            continue
        us = {which: f"{found[which]['us']:.1f} µs" for which in found}
        at = f"k={count}" if name == "pairs" else f"B={count}"
        line = f"{kind} {name} {at}: {best} {us[best]}, " + ", ".join(f"{which} {us[which]}" for which in others)
        if kind == "tile" and best == "named":
            line += f" -> ({count}, {found[best]['tile']}),  # measured: {us[best]}, {us['table']} with what was here"
        if name.startswith("large") and best != "plain" and "plain" in us:
            line += f' -> SERVES = [Large("{best}")]  # measured at {at}: {us[best]}, {us["plain"]} plain'
        lines.append(line)
    return lines


def findings(environment: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of ``rmcore/ops/proven.json`` for every operation of a backend that has at least one case with bits."""
    found = []
    digests = environment.get("sources", {})
    for backend in ("cuda", "triton"):
        for op in OPS:
            cases = [r for r in rows if str(r.get("case", "")).split()[:2] == [op, backend] and "declined" not in r]
            if not any("bits_repeat" in case for case in cases):
                continue
            right = all(
                "failed" not in case
                and case.get("finite", True)
                and all(case.get(name, 0.0) < limit for name, limit in LIMITS.items())
                for case in cases
            )
            found.append({
                "card": environment["name"], "backend": backend, "op": op,
                "triton": environment["versions"].get("triton", "") if backend == "triton" else "",
                "commit": environment["commit"], "sources": digests.get(backend, {}).get(op, ""),
                "right": right, "bits_equal": all(case.get("bits_repeat", True) for case in cases),
            })  # fmt: skip
    return found


def update_proven(table: Path, environment: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Put what a run found into the shipped table, in place of what an earlier one found of the same."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["card"], row["backend"], row["op"], row["triton"]

    known = {key(row): row for row in json.loads(table.read_text(encoding="utf-8"))} if table.exists() else {}
    known |= {key(row): row for row in findings(environment, rows)}
    ordered = [known[name] for name in sorted(known)]
    table.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(f"{table}: {len(ordered)} rows")
