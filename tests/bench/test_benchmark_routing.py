"""LLMBar's rows as RewardBench's, and its verdicts as recorded ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from bench.benchmark_routing import SUBSETS, write_llmbar
from rmcore.evaluation.benchmarks import find_benchmark
from rmcore.evaluation.benchmarks.item import CountedPairs
from rmcore.evaluation.benchmarks.reading import read_items
from rmcore.evaluation.benchmarks.rewardbench import COUNTS
from rmcore.evaluation.benchmarks.routing import recorded_verdicts
from rmcore.judge.recorded import RecordedJudge


def test_rows_and_verdicts_are_read_back(tmp_path: Path) -> None:
    assert set(SUBSETS.values()) <= set(COUNTS)
    said = {
        "Natural": (1, 1),
        "Adversarial/GPTOut": (0, 0),
        "Adversarial/Manual": (1, 0),
        "Adversarial/GPTInst": (None, None),
    }
    rows = [
        {"id": str(k), "prompt": f"p{k}", "chosen": "a", "rejected": "b", "subset": subset}
        | {"judges": {"GPT-4/Vanilla/ab": ab, "GPT-4/Vanilla/ba": ba}}
        for k, (subset, (ab, ba)) in enumerate(said.items())
    ]
    (tmp_path / "llmbar.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    file, verdicts = write_llmbar(tmp_path, tmp_path)
    items = read_items(find_benchmark("rewardbench"), file)
    assert [item.subset for item in items] == [SUBSETS[name] for name in said]
    found = recorded_verdicts(CountedPairs(items), RecordedJudge.from_file(verdicts))
    assert found.preference.tolist()[:3] == [1.0, -1.0, 0.0]
    assert np.isnan(found.preference[3])
