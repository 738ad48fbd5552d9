"""A budget's state, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
from support.budgets import usage
from support.clocks import SetClock

from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.routing import Budget

# ------------------------------------------------------------------------------------ state and misuse


def full_budget(clock: SetClock, per: str = "minute") -> Budget:
    budget = Budget(500, "tokens", per, first_estimate=20, clock=clock)
    for cost in (10, 30, 25):
        budget.settle(budget.reserve(2), usage("tokens", cost))
        clock.time += 10.0
    budget.reserve(40)
    return budget


@pytest.mark.parametrize("per", ["run", "step", "minute"])
def test_a_restored_budget_continues_as_if_nothing_had_happened(per):
    clock = SetClock()
    budget, other = full_budget(clock, per), None
    budget.settle(budget.reserve(1), usage("tokens", 7))
    state = json.loads(json.dumps(budget.state_dict(), allow_nan=False))
    elsewhere = SetClock(77_777.0)  # monotonic time means nothing on another machine
    other = Budget(500, "tokens", per, first_estimate=20, clock=elsewhere)
    other.load_state_dict(state)
    assert other.stats().left == budget.stats().left
    assert other.stats().spent == budget.stats().spent + budget.stats().reserved
    assert other.stats().per_pair == budget.stats().per_pair
    assert other.stats().mean_per_pair == budget.stats().mean_per_pair
    clock.time += 35.0
    elsewhere.time += 35.0
    assert other.stats().left == budget.stats().left
    other.settle(other.reserve(1), None)
    assert other.state_dict()["next_id"] == budget.state_dict()["next_id"] + 1


def test_the_limit_may_be_another_after_a_restart():
    budget = Budget(10, "calls")
    budget.settle(budget.reserve(5), None)
    more, less = Budget(14, "calls"), Budget(3, "calls")
    for new in (more, less):
        new.load_state_dict(budget.state_dict())
    assert more.reserve(9).pairs == 2
    assert less.reserve(1).pairs == 0
    assert less.stats().left == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"unit": "calls"},
        {"per": "run"},
        {"spent": -1},
        {"spent": 1.5},
        {"spent": True},
        {"spent": None},
        {"total": "12"},
        {"window": {}},
        {"window": [[1.0, 2.0, 3]]},
        {"window": [[2.0, 1.0, -3]]},
        {"window": [[2.0, 1.0]]},
        {"window": [[math.nan, 1.0, 3]]},
        {"window": [[2.0, 1.0, 3.5]]},
        {"recent": [-1]},
        {"recent": [1.5]},
        {"mean": -1.0},
        {"mean": "inf"},
        {"next_id": 0},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    budget = Budget(500, "tokens", "minute", first_estimate=20, clock=SetClock())
    good = full_budget(SetClock()).state_dict()
    before = budget.stats()
    with pytest.raises(CheckpointError, match="budget"):
        budget.load_state_dict({**good, **damage})
    assert budget.stats() == before


def test_a_state_must_be_whole():
    budget = Budget(500, "tokens", "minute", first_estimate=20, clock=SetClock())
    good = full_budget(SetClock()).state_dict()
    for name in good:
        with pytest.raises(CheckpointError, match=f"fields missing .'{name}'"):
            budget.load_state_dict({k: v for k, v in good.items() if k != name})
    for foreign in (None, [], "{}", 3):
        with pytest.raises(CheckpointError, match="expected an object"):
            budget.load_state_dict(foreign)


def test_a_state_is_not_loaded_over_what_is_in_flight():
    budget = Budget(10)
    state = budget.state_dict()
    reservation = budget.reserve(1)
    with pytest.raises(InputError, match="1 reservations in flight"):
        budget.load_state_dict(state)
    budget.settle(reservation, None)
    budget.load_state_dict(state)
    assert budget.stats().left == 10


def test_reservations_are_settled_once_and_where_they_belong():
    budget, other = Budget(100), Budget(100)
    reservation, foreign = budget.reserve(3), other.reserve(4)
    for wrong in (foreign, None, 1):
        with pytest.raises(InputError, match="reservation"):
            budget.settle(wrong, None)
    with pytest.raises(InputError, match="usage: got dict"):
        budget.settle(reservation, {"calls": 1})
    with pytest.raises(InputError, match="pairs: got 4, expected an integer from 0 to the reservation's 3"):
        budget.shrink(reservation, 4)
    assert budget.stats().reserved == 6  # none of it did anything
    smaller = budget.shrink(reservation, 2)
    with pytest.raises(InputError, match="settled before"):
        budget.settle(reservation, None)
    budget.settle(smaller, None)
    with pytest.raises(InputError, match="settled before"):
        budget.settle(smaller, None)
    assert budget.stats().total == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"limit": -1}, "limit"),
        ({"limit": 1.5}, "limit"),
        ({"limit": math.inf}, "limit"),
        ({"limit": math.nan, "unit": "cost", "max_per_pair": 1}, "limit"),
        ({"limit": True}, "limit"),
        ({"limit": "10"}, "limit"),
        ({"limit": 1, "unit": "dollars"}, "unit"),
        ({"limit": 1, "per": "week"}, "per"),
        ({"limit": 1, "max_per_pair": 0}, "max_per_pair"),
        ({"limit": 1, "unit": "tokens", "first_estimate": 0}, "first_estimate"),
        ({"limit": 1, "unit": "cost", "max_per_pair": 1e-12}, "max_per_pair"),
        ({"limit": 1, "unit": "cost"}, "nothing is known about prices"),
        ({"limit": 1, "unit": "tokens", "first_estimate": 5, "max_per_pair": 5}, "at most one"),
        ({"limit": 1, "unit": "pairs", "max_per_pair": 2}, "a pair is one pair"),
    ],
)
def test_bad_settings(arguments, named):
    with pytest.raises(InputError, match=named):
        Budget(**arguments)


@pytest.mark.parametrize("pairs", [-1, 1.0, True, None])
def test_bad_numbers_of_pairs(pairs):
    with pytest.raises(InputError, match="pairs"):
        Budget(10).reserve(pairs)


def test_a_limit_of_zero_allows_nothing():
    assert Budget(0).reserve(3).pairs == 0
