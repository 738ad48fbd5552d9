"""One definition of a quantile: numpy's, and the same wherever a p50 or p95 is reported."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore._base.quantile import quantiles
from rmcore.bench.harness import _timing
from rmcore.bench.serve_soak import _quantiles
from rmcore.engine.routing.recent import SampleQuantiles
from rmcore.engine.usage import latency_summary, merge_latencies
from rmcore.judge import JudgeUsage, Verdict, VerdictStore
from rmcore.judge.store.ledger import VerdictLedger
from rmcore.judge.store.records import Question, Reply

LEVELS = (0.0, 0.05, 0.5, 0.9, 0.95, 1.0)
numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(values=numbers)
def test_without_counts_it_is_numpys_default(values):
    assert quantiles(values, LEVELS) == np.quantile(values, LEVELS).tolist()
    # torch and the standard library agree, so their own functions may be used where the data are theirs.
    torchs = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(LEVELS, dtype=torch.float64))
    assert quantiles(values, LEVELS) == pytest.approx(torchs.tolist(), rel=1e-12, abs=1e-9)
    assert quantiles(values, [0.5]) == pytest.approx([statistics.median(values)], rel=1e-12, abs=1e-9)


@given(counted=st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 9)), min_size=1, max_size=20))
def test_a_count_is_as_if_the_value_were_written_down_so_many_times(counted):
    values, counts = zip(*counted, strict=True)
    expected = np.quantile(np.repeat(values, counts), LEVELS)
    assert quantiles(values, LEVELS, counts=counts) == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(("values", "counts"), [([], None), ([[1.0]], None), ([1.0, 2.0], [1])])
def test_what_has_no_quantiles_is_refused(values, counts):
    with pytest.raises(InputError, match=r"^(values|counts): got shape"):
        quantiles(values, [0.5], counts=counts)


def stored(path, latencies):
    """The figures of a verdict store with a call of each latency."""
    with VerdictStore(path) as store:
        for number, seconds in enumerate(latencies):
            asked = Question.of("http://j/v1", "m", {}, "t", f"prompt {number}", "a", "b")
            store.put(asked, Reply(Verdict(1, usage=JudgeUsage(calls=1, attempts=1, seconds=seconds)), True, "raw", {}))
    with VerdictLedger(path) as ledger:
        return ledger.stats()


def test_every_place_that_reports_a_p95_reports_the_same_of_the_same_data(tmp_path):
    """Fifteen latencies, where nearest rank, truncation and interpolation all differ."""
    values = [
        math.exp((bucket + 0.5) * math.log(1.1)) for bucket in (0, 3, 4, 4, 7, 8, 9, 11, 15, 16, 17, 20, 21, 28, 40)
    ]
    p10, p50, p90, p95 = np.quantile(values, (0.1, 0.5, 0.9, 0.95)).tolist()
    figures = latency_summary(values)
    assert figures is not None
    sample = SampleQuantiles()
    for part in (values[::2], values[1::2]):
        sample.add(np.array(part))
    by_rank = sample.quantiles((0.5, 0.95))
    assert by_rank is not None
    timing, soaked = _timing(list(values), 1, "clock"), _quantiles(values)
    merged = merge_latencies({"count": 15, "max": max(values), "histogram": figures["histogram"]})
    assert merged is not None
    stats = stored(tmp_path / "verdicts.db", values)["latency_s"]
    reported = {
        "a call's usage": (figures["p50"], figures["p95"]),
        "accounts, of values in the middle of their buckets": (merged["p50"], merged["p95"]),
        "the drift log": tuple(by_rank),
        "the verdict store": (stats["p50"], stats["p95"]),
    }
    for where, found in reported.items():
        assert found == pytest.approx((p50, p95), rel=1e-9), where
    assert (timing.low, timing.median, timing.high) == pytest.approx((p10, p50, p90))
    assert (soaked["p50"], soaked["p95"]) == pytest.approx((p50, p95), abs=1e-4)  # rounded for the table
