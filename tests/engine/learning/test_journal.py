"""The journal's file: what older releases wrote still opens, and a line that does not fit says which, where and why."""

from __future__ import annotations

import json

import pytest

from rmcore._base.errors import CheckpointError
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


def test_a_second_beginning_is_refused(tmp_path):
    first = SAVED.split("\n")[0]
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2: got 'a second beginning', expected version 1"):
        opened(tmp_path, f"{first}\n{first}\n")
