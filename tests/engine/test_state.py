"""The state of an engine: a restart goes on where it was, and a state that does not fit is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore import AdaptiveRouter, BudgetRouter, RewardEngine
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.learning import VerdictLearner
from rmcore.engine.learning.judged import JudgedPairs
from rmcore.engine.routing import Budget, Candidates, NeverRoute, RandomRouter, StatefulRouter, ThresholdRouter
from rmcore.head import FrozenHead
from rmcore.judge.base import JudgeUsage, Verdict


class OneCall:
    """Says win, for one call a pair."""

    async def judge(self, pairs):
        return [Verdict.of("win", usage=JudgeUsage(calls=1)) for _ in pairs]


@pytest.fixture(scope="module")
def data(make_data):
    return make_data(dtype=torch.float32)


@pytest.fixture(scope="module")
def head(data, fit_head):
    return fit_head(data)


def engine_of(head, router, learner=None) -> RewardEngine:
    judge = None if isinstance(router, NeverRoute) else OneCall()
    return RewardEngine(head, judge, router, learner=learner)


def score(engine, data, start=0, groups=2):
    texts = [[f"{k} {i}" for i in range(4)] for k in range(groups)]
    rows = data.hidden[start : start + 4 * groups]
    return engine.score_hidden(rows, [4] * groups, prompts=["p"] * groups, responses=texts)


def budgeted(limit=12, seed=0) -> AdaptiveRouter:
    return AdaptiveRouter(0.5, Budget(limit, "calls", max_per_pair=1), seed=seed, warmup=4)


def test_a_spent_budget_stays_spent_after_a_restart(data, head, tmp_path):
    engine = engine_of(head, budgeted())
    calls = sum(score(engine, data, 8 * k).judge_usage.calls for k in range(4))
    assert calls == 12
    engine.save_state(tmp_path / "state.json")
    again = engine_of(head, budgeted())
    again.load_state(tmp_path / "state.json")
    assert again.router.budgets[0].stats().left == 0
    assert score(again, data).judge_usage.calls == 0
    fresh = engine_of(head, budgeted())
    assert score(fresh, data).judge_usage.calls > 0, "without the state it would ask again"


@given(steps=st.integers(0, 4), seed=st.integers(0, 5), kind=st.sampled_from(["adaptive", "random"]))
def test_an_engine_goes_on_as_if_it_had_never_stopped(data, head, steps, seed, kind):
    def make():
        return engine_of(head, budgeted(20, seed) if kind == "adaptive" else RandomRouter(0.4, seed=seed))

    first = make()
    for k in range(steps):
        score(first, data, 8 * k)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second = make()
    second.load_state_dict(state)
    for k in range(steps, steps + 2):
        ours, theirs = score(first, data, 8 * k), score(second, data, 8 * k)
        assert all(torch.equal(a.routed, b.routed) for a, b in zip(ours, theirs, strict=True))
        assert torch.equal(ours.advantages, theirs.advantages)
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize("router", [NeverRoute(), ThresholdRouter(1.2), BudgetRouter(0.5)])
def test_a_router_without_state_has_none(head, router):
    assert not isinstance(router, StatefulRouter)
    engine = engine_of(head, router)
    state = engine.state_dict()
    assert state["router"] == {"kind": type(router).__name__, "state": None}
    engine.load_state_dict(json.loads(json.dumps(state)))


# -- the head --------------------------------------------------------------------------------------------------------


def judged(data, k):
    part = slice(10 * k, 10 * k + 10)
    return JudgedPairs(data.hidden, 1 - data.labels[part], torch.ones(10), data.pairs[part])


def test_a_learner_goes_back_to_the_version_of_the_state(data, head, tmp_path):
    with VerdictLearner(head, tmp_path / "journal") as learner:
        engine = engine_of(head, budgeted(), learner)
        learner.learn(judged(data, 0))
        engine.save_state(tmp_path / "state.json")
        then = learner.head.beta.clone()
        learner.learn(judged(data, 1))
        assert not torch.equal(learner.head.beta, then)
    with VerdictLearner(head, tmp_path / "journal") as learner:
        engine = engine_of(head, budgeted(), learner)
        assert learner.version == 2
        engine.load_state(tmp_path / "state.json")
        assert learner.version == 1
        assert torch.equal(engine.head.beta, then)
        score(engine, data)


def test_another_journal_is_refused_and_the_router_kept(data, head, tmp_path):
    with VerdictLearner(head, tmp_path / "one") as learner:
        engine = engine_of(head, budgeted(), learner)
        score(engine, data)
        learner.learn(judged(data, 0))
        state = engine.state_dict()
    with VerdictLearner(head, tmp_path / "two") as learner:
        engine = engine_of(head, budgeted(), learner)
        learner.learn(judged(data, 3))  # a version of the same number, but another one
        before = engine.state_dict()
        with pytest.raises(CheckpointError, match=r"engine\.learner: got version 1 of a head"):
            engine.load_state_dict(state)
        assert engine.state_dict() == before
    with pytest.raises(CheckpointError, match=r"engine\.learner: got 'version 1', expected none"):
        engine_of(head, budgeted()).load_state_dict(state)


def test_a_version_that_cannot_be_rebuilt_changes_nothing(data, head, tmp_path):
    with VerdictLearner(head, tmp_path / "journal") as learner:
        engine = engine_of(head, budgeted(), learner)
        learner.learn(judged(data, 0))
        score(engine, data)
        state = engine.state_dict()
        learner.learn(judged(data, 1))
        score(engine, data)
        before = engine.state_dict()
        (tmp_path / "journal" / "update-000001.safetensors").unlink()
        with pytest.raises(CheckpointError, match="update-000001"):
            engine.load_state_dict(state)
        assert engine.state_dict() == before


def test_another_head_is_refused(data, head, make_data, fit_head):
    state = engine_of(head, budgeted()).state_dict()
    other_beta = FrozenHead(head.config, head.feature_map, head.beta + 1, head.beta0, head.posterior)
    with pytest.raises(CheckpointError, match=r"engine\.head: got 'another head \(β differs\)'"):
        engine_of(other_beta, budgeted()).load_state_dict(state)
    other = fit_head(make_data(seed=1, size=8, dtype=torch.float32))
    with pytest.raises(CheckpointError, match=r"engine\.head: got 'another head \(its features differ\)'"):
        engine_of(other, budgeted()).load_state_dict(state)


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (ThresholdRouter(1.2), r"engine\.router: got 'AdaptiveRouter', expected ThresholdRouter"),
        (AdaptiveRouter(0.5), r"router\.budgets: got .*calls per run"),
        (AdaptiveRouter(0.5, Budget(9, "tokens")), r"router\.budgets\[0\]\.unit: got 'calls'"),
    ],
)
def test_another_router_is_refused_by_name(head, other, named):
    state = engine_of(head, budgeted()).state_dict()
    engine = engine_of(head, other)
    before = engine.state_dict()
    with pytest.raises(CheckpointError, match=named):
        engine.load_state_dict(state)
    assert engine.state_dict() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "rmcore-journal"}, r"engine\.format"),
        ({"version": 2}, r"engine\.version: got '2', expected 1"),
        ({"version": True}, r"engine\.version"),
        ({"beta": "0"}, r"engine\.beta"),
        ({"router": {"kind": "AdaptiveRouter"}}, r"engine\.router: fields missing \['state'\]"),
        (
            {"router": {"kind": "AdaptiveRouter", "state": None}},
            r"engine\.router\.state: got 'none', expected its state",
        ),
        ({"extra": 1}, r"fields unknown \['extra'\]"),
    ],
)
def test_a_damaged_state_is_named(head, change, named):
    engine = engine_of(head, budgeted())
    with pytest.raises(CheckpointError, match=named):
        engine.load_state_dict(engine.state_dict() | change)


def test_a_file_that_is_no_state_is_named(head, tmp_path):
    engine = engine_of(head, budgeted())
    with pytest.raises(CheckpointError, match=r"none\.json: not readable"):
        engine.load_state(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"bad\.json: engine: got list, expected an object"):
        engine.load_state(tmp_path / "bad.json")


def test_nothing_is_loaded_over_reservations_in_flight(head):
    router = budgeted()
    engine = engine_of(head, router)
    state = engine.state_dict()
    candidates = Candidates(torch.zeros(8), torch.ones(8), torch.linspace(1, 2, 8))
    _, reservation = router.reserve(candidates)
    with pytest.raises(InputError, match="in flight"):
        engine.load_state_dict(state)
    router.settle(reservation, None)


@pytest.mark.parametrize("generator", ["", "AAAA", "no base64!"])
def test_a_damaged_random_state_is_refused(generator):
    router = RandomRouter(0.5)
    before = router.state_dict()
    with pytest.raises(CheckpointError, match=r"router\.generator: got .*expected the state of torch's generator"):
        router.load_state_dict(before | {"generator": generator})
    assert router.state_dict() == before
