"""The journal's file: what older releases wrote still opens, and a line that does not fit says which, where and why."""

from __future__ import annotations

import errno
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.learning.journal import Journal, Version

FILE = "f1" * 32
REPORT = '{"version":1,"pairs":3,"weight":3.0,"surprise":null,"skipped":{"unclear":1},"seconds":0.5}'
# As written before the lines had models.
SAVED = "\n".join(
    [
        '{"event":"open","format":"rmcore-journal","format_version":1,"rmcore_version":"0.1.0","head":{"config":{"h":8}},'
        f'"state":"{"0a" * 32}","count":300,"snapshot":"snapshot-000000.safetensors","snapshot_sha256":"{FILE}"}}',
        f'{{"event":"update","version":1,"parent":0,"state":"{"1b" * 32}","count":303,'
        f'"file":"update-000001.safetensors","sha256":"{FILE}","report":{REPORT}}}',
        f'{{"event":"update","version":2,"parent":1,"state":"{"2c" * 32}","count":306,'
        f'"file":"update-000002.safetensors","sha256":"{FILE}","report":{{}},'
        f'"snapshot":"snapshot-000002.safetensors","snapshot_sha256":"{FILE}"}}',
        '{"event":"revert","version":1}',
        "",
    ]
)


def opened(folder, text):
    (folder / "journal.jsonl").write_text(text)
    journal = Journal(folder)
    journal.close()
    return journal


def test_a_journal_written_before_lines_had_models_still_opens(tmp_path):
    journal = opened(tmp_path, SAVED)
    zero, one, two = journal.versions
    assert zero == Version(0, None, "0a" * 32, 300, snapshot="snapshot-000000.safetensors", snapshot_sha256=FILE)
    assert one == Version(1, 0, "1b" * 32, 303, json.loads(REPORT), "update-000001.safetensors", FILE)
    assert (two.parent, two.snapshot, two.snapshot_sha256) == (1, "snapshot-000002.safetensors", FILE)
    assert (journal.current, journal.identity) == (1, {"config": {"h": 8}})


@pytest.mark.parametrize(
    ("number", "changes", "says"),
    [
        (1, {"format_version": 2}, "got 'rmcore-journal' version 2, expected 'rmcore-journal' 1"),
        (1, {"count": -1}, r"count: got '-1', expected greater than or equal to 0"),
        (1, {"state": "0a"}, r"state: got '0a', expected .*pattern"),
        (2, {"version": True}, r"version: got 'True', expected a valid integer"),
        (2, {"version": 2}, r"got 'version 2 of 0', expected a later one: version 1 was due"),
        (2, {"parent": 1}, r"got 'version 1 of 1', expected a later one"),
        (3, {"parent": 0}, r"parent: got '0', expected 1, the version that was current"),
        (2, {"count": 999}, r"count: got '999', expected its parent's 300 and its pairs"),
        (2, {"parent": None}, r"parent: got 'None', expected a valid integer"),
        (2, {"count": "303"}, r"count: got '303', expected a valid integer"),
        (
            2,
            {"file": "../../passwd"},
            r"file: got '\.\./\.\./passwd', expected the name of a file, none outside the folder",
        ),
        (2, {"file": ""}, r"file: got '', expected .*at least 1 character"),
        (2, {"event": "undo"}, r"expected an object whose event is open, update or revert"),
        (2, {"surprise": 1}, r"fields missing \[\], fields unknown \['surprise'\]"),
        (3, {"snapshot_sha256": None}, r"expected a snapshot with its sha256, or neither"),
        (4, {"version": 3}, r"version: got '3', expected one of the 3 versions before it"),
        (4, {"event": "open"}, r"got None version None, expected 'rmcore-journal' 1"),
    ],
    ids=str,
)
def test_a_line_that_does_not_fit_names_file_line_and_field(number, changes, says, tmp_path):
    lines = SAVED.split("\n")
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})
    with pytest.raises(CheckpointError, match=rf"journal\.jsonl:{number}[.:]") as caught:
        opened(tmp_path, "\n".join(lines))
    caught.match(says)


@pytest.mark.parametrize("line", ["[]", "3", "null", '"open"', "{", "[" * 20_000])
def test_what_is_no_object_is_refused_by_line(line, tmp_path):
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2: got "):
        opened(tmp_path, SAVED.split("\n")[0] + f"\n{line}\n")


def held(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


LINES = SAVED.encode().split(b"\n")[:-1]
FILES = ["snapshot-000000", "update-000001", "update-000002", "snapshot-000002"]
DAMAGED = {
    "empty": (b"", r"journal\.jsonl: got lines of 0 versions beside (update|snapshot)-000002"),
    "its last lines missing": (b"\n".join([*LINES[:1], b""]), r"journal\.jsonl: got lines of 1 versions beside"),
    "another text": (b"hello", r"journal\.jsonl:1: got b'hello', and no line's end"),
    "another text behind": (SAVED.encode() + b"x = 1", r"journal\.jsonl:5: got b'x = 1'"),
    "garbage between": (b"\n".join([LINES[0], b"\x00\xff\x17", *LINES[1:], b""]), r"jsonl:2: got a line that is not"),
    "a blank line": (b"\n".join([LINES[0], b"", *LINES[1:], b""]), r"journal\.jsonl:2: got a line that is not JSON"),
    "half a row": (b"\n".join([LINES[0], LINES[1][:50], *LINES[2:], b""]), r"journal\.jsonl:2: got a line that is not"),
    "two rows in one": (b"\n".join([LINES[0], LINES[1] + LINES[2], b""]), r"journal\.jsonl:2: got a line that is not"),
    "duplicated": (b"\n".join([*LINES[:2], *LINES[1:], b""]), r"journal\.jsonl:3: got 'version 1 of 0'"),
    "another order": (b"\n".join([LINES[0], LINES[2], LINES[1], b""]), r"journal\.jsonl:2: got 'version 2 of 1'"),
    "without its first": (b"\n".join([*LINES[1:], b""]), r"journal\.jsonl:1: got 'version 1 of 0'"),
    "a field twice": (
        SAVED.encode().replace(b'"parent":0', b'"parent":0,"parent":0'),
        r"jsonl:2: .*the key .parent. comes twice",
    ),
    "UTF-16": (SAVED.encode("utf-16"), r"journal\.jsonl:1: got a line that is not JSON"),
    "a reversion moved": (
        b"\n".join([*LINES, LINES[2].replace(b'"version":2,"parent":1', b'"version":3,"parent":2'), b""]),
        r"journal\.jsonl:5\.parent: got '2', expected 1",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_told_by_file_and_line_and_nothing_is_touched(kind, tmp_path):
    content, says = DAMAGED[kind]
    for name in FILES:
        (tmp_path / f"{name}.safetensors").write_bytes(b"tensors")
    (tmp_path / "journal.jsonl").write_bytes(content)
    before = held(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        Journal(tmp_path)
    assert held(tmp_path) == before


@pytest.mark.parametrize(
    "change", [lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\xef\xbb\xbf" + b], ids=["CRLF", "BOM"]
)
def test_what_an_editor_adds_changes_nothing(change, tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(change(SAVED.encode()))
    before = held(tmp_path)
    with closing(Journal(tmp_path)) as journal:
        assert (journal.current, len(journal.versions)) == (1, 3)
        assert held(tmp_path) == before
        journal.revert(2)
    with closing(Journal(tmp_path)) as journal:
        assert journal.current == 2


def test_a_line_that_a_crash_cut_off_stays_till_the_next_is_written(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(SAVED.encode() + b'{"event":"upd\0\0\0')
    before = held(tmp_path)
    with closing(Journal(tmp_path)) as journal:
        assert held(tmp_path) == before
        journal.revert(0)
    assert (tmp_path / "journal.jsonl").read_text() == SAVED + '{"event":"revert","version":0}\n'


def test_a_journal_that_goes_or_changes_during_the_run_is_noticed(tmp_path):
    def remove(file):
        file.unlink()

    def remove_folder(file):
        shutil.rmtree(file.parent)

    def replace(file):
        file.with_name("new").write_bytes(file.read_bytes())
        file.with_name("new").replace(file)

    def append(file):
        file.write_bytes(file.read_bytes() + b'{"event":"revert","version":0}\n')

    for number, change in enumerate((remove, remove_folder, replace, append)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "journal.jsonl").write_text(SAVED)
        with closing(Journal(folder)) as journal:
            change(folder / "journal.jsonl")
            after = held(folder) if folder.is_dir() else None
            with pytest.raises(CheckpointError, match=r"journal\.jsonl: (gone|changed by somebody else) since"):
                journal.add("3d" * 32, 309, {}, {"beta": torch.zeros(1)}, None)
            assert (held(folder) if folder.is_dir() else None) == after
            assert journal.current == 1


def test_what_is_no_folder_to_write_in_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"journal: got .*file' \(File exists\), expected a folder that can be written"
    ):
        Journal(tmp_path / "file")
    (tmp_path / "folder" / "journal.jsonl").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"journal\.jsonl: not readable \(Is a directory\)"):
        Journal(tmp_path / "folder")

    def opened(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(InputError, match=r"Read-only file system\), expected a folder that can be written to"):
        Journal(tmp_path / "read-only")


def test_a_second_beginning_is_refused(tmp_path):
    first = SAVED.split("\n")[0]
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2: got 'a second beginning', expected version 1"):
        opened(tmp_path, f"{first}\n{first}\n")
