"""Routing by what the verdicts teach: P(the head is wrong), its beginnings, its state."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.routing import (
    AdaptiveRouter,
    Candidates,
    LearnedRouter,
    LearnedScore,
    RiskControlledRouter,
)
from rmcore.engine.routing.state import read_state, write_state
from rmcore.model.error_prior import FEATURES, ErrorPrior


def pairs(count, seed=0, *, lengths=True):
    random = torch.Generator().manual_seed(seed)
    logit, size = torch.randn(count, generator=random).double(), torch.randn(count, generator=random).double()
    variance = torch.rand(count, generator=random).double() + 0.1
    columns = {"distance": torch.rand(count, generator=random).double(), "log_length_ratio": size}
    return Candidates(logit, variance, (1 + 0.4 * variance).sqrt(), columns if lengths else {})


def verdicts(candidates, wrong):
    """A judge that finds the head wrong where ``wrong``."""
    return torch.where(wrong, -1.0, 1.0).double() * candidates.logit.sign()


def bought(preference, routed):
    return torch.where(routed, preference, math.nan)


def a_prior():
    mean = torch.zeros(len(FEATURES) + 1, dtype=torch.float64)
    mean[0], mean[2] = -1.0, -1.5
    own = len(FEATURES) - 1
    identity = torch.eye(len(FEATURES) + 1, dtype=torch.float64)
    return ErrorPrior(torch.zeros(own).double(), torch.ones(own).double(), mean, 10 * identity, None, 100, 0.3)


def teach(router, wrong_of, chunks=12, start=0):
    for seed in range(start, start + chunks):
        candidates = pairs(64, seed)
        routed = router.select(candidates)
        router.observe(candidates, routed, bought(verdicts(candidates, wrong_of(candidates)), routed))


def wrong_where_longer(candidates):
    return candidates.logit.sign() * candidates.columns["log_length_ratio"] > 0.5


@pytest.mark.parametrize("prior", [None, a_prior()])
def test_it_finds_out_what_the_head_gets_wrong(prior):
    router = LearnedRouter(0.25, prior=prior)
    teach(router, wrong_where_longer)
    fresh = pairs(256, 1000)
    wrong = wrong_where_longer(fresh)
    assert wrong[router.select(fresh)].double().mean() > 0.9 > 2 * wrong.double().mean()
    told = router.explain()
    assert told["weights"]["longer preferred"]["mean"] > 0.5
    assert told["verdicts"] == 12 * 16
    assert sum(one["weight"] for one in told["beliefs"]) == pytest.approx(1)


def test_the_belief_that_foretells_best_leads():
    close = LearnedRouter(0.5, prior=a_prior())
    teach(close, lambda c: (c.logit / c.uncertainty).abs() < 0.5)
    assert close.explain()["leading"] in ("margin", "training")
    unsure = LearnedRouter(0.5, prior=a_prior())
    teach(unsure, lambda c: c.variance > 0.8)
    assert unsure.explain()["leading"] == "u"


def test_old_verdicts_fade_where_the_stream_moves():
    router = LearnedRouter(0.5)

    def forgetting():
        return sum(one["weight"] for one in router.explain()["beliefs"] if one["left_after_a_verdict"] < 1)

    teach(router, wrong_where_longer)
    steady = forgetting()
    teach(router, lambda c: c.logit.sign() * c.columns["log_length_ratio"] < -0.5, chunks=6, start=50)
    assert forgetting() > max(0.9, steady)


def test_a_fraction_is_held_over_calls_of_one_pair():
    router = LearnedRouter(0.25)
    assert sum(int(router.select(pairs(1, seed)).sum()) for seed in range(40)) == 10
    assert int(LearnedRouter(0.0).select(pairs(50)).sum()) == 0
    assert int(LearnedRouter(1.0).select(pairs(50)).sum()) == 50
    assert LearnedRouter(0.5).select(pairs(0)).shape == (0,)


def test_pairs_of_which_nothing_is_known_come_first_and_teach_nothing():
    candidates = pairs(8)
    candidates.uncertainty[5] = math.inf
    router = LearnedRouter(0.125)
    routed = router.select(candidates)
    assert routed.tolist() == [k == 5 for k in range(8)]
    router.observe(candidates, routed, bought(torch.ones(8).double(), routed))
    assert router.explain()["verdicts"] == 0


def test_ties_flips_and_failures_teach_nothing_and_soft_verdicts_less():
    def after(value):
        score = LearnedScore()
        candidates = pairs(64)
        score(candidates)
        score.observe(candidates, torch.ones(64, dtype=torch.bool), torch.full((64,), value).double())
        return score(candidates)

    untouched = after(math.nan)
    assert torch.equal(after(0.0), untouched)
    plain, soft = ((after(value) - untouched).abs().max() for value in (1.0, 0.2))
    assert 0 < soft < plain


def test_a_threshold_is_on_the_probability():
    router = LearnedRouter(threshold=0.4)
    candidates = pairs(200)
    probability = router.score(candidates)
    assert bool(((probability > 0) & (probability < 1)).all())
    assert torch.equal(router.select(candidates), probability > 0.4)


def test_columns_that_are_missing_are_told_and_own_columns_are_learned():
    score = LearnedScore(columns=["novelty"])
    score(pairs(64, lengths=False))
    assert score.explain()["absent"] == ["distance", "log_length_ratio", "novelty"]
    router = LearnedRouter(0.5, score=LearnedScore(columns=["novelty"]))
    for seed in range(10):
        base = pairs(64, seed)
        novelty = torch.rand(64, generator=torch.Generator().manual_seed(seed)).double()
        candidates = Candidates(base.logit, base.variance, base.uncertainty, {**base.columns, "novelty": novelty})
        routed = router.select(candidates)
        router.observe(candidates, routed, bought(verdicts(base, novelty > 0.7), routed))
    assert router.explain()["weights"]["novelty"]["low"] > 0.3


@pytest.mark.parametrize("prior", [None, a_prior()])
def test_a_restart_goes_on_bit_for_bit(prior, tmp_path):
    router = LearnedRouter(0.3, prior=prior)
    teach(router, wrong_where_longer, chunks=3)
    write_state(tmp_path / "state.json", router.state_dict())
    assert (tmp_path / "state.json").stat().st_size < 12_000
    again = LearnedRouter(0.3, prior=prior)
    again.load_state_dict(read_state(tmp_path / "state.json"))
    for one in (router, again):
        teach(one, wrong_where_longer, chunks=2, start=30)
    assert torch.equal(again.score(pairs(64, 99)), router.score(pairs(64, 99)))
    assert again.state_dict() == router.state_dict()


CHILD = """
import sys
import test_learned
from rmcore.engine.routing import LearnedRouter
from rmcore.engine.routing.state import write_state
router = LearnedRouter(0.3)
for chunk in range(100_000):
    test_learned.teach(router, test_learned.wrong_where_longer, chunks=1, start=chunk)
    write_state(sys.argv[1], {"chunks": chunk + 1, "router": router.state_dict()})
    print(chunk + 1, flush=True)
"""


def test_killed_in_the_middle_it_goes_on_from_a_whole_number_of_chunks(tmp_path):
    file, here = tmp_path / "state.json", str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)], stdout=subprocess.PIPE, text=True, cwd=here
    ) as child:
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(20)]
        child.send_signal(signal.SIGKILL)
        told += [int(line) for line in child.stdout.read().split()]
    found = read_state(file)
    assert found["chunks"] in (told[-1], told[-1] + 1)
    again, straight = LearnedRouter(0.3), LearnedRouter(0.3)
    again.load_state_dict(found["router"])
    teach(straight, wrong_where_longer, chunks=found["chunks"])
    assert again.state_dict() == straight.state_dict()


def test_a_state_that_does_not_fit_changes_nothing():
    router = LearnedRouter(0.3)
    teach(router, wrong_where_longer, chunks=2)
    good, before = router.state_dict(), router.state_dict()
    other = LearnedRouter(0.3, prior=a_prior())
    with pytest.raises(CheckpointError, match=r"score\.beliefs"):
        other.load_state_dict(good)
    with pytest.raises(CheckpointError, match=r"score\.columns"):
        LearnedRouter(0.3, score=LearnedScore(columns=["novelty"])).load_state_dict(good)
    for name, value in {
        "mean": [[0.0]],
        "precision": [[-1.0] * len(row) for row in good["score"]["precision"]],
        "log_weight": ["x"],
        "begin": "0" * 64,
        "verdicts": -1,
    }.items():
        bad = json.loads(json.dumps(good))
        bad["score"][name] = value
        with pytest.raises(CheckpointError):
            router.load_state_dict(bad)
        assert router.state_dict() == before
    with pytest.raises(CheckpointError, match="owed"):
        router.load_state_dict({**good, "owed": 1.5})


def test_it_learns_inside_an_adaptive_router_and_is_saved_with_it(tmp_path):
    router = AdaptiveRouter(0.25, by=LearnedScore(), warmup=64)
    for seed in range(12):
        candidates = pairs(64, seed)
        router.begin_step()
        routed, reservation = router.reserve(candidates)
        router.settle(reservation, None)
        router.observe(candidates, routed, bought(verdicts(candidates, wrong_where_longer(candidates)), routed))
    assert not isinstance(router.by, str)
    assert router.by.state_dict()["verdicts"] > 100
    router.save(tmp_path / "router.json")
    again = AdaptiveRouter(0.25, by=LearnedScore(), warmup=64)
    again.load(tmp_path / "router.json")
    fresh = pairs(200, 500)
    assert torch.equal(again.select(fresh), router.select(fresh))
    with pytest.raises(CheckpointError, match=r"router\.by"):
        AdaptiveRouter(0.25, warmup=64).load(tmp_path / "router.json")
    older = {name: value for name, value in AdaptiveRouter(0.25).state_dict().items() if name != "score"}
    AdaptiveRouter(0.25).load_state_dict(older)  # as written before there were scores that learn


def test_a_risk_controlled_router_takes_it_as_it_is():
    score = LearnedScore(a_prior())
    router = RiskControlledRouter(0.3, by=score)
    candidates = pairs(2000)
    close = (candidates.logit / candidates.uncertainty).abs() < 0.5
    found = router.calibrate(candidates, close & (torch.arange(2000) % 2 == 0))
    assert found.kept > 500
    assert router.explain()["why"].startswith("pairs with learned above")
    again = RiskControlledRouter(0.3, by=LearnedScore(a_prior()))
    again.load_state_dict(router.state_dict())
    assert again.threshold == router.threshold


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LearnedRouter(), "fraction, threshold"),
        (lambda: LearnedRouter(0.1, threshold=0.5), "fraction, threshold"),
        (lambda: LearnedRouter(1.5), "fraction"),
        (lambda: LearnedRouter(threshold=math.nan), "threshold"),
        (lambda: LearnedRouter(0.1, prior=a_prior(), score=LearnedScore()), "prior, score"),
        (lambda: LearnedScore(columns="novelty"), "columns"),
    ],
)
def test_arguments_are_checked(make, named):
    with pytest.raises(InputError, match=named):
        make()
