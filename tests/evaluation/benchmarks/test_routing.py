"""Routing tables: the judge decides what is routed, random routing is beside it, nothing is lost on the way out."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.item import CountedPairs, Item
from rmcore.evaluation.benchmarks.plot import plot_routing_table
from rmcore.evaluation.benchmarks.routing import label_verdicts, recorded_verdicts, routing_table
from rmcore.evaluation.benchmarks.scoring import Answers
from rmcore.evaluation.benchmarks.verdicts import Verdicts
from rmcore.judge.recorded import RecordedJudge


def answers(count: int = 200, *, wrong: int = 50) -> Answers:
    """Pairs of which the first ``wrong`` are wrong, and exactly those are the most uncertain."""
    sources = ("mmlu-pro-law", "livecodebench")
    items = tuple(Item(str(k), f"p{k}", ("a", "b"), (1.0, 0.0), sources[k % 2]) for k in range(count))
    margin = np.where(np.arange(count) < wrong, -1.0, 1.0)
    scores = tuple(np.array([m, 0.0]) for m in margin)
    return Answers(CountedPairs(items), margin, 3.0 - np.arange(count) / count, scores)


JUDGEBENCH = BENCHMARKS["judgebench"]
PPE_PAIRS = BENCHMARKS["ppe-pairs"]  # no preference counts half


def test_uncertain_errors_are_corrected_first() -> None:
    said = answers()
    table = routing_table(JUDGEBENCH, said, label_verdicts(said.pairs), budgets=(0.1, 0.25), replicates=200)
    rows = [(row.name, row.calls, row.share, row.scores[0].routed) for row in table.rows]
    assert rows == [
        ("no judge", 0, 0, 0.75),
        ("10%", 20, 0.1, 0.85),
        ("25%", 50, 0.25, 1.0),
        ("every pair", 200, 1, 1.0),
    ]
    for row, random in zip(table.rows, (0.75, 0.775, 0.8125, 1.0), strict=True):
        # 20 calls at random correct 5 errors; the mean over draws is within a few standard errors.
        assert row.scores[0].random == pytest.approx(random, abs=0.006)
    tenth = table.rows[1].scores[0]
    assert tenth.low < tenth.difference < tenth.high
    assert tenth.low > 0
    assert [score.name for score in table.rows[0].scores] == ["Accuracy", "Knowledge", "Coding"], "no subsets"


def test_subsets_stand_beside_a_single_section() -> None:
    said = answers()
    items = tuple(replace(item, subset=f"mmlu-pro-{k % 2}") for k, item in enumerate(said.pairs.items))
    one = Answers(CountedPairs(items), said.margin, said.uncertainty, said.scores)
    table = routing_table(JUDGEBENCH, one, label_verdicts(one.pairs), budgets=(), replicates=0)
    assert [score.name for score in table.rows[0].scores] == ["Accuracy", "Knowledge", "mmlu-pro-0", "mmlu-pro-1"]


def test_a_threshold_routes_what_exceeds_it() -> None:
    said = answers()
    table = routing_table(JUDGEBENCH, said, label_verdicts(said.pairs), budgets=(), thresholds=(2.9, 9.0), replicates=0)
    assert [(row.name, row.calls) for row in table.rows][1:3] == [("u > 2.9", 20), ("u > 9", 0)]
    assert table.rows[1].threshold > 2.9
    by_margin = routing_table(
        JUDGEBENCH, said, label_verdicts(said.pairs), by="margin", thresholds=(-1.5,), budgets=(), replicates=0
    )
    assert by_margin.rows[1].calls == 200
    assert np.isnan(by_margin.rows[1].scores[0].low) or by_margin.rows[1].scores[0].low == 0
    for bad in ({"budgets": (1.5,)}, {"thresholds": (float("nan"),)}, {"by": "length"}):
        with pytest.raises(InputError):
            routing_table(JUDGEBENCH, said, label_verdicts(said.pairs), replicates=0, **bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="verdicts: got 3, expected 200"):
        routing_table(JUDGEBENCH, said, Verdicts.of(said.pairs, np.ones(3)), replicates=0)


def test_equal_scores_are_random_routing() -> None:
    said = answers()
    flat = Answers(said.pairs, said.margin, np.ones(200), said.scores)
    table = routing_table(JUDGEBENCH, flat, label_verdicts(flat.pairs), budgets=(0.5,), replicates=0)
    assert table.rows[1].scores[0].routed == pytest.approx(table.rows[1].scores[0].random, abs=0.06)


def test_what_the_inputs_do_not_tell_is_routed_first() -> None:
    said = answers()
    u = np.array(said.uncertainty)
    u[-1] = np.inf
    for by in ("u", "rank_sum"):
        table = routing_table(
            PPE_PAIRS,
            Answers(said.pairs, np.where(np.isinf(u), 0.0, said.margin), u, said.scores),
            Verdicts.of(said.pairs, -np.ones(200)),
            by=by,  # type: ignore[arg-type]
            budgets=(0.005,),
            replicates=0,
        )
        assert table.rows[0].scores[0].routed == pytest.approx((149 + 0.5) / 200)
        assert table.rows[1].scores[0].routed == pytest.approx(149 / 200), "the judge, always wrong, took that pair"


def test_recorded_verdicts_by_text_and_what_they_do_not_hold() -> None:
    said = answers(4, wrong=0)
    rows = [
        {"prompt": "p0", "first": "a", "second": "b", "verdict": "win"},
        {"prompt": "p1", "first": "b", "second": "a", "verdict": "win"},
        {"prompt": "p2", "first": "a", "second": "b", "verdict": "win"},
        {"prompt": "p2", "first": "a", "second": "b", "verdict": "loss", "order": "ba"},
    ]
    found = recorded_verdicts(said.pairs, RecordedJudge.from_rows(rows))
    assert found.preference.tolist()[:3] == [1.0, -1.0, 0.0]
    assert np.isnan(found.preference[3])
    assert (found.flips, found.orders.tolist()) == ((1, 1), [1, 1, 2, 0])
    table = routing_table(PPE_PAIRS, said, found, budgets=(), replicates=0)
    assert table.rows[-1].failed == 1
    assert table.rows[-1].scores[0].routed == pytest.approx((1 + 0 + 0.5 + 1) / 4), (
        "no verdict: the model's answer stands"
    )
    assert "no verdict on 1 pairs" in table.to_markdown()


def test_every_form_holds_the_same_numbers(tmp_path: Path) -> None:
    said = answers()
    table = routing_table(JUDGEBENCH, said, label_verdicts(said.pairs), budgets=(0.1,), replicates=50)
    content = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert content["rows"][0]["threshold"] is None
    assert content["rows"][1]["scores"][0]["routed"] == 0.85
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(rows) == 3 * 3
    (own,) = [row for row in rows if (row["routing"], row["score"]) == ("10%", "Accuracy")]
    assert (own["calls"], float(own["routed"])) == ("20", 0.85)
    assert float(own["difference"]) == content["rows"][1]["scores"][0]["difference"]
    markdown, tex = table.to_markdown(), table.to_latex()
    assert "| 10%, by u | 20 | 10.0 | 85.0 |" in markdown
    assert "an upper bound" in markdown
    assert r"10\%, by u & 20 & 10.0 & 85.0" in tex
    assert tex.count(r"\\") == 1 + 2 + 2
    plot_routing_table(table, tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
