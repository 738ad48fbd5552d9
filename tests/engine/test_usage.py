"""What judging cost: figures of one call by hand, and sums over many that agree with them."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore import RewardEngine
from rmcore._base.errors import DataError, InputError
from rmcore.engine.accounts import Accounts, account_lines
from rmcore.engine.routing import AlwaysRoute, NeverRoute
from rmcore.engine.usage import (
    JudgeTally,
    Overlap,
    covered_s,
    latency_summary,
    shared_s,
    tally_by_judge,
    usage_summary,
)
from rmcore.judge.base import JudgeUsage, Verdict


@pytest.fixture(scope="session")
def make_summary(hand_head, scripted_judge):
    """A real summary of ``groups`` judged pairs, with ``usage`` for all of them, and of one more that fails."""

    def make(usage: JudgeUsage | None = None, *, groups: int = 1, judge: str = "small", reason: str = "timeout"):
        told = [Verdict.none(reason), Verdict(1.0, judge=judge, usage=usage or JudgeUsage())]
        answers = iter(told + [Verdict(1.0, judge=judge)] * groups)
        engine = RewardEngine(hand_head([1.0]), scripted_judge(lambda _: next(answers)), AlwaysRoute())
        count = groups + 1
        texts = {"prompts": ["p"] * count, "responses": [[f"a{k}", f"b{k}"] for k in range(count)]}
        return engine.score_hidden(torch.arange(2.0 * count)[:, None] * groups, [2] * count, **texts).summary()

    return make


# -- time ------------------------------------------------------------------------------------------------------------

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda s: (s[0], s[0] + s[1])), max_size=8)


def seconds_in(some) -> set[int]:
    return {second for begin, end in some for second in range(begin, end)}


@given(some=spans, others=spans)
def test_spans_against_counting_seconds(some, others):
    assert covered_s(some) == len(seconds_in(some))
    assert shared_s(some, others) == shared_s(others, some) == len(seconds_in(some) & seconds_in(others))


def test_hidden_time_by_hand():
    """Judge 2-6 and 5-9 (union 7 s) against backbone 0-4 and 8-20: 2 s and 1 s of it are hidden."""
    overlap = Overlap.of([(2, 6), (5, 9)], [(0, 4), (8, 20)], micro_batches=2)
    assert (overlap.judge_s, overlap.hidden_s) == (7, 3)
    assert overlap.to_dict()["fraction"] == pytest.approx(3 / 7)
    assert Overlap().to_dict()["fraction"] is None


class TurnedClock:
    """Time that is turned by what happens, not by the machine."""

    def __init__(self) -> None:
        self.time = 50.0

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nobody sleeps here")


def test_seconds_of_a_call_by_hand(hand_head, table_model):
    """Two texts take the backbone 3 s each, the judge 4 s after them: nothing is hidden, and all adds up."""
    clock = TurnedClock()

    def table(_prompt: str, text: str) -> list[float]:
        clock.time += 3
        return [float(text)]

    class Takes4s:
        async def judge(self, pairs):
            clock.time += 4
            return [Verdict.of("win")] * len(pairs)

    engine = RewardEngine(table_model(hand_head([1.0]), table), Takes4s(), AlwaysRoute(), clock=clock)
    scores = engine.score(["p"], [["1", "2"]])
    assert scores.seconds == {"backbone": 6.0, "head": 0.0, "judge": 4.0, "total": 10.0}
    assert scores.overlap == Overlap(1, 4.0, 0.0, "one micro-batch")


# -- usage -----------------------------------------------------------------------------------------------------------


def test_latencies_by_hand():
    figures = latency_summary([0.4, 0.1, 0.2, 0.3])
    assert figures is not None
    assert (figures["count"], figures["max"]) == (4, 0.4)
    assert figures["p50"] == pytest.approx(0.25)
    assert figures["p95"] == pytest.approx(0.385)
    assert sum(figures["histogram"].values()) == 4
    assert latency_summary([]) is None
    assert latency_summary([0.0])["p95"] == 0


@given(values=st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=60))
def test_quantiles_of_summaries_added_up_are_close(make_summary, values):
    """Two steps of some calls each: the merged p50 and p95 are within half a bucket of those of all calls together."""
    accounts = Accounts()
    for part in (values[::2], values[1::2]):
        accounts.add(make_summary(JudgeUsage(calls=len(part), attempts=len(part), latencies_s=tuple(part))))
    merged, together = accounts.totals()["judge_usage"]["latency_s"], np.quantile(values, (0.5, 0.95))
    assert merged["count"] == len(values)
    assert merged["max"] == max(values)
    assert [merged["p50"], merged["p95"]] == pytest.approx(together, rel=0.05)


@pytest.mark.parametrize(
    ("usage", "cost", "unpriced"),
    [
        (JudgeUsage(), 0.0, 0),  # nothing was asked, and nothing spent
        (JudgeUsage(calls=2, attempts=2, cost=0.5), 0.5, 0),
        (JudgeUsage(calls=2, attempts=2), 0.0, 0),  # a price of 0, as for a server of one's own
        (JudgeUsage(calls=2, attempts=2, unpriced_calls=2), None, 2),
        (JudgeUsage(calls=2, attempts=2, cost=0.5, unpriced_calls=1), 0.5, 1),
        (JudgeUsage(cache_hits=4), 0.0, 0),
        (JudgeUsage(attempts=3, prompt_tokens=100), None, 0),  # a judge that counts no calls
    ],
)
def test_an_unknown_cost_is_not_zero(make_summary, usage, cost, unpriced):
    figures = usage_summary(usage)
    assert (figures["cost"], figures["unpriced_calls"]) == (cost, unpriced)
    accounts = Accounts()
    accounts.add(make_summary(usage))
    assert accounts.totals()["judge_usage"]["cost"] == cost


def test_retries_are_attempts_beyond_calls():
    assert usage_summary(JudgeUsage(calls=3, attempts=5))["retries"] == 2
    assert usage_summary(JudgeUsage(calls=3))["retries"] == 0  # calls that no attempt was made for


VERDICTS = [
    Verdict(1.0, judge="small", usage=JudgeUsage(calls=2, cost=0.1)),
    Verdict(0.0, judge="small", flipped=True, usage=JudgeUsage(calls=2, cost=0.1)),
    Verdict(0.0, judge="large", usage=JudgeUsage(calls=1, cost=1.0)),
    Verdict(None, "timeout", usage=JudgeUsage(calls=1)),
    Verdict(0.0, "rule:identical", judge="rule"),
]


def test_tallies_by_judge():
    tallies = tally_by_judge(VERDICTS)
    assert list(tallies) == ["small", "large", "(unnamed)", "rule"]
    assert tallies["small"] == JudgeTally(2, 0, 0, 1, JudgeUsage(calls=4, cost=0.2))
    assert tallies["large"] == JudgeTally(1, 0, 1, 0, JudgeUsage(calls=1, cost=1.0))
    assert tallies["(unnamed)"] == JudgeTally(1, 1, 0, 0, JudgeUsage(calls=1))


# -- the summary -----------------------------------------------------------------------------------------------------


def test_the_summary_by_hand(hand_head, scripted_judge):
    answers = iter(VERDICTS)
    engine = RewardEngine(hand_head([1.0]), scripted_judge(lambda _: next(answers)), AlwaysRoute())
    texts = [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"], ["i", "j"], ["k", "k"], ["a", "b"]]
    scores = engine.score_hidden(torch.arange(14.0)[:, None], [2] * 7, prompts=["p"] * 7, responses=texts)
    summary = scores.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["decided_by"] == {"head": 0, "judge": 5, "judge_failed": 1, "identical": 1, "nobody": 0}
    assert (summary["judge_ties"], summary["judge_flips"], summary["rule_verdicts"]) == (2, 1, 2)
    assert summary["judge_failures"] == {"timeout": 1}
    assert summary["judge_usage"]["calls"] == 6
    assert summary["judge_usage"]["cost"] == pytest.approx(1.2)
    assert {name: judge["questions"] for name, judge in summary["judges"].items()} == {
        "small": 2,
        "large": 1,
        "(unnamed)": 1,
        "rule": 1,
    }
    assert sum(judge["usage"]["calls"] for judge in summary["judges"].values()) == 6
    assert summary["uncertainty"]["count"] == 7
    assert summary["unaccounted_questions"] == 0


def test_a_batch_without_a_judge(hand_head):
    summary = RewardEngine(hand_head([1.0])).score_hidden(torch.ones(2, 1), [2]).summary()
    assert summary["overlap"] == {
        "micro_batches": 1,
        "judge_s": 0.0,
        "hidden_s": 0.0,
        "fraction": None,
        "why_not": "no judge is asked",
    }
    assert summary["judges"] == {}
    assert summary["judge_usage"]["latency_s"] is None


# -- many steps ------------------------------------------------------------------------------------------------------


def test_totals_are_sums_of_the_steps(make_summary):
    usage = JudgeUsage(calls=2, attempts=3, cache_hits=1, prompt_tokens=100, reasoning_tokens=7, cost=0.25)
    steps = [make_summary(usage, groups=k) for k in (1, 2, 3)]
    accounts = Accounts()
    for step in steps:
        accounts.add(step)
    totals = accounts.totals()
    assert totals["steps"] == 3
    assert totals["pairs"] == 2 + 3 + 4
    assert totals["decided_by"] == {"head": 0, "judge": 6, "judge_failed": 3, "identical": 0, "nobody": 0}
    assert totals["judge_failures"] == {"timeout": 3}
    for name in ("calls", "attempts", "retries", "cache_hits", "prompt_tokens", "reasoning_tokens", "cost"):
        assert totals["judge_usage"][name] == 3 * steps[0]["judge_usage"][name]
    assert totals["judges"]["small"]["questions"] == 6
    assert totals["seconds"]["total"] == pytest.approx(sum(step["seconds"]["total"] for step in steps))
    count = sum(step["uncertainty"]["count"] for step in steps)
    mean = sum(step["uncertainty"]["mean"] * step["uncertainty"]["count"] for step in steps) / count
    assert totals["uncertainty"] == {"mean": pytest.approx(mean), "count": count}
    assert json.loads(json.dumps(totals, allow_nan=False)) == totals
    assert accounts.totals() == totals, "asking for totals changes nothing"


def test_one_step_is_its_own_total(make_summary):
    step = make_summary(JudgeUsage(calls=1, attempts=1, latencies_s=(0.5,), cost=0.25))
    accounts = Accounts()
    accounts.add(step)
    totals = accounts.totals()
    for name in ("groups", "pairs", "routed", "decided_by", "judge_failures", "seconds", "judge_ties", "judge_flips"):
        assert totals[name] == step[name]
    assert totals["overlap"]["fraction"] == step["overlap"]["fraction"]


def test_a_partly_priced_run_says_how_much_is_missing(make_summary):
    accounts = Accounts()
    accounts.add(make_summary(JudgeUsage(calls=2, cost=0.5)))
    accounts.add(make_summary(JudgeUsage(calls=3, unpriced_calls=3)))
    usage = accounts.totals()["judge_usage"]
    assert (usage["cost"], usage["unpriced_calls"]) == (0.5, 3)
    assert math.isnan(accounts.steps[1].cost)


def test_names_from_judges_do_not_grow_without_bound(make_summary):
    """Reasons and names come from outside; one may also be called like a figure of ours."""
    accounts = Accounts()
    for k in range(100):
        accounts.add(make_summary(judge=f"judge-{k}", reason="cost" if k == 0 else f"preference_{k}"))
    totals = accounts.totals()
    assert len(totals["judge_failures"]) == len(totals["judges"]) == 65
    assert totals["judge_failures"]["cost"] == 1
    assert sum(totals["judge_failures"].values()) == 100
    assert sum(judge["questions"] for judge in totals["judges"].values()) == 200


def test_the_log_is_read_again(make_summary, tmp_path):
    path = tmp_path / "logs" / "judging.jsonl"
    accounts = Accounts(path)
    accounts.add(make_summary(JudgeUsage(calls=1, latencies_s=(0.5,), cost=0.25)), step=10)
    accounts.add(make_summary(groups=3))
    again = Accounts(path)
    assert again.totals() == accounts.totals()
    assert [figures.step for figures in again.steps] == [10, 11]
    again.add(make_summary())
    assert len(path.read_text().splitlines()) == 3


def test_a_line_cut_short_by_a_crash_is_dropped(make_summary, tmp_path, caplog):
    path = tmp_path / "judging.jsonl"
    Accounts(path).add(make_summary())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: random.Random(0).randrange(1, len(whole) - 1)])
    before = path.read_bytes()
    assert Accounts.read(path).totals()["steps"] == 1
    assert path.read_bytes() == before, "who only looks changes nothing"
    accounts = Accounts(path)
    assert accounts.totals()["steps"] == 1
    assert "cut short" in caplog.text
    accounts.add(make_summary())
    assert Accounts(path).totals()["steps"] == 2


@pytest.mark.parametrize("line", ["not json", "[]", "{}", '{"step": 1}', "3", '{"step": 1, "pairs": 2}'])
def test_a_foreign_line_is_named(make_summary, tmp_path, line):
    path = tmp_path / "judging.jsonl"
    Accounts(path).add(make_summary())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"judging\.jsonl:2"):
        Accounts(path)


@pytest.mark.parametrize("what", [{}, {"pairs": 3}, [], None, "summary"])
def test_something_else_than_a_summary(what):
    accounts = Accounts()
    with pytest.raises(InputError, match="summary"):
        accounts.add(what)
    assert accounts.steps == []
    assert accounts.totals() == {"steps": 0, "uncertainty": None}


def test_a_router_that_never_routes_adds_up_too(hand_head):
    accounts = Accounts()
    engine = RewardEngine(hand_head([1.0]), None, NeverRoute())
    accounts.add(engine.score_hidden(torch.ones(1, 1), [1]).summary())
    totals = accounts.totals()
    assert totals["uncertainty"] is None
    assert totals["judge_usage"]["cost"] == 0
    assert totals["overlap"]["fraction"] is None


# -- for people ------------------------------------------------------------------------------------------------------


def test_the_lines_say_it_all(make_summary):
    usage = JudgeUsage(calls=2, attempts=3, cache_hits=1, prompt_tokens=1200, cost=0.5, unpriced_calls=1)
    lines = dict(account_lines(make_summary(usage, groups=3, reason="http_503")))
    assert lines["scored"] == "4 groups, 4 pairs"
    assert lines["decided by"] == "the head 0, the judge 3, by rule 0"
    assert lines["no verdict"] == "1 (http_503 1)"
    assert lines["judge calls"] == "2, 1 retries, 1 cache hits"
    assert lines["tokens"] == "1,200 prompt (0 cached), 0 completion (0 reasoning)"
    assert lines["cost"] == "0.5, without 1 calls that have no price"
    assert "latency" not in lines


def test_the_lines_of_an_unknown_cost_and_of_nothing(make_summary):
    lines = dict(account_lines(make_summary(JudgeUsage(calls=2, unpriced_calls=2, latencies_s=(0.5, 0.5)))))
    assert lines["cost"] == "unknown: no price for 2 calls"
    assert lines["latency"] == "p50 0.50 s, p95 0.50 s, max 0.50 s"
    assert account_lines(Accounts().totals()) == [("scored", "nothing")]


# -- the plot --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_plot_shows_the_steps(make_summary, tmp_path):
    pytest.importorskip("matplotlib")
    from rmcore.evaluation.plots import plot_accounts

    accounts = Accounts()
    with pytest.raises(InputError, match="no steps"):
        plot_accounts(accounts)
    accounts.add(make_summary(JudgeUsage(calls=4, prompt_tokens=100, unpriced_calls=4)), step=7)
    figure = plot_accounts(accounts, tmp_path / "unpriced.png")
    assert figure.axes[1].get_title(loc="left") == "100 tokens, cost unknown (4 of 4 calls have no price)"
    accounts.add(make_summary(JudgeUsage(calls=2, prompt_tokens=50, cost=1.5), groups=3), step=9)
    figure = plot_accounts(accounts, tmp_path / "deep" / "priced.png")
    assert (tmp_path / "deep" / "priced.png").read_bytes().startswith(b"\x89PNG")
    judged, cost, u, time = figure.axes
    assert judged.get_title(loc="left") == "100% of 6 pairs judged, 33.3% failed"
    sent, failed = judged.get_lines()
    assert list(sent.get_xdata()) == [7, 9]
    assert list(failed.get_ydata()) == [50, 25]
    assert cost.get_title(loc="left") == "150 tokens, cost 1.5 (4 of 6 calls have no price)"
    assert list(u.get_lines()[0].get_ydata()) == [figures.uncertainty for figures in accounts.steps]
    assert "0% of judge time hidden" in time.get_title(loc="left")
