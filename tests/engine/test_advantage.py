"""Design 2.7 and 2.8: verdicts, advantages, and the rewards that make stock trainers reproduce them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.engine import advantage
from rmcore.ops import reference

NAN = float("nan")


def antisymmetric(k, seed=0, scale=3.0, dtype=torch.float64, groups=()):
    p = torch.randn(*groups, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return (p - p.mT).to(dtype)


def leave_one_out(r):
    """TRL's RLOOTrainer: each reward minus the mean of the others."""
    k = r.shape[-1]
    return r - (r.sum(-1, keepdim=True) - r) / (k - 1)


# -- verdicts --------------------------------------------------------------------------------------------------------


def test_a_verdict_is_plus_or_minus_two_and_a_tie_nothing():
    assert float(reference.verdict_logit(1)) == pytest.approx(math.log(0.88 / 0.12), rel=1e-12)  # 1.992
    assert float(reference.verdict_logit(1)) == pytest.approx(2.0, abs=0.01)
    assert float(reference.verdict_logit(-1)) == pytest.approx(-float(reference.verdict_logit(1)), rel=1e-12)
    assert float(reference.verdict_logit(0)) == 0


def test_soft_verdicts_interpolate_the_probability():
    q = torch.linspace(-1, 1, 9)
    j = reference.verdict_logit(q, 0.2)
    torch.testing.assert_close(torch.sigmoid(j), 0.5 + 0.3 * q.double())
    assert bool((j.diff() > 0).all())
    torch.testing.assert_close(j, -j.flip(0))


@pytest.mark.parametrize(("epsilon", "logit"), [(0.5, 0.0), (0.25, math.log(3)), (0.01, math.log(99))])
def test_epsilon_is_the_judges_error_rate(epsilon, logit):
    assert float(reference.verdict_logit(1.0, epsilon)) == pytest.approx(logit, abs=1e-12)


# -- advantages ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(k=st.integers(2, 16), seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_stock_trainers_reproduce_the_advantages(k, seed, scale):
    p = antisymmetric(k, seed, scale)
    truth = advantage.rloo_advantages(p)
    tolerance = {"rtol": 0, "atol": 1e-6 * scale}
    r = advantage.group_rewards(p, "leave-one-out")
    torch.testing.assert_close(leave_one_out(r), truth, **tolerance)
    r = advantage.group_rewards(p, "group-mean")
    torch.testing.assert_close(r - r.mean(), truth, **tolerance)
    torch.testing.assert_close(advantage.grpo_advantages(r, scale_by_std=False), truth, **tolerance)


def test_the_identity_holds_to_1e6_in_float32():
    p = antisymmetric(8, scale=1.0, dtype=torch.float32, groups=(50,))
    r = advantage.group_rewards(p)
    torch.testing.assert_close(leave_one_out(r), advantage.rloo_advantages(p), rtol=0, atol=1e-6)


def test_advantages_are_row_means_and_sum_to_zero():
    p = antisymmetric(5, groups=(2, 3))
    a = advantage.rloo_advantages(p)
    assert a.shape == (2, 3, 5)
    torch.testing.assert_close(a[1, 2, 3], sum(p[1, 2, 3, j] for j in range(5) if j != 3) / 4)
    torch.testing.assert_close(a.sum(-1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("baseline", ["leave-one-out", "group-mean"])
def test_public_and_reference_agree_without_gaps(baseline):
    p = antisymmetric(6, groups=(4,))
    torch.testing.assert_close(advantage.rloo_advantages(p), reference.rloo_advantages(p))
    torch.testing.assert_close(advantage.group_rewards(p, baseline), reference.rloo_rewards(p, baseline))


def test_a_better_response_never_gets_a_smaller_advantage():
    p = antisymmetric(6)
    before = advantage.rloo_advantages(p)
    p[2, 4] += 1
    p[4, 2] -= 1
    after = advantage.rloo_advantages(p)
    assert float(after[2]) == pytest.approx(float(before[2]) + 1 / 5)
    assert float(after[4]) == pytest.approx(float(before[4]) - 1 / 5)
    assert torch.equal(after[[0, 1, 3, 5]], before[[0, 1, 3, 5]])


def test_a_group_of_one_has_advantage_zero():
    for p in (torch.zeros(1, 1), torch.full((1, 1), NAN), torch.zeros(3, 1, 1)):
        assert bool((advantage.rloo_advantages(p) == 0).all())
        assert bool((advantage.group_rewards(p) == 0).all())
    assert bool((reference.rloo_advantages(torch.zeros(1, 1)) == 0).all())
    assert bool((advantage.grpo_advantages(torch.tensor([3.0])) == 0).all())


def test_the_diagonal_is_not_read():
    p = antisymmetric(4)
    noisy = p + torch.diag(torch.tensor([NAN, 5.0, math.inf, -1.0], dtype=torch.float64))
    torch.testing.assert_close(advantage.rloo_advantages(noisy), advantage.rloo_advantages(p))
    torch.testing.assert_close(reference.rloo_advantages(noisy), reference.rloo_advantages(p))


def test_a_missing_pair_is_left_out_of_both_means():
    p = antisymmetric(4)
    full = advantage.rloo_advantages(p)
    p[0, 1] = p[1, 0] = NAN
    a = advantage.rloo_advantages(p)
    assert float(a[0]) == pytest.approx(float((p[0, 2] + p[0, 3]) / 2))
    assert float(a[1]) == pytest.approx(float((p[1, 2] + p[1, 3]) / 2))
    torch.testing.assert_close(a[2:], full[2:])


@pytest.mark.parametrize("baseline", ["leave-one-out", "group-mean"])
def test_a_member_without_preferences_is_none_and_the_others_do_not_notice(baseline):
    p = antisymmetric(5)
    others = p[1:, 1:]
    p[0, :] = p[:, 0] = NAN
    a, r = advantage.rloo_advantages(p), advantage.group_rewards(p, baseline)
    assert bool(a[0].isnan())
    assert bool(r[0].isnan())
    torch.testing.assert_close(a[1:], advantage.rloo_advantages(others))
    recovered = leave_one_out(r[1:]) if baseline == "leave-one-out" else r[1:] - r[1:].mean()
    torch.testing.assert_close(recovered, a[1:], rtol=0, atol=1e-12)


def test_group_relative_advantages_are_trls():
    r = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    expected = (r - r.mean(dim=1, keepdim=True)) / (r.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantage.grpo_advantages(r), expected)
    torch.testing.assert_close(advantage.grpo_advantages(r, scale_by_std=False), r - r.mean(dim=1, keepdim=True))
    equal = advantage.grpo_advantages(torch.full((4,), 0.7))
    torch.testing.assert_close(equal, torch.zeros(4), atol=1e-3, rtol=0)  # (0.7 − mean) rounds, over eps


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 3, 2), (0, 0), (2, 0, 0)])
def test_preferences_must_be_square(shape):
    for function in (advantage.rloo_advantages, advantage.group_rewards):
        with pytest.raises(InputError, match=r"^preferences: got shape"):
            function(torch.zeros(shape))


def test_other_arguments_are_named():
    with pytest.raises(InputError, match=r"^baseline: got 'median'"):
        advantage.group_rewards(torch.zeros(2, 2), "median")
    for rewards in (torch.zeros(()), torch.zeros(3, 0)):
        with pytest.raises(InputError, match=r"^rewards: "):
            advantage.grpo_advantages(rewards)
