"""The endurance run in small: everything it checks, but for the load itself, which depends on the machine's speed."""

from __future__ import annotations

import json

import pytest

from rmcore.bench import judge_soak


@pytest.mark.slow
def test_four_hundred_pairs(tmp_path):
    size = ["--pairs", "400", "--in-flight", "16", "--faults", "0.35"]  # more faults than there are kinds
    times = ["--latency", "0.02", "0.06", "--rate", "0", "--timeout", "2", "--storm", "0.1", "--deadline", "120"]
    judge_soak.main([*size, *times, "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "judge_soak.json").read_text())
    failed = {name for name, passed in figures["checks"].items() if not passed}
    assert failed <= {"so many requests were in flight"}
    assert figures["summary"]["pairs"] == 400
    assert figures["pairs"]["right"] > 200
    assert figures["environment"]["commit"]
