"""What an engine is given that is not as it should be: rows that are not finite, wrong nesting, wrong sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.by_hand import table_engine

from rmcore import RewardEngine
from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine.routing import AlwaysRoute, NeverRoute, ThresholdRouter
from rmcore.judge.base import Verdict

# -- non-finite rows -------------------------------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_non_finite_rows_raise_by_name(hand_head, mode, bad):
    hidden = torch.zeros(6, 2)
    hidden[4, 1] = bad
    with pytest.raises(NonFiniteError, match=r"\(4\)") as caught:
        RewardEngine(hand_head([1.0, 1.0], mode)).score_hidden(hidden, [3] if mode == "concat" else [3, 3])
    assert caught.value.rows == (4,)


@pytest.mark.parametrize("bad", [*BAD, 3e38])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_non_finite_rows_are_routed(hand_head, scripted_judge, bad, row):
    """Only the bad row's own pairs go to the judge; the other pairs are as if it were not there."""
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.5], [2.0, 0.0]])
    clean = RewardEngine(hand_head([1.0, 0.0])).score_hidden(rows, [3])[0]
    rows[row] = bad  # 3e38 is finite and overflows in the head
    judge = scripted_judge(lambda _: Verdict.of("win"))
    engine = RewardEngine(hand_head([1.0, 0.0]), judge, ThresholdRouter(1e9), nonfinite="route")
    group = engine.score_hidden(rows, [3], prompts=["p"], responses=[["a", "b", "c"]])[0]
    other = [k for k in range(3) if k != row]
    assert set(judge.asked) == {("abc"[min(k, row)], "abc"[max(k, row)]) for k in other}
    i, j = other
    assert group.preference[i, j] == clean.preference[i, j]
    assert group.routed.sum() == 4
    assert group.preference.isfinite().all()
    assert group.uncertainty[row, i] == math.inf
    assert {d.by for d in group.decisions} == {"judge"}
    json.dumps(group.to_record(), allow_nan=False)


def test_non_finite_rows_of_concat_mode_are_routed(hand_head, scripted_judge):
    hidden = torch.tensor([[1.0], [2.0], [3.0], [float("nan")], [5.0], [6.0]])  # (0,1) (0,2) (1,0) (1,2) (2,0) (2,1)
    judge = scripted_judge(lambda _: Verdict.of("loss"))
    engine = RewardEngine(hand_head([1.0], "concat"), judge, NeverRoute(), nonfinite="route")
    group = engine.score_hidden(hidden, [3], prompts=["p"], responses=[["a", "b", "c"]])[0]
    assert judge.asked == [("b", "c")]
    assert group.preference[1, 2] < 0
    assert group.preference.isfinite().all()


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_a_judge_that_fails_on_a_non_finite_pair(hand_head, scripted_judge, mode):
    """No preference from anybody: the pair is left out, its members' other pairs count, and nobody gets a zero."""
    judge = scripted_judge(lambda _: Verdict.none("timeout"))
    engine = RewardEngine(hand_head([1.0, 0.0], mode), judge, ThresholdRouter(1e9), nonfinite="route")
    nan = float("nan")
    if mode == "difference":
        hidden = torch.tensor([[1.0, 0.0], [nan, 0.0], [2.0, 0.0], [4.0, 0.0], [nan, nan], [0.0, 0.0]])
        sizes, texts = [4, 2], [["a", "b", "c", "d"], ["e", "f"]]
    else:  # every pair with b, and the only pair of the second group
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        value = [1.0, nan, 2.0, 4.0]
        hidden = torch.tensor([[value[i] - value[j], 0.0] for i, j in pairs] + [[nan, 0.0]] * 2)
        sizes, texts = [4, 2], [["a", "b", "c", "d"], ["e", "f"]]
    scores = engine.score_hidden(hidden, sizes, prompts=["p", "q"], responses=texts)
    group = scores[0]
    assert group.preference[1, [0, 2, 3]].isnan().all()
    clean = RewardEngine(hand_head([1.0, 0.0])).score_hidden(torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]]), [3])[0]
    torch.testing.assert_close(group.advantages[[0, 2, 3]], clean.advantages)
    torch.testing.assert_close(group.rewards[[0, 2, 3]], clean.rewards)
    torch.testing.assert_close(group.rewards_for("group-mean")[[0, 2, 3]], clean.rewards_for("group-mean"))
    records = json.loads(json.dumps(scores.to_records(), allow_nan=False))
    assert records[0]["advantages"][1] is records[0]["rewards"][1] is None
    assert records[1]["advantages"] == records[1]["rewards"] == [None, None]
    assert records[0]["uncertainty"][0][1] is None
    summary = scores.summary()
    json.dumps(summary, allow_nan=False)
    assert summary["unscorable_responses"] == 3
    assert summary["decided_by"] == {"head": 3, "judge": 0, "judge_failed": 4, "identical": 0, "nobody": 0}
    assert summary["judge_failures"] == {"timeout": 4}


def test_a_row_that_is_not_finite_twice_but_says_the_same(hand_head, scripted_judge):
    judge = scripted_judge(lambda _: Verdict.none("timeout"))
    engine = RewardEngine(hand_head([1.0, 0.0]), judge, ThresholdRouter(1e9), nonfinite="route")
    hidden = torch.full((2, 2), float("nan"))
    group = engine.score_hidden(hidden, [2], prompts=["p"], responses=[["same", "same"]])[0]
    assert not judge.calls
    assert group.advantages.tolist() == [0, 0]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "responses", "named"),
    [
        ([], [], "prompts: got an empty list"),
        ("p", [["a"]], "prompts"),
        (None, [["a"]], "prompts"),
        (["p"], "a", "responses"),
        (["p"], None, "responses"),
        (["p"], ["a b"], r"responses\[0\]: got str"),
        (["p"], [[]], r"responses\[0\]: got an empty list"),
        (["p"], [None], r"responses\[0\]"),
        (["p"], [["a", 3]], r"responses\[0\]\[1\]: got int"),
        (["p"], [["a", ["b"]]], r"responses\[0\]\[1\]\[0\]: got str"),
        (["p", "q"], [["a"], ["b", None]], r"responses\[1\]\[1\]"),
        (["p", "q"], [["a"]], "responses: got 1 groups, expected 2"),
        (["p"], [["a"], ["b"]], "responses: got 2 groups, expected 1"),
        ([3], [["a"]], r"prompts\[0\]"),
        (["p", []], [["a"], ["b"]], r"prompts\[1\]"),
        ([{"role": "user", "content": "one conversation, not a list of them"}], [["a"]], r"prompts\[0\]"),
        ([[{"role": "user"}]], [["a"]], r"prompts\[0\]\[0\]"),
    ],
)
def test_wrong_nesting(hand_head, table_model, prompts, responses, named):
    engine = table_engine(hand_head, table_model)
    with pytest.raises(InputError, match=named):
        engine.score(prompts, responses)
    with pytest.raises(InputError):
        engine.score_hidden(torch.zeros(1, 2), [1], prompts=prompts, responses=responses)


@pytest.mark.parametrize(
    "sizes", [[], [0], [2, 0], [-1, 3], [1.0, 1.0], ["2"], [True, True], 2, None, torch.tensor([1.0]), torch.tensor(2)]
)
def test_bad_group_sizes(hand_head, sizes):
    with pytest.raises(InputError, match="group_sizes"):
        RewardEngine(hand_head([1.0, 1.0])).score_hidden(torch.zeros(2, 2), sizes)


@pytest.mark.parametrize(
    ("mode", "orders", "hidden", "named"),
    [
        ("difference", "both", torch.zeros(4, 2), "4 rows, expected 5, one a response"),
        ("difference", "both", torch.zeros(6, 2), "6 rows"),
        ("concat", "both", torch.zeros(5, 2), "5 rows, expected 8, one a ordered pair"),
        ("concat", "one", torch.zeros(8, 2), "8 rows, expected 4"),
        ("difference", "both", torch.zeros(5, 3), r"shape \(5, 3\), expected \(rows, 2\)"),
        ("difference", "both", torch.zeros(5), "shape"),
        ("difference", "both", torch.zeros(1, 5, 2), "shape"),
        ("difference", "both", [[0.0, 0.0]] * 5, "hidden: got list"),
        ("difference", "both", torch.zeros(5, 2, dtype=torch.long), "floating"),
    ],
)
def test_bad_hidden_states(hand_head, mode, orders, hidden, named):
    with pytest.raises(InputError, match=named):
        RewardEngine(hand_head([1.0, 1.0], mode), orders=orders).score_hidden(hidden, [3, 2])


def test_texts_of_hidden_states(hand_head, scripted_judge):
    judge = scripted_judge(lambda _: Verdict.of("win"))
    engine = RewardEngine(hand_head([1.0, 1.0]), judge, AlwaysRoute())
    hidden = torch.zeros(2, 2)
    with pytest.raises(InputError, match="texts, since AlwaysRoute"):
        engine.score_hidden(hidden, [2])
    for kwargs in ({"prompts": ["p"]}, {"responses": [["a", "b"]]}):
        with pytest.raises(InputError, match="both or neither"):
            engine.score_hidden(hidden, [2], **kwargs)
    with pytest.raises(InputError, match=r"group sizes \[1, 1\]"):
        engine.score_hidden(hidden, [2], prompts=["p", "q"], responses=[["a"], ["b"]])
    # NeverRoute needs none, until a non-finite row needs the judge.
    never = RewardEngine(hand_head([1.0, 1.0]), judge, NeverRoute(), nonfinite="route")
    assert never.score_hidden(hidden, [2])[0].size == 2
    with pytest.raises(InputError, match="1 pairs need the judge"):
        never.score_hidden(hidden * float("nan"), [2])
    assert not judge.calls


def test_a_head_alone_scores_no_texts(hand_head):
    with pytest.raises(InputError, match="score_hidden"):
        RewardEngine(hand_head([1.0])).score(["p"], [["a"]])


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"router": ThresholdRouter(1.5)}, "judge: got None.*ThresholdRouter"),
        ({"router": AlwaysRoute()}, "AlwaysRoute"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": 0.5}, "epsilon"),
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"nonfinite": "ignore"}, "nonfinite"),
        ({"nonfinite": "route"}, "no judge"),
        ({"orders": "three"}, "orders"),
        ({"judge": "gpt"}, "judge: got str"),
    ],
)
def test_bad_settings(hand_head, kwargs, named):
    with pytest.raises(InputError, match=named):
        RewardEngine(hand_head([1.0]), **kwargs)


def test_a_model_that_is_none():
    with pytest.raises(InputError, match="model: got str"):
        RewardEngine("my-model")
