"""The disagreement alarm: its stated false-alarm rate holds by simulation, and it finds a judge that turned in time."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from itertools import pairwise
from statistics import NormalDist

import pytest

from rmcore._base.errors import InputError
from rmcore.judge import Alarm, DisagreementAlarm, Judge, MonitoredJudge, Pair, Verdict
from rmcore.judge.wrappers.alarm import sound_alarm

NORMAL = NormalDist()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


class Stream:
    """Prompts with a calibrated head, judged by somebody who errs at a rate; each prompt has one or more pairs."""

    def __init__(self, seed, spread=1.5):
        self.rng, self.spread, self.prompts = random.Random(seed), spread, 0

    def prompt(self, error):
        """One independent pair: the truth is drawn with the head's probability."""
        self.prompts += 1
        head = self.rng.gauss(0, self.spread)
        truth = self.rng.random() < sigmoid(head)
        answer = truth != (self.rng.random() < error)
        return [Pair(f"p{self.prompts}", "a", "b", preference=head)], [Verdict(1.0 if answer else -1.0)]

    def group(self, error, k=5, noise=1.0):
        """All pairs of k responses whose true quality is the head's estimate plus noise: calibrated, and dependent."""
        self.prompts += 1
        estimate = [self.rng.gauss(0, 1) for _ in range(k)]
        quality = [m + self.rng.gauss(0, noise) for m in estimate]
        pairs, verdicts = [], []
        for i in range(k):
            for j in range(i + 1, k):
                p = NORMAL.cdf((estimate[i] - estimate[j]) / (noise * math.sqrt(2)))
                answer = (quality[i] > quality[j]) != (self.rng.random() < error)
                pairs.append(Pair(f"p{self.prompts}", f"{i}", f"{j}", preference=math.log(p / (1 - p))))
                verdicts.append(Verdict(1.0 if answer else -1.0))
        return pairs, verdicts


def prompts_to_alarm(alarm, draw, limit):
    for count in range(1, limit + 1):
        alarm.observe(*draw())
        if alarm.active:
            return count
    return None


@pytest.fixture(autouse=True)
def logger():
    """Thousands of simulated alarms need no log; the test that reads it turns it on."""
    logger = logging.getLogger("rmcore.judge.wrappers.disagreement")
    logger.setLevel(logging.CRITICAL)
    yield logger
    logger.setLevel(logging.NOTSET)


# -- the stated rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 0.1, 0.2, 0.35])
@pytest.mark.parametrize("kind", ["prompt", "group"])
def test_false_alarms_are_no_more_frequent_than_stated(kind, error):
    """n prompts hold a false alarm with probability ≤ n/c; the judge errs at exactly the rate allowed: the worst null.

    The bound is on the probability, so 40 streams may exceed it by chance: 3 standard deviations are allowed.
    """
    n, c, streams = 150, 600, 60 if kind == "prompt" else 30
    hits = 0
    for seed in range(streams):
        stream, alarm = Stream(seed), DisagreementAlarm(judge_error=error, run_length=c)
        hits += prompts_to_alarm(alarm, lambda s=stream: getattr(s, kind)(error), n) is not None
    bound = n / c
    assert hits / streams <= bound + 3 * math.sqrt(bound * (1 - bound) / streams)


def test_the_mean_run_length_is_at_least_the_stated_one():
    c, limit = 150, 3000
    lengths = []
    for seed in range(60):
        stream, alarm = Stream(seed), DisagreementAlarm(judge_error=0.2, run_length=c)
        lengths.append(prompts_to_alarm(alarm, lambda s=stream: s.prompt(0.2), limit) or limit)
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((x - mean) ** 2 for x in lengths) / (len(lengths) - 1) / len(lengths))
    assert mean + 2 * spread >= c


@pytest.mark.parametrize("kind", ["prompt", "group"])
def test_a_healthy_judge_raises_no_alarm_in_many_prompts(kind):
    """Errors at half the rate allowed, default settings."""
    for seed in range(4):
        stream, alarm = Stream(seed), DisagreementAlarm()
        assert (
            prompts_to_alarm(alarm, lambda s=stream, k=kind: getattr(s, k)(0.1), 3000 if kind == "prompt" else 500)
            is None
        )


@pytest.mark.parametrize(
    ("became", "allowed", "within"),
    [(0.5, 0.2, 400), (0.5, 0.1, 200), (0.75, 0.2, 120), (1.0, 0.2, 60), (1.0, 0.1, 60)],
)
def test_a_judge_that_turned_is_found_in_time(became, allowed, within):
    """0.5: random, 1: adversarial. After 1000 good prompts, default run length (a false alarm in 100,000 prompts)."""
    for seed in range(25):
        stream, alarm = Stream(seed), DisagreementAlarm(judge_error=allowed)
        assert prompts_to_alarm(alarm, lambda s=stream: s.prompt(allowed / 2), 1000) is None
        found = prompts_to_alarm(alarm, lambda s=stream: s.prompt(became), within)
        assert found is not None, f"seed {seed}"


def test_a_head_that_has_become_overconfident_is_found_too():
    alarm, stream = DisagreementAlarm(), Stream(0)

    def draw():
        (pair,), verdicts = stream.prompt(0.1)
        return [Pair(pair.prompt, "a", "b", preference=stream.rng.choice([-4.0, 4.0]))], verdicts

    assert prompts_to_alarm(alarm, draw, 300) is not None


# -- what counts -------------------------------------------------------------------------------------------------------


def one(alarm, head, preference, *, flipped=False):
    verdict = Verdict.none("timeout") if preference is None else Verdict(preference, flipped=flipped)
    alarm.observe([Pair(f"p{alarm.stats()['pairs']}", "a", "b", preference=head)], [verdict])


def test_pairs_that_tell_nothing_are_counted_and_change_nothing():
    alarm = DisagreementAlarm()
    one(alarm, 3.0, 0.0)
    one(alarm, 3.0, 0.0, flipped=True)
    one(alarm, 3.0, None)
    alarm.observe([Pair("ruled", "", "b", preference=3.0)], [Verdict(-1.0, "rule:blank", judge="rule")])
    for head in (None, math.nan, math.inf, 0.0):
        one(alarm, head, -1.0)
    stats = alarm.stats()
    assert stats["evidence"] == 0
    assert (stats["pairs"], stats["counted"], stats["ties"], stats["flips_to_zero"]) == (8, 0, 1, 1)
    assert stats["by_rule"] == 1
    assert (stats["no_verdict"], stats["no_preference"], stats["prompts"]) == (1, 4, 0)
    assert stats["recent"]["observed"] is None


def test_ties_without_end_are_no_disagreement():
    alarm = DisagreementAlarm(judge_error=0.05)
    for _ in range(2000):
        one(alarm, 4.0, 0.0)
    assert not alarm.active


def test_a_weak_verdict_bets_less_than_a_strong_one():
    evidence = {}
    for strength in (0.1, 0.5, 1.0):
        alarm = DisagreementAlarm()
        for _ in range(3):
            one(alarm, 2.0, -strength)
        evidence[strength] = alarm.stats()["evidence"]
    assert evidence[0.1] < evidence[0.5] < evidence[1.0]


@pytest.mark.parametrize(("head", "preference", "disagrees"), [(2, 1, 0), (2, -1, 1), (-2, 1, 1), (-2, -0.1, 0)])
def test_sides(head, preference, disagrees):
    alarm = DisagreementAlarm(judge_error=0.1)
    one(alarm, float(head), float(preference))
    recent = alarm.stats()["recent"]
    d = sigmoid(-2)
    assert recent["observed"] == disagrees
    assert recent["expected"] == pytest.approx(d * 0.9 + (1 - d) * 0.1)


def test_the_bet_is_fair_under_the_null():
    """One step from M = 0: the expectation of M is 1 whatever the head said."""
    for error in (0.0, 0.2, 0.45):
        for head in (0.01, 1.0, 5.0):
            d = sigmoid(-head)
            q = d * (1 - error) + (1 - d) * error
            m = []
            for preference in (-1.0, 1.0):
                alarm = DisagreementAlarm(judge_error=error, run_length=1e12)
                one(alarm, head, preference)
                m.append(alarm.stats()["evidence"])
            assert q * m[0] + (1 - q) * m[1] == pytest.approx(1.0, rel=1e-9)


def test_an_infinitely_sure_head_is_survived():
    alarm = DisagreementAlarm(judge_error=0.0)
    for _ in range(50):
        one(alarm, 1e6, -1.0)
    assert alarm.stats()["alarms"] == 1
    assert math.isfinite(alarm.stats()["evidence"])


def test_pairs_of_one_prompt_are_one_step_however_many():
    many, single = DisagreementAlarm(), DisagreementAlarm()
    many.observe([Pair("p", "a", f"{k}", preference=2.0) for k in range(28)], [Verdict(-1.0)] * 28)
    single.observe([Pair("p", "a", "b", preference=2.0)], [Verdict(-1.0)])
    assert many.stats()["evidence"] == pytest.approx(single.stats()["evidence"])
    assert many.stats()["prompts"] == 1


def test_the_explaining_error_is_the_one_that_made_the_stream():
    stream, alarm = Stream(1, spread=3.0), DisagreementAlarm(judge_error=0.45, window=20_000)
    for _ in range(8000):
        alarm.observe(*stream.prompt(0.3))
    assert alarm.stats()["recent"]["explaining_judge_error"] == pytest.approx(0.3, abs=0.03)


def test_z_is_standard_when_the_judge_errs_as_expected():
    values = []
    for seed in range(60):
        stream, alarm = Stream(seed), DisagreementAlarm(judge_error=0.2, run_length=1e12)
        for _ in range(150):
            alarm.observe(*stream.prompt(0.2))
        values.append(alarm.stats()["recent"]["z"])
    mean = sum(values) / 60
    assert abs(mean) < 0.5
    assert 0.7 < math.sqrt(sum((v - mean) ** 2 for v in values) / 59) < 1.3


# -- the alarm itself --------------------------------------------------------------------------------------------------


def test_the_alarm_says_what_was_seen_and_what_to_do(caplog, logger):
    logger.setLevel(logging.WARNING)
    alarms = []
    alarm, stream = DisagreementAlarm(on_alarm=alarms.append), Stream(0)
    for _ in range(400):
        alarm.observe(*stream.prompt(0.1))
    prompts_to_alarm(alarm, lambda: stream.prompt(1.0), 100)
    (raised,) = alarms
    assert isinstance(raised, Alarm)
    assert raised.name == "disagreement"
    seen = raised.details["stretch"]
    assert seen["observed"] > seen["expected"] + 0.2
    assert seen["prompts"] < 100, "where the trouble began, not the whole window"
    assert json.loads(json.dumps(raised.details))["judge_error"] == 0.2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for words in ("disagreement alarm", f"{seen['observed']:.0%}", "recalibrate or refit the head", "critiques"):
        assert words in record.getMessage()


def test_a_lasting_disagreement_is_told_once_a_window_and_ends():
    alarms = []
    alarm, stream = DisagreementAlarm(window=200, on_alarm=alarms.append), Stream(0)
    told = []
    for k in range(1000):
        alarm.observe(*stream.prompt(1.0))
        told += [k] * (len(alarms) - len(told))
    assert 4 <= len(told) <= 5
    assert all(after - before >= 200 for before, after in pairwise(told))
    assert alarm.active
    for _ in range(220):
        alarm.observe(*stream.prompt(0.0))
    assert not alarm.active
    assert alarm.stats()["alarms"] == len(alarms)


def test_the_state_is_json():
    alarm, stream = DisagreementAlarm(), Stream(0)
    json.dumps(alarm.stats())
    alarm.observe(*stream.group(0.1))
    state = json.loads(json.dumps(alarm.stats()))
    assert (state["pairs"], state["prompts"], state["active"], state["run_length"]) == (10, 1, False, 100_000)


def test_a_callback_that_raises_is_logged(caplog):
    def broken(alarm):
        raise RuntimeError("no pager")

    sound_alarm(Alarm("canary", "look"), broken, logging.getLogger("rmcore.test"))
    assert [r.levelno for r in caplog.records] == [logging.WARNING, logging.ERROR]


# -- the wrapper -------------------------------------------------------------------------------------------------------


class Fixed:
    def __init__(self, answers):
        self.answers = answers

    async def judge(self, pairs):
        return self.answers

    async def aclose(self):
        self.closed = True


def test_the_wrapper_changes_no_verdict_and_observes_all():
    verdicts = [Verdict(1.0, critique="c"), Verdict.none("timeout")]
    judge = MonitoredJudge(Fixed(verdicts))
    assert isinstance(judge, Judge)
    pairs = [Pair("p", "a", "b", preference=1.0), Pair("q", "a", "b", preference=1.0)]
    assert asyncio.run(judge.judge(pairs)) == verdicts
    assert (judge.stats()["counted"], judge.stats()["no_verdict"]) == (1, 1)
    asyncio.run(judge.aclose())
    assert judge.inner.closed


def test_the_wrapper_contains_a_broken_judge():
    judge = MonitoredJudge(Fixed([]))
    assert asyncio.run(judge.judge([Pair("p", "a", "b")]))[0].reason == "wrong_number_of_verdicts"


@pytest.mark.parametrize(
    "make",
    [
        lambda: DisagreementAlarm(judge_error=0.5),
        lambda: DisagreementAlarm(judge_error=-0.1),
        lambda: DisagreementAlarm(run_length=1),
        lambda: DisagreementAlarm(run_length=math.inf),
        lambda: DisagreementAlarm(window=0),
        lambda: DisagreementAlarm(on_alarm=1),
        lambda: DisagreementAlarm().observe([Pair("p", "a", "b")], []),
        lambda: MonitoredJudge("judge"),
        lambda: MonitoredJudge(Fixed([]), alarm=print),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(InputError, match="expected"):
        make()
