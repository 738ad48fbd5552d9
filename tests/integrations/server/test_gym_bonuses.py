"""Bonuses for short and plain responses, by the formulas of NeMo-Gym's genrm_compare."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.integrations.server import ServeSettings
from rmcore.integrations.server.gym_bonuses import GymBonuses, Shape, bonuses_of

SHAPES = [Shape(10, 40, 0.0), Shape(30, 20, 0.1), Shape(0, 60, 0.2), Shape(20, 30, 0.05)]


def test_what_is_short_is_given_more_and_the_rest_less():
    rewards = [3.0, 3.0, 3.0, 3.0]
    longest_first = GymBonuses(group_answer_length_penalty_coeff=0.4).applied(rewards, SHAPES)
    # 1 − (length − 20)/40 = 0.5, 1, 0, 0.75; their mean is 0.5625
    assert longest_first == pytest.approx([3 - 0.025, 3 + 0.175, 3 - 0.225, 3 + 0.075])
    styled = GymBonuses(group_style_penalty_coeff=1.0).applied(rewards, SHAPES)
    assert styled == pytest.approx([3 + 0.4375, 3 - 0.0625, 3 - 0.5625, 3 + 0.1875])
    assert GymBonuses(group_reasoning_length_penalty_coeff=3.0).applied(rewards, SHAPES)[2] > 3  # none is the shortest


def test_the_shortest_gets_a_bonus_only_if_it_is_among_the_best():
    assert GymBonuses(answer_bonus=0.5).applied([3, 4, 1, 2], SHAPES) == [3, 4.5, 1, 2]
    assert GymBonuses(answer_bonus=0.5).applied([4, 3, 1, 2], SHAPES) == [4, 3, 1, 2]
    assert GymBonuses(answer_bonus=0.5, top_percentile=0.5).applied([4, 3, 1, 2], SHAPES) == [4, 3.5, 1, 2]
    assert GymBonuses(reasoning_bonus=0.5).applied([4, 3, 1, 2], SHAPES) == [4.5, 3, 1, 2]  # no reasoning is not short


def test_who_has_no_reward_is_not_compared():
    found = GymBonuses(answer_bonus=1.0, group_answer_length_penalty_coeff=1.0).applied([3, math.nan, 3, 3], SHAPES)
    assert math.isnan(found[1])
    assert found[0] + found[2] + found[3] == pytest.approx(10)  # nine, and the bonus of the shortest of three
    assert max(found[0], found[2]) < found[3]


@given(st.lists(st.tuples(st.floats(1, 5), st.integers(0, 9), st.integers(0, 9), st.floats(0, 1)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_penalties_add_up_to_nothing(rows):
    bonuses = GymBonuses(0, 0, 0.2, 0.3, 0.2, 0.1)
    rewards, shapes = [row[0] for row in rows], [Shape(*row[1:]) for row in rows]
    found = bonuses.applied(rewards, shapes)
    assert sum(found) == pytest.approx(sum(rewards))
    assert len(rows) > 1 or found == rewards


def test_what_is_counted_as_style():
    text = "# Head\n\n1. one\n  - two\n**bold** and __bold__ \U0001f600\n```\n# code\n- code\n```\n"
    prose = "# Head\n\n1. one\n  - two\n**bold** and __bold__ \U0001f600"
    assert Shape.of(" why ", text) == Shape(3, len(text.strip()), 6 / len(prose))
    assert Shape.of("", "```\n# only code\n```").style == 0


@pytest.mark.parametrize("text", ["\n" * 200_000, "**" + "a" * 200_000, "`" * 200_001, "- " * 100_000, " " * 200_000])
def test_any_text_is_counted_in_no_time(text):
    began = time.process_time()
    Shape.of("", text)
    assert time.process_time() - began < 0.5


def test_names_and_numbers_are_checked():
    assert bonuses_of(["answer_bonus=0.5", "top_percentile=0.4"]) == GymBonuses(answer_bonus=0.5, top_percentile=0.4)
    assert not GymBonuses(top_percentile=0.9)
    for pair, says in (("bonus=1", "answer_bonus"), ("answer_bonus", "a number"), ("answer_bonus=x", "a number")):
        with pytest.raises(InputError, match=says):
            bonuses_of([pair])
    for more in ({"answer_bonus": -1.0}, {"answer_bonus": math.inf}, {"top_percentile": 2.0}, {"answer_bonus": True}):
        with pytest.raises(InputError, match=next(iter(more))):
            GymBonuses(**more)
    with pytest.raises(InputError, match="nemo_gym"):
        ServeSettings(gym_bonuses=GymBonuses(answer_bonus=1.0))
