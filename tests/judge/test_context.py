"""A response that is longer than the judge's context is judged all the same: cut by rule, counted, stored, told."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from rmcore._base.errors import JudgeError
from rmcore.judge import Fault, JudgePrompt, Pair, RecordedJudge, ReplayServer, Verdict
from rmcore.judge.store.ledger import VerdictLedger
from rmcore.judge.testing import FAULTS

PAD = "and so on, and so forth, " * 4000  # 100,000 characters
LONG = Pair("Which is better?", "bad: " + PAD, "good: short")
BOTH = Pair("Which is better?", "bad: " + PAD, "good: " + PAD)


class GoodFirst(RecordedJudge):
    """The response that begins with "good" wins, whatever else is shown of it."""

    def lookup(self, prompt, first, second):
        return Verdict.of("win" if str(first).startswith("good") else "loss")


@pytest.fixture
def serve():
    def run(**kwargs):
        return ReplayServer(GoodFirst({}), **kwargs)

    return run


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("pair", [LONG, BOTH])
def test_a_policy_cannot_write_its_way_out(serve, make_judge, ask, tells, pair):
    with serve(context_tokens=4096, tells_context=tells) as server:
        judge = make_judge(server.base_url)
        verdict = ask(judge, pair)[0]
    assert verdict.preference == -1
    assert verdict.reason.startswith("cut:")
    assert judge.context.limit == 4096
    assert judge.counts["cut"] > 0
    # Told by the list of models nothing is sent in vain; otherwise each order is refused once at most.
    assert server.statuses == ({200: 2} if tells else {200: 2, 400: server.statuses[400]})
    assert server.statuses[400] <= 2
    assert verdict.usage.calls == 2
    assert verdict.usage.attempts == server.requests


def test_both_orders_show_the_same_of_a_pair(make_judge, ask):
    seen = []

    class Seen(GoodFirst):
        def lookup(self, prompt, first, second):
            seen.append({str(first)[:4]: first, str(second)[:4]: second})
            return super().lookup(prompt, first, second)

    with ReplayServer(Seen({}), context_tokens=4096) as server:
        ask(make_judge(server.base_url, context_tokens=4096), BOTH)
    assert seen[0] == seen[1]
    assert abs(len(seen[0]["bad:"]) - len(seen[0]["good"])) <= 2
    assert seen[0]["bad:"].endswith(PAD[-100:])


def test_a_limit_that_is_given_is_kept_to_before_anything_is_sent(serve, make_judge, ask):
    with serve(context_tokens=2048) as server:
        verdict = ask(make_judge(server.base_url, context_tokens=2048, max_tokens=300), BOTH)[0]
    assert (verdict.preference, server.statuses) == (-1, {200: 2})


def test_a_limit_on_the_answer_that_leaves_no_room_is_lowered(serve, make_judge, ask):
    with serve(context_tokens=4096) as server:
        judge = make_judge(server.base_url, max_tokens=4000)
        verdicts = [ask(judge, pair)[0] for pair in (BOTH, LONG)]
    assert [verdict.preference for verdict in verdicts] == [-1, -1]


def test_the_judges_own_tokenizer_counts(serve, make_judge, ask):
    shown = {}
    for name, tokenizer in {"estimate": None, "function": lambda text: len(text) // 4 + 1, "object": Tokens()}.items():
        with serve(context_tokens=2048) as server:
            given = {"context_tokens": 2048, "tokenizer": tokenizer, "max_tokens": 200, "orders": "one"}
            verdict = ask(make_judge(server.base_url, **given), BOTH)[0]
            assert verdict.preference == -1
            shown[name] = int(verdict.reason.removeprefix("cut:"))
    assert shown["function"] == shown["object"] < shown["estimate"]


class Tokens:
    def encode(self, text):
        return [0] * (len(text) // 4 + 1)


def test_a_tokenizer_that_fails_is_replaced_by_the_estimate(serve, make_judge, ask, caplog):
    def broken(text):
        raise ValueError("special token")

    with serve(context_tokens=2048) as server:
        verdict = ask(make_judge(server.base_url, context_tokens=2048, tokenizer=broken), BOTH)[0]
    assert verdict.preference == -1
    assert caplog.text.count("tokens are estimated") == 1


@pytest.mark.parametrize("bad", [0, 5, True, 4096.0, "4096"])
def test_a_context_that_is_none_is_refused(make_judge, bad):
    with pytest.raises(JudgeError, match="context_tokens"):
        make_judge(context_tokens=bad)
    with pytest.raises(JudgeError, match="tokenizer"):
        make_judge(tokenizer=3)


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind.startswith("context_")])
def test_every_servers_refusal_of_a_short_question_is_too_long(serve, make_judge, ask, kind, clock):
    """Their limit is below the question without its texts, so that nothing would fit."""
    with serve(faults=lambda _: FAULTS[kind]) as server:
        judge = make_judge(server.base_url, orders="one")
        verdict = ask(judge, Pair("p", "a", "b"))[0]
    assert (verdict.preference, verdict.reason, clock.slept) == (None, "too_long", [])
    assert judge.client.state.breaker.state == "closed"
    assert verdict.usage.attempts == server.requests == 1


def test_without_any_number_a_pair_is_shortened_until_it_fits(make_judge, ask, mock_judge, chat_reply):
    sizes = []

    def handler(request):
        if request.method == "GET":
            return httpx.Response(404)
        sizes.append(len(request.content))
        if sizes[-1] > 40_000:
            return httpx.Response(413, text="Request Entity Too Large")
        return chat_reply(request, "<verdict>$win</verdict>")

    judge = mock_judge(handler, orders="one")
    verdict = ask(judge, BOTH)[0]
    assert verdict.preference is not None
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= 4
    assert judge.context.limit is None, "a size that was tried is no limit that was stated"


def test_what_never_fits_is_given_up(ask, mock_judge):
    count = []

    def handler(request):
        count.append(1)
        return httpx.Response(400, json={"error": {"message": "prompt is too long"}})

    verdict = ask(mock_judge(handler, orders="one"), BOTH)[0]
    assert (verdict.reason, verdict.usage.attempts) == ("too_long", verdict.usage.attempts)
    assert len(count) <= 8


def test_a_refusal_that_was_never_borne_out_is_not_remembered(serve, make_judge, ask):
    with serve(faults=[FAULTS["context_vllm"]]) as server:
        judge = make_judge(server.base_url, orders="one")
        first, second = ask(judge, Pair("p", "good", "b"), Pair("p", "good", "c"))
    assert {first.reason, second.reason} == {"too_long", ""}
    assert judge.context.limit is None


def test_an_answer_that_the_context_ends_is_asked_again_shorter(ask, mock_judge, chat_reply):
    """A response that leaves the judge a few tokens for its verdict."""
    asked = []

    def handler(request):
        if request.method == "GET":
            return httpx.Response(404)
        tokens = len(request.content) // 4
        asked.append(tokens)
        if tokens > 5000:
            usage = {"prompt_tokens": tokens, "completion_tokens": 20}
            reply = chat_reply(request, "Well, the first", finish_reason="length")
            return httpx.Response(200, json=json.loads(reply.content) | {"usage": usage})
        return chat_reply(request, "<verdict>$win</verdict>")

    pair = Pair("p", "a " * 15_000, "b")
    verdict = ask(mock_judge(handler, orders="one", max_tokens=2048), pair)[0]
    assert verdict.preference is not None
    assert len(asked) == 2


def test_a_short_limit_on_answers_is_still_length(ask, mock_judge, chat_reply):
    def handler(request):
        reply = json.loads(chat_reply(request, "Well", finish_reason="length").content)
        return httpx.Response(200, json=reply | {"usage": {"prompt_tokens": 500, "completion_tokens": 64}})

    verdict = ask(mock_judge(handler, orders="one", max_tokens=64), Pair("p", "a", "b"))[0]
    assert (verdict.reason, verdict.usage.attempts) == ("length", 1)


def test_a_request_above_the_limit_of_tokens_a_minute_is_cut_too(serve, make_judge, ask):
    with serve() as server:
        judge = make_judge(server.base_url, tokens_per_minute=8_000, max_tokens=500, orders="one")
        verdict = ask(judge, BOTH)[0]
    assert (verdict.preference, server.statuses) == (-1, {200: 1})


def test_the_cut_is_kept_with_the_verdict_and_found_again(serve, make_judge, ask, tmp_path):
    path = tmp_path / "v.db"
    with serve(context_tokens=4096, tells_context=True) as server:
        first = ask(make_judge(server.base_url, store=path), LONG)[0]
        again = ask(make_judge(server.base_url, store=path), LONG)[0]
        larger = make_judge(server.base_url, store=path, context_tokens=200_000, orders="one")
        refused = ask(larger, LONG)[0]
        assert refused.reason == first.reason
        assert (refused.usage.cache_hits, larger.context.limit) == (1, 4096), "refused whole, and found again once cut"
    assert (again.preference, again.reason) == (first.preference, first.reason)
    assert (again.usage.calls, again.usage.cache_hits) == (0, 2)
    with VerdictLedger(path) as ledger:
        calls = [call for call in ledger.calls() if call.preference is not None]
        gone = {call.characters_cut for call in calls}
        assert len(calls) == 2
        assert len(gone) == 2, "one order each"
        assert ledger.stats()["cut"] == 2
        (pair,) = ledger.pairs()
        row = pair.to_row()
    texts = {row["chosen"], row["rejected"]}
    assert texts == {LONG.first, LONG.second}, "what is kept is whole"
    assert row["cut"]["rejected"] > 90_000
    assert row["cut"]["chosen"] == row["cut"]["prompt"] == 0


def test_special_tokens_grow_a_text_and_are_counted(serve, make_judge, ask):
    hostile = Pair("p", "good " + "<|x|>" * 20_000, "bad " + "[INST]" * 20_000)
    with serve(context_tokens=4096) as server:
        verdict = ask(make_judge(server.base_url, context_tokens=4096), hostile)[0]
    assert (verdict.preference, server.statuses) == (1, {200: 2})


def test_conversations_are_cut_too(serve, make_judge, ask):
    turns = [{"role": "user", "content": "Tell me. " * 10}, {"role": "assistant", "content": PAD}] * 20
    prompt = [*turns, {"role": "user", "content": "And now?"}]
    first = [{"role": "assistant", "content": "good"}] * 3000
    with serve(context_tokens=4096) as server:
        judge = make_judge(server.base_url, context_tokens=4096, orders="one")
        verdict = ask(judge, Pair(prompt, first, "bad"))[0]
    assert not verdict.failed
    assert server.statuses == {200: 1}


def test_cancelling_in_the_middle_leaves_nothing(serve, make_judge):
    async def run(judge):
        task = asyncio.create_task(judge.judge([BOTH] * 8))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert judge.client.state.concurrency.in_flight == 0
        await judge.aclose()

    with serve(context_tokens=4096, faults=lambda n: Fault(delay_s=30)) as server:
        asyncio.run(run(make_judge(server.base_url)))


def test_the_template_alone_may_be_too_long(serve, make_judge, ask):
    long = JudgePrompt(system="Read this. " * 2000 + "$contract")
    with serve(context_tokens=2048) as server:
        verdict = ask(make_judge(server.base_url, prompt=long, context_tokens=2048), LONG)[0]
    assert (verdict.reason, server.requests) == ("too_long", 0)


def test_the_context_is_asked_for_again_where_whoever_asked_went_away(mock_judge, chat_reply):
    asked, hold = [], asyncio.Event()

    async def handler(request):
        if request.method == "GET":
            asked.append(request)
            await hold.wait()
            return httpx.Response(200, json={"data": [{"id": "judge-model", "max_model_len": 4096}]})
        return chat_reply(request, "<verdict>$win</verdict>")

    async def main():
        judge = mock_judge(handler, orders="one")
        leaves = asyncio.create_task(judge.judge([BOTH]))
        while not asked:
            await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.wait({leaves})
        hold.set()
        await judge.judge([BOTH])
        assert (len(asked), judge.context.limit) == (2, 4096)

    asyncio.run(main())
