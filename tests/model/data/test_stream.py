"""Streams: mixed by weight, duplicates found in bounded memory, prompts held out by their hash, everything counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.model import Preference
from rmcore.model.data import stream as streams
from rmcore.model.data.mixture import DataReport, DataSource
from rmcore.model.data.stream import SeenPairs, held_out_pairs, stream


@pytest.fixture
def file_of(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text(
            "\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows)
        )
        return DataSource(str(path), weight=3.0 if name.startswith("a") else 1.0)

    return write


def test_a_stream_mixes_by_weight_and_ends_when_all_have(file_of):
    first = file_of("a.jsonl", [("p", f"a{k}", "no") for k in range(300)])
    second = file_of("b.jsonl", [("p", f"b{k}", "no") for k in range(300)])
    pairs = list(stream([first, second], seed=1))
    assert len(pairs) == 600
    begun = Counter(p.chosen[0] for p in pairs[:200])
    assert 125 <= begun["a"] <= 175
    assert [p.chosen for p in pairs if p.chosen[0] == "b"] == [f"b{k}" for k in range(300)]


def test_duplicates_and_contradictions_are_counted_anew_in_each_pass(file_of):
    rows = [("p", "yes", "no"), ("q", "yes", "no"), ("p", "yes", "no"), ("q", "no", "yes"), ("p", "yes", "no")]
    report = DataReport([])
    sources = [file_of("b.jsonl", rows)]
    for _ in range(2):
        found = list(stream(sources, report=report))
        assert [p.prompt for p in found] == ["p", "q", "q"]
        (one,) = report.sources
        assert (one.read, one.duplicates, one.contradicted, one.taken, report.trained) == (5, 2, 1, 3, 3)
    assert len(list(stream(sources, remembered=0))) == 5
    rows = [(name, "yes", "no") for name in "pqrstp"]
    assert len(list(stream([file_of("b.jsonl", rows)], remembered=2))) == 6  # the first is forgotten by its second time
    assert len(list(stream([file_of("b.jsonl", rows)], remembered=20))) == 5


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(2, 20))
def test_what_was_seen_lately_is_known_for_certain(numbers, most):
    """Against a list: the last most // 2 distinct ones are known, nothing that never came, and none of long ago."""
    seen, distinct = SeenPairs(most), []
    for number in numbers:
        known = seen.add(number)
        if number in distinct[-(most // 2) :]:
            assert known
        if known:
            assert number in distinct
        else:
            distinct.append(number)
        assert number in seen
    assert sum(number in seen for number in set(distinct)) <= max(most, 1)
    assert -1 not in seen


def test_memory_stays_within_what_was_asked_for():
    seen = SeenPairs(1000)
    before = len(seen._new)
    assert not any(seen.add(k) for k in range(5000))
    assert len(seen._new) == len(seen._old) == before <= 2048
    assert seen.add(4999)
    assert not seen.add(0)  # forgotten long ago


def test_two_keys_of_one_place_are_told_apart(monkeypatch):
    """A table that wraps round, a hash of zero, and one that two keys share, which passes for a duplicate."""
    monkeypatch.setattr(streams, "hashed", {"last": 15, "behind": 31, "zero": 0, "one": 16, "same": 15}.__getitem__)
    seen = SeenPairs(12)
    assert seen._slots == 16
    assert [seen.add(key) for key in ("last", "behind", "zero", "one")] == [False] * 4
    assert all(key in seen for key in ("last", "behind", "zero", "one"))
    assert seen.add("same")


def test_a_prompt_is_held_out_whole_and_always(file_of):
    rows = [(f"p{k % 200}", f"yes {k}", "no") for k in range(600)]
    sources = [file_of("a.jsonl", rows), file_of("b.jsonl", rows[:50])]
    report = DataReport([])
    train = list(stream(sources, held_out=0.2, seed=3, report=report))
    held = held_out_pairs(sources, 0.2, 1000, seed=3)
    prompts = {p.prompt for p in held}
    assert 25 <= len(prompts) <= 55
    assert not prompts & {p.prompt for p in train}
    assert len(train) + len(held) == 600
    assert report.held_out == len(held)
    assert held_out_pairs(sources, 0.2, 5, seed=3) == held[:5]
    other = held_out_pairs(sources, 0.2, 1000, seed=4)
    assert {p.prompt for p in other} != prompts
    assert all(isinstance(p, Preference) for p in other)


def test_what_does_not_fit_is_named(file_of):
    sources = [file_of("a.jsonl", [("p", "yes", "no")])]
    for share in (-0.1, 1.0, True):
        with pytest.raises(InputError, match=r"^held_out"):
            list(stream(sources, held_out=share))
    for arguments, name in (((0.0, 5), "held_out"), ((0.5, 0), "held_out_pairs"), ((1e-9, 5), "held_out")):
        with pytest.raises(InputError, match=f"^{name}"):
            held_out_pairs(sources, *arguments)
    with pytest.raises(InputError, match=r"^most"):
        SeenPairs(1)
