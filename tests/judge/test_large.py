"""Work on large texts leaves the event loop free: it is done in threads, and in pieces that let others have their turn.

What is asserted is where the work is done and how large its pieces are; times depend on the machine.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base import large
from rmcore._base.client import error_body
from rmcore._base.large import LARGE, ascii_json, is_large
from rmcore.judge import ChatJudge, Pair, chat, keys
from rmcore.judge.client import chat_client, exchange
from rmcore.judge.question import contract, dialect, rules, sanitise
from rmcore.judge.question.contract import find_contract

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.booleans())
def test_json_in_pieces_is_the_same_json(value, sort_keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "PIECE", 3)
        patch.setattr(large, "LARGE", 9)
        assert ascii_json(value, sort_keys=sort_keys) == json.dumps(value, sort_keys=sort_keys)
        compact = json.dumps(value, sort_keys=sort_keys, separators=(",", ":"))
        assert ascii_json(value, sort_keys=sort_keys, compact=True) == compact


@given(st.text(max_size=60))
def test_sanitising_in_pieces_is_the_same(text):
    whole = sanitise.sanitise(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "PIECE", 2)
        assert sanitise.sanitise(text) == whole


def test_what_is_large():
    assert not is_large("x" * (LARGE // 2), 3, None)
    assert is_large("x" * (LARGE // 2), ["y" * (LARGE // 2)])
    assert is_large(Pair("p", "x" * LARGE, "b"))
    assert is_large([{"content": ""}] * LARGE)
    assert not is_large(Pair("p", "a", "b"))


@pytest.mark.parametrize("unit", ['\u2039        "', "x", "\u241b", "\u202e\u754c", "<|", "[INST]", "\ud800"])
def test_nothing_large_is_done_on_the_loop(unit, monkeypatch, tmp_path):
    """Over a text of a megabyte, each of the steps that look at all of it, with a store and without."""
    where: dict[str, set[int]] = {}

    def watch(module, name):
        real = getattr(module, name)

        def watched(*args, **kwargs):
            if is_large(*args):
                where.setdefault(name, set()).add(threading.get_ident())
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(sanitise, "sanitise")
    watch(contract, "draw")
    watch(keys, "ascii_json")
    watch(large, "ascii_json")
    watch(rules, "canonical_response")
    for module, name in (("rmcore.judge.question.prompt", "sanitise"), ("rmcore.judge.question.prompt", "draw")):
        monkeypatch.setattr(f"{module}.{name}", {"sanitise": sanitise.sanitise, "draw": contract.draw}[name])

    async def complete(messages, **parameters):
        return "no verdict"

    async def run():
        judge = ChatJudge(complete=complete, model="m", judge_id="j", store=tmp_path / "v.db", orders="one")
        async with judge:
            await judge.judge([Pair("p", unit * (1_000_000 // len(unit)), "b")])
        return threading.get_ident()

    loop = asyncio.run(run())
    assert {"sanitise", "draw", "ascii_json", "canonical_response"} <= where.keys()
    assert not [name for name, threads in where.items() if loop in threads]


@pytest.mark.parametrize("form", ["text", "object", "parts"])
def test_a_large_reply_is_not_read_on_the_loop(form, monkeypatch, tmp_path):
    where: dict[str, set[int]] = {}

    def watch(module, name):
        real = getattr(module, name)

        def watched(*args, **kwargs):
            where.setdefault(name, set()).add(threading.get_ident())
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    async def complete(messages, **parameters):
        watch(dialect, "parse_verdict")  # not before: short replies are read where they come
        watch(dialect, "soft_preference")
        watch(exchange, "_object_finished")
        watch(chat_client, "read_completion")
        watch(error_body, "read_json")
        watch(chat, "reply_text")
        watch(chat, "without_secret")
        _, contract = find_contract(messages[0]["content"])
        text = "a critique in some words " * 8000
        said = f"{text}<verdict>{contract['win']}</verdict>"
        if form == "object":
            said = json.dumps({"critique": text, "verdict": contract["win"]})
        content = [{"type": "text", "text": said}] if form == "parts" else said
        return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}

    async def run():
        judge = ChatJudge(
            complete=complete, model="m", judge_id="j", store=tmp_path / "v.db", orders="one", soft=True,
            output="json_schema" if form == "object" else "text",
        )  # fmt: skip
        async with judge:
            (verdict,) = await judge.judge([Pair("p", "a", "b")])
        return verdict, threading.get_ident()

    verdict, loop = asyncio.run(run())
    assert verdict.preference in (1.0, -1.0)
    expected = {"parse_verdict", "soft_preference", "_object_finished", "read_completion", "read_json", "reply_text"}
    assert where.keys() == expected | {"without_secret"}
    assert len(where.pop("without_secret")) == 2, "on the loop for the critique, which is short"
    assert not [name for name, threads in where.items() if loop in threads]


def test_patterns_are_given_short_pieces():
    """So that one call into C is over in a moment; it keeps the interpreter's lock until it is."""
    assert sanitise._CHUNK + sanitise._REACH <= LARGE
    assert max(len(piece) for piece in large.pieces("x" * 1_000_000)) == large.PIECE


def _json_or_error(read, text, **how):
    try:
        return repr(read(text, **how))
    except (ValueError, RecursionError):
        return "no JSON"


@given(JSON, st.booleans(), st.integers(0, 3), st.data())
def test_json_is_read_in_pieces_as_it_is_in_one(value, ascii_only, indent, data):
    """Also where it is damaged: cut off, or with one character too many, of which escapes break most."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent or None)
    at = data.draw(st.integers(0, len(text)))
    damaged = [text, text[:at], text[:at] + data.draw(st.sampled_from(list('"\\,[]{}:0e-u\x00 '))) + text[at:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "PIECE", 16)
        for one in damaged:
            for hook in (None, tuple):
                assert _json_or_error(large.read_json, one, object_pairs_hook=hook) == _json_or_error(
                    json.loads, one, object_pairs_hook=hook
                )


TOKEN = {"token": " a\ud800", "logprob": -0.5, "bytes": [32, 97], "top_logprobs": [{"token": " a", "logprob": -0.5}]}


@given(JSON, st.integers(0, 40), st.booleans())
def test_what_is_left_unread_is_whole(value, size, nested):
    """Of long lists only, and only objects with the field."""
    entry = {"7": {"logprob": -1.0, "rank": 1}} if nested else TOKEN
    whole = {"a": [value, *[entry] * size], "b": entry}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "PIECE", 64)
        found = large.read_json(json.dumps(whole), unread="logprob")
    assert found["b"] == entry, "in no list"
    left = [one for one in found["a"] if isinstance(one, bytes)]
    assert len(left) == size or len(json.dumps(whole)) <= 64 or len(json.dumps(whole["a"])) <= 64
    assert [json.loads(one) if isinstance(one, bytes) else one for one in found["a"]] == whole["a"]


@pytest.mark.parametrize("unit", ["[]", "{}", '""', "null", "[[]]", '{"a": []}'])
def test_a_large_text_of_too_many_values_is_refused_early(unit, monkeypatch):
    monkeypatch.setattr(large, "PIECE", 1024)
    for most in (100, 5000):
        few, many = (f"[{unit}{f', {unit}' * n}]" for n in (most // 3, 3 * most))
        assert large.read_json(few, most_values=most) == json.loads(few)
        if len(many) > 1024:
            with pytest.raises(large.TooManyValuesError, match=f"more than {most} lists and objects"):
                large.read_json(many, most_values=most)


def test_numbers_are_no_values_to_the_collector():
    numbers = [0, -1, 2.5, 1e-7] * 100_000
    assert large.read_json(json.dumps({"data": numbers}), most_values=10) == {"data": numbers}


def test_log_probabilities_of_a_long_answer_do_not_become_objects():
    """Objects by the hundred thousand make the collector look at every object of the process, in one piece."""
    body = json.dumps({"choices": [{"logprobs": {"content": [TOKEN] * 3000}}]}).encode()
    gc.collect()
    collections: list[int] = []

    def note(phase, info):
        if phase == "start":
            collections.append(info["generation"])

    gc.callbacks.append(note)
    try:
        found = error_body.read_reply(body)
    finally:
        gc.callbacks.remove(note)
    assert isinstance(found, dict)
    assert len(collections) < 10, "39,000 objects would be 55"
    assert 2 not in collections


def test_large_work_is_done_one_after_the_other_and_huge_work_apart():
    running: Counter[bool] = Counter()
    most: Counter[bool] = Counter()
    both = threading.Barrier(2)  # a huge text does not keep the others waiting

    def work(text):
        huge = len(text) >= large.HUGE
        running[huge] += 1
        most[huge] = max(most[huge], running[huge])
        both.wait(60)
        running[huge] -= 1

    async def run():
        texts = ["x" * LARGE, "x" * large.HUGE] * 4
        await asyncio.gather(*(large.call(work, text) for text in texts))

    asyncio.run(run())
    asyncio.run(run())  # another loop has lanes of its own
    assert most == {False: 1, True: 1}


@given(st.lists(st.sampled_from(["\\ud83d", "\\ude00", "\\\\", "u", "\\u0041", "\ud83d", "\ude00", "d8", "\\n"])))
def test_escapes_are_not_taken_apart(parts):
    text = json.dumps(None) if not parts else '["' + "".join(parts) + '"]'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "PIECE", 16)
        assert _json_or_error(large.read_json, text) == _json_or_error(json.loads, text)


@given(st.text("ab<>/ ", max_size=60), st.integers(1, 7))
def test_matches_in_pieces_are_the_same(text, window):
    pattern = re.compile(r"(?<!a)<[ab]{1,3}>|b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "_WINDOW", window)
        found = [(one.span(), one[0]) for one in large.find_all(pattern, text, 8)]
    assert found == [(one.span(), one[0]) for one in pattern.finditer(text)]
