"""What a group's pairs are judged by can be given with the group."""

from __future__ import annotations

import pytest

from rmcore import RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.routing import AlwaysRoute
from rmcore.judge import RecordedJudge
from rmcore.judge.base import Verdict


class Kept:
    """Keeps the pairs."""

    takes_principles = True

    def __init__(self) -> None:
        self.pairs = []

    async def judge(self, pairs):
        self.pairs += pairs
        return [Verdict.of("win" if pair.principle else "loss") for pair in pairs]


@pytest.fixture
def make_engine(hand_head, table_model):
    def make(judge):
        head = hand_head([1.0, -0.5], "difference")
        return RewardEngine(table_model(head, lambda _, text: [float(x) for x in text.split()]), judge, AlwaysRoute())

    return make


def test_each_groups_pairs_have_its_own(make_engine):
    judge = Kept()
    scores = make_engine(judge).score(
        ["red", "red", 7, "blue"], [["1 0", "2 0"]] * 4, principles=["be kind", "", "x", "be kind"], on_error="return"
    )
    assert list(scores.errors) == [2]
    assert [float(group.preference[0, 1]) > 0 for group in scores] == [True, False, True]
    assert [(pair.prompt, pair.principle) for pair in judge.pairs] == [
        ("red", "be kind"),
        ("red", ""),
        ("blue", "be kind"),
    ]  # equal texts by two principles are two questions


def test_what_does_not_fit_is_named(make_engine):
    groups = ["red", "blue"], [["1 0", "2 0"]] * 2
    for principles, says in (
        (["a"], "principles: got 1, expected 2 texts"),
        ("ab", "principles: got one text"),
        (["a", 1], r"principles\[1\]: got int"),
    ):
        with pytest.raises(InputError, match=says):
            make_engine(Kept()).score(*groups, principles=principles)
    with pytest.raises(InputError, match="no judge that takes them"):
        make_engine(RecordedJudge({})).score(*groups, principles=["", "a"])
    assert len(make_engine(RecordedJudge({})).score(*groups, principles=["", ""])) == 2
