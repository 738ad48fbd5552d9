"""Replaying verdicts: orders, signs, gaps, files."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import json
import lzma

import pytest

from rmcore._base.errors import DataError, InputError
from rmcore.judge import Judge, Pair, RecordedJudge, Verdict, combine_orders, exchanged, pair_key
from rmcore.judge.orders import shown_exchanged


def answer(judge, prompt, first="a", second="b"):
    return judge.verdict(Pair(prompt, first, second))


def test_it_is_a_judge(recorded, pairs):
    assert isinstance(recorded, Judge)
    verdicts = asyncio.run(recorded.judge(pairs))
    assert len(verdicts) == len(pairs)


@pytest.mark.parametrize(
    ("prompt", "preference", "flipped", "reason"),
    [
        ("p-win", 1, False, ""),
        ("p-loss", -1, False, ""),
        ("p-tie", 0, False, ""),
        ("p-flip", 0, True, ""),
        ("p-soft", 0.5, False, ""),
        ("p-half", 1, False, "one_order:no_verdict"),
        ("p-null", None, False, "no_verdict"),
        ("p-one", 1, False, ""),
        ([{"role": "user", "content": "p-chat"}], -1, False, ""),
        ("unheard of", None, False, "no_record"),
    ],
)
def test_both_orders(recorded, prompt, preference, flipped, reason):
    verdict = answer(recorded, prompt)
    assert (verdict.preference, verdict.flipped, verdict.reason) == (preference, flipped, reason)


def test_exchanging_the_responses_turns_the_sign(recorded, pairs):
    for pair in pairs:
        there, back = recorded.verdict(pair), recorded.verdict(Pair(pair.prompt, pair.second, pair.first))
        assert back == exchanged(there)


def test_a_tie_is_plus_zero(recorded):
    assert str(answer(recorded, "p-tie", "b", "a").preference) == "0.0"
    assert str(exchanged(Verdict.of("tie")).preference) == "0.0"


def test_verdict_is_from_firsts_side_whichever_was_shown_first():
    one = RecordedJudge.from_rows([{"prompt": "p", "first": "x", "second": "y", "verdict": "win", "order": "ba"}])
    two = RecordedJudge({pair_key("p", "y", "x"): "loss"})
    assert one.lookup("p", "x", "y") == two.lookup("p", "x", "y") == Verdict.of("win")


def test_one_order_takes_the_one_the_hash_picks(rows):
    judge = RecordedJudge.from_rows(rows, orders="one")
    pair = Pair("p-flip", "a", "b")
    expected = -1 if shown_exchanged(pair) else 1  # this judge prefers what it sees first
    assert judge.verdict(pair).preference == expected
    assert answer(judge, "p-flip", "b", "a").preference == -expected


def test_the_hash_uses_both_places():
    shown = sum(shown_exchanged(Pair(f"prompt {i}", "a", "b")) for i in range(1000))
    assert 430 < shown < 570
    assert all(
        shown_exchanged(Pair(f"prompt {i}", "a", "b")) != shown_exchanged(Pair(f"prompt {i}", "b", "a"))
        for i in range(50)
    )


def test_one_order_falls_back_to_what_is_recorded(rows):
    assert answer(RecordedJudge.from_rows(rows, orders="one"), "p-one").preference == 1


def test_lookup_never_averages(recorded):
    assert recorded.lookup("p-flip", "a", "b").preference == 1
    assert recorded.lookup("p-flip", "b", "a").preference == 1
    assert recorded.lookup("p-one", "b", "a").preference == -1


def test_a_pair_that_is_not_text_is_a_verdict_with_a_reason(recorded):
    assert answer(recorded, None).reason == "bad_pair"


def test_combining_adds_usage_and_keeps_both_critiques():
    both = combine_orders(Verdict.of("win", critique="one"), Verdict.of("win", critique="two"))
    assert both.critique == "one\n\n[other order: first and second exchanged]\ntwo"
    neither = combine_orders(Verdict.none("timeout"), Verdict.none("refusal"))
    assert neither.reason == "timeout"
    half = combine_orders(Verdict.none("timeout"), Verdict.of("loss"))
    assert (half.preference, half.reason, half.flipped) == (-1, "one_order:timeout", False)


def test_same_record_twice_is_fine_and_a_contradiction_is_not(rows):
    assert len(RecordedJudge.from_rows(rows + rows)) == len(rows)
    mirror = {"prompt": "p-one", "first": "b", "second": "a", "verdict": "win", "order": "ba"}
    with pytest.raises(InputError, match=r"rows\[16\].*already recorded as 'win'"):
        RecordedJudge.from_rows([*rows, mirror])
    with pytest.raises(InputError, match="already recorded"):
        RecordedJudge.from_rows([*rows, rows[0] | {"verdict": None}])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"verdict": "first"}, "verdict"),
        ({"verdict": []}, "verdict"),
        ({"order": "AB"}, "order"),
        ({"order": None}, "order"),
        ({"first": 3}, "first"),
        ({"prompt": []}, "prompt"),
    ],
)
def test_bad_rows_are_named(rows, change, match):
    with pytest.raises(InputError, match=rf"rows\[1\]: {match}"):
        RecordedJudge.from_rows([rows[0], rows[2] | change])


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="verdict: got nothing"):
        RecordedJudge.from_rows([{"prompt": "p", "first": "a", "second": "b"}])


@pytest.mark.parametrize("table", [{"short": "win"}, {"0" * 64: "first"}, {3: "win"}])
def test_bad_mappings(table):
    with pytest.raises(InputError, match="verdicts"):
        RecordedJudge(table)


def test_orders_is_one_of_two_words():
    with pytest.raises(InputError, match="orders"):
        RecordedJudge({}, orders="ab")


@pytest.mark.parametrize("name", ["verdicts.jsonl", "verdicts.jsonl.gz"])
def test_files(tmp_path, rows, pairs, recorded, name):
    data = "\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    read = RecordedJudge.from_file(tmp_path / name)
    assert [read.verdict(pair) for pair in pairs] == [recorded.verdict(pair) for pair in pairs]


@pytest.mark.parametrize("line", [b"{nonsense", b"[1, 2]", b'{"prompt": "p"}', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_bad_line_is_numbered(tmp_path, rows, line):
    path = tmp_path / "v.jsonl"
    path.write_bytes(json.dumps(rows[0]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=r"v\.jsonl:3: ") as caught:
        RecordedJudge.from_file(path)
    assert caught.value.line == 3


def test_a_damaged_gzip_file(tmp_path, rows):
    data = gzip.compress("\n".join(json.dumps(row) for row in rows).encode())
    for name, content in [("cut.gz", data[: len(data) // 2]), ("foreign.gz", b"not gzip at all")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            RecordedJudge.from_file(tmp_path / name)


@pytest.mark.parametrize(
    "pack",
    [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n"), lzma.compress, bz2.compress],
    ids=("a mark", "CRLF", "xz", "bzip2"),
)
def test_files_are_read_as_all_data_is(pack, tmp_path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "v").write_bytes(pack(data))
    assert len(RecordedJudge.from_file(tmp_path / "v")) == len(RecordedJudge.from_rows(rows))


def test_a_row_with_a_field_twice_is_refused(tmp_path):
    (tmp_path / "v").write_text('{"prompt": "p", "first": "a", "second": "b", "verdict": "win", "verdict": "loss"}\n')
    with pytest.raises(DataError, match=r"v:1: not JSON \(the key 'verdict' comes twice\)"):
        RecordedJudge.from_file(tmp_path / "v")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        RecordedJudge.from_file(tmp_path / "none.jsonl")
