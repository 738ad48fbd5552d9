"""Fits that learn next to nothing say so by name."""

from __future__ import annotations

import logging

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.head import SNGPHead
from rmcore.head.degenerate import told_already
from rmcore.head.fit import fit, upgrade


def rows(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(0))


def told(caplog: pytest.LogCaptureFixture, **arguments: object) -> list[str]:
    caplog.clear()
    mode = "concat" if arguments.get("pairs") is None else "difference"
    with caplog.at_level(logging.WARNING):
        fit(SNGPHead(8, num_features=16, mode=mode), **arguments)  # type: ignore[arg-type]
    return [r.getMessage().removeprefix("degenerate fit: ") for r in caplog.records if "degenerate" in r.getMessage()]


def test_what_is_degenerate_is_named(caplog: pytest.LogCaptureFixture) -> None:
    x, ones = rows(), torch.ones(3)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert told(caplog, hidden=x, labels=ones, pairs=pairs) == []
    assert told(caplog, hidden=x, labels=ones[:1], pairs=pairs[:1])[0].startswith("a single training pair")
    again = pairs[:1].expand(3, 2)
    assert told(caplog, hidden=x, labels=ones, pairs=again) == ["the 3 training pairs are one pair 3 times over"]
    copies = x[:2].repeat(3, 1)  # equal rows at other places
    assert told(caplog, hidden=copies, labels=ones, pairs=pairs) == ["the 3 training pairs are one pair 3 times over"]
    assert told(caplog, hidden=x, labels=ones / 2, pairs=pairs)[0].startswith("all 3 labels are 0.5")
    assert told(caplog, hidden=x, labels=torch.full((6,), 0.9))[0].startswith("all 6 labels say that the first")
    assert told(caplog, hidden=x, labels=torch.zeros(6))[0].startswith("all 6 labels say that the second")
    assert told(caplog, hidden=x, labels=torch.tensor([1.0, 0, 1, 0, 1, 0.5])) == []


def test_labels_that_contradict_each_other_evenly_are_named(caplog: pytest.LogCaptureFixture) -> None:
    x, pairs = rows(), torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    assert told(caplog, hidden=x, labels=torch.ones(4), pairs=pairs)[0].startswith("the head prefers no response")
    assert told(caplog, hidden=x, labels=torch.tensor([0.9, 0.9, 0.2, 0.2]), pairs=pairs)[0].startswith("the head")
    assert told(caplog, hidden=x, labels=torch.tensor([1.0, 1, 1, 0]), pairs=pairs) == []
    assert len(told(caplog, hidden=x, labels=torch.full((4,), 0.5), pairs=pairs)) == 1, "told once"


def test_parts_of_data_that_were_looked_at_are_not_told_again(caplog: pytest.LogCaptureFixture) -> None:
    with told_already():
        assert told(caplog, hidden=rows(), labels=torch.ones(1), pairs=torch.tensor([[0, 1]])) == []
    assert len(told(caplog, hidden=rows(), labels=torch.ones(1), pairs=torch.tensor([[0, 1]]))) == 1


def test_pairs_of_equal_rows_are_refused() -> None:
    same = rows(1).repeat(4, 1)
    pairs = torch.tensor([[0, 1], [2, 3]])
    for make in (
        lambda: fit(
            SNGPHead(8, num_features=16, mode="difference", length_scale=2.0), same, torch.ones(2), pairs=pairs
        ),
        lambda: upgrade(same, pairs, torch.ones(8)),
    ):
        with pytest.raises(InputError, match="2 pairs of equal hidden rows, expected at least one pair whose rows"):
            make()


def test_a_late_difference_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    x = rows(1).repeat(202, 1)
    x[::2] += 1.0
    pairs = torch.arange(202).view(101, 2)
    x[201] += 1e-3
    assert told(caplog, hidden=x, labels=torch.ones(101), pairs=pairs) == []
