"""Distance from the training data through the engine: the routers' column, the groups' own, and their absence."""

from __future__ import annotations

import math

import pytest
import torch

from rmcore import BudgetRouter, RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.groups import GroupScores, table_of
from rmcore.engine.pair_table import PairTable
from rmcore.engine.routing import AdaptiveRouter, Candidates, RandomRouter, ThresholdRouter, rank_score
from rmcore.judge.base import Verdict
from rmcore.model import RewardModel
from rmcore.ops.pair_layout import PairLayout

SIZES = [3, 1, 2, 4]


@pytest.fixture(scope="module")
def head(make_data, fit_head):
    return fit_head(make_data(rows=120, pairs=200, dtype=torch.float32))


@pytest.fixture(scope="module")
def hidden():
    rows = torch.randn(10, 16, generator=torch.Generator().manual_seed(3))
    rows[4] += 20  # the first of the group of two is far from everything
    return rows


TEXTS = [[f"{group} {k}" for k in range(size)] for group, size in enumerate(SIZES)]


def win(_pair) -> Verdict:
    return Verdict.of("win")


class Watching(ThresholdRouter):
    """Keeps what it was offered."""

    offered: Candidates

    def select(self, candidates):
        object.__setattr__(self, "offered", candidates)
        return super().select(candidates)


def score(head, hidden, judge=None, router=None, **options):
    engine = RewardEngine(head, judge, router, **options)
    return engine.score_hidden(hidden, SIZES, prompts=["p"] * 4, responses=TEXTS)


def test_every_response_and_every_pair_has_its_novelty(head, hidden, scripted_judge):
    scores = score(head, hidden, scripted_judge(win), ThresholdRouter(math.inf))
    n = head.novelty(hidden).double()
    assert torch.equal(scores.novelty, n)
    assert [len(group.response_novelty) for group in scores] == SIZES
    group = scores[2]
    assert torch.equal(group.response_novelty, n[4:6])
    assert torch.equal(group.novelty, torch.stack([n[4], n[4:6].mean(), n[4:6].mean(), n[5]]).view(2, 2))
    assert torch.equal(scores.table.novelty, head.score_pairs(hidden, torch.tensor(SIZES), dtype=torch.float64,
                       novelty=True).novelty)  # fmt: skip
    assert group.to_record()["novelty"] == n[4:6].tolist()
    # A batch made of its groups again, and one of some of them.
    assert torch.equal(GroupScores(scores.groups).novelty, n)
    assert torch.equal(table_of(scores[2:]).row_novelty, n[4:])
    with_one_that_has_none = [scores[0], score(head, hidden)[1]]
    assert GroupScores(with_one_that_has_none).novelty is None


def test_it_is_asked_for_where_a_judge_is_and_may_be_had_or_spared(head, hidden, scripted_judge):
    plain = score(head, hidden)
    assert plain.novelty is None
    assert plain.table.novelty is None
    assert plain[0].novelty is None
    assert plain[0].response_novelty is None
    assert "novelty" not in plain[0].to_record()
    asked = score(head, hidden, novelty=True)
    assert torch.equal(asked.novelty, head.novelty(hidden).double())
    router = Watching(math.inf)
    assert score(head, hidden, scripted_judge(win), router, novelty=False).novelty is None
    assert "novelty" not in router.offered.columns
    # It decides nothing unless a router goes by it.
    assert torch.equal(plain.table.values, asked.table.values)
    judged = [score(head, hidden, scripted_judge(win), BudgetRouter(0.3), novelty=k) for k in (True, False)]
    assert torch.equal(judged[0].table.values, judged[1].table.values)
    assert torch.equal(judged[0].table.state, judged[1].table.state)


def test_routers_get_the_column_and_may_go_by_it(head, hidden, scripted_judge):
    router = Watching(math.inf)
    score(head, hidden, scripted_judge(win), router)
    pairs = head.score_pairs(hidden, torch.tensor(SIZES), dtype=torch.float64, novelty=True)
    assert torch.equal(router.offered.columns["novelty"], pairs.novelty)
    assert torch.equal(rank_score(router.offered, "novelty"), pairs.novelty)
    scores = score(head, hidden, scripted_judge(win), BudgetRouter(count=1, by="novelty"))
    assert [int(group.routed.sum()) for group in scores] == [0, 0, 2, 0]
    threshold = float(pairs.novelty.sort().values[-3])
    scores = score(head, hidden, scripted_judge(win), ThresholdRouter(threshold, by="novelty"))
    assert int(scores.table.routed.sum()) == 2
    assert AdaptiveRouter(0.2, by="novelty").select(router.offered).shape == (10,)


def test_without_a_row_posterior_nothing_else_changes(make_data, fit_head, hidden, scripted_judge, head):
    old = fit_head(make_data(rows=120, pairs=200, dtype=torch.float32), row_ridge=None)
    router = Watching(1.2)
    scores = score(old, hidden, scripted_judge(win), router)
    assert scores.novelty is None
    assert "novelty" not in router.offered.columns
    assert torch.equal(scores.table.values, score(head, hidden, scripted_judge(win), ThresholdRouter(1.2)).table.values)
    for options in (
        {"novelty": True},
        {"judge": scripted_judge(win), "router": BudgetRouter(0.5, by="novelty")},
    ):
        with pytest.raises(InputError, match="novelty: got a head without row posterior"):
            score(old, hidden, **options)
    concat = fit_head(make_data(rows=120, pairs=200, dtype=torch.float32), mode="concat")
    with pytest.raises(InputError, match="novelty: got a concat-mode head"):
        RewardEngine(concat, scripted_judge(win), BudgetRouter(0.5, by="novelty"))
    with pytest.raises(InputError, match="'novelty' of pairs without that column"):
        rank_score(Candidates(*torch.zeros(3, 2)), "novelty")
    with pytest.raises(InputError, match=r"novelty: got False"):
        RewardEngine(head, scripted_judge(win), BudgetRouter(0.5, by="novelty"), novelty=False)
    with pytest.raises(InputError, match=r"novelty: got 'yes'"):
        RewardEngine(head, novelty="yes")


def test_a_bad_row_is_first_in_line_and_alone(head, hidden, scripted_judge):
    bad = hidden.clone()
    bad[8, 0] = torch.inf
    router = Watching(math.inf)
    good = torch.arange(10) != 8
    scores = score(head, bad, scripted_judge(win), router, nonfinite="route", novelty=True)
    assert scores.novelty.isnan().nonzero()[:, 0].tolist() == [8]
    assert torch.equal(scores.novelty[good], head.novelty(hidden).double()[good])
    assert bool(router.offered.columns["novelty"].isfinite().all())
    engine = RewardEngine(head, scripted_judge(win), BudgetRouter(count=3, by="novelty"), nonfinite="route")
    scores = engine.score_hidden(bad, SIZES, prompts=["p"] * 4, responses=TEXTS)
    assert scores[3].routed.any(dim=0).tolist() == [True, True, True, True]
    engine = RewardEngine(head, novelty=True)
    left = engine.score_hidden(bad, SIZES, on_error="return")
    assert list(left.errors) == [3]
    assert torch.equal(left.novelty, head.novelty(hidden).double()[:6])


def test_tables_are_joined_and_taken_apart_with_it(head, hidden):
    parts = []
    for rows, sizes in ((hidden[:4], [3, 1]), (hidden[4:], [2, 4])):
        sizes = torch.tensor(sizes)
        parts.append(PairTable.of_difference(head.score_pairs(rows, sizes, novelty=True), PairLayout(sizes)))
    n = head.novelty(hidden).double()
    whole = PairTable.joined(parts)
    assert torch.equal(whole.row_novelty, n)
    assert torch.equal(whole.without(torch.tensor([0, 2])).row_novelty, torch.cat([n[3:4], n[6:]]))
    parts[1].row_novelty = None
    assert PairTable.joined(parts).row_novelty is None


def test_texts_cut_into_micro_batches_and_left_unread(make_backbone, preferences, scripted_judge):
    model, _ = RewardModel.fit(make_backbone("llama", max_length=48), preferences, num_features=64)
    prompts = [f"question {k}" for k in range(6)]
    groups = [[f"answer {k}", "a bad answer " * k, "Paris"][: 2 + k % 2] for k in range(6)]
    router = ThresholdRouter(math.inf, by="novelty")
    whole = RewardEngine(model, novelty=True).score(prompts, groups)
    parts = RewardEngine(model, scripted_judge(win), router, micro_batch_tokens=8).score(prompts, groups)
    torch.testing.assert_close(parts.novelty, whole.novelty, rtol=1e-3, atol=1e-4)
    scores = RewardEngine(model, novelty=True).score(["Q"], [["a", "b " * 90, "c"]], overlong="no-reward")
    assert scores.novelty.isnan().tolist() == [False, True, False]


def test_randomly_routed_pairs_keep_their_order(head, hidden, scripted_judge):
    """A router that does not look at the column draws as it did before there was one."""
    drawn = [score(head, hidden, scripted_judge(win), RandomRouter(0.5), novelty=k).table.state for k in (True, False)]
    assert torch.equal(*drawn)
