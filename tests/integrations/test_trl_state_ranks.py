"""Two ranks under torchrun and gloo that stop and resume: each goes on with its own budget."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl", reason="TRL is not installed (pip install 'rmcore[trl]')")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["8 raise resumed", "6 gather resumed"])
def test_budgets_of_two_ranks_hold_over_a_resumed_run(run, two_ranks):
    """Every rank has a budget of its own, here 5 calls and 9, and gets its own back; whole groups and gathered ones."""
    ranks = [json.loads((two_ranks / f"{run} rank {rank}.json").read_text()) for rank in range(2)]
    assert not [rank["error"] for rank in ranks if "error" in rank]
    assert [rank["calls"] for rank in ranks] == [[5, 5], [9, 9]]
    document = json.loads((two_ranks / run / "checkpoint-4" / "rmcore_state.json").read_text())
    assert [state["router"]["state"]["budgets"][0]["spent"] for state in document["ranks"]] == [5, 9]
    assert len(ranks[0]["win_rates"]) == 4
    assert all(0 <= rate <= 1 for rate in ranks[0]["win_rates"])
