"""JSON text in: which bytes it is made of, compressed or not, and where in it something is wrong.

Text is UTF-8, whatever the locale. A byte-order mark is skipped. What comes before a bad byte, a bad line or the place
where a compressed file breaks off is read.
"""

from __future__ import annotations

import codecs
import importlib
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from rmcore._base.compressed import Members, Zstd
from rmcore._base.errors import DataError
from rmcore._base.json_members import unique_members

__all__ = ["TABLE", "Row", "foreign", "opened", "optional_module", "read_json"]

_MARK = b"\xef\xbb\xbf"
TABLE = "Convert it, with pandas: pandas.read_csv(...).to_json('data.jsonl', orient='records', lines=True)"
"""What to do with a table that is no Parquet file."""
_CONVERT = "not UTF-8 but {0} text. Convert it: iconv -f {0} -t UTF-8 {{source}}"
# What is no JSON, by its first bytes, the longer ones first.
_FOREIGN = {
    b"\xff\xfe\0\0": _CONVERT.format("UTF-32"),
    b"\0\0\xfe\xff": _CONVERT.format("UTF-32"),
    b"\xff\xfe": _CONVERT.format("UTF-16"),
    b"\xfe\xff": _CONVERT.format("UTF-16"),
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for. Fetch that: git lfs pull",
    **dict.fromkeys(
        (b"PK\x03\x04", b"PK\x05\x06"),
        "a zip archive (or a spreadsheet, or a torch file). Unpack it, and give the JSON Lines in it",
    ),
    **dict.fromkeys(
        (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"),
        "a 7z or RAR archive, which is not read. Unpack it, and give the JSON Lines in it",
    ),
    b"\x1f\x9d": "a file of Unix compress, which is not read. Unpack it: uncompress {source}",
    b"LZIP": "an lzip file, which is not read. Unpack it: lzip -d {source}",
    b"\x5d\x00\x00": "an lzma file of the old form, which is not read. Unpack it: unlzma {source}",
    b"\xff\x06\x00\x00sNaPpY": "a Snappy file, which is not read. Unpack it first",
    b"\xff\xff\xff\xff": "a stream of Arrow's, which is not read: datasets and pyarrow convert it to Parquet",
    b"ARROW1": "an Arrow (Feather) file, which is not read: pandas.read_feather(...).to_parquet(...) converts it",
    b"\x04\x22\x4d\x18": "an lz4 file, which is not read. Unpack it: lz4 -d {source}",
    b"\x1f\x8b": "a gzip file in a compressed file. Unpack it once: gzip -d",
    **{bytes([0x80, k]): "a pickle, which is never read, since loading one runs code" for k in (2, 3, 4, 5)},
    b"PARE": "an encrypted Parquet file, which is not read",
    b"ORC": "an ORC file, which is not read. " + TABLE.replace("read_csv", "read_orc"),
    b"Obj\x01": "an Avro file, which is not read. Convert it to JSON Lines, with fastavro say",
    b"\x89HDF": "an HDF5 file, which is not read. " + TABLE.replace("read_csv", "read_hdf"),
    b"\x93NUMPY": "an array of numpy, which has no prompts and responses",
    b"%PDF": "a PDF document",
    b"<?xml": "an XML document, which is not read. Convert it to JSON Lines",
    b"SQLite format 3": "an SQLite database. Write its rows out as JSON Lines",
    **dict.fromkeys(
        (b"<!doctype", b"<html"), "an HTML page, perhaps a download page or an error's, not the data itself"
    ),
}
# Of text without a mark: where the zero bytes are in its first two characters, which JSON has out of ASCII.
_WIDE = {
    (1, 0, 0, 0): _CONVERT.format("UTF-32LE"),
    (0, 0, 0, 1): _CONVERT.format("UTF-32BE"),
    (1, 0, 1, 0): _CONVERT.format("UTF-16LE"),
    (0, 1, 0, 1): _CONVERT.format("UTF-16BE"),
}
_FORM = "one JSON object a line, or one array of objects"


class Row(NamedTuple):
    """An object of a file, its 1-based number and what that counts: lines of text, else rows."""

    number: int
    value: dict[str, Any]
    unit: Literal["line", "row"] = "line"


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[BinaryIO, bytes]]:
    """The bytes of a file, or of stdin for ``-``, decompressed; and the first few, which are still to be read.

    Compression is told by the first bytes, not by the file's name. Raises DataError for what cannot be opened.
    """
    try:
        stream = _stdin() if str(path) == "-" else open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    wrapped = not hasattr(stream, "peek")
    plain: Any = io.BufferedReader(stream) if wrapped else stream
    try:
        kind = _kind(plain)
        inner = _decompressed(plain, kind, path)
        try:
            head = inner.peek(8)[:8]
        except _BROKEN as error:
            said = f"not a complete {kind or 'plain'} file ({error}); no row was read"
            raise DataError(said, source=str(path), line=1) from error
        if not kind:
            _check_name(path, plain.peek(64)[:64])
        yield inner, head
    finally:
        if wrapped:
            plain.detach()  # or stdin would be closed with it
        if str(path) != "-":
            stream.close()


def _check_name(path: str | Path, head: bytes) -> None:
    """What is named as a compressed file and begins as none must be text; a name alone says nothing."""
    kind = _NAMES.get(Path(path).suffix.lower())
    if kind is None or foreign(head):
        return
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head.removeprefix(_MARK))
    except UnicodeDecodeError:
        magic = next(magic for magic, name in _MAGIC.items() if name == kind)
        said = f"no {kind} file, as its name says: it begins with the bytes {head[:4].hex(' ')}, expected "
        said += f"{magic[:4].hex(' ')}; and no text either. No row was read"
        raise DataError(f"{path}: {said}", source=str(path)) from None


def _stdin() -> BinaryIO:
    """Bytes of stdin, of which the locale says nothing; of a text stream put in its place too."""
    inner = getattr(sys.stdin, "buffer", None)
    return io.BytesIO(sys.stdin.read().encode("utf-8", "surrogatepass")) if inner is None else inner


_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAMES = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
_SKIPPABLE = [bytes([0x50 + k]) for k in range(16)]
# What Members and Zstd raise.
_BROKEN = (OSError, EOFError)


def _kind(stream: Any) -> str:
    head = stream.peek(8)
    if head[:1] in _SKIPPABLE and head[1:4] == b"\x2a\x4d\x18":
        return "zstd"  # with a frame of others' data in front, as pzstd writes it
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def _decompressed(stream: Any, kind: str, path: str | Path) -> Any:
    if kind in ("gzip", "bzip2", "xz"):
        return io.BufferedReader(Members(stream, kind))
    if kind == "zstd":
        return io.BufferedReader(Zstd(stream, optional_module("pyarrow", path, "a zstd file").CompressedInputStream))
    return stream


def optional_module(name: str, source: object, what: str) -> Any:
    """A module of the extra ``data``; raises DataError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(
            f"{source}: got {what}, which {package} reads and is not installed ({error}). Install it with "
            "pip install 'rmcore[data]', or convert the data to JSON Lines"
        ) from error


def read_json(stream: BinaryIO, source: str, wanted: tuple[int, int] | None = None) -> Iterator[Row]:
    """The objects of JSON Lines, or of one array; raises DataError naming the line, or the array's row.

    Blank lines are skipped but counted. Of the others only those from the first number of ``wanted`` up to before the
    second are parsed.
    """
    number, begun, place, start = 0, False, 0, b""
    try:
        for number, line in enumerate(stream, 1):
            if not begun:
                start += line
                if b"\0" in start[:8]:  # in UTF-16 and UTF-32 a line feed may be half of one
                    start += stream.read(4)
                if what := foreign(start):
                    raise DataError(what.format(source=source), source=source, line=1)
                start = start[:8]
            while line.startswith(_MARK):  # of each of several files that were joined
                line = line.removeprefix(_MARK)
            if number == 1 and line.lstrip().startswith(b"["):
                yield from _read_array(line + stream.read(), source)
                return
            if not line.strip():
                continue
            begun, place = True, place + 1
            if wanted is not None and not wanted[0] < place <= wanted[1]:
                continue
            try:
                # surrogatepass: half a surrogate pair is taken as it is from "\ud83d", and as bytes.
                value = json.loads(line.decode("utf-8", "surrogatepass"), object_pairs_hook=unique_members)
            except (ValueError, RecursionError) as error:
                number, place = number - 1, place - 1  # the last that is whole
                _look_for_damage(stream)
                said = f"not JSON ({_explain(error, line)}), expected {_FORM}"
                said = _bad_byte(error) if isinstance(error, UnicodeDecodeError) else said
                raise DataError(said, source=source, line=number + 1) from error
            if not isinstance(value, dict):
                raise DataError(f"got {_article(value)}, expected an object", source=source, line=number)
            yield Row(number, value)
    except _BROKEN as error:
        whole = f"{place} rows before that are whole"
        if any(said in str(error) for said in ("data check", "length check", "checksum")):
            # What was decompressed is not what was compressed, and nothing says where it began to differ.
            whole = f"any of the {place} rows before that may be wrong"
        raise DataError(
            f"the compressed file breaks off or is damaged, not a complete gzip, bzip2, xz or zstd file ({error}); "
            f"{whole}",
            source=source,
            line=number + 1,
        ) from error


def _look_for_damage(stream: BinaryIO) -> None:
    """Read the rest of a compressed file, which raises one of ``_BROKEN`` if it is damaged.

    Of a file with a wrong byte something else may come out for a while before its format tells: a line that is no JSON
    is a sign of it then, not the fault.
    """
    if isinstance(getattr(stream, "raw", None), (Members, Zstd)):
        while stream.read(1 << 20):
            pass


def foreign(line: bytes) -> str:
    """What a file is whose first line this is, where that is known to be no JSON; with ``{source}`` for its name."""
    first = line[:4]
    if first.isascii() and all(chr(c).isprintable() or c in b"\0\t\r\n" for c in first):
        form = tuple(int(c > 0) for c in first)
        if form in _WIDE:
            return _WIDE[form]
    start = line.removeprefix(_MARK).lstrip(b" \t\r\n")
    for magic, what in _FOREIGN.items():
        if start.startswith(magic) or (magic[:1] == b"<" and start[:9].lower().startswith(magic)):
            return what
    if line[257:262] == b"ustar":
        return "a tar archive. Unpack it, and give the JSON Lines in it"
    text = start[:200].rstrip().lower()
    columns = {cell.strip(b" \"'") for cell in text.replace(b"\t", b",").split(b",")}
    if (
        text[:1] not in (b"{", b"[")
        and len(columns) > 1
        and columns & {b"prompt", b"chosen", b"responses", b"question"}
    ):
        return "a table of comma- or tab-separated text, which is not read. " + TABLE
    return ""


def _explain(error: Exception, line: bytes) -> str:
    """What JSON's reader says, and what it comes from where one line shows that."""
    start = line.strip()
    if b"\0" in start:
        return f"{error}; zero bytes, as where UTF-16 text was appended to UTF-8, or a disk was full"
    if start.startswith(b"{") and start.endswith(b"},"):
        return f"{error}; a comma behind an object: lines have none, and an array has brackets around it"
    if start in (b"{", b"[{") or (start.startswith(b"{") and start.endswith((b",", b"[", b"{"))):
        return f"{error}; an object over several lines: write it in one, as jq -c . does"
    if b"}\r{" in start:
        return f"{error}; lines that end in a carriage return alone: tr '\\r' '\\n' < FILE gives lines"
    if b"}{" in start.replace(b" ", b""):
        return f"{error}; several objects in one line"
    return str(error)


def _read_array(data: bytes, source: str) -> Iterator[Row]:
    bad: UnicodeDecodeError | None = None
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        text, bad = data[: error.start].decode("utf-8", "surrogatepass"), error
    number = 0
    try:
        for number, value in enumerate(_items(text), 1):
            if not isinstance(value, dict):
                raise DataError(f"got {_article(value)}, expected an object", source=source, line=number, unit="row")
            yield Row(number, value, "row")
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        said = _bad_byte(bad) if bad is not None else f"not JSON ({error}), expected {_FORM}"
        raise DataError(said, source=source, line=number + 1, unit="row") from error


def _items(text: str) -> Iterator[Any]:
    """The items of a JSON array, one by one, so that those before an error are had."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_members)
    at = _space(text, text.index("[") + 1)
    if text[at : at + 1] != "]":
        while True:
            value, at = decoder.raw_decode(text, at)
            yield value
            at = _space(text, at)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _space(text, at + 1)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data after the array", text, at + 1)


def _space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start + 1}: {error.reason})"


def _article(value: object) -> str:
    return f"a JSON {'null' if value is None else type(value).__name__}"
