"""An engine that takes another uncertainty than its head's."""

from __future__ import annotations

import math

import pytest
import torch

from rmcore import RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.groups import GroupScores, table_of
from rmcore.engine.options import check_engine_options
from rmcore.engine.pair_table import PairTable
from rmcore.engine.routing import ThresholdRouter
from rmcore.engine.selection import best_of, filter_groups, member_measures
from rmcore.head.attributes import AttributeConfig, AttributeHead
from rmcore.head.estimators import URM, URME, Dropout, Ensemble, Laplace
from rmcore.judge.base import Verdict


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 2, generator=generator)
    pairs = torch.arange(40).view(20, 2)
    return hidden, (hidden[pairs[:, 0], 0] > hidden[pairs[:, 1], 0]).float(), pairs


@pytest.fixture(scope="module")
def estimators(data):
    small = {"layers": (4,), "epochs": 1}
    return [Laplace.fit(*data), Dropout.fit(*data, **small), Ensemble.fit(*data, members=2, **small)]


def test_pairs_advantages_and_their_variance_are_the_estimators(data, estimators, hand_head):
    rows, sizes = data[0][:9], [3, 1, 5]
    for estimator in estimators:
        scores = RewardEngine(hand_head([1.0, 0.0]), uncertainty=estimator).score_hidden(rows, sizes)
        found = estimator.pairs(rows, torch.tensor(sizes))
        assert torch.equal(scores.table.logit, found.logit)
        assert torch.equal(scores.table.variance, found.variance)
        assert torch.equal(scores.table.preference, found.preference)
        assert torch.equal(scores.table.uncertainty, (1 + math.pi / 8 * found.variance).sqrt())
        assert bool((scores.advantage_variance[[0, 1, 2, 4]] > 0).all())
        assert float(scores.advantage_variance[3]) == 0
        design = RewardEngine(hand_head([1.0, 0.0]), uncertainty=estimator, design="circular")
        assert len(design.score_hidden(rows, sizes).table) == 3 + 0 + 5


def test_a_router_goes_by_it_and_bad_groups_are_left_out(data, estimators, hand_head, table_model, scripted_judge):
    laplace = estimators[0]
    model = table_model(hand_head([1.0, 0.0]), lambda *text: [float(x) for x in text[1].split()])
    texts = [["0.1 0.2", "0.1 0.3", "9 9"], ["1 nan", "2 2"]]
    model.estimators = {"laplace": laplace}
    judge = scripted_judge(lambda pair: Verdict.of("win"))
    engine = RewardEngine(model, judge, ThresholdRouter(1.5), uncertainty="laplace")
    scores = engine.score(["p", "q"], texts, on_error="return")
    assert list(scores.errors) == [1]
    u = (
        1 + math.pi / 8 * laplace.pairs(torch.tensor([[0.1, 0.2], [0.1, 0.3], [9.0, 9.0]]), torch.tensor([3])).variance
    ).sqrt()
    assert scores.table.routed.tolist() == (u > 1.5).tolist() == [False, True, True]
    assert engine.score(["q"], texts[1:], on_error="return").outcomes()[0] is not None
    with pytest.raises(InputError, match="that the model has: head, laplace"):
        RewardEngine(model, uncertainty="ensemble")


def test_what_does_not_go_with_it_is_refused(estimators, hand_head, scripted_judge):
    laplace = estimators[0]
    with pytest.raises(InputError, match="concat"):
        RewardEngine(hand_head([1.0, 0.0], mode="concat"), uncertainty=laplace)
    with pytest.raises(InputError, match="laplace-kron"):
        check_engine_options(uncertainty="laplce")
    with pytest.raises(InputError, match="object with pairs"):
        check_engine_options(uncertainty=3)
    with pytest.raises(InputError, match="finite rows"):
        check_engine_options(scripted_judge(lambda pair: Verdict.of("win")), uncertainty=laplace, nonfinite="route")
    with pytest.raises(InputError, match="has: head"):
        RewardEngine(hand_head([1.0, 0.0]), uncertainty="laplace")
    with pytest.raises(InputError, match="hidden"):
        RewardEngine(hand_head([1.0, 0.0, 0.0]), uncertainty=laplace).score_hidden(torch.zeros(2, 3), [2])


@pytest.fixture(scope="module")
def urme():
    config = AttributeConfig(2, ("good", "kind"), weights=(0.7, 0.3))
    return URME([AttributeHead(config, seed=seed).eval() for seed in range(3)])


def test_urmes_measures_go_with_each_response_and_filter_as_in_the_paper(data, urme, hand_head):
    rows, sizes = data[0][:9], [2, 1, 4, 2]
    scores = RewardEngine(hand_head([1.0, 0.0]), uncertainty=urme).score_hidden(rows, sizes)
    said = urme.ensemble.scores(rows)
    for name in ("gap", "covariance"):
        wanted = said.uncertainty(name)
        for groups in (scores, list(scores), GroupScores(PairTable.joined([scores.table, scores.table]))):
            assert torch.equal(member_measures(groups, name)[:9], wanted)
        assert torch.equal(scores[2].measures[name], wanted[3:7])
        assert scores[2].to_record()[name] == pytest.approx(wanted[3:7].tolist())
        narrow = table_of(scores).without(torch.tensor([0, 1]))
        assert torch.equal(narrow.measures[name], wanted[3:])
        threshold = float(wanted.median())
        kept = filter_groups(scores, threshold, measure=name)
        pairs = torch.tensor([[0, 1], [7, 8]])
        assert [bool(kept.responses[k]) for k in (0, 3)] == said.kept_pairs(pairs, threshold, name).tolist()
        every = filter_groups(scores, threshold, measure=name, min_responses=1)
        assert [k for group in every.responses for k in group] == [
            place for place, u in zip([0, 1, 0, 0, 1, 2, 3, 0, 1], wanted.tolist(), strict=True) if u <= threshold
        ]
        by_group = filter_groups(scores, threshold, measure=name, by="group", min_responses=1)
        means = [float(part.mean()) for part in wanted.split(sizes)]
        assert by_group.groups == tuple(k for k, mean in enumerate(means) if mean <= threshold)
        best = best_of(scores, penalty=2.0, measure=name)[2]
        bounds = scores[2].advantages - 2.0 * wanted[3:7]
        assert best.index == int(bounds.argmax())
        assert best.score == pytest.approx(float(bounds.max()))


def test_a_measure_that_nobody_tells_is_refused_by_name(data, urme, hand_head):
    engine = RewardEngine(hand_head([1.0, 0.0]), uncertainty=URM(urme.heads[:1]))
    with pytest.raises(InputError, match="measure: got 'gap', expected what the engine's uncertainty tells: u"):
        engine.check_measure("gap")
    scores = engine.score_hidden(data[0][:4], [4])
    with pytest.raises(InputError, match="measure: got 'gap'"):
        filter_groups(scores, 1.0, measure="gap")
    with pytest.raises(InputError, match="measure: got 'gape'"):
        best_of(scores, penalty=1.0, measure="gape")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_uncertainty: got -1"):
        filter_groups(scores, -1.0, measure="gap")
    RewardEngine(hand_head([1.0, 0.0]), uncertainty=urme).check_measure("covariance")
    config = AttributeConfig(2, ("good",), spread="quantiles", quantiles=3)
    quantiles = URME([AttributeHead(config, seed=seed).eval() for seed in range(2)])
    assert set(quantiles.pairs(data[0][:2], torch.tensor([2])).measures) == {"gap"}
