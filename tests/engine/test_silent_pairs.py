"""Pairs of which the head's inputs tell nothing: never u = 1, first to the judge, counted, left out of means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore import BudgetRouter, RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.accounts import Accounts, account_lines
from rmcore.engine.groups import GroupScores
from rmcore.engine.learning.judged import judged_pairs
from rmcore.engine.routing import AdaptiveRouter, AlwaysRoute, Budget, NeverRoute, RandomRouter, ThresholdRouter
from rmcore.engine.selection import best_of, member_uncertainty
from rmcore.evaluation.evaluate import encode_pairs
from rmcore.evaluation.streams import StreamPair
from rmcore.judge.base import Verdict
from rmcore.model import Preference, RewardModel

SAME = "the quick brown fox jumps over the lazy dog and runs home "
LONG = SAME * 6


class Judge:
    """Prefers the first; keeps what it was asked."""

    def __init__(self, outcome: str | None = "win") -> None:
        self.outcome, self.asked = outcome, []

    async def judge(self, pairs):
        self.asked += pairs
        return [Verdict.none("refused") if self.outcome is None else Verdict.of(self.outcome) for _ in pairs]


@pytest.fixture(params=["difference", "concat"])
def mode(request):
    return request.param


@pytest.fixture
def model(make_backbone, mode) -> RewardModel:
    backbone = make_backbone("llama", max_length=64, overlong="truncate-right")
    pairs = [
        Preference(f"what is the capital {k}", "the quick fox", "a bad answer is long and wrong " * (k % 3 + 1))
        for k in range(8)
    ]
    return RewardModel.fit(backbone, pairs, mode=mode, num_features=64)[0]


GROUP = [LONG + "correct", LONG + "wrong", "a short answer"]


@pytest.mark.parametrize("orders", ["both", "one"])
def test_without_a_judge_they_have_no_preference_and_no_certainty(model, orders):
    scores = RewardEngine(model, orders=orders).score(["Q"], [GROUP])
    group = scores[0]
    assert group.preference[0, 1].isnan()
    assert group.uncertainty[0, 1] == math.inf
    assert group.preference[0, 2].isfinite()
    assert group.uncertainty[0, 2] < math.inf
    assert [(d.i, d.j, d.by, d.no_signal) for d in group.decisions] == [(0, 1, "nobody", "equal_inputs")]
    assert bool(group.advantages.isfinite().all())  # the other pairs' means
    assert group.advantages[0] == group.preference[0, 2]
    summary = scores.summary()
    assert summary["no_signal"] == {"equal_inputs": 1, "unread": 0}
    assert summary["decided_by"] == {"head": 2, "judge": 0, "judge_failed": 0, "identical": 0, "nobody": 1}
    assert summary["uncertainty"]["count"] == 2
    assert not bool(group.routed.any())
    assert group.to_record()["preference"][0][1] is None


def test_the_model_alone_says_the_same(model, mode):
    alone, engine = model.score("Q", GROUP), RewardEngine(model).score(["Q"], [GROUP])[0]
    for name in ("preference", "uncertainty", "logit"):
        torch.testing.assert_close(getattr(alone, name), getattr(engine, name), equal_nan=True)
    torch.testing.assert_close(alone.rewards, engine.rewards)
    both = model.score("Q", GROUP[:2])
    assert bool(both.rewards.isnan().all())
    assert both.response_uncertainty.tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    "router",
    [
        BudgetRouter(fraction=0.34),
        BudgetRouter(count=1, by="margin"),
        BudgetRouter(count=1, by="error_probability"),
        BudgetRouter(count=1, by="rank_sum"),
        ThresholdRouter(1e9),
        ThresholdRouter(-1e-12, by="margin"),
        RandomRouter(count=1),
        AdaptiveRouter(0.34, [Budget(1, "calls", max_per_pair=1)]),
    ],
)
def test_they_are_the_first_that_a_judge_is_asked(model, router):
    judge = Judge()
    scores = RewardEngine(model, judge, router).score(["Q"], [GROUP])
    assert [(pair.first, pair.second) for pair in judge.asked] == [(GROUP[0], GROUP[1])]
    assert judge.asked[0].preference is None
    group = scores[0]
    assert group.preference[0, 1] == pytest.approx(math.log(0.88 / 0.12))
    assert bool(group.routed[0, 1])
    assert [(d.by, d.no_signal) for d in group.decisions] == [("judge", "equal_inputs")]
    assert scores.summary()["no_signal"]["equal_inputs"] == 1


def test_a_judge_that_fails_leaves_them_without_a_preference(model):
    group = RewardEngine(model, Judge(None), AlwaysRoute()).score(["Q"], [GROUP])[0]
    assert group.preference[0, 1].isnan()
    assert group.preference[0, 2].isfinite()


def test_what_the_router_does_not_take_is_nobodys(model):
    judge = Judge()
    twins = [SAME * 7 + str(k) for k in range(4)]
    scores = RewardEngine(model, judge, BudgetRouter(count=2)).score(["Q"], [twins])
    assert scores.summary()["decided_by"] == {"head": 0, "judge": 2, "judge_failed": 0, "identical": 0, "nobody": 4}
    assert len(judge.asked) == 2
    never = RewardEngine(model, judge, NeverRoute()).score(["Q"], [twins])
    assert never.summary()["decided_by"]["nobody"] == 6
    assert bool(never[0].advantages.isnan().all())


def test_equal_texts_are_still_a_tie_by_rule(model):
    group = RewardEngine(model).score(["Q"], [[LONG, LONG, "a"]])[0]
    assert group.preference[0, 1] == 0
    assert group.uncertainty[0, 1] == 1
    assert [(d.by, d.no_signal) for d in group.decisions] == [("identical", "")]


@given(cuts=st.lists(st.integers(0, 60), min_size=2, max_size=5))
def test_certain_only_where_texts_are_equal(quick_model, cuts):
    """Whatever is cut: different responses never get g = 0 with u = 1."""
    responses = [" ".join(["fox"] * n) for n in cuts]
    group = RewardEngine(quick_model).score(["Q"], [responses])[0]
    for i in range(len(cuts)):
        for j in range(i):
            if responses[i] != responses[j]:
                assert group.uncertainty[i, j] > 1
                assert group.preference[i, j].isnan() or group.logit[i, j] != 0
            else:
                assert group.uncertainty[i, j] == 1


@pytest.fixture(scope="module")
def quick_model(make_backbone) -> RewardModel:
    backbone = make_backbone("llama", max_length=24, overlong="truncate-longest")
    pairs = [Preference(f"what {k}", "the quick fox", "a bad answer") for k in range(4)]
    return RewardModel.fit(backbone, pairs, num_features=32)[0]


def test_case_blind_tokenizers_make_equal_inputs_too(make_backbone):
    backbone = make_backbone("bert", pooling="mean")
    pairs = [Preference(f"what {k}", "the quick fox", "a bad answer") for k in range(4)]
    model, _ = RewardModel.fit(backbone, pairs, num_features=32)
    scores = RewardEngine(model).score(["what"], [["The Fox", "the fox", "dog"]])
    assert scores.summary()["no_signal"]["equal_inputs"] == 1
    assert scores[0].uncertainty[0, 1] == math.inf


def test_hidden_rows_from_elsewhere(hand_head):
    hidden = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]])
    engine = RewardEngine(hand_head([1.0, 0.5]))
    known = engine.score_hidden(hidden, [3], prompts=["Q"], responses=[["a", "b", "c"]])[0]
    assert known.uncertainty[0, 1] == math.inf
    same = engine.score_hidden(hidden, [3], prompts=["Q"], responses=[["a", "a", "c"]])[0]
    assert same.uncertainty[0, 1] == 1


def test_hidden_rows_of_pairs_from_elsewhere(hand_head):
    """In concat mode the two orders of such a pair have one row."""
    hidden = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 2.0], [0.0, 1.0], [2.0, 2.0], [0.5, 1.0]])
    engine = RewardEngine(hand_head([1.0, 0.5], "concat"))
    known = engine.score_hidden(hidden, [3], prompts=["Q"], responses=[["a", "b", "c"]])
    assert known[0].uncertainty[0, 1] == math.inf
    assert known[0].preference[0, 1].isnan()
    assert bool(known[0].uncertainty[2].isfinite().all())
    assert known.summary()["no_signal"]["equal_inputs"] == 1
    same = engine.score_hidden(hidden, [3], prompts=["Q"], responses=[["a", "a", "c"]])[0]
    assert (same.preference[0, 1], same.uncertainty[0, 1]) == (0, 1)
    judged = RewardEngine(engine.head, Judge(), BudgetRouter(count=1))
    assert judged.score_hidden(hidden, [3], prompts=["Q"], responses=[["a", "b", "c"]])[0].routed[0, 1]


def test_equal_states_of_different_inputs_tell_nothing_either(hand_head, table_model):
    """A decoder's first token knows nothing of what follows, and a window's last nothing of what it cannot see."""
    states = {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [0.0, 1.0]}
    model = table_model(hand_head([1.0, 0.5]), lambda prompt, text: states[text])
    group = RewardEngine(model).score(["Q"], [["a", "b", "c"]])[0]
    assert [(d.i, d.j, d.by, d.no_signal) for d in group.decisions] == [(0, 1, "nobody", "equal_inputs")]
    assert group.uncertainty[0, 1] == math.inf
    assert RewardEngine(model).score(["Q"], [["a", "a", "c"]])[0].uncertainty[0, 1] == 1


def test_the_model_alone_and_evaluation_say_so_too(make_backbone):
    backbone = make_backbone("llama")
    pairs = [Preference(f"what {k}", "the quick fox", "a bad answer is long") for k in range(8)]
    model, _ = RewardModel.fit(backbone, pairs, num_features=32)
    first = RewardModel(make_backbone("llama", pooling="first"), model.head)
    for group in (
        first.score("what", ["the quick fox", "a bad answer"]),
        RewardEngine(first).score(["what"], [["x", "y"]])[0],
    ):
        assert group.uncertainty[0, 1] == math.inf
        assert group.preference[0, 1].isnan()
    asked = [StreamPair("what", "the quick fox", second, 1.0, "x") for second in ("a bad answer", "the quick fox")]
    assert encode_pairs(first.backbone, asked, "difference").silent.tolist() == [True, False]


def test_a_table_made_again_from_groups_counts_them_too(model):
    scores = RewardEngine(model, Judge(), BudgetRouter(count=1)).score(["Q", "R"], [GROUP, [*GROUP, LONG + "other"]])
    again = GroupScores(list(scores)).summary()
    for name in ("decided_by", "no_signal", "routed", "pairs"):
        assert again[name] == scores.summary()[name]


def test_accounts_tell_them(model):
    accounts = Accounts()
    accounts.add(RewardEngine(model).score(["Q"], [GROUP]).summary())
    accounts.add(RewardEngine(model).score(["Q"], [GROUP]).summary())
    told = dict(account_lines(accounts.totals()))["no signal"]
    assert told == "2 pairs (equal inputs 2), of which nobody decided 2"


def test_selection_leaves_them_out_of_means(model):
    group = RewardEngine(model).score(["Q"], [GROUP])[0]
    u = member_uncertainty(group)
    assert u[0] == group.uncertainty[0, 2]
    assert u[2] == group.uncertainty[2, :2].mean()
    assert best_of([group], [GROUP], penalty=1.0)[0].score < math.inf


# -- over-long responses without a reward ------------------------------------------------------------------------------


def test_an_unread_response_has_no_reward_and_changes_nothing_for_its_siblings(model, mode):
    engine = RewardEngine(model)
    short = ["the quick fox", "a bad answer", "Paris"]
    alone = engine.score(["Q"], [short])[0]
    scores = engine.score(["Q"], [[short[0], LONG, *short[1:]]], overlong="no-reward")
    group = scores[0]
    assert group.advantages[1].isnan()
    assert group.rewards[1].isnan()
    rest = torch.tensor([0, 2, 3])
    torch.testing.assert_close(group.advantages[rest], alone.advantages)
    torch.testing.assert_close(group.rewards[rest], alone.rewards)
    torch.testing.assert_close(group.uncertainty[rest][:, rest], alone.uncertainty)
    torch.testing.assert_close(member_uncertainty(group)[rest], member_uncertainty(alone))
    assert scores.summary()["no_signal"] == {"equal_inputs": 0, "unread": 3}
    assert scores.summary()["unscorable_responses"] == 1
    assert scores.encoding.unread_texts == (1 if mode == "difference" else 6)


def test_a_group_of_which_nothing_is_read(model):
    scores = RewardEngine(model).score(["Q", "Q"], [[LONG, LONG + "b"], ["a", "b"]], overlong="no-reward")
    assert bool(scores[0].advantages.isnan().all())
    assert bool(scores[1].advantages.isfinite().all())
    equal = RewardEngine(model).score(["Q"], [[LONG, LONG]], overlong="no-reward")[0]
    assert bool(equal.advantages.isnan().all())  # nothing was read, so no rule says that they are equally good


def test_a_judge_may_decide_an_unread_response(model):
    group = RewardEngine(model, Judge(), BudgetRouter(count=2)).score(["Q"], [["a", LONG, "b"]], overlong="no-reward")[
        0
    ]
    assert bool(group.preference.isfinite().all())
    assert {d.no_signal for d in group.decisions} == {"unread"}


def test_limits_are_of_one_call(model):
    engine = RewardEngine(model)
    with pytest.raises(InputError, match="larger max_length"):
        engine.score(["Q"], [[LONG, "a"]], overlong="error")
    assert engine.score(["Q"], [[LONG, "a"]], max_length=20)[0].preference.isfinite().all()
    engine.score(["Q"], [[LONG, "a"]])  # as configured
    for bad in ({"overlong": "none"}, {"max_length": 0}, {"max_length": 10**6}):
        with pytest.raises(InputError, match=next(iter(bad))):
            engine.score(["Q"], [["a", "b"]], **bad)
        with pytest.raises(InputError, match=next(iter(bad))):
            model.score("Q", ["a", "b"], **bad)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_a_learner_does_not_learn_from_them(model, mode):
    scores = RewardEngine(model, Judge(), AlwaysRoute()).score(["Q"], [GROUP])
    scores.hidden = model.hidden_states(["Q"], [GROUP])
    learned = judged_pairs(scores, mode)
    assert learned.skipped == {"no_signal": 1, "repeated": 1}
    assert len(learned) == (1 if mode == "difference" else 2)


def test_training_leaves_them_out_and_says_so(make_backbone, caplog, mode):
    backbone = make_backbone("llama", max_length=64, overlong="truncate-right")
    good = [Preference(f"what is {k}", "the quick fox", "a bad answer") for k in range(4)]
    silent = [Preference("Q", LONG + "a", LONG + "b"), Preference("Q", "same", "same")]
    with caplog.at_level("WARNING", logger="rmcore"):
        model, _ = RewardModel.fit(backbone, [*good, *silent], mode=mode, num_features=32)
    assert "2 of 6 pairs carry no signal and are left out: 1 equal responses, 1 equal when cut" in caplog.text
    clean, _ = RewardModel.fit(backbone, good, mode=mode, num_features=32)
    assert torch.equal(model.head.beta, clean.head.beta)
    with pytest.raises(InputError, match="2 pairs that carry no signal"):
        RewardModel.fit(backbone, silent, mode=mode, num_features=32)
