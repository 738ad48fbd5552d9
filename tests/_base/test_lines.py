"""Bytes to rows: encodings, compression, arrays; an error is named where it is, what precedes it is read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import DataError, InputError
from rmcore.model.data import read_groups, read_lines, read_preferences

Rows = list[dict[str, Any]]
ROW = b'{"prompt": "hi", "responses": ["a", "b"]}\n'


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def rows_then_error(source: Any, reader: Callable[..., Any] = read_lines) -> tuple[list[Any], DataError]:
    found: list[Any] = []
    with pytest.raises(DataError) as caught:
        found.extend(reader(source))  # keeps what came before the error
    return found, caught.value


texts = st.text(st.characters(codec="utf-8"), max_size=20)
rows = st.lists(st.dictionaries(texts, texts | st.integers() | st.none() | st.lists(texts), max_size=3), max_size=6)


@given(rows, st.booleans(), st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress, zstd]), st.booleans())
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, array: bool, pack: Callable[[bytes], bytes], mark: bool
) -> None:
    text = json.dumps(rows, ensure_ascii=False) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path_factory.mktemp("lines") / "a file"
    path.write_bytes(pack((b"\xef\xbb\xbf" if mark else b"") + text.encode()))
    assert list(read_lines(path)) == list(enumerate(rows, 1))


@given(st.lists(texts, max_size=5), st.binary(min_size=1, max_size=4), st.binary(max_size=8))
def test_a_bad_byte_names_its_own_line_after_all_rows_before_it(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], bad: bytes, after: bytes
) -> None:
    path = tmp_path_factory.mktemp("lines") / "f"
    good = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in before)
    path.write_bytes(good.encode() + b'{"text": "\xff' + bad + after)
    found, error = rows_then_error(path)
    assert [value["text"] for _, value in found] == before
    assert error.line == len(before) + 1
    assert "not UTF-8" in str(error)


def test_four_good_lines_but_one(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes(ROW * 3 + b'{"prompt":"caf\xe9","responses":["a","b"]}\n' + ROW)
    found, error = rows_then_error(path, read_groups)
    assert len(found) == 3
    assert str(error).startswith(f"{path}:4: not UTF-8 (byte 0xe9 at position 15")


def test_a_mark_is_skipped_at_the_start_and_where_files_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" + ROW) * 2)
    assert len(list(read_groups(path))) == 2


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("start", [ROW.decode(), "[" + ROW.decode() + "]"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_is_named_so_that_iconv_reads_it(tmp_path: Path, encoding: str, mark: str, start: str) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes((mark + start).encode(encoding))
    with pytest.raises(DataError, match=r"not UTF-8 but UTF-\d\d(LE|BE)? text\. Convert it: iconv") as caught:
        list(read_groups(path))
    found = re.search(r"iconv -f (\S+) -t UTF-8", str(caught.value))
    assert found is not None
    assert path.read_bytes().decode(found[1]).lstrip("\ufeff") == start


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_is_named_by_its_byte_order_however_it_begins(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "g.jsonl"
    for start in ("\n", "\r\n", " ", "\t\n", "\n\n ", "\r\n\r\n\r\n", '"a"\n', "# c\n", "//\n", "a,b\n", "10\n", "{\n"):
        for pack in (bytes, gzip.compress):
            path.write_bytes(pack((start + ROW.decode()).encode(encoding)))
            _, error = rows_then_error(path)
            assert f"iconv -f {encoding.upper()[:6]}{encoding.upper()[7:]} -t UTF-8" in str(error), start


def test_utf16_behind_utf8_is_told_by_its_zero_bytes(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes(ROW + ROW.decode().encode("utf-16-le"))  # PowerShell's >>
    found, error = rows_then_error(path)
    assert len(found) == 1
    assert error.line == 2
    assert "zero bytes, as where UTF-16 text was appended" in str(error)


@pytest.mark.parametrize("half", [b"\\ud83d", "\ud83d".encode("utf-8", "surrogatepass")])
def test_half_a_surrogate_pair_is_taken_as_it_is(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "g.jsonl"
    path.write_bytes(b'{"prompt": "hi", "responses": ["smile ' + half + b'", "b"]}\n')
    assert next(read_groups(path)).responses == ("smile \ud83d", "b")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("cut", [4, 12])
def test_a_compressed_file_that_breaks_off(tmp_path: Path, pack: Callable[[bytes], bytes], cut: int) -> None:
    path = tmp_path / "g"
    lines = b"".join(json.dumps({"k": k, "text": "x" * (k % 7)}).encode() + b"\n" for k in range(5000))
    path.write_bytes(pack(lines)[:-cut])
    found, error = rows_then_error(path)
    assert all(value["k"] == number - 1 for number, value in found)
    assert error.line > 0


def test_a_compressed_file_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "g"
    data = bytearray(gzip.compress(b"".join(json.dumps({"k": k}).encode() + b"\n" for k in range(50_000))))
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    _, error = rows_then_error(path)
    assert error.line > 0
    path.write_bytes(b"\x1f\x8b garbage")
    _, error = rows_then_error(path)
    assert "gzip" in str(error)


@pytest.mark.parametrize(
    ("text", "count", "says"),
    [
        ('[{"a": 1}, {"a": 2}', 2, "row 3: not JSON"),
        ('[{"a": 1}, {"a": 2},]', 2, "row 3: not JSON"),
        ('[{"a": 1} {"a": 2}]', 1, "row 2: not JSON"),
        ('[{"a": 1}, 3]', 1, "row 2: got a JSON int"),
        ('[{"a": 1}]\n[{"a": 2}]', 1, "row 2: not JSON .Extra data after the array"),
        ('[{"a": 1}, {"a": 2, "a": 3}]', 1, "row 2: not JSON .the key 'a' comes twice"),
        ('[{"a": 1}, {"a": "\udcff"}]', 1, "row 2: not UTF-8"),
        ("[" * 100_000, 0, "row 1: not JSON"),
    ],
)
def test_a_bad_array_names_its_row_after_those_before_it(tmp_path: Path, text: str, count: int, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    found, error = rows_then_error(path)
    assert [number for number, _ in found] == list(range(1, count + 1))
    assert str(error).startswith(str(path))
    assert re.search(says, str(error))


def test_an_array_of_preferences_pretty_or_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    pairs = [{"prompt": "2+2?", "chosen": "4", "rejected": str(k)} for k in range(3)]
    for indent in (None, 2):
        path.write_text(json.dumps(pairs, indent=indent))
        assert [pair.rejected for pair in read_preferences(path)] == ["0", "1", "2"]
    path.write_text("[ ]\n")
    assert list(read_preferences(path)) == []


def test_an_object_over_several_lines_is_told_the_form(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"prompt": "a"}, indent=2))
    with pytest.raises(DataError, match=r"a.json:1: not JSON .*expected one JSON object a line, or one array"):
        list(read_lines(path))


def test_nesting_and_twice_given_keys_are_data_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text, says in (('{"a":' * 50_000, "not JSON"), ('{"chosen": "a", "chosen": "b"}', "'chosen' comes twice")):
        path.write_text('{"a": 1}\n' + text + "\n")
        found, error = rows_then_error(path)
        assert (len(found), error.line) == (1, 2)
        assert says in str(error)


class Stdin:
    """stdin in another locale, which says nothing of the bytes."""

    encoding = "latin-1"

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_stdin_is_utf8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]) -> None:
    stdin = Stdin(pack('{"prompt": "κ", "responses": ["é"]}\n'.encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    (group,) = read_groups("-")
    assert (group.prompt, group.responses) == ("κ", ("é",))


def tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"a Git LFS pointer.* git lfs pull"),
        (b"PK\x03\x04" + bytes(30), "a zip archive"),
        (tar(), "a tar archive"),
        (b"ARROW1\0\0" + bytes(9), "an Arrow"),
        (pickle.dumps([1]), "a pickle, which is never read"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"\n<html><body>sign in", "an HTML page"),
        (gzip.compress(gzip.compress(ROW)), "a gzip file in a compressed file"),
        (b"\x04\x22\x4d\x18" + bytes(9), "an lz4 file"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"prompt,chosen,rejected\na,b,c\n", "a table of comma- or tab-separated text"),
        (b'\xef\xbb\xbf"prompt"\t"chosen"\n', "a table of comma- or tab-separated text"),
        (ROW + b"{\n", "an object over several lines: write it in one"),
        (ROW.strip() + ROW, "several objects in one line"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",  # gzip's hold the time: no two workers' are alike
)
def test_what_is_no_json_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=says):
        list(read_lines(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.TSV", "a.b.csv.zst", "rows.xlsx"])
def test_tables_are_told_by_their_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is not read\. Convert it, with pandas: pandas\.read_(csv|excel)"):
        list(read_lines(tmp_path / name))


@pytest.mark.parametrize("source", [None, 5, b"rows.jsonl", "https://h/x.jsonl", "s3://b/x", "FILE:///x"])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match=r"^data: got .*, expected "):
        list(read_lines(source))


def test_a_data_frame_is_told_how_to_become_rows() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"prompt": "a", "chosen": "b", "rejected": "c", "label": 0.75}])
    with pytest.raises(InputError, match=r"frame\.to_dict\('records'\) gives them"):
        list(read_preferences(frame))
    assert [row.label for row in read_preferences(frame.to_dict("records"))] == [0.75]


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen\n")
    with pytest.raises(DataError, match=r"comma-separated text is not read\. Convert it, with pandas"):
        list(read_preferences(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match=r"a folder, expected a file, or a folder that Dataset\.save_to_disk wrote"):
        list(read_preferences(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("g.jsonl.gz", "gzip", "1f 8b"),
        ("g.zst", "zstd", "28 b5 2f fd"),
        ("g.xz", "xz", "fd 37 7a 58"),
        ("g.bz2", "bzip2", "42"),
    ],
)
def test_what_is_named_as_a_compressed_file_and_is_garbage(name: str, kind: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for garbage in (b"\xf8\xf9\xfa\xfb" * 200, b"\x80", b"{\xff"):
        path.write_bytes(garbage)
        with pytest.raises(DataError) as error:
            list(read_groups(path))
        said = str(error.value)
        assert f"{path}: no {kind} file, as its name says: it begins with the bytes {garbage[:4].hex(' ')}" in said
        assert f"expected {expected}" in said
        assert "No row was read" in said
    path.write_bytes(ROW)  # the content decides, not the name
    assert len(list(read_groups(path))) == 1
    path.write_bytes("é".encode() * 100 + b"\n")  # cut in the middle of a letter where it is looked at
    with pytest.raises(DataError, match=":1: not JSON"):
        list(read_groups(path))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_the_byte_of_a_damage_and_the_rows_before_it(pack, tmp_path: Path) -> None:
    path, source = tmp_path / "g", random.Random(0)
    rows = [
        json.dumps({"prompt": source.randbytes(30).hex(), "responses": ["a", "b"]}).encode() + b"\n"
        for _ in range(2000)
    ]
    whole = pack(b"".join(rows))
    for data, most in ((whole[: len(whole) // 2], len(whole) // 2), (whole + b"garbage behind it", len(whole) + 20)):
        path.write_bytes(data)
        read, error = rows_then_error(path)
        found, said = len(read), str(error)
        assert f"; {found} rows before that are whole" in said or (found == 0 and "no row was read" in said)
        assert 0 < int(re.search(r"after byte (\d+)", said)[1]) <= most, said
        assert int(re.search(r"after byte (\d+)", said)[1]) >= most - 1000, said
    path.write_bytes(whole[:6] + b"\xff" * 100)
    with pytest.raises(DataError, match=r"not a complete \w+ file \(.*after byte \d+.*; no row was read"):
        list(read_groups(path))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_members_of_a_compressed_file_and_what_is_none(pack, tmp_path: Path) -> None:
    """Members are read one after another; what follows them and is none is an error that names line and byte."""
    first, second = pack(ROW * 3), pack(ROW * 2)
    path = tmp_path / "data.jsonl"

    def read(data: bytes) -> tuple[int, str]:
        path.write_bytes(data)
        found = 0
        try:
            for _ in read_groups(path):
                found += 1
        except DataError as error:
            return found, str(error)
        return found, ""

    for joined in (first + second, first + bytes(8) + second, first + second + bytes(512)):
        assert read(joined) == (5, "")
    assert read(b"".join(pack(ROW[k : k + 1]) for k in range(len(ROW)))) == (1, "")
    damaged = bytearray(second)
    damaged[len(second) // 2] ^= 0xFF
    for more in (b"no member", b"\0\0x", bytes(damaged), second[:-6], second[:4], first[:10] + second):
        found, said = read(first + more)
        assert found >= 3
        assert f"{path}:{found + 1}: the compressed file breaks off or is damaged" in said
        assert re.search(r"after byte (\d+)", said), said
        assert len(first) - 512 <= int(re.search(r"after byte (\d+)", said)[1]) <= len(first + more)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_wrong_byte_of_a_compressed_file_is_its_damage_wherever_it_shows_first(pack, tmp_path: Path) -> None:
    """A format may go on for a while and give out something else: no JSON, no UTF-8, other texts."""
    path, source = tmp_path / "g", random.Random(1)
    rows = [{"prompt": source.randbytes(40).hex(), "responses": ["a", "b"]} for _ in range(300)]
    whole = pack(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    for at in range(40, len(whole) - 20, len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        read, error = rows_then_error(path)
        said = str(error)
        assert "the compressed file breaks off or is damaged" in said or "no row was read" in said, (at, said)
        if [row for _, row in read] != rows[: len(read)]:
            assert f"any of the {len(read)} rows before that may be wrong" in said
    path.write_bytes(pack(ROW + b"{bad}\n" + ROW))
    with pytest.raises(DataError, match="g:2: not JSON"):
        list(read_groups(path))


def test_more_that_is_no_json_lines_is_named(tmp_path: Path) -> None:
    path = tmp_path / "g"
    for data, said in (
        (b"\xff\xff\xff\xff\x10\x00\x00\x00", "a stream of Arrow's"),
        (ROW.replace(b"\n", b"\r") * 3, "lines that end in a carriage return alone"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"g:1: .*{said}"):
            list(read_groups(path))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK\x05\x06" + bytes(18), "a zip archive"),
        (b"7z\xbc\xaf\x27\x1c\0", "a 7z or RAR archive"),
        (b"Rar!\x1a\x07\0", "a 7z or RAR archive"),
        (b"\x1f\x9d\x90", "Unix compress"),
        (b"LZIP\x01", "an lzip file"),
        (lzma.compress(ROW, format=lzma.FORMAT_ALONE), "an lzma file of the old form"),
        (b"\xff\x06\0\0sNaPpY", "a Snappy file"),
        (pickle.dumps([1], protocol=2), "a pickle, which is never read"),
        (b"PARE" + bytes(9), "an encrypted Parquet file"),
        (b"ORC" + bytes(9), r"an ORC file.*pandas\.read_orc"),
        (b"Obj\x01" + bytes(9), "an Avro file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY\x01\0", "an array of numpy"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"<?xml version='1.0'?>", "an XML document"),
        (b"<!DocType HTML>", "an HTML page"),
        (b"<HTML>", "an HTML page"),
        (ROW.strip() + b",\n" + ROW, "a comma behind an object: lines have none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",
)
def test_further_formats_are_named(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "rows").write_bytes(data)
    with pytest.raises(DataError, match=says):
        list(read_lines(tmp_path / "rows"))


def test_marks_of_joined_files_and_frames_of_others_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbf" + ROW)
    assert len(list(read_lines(tmp_path / "rows"))) == 1
    pyarrow = pytest.importorskip("pyarrow")
    frame, other = pyarrow.compress(ROW, codec="zstd", asbytes=True), b"\x5a\x2a\x4d\x18\x04\0\0\0abcd"
    for data, count in ((other + frame, 1), (frame + other, 1), (frame + other + frame, 2), (other, 0)):
        (tmp_path / "rows").write_bytes(data)
        assert len(list(read_lines(tmp_path / "rows"))) == count
