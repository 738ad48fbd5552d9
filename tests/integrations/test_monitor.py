"""Curves of a run: judge against head as sums that averaging leaves right, kept, resumed and drawn."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rmcore.engine import RewardEngine
from rmcore.engine.monitor import Agreement, agreement, group_figures, monitored
from rmcore.engine.routing import AlwaysRoute, NeverRoute
from rmcore.evaluation.plots.monitor import plot_monitor
from rmcore.integrations.monitor import RewardMonitor
from rmcore.judge import Pair, Verdict
from rmcore.judge.base import RULE

PROMPTS = ["p", "q"]
RESPONSES = [["good clear", "bad vague", "red"], ["kind", "rude"]]


class Told:
    """A judge that says what a function of the head's preference says."""

    def __init__(self, say) -> None:
        self.say = say

    async def judge(self, pairs: list[Pair]) -> list[Verdict]:
        return [self.say(pair) for pair in pairs]


def scored(reward_model, say=None):
    router = NeverRoute() if say is None else AlwaysRoute()
    return RewardEngine(reward_model, None if say is None else Told(say), router).score(PROMPTS, RESPONSES)


def side(pair: Pair, strength: float) -> Verdict:
    return Verdict(strength if pair.preference > 0 else -strength)


def test_a_judge_that_follows_the_head_agrees_and_one_that_does_not_disagrees(reward_model):
    friend = agreement(scored(reward_model, lambda pair: side(pair, 1.0)))
    foe = agreement(scored(reward_model, lambda pair: side(pair, -0.5)))
    assert (friend.pairs, friend.judged, friend.disagreed) == (4, 4.0, 0.0)
    assert (foe.pairs, foe.judged, foe.disagreed) == (4, 2.0, 2.0)
    assert foe.expected == pytest.approx(friend.expected / 2)
    head = [torch.sigmoid(-group.preference.abs()) for group in scored(reward_model)]
    by_hand = sum(float(group.triu(1).sum()) for group in head)
    assert friend.expected == pytest.approx(by_hand, abs=1e-9)


def test_what_has_no_side_does_not_count(reward_model):
    assert agreement(scored(reward_model)) == Agreement()
    assert agreement(scored(reward_model, lambda pair: Verdict(0.0))) == Agreement()
    assert agreement(scored(reward_model, lambda pair: Verdict.none("refusal"))) == Agreement()
    assert agreement(scored(reward_model, lambda pair: Verdict(1.0, judge=RULE))) == Agreement()


@pytest.mark.parametrize(
    "say",
    [
        None,
        lambda pair: side(pair, 1.0),
        lambda pair: side(pair, -0.5),
        lambda pair: Verdict(0.0),
        lambda pair: Verdict.none("refusal"),
        lambda pair: Verdict(1.0, judge=RULE),
        lambda pair: side(pair, 1.0 if "good" in pair.first + pair.second else -1.0),
    ],
)
def test_what_groups_say_of_themselves_adds_up_to_what_the_call_says(reward_model, say):
    scores = scored(reward_model, say)
    told, whole = [group_figures(group) for group in scores], agreement(scores)
    for name, value in (("judged", whole.judged), ("judge_disagreement", whole.disagreed)):
        assert sum(one[name] for one in told) == pytest.approx(value)
    assert sum(one["judge_disagreement_expected"] for one in told) == pytest.approx(whole.expected)
    summary = scores.summary()
    pairs = [len(responses) * (len(responses) - 1) // 2 for responses in RESPONSES]
    routed = sum(one["judge_rate"] * count for one, count in zip(told, pairs, strict=True))
    assert routed == pytest.approx(summary["routed"])
    mean_u = sum(one["uncertainty"] * count for one, count in zip(told, pairs, strict=True)) / sum(pairs)
    assert mean_u == pytest.approx(summary["uncertainty"]["mean"])


def test_a_group_without_a_pair_says_so(reward_model):
    (alone,) = RewardEngine(reward_model).score(["p"], [["good"]])
    assert group_figures(alone) == {
        "judge_rate": 0.0,
        "uncertainty": 1.0,
        "unknown_rate": 0.0,
        "judged": 0.0,
        "judge_disagreement": 0.0,
        "judge_disagreement_expected": 0.0,
    }


def test_a_group_says_of_how_many_pairs_nothing_is_known(reward_model):
    (group,) = RewardEngine(reward_model).score(["p"], [["good", "bad", "odd"]])
    known = group_figures(group)
    u = group.uncertainty.clone()
    u[0, 1] = u[1, 0] = torch.inf
    some = group_figures(replace(group, uncertainty=u))
    assert (known["unknown_rate"], some["unknown_rate"]) == (0.0, pytest.approx(1 / 3))
    assert some["uncertainty"] == pytest.approx(float(u[[0, 1], [2, 2]].mean()))
    none = group_figures(replace(group, uncertainty=torch.full_like(u, torch.inf)))
    assert (none["unknown_rate"], none["uncertainty"]) == (1.0, 1.0)


def test_the_curves_have_the_same_names_whatever_happened(reward_model):
    told = monitored(scored(reward_model, lambda pair: side(pair, 1.0)))
    assert told.keys() == monitored(None).keys() == monitored(scored(reward_model)).keys()
    assert all(math.isfinite(value) for value in (*told.values(), *monitored(None).values()))
    assert 1 <= told["uncertainty_p50"] <= told["uncertainty_p90"] <= told["uncertainty_p99"]
    assert (told["judged"], told["judge_disagreement"]) == (4.0, 0.0)


def logged(monitor, folder, step, **values):
    args, state = SimpleNamespace(output_dir=str(folder)), SimpleNamespace(global_step=step, is_world_process_zero=True)
    logs = {f"rmcore/{name}": value for name, value in values.items()} | {"loss": 1.0}
    monitor.on_log(args, state, None, logs=logs)
    return args, state


def test_a_resumed_run_goes_on_with_its_curves(tmp_path):
    first = RewardMonitor(plot=False)
    for step in range(1, 6):
        logged(first, tmp_path, step, judged=step, judge_cost=math.nan)
    rows = [json.loads(line) for line in (tmp_path / "rmcore_monitor.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "rmcore/judged": step} for step in range(1, 6)]
    again = RewardMonitor(plot=False)
    resumed = SimpleNamespace(global_step=3, is_world_process_zero=True)
    again.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), resumed, None)
    logged(again, tmp_path, 4, judged=40)
    assert [row["rmcore/judged"] for row in again.rows] == [1, 2, 3, 40]
    again.on_train_begin(
        SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=0, is_world_process_zero=True), None
    )
    assert again.rows == []


def test_other_ranks_and_other_logs_write_nothing(tmp_path):
    monitor = RewardMonitor(tmp_path / "kept")
    args, state = logged(monitor, tmp_path, 1)
    state.is_world_process_zero = False
    monitor.on_log(args, state, None, logs={"rmcore/judged": 1.0})
    monitor.on_log(args, state, None, logs=None)
    monitor.on_train_end(args, state, None)
    assert monitor.rows == []
    assert not list(tmp_path.rglob("*"))


def test_the_plot_shows_what_was_logged_and_gaps_where_nothing_was(tmp_path):
    rows = [
        {"step": k, "rmcore/judge_rate": 0.1, "rmcore/uncertainty_p50": 1.0 + k, "rmcore/judged": 10.0 * (k != 2),
         "rmcore/judge_disagreement": float(k), "rmcore/judge_disagreement_expected": 2.0}
        for k in range(5)
    ]  # fmt: skip
    figure = plot_monitor(rows, tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    routed, u, against = figure.axes
    assert routed.lines[0].get_ydata().tolist() == [10.0] * 5
    assert u.lines[0].get_ydata().tolist() == [1, 2, 3, 4, 5]
    seen = against.lines[0].get_ydata()
    assert seen[[0, 1, 3, 4]].tolist() == [0, 10, 30, 40]
    assert math.isnan(seen[2])
    with pytest.raises(ValueError, match="rows"):
        plot_monitor([])
