"""Some of the pairs only: what is compared, routed and encoded, and the advantages that come of it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore import RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.comparisons import (
    design_pairs,
    graph_advantages,
    graph_rewards,
    parse_design,
    swiss_pairs,
)
from rmcore.engine.groups import GroupScores, table_of
from rmcore.engine.routing import AlwaysRoute, ThresholdRouter
from rmcore.engine.selection import best_of, member_uncertainty
from rmcore.judge.base import Verdict
from rmcore.ops.pair_layout import PairLayout, PartialLayout

DESIGNS = ("circular", "regular:4", "swiss:3")


def antisymmetric(seed, *shape):
    values = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed)).double()
    return values - values.mT


def only(preferences, pairs):
    kept = torch.full_like(preferences, math.nan)
    i, j = pairs.unbind(1)
    kept[..., i, j], kept[..., j, i] = preferences[..., i, j], preferences[..., j, i]
    return kept


# -- advantages ------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(2, 9), design=st.sampled_from(("circular", "regular:4")))
def test_comparisons_that_agree_give_the_advantages_of_all_pairs(seed, size, design):
    score = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).double()
    every = score[:, :, None] - score[:, None, :]
    expected, variance = graph_advantages(every)
    found, wider = graph_advantages(only(every, design_pairs(size, design)))
    assert torch.allclose(expected, size / (size - 1) * (score - score.mean(1, keepdim=True)), atol=1e-10)
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(variance, torch.full_like(variance, 1 / (size - 1)), atol=1e-10)
    assert bool((wider >= variance - 1e-10).all())


def test_all_pairs_are_the_means_and_missing_members_are_left_out():
    p = antisymmetric(0, 2, 5)
    off = p.sum(-1) / 4
    assert torch.allclose(graph_advantages(p)[0], off, atol=1e-12)
    p[:, 3, :] = p[:, :, 3] = math.nan
    found = graph_advantages(p)[0]
    assert bool(found[:, 3].isnan().all())
    assert torch.allclose(found[:, 0], p[:, 0, [1, 2, 4]].mean(1), atol=1e-12)
    rewards = graph_rewards(only(antisymmetric(1, 6), design_pairs(6, "circular")))
    advantages = graph_advantages(only(antisymmetric(1, 6), design_pairs(6, "circular")))[0]
    assert torch.allclose(rewards - (rewards.sum() - rewards) / 5, advantages, atol=1e-12)
    assert graph_advantages(torch.zeros(1, 1))[0].tolist() == [0.0]


def test_parts_that_nothing_joins_sum_to_nought_each():
    p = torch.full((4, 4), math.nan).double()
    p[0, 1], p[1, 0], p[2, 3], p[3, 2] = 1.0, -1.0, 3.0, -3.0
    assert graph_advantages(p)[0].tolist() == pytest.approx([2 / 3, -2 / 3, 2, -2])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 17), rounds=st.integers(1, 4))
def test_swiss_pairs_join_everybody_at_the_price_of_their_rounds(seed, size, rounds):
    score = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    pairs = swiss_pairs(score, rounds)
    assert len(pairs) <= rounds * (size // 2) + size - 1
    assert bool((pairs[:, 0] < pairs[:, 1]).all())
    reached = {0}
    for _ in range(size):
        reached |= {b for a, b in pairs.tolist() if a in reached} | {a for a, b in pairs.tolist() if b in reached}
    assert len(reached) == size


@pytest.mark.parametrize("text", ["some", "regular", "regular:3", "regular:0", "swiss:", "swiss:-1", "all:2", 4])
def test_designs_that_are_none(text):
    with pytest.raises(InputError, match="design"):
        parse_design(text)


# -- the layout ------------------------------------------------------------------------------------------------------


def test_a_layout_with_every_pair_is_the_layout_of_all():
    sizes = [3, 1, 4, 3]
    whole = PairLayout(sizes)
    part = PartialLayout(sizes, [design_pairs(k, "all") for k in sizes])
    for name in ("first", "second", "group", "i", "j", "pair_counts", "starts"):
        assert torch.equal(getattr(whole, name), getattr(part, name)), name
    assert part.pairs == whole.pairs
    assert torch.equal(part.among_all(), torch.arange(whole.pairs))
    assert part.row(2, 1, 3) == whole.row(2, 1, 3)
    for mode, one in (("difference", False), ("concat", False), ("concat", True)):
        assert torch.equal(whole.pair_rows(mode, one_order=one), part.pair_rows(mode, one_order=one))
        assert torch.equal(whole.row_counts(mode, one_order=one), part.row_counts(mode, one_order=one))


# -- in an engine ----------------------------------------------------------------------------------------------------


def engine_of(hand_head, table_model, judge=None, router=None, *, mode="difference", design="all"):
    def numbers(_prompt, *texts):
        a = [float(x) for x in texts[0].split()]
        return a if len(texts) == 1 else [x - float(y) for x, y in zip(a, texts[1].split(), strict=True)]

    return RewardEngine(table_model(hand_head([1.0, 0.1], mode=mode), numbers), judge, router, design=design)


def groups(sizes):
    random = torch.Generator().manual_seed(3)
    return [[" ".join(f"{x:.3f}" for x in torch.randn(2, generator=random).tolist()) for _ in range(k)] for k in sizes]


@pytest.mark.parametrize("mode", ["difference", "concat"])
@pytest.mark.parametrize("design", DESIGNS)
def test_only_the_designs_pairs_are_scored_and_judged(hand_head, table_model, scripted_judge, mode, design):
    if mode == "concat" and design.startswith("swiss"):
        with pytest.raises(InputError, match="concat"):
            engine_of(hand_head, table_model, mode=mode, design=design)
        return
    sizes = [8, 1, 5, 8]
    texts, prompts = groups(sizes), ["p", "q", "r", "s"]
    judge = scripted_judge(lambda pair: Verdict(1.0 if pair.preference > 0 else -1.0))
    engine = engine_of(hand_head, table_model, judge, AlwaysRoute(), mode=mode, design=design)
    scores = engine.score(prompts, texts)
    every = engine_of(hand_head, table_model, mode=mode).score(prompts, texts)
    pairs = scores.summary()["pairs"]
    assert sum(map(len, judge.calls)) == pairs == scores.summary()["decided_by"]["judge"] < every.summary()["pairs"]
    for group, whole in zip(scores, every, strict=True):
        there = group.compared
        assert torch.equal(there, ~group.logit.isnan() & ~torch.eye(group.size, dtype=torch.bool))
        assert torch.allclose(group.logit[there], whole.logit[there], atol=1e-6)
        assert torch.equal(group.advantages, graph_advantages(group.preference)[0])
        assert json.dumps(group.to_record(), allow_nan=False)
        assert bool(member_uncertainty(group).isfinite().all())
    assert torch.allclose(scores.advantages, torch.cat([group.advantages for group in scores]), atol=1e-12)
    again = GroupScores(scores.groups)
    assert torch.allclose(again.advantages, scores.advantages)
    assert torch.equal(table_of(scores.groups).state, scores.table.state)
    if mode == "concat":
        assert scores.encoding.texts == 2 * pairs
    assert [one.index for one in best_of(scores)] == [int(group.advantages.argmax()) for group in scores]


def test_all_is_what_it_was_and_a_full_regular_design_agrees(hand_head, table_model):
    texts = groups([5, 4])
    plain = engine_of(hand_head, table_model).score(["p", "q"], texts)
    same = engine_of(hand_head, table_model, design="all").score(["p", "q"], texts)
    full = engine_of(hand_head, table_model, design="regular:4").score(["p", "q"], texts)
    assert torch.equal(plain.advantages, same.advantages)
    assert plain[0].compared is None
    assert torch.allclose(full.advantages, plain.advantages, atol=1e-9)
    assert torch.allclose(full.rewards, plain.rewards, atol=1e-9)
    assert full[0].design_variance.tolist() == pytest.approx([0.25] * 5)


def test_a_judge_that_fails_and_groups_that_cannot_be_scored(hand_head, table_model, scripted_judge):
    judge = scripted_judge(lambda pair: Verdict.none("failed"))
    engine = engine_of(hand_head, table_model, judge, ThresholdRouter(1.0), design="circular")
    texts = groups([6, 6])
    texts[1][2] = "nan 0"
    scores = engine.score(["p", "q"], texts, on_error="return")
    assert list(scores.errors) == [1]
    assert scores.summary()["judge_failures"] == {"failed": 6}
    assert bool(scores.advantages.isfinite().all())
