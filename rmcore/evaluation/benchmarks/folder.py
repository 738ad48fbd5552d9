"""Which files of a folder hold a benchmark's rows: a clone of its repository or of the hub may hold more than those.

A file is judged by its first row. It is left out where that has none of the benchmark's fields, or where it has a field
that only results on the benchmark, or another benchmark's rows, have; and a file that holds what the files beside it
hold. All that is left out is told of. A file that cannot be read is an error, and so is a row that lacks some field.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rmcore._base.errors import DataError, reject
from rmcore._base.lines import opened
from rmcore.evaluation.benchmarks.item import Benchmark
from rmcore.model.data import read_rows

__all__ = ["DATA", "files_of"]

log = logging.getLogger(__name__)

DATA = (".jsonl", ".ndjson", ".json", ".parquet")
_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
_SUFFIXES = tuple(data + packed for data in DATA for packed in _PACKED)
_TABLES = (".csv", ".tsv", ".xlsx", ".arrow", ".feather", ".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".pkl")
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*")
_ABOUT = ("dataset_infos.json", "dataset_info.json")  # what the hub's clones say about their data
_NAMED = 10  # files a warning names


def files_of(benchmark: Benchmark, folder: Path) -> Sequence[Path]:
    """The files below a folder that hold rows of the benchmark, in order; what is left out is logged.

    Raises:
        InputError: there is none.
        DataError: one of them cannot be read.
    """
    everything = sorted(_walk(folder))
    found = [file for file in everything if file.name.lower().endswith(_SUFFIXES) and file.name.lower() not in _ABOUT]
    tables = [file for file in everything if file.name.lower().endswith(_TABLES)]
    if not found:
        reject("data", f"{str(folder)!r}, without data files", f"files that end in {', '.join(DATA)}, packed or not")
    first = {file: _first(file) for file in found} if len(found) > 1 else dict.fromkeys(found)
    foreign = [file for file, row in first.items() if row is not None and not row.keys() & set(benchmark.own)]
    own = [file for file in found if file not in foreign]
    if not own:
        what = f"{str(folder)!r}: {len(foreign)} data files, none with {' or '.join(benchmark.own)}"
        reject("data", f"{what} ({_listed(foreign, folder)})", f"rows of {benchmark.title}")
    results = _some(own, lambda file: any((first[file] or {}).get(name) is not None for name in benchmark.results))
    own = [file for file in own if file not in results]
    whole = _some(own, lambda file: _SHARD.sub("", file.name.split(".")[0]) in benchmark.whole)
    for files, why in (
        (foreign, f"no rows of {benchmark.title}"),
        (results, f"not its rows but more than these ({', '.join(benchmark.results)}). By themselves they are read"),
        (whole, "the files beside hold its rows. By themselves they are read"),
        (tables, "of a kind that is not read. JSON Lines, JSON and Parquet are"),
    ):
        if files:
            log.warning("%s: left out, %s: %s", folder, why, _listed(files, folder))
    return [file for file in own if file not in whole]


def _some(files: Sequence[Path], which: Callable[[Path], bool]) -> list[Path]:
    """Those of the files that are such; none where all are."""
    found = [file for file in files if which(file)]
    return found if len(found) < len(files) else []


def _first(file: Path) -> Mapping[str, Any] | None:
    """The first row of a file; none of an empty one. A file that is one JSON value, and no rows, has no field."""
    try:
        return next((row.value for row in islice(read_rows(str(file)), 1)), None)
    except DataError:
        with opened(file) as (stream, _head):
            text = stream.read()
        try:
            json.loads(text)
        except ValueError:
            text = b""
        if not text:
            raise
        return {}


def _listed(files: Sequence[Path], folder: Path) -> str:
    names = ", ".join(str(file.relative_to(folder)) for file in files[:_NAMED])
    return names + (f" and {len(files) - _NAMED} more" if len(files) > _NAMED else "")


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder; what is hidden is not data."""
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts):
            yield file
