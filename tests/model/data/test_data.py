"""The readers: every documented shape is read, every bad line is named by number and reason."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest

from rmcore._base.errors import DataError, InputError
from rmcore.model.data import parse_group, parse_preference, read_groups, read_preferences

USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def test_plain_and_conversational_preferences_are_the_same_pair() -> None:
    plain = parse_preference({"prompt": "hi", "chosen": "yes", "rejected": "no"})
    explicit = parse_preference({"prompt": [USER], "chosen": [YES], "rejected": [NO]})
    implicit = parse_preference({"chosen": [USER, YES], "rejected": [USER, NO]})
    assert (plain.chosen, plain.rejected) == (explicit.chosen, explicit.rejected) == ("yes", "no")
    assert explicit.prompt == implicit.prompt == [USER]
    assert (implicit.chosen, implicit.rejected) == ("yes", "no")


def test_soft_labels_are_kept_and_words_are_not_mistaken_for_them() -> None:
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    assert parse_preference({**row, "label": 0.75}).label == 0.75
    assert parse_preference({**row, "label": "human-majority"}).label == 1.0


def test_an_implicit_prompt_keeps_at_least_one_message_as_the_response() -> None:
    row = parse_preference({"chosen": [USER, YES], "rejected": [USER, YES]})
    assert row.prompt == [USER]
    assert row.chosen == row.rejected == "yes"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "hi", "chosen": "yes"}, "rejected: missing"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "prompt"),
        ({"prompt": "hi", "chosen": ["a"], "rejected": "b"}, "chosen"),
        ({"prompt": "hi", "chosen": [USER, YES], "rejected": "b"}, "chosen: got a whole conversation"),
        ({"prompt": "bye", "chosen": [USER, YES], "rejected": [USER, NO]}, "prompt: got another prompt"),
        ({"prompt": [YES], "chosen": [USER, YES], "rejected": [USER, NO]}, "prompt: got another prompt"),
        ({"chosen": "a", "rejected": "b"}, "prompt: missing"),
        ({"chosen": [YES], "rejected": [NO]}, "prompt: missing"),
    ],
)
def test_bad_preferences_say_which_key_is_wrong(row: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_preference(row)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "hi"}, "responses: missing"),
        ({"prompt": "hi", "responses": []}, "responses: got an empty list"),
        ({"prompt": "hi", "responses": "yes"}, "responses: got a str"),
        ({"prompt": "hi", "responses": ["a", 3]}, r"responses\[1\]: got int"),
        ({"prompt": "hi", "responses": ["a"], "id": {}}, "id: got an object"),
        ({"prompt": "hi", "responses": ["a"], "id": True}, "id: got a bool"),
    ],
)
def test_bad_groups_say_which_key_is_wrong(row: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_group(row)


def test_groups_keep_their_id_and_line(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.write(json.dumps({"prompt": "a", "responses": ["x"], "id": 0}) + "\n\n")
        stream.write(json.dumps({"prompt": "b", "responses": [[YES]]}) + "\n")
    first, second = read_groups(path)
    assert (first.id, first.line, first.responses) == (0, 1, ("x",))
    assert (second.id, second.line, second.responses) == (None, 3, ("yes",))


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{oops\n', 2, "not JSON"),
        (b"\n[1]\n", 2, "got a JSON list"),
        (b'{"prompt": "\xff"}\n', 1, "not UTF-8"),
        (b'{"prompt": "a", "chosen": "b"}\n', 1, "rejected: missing"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, content: bytes, line: int, says: str) -> None:
    path = tmp_path / "prefs with space.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        list(read_preferences(path))
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_lines_before_a_bad_one_are_yielded(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\nnot json\n')
    reader = read_preferences(path)
    assert next(reader).prompt == "a"
    with pytest.raises(DataError):
        next(reader)


def test_truncated_gzip_and_missing_file_are_data_errors(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 100)
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(whole[:-12])
    with pytest.raises(DataError, match="gzip"):
        list(read_preferences(path))
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        list(read_preferences(tmp_path / "nowhere.jsonl"))


def test_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a", "responses": ["x", "y"]}\n'))
    assert next(read_groups("-")).responses == ("x", "y")
