"""Counts over critiques: what their words prefer, contradictions, repeats, sections."""

from __future__ import annotations

import pytest

from rmcore.judge.critics.stats import critique_stats, sections, stated_preference


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The first response is better because it is right.", "first"),
        ("Overall, Response 2 is more accurate.", "second"),
        ("the SECOND answer was clearly superior", "second"),
        ("The second response is weaker.", "first"),
        ("I would prefer the first response.", "first"),
        ("Response A is better in style, but response B is more correct.", "both"),
        ("If the first response is better, say so.", None),
        ("It is not clear that the first response is better.", None),
        ("Neither is good.", None),
        ("The first response is better-known.", "first"),
        ("The first response is long, the second response is short.", None),
        ("", None),
    ],
)
def test_plain_statements_are_read_and_doubts_are_not(text, said):
    assert stated_preference(text) == said


def test_contradictions_repeats_and_junk_are_counted():
    first, second = "The first response is better, for it is right.", "The second response is better, for it is kind."
    stats = critique_stats(
        [
            (first, 1.0, "a"),
            (first.upper() + "!", -0.4, "b"),
            (second, 1.0, "c"),
            ("Both are long and rather dull to read.", 1.0, "d"),
            (first, 0.0, "tie"),
            (second, None, "no verdict"),
            ("fine", None, ""),
            ("  ", 1.0, ""),
        ]
    )
    told = stats.to_dict()
    assert told["stated"] == {"agrees": 1, "contradicts": 2, "both": 0, "silent": 1}
    assert told["contradictions"] == ["b", "c"]
    assert (told["critiques"], told["empty"], told["repeated"]) == (7, 1, 3)
    assert told["junk"] == {"short": 1}
    assert told["words"]["p50"] == 9.0
    assert critique_stats([]).to_dict()["words"] == {"mean": None, "p50": None, "p95": None}


def test_sections_are_headings_and_items():
    assert sections("# Helpful\nYes.\n\n**Correct**:\n- one\n- two\n3. three\nStyle:\nfine") == 6
    assert sections("Just a sentence: and no more.") == 0
    assert stated_preference("the first response is " * 200_000) is None  # in linear time
