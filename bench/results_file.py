"""The results of a run, kept as they come: a line of JSON a row, on the disk before the next one is measured.

``OUT.jsonl`` begins with the environment and the limits, then has one row a line, and ends with ``{"end": ...}``: a
file without that line is a run that was killed, and holds all it had measured. ``OUT.json`` and ``OUT.csv`` are written
once everything is measured, so that a stopped run leaves those of the last full one as they were.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from .setup import Row

__all__ = ["ResultsFile", "read_results"]


class ResultsFile:
    """A context manager: rows go in by :meth:`add`; leaving it by an exception records which, and nothing is lost."""

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        self.rows: list[Row] = []
        self.path = out.with_suffix(".jsonl")
        self._out = out
        self._header = header
        out.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("w", encoding="utf-8")
        self._append(header)

    def add(self, row: Row) -> None:
        """Keep a row; it is on the disk when this returns."""
        self.rows.append(row)
        self._append(row)

    def raise_bandwidth(self, bandwidth: float) -> None:
        """Hold all rows against the most the memory gave in the run; ``OUT.jsonl`` keeps what each was told by."""
        limits = self._header["limits"]
        ratio = limits["bandwidth"] / max(bandwidth, limits["bandwidth"])
        for row in self.rows:
            if "memory_s" in row:
                row["memory_s"] *= ratio
                row["floor_s"] = max(row["memory_s"], row["arithmetic_s"])
                row["of_limit"] = row["floor_s"] / row["median_s"]
        limits["bandwidth"] /= ratio

    def document(self) -> dict[str, Any]:
        """Header and rows, as in ``OUT.json``."""
        return self._header | {"rows": self.rows}

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._append({"end": "complete" if kind is None else kind.__name__, "count": len(self.rows)})
        self._stream.close()
        if kind is None:
            self._out.with_suffix(".json").write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
            _write_csv(self.rows, self._out.with_suffix(".csv"))

    def _append(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def read_results(path: Path) -> tuple[dict[str, Any], list[Row], str]:
    """(header, rows, end) of an ``OUT.jsonl``; end is ``killed`` where the run could not write its last line."""
    header: dict[str, Any] = {}
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True)):
        if not line.endswith("\n"):  # killed while writing it
            break
        record = json.loads(line)
        if number == 0:
            header = record
        elif "end" in record:
            return header, rows, str(record["end"])
        else:
            rows.append(record)
    return header, rows, "killed"


def _write_csv(rows: list[Row], path: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
