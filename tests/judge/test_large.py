"""Work on large texts leaves the event loop free: it is done in threads, and in pieces that let others have their turn.

What is asserted is where the work is done and how large its pieces are; times depend on the machine.
"""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore.judge import ChatJudge, Pair, keys, large
from rmcore.judge.large import LARGE, ascii_json, is_large
from rmcore.judge.question import contract, rules, sanitise

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


def test_patterns_are_given_short_pieces():
    """So that one call into C is over in a moment; it keeps the interpreter's lock until it is."""
    assert sanitise._CHUNK + sanitise._REACH <= LARGE
    assert max(len(piece) for piece in large.pieces("x" * 1_000_000)) == large.PIECE
