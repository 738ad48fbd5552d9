"""The further tables: scores side by side, equal cost, the filter, best of n; and the forms that all of them have."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.beside import beside_table, detection_table
from rmcore.evaluation.benchmarks.choice import choose
from rmcore.evaluation.benchmarks.cost import CostModel, cost_table, filter_cost_table, judge_tokens
from rmcore.evaluation.benchmarks.item import CountedPairs, Item
from rmcore.evaluation.benchmarks.plot import plot_table
from rmcore.evaluation.benchmarks.pools import PoolDraw, best_of_routing_table
from rmcore.evaluation.benchmarks.routing import Draw, routed_mask
from rmcore.evaluation.benchmarks.scoring import Answers
from rmcore.evaluation.benchmarks.table import Cell, Column, Curve, Table
from rmcore.evaluation.benchmarks.uncertainty import best_of_table, filter_table
from rmcore.evaluation.benchmarks.verdicts import Verdicts, label_verdicts
from rmcore.ops.reference import verdict_logit

JUDGEBENCH = BENCHMARKS["judgebench"]


def answers(count: int = 120) -> Answers:
    """Every fourth pair is wrong, u finds all of these, the margin none; every second prompt is ten times longer."""
    items = tuple(
        Item(str(k), f"{k} " + "word " * (400 if k % 2 else 40), ("a", "b"), (1.0, 0.0), "livecodebench")
        for k in range(count)
    )
    wrong = np.arange(count) % 4 == 0
    margin = np.where(wrong, -5.0, 1.0) * (1 + np.arange(count) / count)
    uncertainty = np.where(wrong, 2.0, 1.0) + np.arange(count) / count / 10
    scores = tuple(np.array([m, 0.0]) for m in margin)
    return Answers(CountedPairs(items), margin, uncertainty, scores, tokens=np.full(count, 100.0))


def figures(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.to_csv())))


def test_scores_side_by_side_have_paired_differences() -> None:
    said = answers()
    draw = Draw(JUDGEBENCH, said, label_verdicts(said.pairs), 0)
    chosen = {by: choose(said, draw.verdicts, by, budgets=(0.25,)) for by in ("u", "margin")}  # type: ignore[arg-type]
    row = figures(beside_table(draw, chosen, replicates=100))[0]
    assert float(row["u"]) == 1.0
    assert float(row["margin"]) == pytest.approx(-0.25)
    assert float(row["margin_low"]) < -0.25 < float(row["margin_high"]) < 0
    assert float(row["random"]) == pytest.approx(-0.1875, abs=0.01)
    with pytest.raises(InputError, match="at least two"):
        beside_table(draw, {"u": chosen["u"]})
    found = figures(detection_table("t", {"head": said}, ["u", "margin"]))
    assert [float(row["auroc"]) for row in found] == [1.0, 0.0]
    assert [float(row["error_50"]) for row in found] == [0.0, 0.5]


def test_the_filter_keeps_what_the_model_is_sure_of() -> None:
    said = answers()
    table = filter_table(JUDGEBENCH, said, ["u"], keep=(0.5, 0.75, 1.0), replicates=50)
    rows = figures(table)
    assert [(row["by"], float(row["prompts"]), float(row["Accuracy"])) for row in rows] == [
        ("all", 120, 0.75),
        ("u", 60, 1.0),
        ("u", 90, 1.0),
    ], "keeping all is the first line"
    assert float(rows[1]["difference_low"]) > 0.1
    flat = Answers(said.pairs, said.margin, np.ones(120), said.scores)
    assert len(filter_table(JUDGEBENCH, flat, ["u"], replicates=0).rows) == 1, "equal scores: nothing to drop by"
    with pytest.raises(InputError, match="keep"):
        filter_table(JUDGEBENCH, said, ["u"], keep=(0.0,))


def test_best_of_n_is_the_mean_over_all_draws() -> None:
    rng = np.random.default_rng(0)
    items = tuple(
        Item(str(k), f"p{k}", tuple("abcd"), tuple(float(x) for x in rng.permutation([1, 1, 0, 0])), "GPQA")
        for k in range(5)
    )
    mean = tuple(rng.normal(size=4) for _ in items)
    doubt = tuple(1 + rng.random(4) for _ in items)
    pairs = CountedPairs(items)
    said = Answers(pairs, np.ones(len(pairs)), np.ones(len(pairs)), mean, preference=mean, doubt=doubt)
    table = best_of_table(BENCHMARKS["ppe-best-of-k"], said, penalties=(0, 2), keep=(0.5,), replicates=0)
    assert table is not None
    cut = np.quantile(np.concatenate(doubt), 0.5)
    for row in figures(table):
        n = int(row["n"])
        worth = {0: [], 2: [], "kept": []}  # type: ignore[var-annotated]
        for item, m, u in zip(items, mean, doubt, strict=True):
            for drawn in itertools.combinations(range(4), n):
                for c in (0, 2):
                    worth[c].append(item.quality[max(drawn, key=lambda i: m[i] - c * u[i])])
                kept = [i for i in drawn if u[i] <= cut] or drawn
                worth["kept"].append(item.quality[max(kept, key=lambda i: m[i])])
        assert float(row["λ = 0"]) == pytest.approx(np.mean(worth[0]))
        assert float(row["λ = 2"]) == pytest.approx(np.mean(worth[2]) - np.mean(worth[0]))
        (name,) = [key for key in row if key.startswith("kept") and key.endswith(f"{cut:.3f}")]
        assert float(row[name]) == pytest.approx(np.mean(worth["kept"]) - np.mean(worth[0]))
    assert best_of_table(JUDGEBENCH, answers(), replicates=0) is None, "pairs are no pools"


def pools(count: int = 12, size: int = 4) -> tuple[Answers, list[np.ndarray]]:
    """Pools with their squares of preferences: g / u of random scores."""
    rng = np.random.default_rng(7)
    items, squares, margin, doubt = [], [], [], []
    for k in range(count):
        quality = tuple(float(x) for x in rng.permutation([1, 1] + [0] * (size - 2)))
        items.append(Item(str(k), f"p{k}", tuple("abcdefgh"[:size]), quality, "GPQA"))
        score, u = rng.normal(size=size) + 0.5 * np.array(quality), 1 + rng.random((size, size))
        u = (u + u.T) / 2
        squares.append((score[:, None] - score[None, :]) / u)
        margin += [score[i] - score[j] for i, j in items[-1].pairs]
        doubt += [u[i, j] for i, j in items[-1].pairs]
    mean = tuple(square.sum(axis=1) / (size - 1) for square in squares)
    pairs = CountedPairs(tuple(items))
    tokens = np.full(count, 400.0)
    u_of = tuple(np.ones(size) for _ in items)
    return Answers(pairs, np.array(margin), np.array(doubt), mean, preference=mean, doubt=u_of, tokens=tokens), squares


def test_the_best_of_a_pool_with_a_judge_is_what_the_squares_say() -> None:
    said, squares = pools()
    rng = np.random.default_rng(1)
    preference = rng.choice([1.0, -1.0, 0.0, np.nan], len(said.pairs))
    draw = PoolDraw(BENCHMARKS["ppe-best-of-k"], said, Verdicts.of(said.pairs, preference), 0)
    for share in (0.0, 0.4, 1.0):
        routed = rng.random(len(said.pairs)) < share
        at, expected = 0, []
        for item, square in zip(said.pairs.items, squares, strict=True):
            own = square.copy()
            for i, j in item.pairs:
                if routed[at] and not np.isnan(preference[at]):
                    own[i, j] = float(verdict_logit(preference[at]))
                    own[j, i] = -own[i, j]
                at += 1
            expected.append(item.quality[int(own.sum(axis=1).argmax())])
        assert draw.credit(routed)[:, 0].tolist() == expected
    coin = draw.coin_credit(routed_mask(np.zeros(0, dtype=int), len(said.pairs)), rng)
    assert (coin == 0.5).all(), "two right of four"


def test_the_best_of_a_pool_at_equal_calls_and_at_equal_cost() -> None:
    said, _ = pools(24)
    benchmark = BENCHMARKS["ppe-best-of-k"]
    verdicts = label_verdicts(said.pairs)
    draw = PoolDraw(benchmark, said, verdicts, 0)
    chosen = choose(said, verdicts, "margin", budgets=(0.5,))
    table = best_of_routing_table(draw, chosen, by="margin", replicates=50)
    assert table is not None
    first, half, last = figures(table)
    alone = best_of_table(benchmark, said, penalties=(0,), replicates=0)
    assert alone is not None
    assert float(first["routed"]) == pytest.approx(float(figures(alone)[-1]["λ = 0"])), "the last line: n is all"
    assert float(last["routed"]) == 1.0
    assert (half["pairs"], float(half["pairs_a_prompt"])) == ("48.0", 2.0)
    assert float(first["routed"]) < float(half["random"]) < 1
    assert float(half["difference"]) == pytest.approx(float(half["routed"]) - float(half["random"]))
    assert float(half["difference_low"]) <= float(half["difference"]) <= float(half["difference_high"])
    costs = CostModel(model_params=1e6, judge_params=1e7)
    row = figures(cost_table(draw, chosen, costs, "FLOP", mode="difference", by="margin"))[0]
    assert float(row["by margin"]) == float(half["routed"])
    assert float(row["random"]) == pytest.approx(float(half["random"]), abs=0.02), "pairs are of one length here"
    assert 0.5 < float(row["judge alone"]) < 1.0
    assert (
        best_of_routing_table(PoolDraw(JUDGEBENCH, answers(), label_verdicts(answers().pairs), 0), [], by="u") is None
    )
    few = Verdicts.of(said.pairs, np.ones(len(said.pairs)))
    few.asked[chosen[0].rows[0]] = False
    table = best_of_routing_table(PoolDraw(benchmark, said, few, 0), chosen, by="margin", replicates=0)
    assert table is not None
    assert [row["routing"] for row in figures(table)] == ["no judge"], "pairs that nobody was asked about"


def test_the_filter_at_equal_cost_by_hand() -> None:
    said = answers()
    verdicts = label_verdicts(said.pairs)
    verdicts.spent["prompt_tokens"], verdicts.spent["completion_tokens"] = np.full(120, 50.0), np.zeros(120)
    draw = Draw(JUDGEBENCH, said, verdicts, 0)
    costs = CostModel(model_params=1e6, judge_params=4e6)
    table = filter_cost_table(draw, "u", costs, "FLOP", mode="difference", keep=(0.75, 0.8))
    first, second, last = figures(table)
    reading, each = 2e6 * 12000, 2 * 4e6 * 50
    assert [row["kept"] for row in (first, second, last)] == ["75%", "80%", "100%"]
    assert float(first["cost"]) == pytest.approx(reading / 0.75)
    assert float(first["pairs"]) == int((reading / 0.75 - reading) / each) == 20
    assert (float(first["kept"][:-1]), float(first["prompts"])) == (75.0, 90.0)
    assert float(first["score_kept"]) == 1.0, "u finds every wrong one"
    assert float(first["routed by u"]) == pytest.approx(0.75 + 20 / 120)
    assert float(first["routed at random"]) == pytest.approx(0.75 + 0.25 * 20 / 120, abs=0.01)
    assert (float(last["pairs"]), float(last["routed by u"]), float(last["score_kept"])) == (0.0, 0.75, 0.75)
    assert "what is dropped has no answer" in table.to_markdown()


def test_equal_cost_by_hand() -> None:
    said = answers()
    verdicts = label_verdicts(said.pairs)
    verdicts.spent["prompt_tokens"] = np.where(np.arange(120) % 2, 1000.0, 100.0)
    verdicts.spent["completion_tokens"] = np.zeros(120)
    draw = Draw(JUDGEBENCH, said, verdicts, 0)
    chosen = choose(said, verdicts, "u", budgets=(0.0, 0.25))
    costs = CostModel(model_params=1e6, judge_params=1e7, judge_price=(10.0, 0.0), model_price=1.0)
    assert costs.units == ("FLOP", "USD")
    rows = figures(cost_table(draw, chosen, costs, "FLOP", mode="difference", by="u"))
    reading, judging = 2e6 * 12000, 2e7 * 30 * 100  # the 30 wrong pairs are all short
    assert [float(row["cost"]) for row in rows] == [reading, reading + judging]
    assert [float(row["by u"]) for row in rows] == [0.75, 1.0]
    assert float(rows[1]["in hindsight"]) == 1.0
    # 3,000 tokens buy few pairs of 550 in the mean, where as many calls would have been 30 pairs.
    assert 0.75 < float(rows[1]["random"]) < 0.75 + 0.25 * 15 / 120
    assert 0.5 < float(rows[1]["judge alone"]) < 0.65
    money = figures(cost_table(draw, chosen, costs, "USD", mode="difference", by="u"))
    assert float(money[1]["cost"]) == pytest.approx(12000 / 1e6 + 10 * 3000 / 1e6)
    text = cost_table(draw, chosen, costs, "USD", mode="difference", by="u").to_markdown()
    assert "Assumed: Prices in USD per million tokens: the judge 10 for prompts" in text
    assert "as it reported" in text
    with pytest.raises(InputError, match="neither parameters nor prices"):
        cost_table(draw, chosen, CostModel(), "FLOP", mode="difference", by="u")
    for wrong in ({"judge_params": -1.0}, {"judge_price": (math.nan, 1.0)}, {"judge_price": (1.0, math.inf)}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))}: got"):
            CostModel(model_params=1.0, **wrong)  # type: ignore[arg-type]


def test_tokens_that_nobody_reported_are_estimated_and_that_is_said() -> None:
    said = answers(8)
    costs = CostModel(model_params=1.0, judge_params=1.0, answer_tokens=7)
    verdicts = label_verdicts(said.pairs)
    prompt, completion, estimated = judge_tokens(said, verdicts, costs)
    assert estimated == 8
    assert (completion == 14).all()
    assert prompt[1] - prompt[0] == pytest.approx(2 * 360 * 5 / 3, rel=0.02)
    draw = Draw(JUDGEBENCH, said, verdicts, 0)
    text = cost_table(draw, choose(said, verdicts, "u", budgets=(0.5,)), costs, "FLOP", mode="concat", by="u")
    assert "for 8 of 8 pairs estimated from the characters, 7 tokens an answer, 2 orders" in text.to_markdown()


def test_every_form_holds_the_same_figures(tmp_path: Path) -> None:
    table = Table(
        "t",
        "T_1",
        (Column("a", "a|b", "text"), Column("x", "x, %", "percent"), Column("d", "d", "points")),
        (("one", 0.5, Cell(0.1, 0.05, 0.2)), ("two & 3", math.nan, Cell(0.0))),
        ("A note",),
        (Curve("u", (0.0, 1.0), (0.5, 1.0)), Curve("random", (0.0, 1.0), (0.5, 1.0))),
        ("share, %", "score"),
    )
    assert table.to_markdown().splitlines()[2:6] == [
        "| a\\|b | x, % | d |",
        "|---|---:|---:|",
        "| one | 50.0 | +10.0 [+5.0, +20.0] |",
        "| two & 3 | - | +0.0 |",
    ]
    assert table.to_csv().splitlines() == ["a,x,d,d_low,d_high", "one,0.5,0.1,0.05,0.2", "two & 3,,0.0,,"]
    assert r"two \& 3 & - & +0.0 \\" in table.to_latex()
    assert table.to_latex().startswith("% T\\_1\n% A note\n\\begin{tabular}{lrr}\n\\toprule\n")
    content = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert content["rows"][0]["d"] == {"value": 0.1, "low": 0.05, "high": 0.2}
    assert content["rows"][1]["x"] is None
    plot_table(table, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
