"""Judge calls while the backbone runs: what starts when, what a cancellation leaves behind, what a budget is told.

Time does not pass in these tests: what must come first is waited for by events, and clocks are turned by hand.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from support.cancelling import cancelled_everywhere

from rmcore import BudgetRouter, RewardEngine, RewardModel
from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine.micro_batches import micro_batches
from rmcore.engine.routing import AdaptiveRouter, AlwaysRoute, Budget, NeverRoute, Reservation, ThresholdRouter
from rmcore.judge import run_sync
from rmcore.judge.base import JudgeUsage, Pair, Verdict

WIN = Verdict(1.0, usage=JudgeUsage(calls=1, attempts=1, prompt_tokens=10))
PATIENCE = 20.0  # seconds until a test that hangs fails

PROMPTS = [f"p{k}" for k in range(6)]
RESPONSES = [[f"{k} 0", f"{k} 1"] for k in range(6)]
TEXTS = [text for group in RESPONSES for text in group]
"""Each group is 4 tokens of the table model (two rows of prompt and response), so 4 makes it a micro-batch."""


class Backbone:
    """The table of a table model: counts what it encodes, and calls ``before`` with the number of texts so far."""

    def __init__(self, before: Callable[[int], None] = lambda _n: None) -> None:
        self.before = before
        self.encoded: list[str] = []

    def __call__(self, _prompt: str, text: str) -> list[float]:
        self.before(len(self.encoded))
        self.encoded.append(text)
        return [float(x) for x in text.split()]


class Gated:
    """A judge whose first call says that it came, and whose calls end only when they are let go."""

    def __init__(self) -> None:
        self.came, self.ended = threading.Event(), threading.Event()
        self.let_go = threading.Event()
        self.calls: list[list[Pair]] = []
        self.cancelled = 0

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.calls.append(list(pairs))
        self.came.set()
        try:
            while not self.let_go.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended.set()
        return [WIN] * len(pairs)


class HandClock:
    """Time that stands still until it is turned; whoever sleeps wakes when his time has come."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        end = self.time + seconds
        while self.time < end:
            await asyncio.sleep(0.001)


@pytest.fixture
def make_engine(hand_head, table_model):
    def make(judge, router=None, table=None, **kwargs) -> RewardEngine:
        model = table_model(hand_head([1.0, 0.0]), table or Backbone())
        return RewardEngine(model, judge, router or AlwaysRoute(), **{"micro_batch_tokens": 4, **kwargs})

    return make


def run_async(engine: RewardEngine, *args):
    return asyncio.run(asyncio.wait_for(engine.score_async(*args), PATIENCE))


SCORE = pytest.mark.parametrize("score", [RewardEngine.score, run_async], ids=["sync", "async"])


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "what the test waits for did not come"


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


# -- cancellation ----------------------------------------------------------------------------------------------------


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "rmcore-score"}


def test_cancelling_stops_backbone_and_judge_and_leaves_nothing(make_engine):
    judge, reached, go_on = Gated(), threading.Event(), threading.Event()

    def before(n: int) -> None:
        if n == 4:
            wait(judge.came)
            reached.set()
            wait(go_on)

    table = Backbone(before)
    engine = make_engine(judge, table=table)

    async def run() -> None:
        before_it = asyncio.all_tasks()
        task = asyncio.create_task(engine.score_async(PROMPTS, RESPONSES))
        while not reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        while not judge.cancelled:  # at once, while the backbone is still in its micro-batch
            await asyncio.sleep(0.001)
        assert not task.done()
        task.cancel()  # impatience changes nothing
        await asyncio.sleep(0.001)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before_it

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert judge.cancelled == len(judge.calls)
    assert len(table.encoded) == 6, "the micro-batch it was in is finished, the other three are not begun"
    assert not engine_threads()


def test_cancelled_anywhere_books_are_exact_and_others_have_their_scores(make_engine):
    """Whatever the one who left was waiting for: what it had under way counts as spent, and nothing stays reserved."""

    class Told:
        def __init__(self) -> None:
            self.under_way = 0
            self.asked = 0

        async def judge(self, pairs):
            self.under_way += 1
            self.asked += len(pairs)
            try:
                await asyncio.sleep(0)
            finally:
                self.under_way -= 1
            return [WIN] * len(pairs)

    async def scenario(start):
        judge, budget = Told(), Budget(1000, "calls", max_per_pair=2)
        engine = make_engine(judge, AdaptiveRouter(1.0, budget=budget))
        before = asyncio.all_tasks()
        leaves = start(engine.score_async(PROMPTS, RESPONSES))
        stays = asyncio.create_task(engine.score_async(PROMPTS[:2], RESPONSES[:2]))
        assert [len(group.decisions) for group in await asyncio.wait_for(stays, PATIENCE)] == [1, 1]
        await asyncio.wait({leaves}, timeout=PATIENCE)
        assert leaves.done()
        assert asyncio.all_tasks() == before
        assert not engine_threads()
        assert judge.under_way == 0
        stats = budget.stats()
        assert stats.reserved == 0
        # A pair costs a call here, and two where nobody can say: those of the one who left.
        assert judge.asked <= stats.spent <= 2 + 2 * len(PROMPTS)

    assert cancelled_everywhere(scenario) > 2


def test_cancelling_between_two_forward_passes(make_backbone, preferences):
    """Also without a judge: the backbone stops after the pass it is in, not after the batch."""
    backbone = make_backbone("bert", pooling="mean", tokens_per_batch=1)
    model, _ = RewardModel.fit(backbone, preferences, num_features=16)
    passes, reached, go_on = [], threading.Event(), threading.Event()
    forward = backbone.model.forward

    def slow(*args, **kwargs):
        passes.append(1)
        if len(passes) == 2:
            reached.set()
            wait(go_on)
        return forward(*args, **kwargs)

    backbone.model.forward = slow

    async def run() -> None:
        task = asyncio.create_task(RewardEngine(model).score_async(["p"], [["good", "bad", "fox", "dog"]]))
        while not reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.001)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        asyncio.run(asyncio.wait_for(run(), PATIENCE))
    finally:
        backbone.model.forward = forward
    assert len(passes) == 2
    assert not engine_threads()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize("where", ["backbone", "judge"])
def test_an_interrupt_of_a_sync_call_cancels_the_judge(make_engine, where):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    judge, sent = Gated(), threading.Event()
    encoded = len(TEXTS) if where == "judge" else 4
    hold = threading.Event()

    def interrupt() -> None:
        wait(judge.came)
        while len(table.encoded) < encoded:
            hold.wait(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        sent.set()

    table = Backbone(lambda n: hold.wait(PATIENCE) if n == encoded else None)
    router = Books()
    engine = make_engine(judge, router, table=table)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - wherever between the two the signal arrives
            engine.score(PROMPTS, RESPONSES)
            wait(sent)
    finally:
        signal.signal(signal.SIGINT, before)
    assert judge.cancelled == len(judge.calls) > 0
    assert len(table.encoded) == encoded
    assert {usage for _, usage in router.settled} == {None}
    assert len(router.settled) == len(router.reserved)
    assert run_sync(asyncio.sleep(0, result="alive")) == "alive"


def test_a_judge_that_will_not_be_cancelled_is_left(make_engine, monkeypatch, caplog):
    monkeypatch.setattr("rmcore.engine.judging._PATIENCE_S", 0.01)
    asked, release = asyncio.Event(), asyncio.Event()

    class Stubborn:
        def __init__(self) -> None:
            self.tries = 0

        async def judge(self, pairs):
            asked.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    self.tries += 1
            return [WIN] * len(pairs)

    judge = Stubborn()

    async def run() -> None:
        task = asyncio.create_task(make_engine(judge).score_async(["p"], [["1 0", "2 0"]]))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert judge.tries >= 1
    assert "left to itself" in caplog.text


# -- deadlines -------------------------------------------------------------------------------------------------------


class Slow:
    """Never answers about the pairs in ``hang``; knows no deadline."""

    def __init__(self, hang: Sequence[str], clock: HandClock, turn_to: float, calls_first: int) -> None:
        self.hang, self.clock, self.turn_to, self.calls_first = set(hang), clock, turn_to, calls_first
        self.calls = 0
        self.cancelled = 0

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.calls += 1
        if self.calls == self.calls_first:
            self.clock.time = self.turn_to
        if any(pair.id in self.hang for pair in pairs):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return [WIN] * len(pairs)


@SCORE
def test_a_judge_that_overruns_is_cancelled_and_finished_calls_are_kept(make_engine, score):
    clock = HandClock()
    judge = Slow(["1:0:1", "4:0:1"], clock, turn_to=133.0, calls_first=6)
    router = Books()
    engine = make_engine(judge, router, judge_deadline_s=30.0, clock=clock)
    scores = score(engine, PROMPTS, RESPONSES)
    assert judge.cancelled == 2
    assert [group.decisions[0].by for group in scores] == ["judge_failed" if k in (1, 4) else "judge" for k in range(6)]
    assert scores.summary()["judge_failures"] == {"deadline": 2}
    assert scores.unaccounted_questions == 2
    assert scores.judge_usage.calls == 4
    assert [usage for _, usage in router.settled] == [None if k in (1, 4) else WIN.usage for k in range(6)], (
        "nobody knows what a cancelled call has cost"
    )


def test_within_the_overtime_a_judge_may_still_bring_what_it_has(make_engine):
    """A judge that keeps the pairs' deadline itself ends a moment after it, with verdicts and reasons of its own."""
    clock = HandClock()

    class Keeps:
        async def judge(self, pairs):
            clock.time = pairs[0].deadline + 1.0
            return [Verdict.none("deadline", WIN.usage)] * len(pairs)

    scores = make_engine(Keeps(), judge_deadline_s=30.0, clock=clock).score(["p"], [["1 0", "2 0"]])
    assert scores.judge_usage.calls == 1
    assert scores.unaccounted_questions == 0


def test_nothing_is_bought_after_the_deadline(make_engine, scripted_judge):
    clock, router = HandClock(), Books()
    judge = scripted_judge(lambda _: WIN)

    def before(n: int) -> None:
        if n == 6:
            clock.time += 31

    engine = make_engine(judge, router, Backbone(before), judge_deadline_s=30.0, clock=clock)
    scores = engine.score(PROMPTS, RESPONSES)
    asked = len(judge.asked)
    assert asked <= 3
    assert scores.summary()["judge_failures"] == {"deadline": 6 - asked}
    assert scores.unaccounted_questions == 0
    assert sum(usage.calls for _, usage in router.settled) == asked


def test_a_judge_that_makes_something_of_being_cancelled(make_engine):
    clock = HandClock()

    class Salvages:
        async def judge(self, pairs):
            await asyncio.sleep(0.005)  # the engine's own alarm is set by now
            clock.time += 100
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return [WIN, Verdict.none("deadline", WIN.usage)]

    engine = make_engine(Salvages(), judge_deadline_s=30.0, clock=clock, micro_batch_tokens=100)
    scores = engine.score(["p", "q"], [["1 0", "2 0"]] * 2)
    assert scores.summary()["decided_by"] == {"head": 0, "judge": 1, "judge_failed": 1, "identical": 0, "nobody": 0}
    assert scores.judge_usage.calls == 2


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_bad_deadlines(make_engine, seconds):
    with pytest.raises(InputError, match="judge_deadline_s"):
        make_engine(Gated(), judge_deadline_s=seconds)


# -- budgets ---------------------------------------------------------------------------------------------------------


class Books:
    """A budgeted router that takes every pair up to a limit, and remembers all it was told."""

    whole_batch = False

    def __init__(self, limit: int = 10**9) -> None:
        self.limit, self.steps = limit, 0
        self.reserved: list[Reservation] = []
        self.settled: list[tuple[Reservation, JudgeUsage | None]] = []

    def select(self, candidates):
        raise AssertionError("a router that can reserve is asked to")

    def begin_step(self) -> None:
        self.steps += 1

    def reserve(self, candidates):
        left = self.limit - sum(reservation.pairs for reservation in self.reserved)
        mask = torch.zeros(len(candidates), dtype=torch.bool)
        mask[torch.argsort(candidates.uncertainty, descending=True, stable=True)[: max(left, 0)]] = True
        self.reserved.append(Reservation(len(self.reserved), int(mask.sum())))
        return mask, self.reserved[-1]

    def settle(self, reservation, usage) -> None:
        self.settled.append((reservation, usage))


@SCORE
def test_each_reservation_is_settled_once_and_in_order(make_engine, score, scripted_judge):
    router = Books(limit=4)
    scores = score(make_engine(scripted_judge(lambda _: WIN), router), PROMPTS, RESPONSES)
    assert router.steps == 1
    assert [reservation for reservation, _ in router.settled] == router.reserved
    assert [usage.calls for _, usage in router.settled] == [1, 1, 1, 1, 0, 0]
    assert scores.summary()["routed"] == 4


def test_hidden_states_are_settled_too(hand_head, scripted_judge):
    router = Books()
    engine = RewardEngine(hand_head([1.0]), scripted_judge(lambda _: WIN), router)
    args = (torch.tensor([[1.0], [2.0], [4.0]]), [3])
    texts = {"prompts": ["p"], "responses": [["a", "b", "a"]]}
    one = engine.score_hidden(*args, **texts)
    two = asyncio.run(engine.score_hidden_async(*args, **texts))
    assert one.to_records() == two.to_records()
    assert [(r.pairs, usage.calls) for r, usage in router.settled] == [(2, 2), (2, 2)]
    assert router.steps == 2


@pytest.mark.parametrize("judge", ["raises", "miscounts", "talks rubbish"])
def test_an_unknown_cost_is_settled_as_unknown(make_engine, judge):
    class Bad:
        async def judge(self, pairs):
            if judge == "raises":
                raise RuntimeError
            return [] if judge == "miscounts" else ["win"] * len(pairs)

    router = Books()
    scores = make_engine(Bad(), router, micro_batch_tokens=100).score(PROMPTS, RESPONSES)
    assert [usage for _, usage in router.settled] == [None]
    assert scores.unaccounted_questions == 6


def test_equal_questions_cost_their_first_reservation(make_engine, scripted_judge):
    router = Books()
    make_engine(scripted_judge(lambda _: WIN), router).score(["p", "p"], [["1 0", "2 0"]] * 2)
    assert [usage.calls for _, usage in router.settled] == [1, 0]


def test_cancelled_calls_are_settled_as_unknown_and_finished_ones_as_what_they_cost(make_engine):
    router = Books()

    class FirstOnly:
        def __init__(self) -> None:
            self.calls = 0

        async def judge(self, pairs):
            self.calls += 1
            if self.calls > 1:
                await asyncio.Event().wait()
            return [WIN] * len(pairs)

    judge = FirstOnly()
    engine = make_engine(judge, router)

    async def run() -> None:
        task = asyncio.create_task(engine.score_async(PROMPTS, RESPONSES))
        while judge.calls < 6:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert [usage for _, usage in router.settled] == [WIN.usage] + [None] * 5


def test_a_reservation_with_a_nonsense_mask_is_settled(make_engine, scripted_judge):
    class Odd(Books):
        def reserve(self, candidates):
            return [True], super().reserve(candidates)[1]

    router = Odd()
    with pytest.raises(InputError, match=r"router\.reserve: got list"):
        make_engine(scripted_judge(lambda _: WIN), router).score(PROMPTS, RESPONSES)
    assert [usage for _, usage in router.settled] == [None]


def test_a_router_whose_books_fail_loses_no_batch(make_engine, scripted_judge, caplog):
    class Torn(Books):
        def settle(self, reservation, usage) -> None:
            super().settle(reservation, usage)
            raise OSError("disk full")

    router = Torn()
    scores = make_engine(scripted_judge(lambda _: WIN), router).score(PROMPTS, RESPONSES)
    assert scores.summary()["decided_by"]["judge"] == 6
    assert len(router.settled) == 6
    assert "router.settle raised" in caplog.text


def test_a_pair_the_head_cannot_score_and_the_budget_does_not_reach(hand_head, scripted_judge):
    judge, router = scripted_judge(lambda _: WIN), Books(limit=1)
    engine = RewardEngine(hand_head([1.0]), judge, router, nonfinite="route")
    hidden = torch.tensor([[1.0], [math.nan], [2.0]])
    scores = engine.score_hidden(hidden, [3], prompts=["p"], responses=[["a", "b", "c"]])
    assert judge.asked == [("a", "b")]
    assert [(d.i, d.j, d.by, d.reason) for d in scores[0].decisions] == [
        (0, 1, "judge", ""),
        (1, 2, "judge_failed", "budget"),
    ]
    assert math.isnan(scores[0].preference[1, 2])
    assert scores[0].preference[0, 2].isfinite()
    assert sum(scores.summary()["decided_by"].values()) == 3


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
    from rmcore.engine.routing import AdaptiveRouter, Budget

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
