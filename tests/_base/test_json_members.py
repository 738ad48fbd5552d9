"""A key that comes twice in a JSON object is refused by name, wherever JSON is read that somebody may have edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import CheckpointError, RmcoreError
from rmcore._base.json_members import DuplicateKeyError, unique_members
from rmcore._base.prompt import json_object
from rmcore.engine.routing.state import read_state
from rmcore.head.checkpoint import read_config
from rmcore.judge.store.prices import PriceTable
from rmcore.model.data import read_rows

KEYS = st.text(max_size=5)
VALUES = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.dictionaries(KEYS, st.integers(), max_size=3))


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=6), st.data())
def test_the_key_is_named_and_everything_else_is_as_json_has_it(members: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps({"outer": [members]})
    assert json.loads(text, object_pairs_hook=unique_members) == json.loads(text)
    key = data.draw(st.sampled_from(list(members)))
    twice = text.replace(json.dumps(members), f"{json.dumps(members)[:-1]}, {json.dumps(key)}: 0}}")
    with pytest.raises(DuplicateKeyError) as error:
        json.loads(twice, object_pairs_hook=unique_members)
    assert str(error.value) == f"the key {key!r:.80} comes twice"


def test_many_keys_take_no_square_of_time() -> None:
    pairs = [(str(k), k) for k in range(200_000)]
    with pytest.raises(DuplicateKeyError, match="'199999' comes twice"):
        unique_members([*pairs, ("199999", 0)])


def test_all_readers_of_edited_files_refuse_it(tmp_path: Path) -> None:
    twice = '{"a": 1, "format": "rmcore", "models": {}, "format": "rmcore", "models": {}}'
    for name in ("rmcore.json", "state.json", "prices.json", "rows.jsonl"):
        (tmp_path / name).write_text(twice + "\n")
    readers = [
        lambda: read_config(tmp_path),
        lambda: read_state(tmp_path / "state.json"),
        lambda: PriceTable.from_file(tmp_path / "prices.json"),
        lambda: list(read_rows(str(tmp_path / "rows.jsonl"))),
    ]
    for read in readers:
        with pytest.raises(RmcoreError, match="the key 'format' comes twice"):
            read()
    assert json_object(twice) is None, "arguments of a call that are given back as the text they were"
    with pytest.raises(CheckpointError):
        read_config(tmp_path)
