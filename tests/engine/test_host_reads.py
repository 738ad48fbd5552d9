"""What a score call of hidden rows costs besides its kernel: how often the host waits for the device, and no shortcut
that changes a bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rmcore import RewardEngine
from rmcore._base.errors import NonFiniteError
from rmcore.engine.advantage import group_rewards, rloo_advantages
from rmcore.engine.pair_table import PairTable
from rmcore.engine.routing import (
    AdaptiveRouter,
    AlwaysRoute,
    BudgetedRouter,
    BudgetRouter,
    NeverRoute,
    RandomRouter,
    ThresholdRouter,
    is_budgeted,
)

_WAITS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero, torch.ops.aten.equal}


class Counted(TorchDispatchMode):
    """Operations, and those among them that on a GPU would make the host wait for a value.

    Sizes, numbers and states stay on the CPU when the rows are on a GPU, so only floating-point values count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.waits += function.overloadpacket in _WAITS and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", [[2], [4] * 64, [3, 2, 5, 2]])
def test_the_host_waits_once_for_the_scores_and_not_again_for_the_rewards(hand_head, sizes):
    engine = RewardEngine(hand_head([2.0, 1.0]))
    hidden = torch.randn(sum(sizes), 2, generator=torch.Generator().manual_seed(0))
    engine.score_hidden(hidden, sizes)
    with Counted() as scoring:
        scores = engine.score_hidden(hidden, sizes)
    with Counted() as rewarding:
        rewards = scores.rewards
    assert (scoring.waits, rewarding.waits) == (1, 0)
    assert rewards.shape == (sum(sizes),)


def test_the_number_of_operations_does_not_depend_on_the_number_of_groups(hand_head):
    engine = RewardEngine(hand_head([2.0, 1.0]), backend="cpu")
    counts = []
    for groups in (2, 200):
        hidden = torch.randn(groups * 4, 2)
        engine.score_hidden(hidden, [4] * groups).rewards  # noqa: B018
        with Counted() as counted:
            engine.score_hidden(hidden, [4] * groups).rewards  # noqa: B018
        counts.append(counted.operations)
    assert counts[0] == counts[1]
    assert counts[0] <= 45


@pytest.mark.parametrize("sizes", [[2], [1], [4] * 7, [8] * 3, [3, 1, 5, 2], [1, 1]])
def test_what_is_known_to_be_complete_gives_the_same_bits(hand_head, sizes):
    engine = RewardEngine(hand_head([2.0, 1.0]))
    scores = engine.score_hidden(torch.randn(sum(sizes), 2, generator=torch.Generator().manual_seed(1)), sizes)
    assert scores.table.complete
    found = [scores.rewards, scores.rewards_for("group-mean"), scores.advantages]
    scores.table.complete = False
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, [scores.rewards, scores.rewards_for("group-mean"), scores.advantages], strict=True)
    )
    each = [(group_rewards(g.preference), group_rewards(g.preference, "group-mean"), g.advantages) for g in scores]
    for batched, alone in zip(found, zip(*each, strict=True), strict=True):
        assert torch.equal(batched, torch.cat(alone))


def test_complete_squares_by_hand():
    p = torch.tensor([[0.0, 3.0, -1.0], [-3.0, 0.0, 2.0], [1.0, -2.0, 0.0]])
    assert rloo_advantages(p, complete=True).tolist() == [1.0, -0.5, -0.5]
    assert group_rewards(p, "group-mean", complete=True).tolist() == [1.0, -0.5, -0.5]
    assert group_rewards(p * 3, complete=True).tolist() == [2.0, -1.0, -1.0]


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_a_table_with_a_gap_is_not_complete(hand_head, scripted_judge, mode):
    beta = [2.0, 1.0]
    engine = RewardEngine(hand_head(beta, mode), scripted_judge(lambda pair: math.nan), NeverRoute(), nonfinite="route")
    rows = torch.randn(3 if mode == "difference" else 6, 2)
    whole = engine.score_hidden(rows, [3], prompts=["p"], responses=[["a", "b", "c"]])
    rows[0, 0] = math.nan
    spoilt = engine.score_hidden(rows, [3], prompts=["p"], responses=[["a", "b", "c"]])
    assert whole.table.complete
    assert not spoilt.table.complete
    assert not PairTable.joined([whole.table, spoilt.table]).complete
    assert PairTable.joined([whole.table, whole.table]).complete


def test_a_bad_row_that_is_in_no_pair_is_found(hand_head):
    engine = RewardEngine(hand_head([2.0, 1.0]))
    hidden = torch.zeros(4, 2)
    hidden[3, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"rows \(3\)") as error:
        engine.score_hidden(hidden, [3, 1])
    assert error.value.rows == (3,)


def test_is_budgeted_is_the_protocol():
    class Half:
        def reserve(self, candidates): ...

        def select(self, candidates): ...

    routers = [ThresholdRouter(2), BudgetRouter(count=1), RandomRouter(count=1), NeverRoute(), AlwaysRoute(), Half(), 3]
    for router in [*routers, AdaptiveRouter(0.1)]:
        assert is_budgeted(router) == isinstance(router, BudgetedRouter)
    assert is_budgeted(AdaptiveRouter(0.1))
