"""Judge calls while the backbone runs: what starts when, what a cancellation leaves behind, what a budget is told.

Time does not pass in these tests: what must come first is waited for by events, and clocks are turned by hand.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest
import torch
from support.overlap import (
    PATIENCE,
    PROMPTS,
    RESPONSES,
    SCORE,
    TEXTS,
    WIN,
    Backbone,
    Gated,
    HandClock,
    engine_threads,
    wait,
)

from rmcore import BudgetRouter, RewardEngine, RewardModel
from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine.micro_batches import micro_batches
from rmcore.engine.routing import AdaptiveRouter, AlwaysRoute, Budget, NeverRoute, ThresholdRouter
from rmcore.judge import run_sync
from rmcore.judge.base import Pair, Verdict

# -- overlap ---------------------------------------------------------------------------------------------------------


@SCORE
def test_the_judge_is_asked_before_the_last_micro_batch_is_encoded(make_engine, score):
    judge = Gated()

    def before(n: int) -> None:
        if n == 2:  # the second micro-batch begins only when the judge has been asked about the first
            wait(judge.came)
        if n == len(TEXTS) - 1:
            judge.let_go.set()

    table = Backbone(before)
    scores = score(make_engine(judge, table=table), PROMPTS, RESPONSES)
    assert [pair.id for pair in judge.calls[0]] == ["0:0:1"]
    assert table.encoded == TEXTS
    summary = scores.summary()
    assert summary["decided_by"]["judge"] == summary["pairs"] == 6
    assert summary["overlap"]["micro_batches"] == 6
    assert summary["overlap"]["why_not"] == ""
    assert summary["overlap"]["hidden_s"] > 0


@SCORE
def test_the_result_does_not_depend_on_the_judges_timing(make_backbone, preferences, score):
    """Bit for bit: a judge that answers at once, one that answers last call first, and micro-batches scored alone."""
    model, _ = RewardModel.fit(make_backbone("qwen3", pooling="mean"), preferences, num_features=32)
    prompts = [f"tell me about the {noun}" for noun in ("dog", "fox", "model", "capital", "home")]
    responses = [
        [f"a good {p.split()[-1]}", "a bad one", "the lazy brown fox", "Paris"][: 2 + k % 3]
        for k, p in enumerate(prompts)
    ]

    class Reversed:
        """Calls end in the opposite order to that in which they came."""

        def __init__(self, expected: int) -> None:
            self.expected, self.open = expected, 0
            self.order: list[int] = []

        async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
            number, self.open = self.open, self.open + 1
            while self.open < self.expected or len(self.order) < self.expected - 1 - number:
                await asyncio.sleep(0.001)
            self.order.append(number)
            return answers(pairs)

    class AtOnce:
        async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
            return answers(pairs)

    def answers(pairs: Sequence[Pair]) -> list[Verdict]:
        return [Verdict((len(p.first) - len(p.second)) / 40) for p in pairs]

    def make(judge, **kwargs) -> RewardEngine:
        return RewardEngine(model, judge, ThresholdRouter(1.0), **{"micro_batch_tokens": 30, **kwargs})

    plain = score(make(AtOnce()), prompts, responses)
    parts = plain.overlap.micro_batches
    assert parts > 2
    late = Reversed(parts)
    assert score(make(late), prompts, responses).to_records() == plain.to_records()
    assert late.order == list(reversed(range(parts)))
    # Without overlap: each micro-batch in a call of its own.
    encoded = model.encode_groups(prompts, responses)
    alone = []
    for part in micro_batches([len(r) for r in responses], encoded, 30):
        groups = slice(part.first, part.stop)
        engine = make(AtOnce(), micro_batch_tokens=10**9)
        alone += score(engine, prompts[groups], responses[groups]).to_records()
    assert alone == plain.to_records()


def test_a_router_of_the_whole_batch_sees_it_whole(make_engine, scripted_judge):
    judge = scripted_judge(lambda _: WIN)
    scores = make_engine(judge, BudgetRouter(count=2)).score(PROMPTS, RESPONSES)
    assert len(judge.calls) == 1
    assert [pair.id for pair in judge.calls[0]] == ["0:0:1", "1:0:1"]
    assert scores.summary()["overlap"] == {
        "micro_batches": 1,
        "judge_s": scores.overlap.judge_s,
        "hidden_s": 0.0,
        "fraction": 0.0,
        "why_not": "BudgetRouter chooses from the whole batch",
    }


def test_a_router_that_does_not_say_is_given_the_whole_batch(make_engine, scripted_judge):
    seen = []

    class Silent:
        def select(self, candidates):
            seen.append(len(candidates))
            return torch.ones(len(candidates), dtype=torch.bool)

    make_engine(scripted_judge(lambda _: WIN), Silent()).score(PROMPTS, RESPONSES)
    assert seen == [6]


def test_equal_questions_of_different_micro_batches_are_asked_once(make_engine, scripted_judge):
    judge = scripted_judge(lambda _: WIN)
    scores = make_engine(judge).score(["p"] * 3 + ["q"], [["1 0", "2 0"]] * 4)
    assert [pair.id for call in judge.calls for pair in call] == ["0:0:1", "3:0:1"]
    summary = scores.summary()
    assert summary["overlap"]["micro_batches"] == 4
    assert summary["decided_by"]["judge"] == 4
    assert summary["judge_usage"]["calls"] == 2
    assert summary["judges"]["(unnamed)"]["questions"] == 2


def test_pairs_carry_what_stands_between_needs(make_engine, scripted_judge):
    judge = scripted_judge(lambda _: WIN)
    clock = HandClock()
    engine = make_engine(judge, judge_deadline_s=30.0, clock=clock)
    scores = engine.score(["p", "q"], [["1 0", "4 0"], ["2 0", "2 1"]])
    first, second = (pair for call in judge.calls for pair in call)
    assert first.uncertainty == scores[0].uncertainty[0, 1] == math.sqrt(1 + 3 * 9)
    assert first.preference == pytest.approx(-3 / math.sqrt(28))
    assert second.preference == 0
    assert first.deadline == second.deadline == 130.0


def test_a_pair_the_head_cannot_score_has_no_preference(hand_head, scripted_judge):
    judge = scripted_judge(lambda _: WIN)
    engine = RewardEngine(hand_head([1.0]), judge, ThresholdRouter(1e9), nonfinite="route")
    engine.score_hidden(torch.tensor([[1.0], [math.nan]]), [2], prompts=["p"], responses=[["a", "b"]])
    (pair,) = judge.calls[0]
    assert pair.preference is None
    assert pair.uncertainty == math.inf
    assert pair.deadline is None


def test_progress_counts_over_all_micro_batches(make_engine, scripted_judge):
    seen: list[tuple[str, int, int]] = []
    make_engine(scripted_judge(lambda _: WIN)).score(PROMPTS, RESPONSES, progress=lambda *a: seen.append(a))
    encoding = [(done, total) for stage, done, total in seen if stage == "encoding"]
    judging = [(done, total) for stage, done, total in seen if stage == "judging"]
    assert encoding == [(4 * k, 24) for k in range(1, 7)]
    assert [done for done, _ in judging] == [1, 2, 3, 4, 5, 6]
    assert judging[-1] == (6, 6)


# -- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "tokens", "expected"),
    [
        ([10] * 8, 20, [2, 2, 2, 2]),
        ([10] * 8, 1e9, [8]),
        ([10] * 8, math.inf, [8]),
        ([10] * 8, 1, [1] * 8),
        ([10] * 7, 20, [2, 2, 2, 1]),
        ([10] * 9, 40, [3, 3, 3]),  # not 4, 4, 1
        ([100, 1, 1, 1], 20, [1, 3]),  # a group larger than a micro-batch is not cut, and leaves no crumbs
        ([1, 1, 100, 1, 1], 20, [3, 2]),
        ([0, 0, 0], 20, [3]),
        ([5, 0, 0], 20, [3]),
        ([5], 20, [1]),
    ],
)
def test_micro_batches_are_even_and_keep_the_order(counts, tokens, expected):
    encoded = [["x" * count] if count else [] for count in counts]
    parts = micro_batches([2] * len(counts), encoded, tokens)
    assert [len(part.sizes) for part in parts] == expected
    assert [part.first for part in parts] == [sum(expected[:k]) for k in range(len(expected))]
    for part in parts:
        assert part.tokens == sum(counts[part.first : part.stop])
        assert part.tokens_before == sum(counts[: part.first])
        assert part.first_row == sum(len(group) for group in encoded[: part.first])


@pytest.mark.parametrize(("tokens_per_batch", "parts"), [(1, 12), (2, 9), (4, 5), (18, 1), (100, 1)])
def test_micro_batches_by_default(make_engine, scripted_judge, tokens_per_batch, parts):
    """72 tokens: a twelfth of them, but at least four forward passes."""
    engine = make_engine(scripted_judge(lambda _: WIN), micro_batch_tokens=None)
    engine.model.backbone.tokens_per_batch = tokens_per_batch
    assert engine.score(PROMPTS * 3, RESPONSES * 3).overlap.micro_batches == parts


@pytest.mark.parametrize("tokens", [0, -5])
def test_bad_micro_batches(make_engine, tokens):
    with pytest.raises(InputError, match="micro_batch_tokens"):
        make_engine(Gated(), micro_batch_tokens=tokens)


# -- errors of the backbone ------------------------------------------------------------------------------------------


@SCORE
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), StopIteration("odd")])
def test_an_error_of_the_backbone_cancels_the_judge(make_engine, score, error):
    judge = Gated()

    def before(n: int) -> None:
        if n == 6:
            wait(judge.came)
            raise error

    # A future cannot carry a StopIteration; it arrives as a RuntimeError that names it.
    with pytest.raises((type(error), RuntimeError), match=str(error)):
        score(make_engine(judge, table=Backbone(before)), PROMPTS, RESPONSES)
    assert judge.ended.is_set()
    assert judge.cancelled == len(judge.calls) > 0


def test_rows_are_counted_over_the_whole_call(make_engine, scripted_judge):
    responses = [*RESPONSES[:4], ["1 0", "nan 0"]]
    with pytest.raises(NonFiniteError) as caught:
        make_engine(scripted_judge(lambda _: WIN)).score(PROMPTS[:5], responses)
    assert caught.value.rows == (9,)
    assert "groups 4 to 4" in str(caught.value)


def test_bad_texts_are_found_before_anything_is_bought(make_backbone, preferences, scripted_judge):
    backbone = make_backbone("bert", pooling="mean", max_length=40)
    model, _ = RewardModel.fit(backbone, preferences, num_features=16)
    judge = scripted_judge(lambda _: WIN)
    engine = RewardEngine(model, judge, AlwaysRoute(), micro_batch_tokens=1)
    with pytest.raises(InputError, match="group 2"):
        engine.score(["a", "b", "c"], [["good", "bad"], ["good", "bad"], ["good " * 50, "bad"]])
    assert not judge.calls


def test_what_progress_raises_gets_out(make_engine):
    judge = Gated()
    judge.let_go.set()

    def stop(stage: str, _done: int, _total: int) -> None:
        if stage == "judging":
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        make_engine(judge).score(PROMPTS, RESPONSES, progress=stop)
    with pytest.raises(LookupError, match="enough"):
        asyncio.run(make_engine(judge).score_async(PROMPTS, RESPONSES, progress=stop))


# -- loops and threads -----------------------------------------------------------------------------------------------


def test_no_loop_is_started_where_nobody_is_asked(make_engine, monkeypatch):
    monkeypatch.setattr("rmcore.engine.running.background_loop", lambda: pytest.fail("no judge, no loop"))
    assert len(make_engine(None, NeverRoute()).score(PROMPTS, RESPONSES)) == 6
    assert len(make_engine(Gated(), NeverRoute()).score(PROMPTS, RESPONSES)) == 6


def test_a_sync_call_inside_the_background_loop_says_so(make_engine, scripted_judge):
    engine = make_engine(scripted_judge(lambda _: WIN))

    async def inside():
        return engine.score(PROMPTS, RESPONSES)

    with pytest.raises(RuntimeError, match="await"):
        run_sync(inside())


def test_many_calls_at_once_keep_their_own_counts(make_backbone, preferences, scripted_judge):
    model, _ = RewardModel.fit(make_backbone("bert", pooling="mean"), preferences, num_features=16)
    engine = RewardEngine(model, scripted_judge(lambda _: WIN), AlwaysRoute(), micro_batch_tokens=20)
    batches = [([f"p{k}"] * k, [["good", "bad", "fox"]] * k) for k in range(1, 6)]

    async def many():
        return await asyncio.gather(*(engine.score_async(*batch) for batch in batches))

    alone = [engine.score(*batch) for batch in batches]
    for one, other in zip(asyncio.run(asyncio.wait_for(many(), PATIENCE)), alone, strict=True):
        assert one.encoding == other.encoding
        assert one.encoding.texts == 3 * len(one)
        assert one.to_records() == other.to_records()


def test_the_callers_context_reaches_the_backbone(make_engine):
    """Context variables, such as those of a tracing library, in the thread that encodes."""
    import contextvars

    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="none")
    seen = []
    engine = make_engine(None, NeverRoute(), Backbone(lambda _: seen.append(name.get())))

    async def run() -> None:
        name.set("caller")
        await engine.score_async(PROMPTS, RESPONSES)

    asyncio.run(run())
    assert set(seen) == {"caller"}
    assert not engine_threads()


def test_an_adaptive_router_keeps_its_budget_over_micro_batches(make_engine, scripted_judge):

    calls = Budget(3, "calls", max_per_pair=1)
    engine = make_engine(scripted_judge(lambda _: WIN), AdaptiveRouter(1.0, calls))
    scores = engine.score(PROMPTS, RESPONSES)
    assert scores.overlap.micro_batches == 6
    assert scores.judge_usage.calls == 3
    assert calls.stats().left == 0
    assert engine.score(PROMPTS, RESPONSES).judge_usage.calls == 0, "a budget per run is used up"


def test_the_bench_runs(tmp_path):
    """On a handful of groups and without latency; its claim is about real sizes and is not made here."""
    import json

    from rmcore.bench import overlap

    options = ["--groups", "6", "--latency", "0", "--hidden-size", "32", "--layers", "1", "--rounds", "1"]
    overlap.main([*options, "--others", "1000", "--tokens-per-batch", "256", "--sweep", "1", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "overlap.json").read_text())
    assert figures["pairs"] == 36
    assert figures["judge_calls"] == 2 * figures["judged"] > 0
    assert figures["last_overlapped_call"]["micro_batches"] > 1
    assert figures["micro_batch_sizes"][0]["hidden_s"] >= 0


def test_the_interpreters_turns_are_short_inside_and_as_before_outside():
    import sys

    from rmcore.engine.overlap import short_turns

    before = sys.getswitchinterval()
    with short_turns():
        with short_turns():
            assert sys.getswitchinterval() == pytest.approx(0.0005)
        assert sys.getswitchinterval() == pytest.approx(0.0005), "somebody is still inside"
    assert sys.getswitchinterval() == before


class Pupil:
    """Routes every second pair, and keeps what it is told."""

    whole_batch = False

    def __init__(self, error: Exception | None = None) -> None:
        self.offered: list[tuple[object, torch.Tensor]] = []
        self.observed: list[tuple[object, torch.Tensor, torch.Tensor]] = []
        self.error = error

    def select(self, candidates):
        routed = torch.arange(len(candidates)) % 2 == 0
        self.offered.append((candidates, routed))
        return routed

    def observe(self, candidates, routed, preference) -> None:
        self.observed.append((candidates, routed, preference))
        if self.error is not None:
            raise self.error


def test_a_router_sees_the_verdicts_on_its_choices_once_and_in_order(make_engine, scripted_judge):
    judge = scripted_judge(lambda pair: Verdict.none("timeout") if "0:0:1" in pair.id else Verdict(0.5))
    router = Pupil()
    scores = make_engine(judge, router).score(PROMPTS, RESPONSES)
    assert [id(c) for c, _, _ in router.observed] == [id(c) for c, _ in router.offered]
    failed = scores.summary()["decided_by"]["judge_failed"]
    seen = torch.cat([preference for _, _, preference in router.observed])
    routed = torch.cat([mask for _, mask, _ in router.observed])
    assert seen[~routed].isnan().all()
    assert int(seen[routed].isnan().sum()) == failed > 0
    assert (seen[routed].nan_to_num(0.5) == 0.5).all()


def test_a_router_that_cannot_learn_loses_no_batch(make_engine, scripted_judge, caplog):
    router = Pupil(OSError("disk full"))
    scores = make_engine(scripted_judge(lambda _: WIN), router).score(PROMPTS, RESPONSES)
    assert scores.summary()["decided_by"]["judge"] == sum(int(mask.sum()) for _, mask in router.offered)
    assert "router.observe raised" in caplog.text
