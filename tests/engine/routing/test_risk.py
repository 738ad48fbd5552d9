"""The bound on the error rate among kept pairs: its statistics, its router, and how a moved stream is noticed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rmcore import RewardEngine
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.routing import Candidates, RiskControlledRouter, VerdictRouter, risk_threshold, risk_tiers
from rmcore.engine.routing.risk_bounds import least_pairs
from rmcore.engine.routing.shift import BLOCK, ErrorExcess, ScoreShift
from rmcore.judge.base import Verdict

# -- the threshold ---------------------------------------------------------------------------------------------------


def test_all_right_keeps_all_and_one_pair_fewer_nothing():
    n = least_pairs(0.1, 0.1)
    assert (1 - 0.1) ** n <= 0.05 < (1 - 0.1) ** (n - 1)
    found = risk_threshold(np.arange(n), np.zeros(n), alpha=0.1, horizon=math.inf)
    assert (found.kept, found.threshold, found.errors, found.share_judged) == (n, n - 1, 0, 0.0)
    assert found.bound == pytest.approx(1 - 0.1 ** (1 / n))  # Clopper-Pearson with no error
    few = risk_threshold(np.arange(n - 1), np.zeros(n - 1), alpha=0.1, horizon=math.inf)
    assert few.threshold == -math.inf
    assert f"{n - 1} calibration pairs" in few.reason


def test_pairs_to_come_are_bounded_more_carefully_than_their_population():
    """Against every way in which the errors can lie: of 30 known and 30 to come, all kept."""
    wrong = np.zeros(30)
    assert risk_threshold(np.arange(30), wrong, alpha=0.1, horizon=math.inf).kept == 30
    nearer = risk_threshold(np.arange(30), wrong, alpha=0.1)
    assert nearer.kept == 0
    assert "30 calibration pairs, all right, are too few" in nearer.reason
    # Four errors among 60 break 10% of the 30 to come if all four are among these: C(30,4)/C(60,4) = 0.056 > 0.05.
    assert risk_threshold(np.arange(30), wrong, alpha=0.1, delta=0.113).kept == 30
    with pytest.raises(InputError, match="horizon: got 0"):
        risk_threshold(np.arange(30), wrong, alpha=0.1, horizon=0)


@pytest.mark.parametrize("method", ["fixed-sequence", "conformal"])
def test_no_pairs_at_all_routes_everything(method):
    found = risk_threshold([], [], alpha=0.2, method=method)
    assert (found.threshold, found.pairs, found.kept, found.share_judged) == (-math.inf, 0, 0, 1.0)
    assert found.reason
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_a_head_that_is_too_often_wrong_says_by_how_much():
    wrong = np.arange(400) % 3 == 0
    found = risk_threshold(np.arange(400), wrong, alpha=0.1)
    assert found.threshold == -math.inf
    assert "no threshold is safe" in found.reason
    assert "of" in found.reason


def test_equal_scores_are_kept_or_routed_together():
    score = np.repeat([0.0, 1.0], [200, 50])
    wrong = np.concatenate([np.zeros(200), np.arange(50) % 2])  # half of the upper ones: 10% in all
    found = risk_threshold(score, wrong, alpha=0.1)
    assert (found.threshold, found.kept) == (0.0, 200)
    everything = risk_threshold(np.zeros(250), wrong, alpha=0.2)
    assert (everything.threshold, everything.kept) == (0.0, 250)


def test_infinite_scores_are_never_kept():
    score = np.concatenate([np.arange(100.0), np.full(100, np.inf)])
    found = risk_threshold(score, np.zeros(200), alpha=0.1)
    assert (found.kept, found.threshold) == (100, 99.0)
    assert risk_threshold(np.full(200, np.inf), np.zeros(200), alpha=0.1).kept == 0


def test_confident_errors_do_not_end_it_all():
    """The most confident 30 are wrong, the rest right: a sequence from an eighth up would stop at once."""
    wrong = np.arange(1000) < 30
    found = risk_threshold(np.arange(1000), wrong, alpha=0.1)
    assert found.kept > 900
    assert stats.binom.cdf(found.errors, found.kept, 0.1) <= 0.1


def test_conformal_by_hand():
    wrong = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    # (errors + 1) / (kept + 1) ≤ 1/5 at 4 kept (1/5), at 9 to 11 kept (2/10 to 2/12), not at 12 (3/13).
    assert risk_threshold(range(12), wrong, alpha=0.2, method="conformal").kept == 11
    assert risk_threshold(range(3), [0, 0, 0], alpha=0.2, method="conformal").kept == 0


PROFILES = {
    "well ranked": lambda q: 0.02 + 0.4 * q,
    "confidently wrong": lambda q: np.where(q < 0.1, 0.3, 0.02 + 0.2 * q),
    "just above": lambda q: 0.151 + 0 * q,
    "ties": lambda q: 0.05 + 0.3 * np.round(4 * q) / 4,
}


@pytest.mark.parametrize("name", PROFILES)
def test_the_guarantee_over_resamplings(name):
    """Calibrations drawn from a stream of 500 (with repetition, so with duplicates) exceed α at most δ of the time."""
    random, times, alpha, delta = np.random.default_rng(7), 300, 0.15, 0.1
    q = random.random(500)
    wrong = random.random(500) < PROFILES[name](q)
    score = np.round(4 * q) if name == "ties" else q
    exceeded = kept_any = 0
    for count in (20, 250):
        for _ in range(times):
            drawn = random.integers(0, 500, count)
            found = risk_threshold(score[drawn], wrong[drawn], alpha=alpha, delta=delta, horizon=math.inf)
            kept = score <= found.threshold
            exceeded += bool(kept.any() and wrong[kept].mean() > alpha)
            kept_any += bool(kept.any())
    assert exceeded <= stats.binom.ppf(0.999, 2 * times, delta)
    if name == "well ranked":
        assert kept_any > times / 4  # it does keep something where that is safe


def test_one_pair_a_cluster():
    """Ten copies of 20 prompts are 20 pairs, not 200."""
    cluster = np.repeat(np.arange(20), 10)
    found = risk_threshold(np.arange(200), np.zeros(200), alpha=0.1, cluster=cluster)
    assert found.pairs == 20
    assert found.kept == 0
    again = risk_threshold(np.arange(200), np.zeros(200), alpha=0.3, cluster=cluster, seed=3)
    assert again == risk_threshold(np.arange(200), np.zeros(200), alpha=0.3, cluster=cluster, seed=3)
    assert again.kept == 20


def test_tiers_are_calibrated_on_what_is_left():
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 2000)
    side = 2 * label - 1
    strength = random.random(2000)
    weak = np.where(random.random(2000) < 0.5 + 0.5 * strength, side, -side) * strength  # right when it is strong
    weak[:100] = np.nan
    strong = np.where(random.random(2000) < 0.98, side, -side)
    first, second = risk_tiers([weak, strong], label, alpha=0.1, delta=0.1)
    assert first.delta == second.delta == 0.05
    assert first.pairs == 2000
    assert 0 < first.kept < 1900
    assert second.pairs == 2000 - first.kept
    assert second.kept == second.pairs
    kept = np.abs(np.nan_to_num(weak)) >= -first.threshold
    assert kept.sum() == first.kept
    with pytest.raises(InputError, match=r"preference\[1\]: got shape \(3,\)"):
        risk_tiers([weak, [1, 1, 1]], label, alpha=0.1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"alpha": 0.1, "delta": 1.0}, "delta: got 1.0"),
        ({"alpha": 0.1, "method": "hope"}, "method: got 'hope'"),
        ({"alpha": 0.1, "score": [math.nan, 1.0]}, "score: got"),
        ({"alpha": 0.1, "wrong": [0.5, 0.0]}, "wrong: got"),
        ({"alpha": 0.1, "wrong": [0]}, r"wrong: got shape \(1,\)"),
        ({"alpha": 0.1, "cluster": [1]}, r"cluster: got shape \(1,\)"),
    ],
)
def test_bad_arguments_of_the_threshold(arguments, named):
    given = {"score": [0.0, 1.0], "wrong": [0, 1]} | arguments
    with pytest.raises(InputError, match=named):
        risk_threshold(given.pop("score"), given.pop("wrong"), **given)


# -- is it still the same stream? ------------------------------------------------------------------------------------


def test_scores_that_move_are_noticed_and_others_are_not():
    random = np.random.default_rng(1)
    shift = ScoreShift(np.sort(random.normal(size=500)), 0.01)
    assert not any(shift.add(random.normal(size=100)) for _ in range(60))
    assert shift.blocks == 6000 // BLOCK
    assert any(shift.add(random.normal(0.5, size=100)) for _ in range(8))


def test_false_alarms_of_the_scores_are_as_rare_as_stated():
    random, streams = np.random.default_rng(2), 60
    alarms = 0
    for _ in range(streams):
        shift = ScoreShift(np.sort(random.random(300)), 0.1)
        alarms += shift.add(random.random(10 * BLOCK))
    assert alarms <= stats.binom.ppf(0.999, streams, 0.1)


def test_the_bet_on_errors():
    random, streams, delta = np.random.default_rng(3), 200, 0.1
    alarms = sum(ErrorExcess(0.1, delta).add(random.random(500) < 0.1) for _ in range(streams))
    assert alarms <= stats.binom.ppf(0.999, streams, delta)
    found = ErrorExcess(0.1, 0.005)
    assert found.add(random.random(400) < 0.25)
    one = ErrorExcess(0.25, 0.1)
    assert one.evidence == 1
    one.add(np.array([True]))
    # The first part of the stake, 6/π², is multiplied by 1 + s (1 − α) / α = 1 + 3s on the bet that risks s.
    first, won = 6 / math.pi**2, np.mean([1 + 3 * 2.0**-k for k in range(1, 6)])
    assert one.evidence == pytest.approx(1 - first + first * won)
    long = ErrorExcess(0.1, 0.001)
    assert not long.add(random.random(3000) < 0.05)
    assert long.add(random.random(300) < 0.5)  # 3,000 pairs that went well do not hide what comes after


# -- the router ------------------------------------------------------------------------------------------------------


class Stream:
    """Pairs whose head is wrong the more often the larger u is, and a judge that is always right."""

    def __init__(self, seed: int = 0, rate: float = 0.4) -> None:
        self.random, self.rate = np.random.default_rng(seed), rate

    def draw(self, count: int, *, rate: float | None = None, shift: float = 0.0) -> tuple[Candidates, torch.Tensor]:
        q = self.random.random(count)
        wrong = self.random.random(count) < 0.01 + (self.rate * q if rate is None else rate)
        g = torch.from_numpy(self.random.normal(size=count))
        truth = torch.where(torch.from_numpy(wrong), -g.sign(), g.sign())
        u = torch.from_numpy(1 + q + shift)
        return Candidates(g, u**2 - 1, u), truth


def play(router: RiskControlledRouter, stream: Stream, count: int, batches: int, **how) -> float:
    """Route and judge; the share routed."""
    routed = 0
    for _ in range(batches):
        pairs, truth = stream.draw(count, **how)
        chosen = router.select(pairs)
        router.observe(pairs, chosen, torch.where(chosen, truth, torch.nan))
        routed += int(chosen.sum())
    return routed / count / batches


def test_it_routes_everything_until_it_knows_and_then_what_it_must():
    router, stream = RiskControlledRouter(0.15, 0.1, audit=0.1), Stream()
    assert isinstance(router, VerdictRouter)
    assert router.threshold == -math.inf
    assert play(router, stream, 20, 2) == 1.0
    assert "nothing is calibrated" in router.explain()["why"]
    play(router, stream, 100, 20)
    assert 1.1 < router.threshold < 2.0
    assert 0.1 < play(router, stream, 100, 20) < 0.9
    report = router.explain()
    assert report["calibration"]["kept"] > 0
    assert report["audited"]["pairs"] > 50
    assert report["alarms"] == []
    assert json.dumps(report, allow_nan=False)


def test_a_calibration_from_labels_serves_at_once_and_audits_a_share():
    router, stream = RiskControlledRouter(0.15, 0.1, audit=0.05), Stream(1)
    pairs, truth = stream.draw(1000)
    found = router.calibrate(pairs, pairs.logit.sign() != truth)
    assert router.threshold == found.threshold
    assert math.isfinite(found.threshold)
    fresh, _ = stream.draw(4000)
    chosen = router.select(fresh)
    below = fresh.uncertainty <= found.threshold
    assert chosen[~below].all()
    assert chosen[below].double().mean() == pytest.approx(0.05, abs=0.02)


def test_scores_that_move_route_everything_and_then_calibrate_anew(caplog):
    router, stream = RiskControlledRouter(0.15, 0.1), Stream(2)
    pairs, truth = stream.draw(1000)
    router.calibrate(pairs, pairs.logit.sign() != truth)
    before = router.threshold
    play(router, stream, 32, BLOCK // 32, shift=5.0, rate=0.02)
    assert "the scores have moved" in caplog.text
    assert len(router.explain()["alarms"]) == 1
    assert play(router, stream, 32, 1, shift=5.0, rate=0.02) == 1.0
    assert play(router, stream, 128, 12, shift=5.0, rate=0.02) < 1.0
    assert router.threshold > before + 3


def test_errors_that_rise_behind_equal_scores_are_noticed(caplog):
    router, stream = RiskControlledRouter(0.15, 0.1, audit=0.2), Stream(3, rate=0.1)
    pairs, truth = stream.draw(1000)
    assert router.calibrate(pairs, pairs.logit.sign() != truth).share_judged == 0
    play(router, stream, 128, 10)
    assert router.explain()["alarms"] == []
    play(router, stream, 32, 12, rate=0.5)
    assert "the error rate among kept pairs is above 0.15" in caplog.text
    assert play(router, stream, 128, 1, rate=0.5) == 1.0


def test_no_verdict_is_no_right_answer_and_a_tie_none_at_all():
    router, stream = RiskControlledRouter(0.15, 0.1), Stream(4, rate=0.0)
    for _ in range(10):
        pairs, truth = stream.draw(100)
        chosen = router.select(pairs)
        truth[:50] = torch.nan
        router.observe(pairs, chosen, truth)
    assert router.threshold == -math.inf
    assert router.explain()["unanswered"] == 500
    ties = RiskControlledRouter(0.15, 0.1)
    pairs, _ = stream.draw(500)
    ties.observe(pairs, ties.select(pairs), torch.zeros(500, dtype=torch.float64))
    assert ties.explain()["verdicts"] == 0


def test_pairs_of_a_group_count_once():
    router = RiskControlledRouter(0.2, 0.1)
    pairs, truth = Stream(5, rate=0.0).draw(300)
    pairs = Candidates(pairs.logit, pairs.variance, pairs.uncertainty, {"group": torch.arange(300) // 30})
    router.observe(pairs, router.select(pairs), truth)
    assert router.explain()["verdicts"] == 10
    assert router.calibrate(pairs, torch.zeros(300, dtype=torch.bool)).pairs == 10


def test_outcomes_of_another_stretch_and_of_unknown_choices_teach_nothing():
    router, stream = RiskControlledRouter(0.15, 0.1), Stream(6)
    pairs, truth = stream.draw(50)
    chosen = router.select(pairs)
    labelled, labels = stream.draw(1000)
    router.calibrate(labelled, labelled.logit.sign() != labels)
    router.observe(pairs, chosen, truth)
    router.observe(pairs, chosen, truth)
    assert router.explain()["verdicts"] == 0


def test_state_goes_on_bit_for_bit():
    router, stream = RiskControlledRouter(0.15, 0.1, audit=0.1), Stream(7)
    play(router, stream, 100, 20)
    state = json.loads(json.dumps(router.state_dict(), allow_nan=False))
    other = RiskControlledRouter(0.15, 0.1, audit=0.1, seed=9)
    other.load_state_dict(state)
    assert other.explain() == router.explain()
    later = [Stream(8).draw(600) for _ in range(1)]
    for pairs, truth in later:
        chosen = router.select(pairs)
        assert torch.equal(other.select(pairs), chosen)
        for one in (router, other):
            one.observe(pairs, chosen, torch.where(chosen, truth, torch.nan))
    assert other.state_dict() == router.state_dict()


def test_a_damaged_or_foreign_state_changes_nothing():
    router = RiskControlledRouter(0.15, 0.1)
    play(router, Stream(9), 100, 5)
    before = router.state_dict()
    with pytest.raises(CheckpointError, match=r"router\.settings"):
        router.load_state_dict(RiskControlledRouter(0.2, 0.1).state_dict())
    with pytest.raises(CheckpointError, match="seen"):
        router.load_state_dict({**before, "seen": "many"})
    with pytest.raises(CheckpointError, match=r"router\.random"):
        router.load_state_dict({**before, "random": {**before["random"], "state": {"state": -1, "inc": 3}}})
    assert router.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"alpha": 1.0}, "alpha: got 1.0"),
        ({"by": "rank_sum"}, "by: got 'rank_sum'"),
        ({"by": "luck"}, "by: got 'luck'"),
        ({"audit": 1.0}, "audit: got 1.0"),
        ({"alarm": 0.0}, "alarm: got 0.0"),
        ({"method": "hope"}, "method: got 'hope'"),
    ],
)
def test_bad_settings(arguments, named):
    with pytest.raises(InputError, match=named):
        RiskControlledRouter(**{"alpha": 0.1} | arguments)


def test_in_an_engine(hand_head, table_model, scripted_judge):
    """A judge that contradicts the head everywhere: nothing is ever kept."""
    model = table_model(hand_head([1.0, 0.0]), lambda _prompt, text: [float(x) for x in text.split()])
    router = RiskControlledRouter(0.3, 0.3, audit=0.0)
    judge = scripted_judge(lambda pair: Verdict(-1.0 if pair.preference > 0 else 1.0))
    engine = RewardEngine(model, judge, router)
    for _ in range(4):
        scores = engine.score(["p"] * 40, [[f"{k} 1", f"{k + 1} 2"] for k in range(40)])
        assert scores.summary()["decided_by"]["judge"] == 40
    report = router.explain()
    assert report["verdicts"] == 160
    assert "no threshold is safe" in report["why"]
    restored = RewardEngine(model, judge, RiskControlledRouter(0.3, 0.3, audit=0.0))
    restored.load_state_dict(json.loads(json.dumps(engine.state_dict())))
    assert restored.router.explain() == report
