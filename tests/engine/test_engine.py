"""The algorithm by hand: pairs, p̃, advantages and records of groups whose hidden states are a few small numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.by_hand import table_engine

from rmcore import BudgetRouter, RewardEngine, RewardModel
from rmcore._base.errors import InputError
from rmcore.engine import GroupScores
from rmcore.engine.advantage import rloo_advantages
from rmcore.engine.routing import AlwaysRoute, LearnedRouter, NeverRoute, ThresholdRouter
from rmcore.judge.base import Verdict
from rmcore.model.error_prior import FEATURES, ErrorPrior

A = 3.0  # the amplitude of the hand-made heads


def by_hand(rows, beta):
    """(g, v, u, p) of a difference-mode group under the hand-made head, in plain loops."""
    k = len(rows)
    g, v = [[0.0] * k for _ in range(k)], [[0.0] * k for _ in range(k)]
    for i in range(k):
        for j in range(k):
            delta = [a - b for a, b in zip(rows[i], rows[j], strict=True)]
            g[i][j] = sum(b * d for b, d in zip(beta, delta, strict=True))
            v[i][j] = sum(d * d for d in delta)
    u = [[math.sqrt(1 + A * x) for x in row] for row in v]
    p = [[g[i][j] / u[i][j] for j in range(k)] for i in range(k)]
    return tuple(torch.tensor(m, dtype=torch.float64) for m in (g, v, u, p))


def assert_antisymmetric(group) -> None:
    assert torch.equal(group.preference, -group.preference.mT)
    assert torch.equal(group.logit, -group.logit.mT)
    assert torch.equal(group.uncertainty, group.uncertainty.mT)
    assert torch.equal(group.variance, group.variance.mT)
    assert torch.equal(group.routed, group.routed.mT)
    assert bool((group.uncertainty >= 1).all())


def assert_trainer_gets_the_advantages_back(group) -> None:
    """What TRL's two trainers compute from the rewards."""
    k = group.size
    rewards = group.rewards
    leave_one_out = rewards - (rewards.sum() - rewards) / max(k - 1, 1)
    torch.testing.assert_close(leave_one_out if k > 1 else rewards, group.advantages, rtol=0, atol=1e-6)
    centred = group.rewards_for("group-mean")
    torch.testing.assert_close(centred - centred.mean(), group.advantages, rtol=0, atol=1e-6)


# -- difference mode -------------------------------------------------------------------------------------------------


def test_difference_by_hand(hand_head):
    """β = (2, 1): rows (1,0), (0,0), (0,1), so that v is 1, 2 or 1 and u is 2, √7 or 2."""
    rows = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    group = RewardEngine(hand_head([2.0, 1.0])).score_hidden(torch.tensor(rows), [3])[0]
    assert group.logit.tolist() == [[0, 2, 1], [-2, 0, -1], [-1, 1, 0]]
    torch.testing.assert_close(group.variance, torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]]).double())
    r = 1 / math.sqrt(7)
    expected = torch.tensor([[0, 1, r], [-1, 0, -0.5], [-r, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(group.preference, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        group.advantages, torch.tensor([(1 + r) / 2, -0.75, (0.5 - r) / 2], dtype=torch.float64), rtol=1e-6, atol=1e-7
    )
    assert group.decisions == ()
    assert not group.routed.any()
    assert not group.one_order


matrix_rows = st.lists(st.tuples(*[st.integers(-8, 8).map(lambda x: x / 4)] * 3), min_size=1, max_size=6)


@given(groups=st.lists(matrix_rows, min_size=1, max_size=4))
def test_difference_against_loops(hand_head, groups):
    beta = [0.5, -1.0, 2.0]
    hidden = torch.tensor([row for group in groups for row in group])
    scores = RewardEngine(hand_head(beta)).score_hidden(hidden, [len(g) for g in groups])
    assert len(scores) == len(groups)
    for rows, group in zip(groups, scores, strict=True):
        g, v, u, p = by_hand(rows, beta)
        torch.testing.assert_close(group.logit, g, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.variance, v, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.uncertainty, u, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.preference, p, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.advantages, rloo_advantages(p), rtol=1e-5, atol=1e-5)
        assert_antisymmetric(group)
        assert_trainer_gets_the_advantages_back(group)


def test_groups_do_not_see_each_other(hand_head):
    engine = RewardEngine(hand_head([1.0, 1.0]))
    torch.manual_seed(0)
    hidden = torch.randn(9, 2)
    together = engine.score_hidden(hidden, [2, 1, 4, 2])
    start = 0
    for size, group in zip((2, 1, 4, 2), together, strict=True):
        alone = engine.score_hidden(hidden[start : start + size], [size])[0]
        torch.testing.assert_close(group.preference, alone.preference)
        start += size
    assert [group.size for group in together] == [2, 1, 4, 2]
    assert together.advantages.shape == together.rewards.shape == (9,)
    torch.testing.assert_close(together.advantages[2:3], torch.zeros(1, dtype=torch.float64))


def test_one_response_has_advantage_zero_and_is_counted(hand_head):
    scores = RewardEngine(hand_head([1.0, 1.0])).score_hidden(torch.randn(3, 2), [1, 1, 1])
    assert scores.advantages.tolist() == scores.rewards.tolist() == [0, 0, 0]
    summary = scores.summary()
    assert summary["single_response_groups"] == summary["groups"] == 3
    assert summary["pairs"] == 0
    assert summary["uncertainty"] is None
    assert summary["unscorable_responses"] == 0


# -- concat mode -----------------------------------------------------------------------------------------------------


def test_concat_by_hand(hand_head):
    """Rows (0,1) then (1,0) of a pair: g = x₀ + β₀, v = x₀² + x₁²."""
    head = hand_head([1.0, 0.0], "concat", beta0=0.5)
    hidden = torch.tensor([[1.5, 0.0], [0.5, math.sqrt(0.75)]])  # g = 2, 1; v = 2.25, 1 → u = √7.75, 2
    group = RewardEngine(head).score_hidden(hidden, [2])[0]
    u = (math.sqrt(7.75) + 2) / 2
    p = (2 / math.sqrt(7.75) - 1 / 2) / 2
    assert group.preference[0, 1].item() == pytest.approx(p, rel=1e-6)
    assert group.uncertainty[0, 1].item() == pytest.approx(u, rel=1e-6)
    assert group.logit[0, 1].item() == pytest.approx(0.5, rel=1e-6)
    assert group.variance[0, 1].item() == pytest.approx(1.625, rel=1e-6)
    assert_antisymmetric(group)


def pair_rows(k: int, orders: str, start: float = 0.0) -> list[list[float]]:
    """Rows whose logit names the ordered pair: 10 i + j + start."""
    return [[10 * i + j + start] for i in range(k) for j in range(k) if (i != j if orders == "both" else i < j)]


@pytest.mark.parametrize("orders", ["both", "one"])
def test_concat_rows_are_row_major(hand_head, orders):
    head = hand_head([1.0], "concat", amplitude=0.0)
    hidden = torch.tensor(pair_rows(3, orders) + pair_rows(2, orders, 100) + pair_rows(4, orders, 200))
    scores = RewardEngine(head, orders=orders).score_hidden(hidden, [3, 1, 2, 4])
    for group, (k, start) in zip(scores, [(3, 0), (1, 0), (2, 100), (4, 200)], strict=True):
        assert group.size == k
        assert group.one_order == (orders == "one")
        for i in range(k):
            for j in range(i + 1, k):
                # both: ((10i + j + s) − (10j + i + s)) / 2; one: 10i + j + s
                expected = 4.5 * (i - j) if orders == "both" else 10 * i + j + start
                assert group.preference[i, j].item() == group.logit[i, j].item() == expected
        assert_antisymmetric(group)
        assert_trainer_gets_the_advantages_back(group)
    assert scores.summary()["one_order_groups"] == (4 if orders == "one" else 0)


def test_a_head_that_always_prefers_the_first_shown_says_nothing(hand_head):
    hidden = torch.full((6, 1), 3.0)
    both = RewardEngine(hand_head([1.0], "concat")).score_hidden(hidden, [3])[0]
    assert both.advantages.tolist() == [0, 0, 0]


def test_only_single_responses_in_concat_mode(hand_head):
    scores = RewardEngine(hand_head([1.0, 1.0], "concat")).score_hidden(torch.empty(0, 2), [1, 1])
    assert scores.advantages.tolist() == [0, 0]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    mode=st.sampled_from(["difference", "concat"]),
    orders=st.sampled_from(["both", "one"]),
    seed=st.integers(0, 1000),
)
def test_identities_hold_on_any_batch(hand_head, scripted_judge, sizes, mode, orders, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes) if mode == "difference" else sum(k * (k - 1) // (1 if orders == "both" else 2) for k in sizes)
    judge = scripted_judge(lambda p: Verdict([1.0, -1.0, 0.0, 0.5, None][len(p.first + p.second) % 5], "why"))
    engine = RewardEngine(hand_head([1.0, -2.0], mode), judge, BudgetRouter(0.5), orders=orders)
    texts = [[f"{'x' * (seed % 7 + i)}{g}" for i in range(k)] for g, k in enumerate(sizes)]
    hidden = torch.randn(rows, 2, generator=generator)
    scores = engine.score_hidden(hidden, sizes, prompts=["p"] * len(sizes), responses=texts)
    for group in scores:
        assert_antisymmetric(group)
        assert_trainer_gets_the_advantages_back(group)
        assert abs(group.advantages.sum().item()) < 1e-9
    summary = scores.summary()
    assert sum(summary["decided_by"].values()) == summary["pairs"] == sum(k * (k - 1) // 2 for k in sizes)
    assert summary["routed"] == summary["pairs"] // 2


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "orders"), [("difference", "both"), ("concat", "both"), ("concat", "one")])
def test_score_and_score_hidden_agree(make_backbone, preferences, mode, orders):
    backbone = make_backbone("bert", pooling="mean")
    model, _ = RewardModel.fit(backbone, preferences, mode=mode, num_features=32)
    prompts = ["tell me", [{"role": "user", "content": "about the fox"}], "x"]
    responses = [["good", "bad", "the fox"], ["Paris"], ["a", "b", "c", "good dog"]]
    engine = RewardEngine(model, orders=orders)
    scores = engine.score(prompts, responses)
    hidden = model.hidden_states(prompts, responses, orders=orders)
    again = engine.score_hidden(hidden, torch.tensor([3, 1, 4]))
    for one, two in zip(scores, again, strict=True):
        assert torch.equal(one.preference, two.preference)
        assert torch.equal(one.uncertainty, two.uncertainty)
    assert set(scores.seconds) == {"backbone", "head", "total"}
    assert set(again.seconds) == {"head", "total"}
    assert scores.encoding.texts == len(hidden)
    assert again.encoding is None
    # The next call's statistics are its own.
    assert engine.score(prompts, responses).encoding.texts == len(hidden)


def test_hidden_rows_of_a_pair_group_are_row_major(make_backbone, preferences):
    backbone = make_backbone("llama", pooling="mean")
    model, _ = RewardModel.fit(backbone, preferences, mode="concat", num_features=16)
    encode = backbone.encoder.encode
    order = [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
    assert model.encode_group("p", ["a", "b", "c"]) == [encode("p", x, y) for x, y in order]
    assert model.encode_group("p", ["a", "b", "c"], orders="one") == [
        encode("p", x, y) for x, y in [("a", "b"), ("a", "c"), ("b", "c")]
    ]


def test_equal_responses_are_decided_by_rule(hand_head, table_model, scripted_judge):
    judge = scripted_judge(lambda _: Verdict.of("win"))
    engine = table_engine(hand_head, table_model, judge, AlwaysRoute())
    group = engine.score(["p"], [["1 0", "2 0", "1 0"]])[0]
    assert group.preference[0, 2] == group.logit[0, 2] == group.variance[0, 2] == 0
    assert group.uncertainty[0, 2] == 1
    assert not group.routed[0, 2]
    assert judge.asked == [("1 0", "2 0"), ("2 0", "1 0")]
    assert [(d.i, d.j, d.by) for d in group.decisions] == [(0, 1, "judge"), (0, 2, "identical"), (1, 2, "judge")]


def test_equal_responses_are_decided_by_rule_in_concat_mode(hand_head, table_model):
    """A head with a taste for the first shown, and noise, must not rank a text above itself."""
    noisy = iter(range(1, 100))
    model = table_model(hand_head([1.0], "concat"), lambda *_: [float(next(noisy))])
    for orders in ("both", "one"):
        group = RewardEngine(model, orders=orders).score(["p"], [["same", "same", "same"]])[0]
        assert not group.preference.any()
        assert group.advantages.tolist() == [0, 0, 0]
        assert {d.by for d in group.decisions} == {"identical"}


def test_equal_responses_do_not_use_up_the_budget(hand_head, table_model, scripted_judge):
    judge = scripted_judge(lambda _: Verdict.of("win"))
    engine = table_engine(hand_head, table_model, judge, BudgetRouter(fraction=1.0))
    scores = engine.score(["p"], [["1 0", "1 0", "1 0", "2 0"]])
    assert len(judge.asked) == 1  # the three pairs with "2 0" are one question
    assert scores.summary()["decided_by"] == {"head": 0, "judge": 3, "judge_failed": 0, "identical": 3, "nobody": 0}


def test_budget_is_over_the_whole_batch(hand_head, table_model, scripted_judge):
    """The two most uncertain pairs of all groups, wherever they are."""
    judge = scripted_judge(lambda _: Verdict.of("win"))
    engine = table_engine(hand_head, table_model, judge, BudgetRouter(count=2))
    scores = engine.score(["p", "q", "r"], [["0 0", "0 1", "0 2"], ["0 0", "0 9"], ["0 0", "0 8"]])
    assert judge.asked == [("0 0", "0 9"), ("0 0", "0 8")]
    assert [bool(group.routed.any()) for group in scores] == [False, True, True]


def test_questions_carry_the_texts_and_a_name(hand_head, table_model, scripted_judge):
    judge = scripted_judge(lambda _: Verdict.of("tie"))
    prompt = [{"role": "user", "content": "q"}]
    table_engine(hand_head, table_model, judge, AlwaysRoute()).score(["p", prompt], [["1 0", "2 0"], ["3 0", "4 0"]])
    assert [(q.prompt, q.first, q.second, q.id) for q in judge.calls[0]] == [
        ("p", "1 0", "2 0", "0:0:1"),
        (prompt, "3 0", "4 0", "1:0:1"),
    ]


# -- routers in the engine -------------------------------------------------------------------------------------------


def test_a_head_without_uncertainties_is_told_of_where_a_router_goes_by_them(hand_head, scripted_judge, caplog):
    judge, sure = scripted_judge(lambda pair: Verdict(1.0)), hand_head([1.0], amplitude=0.0)
    RewardEngine(sure)
    RewardEngine(sure, judge, ThresholdRouter(1.0, by="margin"))
    RewardEngine(sure, judge)  # which learns, and has margins and lengths to learn from
    RewardEngine(hand_head([1.0]), judge, ThresholdRouter(1.4))
    assert not caplog.records
    RewardEngine(sure, judge, ThresholdRouter(1.4))
    assert "amplitude is 0" in caplog.text


def test_default_routers(hand_head, scripted_judge):
    assert isinstance(RewardEngine(hand_head([1.0])).router, NeverRoute)
    router = RewardEngine(hand_head([1.0]), scripted_judge(lambda _: Verdict.of("tie"))).router
    assert isinstance(router, LearnedRouter)
    assert (router.fraction, router.score.prior) == (0.25, None)


def test_a_router_that_learns_is_given_lengths_distances_and_verdicts(hand_head, table_model, scripted_judge):
    identity = torch.eye(len(FEATURES) + 1, dtype=torch.float64)
    own = len(FEATURES) - 1
    prior = ErrorPrior(torch.zeros(own).double(), torch.ones(own).double(), identity[0], identity, torch.zeros(1, 2))
    model = table_model(hand_head([1.0, 0.0]), lambda _prompt, text: [float(x) for x in text.split()[:2]])
    model.error_prior = prior
    judge = scripted_judge(lambda _: Verdict.of("loss"))
    engine = RewardEngine(model, judge)
    assert isinstance(engine.router, LearnedRouter)
    assert engine.router.score.prior is prior
    seen = []
    real = engine.router.select
    engine.router.select = lambda candidates: seen.append(candidates) or real(candidates)
    for micro_batch_tokens in (None, 1):
        engine.micro_batch_tokens = micro_batch_tokens
        seen.clear()
        engine.score(["p", "q"], [["3 4", "0 1", "22 0"], ["6 8", "0 -0.5"]])
        columns = {
            name: torch.cat([c.columns[name] for c in seen]).tolist() for name in ("log_length_ratio", "distance")
        }
        assert columns["distance"] == [3.0, 13.5, 11.5, 5.25]
        lengths = [math.log(4 / 4), math.log(4 / 5), math.log(4 / 5), math.log(4 / 7)]
        assert columns["log_length_ratio"] == pytest.approx(lengths)
    assert engine.router.explain()["verdicts"] == 2
    assert engine.router.explain()["absent"] == []
    again = RewardEngine(model, judge)
    again.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    assert again.state_dict() == engine.state_dict()


@pytest.mark.parametrize("answer", [torch.ones(2, dtype=torch.bool), torch.ones(1), torch.ones(1, 1).bool(), [True]])
def test_a_router_that_answers_nonsense(hand_head, table_model, scripted_judge, answer):
    class Odd:
        def select(self, _candidates):
            return answer

    engine = table_engine(hand_head, table_model, scripted_judge(lambda _: Verdict.of("tie")), Odd())
    with pytest.raises(InputError, match=r"router\.select.*bool"):
        engine.score(["p"], [["1 0", "2 0"]])


# -- results ---------------------------------------------------------------------------------------------------------


def test_records_and_summary(hand_head, table_model, scripted_judge):
    answers = {"1 0": Verdict.of("win", critique="clear"), "3 0": Verdict(0.0, flipped=True), "5 0": Verdict.of("tie")}
    judge = scripted_judge(lambda pair: answers.get(pair.first, Verdict.none("http_500")))
    engine = table_engine(hand_head, table_model, judge, AlwaysRoute())
    groups = [["1 0", "2 0"], ["3 0", "4 0"], ["5 0", "6 0"], ["7 0", "8 0"], ["9 0"], ["1 1", "1 1"]]
    scores = engine.score(list("pqrstu"), groups)
    assert isinstance(scores, GroupScores)
    assert scores[0] is next(iter(scores))
    assert scores[1:3] == scores.groups[1:3]
    summary = scores.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["groups"] == 6
    assert summary["responses"] == 11
    assert summary["single_response_groups"] == 1
    assert summary["pairs"] == 5
    assert summary["routed"] == 4
    assert summary["decided_by"] == {"head": 0, "judge": 3, "judge_failed": 1, "identical": 1, "nobody": 0}
    assert summary["judge_failures"] == {"http_500": 1}
    assert (summary["judge_ties"], summary["judge_flips"]) == (1, 1)
    assert summary["uncertainty"]["p50"] == pytest.approx(2.0)
    assert set(summary["seconds"]) == {"backbone", "head", "judge", "total"}
    records = json.loads(json.dumps(scores.to_records(), allow_nan=False))
    assert records[0]["decisions"] == [
        {"i": 0, "j": 1, "by": "judge", "outcome": "win", "preference": 1.0, "flipped": False, "critique": "clear"}
    ]
    assert records[3]["decisions"] == [{"i": 0, "j": 1, "by": "judge_failed", "reason": "http_500"}]
    assert records[4]["advantages"] == [0.0]
    assert records[5]["decisions"] == [{"i": 0, "j": 1, "by": "identical"}]
    assert records[0]["routed"] == [[False, True], [True, False]]
    assert set(records[0]) == {
        *("advantages", "rewards", "preference", "uncertainty", "logit", "variance", "routed", "decisions", "one_order")
    }


def test_grpo_advantages_are_those_of_the_rewards(hand_head):
    group = RewardEngine(hand_head([1.0, 1.0])).score_hidden(torch.tensor([[1.0, 0], [2, 1], [0, 0]]), [3])[0]
    rewards = group.rewards
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    torch.testing.assert_close(group.grpo_advantages(), expected)
    torch.testing.assert_close(group.grpo_advantages(scale_by_std=False), rewards - rewards.mean())
    with pytest.raises(InputError, match="baseline"):
        group.rewards_for("median")


def test_two_calls_are_bit_identical(make_backbone, preferences, scripted_judge):
    backbone = make_backbone("qwen3", pooling="mean")
    model, _ = RewardModel.fit(backbone, preferences, num_features=64)
    judge = scripted_judge(lambda pair: Verdict(0.25, flipped=len(pair.first) % 2 == 0))
    engine = RewardEngine(model, judge, BudgetRouter(0.3))
    prompts, responses = ["p", "tell me"], [["good", "bad", "fox", "dog"], ["Paris", "the capital", "Paris"]]
    one, two = engine.score(prompts, responses), engine.score(prompts, responses)
    for x, y in zip(one, two, strict=True):
        for name in ("preference", "uncertainty", "logit", "variance", "routed", "advantages", "rewards"):
            assert torch.equal(getattr(x, name), getattr(y, name))
        assert x.decisions == y.decisions
    assert one.to_records() == two.to_records()


def test_results_are_float64_on_the_cpu_and_inputs_untouched(hand_head):
    hidden = torch.randn(4, 2, dtype=torch.bfloat16)
    before = hidden.clone()
    group = RewardEngine(hand_head([1.0, 1.0])).score_hidden(hidden, [4])[0]
    assert {group.preference.dtype, group.uncertainty.dtype, group.logit.dtype} == {torch.float64}
    assert torch.equal(hidden, before)


def test_progress(make_backbone, preferences, scripted_judge):
    model, _ = RewardModel.fit(make_backbone("bert", pooling="mean"), preferences, num_features=16)
    seen: list[tuple[str, int, int]] = []
    engine = RewardEngine(model, scripted_judge(lambda _: Verdict.of("win")), AlwaysRoute())
    engine.score(["p"], [["good", "bad"]], progress=lambda *a: seen.append(a))
    assert [s for s, *_ in seen] == ["encoding", "judging"]
    assert all(done == total for _, done, total in seen)
