"""Rows that are no JSON text: Parquet, and what the ``datasets`` library has, on disk or on the hub."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from rmcore._base.errors import DataError, InputError, reject
from rmcore._base.lines import Row, optional_module
from rmcore.model.data.columns import Holed, Unreadable
from rmcore.model.data.parts import WHOLE, Part, rows_of

__all__ = ["HUB", "hub_rows", "object_rows", "parquet_rows", "saved_rows"]

HUB = "hf://"
_AT_ONCE = 256
_HUB_NAME = re.compile(
    r"hf://(?:datasets/)?(?P<name>[^/@:]+/[^/@:]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<config>[^/:]+))?(?::(?P<split>.+))?"
)


def parquet_rows(stream: BinaryIO, source: str, part: Part = WHOLE) -> Iterator[Row]:
    """The rows of a Parquet file, a few hundred at a time; row groups that hold none of ``part`` are not read."""
    parquet = optional_module("pyarrow.parquet", source, "a Parquet file")
    arrow = optional_module("pyarrow", source, "a Parquet file")
    number = 0
    # KeyError: a key twice in a map, or a time zone that nobody knows
    errors = (KeyError, ValueError, OverflowError, ImportError, arrow.ArrowException)
    try:
        file = parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        names = file.schema_arrow.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:  # of which one would be dropped
            raise DataError(f"{source}: got the column {twice!r} twice, expected each once", source=source)
        low, high = part.bounds(file.metadata.num_rows)
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number >= high or number + size <= low:
                number += size
                continue
            for batch in file.iter_batches(batch_size=_AT_ONCE, row_groups=[group]):
                for value in _values(batch, errors):
                    number += 1
                    if low < number <= high:
                        yield Row(number, value, "row")
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"not a whole Parquet file ({error})", source=source, line=number + 1, unit="row") from error
    except (UnicodeDecodeError, OverflowError) as error:
        raise DataError(
            f"a value in this row or in the {_AT_ONCE} from it that cannot be read ({error})",
            source=source,
            line=number + 1,
            unit="row",
        ) from error


def _values(batch: Any, errors: tuple[type[Exception], ...]) -> list[dict[str, Any]]:
    """The rows of a batch; a map is a dictionary, unless a key comes twice in one. Values that cannot be had are
    :class:`Unreadable`, by themselves or within lists and structures whose others are there: dates beyond Python's,
    text that is no UTF-8, unknown time zones.
    """
    try:
        found: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    except errors:
        columns = [_column(column, errors) for column in batch.columns]
        return [Holed(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
    return found


def _column(column: Any, errors: tuple[type[Exception], ...]) -> list[Any]:
    for strict in ({"maps_as_pydicts": "strict"}, {}):
        try:
            found: list[Any] = column.to_pylist(**strict)
            return found
        except errors as error:
            why = str(error) or type(error).__name__
    if len(column) == 1:
        return [_parts(column, errors, why[:200])]
    return [_column(column.slice(k, 1), errors)[0] for k in range(len(column))]


def _parts(cell: Any, errors: tuple[type[Exception], ...], why: str) -> Any:
    """What can be had of a value that cannot be had whole."""
    from pyarrow import types  # type: ignore[import-untyped]

    kind = cell.type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _column(cell.flatten(), errors)
    if types.is_struct(kind):
        names = [kind.field(k).name for k in range(kind.num_fields)]
        if len(set(names)) == len(names):  # of two with one name one would be dropped
            return {name: _column(part, errors)[0] for name, part in zip(names, cell.flatten(), strict=True)}
    return Unreadable(why)


def object_rows(rows: Iterable[Any], source: str = "rows", part: Part = WHOLE) -> Iterator[Row]:
    """The rows of a ``datasets.Dataset``, or of any iterable of mappings.

    Raises:
        InputError: it holds several splits, or is nothing that rows come from.
        DataError: one of the rows is no mapping.
    """
    if isinstance(rows, (bytes, bytearray)) or not isinstance(rows, Iterable):
        reject("data", type(rows).__name__, "a path, hf://org/name, a datasets.Dataset, or an iterable of mappings")
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):
        reject("data", "a pandas.DataFrame", "rows", "frame.to_dict('records') gives them")
    if isinstance(rows, Mapping):
        reject(source, f"{type(rows).__name__} with {sorted(map(str, rows))[:8]}", "one split of it, or a list of rows")
    for number, value in rows_of(rows, part):
        if not isinstance(value, Mapping):
            raise DataError(
                f"got a {type(value).__name__}, expected a mapping of columns", source=source, line=number, unit="row"
            )
        yield Row(number, {name: _plain(part) for name, part in value.items()}, "row")


def _plain(value: Any) -> Any:
    """A value with Python's own in place of numpy's and torch's, as formatted data sets have them; None for NA."""
    if type(value) in (str, bytes, int, float, bool) or value is None:
        return value
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if type(value).__module__ in ("numpy", "torch"):  # arrays and scalars
        return _plain(value.tolist())
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def saved_rows(folder: Path, part: Part = WHOLE) -> Iterator[Row]:
    """The rows of a folder written by ``Dataset.save_to_disk``."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        reject("path", f"{str(folder)!r}, a folder", "a file, or a folder that Dataset.save_to_disk wrote")
    datasets = optional_module("datasets", folder, "a folder of the datasets library")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # many kinds, depending on what is damaged
        raise DataError(f"{folder}: not readable by datasets ({type(error).__name__}: {error})") from error
    return object_rows(found, str(folder), part)


def hub_rows(source: str, part: Part = WHOLE) -> Iterator[Row]:
    """The rows of ``hf://org/name[@revision][/config][:split]``, through the cache of the ``datasets`` library."""
    match = _HUB_NAME.fullmatch(source)
    if match is None:
        reject("data", repr(source), "hf://org/name, with @revision, /config and :split where needed")
    datasets = optional_module("datasets", source, "a data set of the hub")
    revision = unquote(match["revision"]) if match["revision"] else None
    try:
        split = match["split"]
        if split is None:
            names = datasets.get_dataset_split_names(match["name"], match["config"], revision=revision)
            if len(names) != 1:
                reject("data", f"{source!r} with the splits {names}", f"one of them, as in {source}:{names[0]}")
            split = names[0]
        found = datasets.load_dataset(match["name"], match["config"], split=split, revision=revision)
    except InputError:
        raise
    except Exception as error:  # of the hub, of the network, of the data set's own files
        said = f"{source}: {type(error).__name__}: {error}"
        if isinstance(error, ConnectionError):
            name = match["name"]
            said += f". Where there is a network: hf download {name} --repo-type dataset --local-dir DIR; give DIR then"
        raise DataError(said) from error
    return object_rows(found, source, part)
