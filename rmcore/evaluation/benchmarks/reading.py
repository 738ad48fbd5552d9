"""Where a benchmark's rows come from: the hub, a file in any container rmcore reads, or a folder of such files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from rmcore._base.errors import DataError, InputError, reject
from rmcore._base.prompt import content_key
from rmcore.evaluation.benchmarks.folder import DATA, files_of
from rmcore.evaluation.benchmarks.item import Benchmark, Context, Item
from rmcore.model.data import read_rows

__all__ = ["read_items", "sources_of"]

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[^/:]+)?(/[^/:]+)?(:.+)?")
_HUB = "hf://"


def read_items(
    benchmark: Benchmark, data: str | Path | None = None, *, sources: Sequence[str] | None = None
) -> tuple[Item, ...]:
    """All items of a benchmark that count, in order.

    Args:
        benchmark: which.
        data: a file, a folder, ``org/name`` or ``hf://org/name`` of the hub; None is the benchmark's own data there.
        sources: what ``data`` stands for, where that is known already (:func:`sources_of`).

    Raises:
        InputError: it is nowhere on the hub, or there is nothing in ``data``.
        DataError: naming source and row: a field is missing or wrong; or the source cannot be read.
    """
    items: list[Item] = []
    ties, repeats = 0, _Repeats()
    for source in sources_of(benchmark, data) if sources is None else sources:
        for row in read_rows(source):
            try:
                item = benchmark.read(row.value, Context(source, row.number))
            except InputError as error:
                raise DataError(str(error), source=source, line=row.number, unit=row.unit) from error
            if item is None:
                ties += 1
            else:
                items.append(item)
                repeats.see(item, source, f"{row.unit} {row.number}")
    if repeats.count:
        log.warning("%d rows stand in several files and count as often; first %s", repeats.count, repeats.first)
    if ties:
        log.warning("%s: %d ties in the labels are left out", benchmark.title, ties)
    if not any(item.pairs for item in items):
        reject("data", f"{len(items)} rows without a pair to compare", f"rows of {benchmark.title}")
    return tuple(items)


def sources_of(benchmark: Benchmark, data: str | Path | None = None) -> list[str]:
    """The sources that ``data`` stands for, as the readers take them; arguments and errors as of :func:`read_items`."""
    if data is None:
        if not benchmark.data:
            reject("--data", "none", f"a file or folder: {benchmark.title} is not on the hub ({benchmark.about})")
        return list(benchmark.data)
    path, name = Path(data), str(data)
    if name.startswith(_HUB) or name == "-":
        return [name]
    if path.is_dir():
        if any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            return [name]
        return [str(file) for file in files_of(benchmark, path)]
    if not path.exists() and _HUB_ID.fullmatch(name) and not name.lower().endswith(DATA):
        return [_HUB + name]
    return [name]


class _Repeats:
    """Counts rows that another source had already: data and somebody's results on it in one folder, say."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.count, self.first = 0, ""

    def see(self, item: Item, source: str, where: str) -> None:
        content = (item.subset, content_key(item.prompt), item.quality, tuple(map(content_key, item.responses)))
        if self.known.setdefault(hash(content), source) != source:
            self.count += 1
            self.first = self.first or f"{source}, {where}, which {self.known[hash(content)]} has too"
