"""A head and two tiers of judges under one bound on the error rate, calibrated tier by tier and served by an engine."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rmcore import RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.pair_table import PairState
from rmcore.engine.risk_cascade import calibrate_cascade
from rmcore.engine.routing import risk_tiers
from rmcore.judge.base import Verdict
from rmcore.judge.wrappers.tiers import Accept, Tier

ALPHA, DELTA = 0.2, 0.2


class World:
    """Pairs of which the head, a cheap and a strong judge know more or less."""

    def __init__(self, seed, count=800):
        random = np.random.default_rng(seed)
        self.side = random.choice([-1, 1], count)
        sure = random.exponential(1.0, count)
        self.logit = np.where(random.random(count) < 1 / (1 + np.exp(-sure)), self.side, -self.side) * sure
        strength = random.random(count)
        self.cheap = np.where(random.random(count) < 0.45 + 0.55 * strength, self.side, -self.side) * strength
        self.strong = np.where(random.random(count) < 0.95, self.side, -self.side) * 1.0
        self.cheap[:5] = math.nan
        self.prompts = [f"{k}" for k in range(count)]
        self.pairs = [(f"first {k}", f"second {k}") for k in range(count)]
        rows = np.zeros((count, 2, 2))
        rows[:, 0, 0], rows[:, :, 1] = self.logit, 1.0
        self.hidden = torch.from_numpy(rows.reshape(-1, 2)).float()

    def tiers(self, scripted_judge, accept=Accept.always):
        def of(preference):
            def answer(pair):
                value = float(preference[int(pair.prompt)])
                return Verdict.none("failed") if math.isnan(value) else Verdict(value)

            return scripted_judge(answer)

        cheap, strong = of(self.cheap), of(self.strong)
        return [Tier(cheap, "cheap", accept=accept, batch_size=512), Tier(strong, "strong", batch_size=512)]

    def served(self, head, router, judge):
        """Error rate among the decided pairs, and how many those are."""
        engine = RewardEngine(head, judge, router)
        scores = engine.score_hidden(self.hidden, [2] * len(self.pairs), prompts=self.prompts, responses=self.pairs)
        table = scores.table
        unsure = [row for row, verdict in table.verdicts.items() if verdict.reason.startswith("unaccepted")]
        decided = table.state != PairState.JUDGE_FAILED
        decided[unsure] = False
        wrong = table.preference.sign() != torch.from_numpy(self.side)
        return float(wrong[decided].double().mean()), int(decided.sum())


def calibrated(world, head, tiers, **settings):
    labels = (world.side + 1) / 2
    given = {"alpha": ALPHA, "delta": DELTA, "by": "margin", "hidden": world.hidden, "audit": 0.0} | settings
    return calibrate_cascade(head, tiers, world.prompts, world.pairs, labels, **given)


def test_each_is_calibrated_and_asked_on_what_is_left(hand_head, scripted_judge):
    world, head = World(0), hand_head([1.0, 0.0])
    tiers = world.tiers(scripted_judge)
    found = calibrated(world, head, tiers)
    of = found.thresholds
    assert list(of) == ["head", "cheap", "strong"]
    assert all(one.delta == pytest.approx(DELTA / 3) for one in of.values())
    assert of["head"].pairs == 800
    assert of["cheap"].pairs == 800 - of["head"].kept == len(tiers[0].judge.asked)
    assert of["strong"].pairs == of["cheap"].pairs - of["cheap"].kept == len(tiers[1].judge.asked)
    assert all(one.kept > 0 for one in of.values())
    assert found.undecided == pytest.approx((of["strong"].pairs - of["strong"].kept) / 800)
    # As served: the very pairs that a tier was sure enough of in the calibration are the ones it decides.
    before = [len(tier.judge.asked) for tier in tiers]
    world.served(head, found.router, found.judge)
    assert [len(tier.judge.asked) - n for tier, n in zip(tiers, before, strict=True)] == before
    assert found.judge.stats()["cheap"]["accepted"] == of["cheap"].kept
    assert "0.2 with probability 0.8" in json.loads(json.dumps(found.to_dict()))["guarantee"]


def test_the_bound_holds_in_serving_over_resamplings(hand_head, scripted_judge):
    head, times, exceeded, uncontrolled, shares = hand_head([1.0, 0.0]), 6, 0, 0, []
    for seed in range(times):
        world, ahead = World(seed), World(1000 + seed)
        found = calibrated(world, head, world.tiers(scripted_judge))
        names = {} if found.judge is None else {tier.name: tier for tier in found.judge.tiers}
        serving = [
            Tier(tier.judge, tier.name, accept=names[tier.name].accept, batch_size=512)
            for tier in ahead.tiers(scripted_judge)
            if tier.name in names
        ]
        error, decided = ahead.served(head, found.router, type(found.judge)(serving))
        exceeded += error > ALPHA
        shares.append(decided / 800)
        uncontrolled += float((np.sign(ahead.cheap) != ahead.side).mean()) > ALPHA
    assert exceeded <= stats.binom.ppf(0.999, times, DELTA)
    assert uncontrolled == times
    assert np.mean(shares) > 0.9


def test_the_bound_holds_for_tiers_over_resamplings():
    """Halves of one stream, without an engine: as many errors among what the tiers keep as were promised."""
    world, random, times, exceeded = World(0, 1600), np.random.default_rng(0), 60, 0
    tiers, label = [world.cheap, world.strong], (world.side + 1) / 2
    for _ in range(times):
        half = random.permutation(1600) < 800
        found = risk_tiers([tier[half] for tier in tiers], label[half], alpha=0.1, delta=DELTA)
        left, wrong, kept = ~half, 0, 0
        for tier, threshold in zip(tiers, found, strict=True):
            takes = left & (np.abs(np.nan_to_num(tier)) >= max(-threshold.threshold, 1e-9))
            wrong += (np.sign(tier[takes]) != world.side[takes]).sum()
            kept, left = kept + takes.sum(), left & ~takes
        exceeded += wrong > 0.1 * kept
    assert exceeded <= stats.binom.ppf(0.999, times, DELTA)


def test_a_tier_that_is_never_sure_is_left_out_and_rules_of_its_own_are_kept(hand_head, scripted_judge):
    world, head = World(3), hand_head([1.0, 0.0])
    world.cheap = world.cheap * 0 + 1.0  # says the first, always
    found = calibrated(world, head, world.tiers(scripted_judge))
    assert [tier.name for tier in found.judge.tiers] == ["strong"]
    assert "no threshold is safe" in found.thresholds["cheap"].reason
    world = World(4)
    for rule in (Accept(min_preference=0.9), lambda verdict: abs(verdict.preference) >= 0.9):
        found = calibrated(world, head, world.tiers(scripted_judge, rule))
        accept = found.judge.tiers[0].accept
        assert accept(Verdict(1.0))
        assert not accept(Verdict(0.89))
        assert 0 < found.thresholds["cheap"].kept <= (np.abs(world.cheap) >= 0.9).sum()


def test_nobody_is_sure(hand_head, scripted_judge):
    world, head = World(5, 30), hand_head([1.0, 0.0])
    found = calibrated(world, head, world.tiers(scripted_judge), alpha=0.02)
    assert found.judge is None
    assert found.undecided == 1.0
    assert all(one.threshold == -math.inf for one in found.thresholds.values())


def test_arguments(hand_head, scripted_judge):
    world, head = World(6, 40), hand_head([1.0, 0.0])
    cheap, strong = world.tiers(scripted_judge)
    banded = [Tier(cheap.judge, "cheap", (1.0, 1.2)), strong]
    with pytest.raises(InputError, match="tiers"):
        calibrated(world, head, banded)
    with pytest.raises(InputError, match="alpha"):
        calibrated(world, head, [cheap], alpha=0)
    world.side = world.side[:-1]
    with pytest.raises(InputError, match="labels"):
        calibrated(world, head, [cheap])
