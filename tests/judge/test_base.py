"""Whatever a judge does, the caller gets one sound verdict a pair; only the caller's own cancellation gets out."""

from __future__ import annotations

import asyncio
import logging

import pytest

from rmcore.judge import JudgeUsage, Pair, Verdict, checked_verdicts
from rmcore.judge.base import close_judge, isolated_verdicts

PAIRS = [Pair("p", "a", "b"), Pair("q", "a", "b")]


class Scripted:
    def __init__(self, act):
        self.act = act

    async def judge(self, pairs):
        return self.act(pairs)


def run(act, pairs=PAIRS):
    return asyncio.run(checked_verdicts(Scripted(act), pairs))


def fail(error):
    def act(pairs):
        raise error

    return act


def test_sound_verdicts_pass_unchanged():
    given = [
        Verdict(0.5, flipped=True, critique="c", usage=JudgeUsage(calls=2), judge="m", reason="one_order:timeout"),
        Verdict.none("timeout", JudgeUsage(calls=1)),
    ]
    assert run(lambda pairs: given) == given


@pytest.mark.parametrize("error", [RuntimeError("x"), TimeoutError(), ExceptionGroup("g", [ValueError()])])
def test_an_error_fails_every_pair_with_its_name(error, caplog):
    verdicts = run(fail(error))
    assert [v.reason for v in verdicts] == [f"raised_{type(error).__name__}"] * 2
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_the_quiet_form_returns_the_error(caplog):
    error = RuntimeError()
    assert asyncio.run(isolated_verdicts(Scripted(fail(error)), PAIRS))[1] is error
    assert asyncio.run(isolated_verdicts(Scripted(lambda pairs: [Verdict(1.0)] * 2), PAIRS))[1] is None
    assert not caplog.records


@pytest.mark.parametrize("answers", [[], [Verdict(1.0)], [Verdict(1.0)] * 3])
def test_a_wrong_number_uses_none_of_them(answers):
    assert [v.reason for v in run(lambda pairs: answers)] == ["wrong_number_of_verdicts"] * 2


@pytest.mark.parametrize("answer", [None, 1.0, "win", {"preference": 1}])
def test_what_is_no_verdict(answer):
    assert [v.reason for v in run(lambda pairs: [answer, Verdict(1.0)])] == ["not_a_verdict", ""]


@pytest.mark.parametrize("preference", [float("nan"), float("inf"), 1.5, -1.01, "1", object()])
def test_a_preference_that_is_no_number_in_range(preference):
    verdict = run(lambda pairs: [Verdict(preference, usage=JudgeUsage(calls=3)), Verdict(1.0)])[0]
    assert verdict.failed
    assert verdict.reason.startswith("preference_")
    assert verdict.usage.calls == 3


def test_fields_of_other_types_are_mended_or_refused():
    class Rude:
        def __str__(self):
            raise ValueError

    odd = Verdict(True, reason=None, flipped=1, critique=7, usage="free", judge=3)
    rude = Verdict(1.0, critique=Rude())
    first, second = run(lambda pairs: [odd, rude])
    assert (first.preference, first.flipped, first.critique, first.usage) == (1.0, True, "7", JudgeUsage())
    assert second.reason == "not_a_verdict"
    assert run(lambda pairs: [Verdict(None), Verdict(0.0)])[0].reason == "unknown"


def test_no_pairs_no_call():
    assert run(fail(RuntimeError()), []) == []


def test_a_judges_own_cancelled_error_is_contained():
    verdicts = run(fail(asyncio.CancelledError()))
    assert [v.reason for v in verdicts] == ["raised_CancelledError"] * 2


def test_the_callers_cancellation_goes_through():
    class Hanging:
        def __init__(self):
            self.started, self.cancelled = asyncio.Event(), False

        async def judge(self, pairs):
            self.started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    async def main():
        judge = Hanging()
        task = asyncio.create_task(checked_verdicts(judge, PAIRS))
        await judge.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return judge.cancelled

    assert asyncio.run(main())


def test_closing_closes_what_can_be_closed(caplog):
    class Closable(Scripted):
        closed = 0

        async def aclose(self):
            self.closed += 1
            if self.closed > 1:
                raise OSError

    judge = Closable(None)
    asyncio.run(close_judge(judge))
    assert judge.closed == 1
    asyncio.run(close_judge(judge))  # its error is logged, not raised
    assert "closing Closable failed" in caplog.text
    asyncio.run(close_judge(Scripted(None)))
