"""A group that cannot be scored changes nothing for the others: with ``on_error="return"`` it might not be there."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from rmcore import AdaptiveRouter, BudgetRouter, RewardEngine
from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine.learning.judged import judged_pairs
from rmcore.engine.routing import AlwaysRoute, Budget, NeverRoute, ThresholdRouter
from rmcore.judge.base import JudgeUsage, Verdict

GROUPS, SIZE = 20, 4
LONG = "9 9 " * 30
BAD = {
    "over-long": ("p", ["1 0", LONG, "3 0", "4 0"], InputError, r"^prompt and response: got \d+ words"),
    "no response": ("p", [], InputError, "^responses: got an empty list"),
    "no list": ("p", "1 0", InputError, "^responses: got str"),
    "no text": ("p", ["1 0", None, "2 0", "3 0"], InputError, r"^responses\[1\]: got NoneType"),
    "no prompt": ([], ["1 0", "2 0", "3 0", "4 0"], InputError, "^prompt: got an empty list"),
    "tokenizer fails": ("p", ["1 0", "crash", "2 0", "3 0"], ZeroDivisionError, "^$"),
    "not finite": ("p", ["1 0", "2 0", "nan 0", "3 0"], NonFiniteError, r"1 of 4 rows \(2\)"),
    "overflows": ("p", ["1 0", "2 0", "3e38 3e38", "3 0"], NonFiniteError, "overflow"),
    "alone and not finite": ("p", ["inf 0"], NonFiniteError, r"1 of 1 rows \(0\)"),
}
ROUTERS = {
    "never": NeverRoute,
    "fraction": lambda: BudgetRouter(0.1),
    "threshold, by micro-batches": lambda: ThresholdRouter(10.0),
    "budget a step, by micro-batches": lambda: AdaptiveRouter(1.0, budget=Budget(12, "pairs", per="step")),
}


@pytest.fixture
def make_engine(hand_head, table_model, scripted_judge):
    """An engine and its judge; texts are hidden states, and what cannot be encoded raises."""

    def make(router, *, learner=None, mode="difference", **options):
        head = hand_head([1.0, -0.5], mode)

        def row(_prompt, first, second="0 0"):
            a, b = ([float(x) for x in text.split()[:2]] for text in (first, second))
            return [x - y for x, y in zip(a, b, strict=True)]

        model = table_model(head, row)
        encode = model.encode_group

        def checked(prompt, responses, **options):
            for text in responses:
                if text == "crash":
                    raise ZeroDivisionError
                if len(text.split()) > 8:
                    raise InputError(f"prompt and response: got {len(text.split())} words, expected at most 8")
            return encode(prompt, responses, **options)

        model.encode_group = checked
        usage = JudgeUsage(calls=1, attempts=1)
        judge = scripted_judge(lambda pair: Verdict.of("win" if len(pair.first) % 2 else "tie", usage=usage))
        judge = None if isinstance(router, NeverRoute) else judge
        return RewardEngine(model, judge, router, micro_batch_tokens=16, **options), judge

    return make


def batch(bad=None, at=7):
    prompts = [f"p{k}" for k in range(GROUPS)]
    responses = [[f"{k % 7 * i + i * i} {i + k}" for i in range(SIZE)] for k in range(GROUPS)]
    if bad is not None:
        prompts.insert(at, bad[0])
        responses.insert(at, bad[1])
    return prompts, responses


def same(one, two) -> None:
    """Bit for bit, and the same questions by the same names."""
    assert len(one) == len(two) == GROUPS
    assert torch.equal(one.rewards, two.rewards)
    assert torch.equal(one.advantages, two.advantages)
    assert one.to_records() == two.to_records()
    assert [group.decisions for group in one] == [group.decisions for group in two]
    assert one.judge_usage.calls == two.judge_usage.calls


@pytest.fixture(scope="module")
def clean_runs():
    """(router, mode) → the engine, the judge and the scores of three steps without a bad group; made once."""
    return {}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_its_neighbours_are_scored_routed_and_judged_as_if_it_were_not_there(
    make_engine, clean_runs, kind, router, mode
):
    if mode == "concat" and kind == "alone and not finite":
        pytest.skip("no pair, no hidden row")
    *bad, error, says = BAD[kind]
    if (router, mode) not in clean_runs:
        engine, judge = make_engine(ROUTERS[router](), mode=mode)
        clean_runs[router, mode] = engine, judge, [engine.score(*batch()) for _ in range(3)]
    engine, judge, steps = clean_runs[router, mode]
    other, other_judge = make_engine(ROUTERS[router](), mode=mode)
    # What is found after the backbone had its place in the cut into micro-batches: a budget meets other pairs first.
    moved = issubclass(error, NonFiniteError) and router == "budget a step, by micro-batches"
    # Three steps of one router, the bad group first, in the middle, last.
    for at, clean in zip((0, 7, GROUPS), steps, strict=True):
        spoilt = other.score(*batch(bad, at), on_error="return")
        assert list(spoilt.errors) == [at]
        assert type(spoilt.errors[at]) is error
        if mode == "difference":
            with pytest.raises(error, match=says):
                raise spoilt.errors[at]
        assert torch.equal(spoilt.table.values[:3], clean.table.values[:3])
        for name in ("groups", "pairs", "routed", "decided_by"):
            assert spoilt.summary()[name] == clean.summary()[name]
        if not moved:
            same(clean, spoilt)
        assert spoilt.summary()["failed_groups"] == 1
        outcomes = spoilt.outcomes()
        assert outcomes.pop(at) is spoilt.errors[at]
        assert tuple(outcomes) == spoilt.groups
    if router == "fraction":
        assert clean.summary()["routed"] == 12
    if judge is not None and not moved:
        questions = [[pair for call in j.calls for pair in call] for j in (judge, other_judge)]
        names = [sorted((p.id, p.prompt, p.first, p.second, p.uncertainty) for p in asked) for asked in questions]
        assert names[0] == names[1]
        assert names[0]
    if hasattr(engine.router, "budgets"):
        stats = [e.router.budgets[0].stats() for e in (engine, other)]
        assert moved or stats[0] == stats[1]
        assert stats[0].total == stats[1].total == 36  # twelve a step, no step refilled


def test_by_default_it_ends_the_call_before_anything_is_asked_or_a_step_begins(make_engine):
    engine, judge = make_engine(AdaptiveRouter(1.0, budget=Budget(12, "pairs", per="step")))
    engine.score(*batch())
    calls, history = len(judge.calls), len(engine.router.history)
    for kind in ("over-long", "no text", "no prompt"):
        with pytest.raises(InputError):
            engine.score(*batch(BAD[kind]))
    assert (len(judge.calls), len(engine.router.history)) == (calls, history)


def test_all_of_them_bad_is_no_error_and_no_step(make_engine):
    engine, judge = make_engine(AdaptiveRouter(1.0, budget=Budget(12, "pairs", per="step")))
    scores = engine.score(["p", "q"], [[LONG], []], on_error="return")
    assert len(scores) == len(scores.rewards) == len(scores.advantages) == 0
    assert scores.outcomes() == [scores.errors[0], scores.errors[1]]
    assert scores.summary()["failed_groups"] == 2
    assert not judge.calls
    nothing = engine.score(["p"], [["nan 0", "1 0"]], on_error="return")
    assert isinstance(nothing.errors[0], NonFiniteError)
    assert len(nothing.rewards) == 0


def test_several_of_several_kinds_in_the_async_call_too(make_engine):
    prompts, responses = batch()
    for at, kind in ((2, "not finite"), (5, "no text"), (9, "overflows"), (9, "over-long")):
        prompts.insert(at, BAD[kind][0])
        responses.insert(at, BAD[kind][1])
    engine, _ = make_engine(BudgetRouter(0.1))
    spoilt = asyncio.run(engine.score_async(prompts, responses, on_error="return"))
    assert {k: type(error) for k, error in spoilt.errors.items()} == {
        2: NonFiniteError, 5: InputError, 9: InputError, 10: NonFiniteError
    }  # fmt: skip
    same(make_engine(BudgetRouter(0.1))[0].score(*batch()), spoilt)


@pytest.mark.parametrize("texts", [True, False])
def test_hidden_rows(hand_head, scripted_judge, texts):
    rows = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    bad = torch.cat((rows[:2], torch.tensor([[math.nan, 0.0], [1.0, 1.0]]), rows[2:5], rows[:1], rows[5:]))
    judge = scripted_judge(lambda _: Verdict.of("win")) if texts else None
    engine = RewardEngine(hand_head([1.0, 2.0]), judge, BudgetRouter(0.5) if texts else None)
    given = {"prompts": list("pqrst"), "responses": [["a", "b"], ["c", "d"], ["e", "f", "g"], [3], ["h"]]}
    given = given if texts else {}
    scores = engine.score_hidden(bad, [2, 2, 3, 1, 1], on_error="return", **given)
    assert list(scores.errors) == ([1, 3] if texts else [1])
    left = [0, 2, 4] if texts else [0, 2, 3, 4]
    good = {name: [values[k] for k in left] for name, values in given.items()}
    hidden = rows if texts else torch.cat((bad[:2], bad[4:]))
    clean = engine.score_hidden(hidden, [2, 3, 1] if texts else [2, 3, 1, 1], **good)
    assert torch.equal(scores.rewards, clean.rewards)
    assert scores.to_records() == clean.to_records()


def test_what_is_wrong_with_the_whole_call_is_raised(hand_head):
    engine = RewardEngine(hand_head([1.0, 2.0]))
    with pytest.raises(InputError, match="on_error: got 'ignore'"):
        engine.score_hidden(torch.zeros(2, 2), [2], on_error="ignore")
    with pytest.raises(InputError, match="responses: got 2 groups, expected 1"):
        engine.score_hidden(torch.zeros(2, 2), [2], prompts=["p"] * 2, responses=[["a"]] * 2, on_error="return")
    with pytest.raises(InputError, match=r"group sizes \[1\]"):
        engine.score_hidden(torch.zeros(2, 2), [2], prompts=["p"], responses=[["a"]], on_error="return")


def test_the_rows_kept_for_a_learner_are_those_of_the_groups_scored(make_engine):
    engine, _ = make_engine(AlwaysRoute())
    engine.learner = object()  # all that the engine asks of one here is whether it is there
    scores = engine.score(*batch(BAD["not finite"][:2]), on_error="return")
    assert torch.equal(scores.hidden, engine.score(*batch()).hidden)
    assert len(judged_pairs(scores, "difference")) == GROUPS * 6
