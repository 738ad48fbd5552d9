"""Which numbers make sense, and what is said of the others."""

from __future__ import annotations

import importlib
import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError, JudgeError
from rmcore._base.numbers import COUNT, LARGEST, SEED, Within, check_number, check_numbers
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.wrappers.tier import Tier

HUGE = 10**400
NONSENSE = (math.nan, math.inf, -math.inf, HUGE, -HUGE, "3", True, None, 1j, [1])


@given(st.floats(), st.floats(-5, 5), st.floats(-5, 5))
def test_a_number_is_within_bounds_or_not(value: float, low: float, high: float) -> None:
    finite = math.isfinite(value)
    assert (value in Within(above=low, most=high)) == (finite and low < value <= high)
    assert (value in Within(least=low, below=high)) == (finite and low <= value < high)
    assert (value in Within(least=low, finite=False)) == (value >= low)
    assert value not in Within(whole=True)


def test_what_is_no_number_or_no_number_of_ours() -> None:
    for value in NONSENSE:
        assert value not in Within()
        assert value not in COUNT
        with pytest.raises(InputError, match=r"^n: got .{1,40}, expected a finite number$"):
            check_number("n", value, Within())
    assert math.inf in Within(finite=False)
    assert math.inf not in Within(whole=True, finite=False)
    assert math.nan not in Within(finite=False)
    for good in (1, LARGEST, np.int64(3), np.uint8(3)):
        assert good in COUNT
    assert np.float32(0.5) in Within(above=0)
    assert LARGEST + 1 not in SEED


@pytest.mark.parametrize(
    ("within", "words"),
    [
        (Within(above=0), "a finite number above 0"),
        (Within(least=0), "a finite number, at least 0"),
        (Within(most=2), "a finite number, at most 2"),
        (Within(above=0, below=1), "a number strictly between 0 and 1"),
        (Within(least=0, most=1), "a number from 0 to 1"),
        (Within(above=0, most=1), "a number above 0, at most 1"),
        (Within(least=0, below=0.5), "a number, at least 0, below 0.5"),
        (Within(above=0, finite=False), "a number above 0"),
        (Within(whole=True, least=0, most=65_535), "a whole number from 0 to 65535"),
        (COUNT, "a whole number, at least 1"),
    ],
)
def test_in_words(within: Within, words: str) -> None:
    assert str(within) == words


def test_of_several_attributes_and_none_is_none() -> None:
    holder = SimpleNamespace(a=1, b=None, c=0)
    check_numbers(holder, COUNT, "a", "b")
    with pytest.raises(InputError, match=r"^c: got 0, expected some"):
        check_numbers(holder, COUNT, "a", "c", expected="some")


JUDGE = RecordedJudge({})
CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "_base.retry.RetryPolicy": {},
    "_base.client.options.ClientOptions": {},
    "_base.client.breaker.BreakerPolicy": {},
    "_base.client.limits.RateLimits": {},
    "_base.client.concurrency.AdaptiveConcurrency": {"ceiling": 4},
    "engine.learning.online.LearningConfig": {},
    "engine.options.check_engine_options": {},
    "engine.routing.budget.Budget": {"limit": 5, "unit": "calls"},
    "engine.routing.adaptive.AdaptiveRouter": {"target_fraction": 0.1},
    "engine.routing.learned.LearnedRouter": {"fraction": 0.1},
    "engine.routing.routers.BudgetRouter": {"count": 3},
    "engine.routing.routers.RandomRouter": {"count": 3},
    "engine.routing.routers.ThresholdRouter": {"threshold": 1.4},
    "head.attributes.fit.FitOptions": {},
    "head.attributes.gating.GateConfig": {},
    "head.attributes.head.AttributeConfig": {"hidden_size": 4, "names": ("a", "b")},
    "head.config.HeadConfig": {"hidden_size": 8},
    "head.estimators.samples.Training": {},
    "head.posterior.Posterior": {"num_features": 4},
    "integrations.client.GroupClient": {"url": "http://127.0.0.1:9"},
    "integrations.ray.bulk.Pool": {},
    "integrations.ray.serve.server.ServeScale": {},
    "integrations.server.assembly.GroupAssembly": {"score": None},
    "integrations.server.replies.ReplyStore": {"keep_s": 1.0, "max_bytes": 9},
    "integrations.server.gym_bonuses.GymBonuses": {},
    "integrations.server.settings.ServeSettings": {},
    "judge.chat.ChatJudge": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None},
    "judge.store.prices.Price": {"prompt": 1.0, "completion": 1.0},
    "judge.store.shared_limits.SharedLimits": {
        "url": "postgresql://127.0.0.1:9/none",
        "name": "n",
        "price": {"prompt": 1.0, "completion": 1.0},
    },
    "judge.testing.fault_mix.FaultMix": {"share": 0.5},
    "judge.testing.fault_mix.Storm": {"at": 1, "seconds": 1.0, "kind": "429"},
    "judge.testing.server.ReplayServer": {"recorded": {}},
    "judge.wrappers.canary.CanaryJudge": {"judge": JUDGE},
    "judge.wrappers.disagreement.DisagreementAlarm": {},
    "judge.wrappers.tier.Accept": {},
    "judge.wrappers.tier.Tier": {"name": "t", "judge": JUDGE, "uncertainty": (1.0, 2.0)},
    "judge.wrappers.tiers.TieredJudge": {"tiers": [Tier(JUDGE, "t")]},
    "model.backbone_config.BackboneConfig": {},
    "model.encoding.limits.TextLimit": {},
    "model.plan.PlanConfig": {},
}
ENDLESS = {"max_retry_after_s", "max_share", "max_shift", "spread_prior", "mean_prior", "threshold"}
"""Arguments whose inf says "no limit", as their docstrings do."""
CONNECTING = {"judge.store.shared_limits.SharedLimits"}
"""What connects when it is made: it must refuse numbers before."""


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_no_constructor_takes_a_number_that_makes_no_sense(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    made, given = getattr(importlib.import_module(f"rmcore.{module}"), attribute), CONSTRUCTORS[name]
    if name not in CONNECTING:
        made(**given)
    tried = 0
    for parameter in inspect.signature(made).parameters.values():
        if not {"int", "float"} & set(str(parameter.annotation).replace("'", "").split(" | ")):
            continue
        for value in (math.nan, math.inf, -math.inf, HUGE, -HUGE, "3", True):
            if parameter.name in ENDLESS and value == math.inf:
                continue
            if parameter.name == "threshold" and value == -math.inf:
                continue
            tried += 1
            with pytest.raises((InputError, JudgeError), match=parameter.name):
                made(**{**given, parameter.name: value})
    assert tried
