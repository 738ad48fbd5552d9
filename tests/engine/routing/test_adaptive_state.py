"""A router's state: saved, restored bit for bit, damaged, and of older releases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.adaptive import FREE, busy, drifting, drive, of, route
from support.clocks import SetClock

from rmcore import AdaptiveRouter
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.routing import (
    Budget,
)


@pytest.mark.parametrize("by", ["u", "error_probability"])
def test_a_restored_router_continues_bit_for_bit(by, tmp_path):
    clock, u, rng = SetClock(), np.round(drifting(4_000), 3), np.random.default_rng(12)
    router = busy(clock, by=by)
    drive(router, clock, u, rng, range(7))
    path = tmp_path / "deep" / "router.json"
    router.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["router.json"]
    later = SetClock(clock.time)
    other = busy(later, by=by, seed=99)
    other.load(path)
    assert other.state_dict() == router.state_dict()
    assert other.history == router.history
    assert other.drift() == router.drift()
    rest = np.random.default_rng(13), np.random.default_rng(13)
    assert drive(router, clock, u, rest[0], range(7, 20)) == drive(other, later, u, rest[1], range(7, 20))
    assert other.state_dict() == router.state_dict()
    assert other.history == router.history


def test_a_router_that_died_with_pairs_in_flight_counts_them_as_spent():
    router = AdaptiveRouter(0.5, Budget(100, "calls"))
    _, flying = router.reserve(of(np.linspace(1, 2, 20)))
    state = router.state_dict()
    other = AdaptiveRouter(0.5, Budget(100, "calls"))
    other.load_state_dict(state)
    assert other.budgets[0].stats().spent == 20
    with pytest.raises(InputError, match="reservation"):
        other.settle(flying, FREE)
    with pytest.raises(InputError, match="in flight"):
        router.load_state_dict(state)


def test_target_and_limits_may_be_new_after_a_restart():
    router = AdaptiveRouter(0.5, Budget(10, "calls"))
    route(router, np.linspace(1, 2, 20))
    other = AdaptiveRouter(0.9, Budget(14, "calls"))
    other.load_state_dict(router.state_dict())
    assert route(other, np.linspace(1, 2, 20)).sum() == 2


DAMAGES = [
    ("format", "other"),
    ("version", 2),
    ("version", True),
    ("by", "margin"),
    ("pairs", -1),
    ("owed", math.nan),
    ("owed", None),
    ("threshold", "high"),
    ("next_id", 0),
    ("random", {}),
    ("random", None),
    ("random", {"bit_generator": "MT19937", "state": {}}),
    ("sample", {}),
    ("paces", []),
    ("budgets", []),
    ("budgets", [{}, {}, {}]),
    ("log", None),
]


@pytest.mark.parametrize(("name", "value"), DAMAGES, ids=lambda v: str(v)[:30])
def test_a_damaged_state_is_refused_and_changes_nothing(name, value):
    clock = SetClock()
    good = busy(clock)
    drive(good, clock, drifting(4_000), np.random.default_rng(14), range(3))
    router = busy(SetClock())
    before = router.state_dict()
    with pytest.raises(CheckpointError):
        router.load_state_dict({**good.state_dict(), name: value})
    assert router.state_dict() == before


def _leaves(value, path=()):
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for key, item in enumerate(value) for leaf in _leaves(item, (*path, key))]
    return [path]


def test_every_field_of_a_state_is_checked():
    clock = SetClock()
    good = busy(clock)
    drive(good, clock, drifting(4_000), np.random.default_rng(15), range(2))
    text = json.dumps(good.state_dict())
    router = busy(SetClock())
    before = router.state_dict()
    for path in _leaves(json.loads(text)):
        for wrong in ({"no": 1}, "seven", [None], [[1]]):
            state = json.loads(text)
            place = state
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            with pytest.raises(CheckpointError):
                router.load_state_dict(state)
    assert router.state_dict() == before
    router.load_state_dict(json.loads(text))


SAVED = Path(__file__).parent / "data" / "adaptive_router_v1.json"


def saved_like(clock) -> AdaptiveRouter:
    return busy(clock, half_life=16, warmup=8, history=2)


def test_a_file_saved_before_states_had_models_still_loads():
    router = saved_like(SetClock())
    router.load(SAVED)
    assert router.state_dict() == json.loads(SAVED.read_text())
    assert len(router.history) == 2


@pytest.mark.parametrize(
    ("path", "wrong", "says"),
    [
        (("version",), 2, r"router\.version: got '2', expected 1$"),
        (("format",), "other", r"router\.format: got 'other', expected 'rmcore-adaptive-router'$"),
        (("pairs",), True, r"router\.pairs: got 'True', expected a valid integer$"),
        (("pairs",), 400.0, r"router\.pairs: got '400\.0', expected a valid integer$"),
        (("owed",), "0.5", r"router\.owed: got '0\.5', expected a valid number$"),
        (
            ("budgets", 1, "mean"),
            -1.0,
            r"router\.budgets\[1\]\.mean: got '-1\.0', expected greater than or equal to 0$",
        ),
        (("paces", 1, "since_last"), None, r"router\.paces\[1\]: got .*, expected both times and their arrivals"),
        (("sample", "stamp"), [1], r"router\.sample: got .*, expected as many values as there are masses and stamps$"),
        (("log", "steps", 0, "spend"), {}, r"router\.log\.steps\[0\]\.spend: got '\[\]', expected the budgets"),
        (("random", "state"), {"state": 1}, r"router\.random\.state: fields missing \['inc'\], fields unknown \[\]$"),
        (("sample",), [], r"router\.sample: got list, expected an object$"),
        (("surprise",), 1, r"router: fields missing \[\], fields unknown \['surprise'\]$"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_an_error_names_the_file_the_field_and_what_was_expected(path, wrong, says, tmp_path):
    state = json.loads(SAVED.read_text())
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    file = tmp_path / "router.json"
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=says) as caught:
        saved_like(SetClock()).load(file)
    assert str(caught.value).startswith(f"{file}: router")


def test_a_file_that_is_no_state_is_refused(tmp_path):
    router = AdaptiveRouter(0.1)
    for name, content in (("empty", b""), ("half", b'{"format": "rmco'), ("bytes", b"\xff\xfe\x00"), ("list", b"[]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            router.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="missing"):
        router.load(tmp_path / "missing")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    router = AdaptiveRouter(0.1)
    path = tmp_path / "router.json"
    router.save(path)
    old = path.read_bytes()
    route(router, [1.0, 2.0])

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("rmcore.engine.routing.state.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        router.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
