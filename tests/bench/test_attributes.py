"""The suite of multi-attribute heads: every variant beside every other, each held against the formula."""

from __future__ import annotations

import torch

from rmcore.bench import attributes
from rmcore.bench.harness import Limits
from rmcore.bench.setup import Setup


def test_ours_and_torchs_stand_side_by_side_and_are_right(monkeypatch):
    monkeypatch.setattr(attributes, "rotations", lambda *_: 2)
    limits = Limits(bandwidth=1e10, bandwidth_kind="made up", matrix=dict.fromkeys(("float32", "bfloat16"), 1e11))
    setup = Setup(torch.device("cpu"), limits, ((64, 64),), (1, 3), (torch.bfloat16,), 0.001, compiled=False)
    rows = list(attributes.attributes(setup))
    variants = {(row["variant"], row["dtype"]) for row in rows}
    assert variants >= {("torch eager", "bfloat16"), ("torch eager", "float32")}
    assert {row["suite"] for row in rows} == {"attributes, 1 head", "attributes, 3 heads"}
    assert len(rows) == 2 * 2 * len(variants)
    for row in rows:
        assert row["right"], row
        members = 3 if row["suite"].endswith("heads") else 1
        width = 4 if row["dtype"] == "float32" else 2
        assert row["bytes"] > width * members * 64 * (64 + 64 + 10)
        assert row["flop"] == 2 * row["rows"] * members * 64 * (64 + 64 + 10)
