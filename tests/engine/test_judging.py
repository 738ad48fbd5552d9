"""What becomes of a judge's answers, and of a judge that gives none: no batch lost, no tie invented, all counted."""

from __future__ import annotations

import asyncio
import json
import math
import threading

import pytest
import torch

from rmcore import BudgetRouter, RewardEngine
from rmcore.engine.routing import AlwaysRoute, ThresholdRouter
from rmcore.judge import RecordedJudge, run_sync
from rmcore.judge.base import JudgeUsage, Verdict

J = math.log(0.88 / 0.12)
HIDDEN = torch.tensor([[1.0, 0.0], [3.0, 0.5], [2.0, 0.0]])
TEXTS = {"prompts": ["p"], "responses": [["a", "b", "c"]]}


@pytest.fixture
def score(hand_head):
    """Score the three responses with a judge, all pairs routed unless told otherwise."""

    def run(judge, router=None, **kwargs):
        engine = RewardEngine(hand_head([1.0, 0.0]), judge, router or AlwaysRoute(), **kwargs)
        return engine.score_hidden(HIDDEN, [3], **TEXTS)

    return run


@pytest.fixture
def head_alone(hand_head):
    return RewardEngine(hand_head([1.0, 0.0])).score_hidden(HIDDEN, [3])[0]


# -- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict.of("win"), J),
        (Verdict.of("loss"), -J),
        (Verdict.of("tie"), 0.0),
        (Verdict(0.0, flipped=True), 0.0),
        (Verdict(0.5), math.log(0.69 / 0.31)),  # the probability is interpolated: ½ + ½ · 0.38
        (Verdict(-0.25), -math.log(0.595 / 0.405)),
        (Verdict(1), J),
    ],
)
def test_a_verdict_becomes_a_logit(score, scripted_judge, verdict, expected):
    group = score(scripted_judge(lambda _: verdict))[0]
    assert group.preference[0, 1].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert group.preference[1, 0] == -group.preference[0, 1]
    assert [d.by for d in group.decisions] == ["judge"] * 3
    assert group.decisions[0].verdict == verdict


def test_epsilon_sets_the_size(score, scripted_judge):
    group = score(scripted_judge(lambda _: Verdict.of("win")), epsilon=0.25)[0]
    assert group.preference[0, 1].item() == pytest.approx(math.log(3))


def test_the_judge_decides_routed_pairs_and_the_head_the_others(score, scripted_judge, head_alone):
    # u: (0,1) √13.75, (0,2) 2, (1,2) √4.75
    judge = scripted_judge(lambda _: Verdict.of("win"))
    group = score(judge, BudgetRouter(count=1))[0]
    assert judge.asked == [("a", "b")]
    assert group.preference[0, 1].item() == pytest.approx(J)
    for i, j in ((0, 2), (1, 2)):
        assert group.preference[i, j] == head_alone.preference[i, j]
        assert not group.routed[i, j]
    # The head's own view stays, also where the judge decided.
    assert torch.equal(group.uncertainty, head_alone.uncertainty)
    assert torch.equal(group.logit, head_alone.logit)
    p02, p12 = head_alone.preference[0, 2].item(), head_alone.preference[1, 2].item()
    expected = [(J + p02) / 2, (-J + p12) / 2, (-p02 - p12) / 2]
    assert group.advantages.tolist() == pytest.approx(expected)


def test_recorded_verdicts_of_both_orders(hand_head):
    rows = [
        {"prompt": "p", "first": "a", "second": "b", "verdict": "win", "order": "ab"},
        {"prompt": "p", "first": "a", "second": "b", "verdict": "win", "order": "ba"},
        {"prompt": "p", "first": "a", "second": "c", "verdict": "win", "order": "ab"},
        {"prompt": "p", "first": "a", "second": "c", "verdict": "loss", "order": "ba"},
        {"prompt": "p", "first": "c", "second": "b", "verdict": "win", "order": "ab"},
        {"prompt": "p", "first": "c", "second": "b", "verdict": None, "order": "ba"},
    ]
    engine = RewardEngine(hand_head([1.0, 0.0]), RecordedJudge.from_rows(rows), AlwaysRoute())
    scores = engine.score_hidden(
        torch.cat([HIDDEN, HIDDEN[:2]]), [3, 2], prompts=["p", "q"], responses=[["a", "b", "c"], ["a", "b"]]
    )
    p = scores[0].preference
    assert p[0, 1].item() == pytest.approx(J)
    assert p[0, 2].item() == 0  # the orders disagree
    summary = scores.summary()
    assert summary["judge_flips"] == 1
    assert summary["judge_ties"] == 0  # a disagreement is not a tie
    assert summary["judge_failures"]["no_record"] == 1
    assert sum(summary["decided_by"].values()) == summary["pairs"] == 4


def test_equal_questions_are_asked_once(hand_head, scripted_judge):
    usage = JudgeUsage(attempts=1, prompt_tokens=10, completion_tokens=2, seconds=0.5)
    judge = scripted_judge(lambda _: Verdict(1.0, usage=usage))
    engine = RewardEngine(hand_head([1.0, 0.0]), judge, AlwaysRoute())
    hidden = torch.randn(6, 2)
    scores = engine.score_hidden(
        hidden, [2, 2, 2], prompts=["p", "p", "q"], responses=[["a", "b"], ["a", "b"], ["a", "b"]]
    )
    assert [(q.prompt, q.first, q.second) for q in judge.calls[0]] == [("p", "a", "b"), ("q", "a", "b")]
    assert all(group.preference[0, 1].item() == pytest.approx(J) for group in scores)
    assert scores.summary()["decided_by"]["judge"] == 3


def test_usage_adds_up_over_what_was_asked(hand_head, scripted_judge):
    def answer(pair):
        usage = JudgeUsage(attempts=1, prompt_tokens=len(pair.prompt), seconds=0.5)
        return Verdict(1.0, usage=usage) if pair.prompt != "qq" else Verdict.none("refusal", usage)

    engine = RewardEngine(hand_head([1.0, 0.0]), scripted_judge(answer), AlwaysRoute())
    scores = engine.score_hidden(
        torch.randn(6, 2), [2, 2, 2], prompts=["p", "p", "qq"], responses=[["a", "b"], ["a", "b"], ["a", "b"]]
    )
    # "p" was asked once, and a refusal costs too.
    assert scores.judge_usage == JudgeUsage(attempts=2, prompt_tokens=3, seconds=1.0)
    assert scores.summary()["judge_usage"]["prompt_tokens"] == 3


def test_a_shared_verdict_object_costs_each_question(hand_head, scripted_judge):
    """A judge may hand out one constant; each question it answered was still paid for."""
    constant = Verdict(1.0, usage=JudgeUsage(attempts=1))
    engine = RewardEngine(hand_head([1.0, 0.0]), scripted_judge(lambda _: constant), AlwaysRoute())
    assert engine.score_hidden(HIDDEN, [3], **TEXTS).judge_usage.attempts == 3


def test_nobody_is_asked_where_nothing_is_routed(score, scripted_judge):
    judge = scripted_judge(lambda _: Verdict.of("win"))
    scores = score(judge, ThresholdRouter(1e9))
    assert judge.calls == []
    assert "judge" not in scores.seconds
    assert scores.summary()["routed"] == 0


# -- failures --------------------------------------------------------------------------------------------------------


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def judge(self, pairs):
        raise self.error


class Returns:
    def __init__(self, value) -> None:
        self.value = value

    async def judge(self, pairs):
        return self.value


class NotAsync:
    def judge(self, pairs):
        return [Verdict.of("win")] * len(pairs)


WIN = Verdict.of("win")


def assert_head_kept(scores, head_alone, reasons: dict[str, int]) -> None:
    group = scores[0]
    assert torch.equal(group.preference, head_alone.preference)  # bit for bit
    assert torch.equal(group.advantages, head_alone.advantages)
    assert group.routed.sum() == 6
    summary = scores.summary()
    assert summary["decided_by"] == {"head": 0, "judge": 0, "judge_failed": 3, "identical": 0, "nobody": 0}
    assert summary["routed"] == summary["pairs"] == 3
    assert summary["judge_failures"] == reasons
    assert summary["judge_ties"] == 0
    json.dumps([scores.to_records(), summary], allow_nan=False)


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (Raises(RuntimeError("no")), "raised_RuntimeError"),
        (Raises(TimeoutError()), "raised_TimeoutError"),
        (Returns([]), "wrong_number_of_verdicts"),
        (Returns([WIN, WIN]), "wrong_number_of_verdicts"),
        (Returns([WIN] * 4), "wrong_number_of_verdicts"),
        (Returns(None), "raised_TypeError"),
        (Returns(7), "raised_TypeError"),
        (Returns("win"), "not_a_verdict"),  # three characters, as it happens
        (Returns([None, None, None]), "not_a_verdict"),
        (Returns(["win", 1.0, {"preference": 1}]), "not_a_verdict"),
        (NotAsync(), "raised_TypeError"),
        (Returns([Verdict.none("timeout")] * 3), "timeout"),
        (Returns([Verdict(None)] * 3), "unknown"),
        (Returns([Verdict(math.nan)] * 3), "preference_nan"),
        (Returns([Verdict(math.inf)] * 3), "preference_inf"),
        (Returns([Verdict(-1.5)] * 3), "preference_-1.5"),
        (Returns([Verdict("win")] * 3), "preference_win"),
        (Returns([Verdict([1.0])] * 3), "preference_[1.0]"),
        (Returns([Verdict(None, reason=KeyError("x"), usage=None)] * 3), "'x'"),
    ],
)
def test_a_failing_judge_leaves_the_heads_preference(score, head_alone, judge, reason):
    assert_head_kept(score(judge), head_alone, {reason: 3})


def test_each_failure_has_its_own_reason(score, head_alone, scripted_judge):
    answers = {"ab": Verdict.none("http_500"), "ac": Verdict.of("win"), "bc": Verdict.none("refusal")}
    scores = score(scripted_judge(lambda pair: answers[pair.first + pair.second]))
    group = scores[0]
    assert [(d.by, d.reason) for d in group.decisions] == [
        ("judge_failed", "http_500"),
        ("judge", ""),
        ("judge_failed", "refusal"),
    ]
    assert group.preference[0, 1] == head_alone.preference[0, 1]
    assert group.preference[0, 2].item() == pytest.approx(J)
    assert scores.summary()["decided_by"] == {"head": 0, "judge": 1, "judge_failed": 2, "identical": 0, "nobody": 0}
    assert scores.summary()["judge_failures"] == {"http_500": 1, "refusal": 1}


def test_one_bad_answer_does_not_spoil_the_others(score, head_alone):
    scores = score(Returns([WIN, "garbage", Verdict(5.0)]))
    assert scores[0].preference[0, 1].item() == pytest.approx(J)
    assert scores[0].preference[0, 2] == head_alone.preference[0, 2]
    assert scores[0].preference[1, 2] == head_alone.preference[1, 2]
    assert scores.summary()["judge_failures"] == {"not_a_verdict": 1, "preference_5.0": 1}


def test_failures_are_logged(score, caplog):
    score(Raises(RuntimeError("the key is wrong")))
    assert "the judge failed with RuntimeError; 3 pairs" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_judge_that_ends_the_program_does_and_leaves_the_loop_alive(hand_head, table_model, error):
    model = table_model(hand_head([1.0]), lambda _p, text: [float(text)])
    engine = RewardEngine(model, Raises(error), AlwaysRoute())
    with pytest.raises(type(error)):
        asyncio.run(engine.score_async(["p"], [["1", "2"]]))
    with pytest.raises(type(error)):
        engine.score(["p"], [["1", "2"]])
    assert run_sync(asyncio.sleep(0, result="alive")) == "alive"


def test_a_cancellation_of_the_judges_own_making_is_a_failure(score, head_alone):
    """It awaited something that somebody else cancelled; nobody cancelled the score call."""
    assert_head_kept(score(Raises(asyncio.CancelledError())), head_alone, {"raised_CancelledError": 3})


def test_cancelling_the_caller_cancels_the_judge(hand_head, table_model):
    events = []

    class Slow:
        async def judge(self, pairs):
            events.append("asked")
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                events.append("cancelled")
                raise

    model = table_model(hand_head([1.0]), lambda _p, text: [float(text)])
    engine = RewardEngine(model, Slow(), AlwaysRoute())

    async def run():
        task = asyncio.create_task(engine.score_async(["p"], [["1", "2"]]))
        while not events:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), 20))
    assert events == ["asked", "cancelled"]


# -- loops and threads -----------------------------------------------------------------------------------------------


@pytest.fixture
def texts_engine(hand_head, table_model, scripted_judge):
    model = table_model(hand_head([1.0]), lambda _p, text: [float(text)])
    return RewardEngine(
        model, scripted_judge(lambda p: Verdict(0.5 if p.first < p.second else -0.5)), BudgetRouter(0.5)
    )


ARGS = (["p", "q"], [["1", "2", "4"], ["3", "9"]])


def test_sync_and_async_agree_in_and_out_of_a_loop(texts_engine):
    plain = texts_engine.score(*ARGS).to_records()

    async def inside():
        return texts_engine.score(*ARGS).to_records(), (await texts_engine.score_async(*ARGS)).to_records()

    assert asyncio.run(inside()) == (plain, plain)


def test_hidden_states_inside_a_loop(hand_head, scripted_judge):
    engine = RewardEngine(hand_head([1.0, 0.0]), scripted_judge(lambda _: WIN), AlwaysRoute())

    async def inside():
        return engine.score_hidden(HIDDEN, [3], **TEXTS)

    assert asyncio.run(inside())[0].preference[0, 1].item() == pytest.approx(J)


def test_many_at_once(texts_engine):
    expected = texts_engine.score(*ARGS).to_records()

    async def many():
        return await asyncio.gather(*(texts_engine.score_async(*ARGS) for _ in range(8)))

    assert all(scores.to_records() == expected for scores in asyncio.run(many()))
    found = []
    threads = [threading.Thread(target=lambda: found.append(texts_engine.score(*ARGS).to_records())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_the_loop_goes_on_while_the_backbone_works(hand_head, table_model):
    """score_async keeps the forward pass out of the caller's loop."""
    started, release = threading.Event(), threading.Event()

    def slow(_prompt, text):
        started.set()
        assert release.wait(10)
        return [float(text)]

    engine = RewardEngine(table_model(hand_head([1.0]), slow))

    async def run():
        task = asyncio.create_task(engine.score_async(["p"], [["1", "2"]]))
        while not started.is_set():
            await asyncio.sleep(0.001)
        release.set()
        return await task

    assert len(asyncio.run(asyncio.wait_for(run(), 20))) == 1


def test_bad_input_raises_from_the_coroutine_too(texts_engine):
    with pytest.raises(ValueError, match="prompts"):
        asyncio.run(texts_engine.score_async([], []))
