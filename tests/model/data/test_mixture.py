"""Sources by weight, duplicates, held-out prompts: nothing goes missing without being counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.model import Preference
from rmcore.model.data.mixture import DataSource, mix, sources_of, split_by_prompt


@pytest.fixture
def file_of(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text(
            "\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows)
        )
        return str(path)

    return write


def test_weights_duplicates_and_contradictions_are_counted(file_of):
    first = file_of("a.jsonl", [(f"p{k}", "yes", "no") for k in range(10)] + [("p0", "yes", "no")])
    second = file_of("b.jsonl", [("p1", "no", "yes"), ("p2", "yes", "no"), ("q", "a", "b")])
    pairs, held, report = mix([DataSource(first, weight=2.5), DataSource(second, weight=1.0, most=2)])
    assert held == []
    counts = Counter(p.prompt for p in pairs if p.chosen == "yes")
    assert sorted(counts.values()) == [2] * 5 + [3] * 5
    a, b = report.sources
    assert (a.read, a.duplicates, a.contradicted, a.taken) == (11, 1, 0, 25)
    assert (b.read, b.duplicates, b.contradicted, b.taken) == (2, 1, 1, 1)  # q is beyond most
    assert report.trained == len(pairs) == 26
    assert mix([DataSource(first, weight=2.5), DataSource(second, most=2)])[0] == pairs
    assert "| 11 | 1 | 0 | 25 |" in report.to_markdown()


def test_another_label_of_a_pair_is_no_duplicate(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [("yes", "no", 0.9), ("yes", "no", 0.9), ("yes", "no", 0.6), ("no", "yes", 0.5), ("yes", "no", 0.5)]
    path.write_text(
        "".join(json.dumps({"prompt": "p", "chosen": a, "rejected": b, "label": x}) + "\n" for a, b, x in rows)
    )
    pairs, _, report = mix([DataSource(str(path))])
    assert [pair.label for pair in pairs] == [0.9, 0.6, 0.5]
    assert (report.sources[0].duplicates, report.sources[0].contradicted) == (2, 2)


def test_held_out_prompts_are_on_one_side_and_without_weight(file_of):
    path = file_of("a.jsonl", [(f"p{k % 8}", f"yes {k}", "no") for k in range(24)])
    train, held, report = mix([DataSource(path, weight=3.0)], held_out=0.25)
    assert len({p.prompt for p in held}) == report.held_out_prompts == 2
    assert len(held) == report.held_out == 6
    assert len(train) == report.trained == 3 * 18
    assert not {p.prompt for p in held} & {p.prompt for p in train}


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=40).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0.05, 0.95),
    st.integers(0, 3),
)
def test_a_split_loses_nothing_and_shares_no_prompt(prompts, share, seed):
    pairs = [Preference(f"p{prompt}", f"a{k}", "b") for k, prompt in enumerate(prompts)]
    if not 0 < round(share * len(set(prompts))) < len(set(prompts)):
        with pytest.raises(InputError, match=r"^held_out"):
            split_by_prompt(pairs, share, seed=seed)
        return
    train, held, report = split_by_prompt(pairs, share, seed=seed)
    assert Counter(map(id, train)) + Counter(map(id, held)) == Counter(map(id, pairs))
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert len({p.prompt for p in held}) == report.held_out_prompts == round(share * len(set(prompts)))


def test_what_is_left_out_is_told_of_its_source(file_of):
    first = file_of("a.jsonl", [(f"p{k}", "yes", "no") for k in range(3)])
    second = file_of("b.jsonl", [(f"q{k}", "yes", "no") for k in range(4)])
    pairs, _, report = mix([DataSource(first, weight=2.0), DataSource(second)])
    report.leave_out({0: "over-long", 5: "equal responses", 6: "over-long", 9: "over-long"})
    a, b = report.sources
    assert a.left_out == {"over-long": 1, "equal responses": 1}
    assert b.left_out == {"over-long": 2}
    assert report.trained == len(pairs) - 4
    told = report.to_markdown()
    assert "| 6 | 1 equal responses, 1 over-long |" in told
    assert "Left out, since nothing can be learned from them: 1 equal responses, 3 over-long." in told
    assert report.to_dict()["sources"][1]["left_out"] == {"over-long": 2}
    given = [Preference(f"p{k}", "a", "b") for k in range(4)]
    report = split_by_prompt(given, 0.25)[2]  # without sources
    report.leave_out({0: "over-long"})
    assert report.to_markdown().startswith("2 pairs to train on, 1 held out (1 prompts). Left out")


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ("a.jsonl", "datasets: got str"),
        ([], "datasets"),
        ([{"weight": 2}], r"datasets\[0\]"),
        ([{"path": "a", "share": 2}], r"datasets\[0\]"),
        ([{"path": "a", "weight": 0}], "a: weight"),
        ([{"path": "a", "weight": True}], "a: weight"),
        ([{"path": "a", "most": 0}], "a: most"),
    ],
)
def test_sources_that_do_not_fit_are_named(wrong, name):
    with pytest.raises(InputError, match=f"^{name}"):
        sources_of(wrong)


def test_sources_are_names_or_mappings():
    found = sources_of(["a.jsonl", {"path": "hf://x/y", "weight": 0.5, "columns": {"prompt": "question"}}])
    assert [(s.path, s.weight) for s in found] == [("a.jsonl", 1.0), ("hf://x/y", 0.5)]
